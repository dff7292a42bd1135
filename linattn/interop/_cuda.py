"""Arrays of an NVIDIA GPU between a framework and CuPy: by DLPack, without a copy, in the framework's own stream.

CuPy's kernels are launched in its current stream. For a torch tensor that is made torch's current stream, so work is in
the order in which it was asked for and nothing waits. For a JAX array CuPy's stream waits on JAX's by an event, and
JAX's on CuPy's, as the DLPack protocol has it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from types import ModuleType
from typing import Any

from linattn import _arrays, _checks, backends
from linattn._arrays import Array
from linattn.mechanisms.attention import Call


def why_not() -> str | None:
    """Why CuPy's kernels cannot run here; None if they can."""
    found = backends.load("cupy", "linear")
    return None if isinstance(found, ModuleType) else found


def wanted(backend: str | None) -> bool:
    """Whether arrays of a GPU go to CuPy. Asked for by name, a CuPy that is not there is an error."""
    if backend == "reference":
        return False
    reason = why_not()
    if backend == "cupy" and reason is not None:
        raise _checks.backend_missing("cupy", "gpu", reason)
    return reason is None


def _cupy() -> Any:
    return sys.modules["cupy"]


def in_stream(device: int, pointer: int) -> AbstractContextManager[Any]:
    """Inside, CuPy works on that device and in a stream that belongs to somebody else."""
    cupy, stack = _cupy(), ExitStack()
    stack.enter_context(cupy.cuda.Device(device))
    stack.enter_context(cupy.cuda.ExternalStream(pointer, device))
    return stack


def on_device(device: int) -> AbstractContextManager[Any]:
    """Inside, CuPy works on that device, in its own current stream."""
    return _cupy().cuda.Device(device)


def view(x: Any) -> Array:
    """The same memory as a CuPy array, ready in CuPy's current stream. None stays None."""
    return None if x is None else _cupy().from_dlpack(x)


def vjp(
    attend: Any, q: Any, k: Any, v: Any, key_mask: Any, edges: Any, options: dict[str, Any]
) -> tuple[Array, Callable[..., Any]]:
    """`attend.vjp` on views of a framework's arrays."""
    return attend.vjp(view(q), view(k), view(v), key_mask=view(key_mask), cu_seqlens=edges, **options)


def backward(attend: Any, d_out: Any, given: tuple[Any, ...], edges: Any, causal: bool) -> Any:
    """d_q, d_k, d_v where nothing was kept but the arguments `given`: q, k, v and the mask."""
    q, k, v, key_mask = given
    arrays = [view(x) for x in (d_out, q, k, v)]
    if edges is not None:
        return attend.vjp(*arrays[1:], causal=causal, key_mask=view(key_mask), cu_seqlens=edges)[1](arrays[0])
    call = Call(_arrays.namespace(arrays[1]), None, causal, view(key_mask))
    with _arrays.quiet(arrays[1]):
        return attend._backward(arrays[0], None, attend._saved(*arrays[1:], None, call), call, None)[:3]
