"""Where the numbers lie: flat views, and one table for each layout of what each query head reads.

Kernels see 1-D arrays, element offsets and token strides, so that one compilation serves every layout, broadcast
axes cost no copy, and only an array whose last axis is not contiguous is copied.
"""

from __future__ import annotations

import threading
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numba import types
from numpy.lib.stride_tricks import as_strided

from ._tiles import TILE

__all__ = [
    "ADD", "CLAMP", "LAYOUTS", "SAFE", "Heads", "Kind",
    "described", "divisor_mode", "flat", "heads", "kind_of", "loadable", "scratch",
]  # fmt: skip

SAFE, CLAMP, ADD = range(3)
LAYOUTS = 256  # layouts remembered; a decoding loop needs one
KEPT_BYTES = 1 << 22  # scratch a thread keeps between calls

_local = threading.local()


class Kind(NamedTuple):
    """How the numbers of a dtype are stored, in which dtype they are computed, and as what Numba sees them."""

    stored: np.dtype
    real: np.dtype
    seen_as: np.dtype
    numba: Any
    numba_real: Any


F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
_kinds = {
    F32: Kind(F32, F32, F32, types.float32, types.float32),
    F64: Kind(F64, F64, F64, types.float64, types.float64),
}
_SIXTEEN = {"float16": (np.dtype(np.uint16), types.uint16), "bfloat16": (np.dtype(np.int16), types.int16)}


def kind_of(dtype: np.dtype) -> Kind:
    """The kind of a dtype of q, k, v; 16-bit floats are seen as integers: see `Memory` in _vector.py."""
    found = _kinds.get(dtype)
    if found is None:
        seen_as, numba_type = _SIXTEEN[dtype.name]
        found = _kinds[dtype] = Kind(dtype, F32, seen_as, numba_type, types.float32)
    return found


def loadable(*arrays):
    """The arrays, float16 widened where the vector unit does not convert it."""
    if TILE.halves:
        return arrays
    return tuple(x.astype(F32) if x.dtype.name == "float16" else x for x in arrays)


class Heads(NamedTuple):
    """The leading axes of a call. `table` has a row for each query head, sorted by the head of k and v.

    A row: the head of k and v, the query head, then the first element of what it reads, an array each.
    `groups[i]`: first row of the i-th head of k and v, and the number of rows behind the last; `strides`: from token to
    token, an array each.
    """

    lead: tuple[int, ...]
    lead_kv: tuple[int, ...]
    table: np.ndarray
    groups: list[int]
    strides: tuple[int, ...]


def divisor_mode(eps) -> tuple[int, float]:
    """`eps` as the kernels want it."""
    if eps == "safe":
        return SAFE, 0.0
    kind, x = eps
    return (CLAMP if kind == "clamp" else ADD), x


def described(x):
    """What a layout is known by."""
    return None if x is None else (x.shape, x.strides, x.itemsize)


def contiguous_strides(shape, itemsize):
    strides = []
    for n in reversed(shape):
        strides.append(itemsize)
        itemsize *= max(n, 1)
    return tuple(reversed(strides))


def addressable(array, last_axis):
    """Whether kernels can address an array in whole elements with a contiguous last axis."""
    shape, strides, itemsize = array
    if any(step % itemsize for step in strides):
        return False
    return not last_axis or shape[-1] <= 1 or strides[-1] == itemsize


def flat(x: np.ndarray, last_axis: bool = True) -> np.ndarray:
    """A 1-D contiguous view of all memory `x` spans, or of a copy where kernels could not address it."""
    flags = x.flags
    if flags.c_contiguous:
        return x.reshape(-1) if flags.aligned else x.copy().reshape(-1)
    if not addressable(described(x), last_axis):
        return np.ascontiguousarray(x).reshape(-1)
    lowest = x[tuple(slice(None, None, -1) if step < 0 else slice(None) for step in x.strides)]
    span = 1 + sum(abs(step) * (n - 1) for n, step in zip(x.shape, x.strides)) // x.itemsize
    spanned = as_strided(lowest, (span,), (x.itemsize,))
    return spanned if flags.aligned else spanned.copy()


def elements(array, n_inner, last_axis, lead):
    """First elements of the leading entries of an array in its flat view, broadcast to `lead`, and its token stride."""
    shape, strides, itemsize = array
    if 0 in shape or not addressable(array, last_axis):
        strides = contiguous_strides(shape, itemsize)
    start = -sum(min(0, step) * (n - 1) for n, step in zip(shape, strides) if n > 0)
    total = np.full((1,) * len(lead), start, np.int64)
    outer = shape[: len(shape) - n_inner]
    for axis, (n, step) in enumerate(zip(outer, strides)):
        index = np.arange(n, dtype=np.int64).reshape(-1, *(1,) * (len(outer) - 1 - axis))
        total = total + index * step
    stride = strides[len(shape) - n_inner]
    return np.broadcast_to(total // itemsize, lead).reshape(-1), stride // itemsize


def heads(kv_arrays, q_arrays) -> Heads:
    """The table for arrays (`described`, number of inner axes, whether the last axis must be contiguous).

    Those of the keys, then those of the queries. An array None was not given.
    """

    def leads(arrays):
        return (a[0][: len(a[0]) - n_inner] for a, n_inner, _ in arrays if a is not None)

    lead_kv = np.broadcast_shapes(*leads(kv_arrays))
    lead = np.broadcast_shapes(lead_kv, *leads(q_arrays))
    n_heads = prod(lead)
    # the head of k and v of each query head
    owner = np.broadcast_to(np.arange(prod(lead_kv)).reshape(lead_kv), lead).reshape(-1)
    order = np.argsort(owner, kind="stable")
    columns, strides = [owner, np.arange(n_heads)], []
    for array, n_inner, last_axis in (*q_arrays, *kv_arrays):
        column, stride = (
            (np.zeros(n_heads, np.int64), 0) if array is None else elements(array, n_inner, last_axis, lead)
        )
        columns.append(column)
        strides.append(stride)
    table = np.ascontiguousarray(np.stack(columns, axis=-1)[order], dtype=np.int64)
    groups = [*np.flatnonzero(np.diff(table[:, 0], prepend=-1)).tolist(), n_heads]
    return Heads(lead, lead_kv, table, groups, tuple(strides))


def scratch(dtype: np.dtype, size: int) -> np.ndarray:
    """This thread's scratch, on a 64-byte boundary: at least `size` numbers, contents arbitrary."""
    try:
        kept = _local.scratch
    except AttributeError:
        kept = _local.scratch = {}
    found = kept.get(dtype)
    if found is None or found.size < size:
        n_bytes = size * dtype.itemsize
        raw = np.empty(n_bytes + 64, np.uint8)
        start = -raw.ctypes.data % 64
        found = raw[start : start + n_bytes].view(dtype)
        if n_bytes <= KEPT_BYTES:
            kept[dtype] = found
    return found
