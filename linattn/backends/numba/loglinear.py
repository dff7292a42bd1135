"""The log-linear engine, compiled for the CPU. Definition: backends/reference/loglinear.py; kernels: _loglinear.py.

Here: views, tables, results and types. The sums of a state are compensated: their value is 2^gauge (sums + rest).
"""

from __future__ import annotations

from functools import cache
from math import prod

import numpy as np
from numba import types

from ._jit import compile_kernel
from ._layout import flat, plan, scratch
from ._loglinear import backward_kernel, forward_kernel, scratch_size
from ._logs import head_room
from ._tiles import CHUNK, TILE
from .linear import delivered, described, summed, usable, widened


@cache
def kernel(direction: str, dtype: np.dtype, of_logs: np.dtype):
    """The compiled kernel; the first call in a process compiles it or loads it from the cache."""
    real, log = ({"float32": types.float32, "float64": types.float64}[x.name] for x in (dtype, of_logs))

    def given(kind, n_axes=1):
        return types.Array(kind, n_axes, "C", readonly=True)

    x, made = given(real), types.Array(real, 1, "C")
    log, mask = given(log), given(types.boolean)
    rest = (given(types.int64, 2), given(types.int64), types.intp, types.intp)
    if direction == "forward":
        return compile_kernel(forward_kernel, (log, log, x, mask, x, x, x, *[made] * 6, *rest))
    return compile_kernel(backward_kernel, (x, x, x, log, log, x, mask, x, x, x, *[made] * 8, *rest))


def whole(dtype):
    """The integers that are as wide as `dtype`: kernels take gauges as the bits of numbers."""
    return {4: np.int32, 8: np.int64}[dtype.itemsize]


class Call:
    """What both directions need of the logarithms, v and the mask: flat views, the plan, sizes and switches."""

    def __init__(self, lq, lk, v, state, span, key_mask, d_out=None, d_lse=None, d_state=None, centre=True):
        v = widened(v)
        self.dtype = dtype = v.dtype
        self.of_logs = np.result_type(lq, lk, dtype)
        lq, lk = np.asarray(lq, self.of_logs), np.asarray(lk, self.of_logs)
        self.lq, lq = flat(lq)
        self.lk, lk = flat(lk)
        self.v, v = flat(v)
        none = self.v[:0]
        mask_array = d_out_array = d_lse_array = None
        self.mask = np.zeros(0, np.bool_)
        self.d_out = self.d_lse = none
        if key_mask is not None:
            self.mask, key_mask = flat(key_mask, last_axis=False)
            mask_array = described(key_mask, 1)
        if d_out is not None:
            self.d_out, d_out = flat(widened(d_out))
            d_out_array = described(d_out, 2)
        if d_lse is not None:
            self.d_lse, d_lse = flat(np.asarray(d_lse, dtype), last_axis=False)
            d_lse_array = described(d_lse, 1)
        self.plan = plan((described(lk, 2), described(v, 2), mask_array), (described(lq, 2), d_out_array, d_lse_array))
        self.N, self.M, self.R, self.E = lq.shape[-2], lk.shape[-2], lq.shape[-1], v.shape[-1]
        self.sums, self.rest = (np.ascontiguousarray(x, dtype).reshape(-1) for x in state[:2])
        self.gauge = np.ascontiguousarray(state[2], whole(dtype)).reshape(-1).view(dtype)
        q_stride, g_stride, l_stride, k_stride, v_stride, mask_stride = self.plan.strides
        switches = (span == "past", *(x is not None for x in (key_mask, d_state, d_lse)), centre)
        self.dims = np.array(
            [self.N, self.M, self.R, self.E, q_stride, k_stride, v_stride, mask_stride, g_stride, l_stride,
             *switches, *head_room(dtype.itemsize, self.R)],
            np.int64,
        )  # fmt: skip
        self.columns = TILE.columns(dtype.itemsize)
        self.work = scratch(dtype, scratch_size(self.R, self.E, self.columns))

    @property
    def operands(self):
        return self.lq, self.lk, self.v, self.mask


def forward(lq, lk, v, state, *, span, key_mask, out, xp):
    """out (..., N, E), lse (..., N) and the state after all keys. Arguments: engines/loglinear.py."""
    call = Call(lq, lk, v, state, span, key_mask)
    dtype, lead = call.dtype, call.plan.lead
    shape = (*lead, call.N, call.E)
    result = out if usable(out, dtype) else np.empty(shape, dtype)
    lse = np.empty((*lead, call.N), dtype)
    after = *(np.empty(state[0].shape, dtype) for _ in range(2)), np.empty(state[2].shape, whole(dtype))
    kernel("forward", dtype, call.of_logs)(
        *call.operands, call.sums, call.rest, call.gauge, result.reshape(-1), lse.reshape(-1),
        *(x.reshape(-1).view(dtype) for x in after), call.work, call.plan.table, call.dims, 0, prod(lead),
    )  # fmt: skip
    return delivered(result, out, v.dtype, shape), lse, (*after[:2], after[2].astype(np.int32))


def backward(d_out, d_lse, d_state, lq, lk, v, state, *, span, key_mask, centre, xp):
    """Cotangents of lq, lk, v and of the incoming sums. The lines of `forward`, last line first: _loglinear.py."""
    call = Call(lq, lk, v, state, span, key_mask, d_out, d_lse, d_state, centre)
    dtype, lead, lead_kv = call.dtype, call.plan.lead, call.plan.lead_kv
    after = call.v[:0] if d_state is None else np.ascontiguousarray(d_state, dtype).reshape(-1)
    d_lq, d_lk = np.empty((*lead, call.N, call.R), dtype), np.empty((*lead_kv, call.M, call.R), dtype)
    d_v, d_before = np.empty((*lead_kv, call.M, call.E), dtype), np.empty(state[0].shape, dtype)
    if prod(lead) == 0:  # no query head: nothing reaches keys or state
        d_lk[...] = d_v[...] = 0
        d_before[...] = 0 if d_state is None else d_state
    padded = -(-call.R // call.columns) * call.columns
    marks = np.empty(-(-call.N // CHUNK) * padded, dtype)
    den, h = np.empty(call.N, dtype), np.empty(call.N, dtype)
    kernel("backward", dtype, call.of_logs)(
        call.d_out, call.d_lse, after, *call.operands, call.sums, call.rest, call.gauge,
        *(x.reshape(-1) for x in (d_lq, d_lk, d_v, d_before)), call.work, marks, den, h,
        call.plan.table, call.dims, 0, prod(lead),
    )  # fmt: skip
    return summed(d_lq, lq.shape), summed(d_lk, lk.shape), summed(d_v, v.shape), d_before
