"""Exact softmax, compiled for the CPU. Definition: backends/reference/softmax.py; kernels: _softmax.py."""

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
    reads,
    spans,
    summed,
    usable,
    writes,
)
from ._jit import compile_kernel
from ._layout import LAYOUTS, Heads, described, flat, heads, kind_of, loadable, scratch
from ._softmax import backward_kernel, forward_kernel, scratch_size
from ._tiles import TILE


@cache
def kernel(direction: str, dtype: np.dtype):
    """The compiled kernel; the first call in a process compiles it or loads it from the cache."""
    stored, real = kind_of(dtype)[-2:]
    given, made = reads(stored), writes(real)
    numbers = (types.float64, types.intp, types.intp)
    if direction == "forward":
        arrays = (given, given, given, MASK, writes(stored), made, made)
        return compile_kernel(forward_kernel, (*arrays, TABLE, DIMS, *numbers))
    return compile_kernel(backward_kernel, (*[given] * 4, MASK, *[made] * 5, TABLE, DIMS, *numbers))


class Layout(NamedTuple):
    """All of a call that its shapes, strides and options decide."""

    heads: Heads
    dims: np.ndarray
    shape: tuple[int, ...]  # of out
    n_heads: int
    scratch: int
    cost: float  # multiply-adds of a forward


@lru_cache(LAYOUTS)
def layout(itemsize, q, k, v, mask, d_out, span, offset) -> Layout:
    """The layout of a call whose arrays are known as `described`; `itemsize` is that of the results."""
    found = heads(((k, 2, True), (v, 2, True), (mask, 1, False)), ((q, 2, True), (d_out, 2, True)))
    (N, D), (M, E) = q[0][-2:], v[0][-2:]
    q_stride, g_stride, k_stride, v_stride, mask_stride = found.strides
    n_heads = prod(found.lead)
    dims = np.array(
        [N, M, D, E, offset, q_stride, k_stride, v_stride, mask_stride, g_stride, span == "past", mask is not None],
        np.int64,
    )
    pairs = N * M if span == "all" else N * (offset + N / 2)
    return Layout(
        heads=found,
        dims=dims,
        shape=(*found.lead, N, E),
        n_heads=n_heads,
        scratch=scratch_size(D, E, TILE.columns(itemsize)),
        cost=float(n_heads * pairs * (D + E)),
    )


def operands(arrays, key_mask, kind):
    """The arrays both kernels read, flat."""
    if kind.stored is not kind.seen_as:
        arrays = (x.view(kind.seen_as) for x in arrays)
    return *map(flat, arrays), NO_MASK if key_mask is None else flat(key_mask, last_axis=False)


def forward(q, k, v, *, scale, span, offset, key_mask, out, xp):
    """out (..., N, E) and lse (..., N), the logarithm of each row's sum."""
    dtype = q.dtype
    q, k, v = loadable(q, k, v)
    kind = kind_of(q.dtype)
    real = kind.real
    plan = layout(
        real.itemsize, described(q), described(k), described(v), described(key_mask), None, span, offset
    )  # fmt: skip
    result = out if usable(out, kind) else np.empty(plan.shape, q.dtype)
    lse = np.empty(plan.shape[:-1], real)
    run = kernel("forward", q.dtype)
    arrays = *operands((q, k, v), key_mask, kind), flat_result(result, kind), lse.reshape(-1)

    def share(rows):
        run(*arrays, scratch(real, plan.scratch), plan.heads.table, plan.dims, scale, *rows)

    if plan.cost < WORTH_SHARING:
        share((0, plan.n_heads))
    else:
        n_threads = threads.number()
        threads.run(share, spans(plan.heads.groups, plan.cost, n_threads), n_threads)
    return delivered(result, out, dtype), lse


def backward(d_out, q, k, v, *, scale, span, offset, key_mask, out, xp):
    """d_q, d_k, d_v. The weights are made again from each row's own maximum and sum: a saved lse rounds them."""
    given = q, k, v
    d_out, q, k, v = loadable(d_out, q, k, v)
    kind = kind_of(q.dtype)
    real = kind.real
    plan = layout(
        real.itemsize, described(q), described(k), described(v), described(key_mask), described(d_out), span, offset
    )  # fmt: skip
    found = plan.heads
    N, M, D, E = plan.dims[:4].tolist()
    shapes = (*found.lead, N, D), (*found.lead_kv, M, D), (*found.lead_kv, M, E)
    outs = out or (None, None, None)
    real_kind = kind_of(real)
    grads = [
        o if x.shape == shape and usable(o, real_kind) else np.empty(shape, real)
        for o, x, shape in zip(outs, (q, k, v), shapes, strict=True)
    ]
    if plan.n_heads == 0:  # no query head: nothing reaches the keys
        for d_x in grads[1:]:
            d_x[...] = 0
    run = kernel("backward", q.dtype)
    arrays = *operands((d_out, q, k, v), key_mask, kind), *(d_x.reshape(-1) for d_x in grads)

    def share(rows):
        run(*arrays, scratch(real, plan.scratch), np.empty(3 * N, real), found.table, plan.dims, scale, *rows)

    n_threads = threads.number() if plan.cost >= WORTH_SHARING else 1
    threads.run(share, spans(found.groups, 4 * plan.cost, n_threads) if plan.n_heads else [], n_threads)
    return tuple(delivered(summed(d_x, x.shape), o, x.dtype) for d_x, x, o in zip(grads, given, outs, strict=True))
