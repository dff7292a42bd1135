"""Instruments on what mechanisms make: laws of softmax's and LLN's weights, operators, inputs, reports."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import numpy as np
import pytest

import linattn as la
from linattn import instruments as inst
from linattn.audit.loglinear import log_weights
from linattn.audit.quadratic import FORMULAS

REAL = np.load(Path(la.__file__).parent / "data" / "minilm_qkv.npz")
SEEDS = range(5)
N, D = 512, 64


def gaussian(seed, sigma=1.0, n=N):
    return sigma * np.random.default_rng(seed).normal(size=(2, n, D))


# ------------------------------------------------------------------------------------------ log-normal fit


def test_fit_of_a_log_normal_matrix(rng):
    """Exact log-normal rows: all moments of the normal law within their spread."""
    a = np.exp(rng.normal(size=(3, 400, 400)))
    a /= np.sum(a, axis=-1, keepdims=True)
    fit = inst.lognormal_fit(a)
    assert fit.skewness.shape == (3,)
    assert np.all(abs(fit.skewness) < 0.04)
    assert np.all(abs(fit.kurtosis) < 0.08)
    assert np.all(fit.kolmogorov < 0.006)
    assert np.all(abs(fit.residual) < 0.02)
    assert np.all(fit.zeros == 0)


def test_fit_by_hand(rng):
    """Two rows, one key hidden, different widths: each row is centred and scaled by itself."""
    logs = np.log([[1.0, 2.0, 6.0, 3.0], [1.0, 4.0, 2.0, 0.5]])
    a = np.exp(logs) / np.sum(np.exp(logs), axis=-1, keepdims=True)
    wide = np.insert(a, 1, 0.0, axis=-1)
    mask = np.array([True, False, True, True, True])
    z = (logs - logs.mean(-1, keepdims=True)) / logs.std(-1, keepdims=True)
    fit = inst.lognormal_fit(wide, key_mask=mask)
    assert fit.skewness == pytest.approx(np.mean(z**3))
    assert fit.kurtosis == pytest.approx(np.mean(z**4) - 3)
    everything = np.log(4 * a)
    assert fit.residual == pytest.approx(np.mean(everything) + np.var(everything) / 2)
    order = np.sort(z.ravel())
    phi = np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in order])
    steps = np.arange(9) / 8
    assert fit.kolmogorov == pytest.approx(max(np.max(steps[1:] - phi), np.max(phi - steps[:-1])))


def test_fit_leaves_few_zeros_out_and_refuses_many(rng):
    a = rng.random((50, 50))
    a[0, :5] = 0
    a /= np.sum(a, axis=-1, keepdims=True)
    assert inst.lognormal_fit(a).zeros == pytest.approx(5 / 2500)
    with pytest.raises(ValueError, match=r"`lognormal_fit` needs weights that are not 0.*got 33.3%\."):
        inst.lognormal_fit(np.array([[0.0, 0.5, 0.5]]))
    uniform = inst.lognormal_fit(np.full((3, 3), 1 / 3))
    assert np.isnan(uniform.skewness)
    assert uniform.residual == pytest.approx(0)


@pytest.mark.parametrize("seed", SEEDS)
def test_softmax_is_log_normal_and_lln_is_skewed(seed):
    """sigma = 1, N = 512, D = 64: a matched variance is not a matched law."""
    q, k = gaussian(seed)
    soft = inst.lognormal_fit(FORMULAS["Softmax"].weights(q, k))
    lln = inst.lognormal_fit(la.LLN().weights(q, k))
    assert soft.kolmogorov < 0.003
    assert abs(soft.skewness) < 0.02
    assert abs(soft.residual) < 0.03
    assert 0.75 < lln.skewness < 1.1
    assert 0.05 < lln.kolmogorov < 0.065
    assert -0.25 < lln.residual < -0.08


# --------------------------------------------------------------------------------------------- temperature


@pytest.mark.parametrize("causal", [False, True])
def test_temperature_of_softmax(causal):
    """1 / (sigma_q sigma_k) for Gaussian q and k, from the weights and from the inputs."""
    q, k = gaussian(0, 0.9)
    a = FORMULAS["Softmax"].weights(q, k, causal=causal)
    tau = inst.temperature(a, causal=causal)
    assert tau == pytest.approx(1 / 0.81, rel=0.05)
    assert tau == pytest.approx(inst.log_variance(a, causal=causal) ** -0.5)
    assert inst.temperature_qk(q, k) == pytest.approx(1 / 0.81, rel=0.02)
    sample = inst.temperature(a, causal=causal, rows=128)
    assert abs(sample.value - tau) < 6 * sample.error
    assert np.isinf(inst.temperature(np.full((4, 4), 0.25)))
    with np.errstate(divide="ignore"):
        want = inst.log_variance(a, causal=causal, per_row=True) ** -0.5
    np.testing.assert_allclose(inst.temperature(a, causal=causal, per_row=True), want)


def test_temperature_of_lln_is_on_a_scale_of_its_own():
    q, k = gaussian(0)
    attend = la.LLN().calibrate(q, k)
    assert inst.temperature_qk(q, k, alpha=attend.alpha, beta=attend.beta) == pytest.approx(0.331, abs=0.003)
    assert inst.temperature(attend.weights(q, k)) == pytest.approx(1.1, abs=0.1)
    with pytest.raises(ValueError, match="`alpha` and `beta` must be given together"):
        inst.temperature_qk(q, k, alpha=1.0)


# -------------------------------------------------------------------------------------- from q and k alone


def test_log_variance_without_weights(rng):
    """Exactly softmax's, for any data: means, cross attention, leading axes, masks, real heads."""
    q, k = rng.normal(size=(2, 3, 9, 4)) + 1.5, rng.normal(size=(3, 13, 4)) * 2 - 1
    for scale in (None, 0.7):
        a = FORMULAS["Softmax"].weights(q, k, scale=scale)
        np.testing.assert_allclose(inst.log_variance_qk(q, k, scale), inst.log_variance(a), rtol=1e-12)
    mask = rng.random((3, 13)) > 0.3
    a = FORMULAS["Softmax"].weights(q, k, key_mask=mask)
    got = inst.log_variance_qk(q, k, key_mask=mask)
    np.testing.assert_allclose(got, inst.log_variance(a, key_mask=mask), rtol=1e-12)
    for layer in (0, 2, 5):
        q, k = (REAL[f"{name}{layer}"].astype("float64") for name in "qk")
        want = inst.log_variance(FORMULAS["Softmax"].weights(q, k))
        np.testing.assert_allclose(inst.log_variance_qk(q, k), want, rtol=1e-6)  # of weights down to 1e-50


