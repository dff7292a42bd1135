"""A mechanism's call and step on torch tensors: checks, then the operator or the reference room."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from linattn import _arrays, _checks
from linattn.engines.features import MAPS, find
from linattn.engines.linear import LinearState
from linattn.engines.loglinear import LogLinearState
from linattn.engines.softmax import SoftmaxState, extend
from linattn.interop import _cuda, _torch_cuda, _torch_mechanism, _torch_ops  # noqa: F401  # its operators
from linattn.interop._kernels import LinearOptions
from linattn.interop._specs import spec_of
from linattn.interop._torch_ops import OPS, is_undisturbed, tensor, view
from linattn.mechanisms.attention import Attention as Mechanism
from linattn.mechanisms.attention import Call, State
from linattn.mechanisms.cosformer import CosFormer
from linattn.mechanisms.feature_attention import FeatureAttention
from linattn.mechanisms.linear import Linear
from linattn.mechanisms.softmax import Softmax

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mechanism: Mechanism,
    *,
    causal: bool = False,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    positions: Any = None,
    backend: str | None = None,
) -> Tensor:
    """`mechanism(q, k, v, ...)` on tensors, by the compiled kernels where the tensors are on the CPU.

    Parameters
    ----------
    q, k, v : Tensor
        (..., N, D), (..., M, D), (..., M, E): one dtype (float64, float32, float16, bfloat16) and device.
    mechanism : Linear, CosFormer, Softmax, ...
        Any value of linattn.
    causal, key_mask, cu_seqlens
        See `Linear.__call__`. `key_mask` is True where a key is visible, as in `scaled_dot_product_attention` and
        unlike `key_padding_mask`. A tensor `cu_seqlens` is read when the operator runs, so it may be traced.
    positions : Tensor, or pair of Tensors, optional
        CosFormer's, see `CosFormer.__call__`.
    backend : {"reference", "numba", "cupy"}, optional
        "reference" is plain tensor code: it has every derivative and runs on any device. By default the compiled
        kernels: those of the CPU where there is an operator for the call, CuPy's for tensors on an NVIDIA GPU where
        CuPy is installed; else the reference.

    Returns
    -------
    Tensor
        (..., N, E).

    Raises
    ------
    TypeError
        For what is not a tensor, mixed dtypes, a dtype that is not floating.
    ValueError
        For shapes that do not fit, and for what the mechanism cannot do.
    RuntimeError
        For tensors on several devices, and for derivatives that the kernels do not have.

    Notes
    -----
    First derivatives in reverse mode; `torch.compile(fullgraph=True)`, `torch.export` and `torch.vmap` keep the
    operator as one node. No `torch.func.grad` and no second derivative: `backend="reference"` has both.

    Examples
    --------
    >>> import torch
    >>> import linattn as la
    >>> from linattn.interop.torch import attention
    >>> q, k, v = (torch.randn(2, 8, 4, requires_grad=True) for _ in range(3))
    >>> out = attention(q, k, v, la.Linear("elu1"), causal=True)
    >>> out.sum().backward()
    >>> q.grad.shape
    torch.Size([2, 8, 4])
    """
    if cu_seqlens is None and positions is None and backend is None:
        run = _undisturbed(q, k, v, key_mask, mechanism)
        if run is not None:
            return run(mechanism, causal, key_mask, q, k, v)
    lead = _checked(q, k, v, mechanism, backend)
    if _torch_cuda.is_cuda(q) and not _maps() and _cuda.wanted(backend):
        if key_mask is not None:
            _checks.key_mask(key_mask, k, lead)
            _one_device(k=k, key_mask=key_mask)
        return _torch_cuda.attention(q, k, v, mechanism, causal, key_mask, cu_seqlens, positions)
    if not _has_operator(q, mechanism, backend):
        return _reference(q, k, v, mechanism, causal, key_mask, cu_seqlens, positions)
    causal = _checks.flag("causal", causal)
    if causal:
        _checks.causal_lengths(q.shape[-2], k.shape[-2])
    if key_mask is not None:
        _checks.key_mask(key_mask, k, lead)
        _one_device(k=k, key_mask=key_mask)
    edges = _edges(cu_seqlens, q, k)
    if positions is not None:
        if not isinstance(mechanism, CosFormer):
            raise TypeError(f"`positions` is for CosFormer, got `{mechanism!r}`.")
        (p_q, p_k), _ = _checks.positions(positions, q, k, lead)
        positions = torch.as_tensor(p_q), torch.as_tensor(p_k)
    if not _has_own_pair(mechanism):
        call = Call(None, None, causal, key_mask)
        mechanism._refuse(call, streaming=False)
        return _mechanism(q, k, v, mechanism, None, call, edges)[0]
    call = Call(None, None, causal, key_mask, positions)
    mechanism._refuse(call, streaming=False)
    if isinstance(mechanism, Softmax):
        scale = float(mechanism.scale) if mechanism.scale is not None else max(q.shape[-1], 1) ** -0.5
        return _run(OPS.softmax.default, q, k, v, key_mask, edges, scale, causal, 0)
    out, _ = _linear(q, k, v, mechanism, None, call, edges)
    return out


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mechanism: Mechanism,
    state: State,
    *,
    key_mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, State]:
    """`mechanism.step(q, k, v, state)` on tensors: a prompt or a token, differentiable through the state.

    Parameters
    ----------
    q, k, v, mechanism, key_mask, backend
        See `attention`.
    state : State
        From `mechanism.init_state(k, v)` with tensors, or from an earlier step.

    Returns
    -------
    out : Tensor
        (..., n, E).
    state : State
        The state with the new tokens in it; the old one stays usable.

    Examples
    --------
    >>> import torch
    >>> import linattn as la
    >>> from linattn.interop.torch import attention, step
    >>> q, k, v = torch.randn(3, 2, 8, 4, dtype=torch.float64)
    >>> attend = la.Linear("elu1")
    >>> first, state = step(q[:, :5], k[:, :5], v[:, :5], attend, attend.init_state(k, v))
    >>> rest, state = step(q[:, 5:], k[:, 5:], v[:, 5:], attend, state)
    >>> bool(torch.allclose(torch.cat([first, rest], dim=-2), attention(q, k, v, attend, causal=True)))
    True
    """
    lead = _checked(q, k, v, mechanism, backend)
    _checks.state_of(mechanism, state, State)
    sums = isinstance(state.arrays, (LinearState, LogLinearState, SoftmaxState))
    if not (sums and _has_operator(q, mechanism, backend)):
        with torch.autocast(q.device.type, enabled=False):
            return mechanism.step(q, k, v, state, key_mask=key_mask)
    _checks.causal_lengths(q.shape[-2], k.shape[-2])
    if key_mask is not None:
        _checks.key_mask(key_mask, k, lead)
    call = Call(_arrays.namespace(q), None, True, key_mask, None, state.position)
    mechanism._refuse(call, streaming=True)
    mechanism._refuse_state(state, k, v, call)
    if isinstance(mechanism, Softmax):
        offset = state.arrays.k.shape[-2]
        arrays: Any = extend(state.arrays, k, v, key_mask, call.xp)
        scale = float(mechanism.scale) if mechanism.scale is not None else max(q.shape[-1], 1) ** -0.5
        out = _run(OPS.softmax.default, q, arrays.k, arrays.v, arrays.visible, None, scale, True, offset)
    elif not _has_own_pair(mechanism):
        out, arrays = _mechanism(q, k, v, mechanism, state.arrays, call, None)
    else:
        out, arrays = _linear(q, k, v, mechanism, state.arrays, call, None)
    return out, State(mechanism, arrays, state.start, state.position + q.shape[-2])


def _linear(
    q: Tensor, k: Tensor, v: Tensor, mechanism: Any, state: LinearState | None, call: Call, edges: Tensor | None
) -> tuple[Tensor, LinearState]:
    dtype, name = q.dtype, "identity"
    own = find(mechanism.feature_map)
    if MAPS.get(own.name) is own:
        name = own.name
    else:  # a map of the user's: tensor code, differentiated by torch
        xp, wide = _arrays.namespace(q), _torch_ops.accumulator(q)
        with torch.autocast(q.device.type, enabled=False):
            q, k, v = own.phi(q.to(wide), xp), own.phi(k.to(wide), xp), v.to(wide)
    turn_q, turn_k = _turns(mechanism, q, k, call, edges)
    options = LinearOptions.of(mechanism, call.causal, name)
    sums, rest = (None, None) if state is None else state
    out, _, *after = _run(OPS.linear.default, q, k, v, sums, rest, turn_q, turn_k, call.key_mask, edges, *options)
    return (out if out.dtype is dtype else out.to(dtype)), LinearState(*after)


def _mechanism(
    q: Tensor, k: Tensor, v: Tensor, mechanism: Any, state: Any, call: Call, edges: Tensor | None
) -> tuple[Tensor, Any]:
    if not torch.compiler.is_compiling():  # else the operator's fake looks at it
        mechanism._checked(q, k, v, call.causal, call.key_mask, None, None, _arrays.namespace(q))
    sums, rest, gauge = (None, None, None) if state is None else (*state, None)[:3]
    out, *after = _run(
        OPS.mechanism.default, q, k, v, sums, rest, gauge, call.key_mask, edges, spec_of(mechanism), call.causal,
        call.first_position,
    )  # fmt: skip
    return out, None if state is None else type(state)(*after[: len(state)])


def _turns(
    mechanism: Any, q: Tensor, k: Tensor, call: Call, edges: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    if not isinstance(mechanism, CosFormer):
        return None, None
    p_q, p_k = call.positions or (None, None)
    first, length, n_queries, n_keys = call.first_position, mechanism.length or 0, q.shape[-2], k.shape[-2]
    dtype = _torch_ops.accumulator(k)
    if torch.compiler.is_compiling() or not (p_q is p_k is edges is None):
        like = torch.empty(0, dtype=dtype)
        return OPS.turns.default(like, n_queries, n_keys, first, length, mechanism.align, p_q, p_k, edges)
    # NumPy at once: the tables carry no derivative
    here = np.empty(0, np.float64 if dtype is torch.float64 else np.float32)
    tables = mechanism._turns(Call(np, first_position=first), n_queries, n_keys, here)
    return _torch_ops.tensor(tables[0]), _torch_ops.tensor(tables[1])


def _run(operator: Any, *args: Any) -> Any:
    if torch.compiler.is_compiling():
        return operator(*args)
    try:
        if not torch._C._are_functorch_transforms_active():
            return _torch_ops.directly(operator, args)
        return operator(*args)
    except RuntimeError as error:
        if "functorch transforms" in str(error):
            raise RuntimeError(_torch_ops.SECOND_ORDER) from None
        raise


def _maps() -> bool:
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _has_own_pair(mechanism: Any) -> bool:
    """Whether it goes by `linattn::linear` or `linattn::softmax`."""
    if isinstance(mechanism, Linear):
        return not mechanism._by_logarithms
    return type(mechanism) is Softmax or isinstance(mechanism, FeatureAttention)


def _has_operator(q: Tensor, mechanism: Mechanism, backend: str | None) -> bool:
    if backend == "reference":
        return False
    engine = _has_own_pair(mechanism) or spec_of(mechanism) is not None
    if engine and q.device.type == "cpu":
        return True
    if backend is not None:
        what = f"operator for tensors on {q.device.type}" if engine else f"operator for `{mechanism!r}`"
        raise _checks.backend_lacks(backend, what)
    return False


def _reference(
    q: Tensor, k: Tensor, v: Tensor, mechanism: Any, causal: bool, key_mask: Any, cu_seqlens: Any, positions: Any
) -> Tensor:
    options = {} if positions is None else {"positions": positions}
    with torch.autocast(q.device.type, enabled=False):  # it would make the matrix products 16-bit
        return mechanism(q, k, v, causal=causal, key_mask=key_mask, cu_seqlens=cu_seqlens, **options)


def _undisturbed(q: Any, k: Any, v: Any, key_mask: Any, mechanism: Any) -> Any:
    """Who runs a call that nothing traces, maps or watches; None: the operator.

    It would run the same kernels on the same memory: what is left out is the way through torch's dispatcher.
    """
    if not (type(q) is type(k) is type(v) is Tensor and q.is_cpu and k.is_cpu and v.is_cpu):
        return None
    if torch.compiler.is_compiling() or not is_undisturbed():
        return None
    if not isinstance(mechanism, Mechanism) or spec_of(mechanism) is None:  # what is the user's runs as tensor code
        return None
    if not (q.layout is k.layout is v.layout is torch.strided and q.dtype in FLOATS):
        return None
    if key_mask is not None and not (type(key_mask) is Tensor and key_mask.is_cpu and key_mask.dtype is torch.bool):
        return None
    if not ((q.requires_grad or k.requires_grad or v.requires_grad) and torch.is_grad_enabled()):
        return _at_once
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # checkpoints, offloading: they want tensors
    return _Undisturbed.apply if hooks is None else None


def _at_once(mechanism: Any, causal: Any, key_mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return tensor(mechanism(view(q), view(k), view(v), causal=causal, key_mask=view(key_mask)))


class _Undisturbed(torch.autograd.Function):
    """A mechanism's `vjp` on views of tensors; its backward keeps what the forward found until it has run."""

    @staticmethod
    def forward(ctx: Any, mechanism: Any, causal: Any, key_mask: Tensor | None, *tensors: Tensor) -> Tensor:
        out, ctx.undo = mechanism.vjp(*map(view, tensors), causal=causal, key_mask=view(key_mask))
        ctx.save_for_backward(key_mask, *tensors)
        ctx.call = spec_of(mechanism), bool(causal), 0
        return tensor(out)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        key_mask, *tensors = ctx.saved_tensors  # complains if one was changed in between
        plain = type(d_out) is Tensor and d_out.is_cpu and not torch.is_grad_enabled() and is_undisturbed()
        if plain and ctx.undo is not None:
            try:
                given = view(d_out)
            except RuntimeError:  # several cotangents at once, `is_grads_batched`
                given = None
            if given is not None:
                undo, ctx.undo = ctx.undo, None  # a second time, by the operator
                return None, None, None, *map(tensor, undo(given))
        args = (d_out, None, *tensors, None, None, None, key_mask, None, *ctx.call)
        return None, None, None, *OPS.mechanism_backward.default(*args)[:3]


