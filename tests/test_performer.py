"""Performer: its features, its projection, how it is fitted to data, and its other kernels.

Its theorems: test_statistics.py; beside others: test_performer_peers.py; as a value: test_performer_values.py.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cases import TINY, assert_bits, assert_close, assert_gradients_close, backends_of, complex_step

import linattn as la
from linattn import instruments
from linattn.audit import performer as formulas
from linattn.audit.quadratic import formula_of
from linattn.mechanisms.attention import Call

REAL = np.load(Path(la.__file__).parent / "data" / "minilm_qkv.npz")
POSITIVE = ["positive", "hyperbolic", "oprf", "sderf"]
GENERAL = ["relu", "elu1", "exp", "sigmoid", "abs", "square"]
SIGNED = ["trig", "gelu", "tanh", "cos"]


def gaussian(rng, n=23, d=6, e=4, lead=(2,), sigma=1.0):
    return [sigma * rng.normal(size=(*lead, n, width)) for width in (d, d)] + [rng.normal(size=(*lead, n, e))]


def value(features, rng):
    """A value with these features, fitted if they need it."""
    attend = la.Performer(12, features=features)
    q, k, _ = gaussian(rng, d=6)
    return attend.calibrate(q, k) if features in ("oprf", "sderf") else attend


def quiet():
    """Signed features warn."""
    return warnings.catch_warnings(action="ignore", category=RuntimeWarning)


# -- features -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [*POSITIVE, *GENERAL, *SIGNED])
def test_every_feature_map_is_its_formula(features, rng):
    """Forward, gradients and the projection's cotangent, causal with a mask."""
    attend = value(features, rng)
    args, mask = gaussian(rng, n=9), rng.random((2, 9)) > 0.3
    mask[:, 0] = True
    d_out = rng.normal(size=(2, 9, 4))
    formula, w = formula_of(attend), attend.matrix(6)
    tolerance = 1e-12 if features in SIGNED else 1e-13  # small denominators
    want = complex_step(
        lambda q, k, v, w: formula(q, k, v, causal=True, key_mask=mask, projection=w),
        [*args, w],
        d_out,
        one_by_one=True,
    )
    for backend in backends_of(attend):
        with quiet():
            out, backward = attend.projection_vjp(*args, causal=True, key_mask=mask, backend=backend)
            plain = attend.vjp(*args, causal=True, key_mask=mask, backend=backend)[1](d_out)
        assert_close(out, formula(*args, causal=True, key_mask=mask), tolerance)
        got = backward(d_out)
        assert_gradients_close(got, want, 1e-11 if features in SIGNED else 1e-12)
        for a, b in zip(got, plain, strict=False):
            assert_bits(a, b)


@pytest.mark.parametrize("features", ["positive", "hyperbolic", "oprf", "sderf"])
def test_log_features_in_long_double(features, rng):
    """What is left is the rounding of the logarithms themselves: u |W| |x|."""
    attend = value(features, rng)
    q, k, _ = gaussian(rng, d=6, sigma=5.0)
    call = Call(np)
    wide = (x.astype(np.longdouble) for x in (q, k))
    own = {"projection": attend.matrix(6), "features": features, "calibration": attend.calibration}
    want = formulas.log_features(*wide, **own)
    constants = attend._constants(q, k, call)
    got = attend._log_q(q, constants, call), attend._log_k(k, constants, call)
    for a, b in zip(got, want, strict=True):
        assert np.max(abs(a - b)) <= 1e-14 * np.max(abs(b))


FAMILIES = ["gauss", "unit", "aligned", "opposed", "growing", "shrinking", "one_hot", "rotating"]


