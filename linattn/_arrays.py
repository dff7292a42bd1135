"""The only place that asks "which array library is this?", and what the libraries do not agree on.

Requirements on a library: the array API standard 2024.12 as `array_api_compat` gives it. Nothing here imports
a library that its user has not imported.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import array_api_compat as compat
import numpy as np

Array = Any
_NUMPY: Any = np  # follows the standard by itself; the compat namespace would load numpy.f2py and numpy.testing
_NAMES: dict[np.dtype[Any], str] = {}  # asking NumPy costs microseconds, and every call asks
FLOATS = ("float64", "float32", "float16", "bfloat16")


def namespace(x: Array) -> Any:
    """The array API namespace of `x`; None if `x` is not an array."""
    if isinstance(x, np.ndarray):
        return _NUMPY
    if _root(x) == "torch":
        import array_api_compat.torch as torch_namespace  # its user has torch; compilers trace through this line

        return torch_namespace if hasattr(x, "layout") else None
    try:
        return compat.array_namespace(x)
    except TypeError:
        return None


def _root(x: Any) -> str:
    return type(x).__module__.partition(".")[0]


def library(x: Array) -> str:
    """Name of the library `x` comes from ("numpy", "torch", ...); for anything else its type's name."""
    if isinstance(x, np.ndarray):
        return "numpy"
    if namespace(x) is None:
        return type(x).__name__
    return _root(x).removesuffix("lib")  # jaxlib


def is_masked(x: Array) -> bool:
    return isinstance(x, np.ma.MaskedArray)


def is_lazy(x: Array) -> bool:
    """True where values cannot be read: tracers, and every array of JAX and dask."""
    return _root(x) not in ("numpy", "torch") and bool(compat.is_lazy_array(x))


def is_traced(x: Any) -> bool:
    """True for a number or array of which JAX knows the shape alone."""
    if isinstance(x, int):  # asked first: compilers trace through this line
        return False
    return _root(x) == "jax" and bool(compat.is_jax_array(x))  # arrays with values are jaxlib's


def is_immutable(x: Array) -> bool:
    """True if no array of this library can be assigned to (JAX, dask)."""
    return not isinstance(x, np.ndarray) and not compat.is_writeable_array(x)


def row_major(x: Array) -> Array:
    """`x` in C order and aligned: the same bits come of it then, however it lay, for a BLAS rounds by layout."""
    return np.require(x, requirements=["C", "A"]) if isinstance(x, np.ndarray) and x.ndim else x


def is_read_only(x: Array) -> bool:
    return not compat.is_writeable_array(x)


def share_memory(x: Array, y: Array) -> bool:
    """Whether writing to `x` may change `y`. Libraries that do not tell are asked for the same object only."""
    if isinstance(x, np.ndarray) and isinstance(y, np.ndarray):
        return bool(np.may_share_memory(x, y))
    return x is y


def device(x: Array) -> Any:
    """The device of `x`, None under a tracer."""
    return x.device if _root(x) in ("numpy", "torch") else compat.device(x)


def dtype_name(x: Array) -> str:
    """The dtype's name on every library, ml_dtypes included: "float32", "bfloat16", "int64", ..."""
    if isinstance(x, np.ndarray):
        if x.dtype not in _NAMES:
            _NAMES[x.dtype] = str(x.dtype.name)
        return _NAMES[x.dtype]
    return str(x.dtype).rpartition(".")[2]


def plain(x: Array) -> Array:
    """`x` as its library's own array in native byte order: no copy unless the bytes are swapped."""
    if type(x) is np.ndarray and x.dtype.isnative:
        return x
    if isinstance(x, np.ndarray):
        return np.asarray(x, dtype=x.dtype.newbyteorder("="))
    return x


def accumulator(x: Array, xp: Any) -> Any:
    """The dtype in which sums over `x` are made: float64 for float64, else float32."""
    return xp.float64 if dtype_name(x) == "float64" else xp.float32


def wide(x: Array, xp: Any) -> Any:
    """float64 where the library of `x` has it (JAX only when told), else float32: for running totals and logarithms."""
    if library(x) == "jax" and "float64" not in xp.__array_namespace_info__().dtypes(kind="real floating"):
        return accumulator(x, xp)
    return xp.float64


def arange(first: int, count: int, like: Array, xp: Any) -> Array:
    """first, first + 1, ... in the widest real dtype of the library, on the device of `like`."""
    if is_traced(first):  # a state under jit or scan does not know its position
        return xp.arange(count, dtype=wide(like, xp), device=device(like)) + first
    return xp.arange(first, first + count, dtype=wide(like, xp), device=device(like))


def constant(x: Array, like: Array, xp: Any) -> Array:
    """Numbers of this library or of NumPy, as reals in the widest dtype on the device of `like`."""
    if library(x) != library(like):
        x = xp.asarray(np.array(x), device=device(like))  # a copy: some libraries would share the memory
    return cast(x, wide(like, xp), xp)


def cast(x: Array, dtype: Any, xp: Any) -> Array:
    """`x` in `dtype`, without a copy if it has it."""
    return x if x.dtype == dtype else xp.astype(x, dtype)


def indices(x: Array, xp: Any) -> Array:
    """Integers in a dtype that the library's `take` accepts."""
    return cast(x, xp.int64, xp) if _root(x) == "ndonnx" else x


def detached(x: Array) -> Array:
    """The same numbers, constants to the framework's own differentiation."""
    if _root(x) == "torch":
        return x.detach()
    if library(x) == "jax":
        from jax.lax import stop_gradient  # its user has JAX

        return stop_gradient(x)
    return x


def is_readable(x: Array) -> bool:
    """Whether the values of `x` are there to be looked at: not under a tracer."""
    if library(x) == "jax":
        from jax.core import Tracer  # its user has JAX

        return not isinstance(x, Tracer)
    return not is_lazy(x)


def quiet(like: Array) -> AbstractContextManager[Any]:
    """NaN and inf are results, not news: inside, NumPy does not warn of them."""
    return np.errstate(all="ignore") if isinstance(like, np.ndarray) else nullcontext()


def to_numpy(x: Array) -> np.ndarray:
    """A NumPy array of the same values, on the host: for measuring, never on the way of the data."""
    if isinstance(x, np.ndarray):
        return x
    if library(x) == "torch":
        return np.asarray(x.detach().cpu())
    if library(x) == "cupy":
        return x.get()
    return np.asarray(x)


def broadcast_shapes(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    """The common shape. Raises `ValueError` if there is none. (Written out: compilers trace through it.)"""
    common = [1] * max(len(shape) for shape in shapes)
    for shape in shapes:
        for axis, size in enumerate(shape, start=len(common) - len(shape)):
            if common[axis] == 1:
                common[axis] = size
            elif size not in (1, common[axis]):
                raise ValueError(f"{', '.join(map(str, shapes))} do not broadcast.")
    return tuple(common)


def unbroadcast(x: Array, shape: tuple[int, ...], xp: Any) -> Array:
    """The VJP of broadcasting to the shape of `x`: summed over the axes that `shape` lacks or has as 1."""
    if tuple(x.shape) == tuple(shape):
        return x
    extra = x.ndim - len(shape)
    stretched = tuple(
        axis for axis in range(x.ndim) if axis < extra or (shape[axis - extra] == 1 and x.shape[axis] != 1)
    )
    total = xp.sum(x, axis=stretched, keepdims=True, dtype=x.dtype)
    return xp.reshape(total, tuple(shape))


def fill(out: Array | None, x: Array) -> Array:
    """`x`, or `out` with the values of `x` written to it."""
    if out is None:
        return x
    out[...] = x
    return out