# -- checks -------------------------------------------------------------------------------------------------------


def _checked(q: Any, k: Any, v: Any, mechanism: Any, backend: Any) -> tuple[int, ...]:
    """Refuses what does not fit; the common leading shape. Sound tensors are let through fast."""
    if not isinstance(mechanism, Mechanism):
        raise TypeError(f"`mechanism` must be a value like linattn.Linear(), got {mechanism!r}.")
    _checks.backend_name(backend)
    if backend == "cupy" and isinstance(q, Tensor) and not _torch_cuda.is_cuda(q):
        raise _checks.backend_lacks(backend, f"operator for tensors on {q.device.type}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"`{name}` must be a torch Tensor, got {type(x).__name__}.")
        if x.is_nested or x.layout is not torch.strided:
            raise TypeError(f"`{name}` must be a dense tensor, got a nested or sparse one: use `cu_seqlens` to pack.")
    _one_device(q=q, k=k, v=v)
    if not (q.dtype is k.dtype is v.dtype and q.dtype in FLOATS and q.ndim >= 2 and k.ndim >= 2 and v.ndim >= 2):
        _checks.queries_keys_values(q, k, v)
    if q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        _checks.queries_keys_values(q, k, v)
    lead = q.shape[:-2]
    if lead == k.shape[:-2] == v.shape[:-2]:
        return lead
    return _checks.leading(q=tuple(lead), k=tuple(k.shape[:-2]), v=tuple(v.shape[:-2]))


def _one_device(**tensors: Tensor) -> None:
    first, *others = tensors.values()
    if any(x.device != first.device for x in others):
        came = ", ".join(f"{name} on {x.device}" for name, x in tensors.items())
        raise RuntimeError(f"{', '.join(tensors)} must be on one device, got {came}.")


def _edges(cu_seqlens: Any, q: Tensor, k: Tensor) -> Tensor | None:
    """As a tensor that the operator reads when it runs."""
    if cu_seqlens is None:
        return None
    if not isinstance(cu_seqlens, Tensor):
        _checks.segments(cu_seqlens, q.shape[-2], k.shape[-2])
        return torch.tensor([int(x) for x in cu_seqlens], dtype=torch.int64)
    if cu_seqlens.is_floating_point() or cu_seqlens.is_complex() or cu_seqlens.dtype is torch.bool:
        raise TypeError(f"`cu_seqlens` must hold integers, got dtype {_arrays.dtype_name(cu_seqlens)}.")
    if q.shape[-2] != k.shape[-2]:
        _checks.segments([0], q.shape[-2], k.shape[-2])
    return cu_seqlens.to("cpu")
