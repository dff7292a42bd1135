"""Exact softmax, compiled for the CPU. Definition: backends/reference/softmax.py; kernels: _softmax.py."""

from __future__ import annotations

from functools import cache
from math import prod

import numpy as np
from numba import types

from ._jit import compile_kernel
from ._layout import flat, plan, scratch
from ._softmax import backward_kernel, forward_kernel, scratch_size
from ._tiles import TILE
from .linear import delivered, described, summed, usable, widened


@cache
def kernel(direction: str, dtype: np.dtype):
    """The compiled kernel; the first call in a process compiles it or loads it from the cache."""
    real = {"float32": types.float32, "float64": types.float64}[dtype.name]
    given = types.Array(real, 1, "C", readonly=True)
    made = types.Array(real, 1, "C")
    mask = types.Array(types.boolean, 1, "C", readonly=True)
    table, dims = types.Array(types.int64, 2, "C", readonly=True), types.Array(types.int64, 1, "C", readonly=True)
    rest = (table, dims, types.float64, types.intp, types.intp)
    if direction == "forward":
        return compile_kernel(forward_kernel, (*[given] * 3, mask, *[made] * 3, *rest))
    return compile_kernel(backward_kernel, (*[given] * 4, mask, *[made] * 5, *rest))


class Call:
    """What both directions need of q, k, v and the mask: flat views, the plan, sizes and switches."""

    def __init__(self, q, k, v, span, offset, key_mask, d_out=None):
        q, k, v = widened(q), widened(k), widened(v)
        self.dtype = dtype = q.dtype
        self.q, q = flat(q)
        self.k, k = flat(k)
        self.v, v = flat(v)
        mask_array = d_out_array = None
        self.mask = np.zeros(0, np.bool_)
        if key_mask is not None:
            self.mask, key_mask = flat(key_mask, last_axis=False)
            mask_array = described(key_mask, 1)
        if d_out is not None:
            self.d_out, d_out = flat(widened(d_out))
            d_out_array = described(d_out, 2)
        self.plan = plan((described(k, 2), described(v, 2), mask_array), (described(q, 2), d_out_array))
        self.N, self.M, self.D, self.E = q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1]
        q_stride, g_stride, *of_keys = self.plan.strides
        causal = span == "past"
        self.dims = np.array(
            [self.N, self.M, self.D, self.E, offset, q_stride, *of_keys, g_stride, causal, key_mask is not None],
            np.int64,
        )
        self.work = scratch(dtype, scratch_size(self.D, self.E, TILE.columns(dtype.itemsize)))


def forward(q, k, v, *, scale, span, offset, key_mask, out, xp):
    """out (..., N, E) and lse (..., N), the logarithm of each row's sum."""
    call = Call(q, k, v, span, offset, key_mask)
    dtype, lead = call.dtype, call.plan.lead
    shape = (*lead, call.N, call.E)
    result = out if usable(out, dtype) else np.empty(shape, dtype)
    lse = np.empty((*lead, call.N), dtype)
    kernel("forward", dtype)(
        call.q, call.k, call.v, call.mask, result.reshape(-1), lse.reshape(-1),
        call.work, call.plan.table, call.dims, scale, 0, prod(lead),
    )  # fmt: skip
    return delivered(result, out, q.dtype, shape), lse


def backward(d_out, q, k, v, *, scale, span, offset, key_mask, out, xp):
    """d_q, d_k, d_v. The weights are made again from each row's own maximum and sum: a saved lse rounds them."""
    call = Call(q, k, v, span, offset, key_mask, d_out)
    dtype, lead, lead_kv = call.dtype, call.plan.lead, call.plan.lead_kv
    shapes = (*lead, call.N, call.D), (*lead_kv, call.M, call.D), (*lead_kv, call.M, call.E)
    outs = out or (None, None, None)
    grads = [
        o if x.shape == shape and usable(o, dtype) else np.empty(shape, dtype)
        for o, x, shape in zip(outs, (q, k, v), shapes, strict=True)
    ]
    if prod(lead) == 0:  # no query head: nothing reaches the keys
        for d_x in grads[1:]:
            d_x[...] = 0
    rows = np.empty(3 * call.N, dtype)
    kernel("backward", dtype)(
        call.d_out, call.q, call.k, call.v, call.mask, *(d_x.reshape(-1) for d_x in grads),
        call.work, rows, call.plan.table, call.dims, scale, 0, prod(lead),
    )  # fmt: skip
    return tuple(
        delivered(summed(d_x, x.shape), o, x.dtype, x.shape) for d_x, x, o in zip(grads, (q, k, v), outs, strict=True)
    )
