"""The softmax engine: exact softmax attention over keys and values that are kept, the yardstick of the library.

    out[t] = sum_s exp(scale q[t] . k[s]) v[s] / sum_s exp(scale q[t] . k[s])

Its state is the keys and values themselves. Nothing of size N x M is stored: blocks of scores are made, used and
made again in the backward.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

from linattn import _arrays
from linattn._arrays import Array
from linattn.backends.reference import softmax as reference


class SoftmaxState(NamedTuple):
    """All keys and values so far, (..., M, D) and (..., M, E), and which are visible, (..., M); None: all."""

    k: Array
    v: Array
    visible: Array | None


class Saved(NamedTuple):
    q: Array
    k: Array
    v: Array


class Options(NamedTuple):
    scale: float
    span: str
    offset: int
    key_mask: Array | None


def forward(
    q: Array, k: Array, v: Array, options: Options, *, room: ModuleType, out: Array | None, xp: Any
) -> tuple[Array, Saved]:
    """out (..., N, E) and what `backward` needs: the arguments alone."""
    y, _ = room.forward(q, k, v, **options._asdict(), out=out, xp=xp)
    return y, Saved(q, k, v)


def backward(
    d_out: Array, saved: Saved, options: Options, *, room: ModuleType, out: Any, xp: Any
) -> tuple[Array, Array, Array]:
    """d_q, d_k, d_v."""
    return room.backward(d_out, *saved, **options._asdict(), out=out, xp=xp)


def weights(q: Array, k: Array, options: Options, xp: Any) -> Array:
    """exp(scale q[t] . k[s]) over its row sum, (..., N, M); rows that see nothing are 0."""
    wide_q, wide_k, _ = reference.operands(q, k, k, options.key_mask, xp)
    p, total, _, _ = reference.rows_of(
        wide_q,
        wide_k,
        0,
        q.shape[-2],
        k.shape[-2],
        options.scale,
        options.span,
        options.offset,
        options.key_mask,
        xp,
    )
    return _arrays.cast(p / xp.where(total == 0, xp.ones_like(total), total), q.dtype, xp)


def extend(state: SoftmaxState, k: Array, v: Array, key_mask: Array | None, xp: Any) -> SoftmaxState:
    """The state with n more keys and values behind it."""
    visible = None
    if key_mask is not None or state.visible is not None:
        old, new = _all_visible(state.visible, state.k, xp), _all_visible(key_mask, k, xp)
        visible = append(old, new, xp, axis=-1)
    return SoftmaxState(append(state.k, k, xp, axis=-2), append(state.v, v, xp, axis=-2), visible)


def merge(earlier: SoftmaxState, later: SoftmaxState, xp: Any) -> SoftmaxState:
    return extend(earlier, later.k, later.v, later.visible, xp)


def _all_visible(mask: Array | None, k: Array, xp: Any) -> Array:
    return xp.ones(tuple(k.shape[:-1]), dtype=xp.bool, device=_arrays.device(k)) if mask is None else mask


def append(old: Array, new: Array, xp: Any, axis: int) -> Array:
    """`new` behind `old` along the token axis; the other axes broadcast."""
    inner = -axis
    lead = _arrays.broadcast_shapes(tuple(old.shape[:-inner]), tuple(new.shape[:-inner]))
    old = xp.broadcast_to(old, (*lead, *old.shape[len(old.shape) - inner :]))
    new = xp.broadcast_to(new, (*lead, *new.shape[len(new.shape) - inner :]))
    return xp.concat([old, new], axis=axis)