def family(name, norm, rng, n=48, d=16):
    """q, k of that norm (growing, shrinking: up to it), v."""
    u = rng.normal(size=d)
    rows = {
        "gauss": lambda: rng.normal(size=(2, n, d)),
        "unit": lambda: rng.normal(size=(2, n, d)),
        "aligned": lambda: np.broadcast_to(u, (2, n, d)),
        "opposed": lambda: np.stack([np.broadcast_to(u, (n, d)), np.broadcast_to(-u, (n, d))]),
        "growing": lambda: rng.normal(size=(2, n, d)),
        "shrinking": lambda: rng.normal(size=(2, n, d)),
        "one_hot": lambda: np.eye(d)[rng.integers(0, d, size=(2, n))],
        "rotating": lambda: np.cos(np.arange(n)[:, None] / 5 + np.arange(d)) + np.zeros((2, 1, 1)),
    }[name]()
    if name != "gauss":
        rows = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
        rows = norm * rows
    else:
        rows = rows * norm / math.sqrt(d)
    steps = np.linspace(0.02, 1, n)[:, None]
    if name in ("growing", "shrinking"):
        rows = rows * (steps if name == "growing" else steps[::-1])
    return rows[0], rows[1], rng.normal(size=(n, 5))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("norm", [8, 50])
