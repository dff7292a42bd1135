"""Where the numbers lie: flat views, and one table a call of what each query head reads.

Kernels see 1-D arrays, element offsets and token strides, so that one compilation serves every layout, broadcast
axes cost no copy, and only an array whose last axis is not contiguous is copied.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from math import prod
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided

__all__ = ["ADD", "CLAMP", "PLANS", "SAFE", "Plan", "divisor_mode", "flat", "plan", "scratch"]

SAFE, CLAMP, ADD = range(3)
PLANS = 256  # layouts remembered; a decoding loop needs one
KEPT_BYTES = 1 << 22  # scratch a thread keeps between calls

_local = threading.local()


class Plan(NamedTuple):
    """The leading axes of a call. `table` has a row for each query head, sorted by the head of k and v.

    A row: the head of k and v, the query head, then the first element of what it reads, an array each.
    `groups[i]`: first row of the i-th head of k and v; `strides`: from token to token, an array each.
    """

    lead: tuple[int, ...]
    lead_kv: tuple[int, ...]
    table: np.ndarray
    groups: np.ndarray
    strides: tuple[int, ...]


def divisor_mode(eps) -> tuple[int, float]:
    """`eps` as the kernels want it."""
    if eps == "safe":
        return SAFE, 0.0
    kind, x = eps
    return (CLAMP if kind == "clamp" else ADD), x


def readable(x: np.ndarray, last_axis: bool) -> np.ndarray:
    """`x`, or a copy where the kernels could not address it in whole elements with a contiguous last axis."""
    if not x.flags.aligned or any(step % x.itemsize for step in x.strides):
        return np.ascontiguousarray(x)
    if last_axis and x.shape[-1] > 1 and x.strides[-1] != x.itemsize:
        return np.ascontiguousarray(x)
    return x


def flat(x: np.ndarray, last_axis: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """A 1-D contiguous view of all memory `x` spans, and `x` itself (or its copy) for its shape and strides."""
    if x.flags.c_contiguous and x.flags.aligned:
        return x.reshape(-1), x
    x = readable(x, last_axis)
    if x.flags.c_contiguous:
        return x.reshape(-1), x
    lowest = x[tuple(slice(None, None, -1) if step < 0 else slice(None) for step in x.strides)]
    span = 1 + sum(abs(step) * (n - 1) for n, step in zip(x.shape, x.strides)) // x.itemsize
    return as_strided(lowest, (span,), (x.itemsize,)), x


def offsets(shape, strides, itemsize, n_inner: int, lead) -> np.ndarray:
    """First elements of the leading entries of an array, broadcast to `lead`, relative to its flat view."""
    start = -sum(min(0, step) * (n - 1) for n, step in zip(shape, strides) if n > 0)
    total = np.full((1,) * len(lead), start, np.int64)
    outer = shape[: len(shape) - n_inner]
    for axis, (n, step) in enumerate(zip(outer, strides)):
        index = np.arange(n, dtype=np.int64).reshape(-1, *(1,) * (len(outer) - 1 - axis))
        total = total + index * step
    return np.broadcast_to(total // itemsize, lead).reshape(-1)


@lru_cache(PLANS)
def plan(kv_arrays, q_arrays) -> Plan:
    """The table for arrays (shape, strides, itemsize, inner axes): those of the keys, then those of the queries.

    An entry None stands for an argument that was not given.
    """

    def leads(arrays):
        return (a[0][: len(a[0]) - a[3]] for a in arrays if a is not None)

    lead_kv = np.broadcast_shapes(*leads(kv_arrays))
    lead = np.broadcast_shapes(lead_kv, *leads(q_arrays))
    n_heads = prod(lead)
    # the head of k and v of each query head
    owner = np.broadcast_to(np.arange(prod(lead_kv)).reshape(lead_kv), lead).reshape(-1)
    order = np.argsort(owner, kind="stable")
    columns, strides = [owner, np.arange(n_heads)], []
    for array in (*q_arrays, *kv_arrays):
        if array is None:
            columns.append(np.zeros(n_heads, np.int64))
            strides.append(0)
        else:
            shape, steps, itemsize, n_inner = array
            columns.append(offsets(shape, steps, itemsize, n_inner, lead))
            strides.append(steps[len(shape) - n_inner] // itemsize)
    table = np.ascontiguousarray(np.stack(columns, axis=-1)[order], dtype=np.int64)
    groups = np.flatnonzero(np.diff(table[:, 0], prepend=-1, append=-1)).astype(np.int64)
    return Plan(lead, lead_kv, table, groups, tuple(strides))


def scratch(dtype: np.dtype, size: int) -> np.ndarray:
    """This thread's scratch, on a 64-byte boundary: at least `size` numbers, contents arbitrary."""
    kept = getattr(_local, "scratch", None)
    if kept is None:
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
