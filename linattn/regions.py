"""The parts of Combiner one by one, for summaries of regions that are learned or otherwise your own.

A region r of a `Plan` is summarised by a query rho_r and a key kappa_r, and stands for the values u_r of its members:

    pool      rho = pool(q), kappa = pool(k)                                    (..., N, D) -> (..., R, D)
    local     u_r = sum_s Pi[r, s] v_s, Pi[r, .] = softmax of scale rho_r . k_s over the members s of r
    attend    out_t: one softmax over the keys that t meets and the regions it uses, of values v and u
    combine   `local`, then `attend`

Each has a VJP beside it. With summaries of your own call `combine_vjp` with any rho and kappa. Where kappa is made from
u, call `local_vjp`, make kappa, and call `attend_vjp`: the cotangent of u is the sum of what both ways give.

Options, keyword-only, are those of `Combiner`: `scale`, `size_bias`, `key_mask` and `backend`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from linattn import _arrays, _checks, backends
from linattn._arrays import Array
from linattn.engines import combiner as engine
from linattn.plans.plan import Plan

__all__ = [
    "attend",
    "attend_vjp",
    "combine",
    "combine_vjp",
    "local",
    "local_vjp",
    "pool",
    "pool_vjp",
]

POOLS = ("max", "mean")


def pool(
    x: Array, plan: Plan, *, pool: str = "max", key_mask: Array | None = None, backend: str | None = None
) -> Array:
    """Each region's summary of x (..., N, D): the maximum or the mean of its visible members, or its representative.

    Examples
    --------
    >>> import numpy as np
    >>> import linattn as la
    >>> plan = la.Plan.pattern("fixed", 6, size=2, causal=True)
    >>> la.regions.pool(np.arange(6.0)[:, None], plan, pool="mean").ravel()
    array([0.5, 2.5])
    """
    return pool_vjp(x, plan, pool=pool, key_mask=key_mask, backend=backend)[0]


def pool_vjp(
    x: Array, plan: Plan, *, pool: str = "max", key_mask: Array | None = None, backend: str | None = None
) -> tuple[Array, Callable[[Array], Array]]:
    """`pool` and ``backward(d_pooled) -> d_x``. Of equal maxima the lowest index takes all."""
    _checks.choice("pool", pool, POOLS)
    call = _Call(plan, {"x": x}, {}, pool, None, False, key_mask, backend)
    (wide,) = call.wide
    with _arrays.quiet(x):
        y = call.regions.pool(wide)

    def backward(d_pooled: Array) -> Array:
        with _arrays.quiet(x):
            return call.narrow(call.regions.pool_vjp(call.cotangent("d_pooled", d_pooled, "pooled", y), wide))

    return call.narrow(y), backward


def local(
    rho: Array, k: Array, v: Array, plan: Plan,
    *, scale: float | None = None, key_mask: Array | None = None, backend: str | None = None,
) -> Array:  # fmt: skip
    """The regions' values u (..., R, E): the members' values, weighed by the softmax of scale rho_r . k_s."""
    return local_vjp(rho, k, v, plan, scale=scale, key_mask=key_mask, backend=backend)[0]


def local_vjp(
    rho: Array, k: Array, v: Array, plan: Plan,
    *, scale: float | None = None, key_mask: Array | None = None, backend: str | None = None,
) -> tuple[Array, Callable[[Array], tuple[Array, Array, Array]]]:  # fmt: skip
    """`local` and ``backward(d_u) -> d_rho, d_k, d_v``."""
    call = _Call(plan, {"k": k, "v": v}, {"rho": (rho, "k")}, "max", scale, False, key_mask, backend)
    wide_k, wide_v, wide_rho = call.wide
    with _arrays.quiet(k):
        u = call.regions.local(wide_rho, wide_k, wide_v)

    def backward(d_u: Array) -> tuple[Array, Array, Array]:
        with _arrays.quiet(k):
            given = call.cotangent("d_u", d_u, "u", u), wide_rho, wide_k, call.centred(wide_v)
            d_rho, d_k, d_v = call.regions.local_vjp(*given)
            return call.narrow(d_rho), call.narrow(d_k), call.narrow(d_v, v)

    return call.narrow(u), backward


def attend(
    q: Array, k: Array, v: Array, kappa: Array, u: Array, plan: Plan,
    *, scale: float | None = None, size_bias: bool = False, key_mask: Array | None = None, backend: str | None = None,
) -> Array:  # fmt: skip
    """out (..., N, E): one softmax over the keys that a query meets and the regions that it uses."""
    given: dict[str, Any] = {"scale": scale, "size_bias": size_bias, "key_mask": key_mask, "backend": backend}
    return attend_vjp(q, k, v, kappa, u, plan, **given)[0]


def attend_vjp(
    q: Array, k: Array, v: Array, kappa: Array, u: Array, plan: Plan,
    *, scale: float | None = None, size_bias: bool = False, key_mask: Array | None = None, backend: str | None = None,
) -> tuple[Array, Callable[[Array], tuple[Array, Array, Array, Array, Array]]]:  # fmt: skip
    """`attend` and ``backward(d_out) -> d_q, d_k, d_v, d_kappa, d_u``."""
    of_regions = {"kappa": (kappa, "k"), "u": (u, "v")}
    call = _Call(plan, {"q": q, "k": k, "v": v}, of_regions, "max", scale, size_bias, key_mask, backend)
    wide_q, wide_k, wide_v, wide_kappa, wide_u = call.wide
    with _arrays.quiet(q):
        y = call.regions.attend(wide_q, wide_k, wide_v, wide_kappa, wide_u, None)

    def backward(d_out: Array) -> tuple[Array, Array, Array, Array, Array]:
        with _arrays.quiet(q):
            g = call.cotangent("d_out", d_out, "out", y)
            moved, offset = call.centred(wide_v), call.offset(wide_v)
            grads = call.regions.attend_vjp(g, wide_q, wide_k, moved, wide_kappa, wide_u - offset)
            d_q, d_k, d_v, d_kappa, d_u = map(call.narrow, grads, (q, k, v, kappa, u))
            return d_q, d_k, d_v, d_kappa, d_u

    return call.narrow(y), backward


def combine(
    q: Array, k: Array, v: Array, rho: Array, kappa: Array, plan: Plan,
    *, scale: float | None = None, size_bias: bool = False, key_mask: Array | None = None, backend: str | None = None,
) -> Array:  # fmt: skip
    """out (..., N, E) from the regions' queries rho and keys kappa, both (..., R, D).

    Examples
    --------
    >>> import numpy as np
    >>> import linattn as la
    >>> q, k, v = np.random.default_rng(0).normal(size=(3, 6, 4))
    >>> plan = la.Plan.pattern("fixed", 6, size=2, causal=True)
    >>> rho, kappa = la.regions.pool(q, plan), la.regions.pool(k, plan)
    >>> out = la.regions.combine(q, k, v, rho, kappa, plan)
    >>> bool(np.allclose(out, la.Combiner(span=2)(q, k, v, causal=True), rtol=1e-13))
    True
    """
    given: dict[str, Any] = {"scale": scale, "size_bias": size_bias, "key_mask": key_mask, "backend": backend}
    return combine_vjp(q, k, v, rho, kappa, plan, **given)[0]


def combine_vjp(
    q: Array, k: Array, v: Array, rho: Array, kappa: Array, plan: Plan,
    *, scale: float | None = None, size_bias: bool = False, key_mask: Array | None = None, backend: str | None = None,
) -> tuple[Array, Callable[[Array], tuple[Array, Array, Array, Array, Array]]]:  # fmt: skip
    """`combine` and ``backward(d_out) -> d_q, d_k, d_v, d_rho, d_kappa``."""
    of_regions = {"rho": (rho, "q"), "kappa": (kappa, "k")}
    call = _Call(plan, {"q": q, "k": k, "v": v}, of_regions, "max", scale, size_bias, key_mask, backend)
    with _arrays.quiet(q):
        y = engine.combine(call.regions, *call.wide)

    def backward(d_out: Array) -> tuple[Array, Array, Array, Array, Array]:
        with _arrays.quiet(q):
            grads = engine.combine_vjp(call.regions, call.cotangent("d_out", d_out, "out", y), *call.wide)
            d_q, d_k, d_v, d_rho, d_kappa = map(call.narrow, grads, (q, k, v, rho, kappa))
            return d_q, d_k, d_v, d_rho, d_kappa

    return call.narrow(y), backward


class _Call:
    """One call's arguments, checked and widened, and its regions."""

    def __init__(
        self, plan: Any, of_tokens: dict[str, Any], of_regions: dict[str, tuple[Any, str]],
        pool: str, scale: Any, size_bias: Any, key_mask: Any, backend: Any,
    ) -> None:  # fmt: skip
        if not isinstance(plan, Plan):
            raise TypeError(f"`plan` must be a Plan, got {type(plan).__name__}.")
        arrays = of_tokens | {name: x for name, (x, _) in of_regions.items()}
        self.xp = _checks.alike(**arrays)
        _checks.axes(**arrays)
        for name, x in of_tokens.items():
            _checks.tokens(name, x, "plan.n", plan.n)
        for name, (x, like) in of_regions.items():
            width = of_tokens.get(like, of_tokens["k"]).shape[-1]
            _checks.summaries(name, x, plan.n_regions, width)
        if "q" in of_tokens:
            _checks.queries_keys(of_tokens["q"], of_tokens["k"])
        lead = _checks.leading(**{name: tuple(x.shape[:-2]) for name, x in arrays.items()})
        first = next(iter(of_tokens.values()))
        if key_mask is not None:
            _checks.key_mask(key_mask, first, lead)
        _checks.flag("size_bias", size_bias)
        if scale is not None:
            _checks.positive_real("scale", scale)
        self.like = first
        dtype = _arrays.accumulator(first, self.xp)
        self.wide = [_arrays.row_major(_arrays.cast(_arrays.plain(x), dtype, self.xp)) for x in arrays.values()]
        n_channels = of_tokens.get("k", first).shape[-1]
        scale = float(scale) if scale is not None else max(n_channels, 1) ** -0.5
        options = engine.Options(pool, bool(size_bias), "self", scale, key_mask)
        room = backends.resolve(backend, first, "combiner")
        with _arrays.quiet(first):
            self.regions = engine.of_plan(plan, options, room, self.wide[0], self.xp)

    def narrow(self, x: Array, like: Array | None = None) -> Array:
        """In the dtype of the arguments, and as a cotangent in the shape of its primal."""
        if like is not None:
            x = _arrays.unbroadcast(x, tuple(like.shape), self.xp)
        return _arrays.cast(x, self.like.dtype, self.xp)

    def cotangent(self, name: str, d_x: Array, of: str, y: Array) -> Array:
        _checks.cotangent(name, d_x, of, tuple(y.shape), self.like)
        return _arrays.row_major(_arrays.cast(_arrays.plain(d_x), y.dtype, self.xp))

    def centred(self, v: Array) -> Array:
        return engine.centred(v, self.regions.options.key_mask, self.xp)

    def offset(self, v: Array) -> Array:
        return engine.offset(v, self.regions.options.key_mask, self.xp)
