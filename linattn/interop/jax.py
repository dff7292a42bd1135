"""Attention on JAX arrays: the reference room as it is, or the compiled CPU kernels by callback.

Importing this module makes states pytrees, so that they pass `jit`, `vmap` and `scan`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from linattn import _arrays, _checks
from linattn.engines.features import MAPS, find
from linattn.interop import _cuda, _kernels
from linattn.interop._kernels import LinearOptions, SoftmaxOptions
from linattn.mechanisms.attention import Attention as Mechanism
from linattn.mechanisms.attention import Call, State
from linattn.mechanisms.cosformer import CosFormer
from linattn.mechanisms.feature_attention import FeatureAttention
from linattn.mechanisms.log_feature_attention import LogFeatureAttention
from linattn.mechanisms.softmax import Softmax

Array = Any
GPU = ("gpu", "cuda")  # what JAX calls the platform
jax.tree_util.register_dataclass(State, data_fields=["arrays", "start", "position"], meta_fields=["attend"])


def attention(
    q: Array,
    k: Array,
    v: Array,
    mechanism: Mechanism,
    *,
    causal: bool = False,
    key_mask: Array | None = None,
    cu_seqlens: Sequence[int] | Array | None = None,
    positions: Any = None,
    backend: str | None = None,
) -> Array:
    """`mechanism(q, k, v, ...)` on JAX arrays.

    Parameters
    ----------
    q, k, v : jax.Array
        (..., N, D), (..., M, D), (..., M, E), one dtype. flax and `jax.nn` have the heads behind the tokens:
        `jnp.swapaxes(x, -2, -3)` first.
    mechanism : Linear, CosFormer, Softmax, ...
        Any value of linattn.
    causal, key_mask, positions
        See `CosFormer.__call__`.
    cu_seqlens : sequence of int, optional
        Edges of packed sequences: numbers, for they decide shapes; a traced array is refused.
    backend : {"reference", "numba", "cupy"}, optional
        "reference", the default: array code with all of JAX's derivatives, on any device. "numba": the compiled CPU
        kernels through `jax.pure_callback`, with a derivative in reverse mode; pays from about 1000 tokens on. "cupy":
        CuPy's kernels on arrays of one NVIDIA GPU, with a derivative in reverse mode, and not under `jit`.

    Returns
    -------
    jax.Array
        (..., N, E).

    Raises
    ------
    TypeError, ValueError
        As the plain call.
    jax.errors.ConcretizationTypeError
        For traced `cu_seqlens`.

    Notes
    -----
    Without `jax_enable_x64` JAX makes float64 float32 before this function sees it.

    Examples
    --------
    >>> import jax
    >>> import linattn as la
    >>> from linattn.interop.jax import attention
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 8, 4))
    >>> loss = lambda q: attention(q, k, v, la.Linear("elu1"), causal=True, backend="numba").sum()
    >>> jax.jit(jax.grad(loss))(q).shape
    (2, 8, 4)
    """
    if not isinstance(mechanism, Mechanism):
        raise TypeError(f"`mechanism` must be a value like linattn.Linear(), got {mechanism!r}.")
    _checks.backend_name(backend)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, jax.Array):
            raise TypeError(f"`{name}` must be a jax.Array, got {type(x).__name__}.")
    edges = _edges(cu_seqlens, q, k)
    options = {} if positions is None else {"positions": positions}
    if backend == "cupy":
        return _on_gpu(q, k, v, mechanism, causal, key_mask, edges, options)
    if backend != "numba":
        return mechanism(q, k, v, causal=causal, key_mask=key_mask, cu_seqlens=edges, **options)
    return _compiled(q, k, v, mechanism, causal, key_mask, edges, positions)


def _edges(cu_seqlens: Any, q: Array, k: Array) -> tuple[int, ...] | None:
    if cu_seqlens is None:
        return None
    if isinstance(cu_seqlens, jax.core.Tracer):
        context = "`cu_seqlens` decides shapes and must be a sequence of int, got a traced array."
        raise jax.errors.ConcretizationTypeError(cu_seqlens, context)
    parts = _checks.segments(np.asarray(cu_seqlens), q.shape[-2], k.shape[-2])
    return (0, *(last for _, last in parts))


# -- the compiled kernels -----------------------------------------------------------------------------------------


def _compiled(
    q: Array, k: Array, v: Array, mechanism: Any, causal: bool, key_mask: Any, edges: Any, positions: Any
) -> Array:
    xp = _checks.queries_keys_values(q, k, v)
    by_value = isinstance(mechanism, LogFeatureAttention) and getattr(mechanism, "_by_logarithms", True)
    if by_value or not isinstance(mechanism, (Softmax, FeatureAttention)):
        if positions is not None:
            raise TypeError(f"`positions` is for CosFormer, got `{mechanism!r}`.")
        call, lead = mechanism._checked(q, k, v, causal, key_mask, None, None, xp)
        mechanism._refuse(call, streaming=False)
        return _any((mechanism, call.causal, edges, (*lead, q.shape[-2], v.shape[-1])), q, k, v, key_mask)
    causal = _checks.flag("causal", causal)
    if causal:
        _checks.causal_lengths(q.shape[-2], k.shape[-2])
    lead = _checks.leading(q=q.shape[:-2], k=k.shape[:-2], v=v.shape[:-2])
    if key_mask is not None:
        lead = _checks.key_mask(key_mask, k, lead)
    pair = None
    if positions is not None:
        if not isinstance(mechanism, CosFormer):
            raise TypeError(f"`positions` is for CosFormer, got `{mechanism!r}`.")
        pair, lead = _checks.positions(positions, q, k, lead)
    call = Call(xp, None, causal, key_mask, pair)
    mechanism._refuse(call, streaming=False)
    if isinstance(mechanism, Softmax):
        scale = float(mechanism.scale) if mechanism.scale is not None else max(q.shape[-1], 1) ** -0.5
        return _softmax((SoftmaxOptions(scale, causal, 0), edges), *_aligned(len(lead), (q, k, v), key_mask))
    own, dtype = find(mechanism.feature_map), q.dtype
    name = own.name if MAPS.get(own.name) is own else "identity"
    turn_q, turn_k = _turns(mechanism, q, k, call, edges)
    if name != own.name or MAPS.get(own.name) is not own:  # a map of the user's: array code, differentiated by JAX
        wide = _arrays.accumulator(q, xp)
        q, k, v = own.phi(q.astype(wide), xp), own.phi(k.astype(wide), xp), v.astype(wide)
    static = (LinearOptions.of(mechanism, causal, name), edges)
    given = () if turn_q is None else (turn_q, turn_k)
    q, k, v, mask, *turns = _aligned(len(lead), (q, k, v), key_mask, *given)
    return _linear(static, q, k, v, mask, tuple(turns)).astype(dtype)


def _aligned(rank: int, arrays: Any, key_mask: Any, *turns: Array) -> list[Any]:
    """Equally many leading axes, so that a batch axis that vmap puts in front of each meets its like."""

    def padded(x: Any, inner: int) -> Any:
        return None if x is None else jnp.reshape(x, (1,) * (rank + inner - x.ndim) + x.shape)

    return [*(padded(x, 2) for x in arrays), padded(key_mask, 1), *(padded(x, 2) for x in turns)]


def _turns(mechanism: Any, q: Array, k: Array, call: Call, edges: Any) -> tuple[Any, Any]:
    if not isinstance(mechanism, CosFormer):
        return None, None
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    if call.positions is None:  # known numbers: made by NumPy in float64
        like = np.empty(0, np.float64 if q.dtype == np.float64 else np.float32)
        length, edges = mechanism.length or 0, None if edges is None else np.asarray(edges)
        tables = _kernels.turns(like, n_queries, n_keys, 0, length, mechanism.align, None, edges)
        return jnp.asarray(tables[0]), jnp.asarray(tables[1])
    return mechanism._turns(call, n_queries, n_keys, k)


def _on_host(function: Callable[..., Any], results: Any, *arrays: Array, vmap_method: str = "broadcast_all") -> Any:
    """`function` on NumPy arrays, when the values are there; under vmap with the batch in front of every array."""
    return jax.pure_callback(
        lambda *given: function(*jax.tree.map(np.asarray, given)), results, *arrays, vmap_method=vmap_method
    )


def _shape(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _result(q: Array, k: Array, v: Array, mask: Any, turns: Any = ()) -> jax.ShapeDtypeStruct:
    shapes = [x.shape[:-2] for x in (q, k, v, *turns)] + ([] if mask is None else [mask.shape[:-1]])
    return jax.ShapeDtypeStruct((*_arrays.broadcast_shapes(*shapes), q.shape[-2], v.shape[-1]), q.dtype)


def _cu(edges: Any) -> Any:
    return None if edges is None else np.asarray(edges)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(static: Any, q: Array, k: Array, v: Array, mask: Any, turns: Any) -> Array:
    return _linear_forward(static, q, k, v, mask, turns)[0]


def _linear_forward(static: Any, q: Array, k: Array, v: Array, mask: Any, turns: Any) -> Any:
    options, edges = static
    out = _result(q, k, v, mask, turns)
    den_dtype = np.float64 if q.dtype == np.float64 else np.float32
    results = (out, jax.ShapeDtypeStruct(out.shape[:-1], den_dtype)) if options.normalize else (out,)

    def run(q: Any, k: Any, v: Any, mask: Any, turns: Any) -> Any:
        out, den, _ = _kernels.linear_forward(q, k, v, None, turns or None, mask, _cu(edges), options)
        return (out, den) if options.normalize else (out,)

    out, *den = _on_host(run, results, q, k, v, mask, turns)
    return out, (q, k, v, mask, turns, den)


def _linear_backward(static: Any, saved: Any, d_out: Array) -> Any:
    options, edges = static
    q, k, v, mask, turns, den = saved

    def run(d_out: Any, q: Any, k: Any, v: Any, mask: Any, turns: Any, den: Any) -> Any:
        own = den[0] if den else None
        return _kernels.linear_backward(d_out, None, q, k, v, own, None, turns or None, mask, _cu(edges), options)[:3]

    grads = _on_host(run, tuple(map(_shape, (q, k, v))), d_out, q, k, v, mask, turns, den)
    return *grads, None, None  # a mask and the pair weights pass no cotangent


_linear.defvjp(_linear_forward, _linear_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _softmax(static: Any, q: Array, k: Array, v: Array, mask: Any) -> Array:
    return _softmax_forward(static, q, k, v, mask)[0]


def _softmax_forward(static: Any, q: Array, k: Array, v: Array, mask: Any) -> Any:
    options, edges = static

    def run(q: Any, k: Any, v: Any, mask: Any) -> Any:
        return _kernels.softmax_forward(q, k, v, mask, _cu(edges), options)

    return _on_host(run, _result(q, k, v, mask), q, k, v, mask), (q, k, v, mask)


def _softmax_backward(static: Any, saved: Any, d_out: Array) -> Any:
    options, edges = static

    def run(d_out: Any, q: Any, k: Any, v: Any, mask: Any) -> Any:
        return _kernels.softmax_backward(d_out, q, k, v, mask, _cu(edges), options)

    return *_on_host(run, tuple(map(_shape, saved[:3])), d_out, *saved), None


_softmax.defvjp(_softmax_forward, _softmax_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _any(static: Any, q: Array, k: Array, v: Array, mask: Any) -> Array:
    """Any other mechanism. Moments of a call are the call's own, so vmap runs the calls one by one."""
    return _any_forward(static, q, k, v, mask)[0]


