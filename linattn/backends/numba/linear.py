"""The linear engine, compiled for the CPU. Definition: backends/reference/linear.py; kernels: _linear.py.

Here: views, tables, results and types. The sums of a state are compensated: their value is sums + rest.
"""

from __future__ import annotations

from functools import cache
from math import prod

import numpy as np
from numba import types

from ._jit import compile_kernel
from ._layout import divisor_mode, flat, plan, scratch
from ._linear import backward_kernel, forward_kernel, scratch_size
from ._maps import MAPS
from ._tiles import TILE

FEATURE_MAPS = frozenset(MAPS)
NARROW = ("float16", "bfloat16")


@cache
def kernel(direction: str, dtype: np.dtype):
    """The compiled kernel; the first call in a process compiles it or loads it from the cache."""
    real = {"float32": types.float32, "float64": types.float64}[dtype.name]
    given = types.Array(real, 1, "C", readonly=True)
    made = types.Array(real, 1, "C")
    mask = types.Array(types.boolean, 1, "C", readonly=True)
    table, dims = types.Array(types.int64, 2, "C", readonly=True), types.Array(types.int64, 1, "C", readonly=True)
    rest = (made, table, dims, types.float64, types.intp, types.intp)
    if direction == "forward":
        return compile_kernel(forward_kernel, (*[given] * 3, mask, *[given] * 4, *[made] * 4, *rest))
    return compile_kernel(backward_kernel, (*[given] * 5, mask, *[given] * 5, *[made] * 5, *rest))


def widened(x):
    """16-bit numbers as float32, all others as they are."""
    return x.astype(np.float32) if x.dtype.name in NARROW else x


def described(x, n_inner):
    return x.shape, x.strides, x.itemsize, n_inner


class Call:
    """What both directions need of q, k, v, the turns and the mask: flat views, the plan, sizes and switches."""

    def __init__(self, q, k, v, state, feature_map, span, turns, key_mask, normalize, eps, d_out=None, d_state=None):
        q, k, v = widened(q), widened(k), widened(v)
        self.dtype = dtype = q.dtype
        self.q, q = flat(q)
        self.k, k = flat(k)
        self.v, v = flat(v)
        none = self.q[:0]
        mask_array = turn_q_array = turn_k_array = d_out_array = None
        self.turn_q = self.turn_k = none
        self.mask = np.zeros(0, np.bool_)
        if key_mask is not None:
            self.mask, key_mask = flat(key_mask, last_axis=False)
            mask_array = described(key_mask, 1)
        n_sums = 1
        if turns is not None:
            n_sums = 2
            self.turn_q, turn_q = flat(np.asarray(turns[0], dtype))
            self.turn_k, turn_k = flat(np.asarray(turns[1], dtype))
            turn_q_array, turn_k_array = described(turn_q, 2), described(turn_k, 2)
        if d_out is not None:
            self.d_out, d_out = flat(widened(d_out))
            d_out_array = described(d_out, 2)
        self.plan = plan(
            (described(k, 2), described(v, 2), mask_array, turn_k_array), (described(q, 2), turn_q_array, d_out_array)
        )
        self.mode, self.eps = divisor_mode(eps)
        self.N, self.M, self.D, self.E = q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1]
        self.F, self.E1 = n_sums * self.D, self.E + bool(normalize)
        self.sums, self.rest = (np.ascontiguousarray(x, dtype).reshape(-1) for x in state)
        q_stride, turn_q_stride, g_stride, k_stride, v_stride, mask_stride, turn_k_stride = self.plan.strides
        self.dims = np.array(
            [self.N, self.M, self.D, self.E, self.F, self.E1, q_stride, k_stride, v_stride, mask_stride, turn_q_stride,
             turn_k_stride, g_stride, MAPS[feature_map], span == "past", normalize, self.mode, key_mask is not None,
             d_state is not None],
            np.int64,
        )  # fmt: skip
        self.work = scratch(dtype, scratch_size(self.F, self.E, TILE.columns(dtype.itemsize)))

    @property
    def operands(self):
        return self.q, self.k, self.v, self.mask, self.turn_q, self.turn_k, self.sums, self.rest


