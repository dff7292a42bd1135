"""The linear engine, compiled for the CPU. Definition: backends/reference/linear.py; kernels: _linear.py.

Here: views, tables, results, types and threads. The sums of a state are compensated: their value is sums + rest.
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
from ._layout import LAYOUTS, Heads, described, divisor_mode, flat, heads, kind_of, loadable, scratch
from ._linear import D_K, D_Q, D_V, backward_kernel, forward_kernel, scratch_size
from ._maps import MAPS
from ._tiles import TILE

FEATURE_MAPS = frozenset(MAPS)


@cache
def kernel(direction: str, dtype: np.dtype):
    """The compiled kernel; the first call in a process compiles it or loads it from the cache."""
    stored, real = kind_of(dtype)[-2:]
    given, sums, made = reads(stored), reads(real), writes(real)
    numbers = (types.float64, *[types.intp] * 4)
    if direction == "forward":
        results = (writes(stored), made, made, made)
        return compile_kernel(
            forward_kernel, (given, given, given, MASK, *[sums] * 4, *results, made, TABLE, DIMS, *numbers)
        )
    return compile_kernel(
        backward_kernel,
        (given, sums, given, given, given, MASK, *[sums] * 5, *[made] * 6, TABLE, DIMS, *numbers, types.intp),
    )


class Layout(NamedTuple):
    """All of a call that its shapes, strides and options decide."""

    heads: Heads
    dims: np.ndarray
    shape: tuple[int, ...]  # of out
    n_heads: int
    slices: int  # of the values' columns
    feature_slices: int
    scratch: int
    cost: float  # multiply-adds of a forward
    eps: float


@lru_cache(LAYOUTS)
def layout(itemsize, q, k, v, turn_q, turn_k, mask, d_out, feature_map, span, normalize, eps, d_state_given) -> Layout:
    """The layout of a call whose arrays are known as `described`; `itemsize` is that of the results."""
    found = heads(
        ((k, 2, True), (v, 2, True), (mask, 1, False), (turn_k, 2, True)),
        ((q, 2, True), (turn_q, 2, True), (d_out, 2, True)),
    )
    (N, D), (M, E) = q[0][-2:], v[0][-2:]
    F, E1 = D if turn_q is None else 2 * D, E + bool(normalize)
    mode, x = divisor_mode(eps)
    q_stride, turn_q_stride, g_stride, k_stride, v_stride, mask_stride, turn_k_stride = found.strides
    n_heads, columns = prod(found.lead), TILE.columns(itemsize)
    dims = np.array(
        [N, M, D, E, F, E1, q_stride, k_stride, v_stride, mask_stride, turn_q_stride, turn_k_stride, g_stride,
         MAPS[feature_map], span == "past", bool(normalize), mode, mask is not None, d_state_given],
        np.int64,
    )  # fmt: skip
    return Layout(
        heads=found,
        dims=dims,
        shape=(*found.lead, N, E),
        n_heads=n_heads,
        slices=-(-E // columns),
        feature_slices=-(-F // columns),
        scratch=scratch_size(F, E, columns),
        cost=float(n_heads * (N + M) * F * E1),
        eps=x,
    )


def operands(q, k, v, state, turns, key_mask, kind):
    """The arrays both kernels read, flat."""
    if kind.stored is not kind.seen_as:
        q, k, v = (x.view(kind.seen_as) for x in (q, k, v))
    sums, rest = state[0].reshape(-1), state[1].reshape(-1)
    turn_q, turn_k = (sums[:0], sums[:0]) if turns is None else (flat(turns[0]), flat(turns[1]))
    mask = NO_MASK if key_mask is None else flat(key_mask, last_axis=False)
    return flat(q), flat(k), flat(v), mask, turn_q, turn_k, sums, rest


def forward(q, k, v, state, *, feature_map, span, turns, key_mask, normalize, eps, out, xp):
    """out (..., N, E), den (..., N) or None, and the state after all keys. Arguments: engines/linear.py."""
    dtype = q.dtype
    q, k, v = loadable(q, k, v)
    kind = kind_of(q.dtype)
    real = kind.real
    turn_q, turn_k = turns or (None, None)
    plan = layout(
        real.itemsize, described(q), described(k), described(v), described(turn_q), described(turn_k),
        described(key_mask), None, feature_map, span, normalize, eps, False,
    )  # fmt: skip
    result = out if usable(out, kind) else np.empty(plan.shape, q.dtype)
    den = np.empty(plan.shape[:-1] if normalize else 0, real)
    shape = state[0].shape
    sums, rest = np.empty(shape, real), np.empty(shape, real)
    run = kernel("forward", q.dtype)
    arrays = (
        *operands(q, k, v, state, turns, key_mask, kind),
        flat_result(result, kind), den.reshape(-1), sums.reshape(-1), rest.reshape(-1),
    )  # fmt: skip
    table, dims, size, x = plan.heads.table, plan.dims, plan.scratch, plan.eps

    def share(what):
        run(*arrays, scratch(real, size), table, dims, x, *what)

    everything = (0, plan.n_heads, 0, max(1, plan.slices))
    if plan.cost < WORTH_SHARING:
        share(everything)
    else:
        n_threads, groups = threads.number(), plan.heads.groups
        columns = parts(everything[3], -(-n_threads // max(1, len(groups) - 1)))
        threads.run(
            share, [(*rows, *some) for rows in spans(groups, plan.cost, n_threads) for some in columns], n_threads
        )
    return delivered(result, out, dtype), den if normalize else None, (sums, rest)


def backward(
    d_out, d_state, q, k, v, state, den, *, feature_map, span, turns, key_mask, normalize, eps, out, xp
):  # fmt: skip
    """Cotangents of q, k, v and of the incoming state. The lines of `forward`, last line first: _linear.py."""
    given = q, k, v
    d_out, q, k, v = loadable(d_out, q, k, v)
    kind = kind_of(q.dtype)
    real = kind.real
    turn_q, turn_k = turns or (None, None)
    plan = layout(
        real.itemsize, described(q), described(k), described(v), described(turn_q), described(turn_k),
        described(key_mask), described(d_out), feature_map, span, normalize, eps, d_state is not None,
    )  # fmt: skip
    found, n_heads = plan.heads, plan.n_heads
    N, M, D, E, F = plan.dims[:5].tolist()
    shapes = (*found.lead, N, D), (*found.lead_kv, M, D), (*found.lead_kv, M, E)
    outs = out or (None, None, None)
    real_kind = kind_of(real)
    grads = [
        o if x.shape == shape and usable(o, real_kind) else np.empty(shape, real)
        for o, x, shape in zip(outs, (q, k, v), shapes, strict=True)
    ]
    d_before = np.empty(state[0].shape, real)
    if n_heads == 0:  # no query head: nothing reaches keys or state
        for d_x in grads[1:]:
            d_x[...] = 0
        d_before[...] = 0 if d_state is None else d_state
    none = d_before.reshape(-1)[:0]
    run = kernel("backward", q.dtype)
    arrays = (
        flat(d_out if kind.stored is kind.seen_as else d_out.view(kind.seen_as)),
        none if d_state is None else d_state.reshape(-1),
        *operands(q, k, v, state, turns, key_mask, kind),
        none if den is None else den.reshape(-1),
        *(d_x.reshape(-1) for d_x in grads), d_before.reshape(-1),
    )  # fmt: skip
    table, dims, size, x = found.table, plan.dims, plan.scratch, plan.eps

    def share(what):
        rows, tasks, columns, h = what
        h = np.empty(N, real) if h is None else h
        run(*arrays, scratch(real, size), h, table, dims, x, *rows, tasks, *columns)

    features, all_three = (0, max(1, plan.feature_slices)), D_Q | D_V | D_K
    n_threads = threads.number() if plan.cost >= WORTH_SHARING else 1
    if n_threads > 1 and n_heads == 1 and span == "past":
        h = np.empty(N, real)
        threads.run(share, [((0, 1), task, features, h) for task in (D_Q, D_V)], n_threads)
        columns = parts(features[1], n_threads) if F == D else [features]
        threads.run(share, [((0, 1), D_K, some, h) for some in columns], n_threads)
    else:
        rows = spans(found.groups, 3 * plan.cost, n_threads) if n_heads else []
        threads.run(share, [(some, all_three, features, None) for some in rows], n_threads)
    d_q, d_k, d_v = (delivered(summed(d_x, x.shape), o, x.dtype) for d_x, x, o in zip(grads, given, outs, strict=True))
    return d_q, d_k, d_v, d_before
