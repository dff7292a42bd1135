"""The log-linear engine, compiled for the CPU. Definition: backends/reference/loglinear.py; kernels: _loglinear.py.

Here: views, tables, results, types and threads. A state is compensated: its value is 2^gauge (sums + rest).
"""

from __future__ import annotations

from functools import cache, lru_cache
from math import prod
from typing import NamedTuple

import numpy as np
from numba import types

from . import threads
from ._calls import (
    DIMS,
    MASK,
    NO_MASK,
    TABLE,
    WORTH_SHARING,
    delivered,
    flat_result,
    parts,
    reads,
    spans,
    summed,
    usable,
    writes,
)
from ._jit import compile_kernel
from ._layout import LAYOUTS, Heads, described, flat, heads, kind_of, loadable, scratch
from ._loglinear import backward_kernel, forward_kernel, scratch_size
from ._logs import head_room
from ._tiles import CHUNK, TILE


@cache
def kernel(direction: str, dtype: np.dtype, of_logs: np.dtype):
    """The compiled kernel; the first call in a process compiles it or loads it from the cache."""
    stored, real = kind_of(dtype)[-2:]
    given, log, x, made = reads(stored), reads(kind_of(of_logs).numba), reads(real), writes(real)
    shares = (TABLE, DIMS, types.intp, types.intp)
    if direction == "forward":
        results = (writes(stored), *[made] * 5)
        return compile_kernel(
            forward_kernel, (log, log, given, MASK, x, x, x, *results, *shares, types.intp, types.intp)
        )
    return compile_kernel(backward_kernel, (given, x, x, log, log, given, MASK, x, x, x, *[made] * 8, *shares))


class Layout(NamedTuple):
    """All of a call that its shapes, strides and options decide."""

    heads: Heads
    dims: np.ndarray
    shape: tuple[int, ...]  # of out
    n_heads: int
    slices: int  # of the values' columns
    padded: int  # features up to whole slices
    scratch: int
    cost: float  # multiply-adds of a forward


