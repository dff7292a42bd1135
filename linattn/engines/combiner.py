"""The combiner engine: softmax attention that reaches far keys through regions.

    rho_r, kappa_r = pool of the queries, of the keys, of region r           `pool`
    u_r   = sum_s Pi[r, s] v_s,   Pi[r, .] = softmax of scale rho_r . k_s    `local`
    out_t = sum_s P[t, s] v_s + sum_r P[t, r] u_r                            `attend`
            P[t, .] = one softmax of [scale q_t . k_s ; scale q_t . kappa_r + b_r]

Each line is a map of its own with its VJP, so that rho and kappa may come from elsewhere, and kappa from u. The
backward runs them last line first; it recomputes P and Pi, and keeps q, k and v alone.

Values are centred in the backward: rows of P and Pi sum to 1, so any offset of v cancels in every d_s.
The form is that of Ren et al., "Combiner", NeurIPS 2021, arXiv:2107.05768, eqs. 3-10.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

from linattn import _arrays
from linattn._arrays import Array
from linattn.backends.reference import combiner as reference
from linattn.backends.reference.linear import visible_mean
from linattn.plans.mixing import Mixing
from linattn.plans.plan import Plan


class Options(NamedTuple):
    """How a plan is run; handed down unchanged from forward to backward."""

    pool: str
    size_bias: bool
    row_key: str
    scale: float
    key_mask: Array | None


class Regions:
    """Regions on one call's arrays: the three maps and their VJPs. Arrays are in the accumulation dtype.

    `local`: regions over their members; `main`: queries over tokens and regions, where there are queries.
    """

    def __init__(
        self, local: Mixing, main: Mixing | None, options: Options, room: ModuleType, like: Array, xp: Any,
        *, has_rep: bool = False, may_be_empty: bool = False,
    ) -> None:  # fmt: skip
        self.local_mixing, self.main_mixing = local, main
        self.options, self.room, self.xp = options, room, xp
        self.kind = "rep" if has_rep else options.pool
        self.alive = self.bias = None  # of each region: whether it has a visible member, and b_r
        if local.n_queries and (options.key_mask is not None or options.size_bias or may_be_empty):
            sizes = reference.sizes(options.key_mask, like, mixing=local, xp=xp)
            self.alive = sizes > 0
            if options.size_bias:
                self.bias = xp.log(xp.where(self.alive, sizes, xp.ones_like(sizes)))

    def pool(self, x: Array) -> Array:
        """(..., R, D) from (..., N, D)."""
        mask = self.options.key_mask
        return self.room.pool(x, mask, mixing=self.local_mixing, kind=self.kind, xp=self.xp)

    def pool_vjp(self, d_pooled: Array, x: Array) -> Array:
        mask = self.options.key_mask
        return self.room.pool_vjp(d_pooled, x, mask, mixing=self.local_mixing, kind=self.kind, xp=self.xp)

    def local(self, rho: Array, k: Array, v: Array) -> Array:
        """u (..., R, E)."""
        given = {"mixing": self.local_mixing, "scale": self.options.scale, "xp": self.xp}
        return self.room.forward(rho, [(k, v, self.options.key_mask, None)], **given, out=None)

    def local_vjp(self, d_u: Array, rho: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
        """d_rho, d_k, d_v."""
        given = {"mixing": self.local_mixing, "scale": self.options.scale, "xp": self.xp}
        d_rho, [(d_k, d_v)] = self.room.backward(d_u, rho, [(k, v, self.options.key_mask, None)], **given)
        return d_rho, d_k, d_v

    def attend(self, q: Array, k: Array, v: Array, kappa: Array, u: Array, out: Array | None) -> Array:
        given = {"mixing": self.main_mixing, "scale": self.options.scale, "xp": self.xp}
        return self.room.forward(q, self._sources(k, v, kappa, u), **given, out=out)

    def attend_vjp(self, d_out: Array, q: Array, k: Array, v: Array, kappa: Array, u: Array) -> tuple[Array, ...]:
        """d_q, d_k, d_v, d_kappa, d_u."""
        given = {"mixing": self.main_mixing, "scale": self.options.scale, "xp": self.xp}
        d_q, [d_tokens, d_regions] = self.room.backward(d_out, q, self._sources(k, v, kappa, u), **given)
        return d_q, *d_tokens, *d_regions

    def _sources(self, k: Array, v: Array, kappa: Array, u: Array) -> list[tuple[Any, ...]]:
        return [(k, v, self.options.key_mask, None), (kappa, u, self.alive, self.bias)]


def of_plan(plan: Plan, options: Options, room: ModuleType, like: Array, xp: Any) -> Regions:
    """The regions of a plan on arrays like `like`."""
    flags = {"has_rep": plan.has_rep, "may_be_empty": plan.has_empty}
    return Regions(plan.local, plan.main, options, room, like, xp, **flags)


# -- the maps put together ------------------------------------------------------------------------------------------


def combine(
    regions: Regions, q: Array, k: Array, v: Array, rho: Array, kappa: Array | None, out: Array | None = None
) -> Array:
    """out (..., N, E) from summaries that are given; kappa None: the sum of the keys that Pi weighs."""
    kappa, u = weighed(regions, rho, k, v, kappa)
    return regions.attend(q, k, v, kappa, u, out)


def combine_vjp(
    regions: Regions, d_out: Array, q: Array, k: Array, v: Array, rho: Array, kappa: Array | None
) -> tuple[Array, Array, Array, Array, Array | None]:
    """d_q, d_k, d_v, d_rho, d_kappa (None where kappa is)."""
    given = kappa is not None
    vc = centred(v, regions.options.key_mask, regions.xp)
    kappa, u = weighed(regions, rho, k, vc, kappa)
    # out = P [v ; u]
    d_q, d_k, d_v, d_kappa, d_u = regions.attend_vjp(d_out, q, k, vc, kappa, u)
    d_rho, d_k_local, d_v_local = weighed_vjp(regions, d_u, d_kappa, rho, k, vc, given)
    d_v = _arrays.unbroadcast(d_v + d_v_local, tuple(v.shape), regions.xp)  # vc has the mask's axes as well
    return d_q, d_k + d_k_local, d_v, d_rho, d_kappa if given else None


def weighed(regions: Regions, rho: Array, k: Array, v: Array, kappa: Array | None) -> tuple[Array, Array]:
    """kappa and u; without a kappa [u, kappa] = Pi [v, k]."""
    if kappa is not None:
        return kappa, regions.local(rho, k, v)
    both = regions.local(rho, k, _beside(v, k, regions.xp))
    return both[..., v.shape[-1] :], both[..., : v.shape[-1]]


def weighed_vjp(
    regions: Regions, d_u: Array, d_kappa: Array, rho: Array, k: Array, v: Array, given: bool
) -> tuple[Array, Array, Array]:
    """d_rho, d_k, d_v; `given`: kappa was, and its cotangent goes elsewhere."""
    if given:
        return regions.local_vjp(d_u, rho, k, v)
    xp, width = regions.xp, v.shape[-1]
    d_rho, d_k, d_both = regions.local_vjp(_beside(d_u, d_kappa, xp), rho, k, _beside(v, k, xp))
    d_v, d_k_more = (
        _arrays.unbroadcast(d, tuple(x.shape), xp) for d, x in ((d_both[..., :width], v), (d_both[..., width:], k))
    )
    return d_rho, d_k + d_k_more, d_v


def summaries(regions: Regions, q: Array, k: Array) -> tuple[Array, Array | None]:
    """rho and kappa, pooled; kappa None where Pi makes it."""
    return regions.pool(q), None if makes_kappa(regions) else regions.pool(k)


def makes_kappa(regions: Regions) -> bool:
    return regions.kind == "rep" and regions.options.row_key == "wsum"


def offset(v: Array, key_mask: Array | None, xp: Any) -> Array:
    """What the backward takes off all values, (..., 1, E): any finite number would do."""
    return visible_mean(v, key_mask, xp)


def centred(v: Array, key_mask: Array | None, xp: Any) -> Array:
    return v - offset(v, key_mask, xp)


def _beside(x: Array, y: Array, xp: Any) -> Array:
    lead = _arrays.broadcast_shapes(tuple(x.shape[:-2]), tuple(y.shape[:-2]))
    return xp.concat([xp.broadcast_to(a, (*lead, *a.shape[-2:])) for a in (x, y)], axis=-1)


def forward(
    q: Array, k: Array, v: Array, plans: tuple[Plan, ...], options: Options,
    *, room: ModuleType, out: Array | None, xp: Any,
) -> Array:  # fmt: skip
    """out (..., N, E): the mean over the plans, each with a softmax of its own."""
    wide = widened(q, k, v, xp)
    direct = out if len(plans) == 1 and wide[0].dtype == q.dtype else None
    total: Any = None
    for plan in plans:
        regions = of_plan(plan, options, room, wide[0], xp)
        y = combine(regions, *wide, *summaries(regions, *wide[:2]), out=direct)
        total = y if total is None else total + y
    if total is direct and out is not None:
        return out
    return _arrays.fill(out, _arrays.cast(total / len(plans) if len(plans) > 1 else total, q.dtype, xp))


def backward(
    d_out: Array, q: Array, k: Array, v: Array, plans: tuple[Plan, ...], options: Options,
    *, room: ModuleType, out: Any, xp: Any,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """d_q, d_k, d_v."""
    wide = widened(q, k, v, xp)
    g = _arrays.row_major(_arrays.cast(d_out, wide[0].dtype, xp))
    if len(plans) > 1:
        g = g / len(plans)
    total: list[Array] | None = None
    for plan in plans:
        regions = of_plan(plan, options, room, wide[0], xp)
        rho, kappa = summaries(regions, *wide[:2])
        d_q, d_k, d_v, d_rho, d_kappa = combine_vjp(regions, g, *wide, rho, kappa)
        # rho, kappa = pool(q), pool(k)
        d_q = d_q + regions.pool_vjp(d_rho, wide[0])
        if d_kappa is not None:
            d_k = d_k + regions.pool_vjp(d_kappa, wide[1])
        grads = [d_q, d_k, d_v]
        total = grads if total is None else [a + b for a, b in zip(total, grads, strict=True)]
    assert total is not None
    d_q, d_k, d_v = (
        _arrays.fill(o, _arrays.cast(d_x, x.dtype, xp))
        for o, d_x, x in zip(out or (None, None, None), total, (q, k, v), strict=True)
    )
    return d_q, d_k, d_v


def weights(q: Array, k: Array, plans: tuple[Plan, ...], options: Options, xp: Any) -> Array:
    """A (..., N, N): out is linear in v, so its matrix is what it makes of the identity."""
    one = xp.eye(k.shape[-2], dtype=k.dtype, device=_arrays.device(k))
    return forward(q, k, one, plans, options, room=reference, out=None, xp=xp)


def widened(q: Array, k: Array, v: Array, xp: Any) -> tuple[Array, Array, Array]:
    dtype = _arrays.accumulator(q, xp)
    q, k, v = (_arrays.row_major(_arrays.cast(x, dtype, xp)) for x in (q, k, v))
    return q, k, v