def forward(q, k, v, state, *, feature_map, span, turns, key_mask, normalize, eps, out, xp):
    """out (..., N, E), den (..., N) or None, and the state after all keys. Arguments: engines/linear.py."""
    call = Call(q, k, v, state, feature_map, span, turns, key_mask, normalize, eps)
    dtype, lead = call.dtype, call.plan.lead
    shape = (*lead, call.N, call.E)
    result = out if usable(out, dtype) else np.empty(shape, dtype)
    den = np.empty((*lead, call.N) if normalize else 0, dtype)
    after = np.empty(state[0].shape, dtype), np.empty(state[0].shape, dtype)
    kernel("forward", dtype)(
        *call.operands, result.reshape(-1), den.reshape(-1), after[0].reshape(-1), after[1].reshape(-1),
        call.work, call.plan.table, call.dims, call.eps, 0, prod(lead),
    )  # fmt: skip
    return delivered(result, out, q.dtype, shape), den if normalize else None, after


def backward(
    d_out, d_state, q, k, v, state, den, *, feature_map, span, turns, key_mask, normalize, eps, out, xp
):  # fmt: skip
    """Cotangents of q, k, v and of the incoming state. The lines of `forward`, last line first: _linear.py."""
    call = Call(q, k, v, state, feature_map, span, turns, key_mask, normalize, eps, d_out, d_state)
    dtype, lead, lead_kv = call.dtype, call.plan.lead, call.plan.lead_kv
    after = call.q[:0] if d_state is None else np.ascontiguousarray(d_state, dtype).reshape(-1)
    den = call.q[:0] if den is None else np.ascontiguousarray(den).reshape(-1)
    shapes = (*lead, call.N, call.D), (*lead_kv, call.M, call.D), (*lead_kv, call.M, call.E)
    outs = out or (None, None, None)
    grads = [
        o if x.shape == shape and usable(o, dtype) else np.empty(shape, dtype)
        for o, x, shape in zip(outs, (q, k, v), shapes, strict=True)
    ]
    d_before = np.empty(state[0].shape, dtype)
    h = np.empty(call.N, dtype)
    if prod(lead) == 0:  # no query head: nothing reaches keys or state
        for d_x in grads[1:]:
            d_x[...] = 0
        d_before[...] = 0 if d_state is None else d_state
    kernel("backward", dtype)(
        call.d_out, after, *call.operands, den, *(d_x.reshape(-1) for d_x in grads), d_before.reshape(-1),
        call.work, h, call.plan.table, call.dims, call.eps, 0, prod(lead),
    )  # fmt: skip
    d_q, d_k, d_v = (
        delivered(summed(d_x, x.shape), o, x.dtype, x.shape) for d_x, x, o in zip(grads, (q, k, v), outs, strict=True)
    )
    return d_q, d_k, d_v, d_before


def usable(out, dtype):
    """Whether the kernels can write to `out` itself."""
    return out is not None and out.dtype == dtype and out.flags.c_contiguous and out.flags.aligned


def summed(d_x, shape):
    """The VJP of broadcasting to the shape of d_x: summed over the axes that `shape` lacks or has as 1."""
    if d_x.shape == shape:
        return d_x
    extra = d_x.ndim - len(shape)
    axes = tuple(range(extra)) + tuple(extra + i for i, n in enumerate(shape) if n == 1 and d_x.shape[extra + i] != 1)
    return d_x.sum(axis=axes, dtype=d_x.dtype).reshape(shape)


def delivered(result, out, dtype, shape):
    """`result` in the dtype asked for, in `out` where one is given: narrowed once."""
    if result is out:
        return out
    with np.errstate(over="ignore", invalid="ignore"):
        if out is None:
            return result if result.dtype == dtype else result.astype(dtype)
        out[...] = result
    return out