@lru_cache(LAYOUTS)
def layout(itemsize, lq, lk, v, mask, d_out, d_lse, span, d_state_given, centre, room) -> Layout:
    """The layout of a call whose arrays are known as `described`; `itemsize` is that of the results."""
    found = heads(((lk, 2, True), (v, 2, True), (mask, 1, False)), ((lq, 2, True), (d_out, 2, True), (d_lse, 1, False)))
    (N, R), (M, E) = lq[0][-2:], v[0][-2:]
    q_stride, g_stride, l_stride, k_stride, v_stride, mask_stride = found.strides
    switches = (span == "past", mask is not None, d_state_given, d_lse is not None, centre)
    dims = np.array(
        [N, M, R, E, q_stride, k_stride, v_stride, mask_stride, g_stride, l_stride, *switches, *room], np.int64
    )
    n_heads, columns = prod(found.lead), TILE.columns(itemsize)
    return Layout(
        heads=found,
        dims=dims,
        shape=(*found.lead, N, E),
        n_heads=n_heads,
        slices=-(-E // columns),
        padded=-(-R // columns) * columns,
        scratch=scratch_size(R, E, columns),
        cost=float(n_heads * (N + M) * R * (E + 1)),
    )


def logarithms(lq, lk, real):
    """Both in one dtype, the wider; float32 is exact where it was enough for the caller."""
    dtype = np.result_type(lq, lk, real)
    return lq.astype(dtype, copy=False), lk.astype(dtype, copy=False)


def whole(real):
    """The integers as wide as `real`: kernels take gauges as the bits of its numbers."""
    return {4: np.int32, 8: np.int64}[real.itemsize]


def operands(lq, lk, v, state, key_mask, kind):
    """The arrays both kernels read, flat."""
    v = v if kind.stored is kind.seen_as else v.view(kind.seen_as)
    mask = NO_MASK if key_mask is None else flat(key_mask, last_axis=False)
    gauge = state[2].astype(whole(kind.real)).reshape(-1).view(kind.real)
    return flat(lq), flat(lk), flat(v), mask, state[0].reshape(-1), state[1].reshape(-1), gauge


def forward(lq, lk, v, state, *, span, key_mask, out, xp):
    """out (..., N, E), lse (..., N) and the state after all keys. Arguments: engines/loglinear.py."""
    dtype = v.dtype
    (v,) = loadable(v)
    kind = kind_of(v.dtype)
    real = kind.real
    lq, lk = logarithms(lq, lk, real)
    plan = layout(
        real.itemsize, described(lq), described(lk), described(v), described(key_mask), None, None, span, False, True,
        head_room(real.itemsize, lq.shape[-1]),
    )  # fmt: skip
    result = out if usable(out, kind) else np.empty(plan.shape, v.dtype)
    lse = np.empty(plan.shape[:-1], real)
    sums, rest = np.empty(state[0].shape, real), np.empty(state[0].shape, real)
    gauge = np.empty(state[2].shape, whole(real))
    run = kernel("forward", v.dtype, lq.dtype)
    arrays = (
        *operands(lq, lk, v, state, key_mask, kind), flat_result(result, kind), lse.reshape(-1),
        sums.reshape(-1), rest.reshape(-1), gauge.reshape(-1).view(real),
    )  # fmt: skip
    table, dims, size = plan.heads.table, plan.dims, plan.scratch

    def share(what):
        run(*arrays, scratch(real, size), table, dims, *what)

    everything = (0, plan.n_heads, 0, max(1, plan.slices))
    if plan.cost < WORTH_SHARING:
        share(everything)
    else:
        n_threads, groups = threads.number(), plan.heads.groups
        columns = parts(everything[3], -(-n_threads // max(1, len(groups) - 1)))
        threads.run(
            share, [(*rows, *some) for rows in spans(groups, plan.cost, n_threads) for some in columns], n_threads
        )
    return delivered(result, out, dtype), lse, (sums, rest, gauge.astype(np.int32))


def backward(d_out, d_lse, d_state, lq, lk, v, state, *, span, key_mask, centre, xp):
    """Cotangents of lq, lk, v and of the incoming sums. The lines of `forward`, last line first: _loglinear.py."""
    given = lq, lk, v
    d_out, v = loadable(d_out, v)
    kind = kind_of(v.dtype)
    real = kind.real
    lq, lk = logarithms(lq, lk, real)
    d_lse = None if d_lse is None else d_lse.astype(real, copy=False)
    plan = layout(
        real.itemsize, described(lq), described(lk), described(v), described(key_mask), described(d_out),
        described(d_lse), span, d_state is not None, centre, head_room(real.itemsize, lq.shape[-1]),
    )  # fmt: skip
    found, n_heads, padded = plan.heads, plan.n_heads, plan.padded
    N, M, R, E = plan.dims[:4].tolist()
    shapes = (*found.lead, N, R), (*found.lead_kv, M, R), (*found.lead_kv, M, E)
    grads = [np.empty(shape, real) for shape in shapes]
    d_before = np.empty(state[0].shape, real)
    if n_heads == 0:  # no query head: nothing reaches keys or state
        for d_x in grads[1:]:
            d_x[...] = 0
        d_before[...] = 0 if d_state is None else d_state
    none = d_before.reshape(-1)[:0]
    run = kernel("backward", v.dtype, lq.dtype)
    arrays = (
        flat(d_out if kind.stored is kind.seen_as else d_out.view(kind.seen_as)),
        none if d_lse is None else flat(d_lse, last_axis=False),
        none if d_state is None else np.ascontiguousarray(d_state, real).reshape(-1),
        *operands(lq, lk, v, state, key_mask, kind),
        *(d_x.reshape(-1) for d_x in grads), d_before.reshape(-1),
    )  # fmt: skip
    table, dims, size = found.table, plan.dims, plan.scratch

    def share(rows):
        marks = np.empty(-(-N // CHUNK) * padded, real)
        run(*arrays, scratch(real, size), marks, np.empty(N, real), np.empty(N, real), table, dims, *rows)

    n_threads = threads.number() if plan.cost >= WORTH_SHARING else 1
    rows = spans(found.groups, 3 * plan.cost, n_threads) if n_heads else []
    threads.run(share, rows, n_threads)
    return *(summed(d_x, x.shape) for d_x, x in zip(grads, given, strict=True)), d_before