def test_sigma_in_each_scope(rng):
    q, k = rng.normal(size=(2, 3, 9, 4)) + 1, rng.normal(size=(2, 3, 7, 4))
    assert inst.sigma(q, k) == pytest.approx((q.std(ddof=1), k.std(ddof=1)))
    assert inst.sigma(q, k, "tensor", 0) == pytest.approx((q.std(), k.std()))
    np.testing.assert_allclose(inst.sigma(q, k, "head").q, [q[:, i].std(ddof=1) for i in range(3)])
    np.testing.assert_allclose(inst.sigma(q, k, "sample").k, k.std(axis=(-2, -1), ddof=1))
    np.testing.assert_allclose(inst.sigma(q[0], k[0], "head").k, k[0].std(axis=(-2, -1), ddof=1))
    mask = np.arange(7) < 4
    assert inst.sigma(q, k, key_mask=mask).k == pytest.approx(k[:, :, :4].std(ddof=1))
    assert inst.sigma(q, k, key_mask=mask).q == pytest.approx(q.std(ddof=1))
    both = inst.sigma(q[:, :, :7], k, key_mask=mask)
    assert both.q == pytest.approx(q[:, :, :4].std(ddof=1))


# ------------------------------------------------------------------------------------------------ operators


@pytest.mark.parametrize("attend", [la.Softmax(), la.Performer(32), la.LLN()], ids=repr)
def test_gap_of_an_operator(attend):
    """Arnoldi's is the dense one."""
    q, k = gaussian(3, 0.9, n=120)
    got = inst.spectral_gap_operator(lambda x: attend(q, k, x), 120)
    assert got == pytest.approx(inst.spectral_gap(attend.weights(q, k)), abs=1e-8)


def test_gap_of_small_operators(rng):
    for n in (1, 2, 3, 7):
        a = rng.random((n, n))
        a /= np.sum(a, axis=-1, keepdims=True)
        assert inst.spectral_gap_operator(lambda x, a=a: a @ x, n) == pytest.approx(inst.spectral_gap(a), abs=1e-10)
    assert inst.spectral_gap_operator(lambda x: x, 5) == pytest.approx(0)  # the eigenvalue 1 many times
    blocks = np.kron(np.eye(2), rng.dirichlet(np.ones(4), size=4))
    assert inst.spectral_gap_operator(lambda x: blocks @ x, 8) == pytest.approx(0, abs=1e-12)
    assert inst.spectral_gap_operator(lambda x: np.full((5, 5), 0.2) @ x, 5) == pytest.approx(1)
    for wrong in (np.nan, 0.9):
        with pytest.raises(ValueError, match="`apply` must have rows that sum to 1"):
            inst.spectral_gap_operator(lambda x, c=wrong: c * x, 5)


