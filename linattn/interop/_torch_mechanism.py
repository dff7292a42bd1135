"""Any mechanism as a torch operator pair, `linattn::mechanism`: for those whose engine has no pair of its own.

The mechanism goes as a string, see `_specs`, and the operator runs the plain verbs' inner ones on NumPy views: the same
bits, and nothing of size N x R kept between forward and backward. States are the sums of the linear and the log-linear
engine. Moments of a call are the call's own, so `torch.vmap` runs the calls one by one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from linattn.engines.linear import LinearState
from linattn.engines.loglinear import LogLinearState
from linattn.interop import _kernels
from linattn.interop._specs import value_of
from linattn.interop._torch_ops import LIBRARY, OPS, accumulator, below, fresh, register, view

STATE = "Tensor? sums, Tensor? rest, Tensor? gauge"
REST = "Tensor? key_mask, Tensor? cu_seqlens, str mechanism, bool causal, SymInt first"
LIBRARY.define(f"mechanism(Tensor q, Tensor k, Tensor v, {STATE}, {REST}) -> (Tensor, Tensor, Tensor, Tensor)")
LIBRARY.define(
    f"mechanism_backward(Tensor d_out, Tensor? d_sums, Tensor q, Tensor k, Tensor v, {STATE}, {REST}) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
N_TENSORS = 8  # of `mechanism`: q, k, v, the state, the mask, the edges


def _state(sums: Tensor | None, rest: Tensor | None, gauge: Tensor | None) -> Any:
    if sums is None or rest is None:
        return None
    if gauge is None:
        return LinearState(view(sums), view(rest))
    return LogLinearState(view(sums), view(rest), view(gauge))


def _forward(q, k, v, sums, rest, gauge, key_mask, cu_seqlens, mechanism, causal, first):
    out, after = _kernels.mechanism_forward(
        value_of(mechanism), view(q), view(k), view(v), _state(sums, rest, gauge), view(key_mask),
        view(cu_seqlens), causal, first,
    )  # fmt: skip
    given = (q, k, v, sums, rest, gauge)
    none = [
        torch.empty(0, dtype=accumulator(q)),
        torch.empty(0, dtype=accumulator(q)),
        torch.empty(0, dtype=torch.int32),
    ]
    if sums is not None:
        none[: len(after)] = [fresh(x, *given) for x in after]
    return fresh(out, *given), *none


def _backward(d_out, d_sums, q, k, v, sums, rest, gauge, key_mask, cu_seqlens, mechanism, causal, first):
    state, d_state = _state(sums, rest, gauge), None
    if d_sums is not None and state is not None:
        d_state = state._replace(sums=view(d_sums), rest=np.zeros_like(state.rest))
    d_q, d_k, d_v, d_before = _kernels.mechanism_backward(
        value_of(mechanism), view(d_out), d_state, view(q), view(k), view(v), state, view(key_mask),
        view(cu_seqlens), causal, first,
    )  # fmt: skip
    given = (d_out, d_sums, q, k, v)
    d_sums = torch.empty(0, dtype=accumulator(q)) if sums is None else fresh(d_before.sums, *given)
    return *(fresh(x, *given) for x in (d_q, d_k, d_v)), d_sums


def _forward_fake(q, k, v, sums, rest, gauge, key_mask, cu_seqlens, mechanism, causal, first):
    any_row = np.zeros((1, int(q.shape[-1])))
    _, own = value_of(mechanism)._checked(any_row, any_row, any_row, False, None, None, None, np)
    leads = [x.shape[:-2] for x in (q, k, v)] + ([] if key_mask is None else [key_mask.shape[:-1]])
    lead = torch.broadcast_shapes(*leads, own)
    dtypes = (accumulator(q), accumulator(q), torch.int32)
    shapes = [(0,) if x is None else x.shape for x in (sums, rest, gauge)]
    after = (q.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True))
    return q.new_empty((*lead, q.shape[-2], v.shape[-1])), *after


def _backward_fake(d_out, d_sums, q, k, v, sums, *others):
    after = (0,) if sums is None else sums.shape
    return *(x.new_empty(x.shape) for x in (q, k, v)), q.new_empty(after, dtype=accumulator(q))


class _Mechanism(torch.autograd.Function):
    """`mechanism` with its derivative: the arguments alone are kept."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        ctx.save_for_backward(*args[:N_TENSORS])
        ctx.options, sums = args[N_TENSORS:], args[3]
        results = below(OPS.mechanism.default, args)
        ctx.mark_non_differentiable(*results[2:], *([] if sums is not None else [results[1]]))
        return results

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_after: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        streams = saved[3] is not None
        d_after = d_after if streams else None
        d_q, d_k, d_v, d_sums = OPS.mechanism_backward.default(d_out, d_after, *saved, *ctx.options)
        return d_q, d_k, d_v, d_sums if streams else None, *[None] * 7


def _one_by_one(operator: Any, edges: int) -> Any:
    def rule(info: Any, dims: Any, *args: Any) -> Any:
        if dims[edges] is not None:
            raise RuntimeError("`cu_seqlens` decides shapes, it cannot be mapped by vmap: hand it on unmapped.")
        rows = [
            operator(*(x if d is None else x.select(d, i) for x, d in zip(args, dims, strict=True)))
            for i in range(info.batch_size)
        ]
        return tuple(torch.stack(x) for x in zip(*rows, strict=True)), (0,) * len(rows[0])

    return rule


register("mechanism", _forward, _forward_fake, _one_by_one(OPS.mechanism.default, 7), _Mechanism)
register("mechanism_backward", _backward, _backward_fake, _one_by_one(OPS.mechanism_backward.default, 9), None)