def _any_forward(static: Any, q: Array, k: Array, v: Array, mask: Any) -> Any:
    attend, causal, edges, shape = static

    def run(q: Any, k: Any, v: Any, mask: Any) -> Any:
        return _kernels.mechanism_forward(attend, q, k, v, None, mask, _cu(edges), causal, 0)[0]

    out = jax.ShapeDtypeStruct(shape, q.dtype)
    return _on_host(run, out, q, k, v, mask, vmap_method="sequential"), (q, k, v, mask)


def _any_backward(static: Any, saved: Any, d_out: Array) -> Any:
    attend, causal, edges, _ = static

    def run(d_out: Any, q: Any, k: Any, v: Any, mask: Any) -> Any:
        return _kernels.mechanism_backward(attend, d_out, None, q, k, v, None, mask, _cu(edges), causal, 0)[:3]

    return *_on_host(run, tuple(map(_shape, saved[:3])), d_out, *saved, vmap_method="sequential"), None


_any.defvjp(_any_forward, _any_backward)


# -- CuPy's kernels -------------------------------------------------------------------------------------------------


def _device_of(x: Array) -> Any:
    """The one device of an array that has values."""
    return next(iter(x.devices()))


def _on_gpu(
    q: Array, k: Array, v: Array, mechanism: Any, causal: bool, key_mask: Any, edges: Any, options: dict[str, Any]
) -> Array:
    if options:
        raise _checks.backend_lacks("cupy", "way to JAX's `positions`")
    xp = _checks.queries_keys_values(q, k, v)
    call, _ = mechanism._checked(q, k, v, causal, key_mask, None, None, xp)
    mechanism._refuse(call, streaming=False)
    return _cupy_call((mechanism, call.causal, edges), q, k, v, key_mask)