@pytest.mark.parametrize("name", FAMILIES)
def test_norms_up_to_fifty(name, norm, causal, rng):
    """float64 to 1e-12 of the quadratic form in log space, float32 to 2e-6, whatever the keys do."""
    attend = la.Performer(32)
    args = family(name, norm, rng)
    formula = formula_of(attend)
    for dtype, tolerance in (("float64", 1e-12), ("float32", 2e-6)):
        given = [x.astype(dtype) for x in args]
        want = formula(*given, causal=causal)
        for backend in backends_of(attend):
            out = attend(*given, causal=causal, backend=backend)
            assert np.isfinite(out).all()
            assert_close(out, want, tolerance)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_ordinary_norms_in_every_dtype(dtype, rng):
    """float32 to 1e-6; 16 bits finite and within their own rounding."""
    import ml_dtypes

    attend = la.Performer(64)
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    args = [x.astype(kind) for x in gaussian(rng, d=16)]
    tolerance = {"float64": 1e-13, "float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}[dtype]
    want = formula_of(attend)(*args, causal=True)
    for backend in backends_of(attend):
        out, backward = attend.vjp(*args, causal=True, backend=backend)
        assert out.dtype == kind
        assert_close(out.astype("float64"), want, tolerance)
        assert all(np.isfinite(g.astype("float64")).all() for g in backward(out))


def test_hyperbolic_is_positive_with_both_signs(rng):
    args = gaussian(rng)
    w = la.draw_projection(6, 6, seed=3)
    both = la.Performer(projection=np.concatenate([w, -w]))
    assert_close(la.Performer(projection=w, features="hyperbolic")(*args), both(*args), 1e-15)
    assert_close(la.Performer(12, seed=3, features="hyperbolic")(*args), both(*args), 1e-15)


def test_centred_keys_are_importance_sampling(rng):
    """(y - c) W - |y - c|^2 / 2 = y (W + c) - |y|^2 / 2 - w.c - |c|^2 / 2: rows of N(c, I) with their likelihood.

    On the other side w.x = (w + c).x - c.x, and c.x is a constant of the row.
    """
    args = gaussian(rng)
    w, c = la.draw_projection(12, 6, seed=0), rng.normal(size=6)
    lq, lk = formulas.log_features(*args[:2], projection=w + c)
    importance = -(w @ c) - c @ c / 2
    want = formulas.log_weights(lq, lk + importance, np.ones((23, 23), bool)) @ args[2]
    assert_close(la.Performer(projection=w, calibration=(None, c))(*args), want)


def test_scale_is_on_both_sides(rng):
    """`scale` multiplies the logits once: as softmax's, and as q and k times its root."""
    q, k, v = gaussian(rng)
    attend = la.Performer(32, scale=1.0)
    for scale in (0.25, 6**-0.5):
        assert_close(replace(attend, scale=scale)(q, k, v), attend(math.sqrt(scale) * q, math.sqrt(scale) * k, v))
    assert_close(la.Performer(32)(q, k, v), replace(attend, scale=6**-0.5)(q, k, v), 1e-15)


def test_many_features_come_to_softmax(rng):
    """Every estimator of softmax's kernel, small inputs: the error falls to a percent."""
    args = gaussian(rng, sigma=0.5)
    want = la.Softmax()(*args)
    for features in ("positive", "hyperbolic", "trig", "oprf", "sderf"):
        attend = la.Performer(8192, features=features)
        with quiet():
            attend = attend.calibrate(*args[:2]) if features in ("oprf", "sderf") else attend
            assert_close(attend(*args), want, 0.03)


def test_eps_shrinks_towards_the_mean(rng):
    """lk = log(e^lk + eps): causally too; with eps to infinity every visible key weighs the same."""
    q, k, v = gaussian(rng)
    attend = la.Performer(32, eps=1e12)
    assert_close(attend(q, k, v), np.broadcast_to(v.mean(-2, keepdims=True), v.shape), 1e-8)
    prefix = np.cumsum(v, axis=-2) / np.arange(1, 24)[:, None]
    assert_close(attend(q, k, v, causal=True), prefix, 1e-8)
    assert_bits(la.Performer(32, eps=0.0)(q, k, v), la.Performer(32)(q, k, v))


def test_a_norm_that_overflows_is_not_dropped(rng):
    """|y|^2 = inf would make the key's features 0; it is NaN, in the rows that see the key."""
    q, k, v = gaussian(rng)
    k[:, 5] = 1e200
    out = la.Performer(16)(q, k, v, causal=True)
    assert np.isfinite(out[:, :5]).all()
    assert np.isnan(out[:, 5:]).all()


# -- the projection --------------------------------------------------------------------------------------------------


def test_the_matrix_is_drawn_once_from_the_seed(rng):
    """The same whatever the data are, `draw_projection`'s own, and not to be written to."""
    attend = la.Performer(16, seed=5, kind="simplex")
    assert_bits(attend.matrix(6), la.draw_projection(16, 6, seed=5, kind="simplex"))
    q, k, v = gaussian(rng)
    given = la.Performer(projection=attend.matrix(6))
    assert_bits(attend(q, k, v), given(q, k, v))
    assert_bits(attend(1e7 * q, k, v), given(1e7 * q, k, v))  # nothing is seeded by the data
    with pytest.raises(ValueError, match="read-only"):
        attend.matrix(6)[0, 0] = 1.0
    assert not np.array_equal(la.Performer(16, seed=6).matrix(6), attend.matrix(6))


def test_a_projection_for_each_head(rng):
    """Leading axes broadcast with the heads; each head alone gives the same bits."""
    q, k, v = gaussian(rng, lead=(2, 3))
    w = rng.normal(size=(3, 10, 6))
    attend = la.Performer(projection=w)
    out = attend(q, k, v, causal=True)
    for head in range(3):
        alone = la.Performer(projection=w[head])(q[:, head], k[:, head], v[:, head], causal=True)
        assert_close(out[:, head], alone, 1e-15)
    shared = attend(q[:, :1], k[:, :1], v[:, :1])  # one head of data, three of features
    assert shared.shape == (2, 3, 23, 4)
    with pytest.raises(ValueError, match=r"`projection` must broadcast with the leading axes of q, k and v \(2, 2\)"):
        attend(q[:, :2], k[:, :2], v[:, :2])


@pytest.mark.parametrize("n_features, dim", [(1, 1), (3, 8), (8, 1), (21, 8)])
def test_any_number_of_features(n_features, dim, rng):
    args = gaussian(rng, d=dim)
    attend = la.Performer(n_features)
    assert_close(attend(*args), formula_of(attend)(*args))


def test_learned_norms(rng):
    """W = diag(n) U: d_n from the projection's cotangent."""
    q, k, v = gaussian(rng)
    u, norms, d_out = la.draw_projection(12, 6, seed=0, norms="sqrt"), rng.uniform(0.5, 2, 12), rng.normal(size=v.shape)
    attend = la.Performer(projection=norms[:, None] * u)
    *_, d_w = attend.projection_vjp(q, k, v, cu_seqlens=[0, 9, 9, 23])[1](d_out)
    step = rng.normal(size=12)
    moved = formula_of(attend)(q, k, v, cu_seqlens=[0, 9, 9, 23], projection=(norms + 1j * TINY * step)[:, None] * u)
    want = np.sum(d_out * moved.imag / TINY)
    assert np.sum(np.sum(d_w * u, axis=-1) * step) == pytest.approx(want, rel=1e-12)


@pytest.mark.torch
def test_torch_differentiates_calibrated_features(rng):
    import torch

    args = gaussian(rng)
    for features in POSITIVE:
        attend = la.Performer(12, features=features).calibrate(*args[:2], rule="full")
        tensors = [torch.tensor(x, requires_grad=True) for x in args]
        out = attend(*tensors, causal=True)
        d_out = rng.normal(size=out.shape)
        want = torch.autograd.grad(out, tensors, torch.tensor(d_out))
        got = attend.vjp(*args, causal=True)[1](d_out)
        assert_gradients_close(got, [g.numpy() for g in want])
        d_w = attend.projection_vjp(*tensors, causal=True)[1](torch.tensor(d_out))[3]
        assert_close(d_w, attend.projection_vjp(*args, causal=True)[1](d_out)[3], 1e-12)


# -- fitted to data --------------------------------------------------------------------------------------------------


def moved(x, y, calibration):
    a, c, *_ = (*calibration, None)
    a = np.eye(x.shape[-1]) if a is None else a
    return x @ np.swapaxes(a, -1, -2), (y if c is None else y - c[..., None, :]) @ np.linalg.inv(a)


@pytest.mark.parametrize("rule", ["centre", "scale", "full"])
def test_calibration_leaves_softmax_and_attains_its_phi(rule, rng):
    """Exact for softmax; phi is what the closed form says, and no small change of A and c makes it smaller."""
    q, k, _ = gaussian(rng, n=60, lead=(3,))
    q, k = q @ rng.normal(size=(6, 6)) / 2 + rng.normal(size=6), k + 2 * rng.normal(size=(3, 1, 6))
    calibration = la.Performer(64).calibrate(q, k, rule=rule).calibration
    x, y = q / 6**0.25, k / 6**0.25
    far_x, far_y = moved(x, y, calibration)
    want = la.Softmax(scale=1.0).weights(x, y)
    assert_close(la.Softmax(scale=1.0).weights(far_x, far_y), want, 1e-13)

    def phi(x, y):
        return np.mean(np.sum(x * x, -1), -1) + np.mean(np.sum(y * y, -1), -1) + 2 * np.sum(x.mean(-2) * y.mean(-2), -1)

    best = phi(far_x, far_y)
    assert np.all(best < phi(x, y))
    cov_x, cov_y = (np.array([np.cov(z.T, bias=True) for z in zs]) for zs in (x, y))
    if rule == "scale":
        closed = 2 * np.sum(
            np.sqrt(np.diagonal(cov_x, axis1=-2, axis2=-1) * np.diagonal(cov_y, axis1=-2, axis2=-1)), -1
        )
        np.testing.assert_allclose(best, closed, rtol=1e-7)
    if rule == "full":
        values = [np.linalg.eigvals(a @ b) for a, b in zip(cov_x, cov_y, strict=True)]
        np.testing.assert_allclose(best, [2 * np.sum(np.sqrt(v.real)) for v in values], rtol=1e-6)
    for _ in range(20):
        a, c = calibration if calibration[0] is not None else (np.eye(6), calibration[1])
        if rule == "centre":
            other = (None, c + 0.05 * rng.normal(size=c.shape))
        elif rule == "scale":
            other = (a * (1 + 0.05 * rng.normal(size=6)), c)
        else:
            other = (a @ (np.eye(6) + 0.05 * rng.normal(size=(6, 6))), c)
        assert np.all(phi(*moved(x, y, other)) >= best * (1 - 1e-9))


def test_calibration_is_a_constant_of_the_value(rng):
    """Nothing of a call's data enters: a prefix does not depend on what follows, a sample not on its batch."""
    q, k, v = gaussian(rng, lead=(2, 3))
    attend = la.Performer.accurate(q, k, 16)
    assert attend == la.Performer(16, features="hyperbolic", norms="sqrt").calibrate(q, k, rule="scale")
    assert attend.calibration[0].shape == (3, 6, 6)
    out = attend(q, k, v, causal=True)
    later = [np.concatenate([x[..., :15, :], 9 * x[..., 15:, :]], axis=-2) for x in (q, k, v)]
    assert_bits(attend(*later, causal=True)[..., :15, :], out[..., :15, :])
    assert_bits(attend(q[:1], k[:1], v[:1], causal=True), out[:1])


def test_calibration_pools_what_shares_keys(rng):
    """Grouped queries: one set of constants for the keys that a group shares, so that the state stays shared."""
    q, k, v = rng.normal(size=(2, 4, 2, 23, 6)), rng.normal(size=(2, 4, 1, 23, 6)), rng.normal(size=(2, 4, 1, 23, 5))
    attend = la.Performer(16).calibrate(q, k)
    assert attend.calibration[1].shape == (4, 1, 6)
    assert attend.init_state(k, v).arrays.sums.shape == (2, 4, 1, 16, 6)
    mean = q.mean(axis=(0, 2, 3))
    one = la.Performer(16).calibrate(q, k, rule="centre").calibration[1]
    np.testing.assert_allclose(one[:, 0], (mean + k.mean(axis=(0, 2, 3))) / 6**0.25, rtol=1e-12)


def test_calibration_sees_visible_tokens_only(rng):
    q, k, _ = gaussian(rng)
    mask = rng.random((2, 23)) > 0.3
    dirty_q, dirty_k = (np.where(mask[..., None], x, np.nan) for x in (q, k))
    for rule in ("scale", "full"):
        attend = la.Performer(16).calibrate(dirty_q, dirty_k, rule=rule, key_mask=mask)
        assert np.isfinite(attend.calibration[0]).all()
        cut = [np.stack([x[0][mask[0]]]) for x in (q, k)]
        alone = la.Performer(16).calibrate(*cut, rule=rule)
        np.testing.assert_allclose(alone.calibration[0], attend.calibration[0][0], rtol=1e-10)


@pytest.mark.parametrize("features", ["oprf", "sderf"])
def test_fitted_features_lower_the_variance(features, rng):
    """The spread of an estimated weight over seeds, at phi = 6 in 6 dimensions."""
    q, k, _ = gaussian(rng, n=200, sigma=math.sqrt(3 / math.sqrt(6)))
    pairs = [x[0, :40] for x in (q, k)]
    exact = np.exp(np.sum(pairs[0] * pairs[1], -1) / math.sqrt(6))

    def spread(attend):
        errors = []
        for seed in range(200):
            fresh = replace(attend, seed=seed)
            w = fresh.matrix(6)
            lq, lk = formulas.log_features(*pairs, projection=w, features=fresh.features, calibration=fresh.calibration)
            x = pairs[0] / 6**0.25
            a = np.exp(lq + lk - np.sum(x * x, -1, keepdims=True) / 2)
            if features == fresh.features:  # the constant that cancels in attention
                a = a * constant(fresh)
            errors.append(np.mean(a, -1) / exact - 1)
        return np.mean(np.minimum(np.square(errors), 1e6))

    def constant(attend):
        second = np.asarray(attend.calibration[2])
        values = np.full(6, second.reshape(-1)[0]) if attend.features == "oprf" else np.linalg.eigvalsh(second)[..., :]
        return np.prod((1 - 4 * formulas.best_a(values)) ** 0.5, axis=-1).reshape(-1)[0]

    fitted = la.Performer(64, features=features).calibrate(q[:1], k[:1], rule="none")
    plain = spread(la.Performer(64))
    assert spread(fitted) < 0.8 * plain


def test_the_accurate_preset_on_real_heads():
    """Median skill error over heads of a real transformer, layers 0, 2, 5: below 1 is better than the mean of v."""
    found = {}
    for layer in (0, 2, 5):
        q, k, v = (REAL[f"{name}{layer}"].astype("float64") for name in "qkv")
        values = {"plain": la.Performer(256), "accurate": la.Performer.accurate(q, k)}
        for name, attend in values.items():
            with warnings.catch_warnings(action="ignore"):
                report = instruments.performer_report(attend, q, k, v)
            found[name, layer] = float(np.median(report.skill_error))
    for layer, most in ((0, 0.9), (2, 1.0), (5, 0.6)):
        assert found["accurate", layer] < most
        assert found["accurate", layer] < found["plain", layer] - 0.1
    assert found["plain", 0] > 1  # plain FAVOR+ is worse than the mean of v here
    assert found["plain", 2] > 1


def test_step_by_step_is_the_whole(rng):
    q, k, v = gaussian(rng, n=30, d=8)
    for features in (*POSITIVE, "relu"):
        attend = la.Performer(24, features=features)
        attend = attend.calibrate(q, k) if features in ("oprf", "sderf") else attend
        want = attend(q, k, v, causal=True)
        state, rows = attend.init_state(k, v), []
        for t in range(30):
            row, state = attend.step(q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1], state)
            rows.append(row)
        assert_close(np.concatenate(rows, axis=-2), want, 1e-13)


