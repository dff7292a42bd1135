"""Attention on torch tensors by the compiled kernels: differentiable, compile-safe, without a copy.

`attention` is a mechanism's call, `step` its step, and `Attention` a module in `torch.nn.MultiheadAttention`'s place.
Tensors on the CPU go through operators that the compiler keeps whole; what has no operator (tensors elsewhere, a
mechanism of another engine) runs the reference room, which is plain tensor code.
"""

from __future__ import annotations

from linattn.interop._torch_call import attention, step
from linattn.interop._torch_module import Attention

__all__ = ["Attention", "attention", "step"]
