"""Tensors on an NVIDIA GPU by CuPy's kernels; see `_cuda`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from linattn.interop import _cuda
from linattn.interop._torch_ops import SECOND_ORDER


class Asked(NamedTuple):
    """A call but for its arrays."""

    attend: Any
    options: dict[str, Any]
    edges: list[int] | None


def is_cuda(x: Tensor) -> bool:
    return x.device.type == "cuda"


def stream(x: Tensor) -> Any:
    """CuPy in the stream in which torch works on the device of `x`."""
    return _cuda.in_stream(x.device.index, torch.cuda.current_stream(x.device).cuda_stream)


def attention(
    q: Tensor, k: Tensor, v: Tensor, attend: Any, causal: Any, key_mask: Any, cu_seqlens: Any, positions: Any
) -> Tensor:
    """The call on checked tensors; edges decide shapes, so they are read."""
    options: dict[str, Any] = {"causal": causal}
    if positions is not None:
        pair = positions if isinstance(positions, tuple) else (positions, positions)
        options["positions"] = tuple(_cuda.view(p) if isinstance(p, Tensor) else p for p in pair)
    edges = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens
    run = torch.compiler.disable(_OnDevice.apply)  # DLPack is nothing to trace
    return run(Asked(attend, options, edges), key_mask, q, k, v)


class _OnDevice(torch.autograd.Function):
    """`vjp` on CuPy's views of the tensors, forward and backward each in torch's current stream."""

    @staticmethod
    def forward(ctx: Any, asked: Asked, key_mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(key_mask, q, k, v)  # found out if changed in between
        with stream(q):
            out, ctx.undo = _cuda.vjp(
                asked.attend, q.detach(), k.detach(), v.detach(), key_mask, asked.edges, asked.options
            )
            return from_dlpack(out)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # a graph of the backward is wanted
            raise RuntimeError(SECOND_ORDER)
        _, q, *_ = ctx.saved_tensors
        with stream(q):
            grads = ctx.undo(_cuda.view(d_out.detach().contiguous()))
            return None, None, *(from_dlpack(x) for x in grads)
