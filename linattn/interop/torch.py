"""Attention on torch tensors by the compiled kernels: differentiable, compile-safe, without a copy.

`attention` is a mechanism's call, `step` its step, and `Attention` a module in `torch.nn.MultiheadAttention`'s place.
Tensors on the CPU go through operators that the compiler keeps whole, those of an NVIDIA GPU to CuPy's kernels where
CuPy is installed. All else (other devices, a mechanism of the user's) runs the reference room, plain tensor code.
"""

from __future__ import annotations

from linattn.interop._torch_call import attention, step
from linattn.interop._torch_module import Attention

__all__ = ["Attention", "attention", "step"]