def _values(static: Any, *arrays: Array) -> int:
    """The number of the device of arrays whose values are there; refuses others."""
    given = [x for x in arrays if x is not None]
    for x in given:
        if isinstance(x, jax.core.Tracer):
            context = f"`backend='cupy'` runs at once, it cannot be traced: got a traced array for `{static[0]!r}`."
            raise jax.errors.ConcretizationTypeError(x, context)
    devices = [_device_of(x) for x in given]
    if any(x != devices[0] for x in devices):
        raise ValueError(f"All arrays must be on one device, got {', '.join(map(str, devices))}.")
    if devices[0].platform not in GPU:
        raise _checks.backend_lacks("cupy", f"way to JAX arrays on {devices[0].platform}")
    _cuda.wanted("cupy")
    return devices[0].local_hardware_id or 0


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cupy_call(static: Any, q: Array, k: Array, v: Array, mask: Any) -> Array:
    return _cupy_forward(static, q, k, v, mask)[0]


def _cupy_forward(static: Any, q: Array, k: Array, v: Array, mask: Any) -> Any:
    attend, causal, edges = static
    with _cuda.on_device(_values(static, q, k, v, mask)):
        out, _ = _cuda.vjp(attend, q, k, v, mask, edges, {"causal": causal})
        return jnp.from_dlpack(out), (q, k, v, mask)


def _cupy_backward(static: Any, saved: Any, d_out: Array) -> Any:
    attend, causal, edges = static
    with _cuda.on_device(_values(static, d_out, *saved)):
        grads = _cuda.backward(attend, d_out, saved, edges, causal)
        return *map(jnp.from_dlpack, grads), None


_cupy_call.defvjp(_cupy_forward, _cupy_backward)

__all__ = ["attention"]