# -- other kernels ---------------------------------------------------------------------------------------------------


def test_general_kernels_are_linear_attention(rng):
    """f(W x) + eps through the linear engine: `Linear` with the projected features."""
    q, k, v = gaussian(rng)
    w = la.draw_projection(12, 6, seed=0) / 6**0.25
    for eps in (None, 0.0, 0.2):
        attend = la.Performer(12, features="relu", eps=eps)
        plus = 1e-3 if eps is None else eps
        phi_q, phi_k = (np.maximum(x @ w.T, 0) + plus for x in (q, k))
        want = la.Linear("identity")(phi_q, phi_k, v, causal=True)
        assert_close(attend(q, k, v, causal=True), want, 1e-13)
    square = la.FeatureMap("square", phi=lambda x, xp: x * x, vjp=lambda d_phi, x, xp: 2 * x * d_phi)
    assert_close(la.Performer(12, features=square)(q, k, v), la.Performer(12, features="square")(q, k, v), 1e-14)


@pytest.mark.parametrize("features", SIGNED)
def test_signed_features_warn(features, rng):
    q, k, v = gaussian(rng)
    attend = la.Performer(12, features=features)
    with pytest.warns(RuntimeWarning, match=f"features='{features}'.*signed features"):
        attend(q, k, v)
    with pytest.warns(RuntimeWarning, match="signed features"):
        attend.weights(q, k)


@pytest.mark.parametrize("features", ["relu", "trig", "positive"])
def test_a_nan_under_the_mask_is_not_seen(features, rng):
    q, k, v = gaussian(rng)
    mask = rng.random((2, 23)) > 0.3
    attend, d_out = la.Performer(12, features=features), rng.normal(size=v.shape)
    dirty = [np.where(mask[..., None], x, np.nan) for x in (k, v)]
    for backend in backends_of(attend):
        with quiet():
            out, backward = attend.vjp(q, *dirty, key_mask=mask, backend=backend)
            want, clean = attend.vjp(q, np.where(mask[..., None], k, 7.0), v, key_mask=mask, backend=backend)
        assert_bits(out, want)
        for a, b in zip(backward(d_out), clean(d_out), strict=True):
            assert_bits(a, b)
