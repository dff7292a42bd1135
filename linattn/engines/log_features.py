"""Log-features made piece by piece: the log-linear engine for sequences whose N x R logarithms are never whole.

A long sequence is a stream: causal, the state goes from piece to piece; otherwise the keys go into the state first,
and then the queries read it. The backward goes the same way back, with the cotangent of the state. Pieces lie on the
chunk grid of every backend.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

from linattn import _arrays
from linattn._arrays import Array
from linattn.backends import ROOM_OF
from linattn.backends.reference.linear import visible_mean
from linattn.engines import loglinear
from linattn.engines.loglinear import LogLinearState, Options

WHOLE = 2**18  # logarithms of a head that may be there at once
PIECE = 768  # tokens of a piece, where there are more: near in memory, and a multiple of every backend's chunk
Cotangents = tuple[Any, ...]


class LogFeatures(NamedTuple):
    """Row by row: x (..., T, D) to logarithms (..., T, R), and their cotangents to those of x and of constants."""

    log_q: Callable[[Array], Array]
    log_k: Callable[[Array], Array]
    log_q_vjp: Callable[[Array, Array], tuple[Array, Cotangents]]
    log_k_vjp: Callable[[Array, Array], tuple[Array, Cotangents]]


class Piece(NamedTuple):
    """Tokens of the queries and tokens of the keys that are taken together; None: none of them."""

    queries: slice | None
    keys: slice | None


class _Part(NamedTuple):
    """Arguments of the engine for one piece."""

    lq: Array
    lk: Array
    v: Array
    options: Options


def pieces(features: LogFeatures, n_queries: int, k: Array, causal: bool) -> list[Piece]:
    """In the order of the forward. One piece where a graph may be traced: it would grow with N."""
    n_keys = k.shape[-2]
    n_tokens = max(n_queries, n_keys)
    few = n_tokens <= PIECE or n_tokens * features.log_k(k[..., :0, :]).shape[-1] <= WHOLE
    if few or _arrays.library(k) not in ROOM_OF:
        return [Piece(slice(0, n_queries), slice(0, n_keys))]
    of_queries, of_keys = (
        [slice(a, min(a + PIECE, n)) for a in range(0, max(n, 1), PIECE)] for n in (n_queries, n_keys)
    )
    if causal:
        return [Piece(a, b) for a, b in zip(of_queries, of_keys, strict=True)]
    return [*(Piece(None, b) for b in of_keys), *(Piece(a, None) for a in of_queries)]


def forward(
    features: LogFeatures, q: Array, k: Array, v: Array, state: LogLinearState | None, options: Options,
    *, room: ModuleType, out: Array | None, xp: Any,
) -> tuple[Array, LogLinearState | None]:  # fmt: skip
    """out (..., N, E) and the state after all keys."""
    parts, now = [], state
    for piece in pieces(features, q.shape[-2], k, options.span == "past"):
        part = _part(features, q, k, v, options, piece)
        whole = piece.queries is not None and piece.queries == slice(0, q.shape[-2])
        into = out if out is None or whole else out[..., piece.queries or slice(0, 0), :]
        y, _, now = loglinear.forward(part.lq, part.lk, part.v, now, part.options, room=room, out=into, xp=xp)
        if whole:
            return y, now
        if piece.queries is not None:
            parts.append(y)
    return (xp.concat(parts, axis=-2) if out is None else out), now


def backward(
    features: LogFeatures, d_out: Array, d_state: Array | None,
    q: Array, k: Array, v: Array, state: LogLinearState | None, options: Options,
    *, room: ModuleType, xp: Any,
) -> tuple[Array, Array, Array, Array, Cotangents]:  # fmt: skip
    """d_q, d_k (unsummed where the features have more leading axes), d_v, d_sums, and cotangents of the constants."""
    plan = pieces(features, q.shape[-2], k, options.span == "past")
    states, centre, values = [state], None, v
    if len(plan) > 1:
        # the values are centred once for all pieces: else what they share would cancel in sums and cotangents
        values = _arrays.cast(v, _arrays.accumulator(v, xp), xp)
        centre = visible_mean(values, options.key_mask, xp)
        values = values - centre
        states = [None if state is None else loglinear.centred(state, centre, xp)]
        for piece in plan[:-1]:
            states.append(_absorbed(features, q, k, values, states[-1], options, piece, room, xp))
        d_state = None if d_state is None else _shifted(d_state, centre, 1, xp)
    d_q, d_k, d_v, d_constants = [], [], [], ()
    for piece, before in zip(reversed(plan), reversed(states), strict=True):
        part = _part(features, q, k, values, options, piece)
        g = d_out[..., piece.queries, :] if piece.queries is not None else _no_rows(part, xp)
        g = _arrays.cast(g, part.v.dtype, xp)
        d_lq, d_lk, d_values, d_state = loglinear.backward(
            g, None, d_state, part.lq, part.lk, part.v, before, part.options, room=room, xp=xp, centre=centre is None
        )
        if piece.queries is not None:
            d_x, more = features.log_q_vjp(d_lq, q[..., piece.queries, :])
            d_q.append(d_x)
            d_constants = _added(d_constants, more)
        if piece.keys is not None:
            d_x, more = features.log_k_vjp(d_lk, k[..., piece.keys, :])
            d_k.append(d_x)
            d_v.append(d_values)
            d_constants = _added(d_constants, more)
    if centre is not None:
        d_state = _shifted(d_state, centre, -1, xp)
    d_q, d_k, d_v = (x[0] if len(x) == 1 else xp.concat(x[::-1], axis=-2) for x in (d_q, d_k, d_v))
    return d_q, d_k, d_v, d_state, d_constants


def _part(features: LogFeatures, q: Array, k: Array, v: Array, options: Options, piece: Piece) -> _Part:
    """What the engine takes of a piece. Keys alone come with no query of their own head, not with none of each."""
    keys = slice(0, 0) if piece.keys is None else piece.keys
    lk = features.log_k(k[..., keys, :])
    lq = lk[..., :0, :] if piece.queries is None else features.log_q(q[..., piece.queries, :])
    mask = None if options.key_mask is None else options.key_mask[..., keys]
    return _Part(lq, lk, v[..., keys, :], options._replace(key_mask=mask))


def _absorbed(
    features: LogFeatures, q: Array, k: Array, v: Array, state: LogLinearState | None, options: Options,
    piece: Piece, room: ModuleType, xp: Any,
) -> LogLinearState | None:  # fmt: skip
    """The state after the keys of a piece."""
    if piece.keys is None:
        return state
    part = _part(features, q, k, v, options._replace(span="all"), Piece(None, piece.keys))
    return loglinear.forward(part.lq, part.lk, part.v, state, part.options, room=room, out=None, xp=xp)[2]


def _no_rows(part: _Part, xp: Any) -> Array:
    """d_out of keys alone."""
    shape = loglinear.state_shape(tuple(part.lk.shape), tuple(part.v.shape), part.options.key_mask)
    return xp.zeros((*shape[:-2], 0, part.v.shape[-1]), dtype=part.v.dtype, device=_arrays.device(part.v))


def _shifted(d_sums: Array, centre: Array, sign: int, xp: Any) -> Array:
    """From the cotangent of the sums of [v, 1] to that of the sums of [v - centre, 1] (sign 1), and back (-1)."""
    dtype = _arrays.wide(d_sums, xp)
    d_sums, came = _arrays.cast(d_sums, dtype, xp), d_sums.dtype
    shift = xp.sum(d_sums[..., :-1] * _arrays.cast(centre, dtype, xp), axis=-1, keepdims=True, dtype=dtype)
    return _arrays.cast(xp.concat([d_sums[..., :-1], d_sums[..., -1:] + sign * shift], axis=-1), came, xp)


def _added(a: Cotangents, b: Cotangents) -> Cotangents:
    """Cotangents of the constants from more rows; () is none."""
    return tuple(x + y for x, y in zip(a, b, strict=True)) if a and b else a or b