def test_one_call_gives_the_signed_distance():
    """v = positions."""
    q, k = gaussian(1, n=100)
    positions = np.arange(100.0)[:, None]
    attend = la.Performer(64)
    got = np.mean(positions - attend(q, k, positions))
    assert got == pytest.approx(inst.mean_distance(attend.weights(q, k), signed=True), rel=1e-12, abs=1e-12)


def test_ranks():
    q, k = gaussian(0)
    soft, lln = inst.rank(la.Softmax().weights(q, k)), inst.rank(la.LLN().weights(q, k))
    assert soft.numerical == 512
    assert soft.stable == pytest.approx(2.7, abs=0.2)
    assert lln.numerical <= 64
    assert 2 < lln.stable < 6
    assert inst.rank(np.full((6, 6), 1 / 6)) == pytest.approx((1, 1))
    assert inst.rank(np.eye(6)) == pytest.approx((6, 6))


def test_negative_mass(rng):
    signed = np.array([[1.5, -0.5], [0.25, 0.75]])
    assert inst.negative_mass(signed) == pytest.approx((0.5, 1.0, 1.0))
    q, k = gaussian(0, 0.5, n=50)
    with pytest.warns(RuntimeWarning, match="signed features"):
        a = la.Performer(64, features="trig").weights(q, k)
    assert inst.negative_mass(a).mass > 0
    assert inst.negative_mass(la.Softmax().weights(q, k)).mass == pytest.approx(0, abs=1e-14)
    with pytest.raises(ValueError, match="see `negative_mass`"):
        inst.entropy(a)


# ------------------------------------------------------------------------------------------ tables of LLN


def test_lln_gap_from_its_own_small_matrix():
    """W Pi and Pi W: D x D."""
    q, k = gaussian(2, n=128)
    attend = la.LLN().calibrate(q, k)
    a, b = np.exp(attend.alpha * q), np.exp(attend.beta * k)
    got = inst.spectral_gap_features(a, b)
    assert got == pytest.approx(inst.spectral_gap(attend.weights(q, k)), abs=1e-12)


@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_gap_from_logarithms_of_any_size(scale, rng):
    """exp(+-2000) is neither formed nor missed; a feature that no key has, or no query, is none."""
    x, y = scale * rng.normal(size=(2, 2, 60, 8))
    y[0, :, 3] = -np.inf
    x[1, :, 2] = -np.inf
    a = log_weights(x, y, np.ones((60, 60), bool))
    got = inst.spectral_gap_features(x, y, logarithms=True)
    np.testing.assert_allclose(got, inst.spectral_gap(a), atol=1e-10)
    shift = 50 * scale * rng.normal(size=8)
    moved = inst.spectral_gap_features(x + shift + scale * rng.normal(size=(60, 1)), y - shift, logarithms=True)
    np.testing.assert_allclose(moved, got, atol=1e-9)
    with pytest.raises(ValueError, match=r"`phi_k` must be below infinity, got nan at \(0, 0, 0\)\."):
        inst.spectral_gap_features(x, y * np.nan, logarithms=True)
    with pytest.raises(ValueError, match=r"live rows, got row \(0, 0\)"):
        inst.spectral_gap_features(x, y - np.inf, logarithms=True)


@pytest.mark.parametrize(
    "sigma, calibration, entropy, second",
    [
        (0.8, "paper", 8.64, 0.048),
        (0.8, "exact", 8.64, 0.048),
        (1.0, "paper", 7.81, 0.129),
        (1.0, "exact", 7.85, 0.125),
    ],
)
def test_entropy_and_gap_of_lln(sigma, calibration, entropy, second):
    found = []
    for seed in SEEDS:
        q, k = gaussian(seed, sigma)
        a = la.LLN(calibration=calibration).weights(q, k)
        concentration = inst.concentration(a)
        found.append((inst.entropy(a), 1 - inst.spectral_gap(a), math.sqrt(concentration / N)))
    h, gap, law = np.mean(found, axis=0)
    assert h == pytest.approx(entropy, abs=0.02)
    assert gap == pytest.approx(second, rel=0.05)
    assert law == pytest.approx(gap, rel=0.1)  # |lambda_2| = sqrt(M^2 Var / N)


