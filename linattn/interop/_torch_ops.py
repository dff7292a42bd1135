"""The engines as torch operators: a pair each, `linattn::linear` and `linattn::softmax` with their backwards.

An operator takes tensors, numbers and strings alone, so that `torch.compile` and `torch.export` keep it as one
node. Each has four registrations: the kernel on NumPy views of the tensors' memory, the fake that says shapes, the
derivative, and the rule by which `torch.vmap` puts a batch axis in front. Results never alias an argument.

The value of a linear state is `sums` + `rest`: its cotangent travels with `sums` alone.
"""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from linattn import _arrays
from linattn.interop import _kernels
from linattn.interop._kernels import LinearOptions, SoftmaxOptions

LIBRARY = torch.library.Library("linattn", "DEF")
OPTIONS = "str feature_map, bool causal, bool normalize, str eps_rule, float eps"
PAIRS = "Tensor? turn_q, Tensor? turn_k, Tensor? key_mask, Tensor? cu_seqlens"
STATE = "Tensor? sums, Tensor? rest"

LIBRARY.define(f"linear(Tensor q, Tensor k, Tensor v, {STATE}, {PAIRS}, {OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)")
LIBRARY.define(
    f"linear_backward(Tensor d_out, Tensor? d_sums, Tensor q, Tensor k, Tensor v, Tensor den, {STATE}, {PAIRS}, "
    f"{OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "softmax(Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? cu_seqlens, float scale, bool causal, "
    "SymInt offset) -> Tensor"
)
LIBRARY.define(
    "softmax_backward(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? cu_seqlens, float scale, "
    "bool causal, SymInt offset) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "turns(Tensor like, SymInt n_queries, SymInt n_keys, SymInt first, int length, str align, Tensor? position_q, "
    "Tensor? position_k, Tensor? cu_seqlens) -> (Tensor, Tensor)"
)
OPS = torch.ops.linattn

# -- tensors and NumPy's views of them ----------------------------------------------------------------------------


def view(x: Tensor | None) -> Any:
    """The tensor's memory as a NumPy array; bfloat16, which torch does not hand over, goes as its bits. None: None."""
    if x is None:
        return None
    if x.requires_grad:
        x = x.detach()
    if x.dtype is torch.bfloat16:
        import ml_dtypes

        return x.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return x.numpy()


def tensor(x: np.ndarray) -> Tensor:
    """A fresh array's memory as a tensor."""
    if not x.flags.c_contiguous:
        x = np.ascontiguousarray(x)
    if _arrays.dtype_name(x) == "bfloat16":
        return torch.from_numpy(x.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def _pair(a: Tensor | None, b: Tensor | None) -> tuple[np.ndarray, np.ndarray] | None:
    return None if a is None or b is None else (view(a), view(b))


def fresh(x: Any, *given: Tensor | None) -> Tensor:
    """As a tensor of its own memory, which no argument shares: a state that saw no token may be the one given."""
    shared = any(y is not None and np.may_share_memory(x, view(y)) for y in given)
    return tensor(x.copy() if shared else x)


def accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


# -- kernels ------------------------------------------------------------------------------------------------------


def _linear(q, k, v, sums, rest, turn_q, turn_k, key_mask, cu_seqlens, *options):
    out, den, after = _kernels.linear_forward(
        view(q), view(k), view(v), _pair(sums, rest), _pair(turn_q, turn_k), view(key_mask), view(cu_seqlens),
        LinearOptions(*options),
    )  # fmt: skip
    none = torch.empty(0, dtype=accumulator(q))
    den = none if den is None else tensor(den)
    if sums is None:
        return tensor(out), den, torch.empty_like(none), torch.empty_like(none)
    return tensor(out), den, fresh(after.sums, sums, rest), fresh(after.rest, sums, rest)


def _linear_backward(
    d_out, d_sums, q, k, v, den, sums, rest, turn_q, turn_k, key_mask, cu_seqlens, *options
):  # fmt: skip
    options = LinearOptions(*options)
    d_q, d_k, d_v, d_before = _kernels.linear_backward(
        view(d_out), view(d_sums), view(q), view(k), view(v), view(den) if options.normalize else None,
        _pair(sums, rest), _pair(turn_q, turn_k), view(key_mask), view(cu_seqlens), options,
    )  # fmt: skip
    d_sums_before = torch.empty(0, dtype=accumulator(q)) if sums is None else fresh(d_before, d_sums)
    return tensor(d_q), tensor(d_k), tensor(d_v), d_sums_before


def _softmax(q, k, v, key_mask, cu_seqlens, scale, causal, offset):
    options = SoftmaxOptions(scale, causal, offset)
    return tensor(_kernels.softmax_forward(view(q), view(k), view(v), view(key_mask), view(cu_seqlens), options))


def _softmax_backward(d_out, q, k, v, key_mask, cu_seqlens, scale, causal, offset):
    options = SoftmaxOptions(scale, causal, offset)
    grads = _kernels.softmax_backward(view(d_out), view(q), view(k), view(v), view(key_mask), view(cu_seqlens), options)
    return tuple(tensor(x) for x in grads)


def _turns(like, n_queries, n_keys, first, length, align, position_q, position_k, cu_seqlens):
    tables = _kernels.turns(
        view(like), n_queries, n_keys, first, length, align, _pair(position_q, position_k),
        view(cu_seqlens),
    )  # fmt: skip
    return tuple(tensor(x.copy()) for x in tables)  # q's and k's may be one table


# -- fakes: shapes and dtypes -------------------------------------------------------------------------------------


def _lead(inner: int, *tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple(torch.broadcast_shapes(*(x.shape[: x.ndim - inner] for x in tensors if x is not None)))


def _linear_fake(q, k, v, sums, rest, turn_q, turn_k, key_mask, cu_seqlens, *options):
    lead = torch.broadcast_shapes(_lead(2, q, k, v, turn_q, turn_k), _lead(1, key_mask) if key_mask is not None else ())
    dtype, normalize = accumulator(q), LinearOptions(*options).normalize
    out = q.new_empty((*lead, q.shape[-2], v.shape[-1]))
    den = q.new_empty((*lead, q.shape[-2]) if normalize else (0,), dtype=dtype)
    after = (0,) if sums is None else sums.shape
    return out, den, q.new_empty(after, dtype=dtype), q.new_empty(after, dtype=dtype)


def _linear_backward_fake(d_out, d_sums, q, k, v, den, sums, rest, *others):
    after = (0,) if sums is None else sums.shape
    return *(x.new_empty(x.shape) for x in (q, k, v)), q.new_empty(after, dtype=accumulator(q))


def _softmax_fake(q, k, v, key_mask, *others):
    lead = torch.broadcast_shapes(_lead(2, q, k, v), _lead(1, key_mask) if key_mask is not None else ())
    return q.new_empty((*lead, q.shape[-2], v.shape[-1]))


def _softmax_backward_fake(d_out, q, k, v, *others):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _turns_fake(like, n_queries, n_keys, first, length, align, position_q, position_k, cu_seqlens):
    given = (position_q, position_k)
    sizes = (n_queries, n_keys)
    shapes = [(n,) if p is None else p.shape for n, p in zip(sizes, given, strict=True)]
    return tuple(like.new_empty((*shape, 2), dtype=accumulator(like)) for shape in shapes)


# -- derivatives --------------------------------------------------------------------------------------------------


class _Linear(torch.autograd.Function):
    """`linear` with its derivative: what is kept is the arguments and one number a token."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        q, k, v, sums, rest, turn_q, turn_k, key_mask, cu_seqlens, *ctx.options = args
        results = below(OPS.linear.default, args)
        _, den, after, rest_after = results
        ctx.save_for_backward(q, k, v, den, sums, rest, turn_q, turn_k, key_mask, cu_seqlens)
        ctx.mark_non_differentiable(den, rest_after, *([] if sums is not None else [after]))
        return results

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, _: Any, d_after: Tensor | None, __: Any) -> tuple[Tensor | None, ...]:
        q, k, v, den, sums, *others = ctx.saved_tensors
        d_after = d_after if sums is not None else None
        d_q, d_k, d_v, d_sums = OPS.linear_backward.default(d_out, d_after, q, k, v, den, sums, *others, *ctx.options)
        return d_q, d_k, d_v, d_sums if sums is not None else None, *[None] * 10


class _Softmax(torch.autograd.Function):
    """`softmax` with its derivative: the arguments alone are kept."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        *tensors, ctx.scale, ctx.causal, ctx.offset = args
        ctx.save_for_backward(*tensors)
        return below(OPS.softmax.default, args)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        grads = OPS.softmax_backward.default(d_out, *ctx.saved_tensors, ctx.scale, ctx.causal, ctx.offset)
        return *grads, *[None] * 5


SECOND_ORDER = (
    "linattn's compiled kernels have first derivatives in reverse mode alone: for a second one, or torch.func.grad, "
    'call with backend="reference".'
)


class NoDerivative(torch.autograd.Function):
    """Of an operator that is a derivative itself."""

    @staticmethod
    def forward(ctx: Any, run: Any, *args: Any) -> Any:
        return run(*args)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:
        raise RuntimeError(SECOND_ORDER)


def below_autograd() -> Any:
    """Inside, an operator's call goes on to its kernel, its fake or its rule for vmap."""
    return torch._C._AutoDispatchBelowAutograd()


DERIVATIVES: dict[Any, Any] = {}  # of each operator, its autograd function
KERNELS: dict[Any, Any] = {}  # of each operator, its kernel on the CPU
OWN = (Tensor, torch.nn.Parameter)  # tensors that are no subclass with a dispatch of its own


def is_undisturbed() -> bool:
    """Whether the dispatcher would go straight to the kernel: no transform, mode, trace or profiler listens."""
    return not (
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state()
        or torch._C._autograd._profiler_enabled()
    )


def below(operator: Any, args: tuple[Any, ...]) -> Any:
    """The operator without its derivative: its kernel at once where the dispatcher would only look it up."""
    if is_undisturbed() and all(type(x) in OWN and x.is_cpu for x in args if isinstance(x, Tensor)):
        return KERNELS[operator](*args)
    with below_autograd():
        return operator(*args)


def directly(operator: Any, args: tuple[Any, ...]) -> Any:
    """What the dispatcher would do for plain tensors, without its first round: it costs as much as a small kernel."""
    if torch.is_grad_enabled():
        for x in args:
            if isinstance(x, Tensor) and x.requires_grad:
                return DERIVATIVES[operator].apply(*args)
    return below(operator, args)


def register(name: str, kernel: Any, fake: Any, rule: Any, derivative: Any) -> None:
    """The operator's registrations. `derivative`: an autograd function of its arguments, or None if it has none."""
    operator = getattr(OPS, name).default
    DERIVATIVES[operator], KERNELS[operator] = derivative, kernel

    def plain(*args: Any) -> Any:
        with below_autograd():
            return operator(*args)

    def differentiable(*args: Any) -> Any:  # asked before each call: a plain loop, and no machinery where none is due
        if torch.is_grad_enabled():
            for x in args:
                if isinstance(x, Tensor) and x.requires_grad:
                    return NoDerivative.apply(plain, *args) if derivative is None else derivative.apply(*args)
        return plain(*args)

    LIBRARY.impl(name, kernel, "CPU")
    LIBRARY.impl(name, differentiable, "Autograd")
    torch.library.register_fake(f"linattn::{name}", fake, lib=LIBRARY)
    torch.library.register_vmap(f"linattn::{name}", rule, lib=LIBRARY)


# -- a batch axis in front ------------------------------------------------------------------------------------------

# axes behind the leading ones, argument by argument; None: not a tensor with leading axes
LINEAR_AXES = (2, 2, 2, 3, 3, 2, 2, 1)
BACKWARD_AXES = (2, 3, 2, 2, 2, 1, 3, 3, 2, 2, 1)


def _batched(
    args: tuple[Any, ...], dims: tuple[Any, ...], axes: tuple[int | None, ...], size: int, expand: frozenset[int]
) -> list[Any]:
    """The arguments with the batch in front of equally many leading axes; those of `expand` always have it."""
    if any(d is not None for d in dims[len(axes) :]):
        raise RuntimeError("`cu_seqlens` decides shapes, it cannot be mapped by vmap: hand it on unmapped.")
    given = [i for i, n in enumerate(axes) if n is not None and isinstance(args[i], Tensor)]
    rank = max(args[i].ndim - (dims[i] is not None) - axes[i] for i in given)
    moved = list(args)
    for i in given:
        x = args[i] if dims[i] is None else args[i].movedim(dims[i], 0)
        if dims[i] is None and i not in expand:
            continue
        if dims[i] is None:
            x = x.expand(size, *x.shape)
        missing = rank - (x.ndim - 1 - axes[i])
        moved[i] = x.reshape(size, *(1,) * missing, *x.shape[1:])
    return moved


def _like(x: Tensor, args: Any, dims: Any, i: int, size: int) -> Tensor:
    """A result shaped like the i-th argument, without the axes that were put in."""
    shape = list(args[i].shape)
    if dims[i] is not None:
        del shape[dims[i]]
    return x.reshape(size, *shape)


def _linear_vmap(info: Any, dims: Any, *args: Any) -> Any:
    streaming = args[3] is not None
    everything = frozenset(range(5)) if streaming else frozenset((0,))
    moved = _batched(args, dims, LINEAR_AXES, info.batch_size, everything)
    out, den, sums, rest = OPS.linear.default(*moved)
    den_dim = 0 if args[11] else None  # `normalize`; there is no den without
    if not streaming:
        return (out, den, sums, rest), (0, den_dim, None, None)
    states = (_like(x, args, dims, 3, info.batch_size) for x in (sums, rest))
    return (out, den, *states), (0, den_dim, 0, 0)


def _linear_backward_vmap(info: Any, dims: Any, *args: Any) -> Any:
    size = info.batch_size
    moved = _batched(
        args, dims, BACKWARD_AXES, size, frozenset(range(8)) if args[6] is not None else frozenset((0, 2, 3, 4, 5))
    )
    if not args[14]:  # no den to spread
        moved[5] = args[5] if dims[5] is None else args[5].movedim(dims[5], 0)[0]
    d_q, d_k, d_v, d_sums = OPS.linear_backward.default(*moved)
    grads = (_like(x, args, dims, i, size) for i, x in ((2, d_q), (3, d_k), (4, d_v)))
    if args[6] is None:
        return (*grads, d_sums), (0, 0, 0, None)
    return (*grads, _like(d_sums, args, dims, 6, size)), (0, 0, 0, 0)


def _softmax_vmap(info: Any, dims: Any, *args: Any) -> Any:
    moved = _batched(args, dims, (2, 2, 2, 1), info.batch_size, frozenset((0,)))
    return OPS.softmax.default(*moved), 0


def _softmax_backward_vmap(info: Any, dims: Any, *args: Any) -> Any:
    size = info.batch_size
    moved = _batched(args, dims, (2, 2, 2, 2, 1), size, frozenset(range(4)))
    grads = OPS.softmax_backward.default(*moved)
    return tuple(_like(x, args, dims, i, size) for i, x in zip((1, 2, 3), grads, strict=True)), (0, 0, 0)


def _turns_vmap(info: Any, dims: Any, *args: Any) -> Any:
    axes = (None,) * 6 + (1, 1)
    moved = _batched(args, dims, axes, info.batch_size, frozenset((6, 7)))
    return OPS.turns.default(*moved), (0, 0)


register("linear", _linear, _linear_fake, _linear_vmap, _Linear)
register("linear_backward", _linear_backward, _linear_backward_fake, _linear_backward_vmap, None)
register("softmax", _softmax, _softmax_fake, _softmax_vmap, _Softmax)
register("softmax_backward", _softmax_backward, _softmax_backward_fake, _softmax_backward_vmap, None)
register("turns", _turns, _turns_fake, _turns_vmap, None)

__all__ = [
    "LIBRARY", "OPS", "OWN", "SECOND_ORDER",
    "accumulator", "below", "directly", "fresh", "is_undisturbed", "register", "tensor", "view",
]  # fmt: skip
