"""What the wrappers of all engines share: types, results, and the division of a call among threads."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numba import types

__all__ = [
    "DIMS", "MASK", "NO_MASK", "TABLE", "WORTH_SHARING",
    "delivered", "flat_result", "parts", "reads", "spans", "summed", "usable", "writes",
]  # fmt: skip

WORTH_SHARING = 2.0e7  # multiply-adds, about 0.4 ms: a hand-over costs a twentieth of it
LONGEST = 5.0e9  # multiply-adds a compiled call should not exceed, so that Ctrl-C is heard within 0.2 s

TABLE = types.Array(types.int64, 2, "C", readonly=True)
DIMS = types.Array(types.int64, 1, "C", readonly=True)
MASK = types.Array(types.boolean, 1, "C", readonly=True)
NO_MASK = np.zeros(0, np.bool_)


def reads(kind):
    return types.Array(kind, 1, "C", readonly=True)


def writes(kind):
    return types.Array(kind, 1, "C")


def spans(groups, cost, n_threads):
    """Consecutive heads of k and v as shares (first row, behind the last): enough for all threads, none too long."""
    n_groups = len(groups) - 1
    pieces = max(min(n_groups, 4 * n_threads if n_threads > 1 else 1), int(cost / LONGEST))
    pieces = max(1, min(n_groups, pieces))
    marks = [i * n_groups // pieces for i in range(pieces + 1)]
    return [(groups[a], groups[b]) for a, b in pairwise(marks)]


def parts(n_slices, n_parts):
    """Slices of columns as ranges of nearly equal length."""
    n_parts = max(1, min(n_slices, n_parts))
    marks = [i * n_slices // n_parts for i in range(n_parts + 1)]
    return list(pairwise(marks))


def usable(out, kind):
    """Whether the kernels can write to `out` itself."""
    return out is not None and out.dtype == kind.stored and out.flags.c_contiguous and out.flags.aligned


def flat_result(x, kind):
    """A result as the kernels see it."""
    return x.view(kind.seen_as).reshape(-1) if x.dtype != kind.seen_as else x.reshape(-1)


def summed(d_x, shape):
    """The VJP of broadcasting to the shape of d_x: summed over the axes that `shape` lacks or has as 1."""
    if d_x.shape == shape:
        return d_x
    extra = d_x.ndim - len(shape)
    axes = tuple(range(extra)) + tuple(extra + i for i, n in enumerate(shape) if n == 1 and d_x.shape[extra + i] != 1)
    return d_x.sum(axis=axes, dtype=d_x.dtype).reshape(shape)


def delivered(result, out, dtype):
    """`result` in the dtype asked for, in `out` where one is given: narrowed once."""
    if result is out or (out is None and result.dtype == dtype):
        return result
    with np.errstate(over="ignore", invalid="ignore"):
        if out is None:
            return result.astype(dtype)
        out[...] = result
    return out
