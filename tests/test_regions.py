"""The parts of Combiner: pools and their ties, summaries that are given, kappa made from u, and what is refused."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from cases import COMPLEX_STEP, FLOAT32, assert_bits, assert_close, assert_gradients_close
from test_plans import routed

import linattn as la
from linattn import regions
from linattn.plans.patterns import BUILDERS

ROOMS = ("reference", "numba")
ends = pytest.mark.parametrize("backend", ROOMS)
plans = pytest.mark.parametrize("name", [*BUILDERS, "own", "own with representatives"])


def plan_of(name, n, rng):
    return la.Plan.pattern(name, n, causal=True) if name in BUILDERS else routed(n, True, rng, "rep" in name)


def directional(function, args, d_out, rng):
    """<d_out, J u> by central differences of the fourth order, and u."""
    u = [rng.normal(size=x.shape) for x in args]

    def at(h):
        return np.sum(d_out * function(*(x + h * y for x, y in zip(args, u, strict=True))))

    h = 1e-3
    return (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h), u


def assert_directional(grads, function, args, d_out, rng):
    want, u = directional(function, args, d_out, rng)
    terms = [np.sum(d_x * y) for d_x, y in zip(grads, u, strict=True)]
    assert [g.shape for g in grads] == [x.shape for x in args]
    assert abs(sum(terms) - want) <= 1e-8 * (sum(map(abs, terms)) + 1)


@ends
@plans
def test_summaries_that_are_given(name, backend, rng):
    """`combine` takes rho and kappa and gives their gradients, as well as those of q, k and v."""
    for n, mask in ((13, None), (12, rng.random(12) > 0.3)):
        plan = plan_of(name, n, rng)
        shapes = ((2, 1, n, 4), (2, n, 4), (3, 1, 1, n, 3), (2, plan.n_regions, 4), (plan.n_regions, 4))
        args = [rng.normal(size=shape) for shape in shapes]
        options = {"plan": plan, "size_bias": True, "key_mask": mask, "backend": backend}
        out, backward = regions.combine_vjp(*args, **options)
        assert out.shape == (3, 2, 2, n, 3)
        d_out = rng.normal(size=out.shape)
        assert_directional(backward(d_out), partial(regions.combine, **options), args, d_out, rng)


@ends
@plans
def test_the_parts_put_together_are_the_mechanism(name, backend, rng):
    """pool, combine and pool's VJP by hand: the bits of neither, the numbers of both directions."""
    n = 13
    plan = plan_of(name, n, rng)
    if name == "joint":  # no partition of its own: the mechanism is the mixture
        attend = la.Combiner("mixture", mix="joint")
    else:
        attend = la.Combiner(name if name in BUILDERS else plan)
    q, k, v, d_out = (rng.normal(size=(2, n, width)) for width in (4, 4, 3, 3))
    mask = rng.random(n) > 0.3
    options = {"key_mask": mask, "backend": backend}
    rho, rho_back = regions.pool_vjp(q, plan, **options)
    kappa, kappa_back = regions.pool_vjp(k, plan, **options)
    out, backward = regions.combine_vjp(q, k, v, rho, kappa, plan, **options)
    d_q, d_k, d_v, d_rho, d_kappa = backward(d_out)
    want, want_back = attend.vjp(q, k, v, causal=True, **options)
    assert_close(out, want)
    assert_gradients_close((d_q + rho_back(d_rho), d_k + kappa_back(d_kappa), d_v), want_back(d_out))


@ends
@plans
def test_kappa_made_from_the_values(name, backend, rng):
    """local, a key of the user's own from u, attend; and back the same way."""
    n = 12
    plan = plan_of(name, n, rng)
    q, k, v, rho = (rng.normal(size=(2, m, width)) for m, width in ((n, 4), (n, 4), (n, 3), (plan.n_regions, 4)))
    mix = rng.normal(size=(3, 4))

    def whole(q, k, v, rho):
        u = regions.local(rho, k, v, plan, backend=backend)
        return regions.attend(q, k, v, np.tanh(u @ mix), u, plan, backend=backend)

    u, local_back = regions.local_vjp(rho, k, v, plan, backend=backend)
    kappa = np.tanh(u @ mix)
    out, attend_back = regions.attend_vjp(q, k, v, kappa, u, plan, backend=backend)
    assert_close(out, whole(q, k, v, rho))
    d_out = rng.normal(size=out.shape)
    d_q, d_k, d_v, d_kappa, d_u = attend_back(d_out)
    d_rho, d_k_local, d_v_local = local_back(d_u + (d_kappa * (1 - kappa**2)) @ mix.T)
    assert_directional((d_q, d_k + d_k_local, d_v + d_v_local, d_rho), whole, (q, k, v, rho), d_out, rng)


@ends
@plans
def test_pools_by_hand(name, backend, rng):
    """Maximum, mean and representative, region by region; of equal maxima the lowest index takes all."""
    n = 14
    plan = plan_of(name, n, rng)
    x = rng.integers(0, 3, (2, n, 5)).astype("float64")  # ties everywhere
    for kind, mask in (("max", None), ("mean", None), ("max", rng.random(n) > 0.5), ("mean", rng.random(n) > 0.5)):
        own = plan if mask is None else plan.restrict(mask)
        y, backward = regions.pool_vjp(x, plan, pool=kind, key_mask=mask, backend=backend)
        d_y = rng.normal(size=y.shape)
        want, d_x = np.zeros_like(y), np.zeros_like(x)
        for r in range(plan.n_regions):
            some = own.members.row(r)
            if not some.size:
                continue
            if plan.has_rep:
                want[:, r] = x[:, own.rep[r]]
                d_x[:, own.rep[r]] += d_y[:, r]
            elif kind == "mean":
                want[:, r] = x[:, some].mean(axis=1)
                d_x[:, some] += d_y[:, r, None] / some.size
            else:
                want[:, r] = x[:, some].max(axis=1)
                first = np.sort(some)[np.argmax(x[:, np.sort(some)], axis=1)]
                for head, c in np.ndindex(2, 5):
                    d_x[head, first[head, c], c] += d_y[head, r, c]
        assert_close(y, want)
        assert_close(backward(d_y), d_x, COMPLEX_STEP)


