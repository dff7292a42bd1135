"""Every check of an argument and every error text.

One sentence each: the argument, the rule, what came. `TypeError` for types, dtypes and libraries, `ValueError`
for values and shapes. Checks read shapes and dtypes; the data of q, k and v are never read.
"""

from __future__ import annotations

import operator
from itertools import pairwise
from typing import Any

import numpy as np

from linattn import _arrays
from linattn._arrays import FLOATS, Array

BACKENDS = ("reference", "numba", "cupy")


# -- arrays -----------------------------------------------------------------------------------------------------


def array(name: str, x: Any) -> None:
    if _arrays.is_masked(x):
        raise TypeError(f"`{name}` must be a plain array, got a masked array: give the mask as `key_mask`.")
    if isinstance(x, np.generic) or _arrays.namespace(x) is None:
        raise TypeError(f"`{name}` must be an array, got {type(x).__name__}.")


def floating(name: str, x: Array) -> None:
    if _arrays.dtype_name(x) not in FLOATS:
        raise TypeError(f"`{name}` has dtype {_arrays.dtype_name(x)}, must have one of {', '.join(FLOATS)}.")


def alike(**arrays: Array) -> Any:
    """Arrays of one library, one floating dtype and one device; gives the library's namespace."""
    first = next(iter(arrays.values()))
    if all(type(x) is np.ndarray and x.dtype == first.dtype for x in arrays.values()):
        floating(next(iter(arrays)), first)
        return _arrays.namespace(first)  # the common case, decided fast: decoding calls this for every token
    for name, x in arrays.items():
        array(name, x)
    names = ", ".join(arrays)
    libraries = [_arrays.library(x) for x in arrays.values()]
    if len(set(libraries)) > 1:
        raise TypeError(f"{names} must come from one array library, got {', '.join(libraries)}.")
    for name, x in arrays.items():
        floating(name, x)
    dtypes = [_arrays.dtype_name(x) for x in arrays.values()]
    if len(set(dtypes)) > 1:
        raise TypeError(f"{names} must have one dtype, got {', '.join(dtypes)}.")
    devices = [_arrays.device(x) for x in arrays.values()]
    known = [d for d in devices if d is not None]
    if any(d != known[0] for d in known):
        raise ValueError(f"{names} must be on one device, got {', '.join(map(str, devices))}.")
    return _arrays.namespace(first)


def axes(**arrays: Array) -> None:
    for name, x in arrays.items():
        if x.ndim < 2:
            raise ValueError(f"`{name}` must have at least 2 axes (tokens, channels), got shape {tuple(x.shape)}.")


def leading(**shapes: tuple[int, ...]) -> tuple[int, ...]:
    """The common leading shape of arrays whose leading shapes are given by name."""
    try:
        return _arrays.broadcast_shapes(*shapes.values())
    except ValueError:
        came = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
        raise ValueError(f"The leading axes of {', '.join(shapes)} must broadcast, got {came}.") from None


def queries_keys(q: Array, k: Array) -> Any:
    xp = alike(q=q, k=k)
    axes(q=q, k=k)
    _same_channels(q, k)
    return xp


def keys_values(k: Array, v: Array) -> Any:
    xp = alike(k=k, v=v)
    axes(k=k, v=v)
    _same_tokens(k, v)
    return xp


def queries_keys_values(q: Array, k: Array, v: Array) -> Any:
    xp = alike(q=q, k=k, v=v)
    axes(q=q, k=k, v=v)
    _same_channels(q, k)
    _same_tokens(k, v)
    return xp


def _same_channels(q: Array, k: Array) -> None:
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"q and k must have the same last axis (channels), got q {tuple(q.shape)} and k {tuple(k.shape)}."
        )


def _same_tokens(k: Array, v: Array) -> None:
    if k.shape[-2] != v.shape[-2]:
        raise ValueError(f"k and v must have the same number of tokens, got k {tuple(k.shape)} and v {tuple(v.shape)}.")


def tokens(name: str, x: Array, of: str, n: int) -> None:
    if x.shape[-2] != n:
        raise ValueError(f"`{name}` must have {of} = {n} tokens, got shape {tuple(x.shape)}.")


def summaries(name: str, x: Array, n_regions: int, width: int) -> None:
    if tuple(x.shape[-2:]) != (n_regions, width):
        raise ValueError(
            f"`{name}` must have shape (..., R = {n_regions}, {width}), a row for each region of the plan, "
            f"got {tuple(x.shape)}."
        )


