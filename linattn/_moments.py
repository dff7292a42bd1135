"""Means and deviations over the visible tokens, for mechanisms that fit themselves to data.

A scope says which numbers are one sample; a moment has the axes of x, those of the sample with length 1:

    tensor    all of x
    head      tokens and channels, and the first of two or more leading axes (the batch): heads keep their own
    sample    tokens and channels: every sequence and head keeps its own
"""

from __future__ import annotations

from typing import Any, NamedTuple

from linattn import _arrays
from linattn._arrays import Array

SCOPES = ("tensor", "head", "sample")


class Moments(NamedTuple):
    """Of one sample each; axes of length 1 where they were pooled."""

    mean: Array
    sigma: Array  # NaN for a sample of less than two
    count: Array


def moments(
    x: Array,
    scope: str,
    xp: Any,
    *,
    key_mask: Array | None = None,
    shared_by: tuple[int, ...] | None = None,
    ddof: int = 1,
) -> Moments:
    """Mean and standard deviation of x (..., tokens, channels) over the tokens that `key_mask` (..., tokens) shows."""
    x, visible = joined(x, key_mask, xp)
    axes = pooled_axes(tuple(x.shape[:-2]), scope, shared_by)
    count = counted(x, visible, axes, xp)
    mean = total(x, visible, axes, xp) / xp.where(count > 0, count, xp.ones_like(count))
    squares = total((x - mean) ** 2, visible, axes, xp)
    free = count - ddof
    variance = squares / xp.where(free > 0, free, xp.full_like(free, float("nan")))
    return Moments(mean, xp.sqrt(variance), count)


def joined(x: Array, key_mask: Array | None, xp: Any) -> tuple[Array, Array | None]:
    """x in a wide dtype with the leading axes of the mask joined in, and which of its numbers are visible."""
    x = _arrays.cast(x, _arrays.wide(x, xp), xp)
    if key_mask is None:
        return x, None
    shape = (*_arrays.broadcast_shapes(tuple(x.shape[:-2]), tuple(key_mask.shape[:-1])), *x.shape[-2:])
    return xp.broadcast_to(x, shape), xp.broadcast_to(key_mask[..., None], shape)


def pooled_axes(lead: tuple[int, ...], scope: str, shared_by: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """The axes of (*lead, tokens, channels) that are one sample, counted from the end.

    `shared_by`: leading shape of another array whose rows serve several of ours (keys that heads share); what it lacks
    or has as 1 is pooled too, so that nothing shared is set apart.
    """
    axes = [-2, -1]
    for i, size in enumerate(lead):
        of_batch = scope == "tensor" or (scope == "head" and i == 0 and len(lead) > 1)
        from_end = len(lead) - i
        lacking = shared_by is not None and (from_end > len(shared_by) or shared_by[-from_end] == 1)
        if of_batch or (lacking and size != 1):
            axes.append(-2 - from_end)
    return tuple(axes)


def counted(x: Array, visible: Array | None, axes: tuple[int, ...], xp: Any) -> Array:
    """How many numbers a sample has."""
    return total(xp.ones_like(x), visible, axes, xp)


def total(x: Array, visible: Array | None, axes: tuple[int, ...], xp: Any) -> Array:
    if visible is not None:
        x = xp.where(visible, x, xp.zeros_like(x))  # chosen away: a NaN under the mask is not seen
    return xp.sum(x, axis=axes, keepdims=True, dtype=x.dtype)