def test_gap_of_lln_with_blocks_says_nothing():
    """Each block has an eigenvalue 1: lambda_2 is the share of softmax whatever the inputs, and the report says so."""
    q, k = gaussian(0, n=256)
    for sigma, want in ((0.5, 0.500), (1.0, 0.508)):
        a = la.LLNDiag().weights(sigma * q, sigma * k)
        assert 1 - inst.spectral_gap(a) == pytest.approx(want, abs=0.01)
    assert "measure the LLN part" in inst.report(la.LLNDiag(), q, k).refused["spectral_gap"]


# --------------------------------------------------------------------------------------------------- reports


def test_report_has_every_number_or_its_reason(rng):
    q, k, v = rng.normal(size=(3, 2, 40, 8))
    found = inst.report(la.LLN(), q, k, v)
    assert found.numbers["entropy"].shape == (2,)
    assert found.refused == {}
    assert found.numbers["to_softmax"].output_error is not None
    assert "entropy" in str(found)
    causal = inst.report(la.Linear(), q, k, causal=True)
    assert list(causal.refused) == ["spectral_gap"]
    assert "triangular" in causal.refused["spectral_gap"]
    zeros = inst.report(la.Linear("relu"), q, k)
    assert "lognormal_fit" in zeros.numbers or "needs weights" in zeros.refused["lognormal_fit"]
    with pytest.warns(RuntimeWarning):
        signed = inst.report(la.Performer(8, features="trig"), q, k)
    assert set(signed.numbers) == {"negative_mass"}
    attend = la.Performer(64)
    whole = inst.report(attend, 0.3 * q, 0.3 * k, v)
    assert whole.numbers["performer_report"].skill_error.shape == (2,)
    assert "full rows" in inst.report(attend, q, k, v, causal=True).refused["performer_report"]


def test_performer_report_on_gaussian_data(rng):
    """N(0, 1) at D = 64: phi = 16, and a relative variance of 3.5e4 at R = 256."""
    q, k, v = rng.normal(size=(3, 2, 2000, 64))
    with pytest.warns(UserWarning, match=r"above ln\(1 \+ R\) = 5.55 in 2 of 2 heads"):
        report = inst.performer_report(la.Performer(), q[:, :200], k[:, :200], v[:, :200])
    assert report.limit == math.log(257)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = inst.performer_report(la.Performer(), q, k, v)
    np.testing.assert_allclose(report.phi, 16, rtol=0.02)
    np.testing.assert_allclose(report.relative_variance, 3.5e4, rtol=0.5)
    assert np.all(report.skill_error > 1)
    x, y = (z / 64**0.25 for z in (q, k))
    want = [np.mean(np.sum(a * a, -1)) + np.mean(np.sum(b * b, -1)) + 2 * a.mean(0) @ b.mean(0) for a, b in zip(x, y)]
    np.testing.assert_allclose(report.phi, want, rtol=1e-10)
    assert np.all(report.phi_full <= report.phi_scale)
    assert np.all(report.phi_scale <= report.phi_centre)
    assert np.all(report.phi_centre <= report.phi_none)


def test_performer_report_sees_the_calibration(rng):
    """The value's own phi is that of its rule; batches and masks are pooled."""
    q, k, v = 0.4 * rng.normal(size=(3, 2, 3, 50, 6))
    k = k + rng.normal(size=6)
    mask = rng.random((2, 1, 50)) > 0.2
    for rule in ("centre", "scale", "full"):
        attend = la.Performer(512).calibrate(q, k, rule=rule, key_mask=mask)
        report = inst.performer_report(attend, q, k, v, key_mask=mask)
        assert report.phi.shape == (3,)
        assert report.skill_error.shape == (2, 3)
        np.testing.assert_allclose(report.phi, getattr(report, f"phi_{rule}"), rtol=1e-6)
        assert np.all(report.phi < report.phi_none)
    hyp = inst.performer_report(la.Performer(512, features="hyperbolic"), q, k, v)
    phi = hyp.phi
    np.testing.assert_allclose(hyp.relative_variance, np.expm1(phi) * (1 - np.exp(-phi)) / 512)


def test_performer_report_refuses(rng):
    q = rng.normal(size=(4, 3))
    with pytest.raises(ValueError, match=r"`mech` must estimate softmax, got features='relu'\."):
        inst.performer_report(la.Performer(8, features="relu"), q, q, q)
    with pytest.raises(TypeError, match=r"`mech` must be a Performer, got Linear\(\)\."):
        inst.performer_report(la.Linear(), q, q, q)