# -- call options -----------------------------------------------------------------------------------------------


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"`{name}` must be True or False, got {value!r}.")
    return bool(value)


def causal_lengths(n_queries: int, n_keys: int) -> None:
    if n_queries != n_keys:
        raise ValueError(
            f"`causal` needs as many queries as keys, got N = {n_queries} and M = {n_keys}: "
            f"earlier keys come as a state, see `step`."
        )


def _joins(name: str, x: Array, n_tokens: int, tokens: str, lead: tuple[int, ...]) -> tuple[int, ...]:
    """The leading shape with that of `x` (..., n_tokens) joined in."""
    try:
        if x.ndim >= 1 and x.shape[-1] == n_tokens:
            return _arrays.broadcast_shapes(tuple(x.shape[:-1]), lead)
    except ValueError:
        pass
    raise ValueError(
        f"`{name}` must have shape (..., {tokens} = {n_tokens}) with leading axes that broadcast with {lead}, "
        f"got shape {tuple(x.shape)}."
    )


def key_mask(mask: Any, k: Array, lead: tuple[int, ...]) -> tuple[int, ...]:
    """A boolean (..., M) of the library of k; gives the leading shape with its own joined in."""
    if _arrays.namespace(mask) is None or _arrays.dtype_name(mask) not in ("bool", "bool_"):
        came = f"dtype {_arrays.dtype_name(mask)}" if hasattr(mask, "dtype") else type(mask).__name__
        raise TypeError(f"`key_mask` must be an array of bool (True = visible), got {came}.")
    if _arrays.library(mask) != _arrays.library(k):
        raise TypeError(
            f"`key_mask` must come from the library of k, got {_arrays.library(mask)} and {_arrays.library(k)}."
        )
    return _joins("key_mask", mask, k.shape[-2], "M", lead)


def segments(cu_seqlens: Any, n_queries: int, n_keys: int) -> list[tuple[int, int]]:
    """[(first, last), ...] of the packed sequences."""
    if _arrays.is_masked(cu_seqlens) or (hasattr(cu_seqlens, "dtype") and _arrays.is_lazy(cu_seqlens)):
        raise TypeError("`cu_seqlens` must hold readable integers (it decides shapes), got a traced or masked array.")
    if n_queries != n_keys:
        raise ValueError(f"`cu_seqlens` is for self-attention, it needs N == M, got N = {n_queries} and M = {n_keys}.")
    given = _arrays.to_numpy(cu_seqlens)
    if given.ndim != 1:
        raise ValueError(f"`cu_seqlens` must have one axis, from 0 to N = {n_keys}, got shape {given.shape}.")
    try:
        edges = [operator.index(x) for x in given]
    except TypeError:
        raise TypeError(f"`cu_seqlens` must hold integers, from 0 to N, got {given.dtype}.") from None
    if not edges or edges[0] != 0 or edges[-1] != n_keys or any(a > b for a, b in pairwise(edges)):
        raise ValueError(f"`cu_seqlens` must rise from 0 to N = {n_keys} (repeats are fine), got {edges}.")
    return list(pairwise(edges))


def result(name: str, out: Any, shape: tuple[int, ...], like: Array, *inputs: Array) -> None:
    """An `out=` array: library, dtype and shape exact, writeable, no overlap with an input."""
    array(name, out)
    if _arrays.library(out) != _arrays.library(like) or _arrays.is_immutable(out):
        raise TypeError(
            f"`{name}` must be a writeable array of the library of the inputs ({_arrays.library(like)}), "
            f"got {_arrays.library(out)}."
        )
    if out.dtype != like.dtype:
        raise TypeError(f"`{name}` must have dtype {like.dtype}, got {out.dtype}.")
    if tuple(out.shape) != tuple(shape):
        raise ValueError(f"`{name}` must have shape {tuple(shape)}, got {tuple(out.shape)}.")
    if _arrays.is_read_only(out):
        raise ValueError(f"`{name}` must be writeable, got a read-only array.")
    if any(_arrays.share_memory(out, x) for x in inputs):
        raise ValueError(f"`{name}` must not overlap with an input, got one that shares memory.")


