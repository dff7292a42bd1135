"""The combiner engine, compiled for the CPU. Definition: backends/reference/combiner.py; kernels: _combiner.py."""

from __future__ import annotations

from functools import cache
from math import prod

import numpy as np
from numba import types

from . import threads
from ._calls import WORTH_SHARING, delivered, spans, summed
from ._combiner import FIELDS, MAX, MEAN, REP, RULES, attend_back_kernel, attend_kernel, pool_back_kernel, pool_kernel
from ._jit import compile_kernel

KINDS = {"max": MAX, "mean": MEAN, "rep": REP}
FEW_BLOCKS = 8  # of a plan; with more of them a list of edges is shorter to read
NO_EDGES = np.zeros(1, np.int64), np.zeros(0, np.int64)
NO_BLOCKS = np.zeros((0, len(FIELDS)), np.int64)


@cache
def kernel(name: str, dtype: np.dtype):
    """The compiled kernel; the first call in a process compiles it or loads it from the cache."""
    real = {"float32": types.float32, "float64": types.float64}[dtype.name]

    def flat(kind, readonly=True):
        return types.Array(kind, 1, "C", readonly=readonly)

    given, made, flags = flat(real), flat(real, False), flat(types.boolean)
    numbers, room, wide = flat(types.int64), flat(types.int64, False), flat(types.float64, False)
    grid = types.Array(types.int64, 2, "C", readonly=True)
    who = grid, grid, room, numbers, numbers  # table, blocks, runs, edges
    origin = types.int32 if dtype.itemsize == 4 else types.int64  # as wide as a number
    sources = given, given, flags, given, given, flags, given
    heads = types.intp, types.intp
    build, signature = {
        "attend": (attend_kernel, (given, *sources, made, room, made, made, *who, numbers, types.float64)),
        "attend_back": (
            attend_back_kernel,
            (given, given, *sources, *[made] * 5, room, made, made, made, wide, *who, numbers, types.float64),
        ),
        "pool": (
            pool_kernel,
            (given, flags, made, flat(origin, False), made, room, wide, *who, numbers, numbers, types.int64),
        ),
        "pool_back": (
            pool_back_kernel,
            (given, flags, flat(origin), made, room, wide, *who, numbers, types.int64),
        ),
    }[name]
    return compile_kernel(build, (*signature, *heads))


def forward(q, sources, *, mixing, scale, out, xp):
    """out (..., N, E). Arguments: backends/reference/combiner.py."""
    call = Call(q, sources, mixing)
    fits = out is not None and out.dtype == call.dtype and out.flags.c_contiguous and out.flags.aligned
    result = out if fits else np.empty((*call.lead, call.N, call.E), call.dtype)
    run = kernel("attend", call.dtype)

    def share(heads):
        run(*call.operands, result.reshape(-1), *call.scratch(2), *call.who(), call.dims, scale, *heads)

    call.run(share, call.D + call.E)
    return delivered(result, out, call.dtype)


def backward(d_out, q, sources, *, mixing, scale, xp):
    """d_q and (d_k, d_v) of each source. The lines of `forward`, last line first: _combiner.py."""
    call = Call(q, sources, mixing, d_out)
    shapes = [(*lead, n, width) for lead, n, width in (
        (call.lead, call.N, call.D), (call.lead_kv, call.M, call.D), (call.lead_kv, call.M, call.E),
        (call.lead, call.R, call.D), (call.lead, call.R, call.E),
    )]  # fmt: skip
    grads = [np.empty(shape, call.dtype) for shape in shapes]
    if call.n_heads == 0:  # no query head: nothing reaches the keys
        for d_x in grads:
            d_x[...] = 0
    run = kernel("attend_back", call.dtype)

    def share(heads):
        wide = np.empty((call.M + call.R) * (call.D + call.E))
        run(
            call.d_out, *call.operands, *(d_x.reshape(-1) for d_x in grads), *call.scratch(3), wide,
            *call.who(), call.dims, scale, *heads,
        )  # fmt: skip

    call.run(share, 3 * call.D + 2 * call.E)
    d_q, *d_sources = grads
    primals = [x for source in sources for x in source[:2]]
    d_sources = [summed(d_x, tuple(x.shape)) for d_x, x in zip(d_sources, primals, strict=False)]
    return summed(d_q, tuple(q.shape)), [tuple(d_sources[i : i + 2]) for i in range(0, len(d_sources), 2)]


def pool(x, visible, *, mixing, kind, xp):
    """(..., R, C) of x (..., N, C)."""
    return Pool(x, visible, mixing, kind).pooled


def pool_vjp(d_pooled, x, visible, *, mixing, kind, xp):
    """d_x, shaped like x."""
    call = Pool(x, visible, mixing, kind)
    d_x = np.empty((*call.lead, *x.shape[-2:]), call.dtype)
    d_pooled = flat(np.broadcast_to(d_pooled, call.pooled.shape), call.dtype)
    run = kernel("pool_back", call.dtype)

    def share(heads):
        run(
            d_pooled, call.mask, call.origin, d_x.reshape(-1), call.keys(), np.empty(prod(x.shape[-2:])),
            *call.who(), call.dims, KINDS[kind], *heads,
        )  # fmt: skip

    call.run(share, x.shape[-1])
    return summed(d_x, tuple(x.shape))


