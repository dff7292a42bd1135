"""The log-linear engine: attention whose positive features are given by their logarithms.

    A[t, s] = sum_r exp(lq[t, r] + lk[s, r])        for the keys that t sees, else 0
    out[t] = sum_s A[t, s] v[s] / sum_s A[t, s]     lse[t] = log sum_s A[t, s]

It is the linear engine with one scale for each feature, the gauge: out does not change under lk[:, r] -= a_r,
lq[:, r] += a_r, nor under lq[t] -= c_t. An integer power of two for each feature and one for each row keep every
number in range, however large the logarithms are, and rescaling by them rounds nothing. So there is no eps, no
overflow, no maximum over the future, and 1/2 <= den for every row that sees a key.

The gauge is the running maximum of the online softmax (Milakov & Gimelshein, arXiv:1805.02867), kept for each feature.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

from linattn import _arrays
from linattn._arrays import Array
from linattn.backends.reference import loglinear as reference
from linattn.backends.reference._gauges import NONE, Powers


class LogLinearState(NamedTuple):
    """All that past keys leave behind: 2^gauge_r (sums + rest)[r], (..., R, E + 1), gauge (..., R) integers.

    The last column is the sum of the features alone. A feature that no key has had yet has the gauge NONE.
    """

    sums: Array
    rest: Array
    gauge: Array


class Options(NamedTuple):
    """How tokens are mixed; handed down unchanged from forward to backward."""

    span: str
    key_mask: Array | None


def state_shape(lk: tuple[int, ...], v: tuple[int, ...], key_mask: Array | None) -> tuple[int, ...]:
    """(..., R, E + 1) for lk (..., M, R), v (..., M, E); the leading axes of everything that belongs to the keys."""
    leads = [lk[:-2], v[:-2]]
    if key_mask is not None:
        leads.append(tuple(key_mask.shape[:-1]))
    return (*_arrays.broadcast_shapes(*leads), lk[-1], v[-1] + 1)


def empty_state(shape: tuple[int, ...], like: Array, xp: Any) -> LogLinearState:
    """The state before any key; `like` has the dtype of the values."""
    zeros = xp.zeros(shape, dtype=_arrays.accumulator(like, xp), device=_arrays.device(like))
    return LogLinearState(zeros, zeros, xp.full(shape[:-1], NONE, dtype=xp.int32, device=_arrays.device(like)))


def forward(
    lq: Array, lk: Array, v: Array, state: LogLinearState | None, options: Options,
    *, room: ModuleType, out: Array | None, xp: Any,
) -> tuple[Array, Array, LogLinearState]:  # fmt: skip
    """out (..., N, E) in the dtype of v, lse (..., N), and the state after all keys.

    lq (..., N, R), lk (..., M, R), v (..., M, E), leading axes broadcast; logarithms in float64 where the library has
    it, whatever the dtype of v, or in float32 where that rounds nothing. -inf is a feature that is 0; NaN and inf give
    NaN. `room` is a backend's loglinear.py.
    """
    if state is None:
        state = empty_state(state_shape(tuple(lk.shape), tuple(v.shape), options.key_mask), v, xp)
    result, lse, after = room.forward(lq, lk, v, tuple(state), **options._asdict(), out=out, xp=xp)
    return result, lse, LogLinearState(*after)


def backward(
    d_out: Array, d_lse: Array | None, d_state: Array | None,
    lq: Array, lk: Array, v: Array, state: LogLinearState | None, options: Options,
    *, room: ModuleType, xp: Any, centre: bool = True,
) -> tuple[Array, Array, Array, Array]:  # fmt: skip
    """d_lq, d_lk, d_v in the accumulation dtype, and the cotangent of the incoming sums, at the gauge of that state.

    Nothing but the arguments of `forward` is needed. `d_state` is the cotangent of the outgoing sums at their gauge.
    Values are centred, which changes nothing but the rounding; not if `centre` is False, for values that already are.
    """
    if state is None:
        state = empty_state(state_shape(tuple(lk.shape), tuple(v.shape), options.key_mask), v, xp)
    return room.backward(d_out, d_lse, d_state, lq, lk, v, tuple(state), **options._asdict(), centre=centre, xp=xp)


def weights(lq: Array, lk: Array, options: Options, xp: Any) -> Array:
    """A[t, s] / sum_s A[t, s], (..., N, M): what the mechanism means. O(N M R)."""
    return reference.weights(lq, lk, **options._asdict(), xp=xp)


def centred(state: LogLinearState, centre: Array, xp: Any) -> LogLinearState:
    """The state of the values less `centre` (..., 1, E): S_num - z centre^T."""
    total = reference.value(state, xp)
    lost = total[..., -1:] * _arrays.cast(centre, total.dtype, xp)
    total = xp.concat([total[..., :-1] - lost, total[..., -1:]], axis=-1)
    sums, rest = reference.rounded(total, state.sums, xp)
    return LogLinearState(sums, rest, state.gauge)


def merge(earlier: LogLinearState, later: LogLinearState, xp: Any) -> LogLinearState:
    """The state of the keys of both, at the larger gauge; what their addition rounds away goes to `rest`."""
    gauge = xp.maximum(earlier.gauge, later.gauge)
    powers = Powers(earlier.sums, xp)
    parts = []
    for state in (earlier, later):
        shift = powers(state.gauge - gauge, state.sums.dtype)[..., None]
        parts.append((state.sums * shift, state.rest * shift))
    (a, a_rest), (b, b_rest) = parts
    total = a + b
    seen = total - a
    lost = (a - (total - seen)) + (b - seen)  # exact: two-sum
    return LogLinearState(total, a_rest + b_rest + lost, gauge)