def cotangent(name: str, d_x: Any, x_name: str, shape: tuple[int, ...], like: Array) -> None:
    array(name, d_x)
    if _arrays.library(d_x) != _arrays.library(like):
        raise TypeError(
            f"`{name}` must come from the library of `{x_name}` ({_arrays.library(like)}), got {_arrays.library(d_x)}."
        )
    if _arrays.dtype_name(d_x) != _arrays.dtype_name(like):
        raise TypeError(
            f"`{name}` must have the dtype of `{x_name}` ({_arrays.dtype_name(like)}), got {_arrays.dtype_name(d_x)}."
        )
    if tuple(d_x.shape) != tuple(shape):
        raise ValueError(f"`{name}` must have the shape of `{x_name}` {tuple(shape)}, got {tuple(d_x.shape)}.")


# -- positions --------------------------------------------------------------------------------------------------


def positions(value: Any, q: Array, k: Array, lead: tuple[int, ...]) -> tuple[tuple[Any, Any], tuple[int, ...]]:
    """`positions` (..., N), or a pair for q and k, as a pair; and the leading shape with theirs."""
    pair = value if isinstance(value, (tuple, list)) and len(value) == 2 else (value, value)
    for p, x, tokens in zip(pair, (q, k), ("N", "M"), strict=True):
        array("positions", p)
        kind = _arrays.dtype_name(p)
        if not (kind in FLOATS or kind.startswith(("int", "uint"))):
            raise TypeError(f"`positions` must hold integers or real numbers, got dtype {kind}.")
        if _arrays.library(p) not in ("numpy", _arrays.library(x)):
            raise TypeError(
                f"`positions` must come from the library of q ({_arrays.library(x)}) or from numpy, "
                f"got {_arrays.library(p)}."
            )
        lead = _joins("positions", p, x.shape[-2], tokens, lead)
    return (pair[0], pair[1]), lead


def position_outside(mechanism: Any, position: float, length: int) -> ValueError:
    return ValueError(f"position {position:g} of `{mechanism!r}` is outside 0 .. length={length}.")


# -- states -----------------------------------------------------------------------------------------------------


def state_of(mechanism: Any, state: Any, kind: Any) -> None:
    if not isinstance(state, kind):
        raise TypeError(f"`state` must be a state made by `{mechanism!r}.init_state`, got {type(state).__name__}.")
    if state.attend != mechanism:
        raise ValueError(f"`state` was made by `{state.attend!r}`, it cannot be used with `{mechanism!r}`.")


def same_library(x: Array, y: Array) -> None:
    if _arrays.library(x) != _arrays.library(y):
        raise TypeError(f"Both states must hold arrays of one library, got {_arrays.library(x)}, {_arrays.library(y)}.")


def state_arrays(name: str, came: dict[str, Any], want: dict[str, tuple[tuple[int, ...], str, str]]) -> None:
    """The state's arrays against the (shape, dtype, library) that fit the keys and values at hand."""
    for field, (shape, dtype, library) in want.items():
        x = came[field]
        array(f"{name}: {field}", x)
        if _arrays.library(x) != library:
            raise TypeError(f"`{name}` must hold arrays of {library}, got {_arrays.library(x)}.")
        if _arrays.dtype_name(x) != dtype:
            raise TypeError(f"`{name}` must hold {dtype}, got {_arrays.dtype_name(x)}.")
        if tuple(x.shape) != shape:
            raise ValueError(f"`{name}` does not fit: its `{field}` must have shape {shape}, got {tuple(x.shape)}.")


# -- a mechanism's own parameters -------------------------------------------------------------------------------


def natural(name: str, value: Any, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"`{name}` must be an integer, got {value!r}.")
    if value < least:
        raise ValueError(f"`{name}` must be at least {least}, got {value}.")


def positive_real(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"`{name}` must be a real number, got {value!r}.")
    if not 0 < value < float("inf"):
        raise ValueError(f"`{name}` must be positive and finite, got {value}.")


