"""The linear engine: attention whose similarity is a dot product of features.

    P(a, b, c)[t] = sum over s in span(t) of w(t, s) (a[t] . b[s]) c[s]
    v1 = [v, 1]       [num, den] = P(phi_q, phi_k, v1)       out = num / c(den)

P is linear in a, b and c, and its three VJPs are P again with the roles swapped and the span transposed (P'):

    d_a = P(g, c, b)        d_b = P'(c, g, a)        d_c = P'(b, a, g)

so one product serves forward and backward, and the denominator is a column of it. The pair weight is
w(t, s) = turn_q[t] . turn_k[s], two numbers a token (a cosine and a sine), or 1. Earlier keys enter as the sums
S_i = sum_s turn_k[s, i] phi_k[s] v1[s]^T, one for each number a turn has.

The form is that of Katharopoulos et al., ICML 2020, arXiv:2006.16236, eqs. 4-9.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

from linattn import _arrays
from linattn._arrays import Array
from linattn.backends.reference.linear import divisor, operands, visible
from linattn.engines.features import MAPS, FeatureMap


class LinearState(NamedTuple):
    """All that past keys leave behind: their value is `sums` + `rest`, each (..., n, R, E + 1)."""

    sums: Array
    rest: Array


class Saved(NamedTuple):
    """What backward keeps: the arguments of forward and one number a token."""

    q: Array
    k: Array
    v: Array
    state: LinearState
    den: Array | None


class Options(NamedTuple):
    """How tokens are mixed; handed down unchanged from forward to backward."""

    feature_map: FeatureMap
    span: str
    turns: tuple[Array, Array] | None
    key_mask: Array | None
    normalize: bool
    eps: Any


def state_shape(
    k: Array, v: Array, feature_map: FeatureMap, n_sums: int, normalize: bool, leads: list[tuple[int, ...]], xp: Any
) -> tuple[int, ...]:
    """(..., n, R, E + 1), with the leading axes of all that belongs to the keys: k's, v's and `leads`."""
    lead = _arrays.broadcast_shapes(tuple(k.shape[:-2]), tuple(v.shape[:-2]), *leads)
    built_in = MAPS.get(feature_map.name) is feature_map
    n_features = k.shape[-1] if built_in else feature_map.phi(k[..., :0, :], xp).shape[-1]
    return (*lead, n_sums, n_features, v.shape[-1] + normalize)


def empty_state(shape: tuple[int, ...], like: Array, xp: Any) -> LinearState:
    zeros = xp.zeros(shape, dtype=_arrays.accumulator(like, xp), device=_arrays.device(like))
    return LinearState(zeros, zeros)


def forward(
    q: Array, k: Array, v: Array, state: LinearState | None, options: Options,
    *, room: ModuleType, out: Array | None, xp: Any,
) -> tuple[Array, LinearState, Saved]:  # fmt: skip
    """out (..., N, E), the state after all keys, and what `backward` needs.

    q (..., N, D), k (..., M, D), v (..., M, E), leading axes broadcast; `room` is a backend's linear.py.
    """
    if state is None:
        state = empty_state(_shape_of_state(k, v, options, xp), k, xp)
    phi_q, phi_k, v_like, given = _handed_down(q, k, v, options, room, xp)
    direct = out if phi_q.dtype == q.dtype else None
    result, den, after = room.forward(phi_q, phi_k, v_like, state, **given, out=direct, xp=xp)
    if result is not out:
        result = _arrays.fill(out, _arrays.cast(result, q.dtype, xp))
    return result, LinearState(*after), Saved(q, k, v, state, den)


def backward(
    d_out: Array,
    d_state: Array | None,
    saved: Saved,
    options: Options,
    *,
    room: ModuleType,
    out: Any,
    xp: Any,
) -> tuple[Array, Array, Array, Array]:
    """d_q, d_k, d_v and the cotangent of the incoming state, from those of `out` and of the outgoing state."""
    q, k, v, state, den = saved
    phi_q, phi_k, v_like, given = _handed_down(q, k, v, options, room, xp)
    if phi_q is q:  # the room applies the map and its VJP itself
        return room.backward(d_out, d_state, q, k, v, state, den, **given, out=out, xp=xp)
    g = _arrays.cast(d_out, phi_q.dtype, xp)
    d_phi_q, d_phi_k, d_v, d_before = room.backward(
        g, d_state, phi_q, phi_k, v_like, state, den, **given, out=None, xp=xp
    )
    # phi_q = phi(q), phi_k = where(key_mask, phi(k), 0)
    vjp = options.feature_map.vjp
    d_q = vjp(d_phi_q, _arrays.cast(q, phi_q.dtype, xp), xp)
    d_k = visible(vjp(d_phi_k, _arrays.cast(k, phi_k.dtype, xp), xp), _seen_by_any(options.key_mask, k, xp), xp)
    finished = (
        _arrays.fill(o, _arrays.cast(d_x, q.dtype, xp))
        for o, d_x in zip(out or (None, None, None), (d_q, d_k, d_v), strict=True)
    )
    return *finished, d_before


def _seen_by_any(key_mask: Array | None, k: Array, xp: Any) -> Array | None:
    """Which keys some head sees, with the leading axes of k: the mask may have more, over which d_k was summed."""
    if key_mask is None:
        return None
    shape = tuple(k.shape[:-1])
    heads = _arrays.cast(key_mask, _arrays.accumulator(k, xp), xp)
    heads = xp.broadcast_to(heads, _arrays.broadcast_shapes(shape, tuple(key_mask.shape)))
    return _arrays.unbroadcast(heads, shape, xp) > 0


def weights(q: Array, k: Array, options: Options, xp: Any) -> Array:
    """w(t, s) (phi_q[t] . phi_k[s]) / c[t], (..., N, M): what the mechanism means. O(N M)."""
    dtype = _arrays.accumulator(q, xp)
    phi = options.feature_map.phi
    phi_q, phi_k = (phi(_arrays.cast(x, dtype, xp), xp) for x in (q, k))
    phi_q, phi_k, _, _ = operands(phi_q, phi_k, phi_k, options.key_mask, options.normalize, options.eps, xp)
    a = xp.matmul(phi_q, xp.matrix_transpose(phi_k))
    if options.turns is not None:
        turn_q, turn_k = options.turns
        a = a * xp.matmul(turn_q, xp.matrix_transpose(turn_k))
    if options.span == "past":
        a = xp.tril(a)
    if options.key_mask is not None:
        a = xp.where(options.key_mask[..., None, :], a, xp.zeros_like(a))
    if options.normalize:
        c, _, dead = divisor(xp.sum(a, axis=-1, keepdims=True, dtype=a.dtype), options.eps, xp)
        a = xp.where(dead, xp.zeros_like(a), a / c)
    return _arrays.cast(a, q.dtype, xp)


def merge(earlier: LinearState, later: LinearState) -> LinearState:
    """The state of the keys of both: sums add, and what their addition rounds away goes to `rest`."""
    a, b = earlier.sums, later.sums
    total = a + b
    seen = total - a
    lost = (a - (total - seen)) + (b - seen)  # exact: two-sum
    return LinearState(total, earlier.rest + later.rest + lost)


def _shape_of_state(k: Array, v: Array, options: Options, xp: Any) -> tuple[int, ...]:
    leads = [] if options.key_mask is None else [tuple(options.key_mask.shape[:-1])]
    n_sums = 1
    if options.turns is not None:
        *lead, _, n_sums = options.turns[1].shape
        leads.append(tuple(lead))
    return state_shape(k, v, options.feature_map, n_sums, options.normalize, leads, xp)


def _handed_down(
    q: Array, k: Array, v: Array, options: Options, room: ModuleType, xp: Any
) -> tuple[Array, Array, Array, dict[str, Any]]:
    """q, k, v and the options as the room wants them: as they came if it knows the map by name, else features."""
    feature_map = options.feature_map
    if feature_map.name in room.FEATURE_MAPS and MAPS.get(feature_map.name) is feature_map:
        return q, k, v, {**options._asdict(), "feature_map": feature_map.name}
    q, k, v = (_arrays.cast(x, _arrays.accumulator(x, xp), xp) for x in (q, k, v))
    return feature_map.phi(q, xp), feature_map.phi(k, xp), v, {**options._asdict(), "feature_map": "identity"}