class Lists:
    """Who meets whom: blocks as a table, or edges; which head of each array a query head reads; the work in all."""

    def __init__(self, mixing, leads, lead):
        self.lead, self.n_heads = lead, prod(lead)
        self.table = heads_of(leads, lead)
        self.groups = np.flatnonzero(np.diff(self.table[:, 1], prepend=-1, append=-1))
        if mixing.blocks is None or len(mixing.blocks) > FEW_BLOCKS:
            self.blocks, self.edges = NO_BLOCKS, mixing.edges
            self.most, pairs = int(np.max(mixing.edges.lengths, initial=0)), mixing.edges.indices.size
        else:
            self.blocks = np.array([fields_of(block) for block in mixing.blocks], np.int64).reshape(-1, len(FIELDS))
            self.edges = NO_EDGES
            self.most = sum(block.keys.size for block in mixing.blocks)
            pairs = mixing.n_queries * self.most
        self.pairs = pairs * self.n_heads
        self.n_runs = 4 * len(self.blocks) * mixing.n_queries

    def who(self):
        """The arguments of a kernel that say who meets whom; the runs are its scratch."""
        return self.table, self.blocks, np.empty(self.n_runs, np.int64), *self.edges

    def keys(self):
        """Room for a query's keys."""
        return np.empty(self.most, np.int64)

    def run(self, share, cost):
        """share((first, last)) of all heads, on as many threads as are worth it; `cost`: of a pair."""
        cost *= self.pairs
        n_threads = threads.number() if cost >= WORTH_SHARING else 1
        threads.run(share, spans(self.groups, cost, n_threads) if self.n_heads else [], n_threads)


class Call(Lists):
    """What both directions need: flat arrays, sizes and who meets whom."""

    def __init__(self, q, sources, mixing, d_out=None):
        self.dtype = dtype = q.dtype
        (k, v, mask, _), *others = sources
        kappa, u, alive, bias = others[0] if others else (k[..., :0, :], v[..., :0, :], None, None)
        arrays = [(q, 2), (k, 2), (v, 2), (mask, 1), (kappa, 2), (u, 2), (alive, 1), (bias, 1), (d_out, 2)]
        leads = [None if x is None else x.shape[: x.ndim - inner] for x, inner in arrays]
        self.lead_kv = np.broadcast_shapes(k.shape[:-2], v.shape[:-2])
        lead = np.broadcast_shapes(*(lead for lead in leads if lead is not None))
        super().__init__(mixing, [lead, self.lead_kv, *leads], lead)
        self.N, self.M, self.R, self.D, self.E = q.shape[-2], k.shape[-2], kappa.shape[-2], q.shape[-1], v.shape[-1]
        flags = [x is not None for x in (mask, alive, bias)]
        self.dims = np.array([self.N, self.M, self.R, self.D, self.E, *flags], np.int64)
        kinds = dtype, dtype, dtype, np.bool_, dtype, dtype, np.bool_, dtype
        self.operands = [flat(x, kind) for (x, _), kind in zip(arrays, kinds, strict=False)]
        self.d_out = flat(d_out, dtype)

    def scratch(self, n_rows):
        """Room for a query's keys, its scores (twice in the backward) and two numbers."""
        return self.keys(), *(np.empty(self.most, self.dtype) for _ in range(n_rows - 1)), np.empty(2, self.dtype)


class Pool(Lists):
    """The pooled regions, and for each number the token it comes from."""

    def __init__(self, x, visible, mixing, kind):
        self.dtype = dtype = x.dtype
        leads = [x.shape[:-2], None if visible is None else visible.shape[:-1]]
        lead = np.broadcast_shapes(*(lead for lead in leads if lead is not None))
        super().__init__(mixing, [lead, lead, leads[0], None, None, leads[1]], lead)
        n_regions, n, width = mixing.n_queries, x.shape[-2], x.shape[-1]
        self.dims = np.array([n_regions, n, 0, width, 0, visible is not None, 0, 0], np.int64)
        self.mask = flat(visible, np.bool_)
        self.pooled = np.empty((*lead, n_regions, width), dtype)
        bits = np.zeros(self.pooled.size, dtype)
        self.origin = bits.view(np.int32 if dtype.itemsize == 4 else np.int64)
        rep = np.ascontiguousarray(mixing.rep) if kind == "rep" else NO_EDGES[1]
        x, run = flat(x, dtype), kernel("pool", dtype)

        def share(heads):
            run(
                x, self.mask, self.pooled.reshape(-1), self.origin, bits, self.keys(), np.empty(width),
                *self.who(), rep, self.dims, KINDS[kind], *heads,
            )  # fmt: skip

        self.run(share, width)


def fields_of(block):
    q, k = block.queries, block.keys
    return (
        block.source, RULES[block.rule], block.shift, q.groups, q.size, q.step, q.stride, q.first, q.start,
        k.size, k.step, k.stride, k.start + k.first,
    )  # fmt: skip


def heads_of(leads, lead):
    """A row for each entry of `lead`, with the entries of each of `leads` it reads; sorted by the second of them."""
    columns = [
        np.zeros(prod(lead), np.int64) if own is None
        else np.broadcast_to(np.arange(prod(own), dtype=np.int64).reshape(own), lead).reshape(-1)
        for own in leads
    ]  # fmt: skip
    return np.ascontiguousarray(np.stack(columns, axis=-1)[np.argsort(columns[1], kind="stable")])


def flat(x, dtype):
    """All of an array, one number behind the other; nothing for None."""
    return np.zeros(0, dtype) if x is None else np.ascontiguousarray(x, dtype).reshape(-1)