def real(name: str, value: Any) -> float:
    """A finite real number, as a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"`{name}` must be a real number, got {value!r}.")
    if not -float("inf") < value < float("inf"):
        raise ValueError(f"`{name}` must be finite, got {value}.")
    return float(value)


def real_or_nested(name: str, value: Any) -> Any:
    """A finite real number, or a tuple (list, array) of such of one depth, as floats and tuples."""
    if isinstance(value, np.ndarray) and value.ndim:
        value = value.tolist()
    if not isinstance(value, (tuple, list)):
        return real(name, value[()] if isinstance(value, np.ndarray) else value)
    found = tuple(real_or_nested(name, x) for x in value)
    if not found or len({np.shape(x) for x in found}) > 1:
        raise ValueError(f"`{name}` must be a number or one a head, got {value!r}.")
    return found


def not_negative(name: str, value: Any) -> None:
    if real(name, value) < 0:
        raise ValueError(f"`{name}` must not be negative, got {value}.")


def real_array(name: str, value: Any, least_axes: int) -> np.ndarray:
    """Finite numbers with so many axes at least, as a float64 array of NumPy that nobody writes to."""
    if _arrays.namespace(value) is not None:
        readable(name, value)
        value = _arrays.to_numpy(value)
    try:
        raw = np.array(value)
        x = raw.astype(np.float64) if raw.dtype.kind != "c" else raw
    except (TypeError, ValueError):
        raise TypeError(f"`{name}` must hold real numbers, got {type(value).__name__}.") from None
    if raw.dtype.kind == "c":
        raise TypeError(f"`{name}` must hold real numbers, got dtype {raw.dtype}.")
    if x.ndim < least_axes or 0 in x.shape[-least_axes:]:
        raise ValueError(f"`{name}` must have at least {least_axes} axes, none of them empty, got shape {x.shape}.")
    if not np.all(np.isfinite(x)):
        raise ValueError(f"`{name}` must be finite, got NaN or inf.")
    x.flags.writeable = False
    return x


def square(name: str, x: np.ndarray) -> None:
    if x.shape[-1] != x.shape[-2]:
        raise ValueError(f"`{name}` must be square in its last two axes, got shape {x.shape}.")


def own_axes(lead: tuple[int, ...], **shapes: tuple[int, ...]) -> tuple[int, ...]:
    """The leading shape of a call with the axes of a mechanism's own parameters joined in."""
    for name, shape in shapes.items():
        try:
            lead = _arrays.broadcast_shapes(lead, tuple(shape))
        except ValueError:
            raise ValueError(
                f"`{name}` must broadcast with the leading axes of q, k and v {lead}, got shape {tuple(shape)}."
            ) from None
    return lead


def readable(name: str, x: Array) -> None:
    if not _arrays.is_readable(x):
        raise ValueError(f"`{name}` must hold values that can be read, got a traced array.")


def within(name: str, value: Any, low: float, high: float) -> None:
    """A number, or nested tuples of them, none outside low .. high."""
    worst = max(np.ravel(value), key=lambda x: max(low - x, x - high))
    if not low <= worst <= high:
        raise ValueError(f"`{name}` must be within {low:g} .. {high:g}, got {worst:g}.")


def line(name: str, value: Any) -> tuple[float, float]:
    """(a, b) of a x + b, rising."""
    if len(value) != 2:
        raise ValueError(f"`{name}` must be a name or (a, b) of a line a chi + b, got {value!r}.")
    a, b = real(f"{name}: a", value[0]), real(f"{name}: b", value[1])
    if a <= 0:
        raise ValueError(f"`{name}` must be a rising line a chi + b, a > 0, got a = {a}.")
    return a, b


def choice(name: str, value: Any, known: Any) -> None:
    if not isinstance(value, str):
        raise TypeError(f"`{name}` must be one of {', '.join(map(repr, known))}, got {value!r}.")
    if value not in known:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, known))}, got {value!r}.")


def eps(value: Any) -> None:
    if value == "safe":
        return
    rule = '`eps` must be "safe", ("clamp", x) or ("add", x)'
    if not (isinstance(value, tuple) and len(value) == 2 and value[0] in ("clamp", "add")):
        error = ValueError if isinstance(value, (str, tuple)) else TypeError
        raise error(f"{rule}, got {value!r}.")
    positive_real(f'eps=("{value[0]}", x)', value[1])


# -- backends ---------------------------------------------------------------------------------------------------


def backend_name(backend: Any) -> None:
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"`backend` must be one of {', '.join(BACKENDS)} or None, got {backend!r}.")


def backend_arrays(backend: str, library: str, wants: str) -> TypeError:
    return TypeError(f"`backend={backend!r}` takes {wants} arrays, got {library}: they are not moved for you.")


def backend_lacks(backend: str, what: str) -> ValueError:
    return ValueError(f"`backend={backend!r}`: {backend} has no {what}; use the reference or leave `backend` out.")


def backend_missing(backend: str, extra: str, reason: str) -> ImportError:
    return ImportError(f"`backend={backend!r}` cannot be loaded ({reason}): pip install linattn[{extra}].")