@ends
def test_dtypes_and_layouts(backend, rng):
    """Results in the dtype of the arguments, 16 bits rounded once; a layout changes no bit, nothing is written to."""
    plan = la.Plan.pattern("fixed", 12, size=3, causal=True)
    wide = [rng.normal(size=(2, n, width)) for n, width in ((12, 4), (12, 4), (12, 3), (3, 4), (3, 4))]
    want = regions.combine(*wide, plan, backend=backend)
    assert_close(regions.combine(*(x.astype("float32") for x in wide), plan, backend=backend), want, FLOAT32)
    half = [x.astype("float16") for x in wide]
    out, backward = regions.combine_vjp(*half, plan, backend=backend)
    best = regions.combine(*(x.astype("float64") for x in half), plan, backend=backend)
    assert out.dtype == "float16"
    assert np.all(abs(out - best) <= 1.1 * np.max(abs(best.astype("float16") - best)))
    assert {g.dtype.name for g in backward(out)} == {"float16"}
    for x in wide:
        x.flags.writeable = False
    turned = [np.asfortranarray(x) for x in wide]
    assert_bits(regions.combine(*turned, plan, backend=backend), want)


def shaped(*shape):
    return np.ones(shape)


GOOD = {"q": shaped(6, 4), "k": shaped(6, 4), "v": shaped(6, 3), "rho": shaped(2, 4), "kappa": shaped(2, 4)}
PLAN = la.Plan.pattern("fixed", 6, size=2, causal=True)
BAD = {
    "rho regions": ({"rho": shaped(3, 4)}, ValueError, r"`rho` must have shape \(\.\.\., R = 2, 4\), .*got \(3, 4\)"),
    "rho width": ({"rho": shaped(2, 3)}, ValueError, r"`rho` must have shape \(\.\.\., R = 2, 4\), .*got \(2, 3\)"),
    "kappa": ({"kappa": shaped(1, 4)}, ValueError, r"`kappa` must have shape .*R = 2.*got \(1, 4\)"),
    "kappa one axis": ({"kappa": shaped(4)}, ValueError, r"`kappa` must have at least 2 axes"),
    "kappa dtype": ({"kappa": shaped(2, 4).astype("f4")}, TypeError, r"one dtype"),
    "rho list": ({"rho": [[1.0] * 4] * 2}, TypeError, r"`rho` must be an array, got list"),
    "rho lead": ({"rho": shaped(2, 2, 4), "q": shaped(3, 6, 4)}, ValueError, r"leading axes.*broadcast"),
    "tokens": ({"q": shaped(5, 4)}, ValueError, r"`q` must have plan\.n = 6 tokens, got shape \(5, 4\)"),
    "channels": ({"k": shaped(6, 3)}, ValueError, r"last axis|`rho` must|`kappa` must"),
    "values": ({"v": shaped(7, 3)}, ValueError, r"`v` must have plan\.n = 6 tokens"),
}


@ends
@pytest.mark.parametrize("changes, error, pattern", BAD.values(), ids=BAD)
def test_summaries_that_do_not_fit(changes, error, pattern, backend):
    with pytest.raises(error, match=pattern):
        regions.combine(**(GOOD | changes), plan=PLAN, backend=backend)


@ends
def test_options_that_do_not_fit(backend):
    for options, error, pattern in (
        ({"scale": -1.0}, ValueError, r"`scale` must be positive and finite, got -1\.0"),
        ({"size_bias": 1}, TypeError, r"`size_bias` must be True or False, got 1"),
        ({"key_mask": np.ones(5, bool)}, ValueError, r"`key_mask` must have shape .*\(5,\)"),
        ({"key_mask": np.ones(6)}, TypeError, r"`key_mask`.*bool.*float64"),
        ({"plan": "fixed"}, TypeError, r"`plan` must be a Plan, got str"),
    ):
        with pytest.raises(error, match=pattern):
            regions.combine(**(GOOD | {"plan": PLAN, "backend": backend} | options))
    with pytest.raises(ValueError, match=r"`pool` must be one of 'max', 'mean', got 'sum'"):
        regions.pool(GOOD["q"], PLAN, pool="sum", backend=backend)
    with pytest.raises(ValueError, match=r"`backend`.*'tpu'"):
        regions.pool(GOOD["q"], PLAN, backend="tpu")
    for verb, args in (
        (regions.pool_vjp, (GOOD["q"],)),
        (regions.local_vjp, (GOOD["rho"], GOOD["k"], GOOD["v"])),
        (regions.attend_vjp, (GOOD["q"], GOOD["k"], GOOD["v"], GOOD["kappa"], shaped(2, 3))),
        (regions.combine_vjp, tuple(GOOD.values())),
    ):
        y, backward = verb(*args, PLAN, backend=backend)
        with pytest.raises(ValueError, match=r"`d_\w+` must have the shape of `\w+` .*got \(1, 1\)"):
            backward(shaped(1, 1))
        assert all(np.isfinite(x).all() for x in np.atleast_1d(backward(y)[0]))
    with pytest.raises(ValueError, match=r"`u` must have shape \(\.\.\., R = 2, 3\)"):
        regions.attend(GOOD["q"], GOOD["k"], GOOD["v"], GOOD["kappa"], shaped(2, 4), PLAN, backend=backend)
