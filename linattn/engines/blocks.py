"""Softmax inside aligned blocks of the diagonal: the softmax engine on each block, the last one ragged.

    out[t] = sum_s p[t, s] v[s],   p = softmax(scale q k^T) over the s with floor(s / block) = floor(t / block)

Complete blocks are a leading axis of one call. The state of a stream is the keys and values of the block that is open;
at a boundary they are dropped.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, NamedTuple

from linattn import _arrays
from linattn._arrays import Array
from linattn.engines import softmax
from linattn.engines.softmax import SoftmaxState


class Options(NamedTuple):
    """How tokens are mixed. `used`: positions of the open block that lie before the first token."""

    scale: float
    span: str
    block: int
    used: int
    key_mask: Array | None


class Piece(NamedTuple):
    """Tokens first .. last - 1: whole blocks, or the part of one block; `cached` keys of the state come before."""

    first: int
    last: int
    blocks: int  # 0: part of a block
    cached: int


class Saved(NamedTuple):
    q: Array
    k: Array
    v: Array
    state: SoftmaxState | None


def pieces(n_tokens: int, options: Options, cached: int) -> list[Piece]:
    """The rest of the open block, whole blocks, the beginning of the last."""
    found, first = [], 0
    if options.used:
        first = min(n_tokens, options.block - options.used)
        found.append(Piece(0, first, 0, cached))
    whole = (n_tokens - first) // options.block
    last = first + whole * options.block
    found += [Piece(first, last, whole, 0), Piece(last, n_tokens, 0, 0)]
    return [piece for piece in found if piece.last > piece.first]


def forward(
    q: Array, k: Array, v: Array, state: SoftmaxState | None, options: Options, *, room: ModuleType, xp: Any
) -> tuple[Array, Array | None, SoftmaxState | None, Saved]:
    """out (..., N, E) in the accumulation dtype; which rows see a key of their block (None: all); the state; saved."""
    lead, parts, seen = _lead(q, k, v, state, options), [], []
    for piece in pieces(q.shape[-2], options, _n_cached(state)):
        part_q, part_k, part_v, own = _cut(q, k, v, state, options, piece, xp)
        y, _ = softmax.forward(part_q, part_k, part_v, own, room=room, out=None, xp=xp)
        parts.append(_joined(y, lead, piece, xp))
        if own.key_mask is not None:
            rows = _joined(_rows_that_see(own, part_q.shape[-2], xp), lead, piece, xp)
        else:
            rows = xp.ones((*lead, piece.last - piece.first, 1), dtype=xp.bool, device=_arrays.device(q))
        seen.append(rows)
    masked = options.key_mask is not None or (state is not None and state.visible is not None)
    if not parts:
        dtype = _arrays.accumulator(q, xp)
        parts = [xp.zeros((*lead, 0, v.shape[-1]), dtype=dtype, device=_arrays.device(q))]
        masked = False
    visible = xp.concat(seen, axis=-2) if masked else None
    return xp.concat(parts, axis=-2), visible, _advanced(k, v, state, options, xp), Saved(q, k, v, state)


def backward(
    d_out: Array, d_state: SoftmaxState | None, saved: Saved, options: Options, *, room: ModuleType, xp: Any
) -> tuple[Array, Array, Array, tuple[Array, Array] | None]:
    """d_q, d_k, d_v with the shapes of q, k, v in the accumulation dtype, and those of the cached keys and values."""
    q, k, v, state = saved
    dtype, cached = _arrays.accumulator(q, xp), _n_cached(state)
    grads: tuple[list[Array], list[Array], list[Array]] = ([], [], [])
    before = None if state is None else [xp.zeros_like(_arrays.cast(x, dtype, xp)) for x in (state.k, state.v)]
    for piece in pieces(q.shape[-2], options, cached):
        part_q, part_k, part_v, own = _cut(q, k, v, state, options, piece, xp)
        g = _split(_arrays.cast(d_out, dtype, xp)[..., piece.first : piece.last, :], piece, xp)
        d_q, d_k, d_v = softmax.backward(g, softmax.Saved(part_q, part_k, part_v), own, room=room, out=None, xp=xp)
        if piece.cached and before is not None:
            before = [
                a + _arrays.unbroadcast(d[..., : piece.cached, :], tuple(a.shape), xp)
                for a, d in zip(before, (d_k, d_v), strict=True)
            ]
        own_grads = (d_q, d_k[..., piece.cached :, :], d_v[..., piece.cached :, :])
        for of, d, x in zip(grads, own_grads, (q, k, v), strict=True):
            flat = _flat(d, piece, xp)
            of.append(_arrays.unbroadcast(flat, (*x.shape[:-2], piece.last - piece.first, x.shape[-1]), xp))
    d_q, d_k, d_v = (
        xp.concat(of, axis=-2) if of else xp.zeros_like(_arrays.cast(x, dtype, xp))
        for of, x in zip(grads, (q, k, v), strict=True)
    )
    if d_state is not None and before is not None:
        kept = _n_kept(k.shape[-2], options, cached)
        new = min(kept, k.shape[-2])
        d_k, d_v = (_plus_last(d, x, new, xp) for d, x in ((d_k, d_state.k), (d_v, d_state.v)))
        cached_part = (x[..., : kept - new, :] for x in d_state[:2])
        before = [_plus_last(d, x, kept - new, xp) for d, x in zip(before, cached_part, strict=True)]
    return d_q, d_k, d_v, None if before is None else (before[0], before[1])


def weights(q: Array, k: Array, options: Options, xp: Any) -> Array:
    """p (..., N, N) in the accumulation dtype: zero outside the blocks. O(N^2)."""
    dtype, n_tokens = _arrays.accumulator(q, xp), q.shape[-2]
    scores = options.scale * xp.matmul(_arrays.cast(q, dtype, xp), xp.matrix_transpose(_arrays.cast(k, dtype, xp)))
    t = xp.arange(n_tokens, device=_arrays.device(q))
    near = (t[:, None] // options.block) == (t[None, :] // options.block)
    if options.span == "past":
        near = near & (t[None, :] <= t[:, None])
    if options.key_mask is not None:
        near = near & options.key_mask[..., None, :]
    if n_tokens == 0:
        return scores
    scores = xp.where(near, scores, xp.full_like(scores, -math.inf))
    top = xp.max(scores, axis=-1, keepdims=True)
    p = xp.exp(scores - xp.where(top == -math.inf, xp.zeros_like(top), top))
    total = xp.sum(p, axis=-1, keepdims=True, dtype=p.dtype)
    return p / xp.where(total == 0, xp.ones_like(total), total)


# -- pieces -----------------------------------------------------------------------------------------------------


def _cut(
    q: Array, k: Array, v: Array, state: SoftmaxState | None, options: Options, piece: Piece, xp: Any
) -> tuple[Array, Array, Array, softmax.Options]:
    """The operands of one call of the softmax engine."""
    tokens, dtype = slice(piece.first, piece.last), _arrays.accumulator(q, xp)
    q, k, v = q[..., tokens, :], k[..., tokens, :], v[..., tokens, :]
    mask = None if options.key_mask is None else options.key_mask[..., tokens]
    if piece.cached and state is not None:
        k, v, mask = softmax.extend(state, k, v, mask, xp)
    q, k, v = (_split(_arrays.row_major(_arrays.cast(x, dtype, xp)), piece, xp) for x in (q, k, v))
    if mask is not None and piece.blocks:
        mask = xp.reshape(mask, (*mask.shape[:-1], piece.blocks, options.block))
    return q, k, v, softmax.Options(options.scale, options.span, piece.cached, mask)


def _split(x: Array, piece: Piece, xp: Any) -> Array:
    """(..., T, d) -> (..., blocks, block, d)."""
    size = (piece.last - piece.first) // max(piece.blocks, 1)
    return xp.reshape(x, (*x.shape[:-2], piece.blocks, size, x.shape[-1])) if piece.blocks else x


def _flat(x: Array, piece: Piece, xp: Any) -> Array:
    """(..., blocks, block, d) -> (..., T, d)."""
    return xp.reshape(x, (*x.shape[:-3], piece.last - piece.first, x.shape[-1])) if piece.blocks else x


def _joined(x: Array, lead: tuple[int, ...], piece: Piece, xp: Any) -> Array:
    """(..., blocks, block, d) -> (*lead, T, d)."""
    x = _flat(x, piece, xp)
    return xp.broadcast_to(x, (*lead, *x.shape[-2:]))


def _rows_that_see(own: softmax.Options, n_rows: int, xp: Any) -> Array:
    """(..., rows, 1): whether a query sees any key of its block."""
    mask: Any = own.key_mask
    if own.span == "all":
        return xp.broadcast_to(xp.any(mask, axis=-1, keepdims=True), (*mask.shape[:-1], n_rows))[..., None]
    return (xp.cumulative_sum(_arrays.cast(mask, xp.int32, xp), axis=-1) > 0)[..., own.offset :, None]


# -- the open block ---------------------------------------------------------------------------------------------


def _lead(q: Array, k: Array, v: Array, state: SoftmaxState | None, options: Options) -> tuple[int, ...]:
    leads = [tuple(x.shape[:-2]) for x in (q, k, v)]
    masks = [options.key_mask, None if state is None else state.visible]
    return _arrays.broadcast_shapes(*leads, *(tuple(m.shape[:-1]) for m in masks if m is not None))


def _n_cached(state: SoftmaxState | None) -> int:
    return 0 if state is None else state.k.shape[-2]


def _n_kept(n_tokens: int, options: Options, cached: int) -> int:
    """How many keys the open block holds behind n more tokens."""
    if options.used + n_tokens < options.block:
        return cached + n_tokens
    return (options.used + n_tokens) % options.block


def _advanced(k: Array, v: Array, state: SoftmaxState | None, options: Options, xp: Any) -> SoftmaxState | None:
    if state is None:
        return None
    if options.used + k.shape[-2] < options.block:
        return softmax.extend(state, k, v, options.key_mask, xp)
    first = k.shape[-2] - _n_kept(k.shape[-2], options, _n_cached(state))  # the open block is closed; copies
    visible = None if options.key_mask is None else xp.concat([options.key_mask[..., first:]], axis=-1)
    return SoftmaxState(xp.concat([k[..., first:, :]], axis=-2), xp.concat([v[..., first:, :]], axis=-2), visible)


def _plus_last(d: Array, x: Array, count: int, xp: Any) -> Array:
    """d with the last `count` tokens of x added to its own last ones."""
    if count == 0:
        return d
    n = d.shape[-2]
    x = _arrays.unbroadcast(
        _arrays.cast(x[..., x.shape[-2] - count :, :], d.dtype, xp), (*d.shape[:-2], count, d.shape[-1]), xp
    )
    return xp.concat([d[..., : n - count, :], d[..., n - count :, :] + x], axis=-2)
