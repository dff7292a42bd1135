"""Instruments against exact values, theorems, and a second way of computing the same number."""

from __future__ import annotations

import numpy as np
import pytest

from linattn import instruments as inst
from linattn.audit.quadratic import FORMULAS

PER_ROW = [
    inst.entropy,
    inst.relative_entropy,
    inst.concentration,
    inst.log_variance,
    inst.mean_distance,
    lambda a, **options: inst.mass_within(a, 2, **options),
    lambda a, **options: inst.block_mass(a, 3, **options),
    inst.sink,
]
NAMES = ["entropy", "relative_entropy", "concentration", "log_variance", "mean_distance", "mass", "block", "sink"]


def softmax(scores, tau=1.0):
    a = np.exp((scores - scores.max(-1, keepdims=True)) / tau)
    return a / a.sum(-1, keepdims=True)


def stochastic(rng, n, m=None):
    """Rows that sum to 1, from nearly uniform to nearly one key."""
    return softmax(rng.normal(size=(n, m or n)), rng.uniform(0.1, 6.0))


# ------------------------------------------------------------------------------------------- exact values


@pytest.mark.parametrize("n", [1, 2, 5, 16])
def test_uniform_one_token_identity_permutation(n, rng):
    cases = {
        "uniform": (np.full((n, n), 1 / n), np.log2(n), 1, 0),
        "one token": (np.eye(n)[np.zeros(n, dtype=int)], 0, 1, 0),
        "identity": (np.eye(n), 0, 0 if n > 1 else 1, np.log2(n)),
        "permutation": (np.eye(n)[rng.permutation(n)], 0, 0 if n > 1 else 1, np.log2(n)),
    }
    for name, (a, entropy, gap, selectivity) in cases.items():
        assert inst.entropy(a) == pytest.approx(entropy, abs=1e-14), name
        assert inst.spectral_gap(a) == pytest.approx(gap, abs=1e-13), name
        assert inst.selectivity(a) == pytest.approx(selectivity, abs=1e-14), name
        assert inst.concentration(a) == pytest.approx(0 if name == "uniform" else n - 1, abs=1e-13), name
        assert inst.support(a) == pytest.approx([n if name == "uniform" else 1] * 3), name
        assert inst.log_variance(a) == pytest.approx(0, abs=1e-28), name
        assert inst.dead_rows(a) == 0, name


def test_locality_of_uniform_weights():
    """The closed forms, and their values at N = 101, w = 7, for blocks too."""
    n, w = 101, 7
    full = np.full((n, n), 1 / n)
    past = np.tri(n) / np.arange(1, n + 1)[:, None]
    assert inst.mean_distance(full) == pytest.approx((n**2 - 1) / (3 * n), rel=1e-13)
    assert inst.mean_distance(past, causal=True) == pytest.approx((n - 1) / 4, rel=1e-13)
    assert inst.mass_within(full, w) == pytest.approx(((2 * w + 1) * n - w * (w + 1)) / n**2, rel=1e-13)
    harmonic = sum(1 / x for x in range(w + 2, n + 1))
    assert inst.mass_within(past, w, causal=True) == pytest.approx((w + 1) / n * (1 + harmonic), rel=1e-13)
    assert inst.mean_distance(full) == pytest.approx(33.6634, abs=1e-4)
    assert inst.mean_distance(past, causal=True) == pytest.approx(25.0, abs=1e-12)
    assert inst.mass_within(full, w) == pytest.approx(0.143025, abs=1e-6)
    assert inst.mass_within(past, w, causal=True) == pytest.approx(0.275598, abs=1e-6)
    assert inst.block_mass(np.full((12, 12), 1 / 12), 4) == pytest.approx(1 / 3)
    assert inst.mean_distance(full, signed=True) == pytest.approx(0, abs=1e-12)
    assert inst.mean_distance(past, signed=True, causal=True) == pytest.approx(25.0, abs=1e-12)


def test_relative_entropy_of_uniform_weights_is_one():
    """Whatever each row sees; a row with one key is left out."""
    n = 9
    past = np.tri(n) / np.arange(1, n + 1)[:, None]
    assert inst.relative_entropy(past, causal=True) == pytest.approx(1, rel=1e-14)
    mask = np.arange(n) % 2 == 0
    seen = np.tri(n) * mask
    seen /= seen.sum(-1, keepdims=True)
    assert inst.relative_entropy(seen, causal=True, key_mask=mask) == pytest.approx(1, rel=1e-14)
    assert inst.log_variance(seen, causal=True, key_mask=mask, scope="global") == pytest.approx(0, abs=1e-28)


def test_sink_reads_one_key(rng):
    a = stochastic(rng, 6)
    assert inst.sink(a) == pytest.approx(a[:, 0].mean())
    assert inst.sink(a, 4) == pytest.approx(a[:, 4].mean())


# ----------------------------------------------------------------------------------------------- theorems


@pytest.mark.parametrize("tau", [0.3, 1.0, 3.0])
def test_temperature(tau, rng):
    """d H / d tau = Var_p(a) / tau^3 (nats); d sum p^2 / d tau = -(2 / tau^2) Cov_p(p, a)."""
    scores, h = rng.normal(size=(20, 15)), 1e-3 * tau

    def slope(f):
        def central(step):
            return (f(softmax(scores, tau + step)) - f(softmax(scores, tau - step))) / (2 * step)

        return (4 * central(h / 2) - central(h)) / 3  # Richardson: error of order h^4

    p = softmax(scores, tau)
    mean = np.sum(p * scores, -1)
    variance = np.sum(p * scores**2, -1) - mean**2
    covariance = np.sum(p**2 * scores, -1) - np.sum(p**2, -1) * mean
    assert slope(inst.entropy) * np.log(2) == pytest.approx(np.mean(variance) / tau**3, rel=1e-8)
    want = np.mean(-2 / tau**2 * covariance) * scores.shape[-1]
    assert slope(inst.concentration) == pytest.approx(want, rel=1e-8)


def test_inequalities_hold_for_any_weights(rng):
    """1/max <= 1/sum A^2 <= 2^H <= n; the bounds of |lambda_2|; TV, KL, Hellinger, JS and the outputs."""
    slack = 1e-12
    for _ in range(1000):
        n = int(rng.integers(2, 51))
        a, b = stochastic(rng, n), stochastic(rng, n)
        exp_entropy, inverse_square, inverse_max = inst.support(a, per_row=True)
        assert np.all(inverse_max + slack >= 1)
        assert np.all(inverse_max <= inverse_square * (1 + slack))
        assert np.all(inverse_square <= exp_entropy * (1 + slack))
        assert np.all(exp_entropy <= n * (1 + slack))

        second = 1 - inst.spectral_gap(a)
        dobrushin = np.max(np.sum(abs(a[:, None] - a), -1)) / 2
        assert second <= dobrushin + slack  # |lambda_2| <= max TV(A_t, A_t')
        assert second**2 <= np.sum(a**2) - 1 + slack  # Schur
        assert np.sum(a**2) - 1 == pytest.approx(inst.concentration(a), abs=1e-10)  # = M^2 Var(A)
        assert inst.concentration(a) == pytest.approx(n**2 * np.var(a), rel=1e-9, abs=1e-12)

        v = rng.normal(size=(n, 2))
        c = inst.compare(a[:, None], b[:, None])  # each row a matrix of its own
        assert np.all(c.tv**2 <= c.kl * np.log(2) / 2 + slack)  # Pinsker, in nats
        assert np.all(c.hellinger2 <= c.tv + slack)
        assert np.all(c.tv <= np.sqrt(c.hellinger2 * (2 - c.hellinger2)) + slack)
        assert np.all(c.js <= c.tv + slack)
        assert np.all(abs(a @ v - b @ v) <= c.tv[:, None] * np.ptp(v, axis=0) + slack)
        assert -slack <= inst.selectivity(a) <= np.log2(n) + slack


def test_selectivity_is_a_mean_divergence(rng):
    for causal in (False, True):
        a = softmax(np.where(np.tri(12, dtype=bool) | (not causal), rng.normal(size=(12, 12)), -np.inf))
        mean_row = np.broadcast_to(a.mean(0), a.shape)
        assert inst.selectivity(a, causal=causal) == pytest.approx(inst.compare(a, mean_row).kl, rel=1e-12)


def test_permutations_leave_all_but_locality(rng):
    a, order = stochastic(rng, 13), rng.permutation(13)
    both, keys = a[order][:, order], a[:, order]
    for measure in (inst.entropy, inst.relative_entropy, inst.concentration, inst.log_variance, inst.selectivity):
        assert measure(both) == pytest.approx(measure(a), rel=1e-12)
        assert measure(keys) == pytest.approx(measure(a), rel=1e-12)
    assert inst.spectral_gap(both) == pytest.approx(inst.spectral_gap(a), rel=1e-10)
    assert abs(inst.mean_distance(both) - inst.mean_distance(a)) > 1e-3


@pytest.mark.parametrize("n, r", [(30, 4), (7, 7), (5, 9), (6, 1), (1, 3)])
def test_gap_from_features(n, r, rng):
    """R x R eigenvalues are those of A."""
    phi_q, phi_k = rng.uniform(size=(2, 3, n, r))
    a = phi_q @ np.swapaxes(phi_k, -1, -2)
    a /= a.sum(-1, keepdims=True)
    np.testing.assert_allclose(inst.spectral_gap_features(phi_q, phi_k), inst.spectral_gap(a), rtol=0, atol=1e-13)


def test_gap_removes_one_eigenvalue_once():
    """Two separate blocks have the eigenvalue 1 twice: gap 0."""
    a = np.kron(np.eye(2), np.full((3, 3), 1 / 3))
    assert inst.spectral_gap(a) == pytest.approx(0, abs=1e-14)


def test_gap_of_visible_tokens(rng):
    """A hidden token is left out as key and as query."""
    a, mask = np.zeros((6, 6)), np.array([1, 1, 0, 1, 1, 0], dtype=bool)
    a[:, mask] = stochastic(rng, 6, 4)
    want = inst.spectral_gap(a[mask][:, mask])
    assert inst.spectral_gap(a, key_mask=mask) == pytest.approx(want, abs=1e-13)
    a[~mask] = 0
    assert inst.spectral_gap(a, key_mask=mask) == pytest.approx(want, abs=1e-13)


# -------------------------------------------------------------------------------------- log-normal theory


@pytest.mark.parametrize("sigma", [0.5, 0.8, 1.0, 1.2])
def test_softmax_of_gaussian_scores_is_log_normal(sigma):
    """H = log2 N - V / (2 ln 2), row log-variance near V, |lambda_2| = sqrt((e^V - 1) / N); V = sigma^4."""
    n, model = 512, sigma**4
    found = []
    for seed in range(5):
        q, k = sigma * np.random.default_rng(seed).normal(size=(2, n, 64))
        a = FORMULAS["Softmax"].weights(q, k)
        gap = inst.spectral_gap(a) if seed < 2 else np.nan
        scores = q @ (k - k.mean(0)).T / 8
        assert inst.log_variance(a) == pytest.approx(np.mean(np.sum(scores**2, -1)) / n, rel=1e-10)
        found.append((inst.entropy(a), inst.log_variance(a), 1 - gap))
    entropy, variance, second = np.nanmean(found, axis=0)
    assert entropy == pytest.approx(np.log2(n) - model / (2 * np.log(2)), abs=0.02 if sigma < 1.1 else 0.06)
    assert variance == pytest.approx(model, rel=0.02)
    assert second == pytest.approx(np.sqrt(np.expm1(model) / n), rel=0.1)


def test_log_variance_scopes(rng):
    """The global one takes in the spread of the normalisers."""
    a = FORMULAS["Softmax"].weights(*(1.5 * rng.normal(size=(2, 256, 64))))
    logs = np.log(a)
    assert inst.log_variance(a) == pytest.approx(np.mean(np.var(logs, axis=-1)), rel=1e-12)
    assert inst.log_variance(a, scope="global") == pytest.approx(np.var(logs), rel=1e-12)
    assert inst.log_variance(a, scope="global") > inst.log_variance(a)


# ------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("measure", PER_ROW, ids=NAMES)
def test_rows_and_leading_axes(measure, rng):
    """Per row, its mean, and one number for each leading index."""
    a = np.stack([stochastic(rng, 8) for _ in range(6)]).reshape(2, 3, 8, 8)
    each, mean = measure(a, per_row=True), measure(a)
    assert each.shape == (2, 3, 8)
    np.testing.assert_allclose(mean, each.mean(-1), rtol=1e-13)
    np.testing.assert_allclose(mean[1, 2], measure(a[1, 2]), rtol=1e-13)
    np.testing.assert_allclose(measure(3 * a, renormalize=True), mean, rtol=1e-12)


@pytest.mark.parametrize("measure", PER_ROW, ids=NAMES)
def test_dead_rows_are_left_out(measure, rng):
    a = stochastic(rng, 8)
    alive = measure(np.delete(a, 3, axis=0), per_row=True)
    a[3] = 0
    each = measure(a, per_row=True)
    assert np.isnan(each[3])
    assert measure(a) == pytest.approx(np.nanmean(each))
    assert inst.dead_rows(a) == 1
    if measure in (inst.entropy, inst.relative_entropy, inst.concentration, inst.log_variance, inst.sink):
        assert measure(a) == pytest.approx(np.mean(alive))
    assert np.isnan(measure(np.zeros((4, 4))))
    assert inst.dead_rows(np.zeros((2, 4, 4))).tolist() == [4, 4]


@pytest.mark.parametrize("measure", PER_ROW, ids=NAMES)
def test_a_sample_of_rows(measure, rng):
    """Within six of its own standard errors; the same each time; exact for all rows."""
    a = FORMULAS["Softmax"].weights(*rng.normal(size=(2, 2, 400, 16)))
    whole, sample = measure(a), measure(a, rows=100)
    assert np.all(abs(sample.value - whole) <= 6 * sample.error)
    assert np.all(sample.error > 0)
    np.testing.assert_array_equal(measure(a, rows=100), sample)
    everything = measure(a, rows=400)
    np.testing.assert_allclose(everything.value, whole, rtol=1e-12)
    assert not np.any(everything.error)


def test_any_array_library(xp, rng):
    a = stochastic(rng, 6)
    assert inst.entropy(xp.asarray(a)) == pytest.approx(inst.entropy(a), rel=1e-14)
    mask = xp.asarray(np.ones(6, dtype=bool))
    assert inst.sink(xp.asarray(a), key_mask=mask) == pytest.approx(inst.sink(a))
    assert isinstance(inst.entropy(xp.asarray(a)), float)


def test_inputs_are_left_alone(rng):
    a = stochastic(rng, 6)
    a.flags.writeable = False
    kept = a.copy()
    inst.entropy(a, renormalize=True)
    inst.compare(a, a[::-1], v=a)
    inst.spectral_gap(a)
    np.testing.assert_array_equal(a, kept)


def test_short_dtypes_get_a_wider_tolerance(rng):
    a = stochastic(rng, 50).astype("float32")
    assert inst.entropy(a) == pytest.approx(inst.entropy(a.astype(float), renormalize=True), rel=1e-5)


# ------------------------------------------------------------------------------------------- two matrices


def test_compare_with_itself_and_with_nothing_in_common():
    a = np.eye(4)
    same = inst.compare(a, a, v=np.arange(4.0)[:, None])
    assert same[:8] == pytest.approx([0] * 8)
    assert same.output_error == 0
    other = inst.compare(a, a[::-1])
    assert other.tv == other.tv_max == other.js == other.hellinger2 == 1
    assert other.kl == np.inf
    assert other.output_error is None
    assert other.tv_uniform == pytest.approx(3 / 4)


def test_compare_by_hand(rng):
    a, b = np.stack([stochastic(rng, 7, 9) for _ in range(3)]), stochastic(rng, 7, 9)
    v = rng.normal(size=(9, 2))
    c = inst.compare(a, b, v=v)
    assert c.tv.shape == (3,)
    np.testing.assert_allclose(c.tv, np.mean(np.sum(abs(a - b), -1) / 2, -1))
    np.testing.assert_allclose(c.kl, np.mean(np.sum(a * np.log2(a / b), -1), -1))
    np.testing.assert_allclose(c.hellinger2_max, np.max(1 - np.sum(np.sqrt(a * b), -1), -1))
    norms = [np.linalg.norm(x @ v - b @ v) / np.linalg.norm(b @ v) for x in a]
    np.testing.assert_allclose(c.output_error, norms)
    assert np.all(c.js <= c.js_max)


def test_compare_leaves_out_rows_dead_in_either(rng):
    a, b = stochastic(rng, 5), stochastic(rng, 5)
    a[1], b[2] = 0, 0
    c = inst.compare(a, b)
    assert c.dead == 2
    kept = [0, 3, 4]
    assert c.tv == pytest.approx(inst.compare(a[kept], b[kept]).tv)
    assert np.isnan(inst.compare(np.zeros((2, 2)), np.eye(2)).tv)


# -------------------------------------------------------------------------------------------------- errors

A = np.full((3, 3), 1 / 3)
SIGNED = np.array([[1.5, -0.5, 0], [0, 1, 0], [0, 0, 1]])

ERRORS = [
    (ValueError, r"`weights` must be non-negative, got -0.5 at \(0, 1\)", lambda: inst.entropy(SIGNED)),
    (
        ValueError,
        r"`weights` must be non-negative, got nan at \(1, 2\)",
        lambda: inst.sink(A + np.diag([0, np.nan], 1)),
    ),
    (ValueError, r"rows that sum to 1 within 1e-09 .*got 0.9\d* in row \(0,\)", lambda: inst.entropy(0.9 * A)),
    (ValueError, r"rows that sum to 1 within 0.0001", lambda: inst.entropy((0.9 * A).astype("float32"))),
    (ValueError, r"must be finite, got a row that sums to inf", lambda: inst.sink(A / 1e-320, renormalize=True)),
    (ValueError, r"must be 0 where nothing is visible, got 0.33\d* at \(0, 1\)", lambda: inst.sink(A, causal=True)),
    (ValueError, r"`causal` needs.*N = 2 and M = 3", lambda: inst.entropy(A[:2], causal=True)),
    (ValueError, r"`key_mask` must have shape .*M = 3", lambda: inst.entropy(A, key_mask=np.ones(4, dtype=bool))),
    (TypeError, r"`key_mask` must be an array of bool", lambda: inst.entropy(A, key_mask=np.ones(3))),
    (TypeError, r"`weights` must be an array, got list", lambda: inst.entropy([[1.0]])),
    (TypeError, r"`weights` has dtype int64", lambda: inst.entropy(np.eye(3, dtype="int64"))),
    (ValueError, r"`weights` must have at least 2 axes", lambda: inst.entropy(A[0])),
    (TypeError, r"`causal` must be True or False", lambda: inst.entropy(A, causal=1)),
    (TypeError, r"`per_row` must be True or False", lambda: inst.entropy(A, per_row="yes")),
    (ValueError, r"`rows` and `per_row=True` exclude each other", lambda: inst.entropy(A, rows=2, per_row=True)),
    (ValueError, r"`rows` must be at most the number of rows 3, got 4", lambda: inst.entropy(A, rows=4)),
    (ValueError, r"`rows` must be at least 2, got 1", lambda: inst.entropy(A, rows=1)),
    (TypeError, r"`rows` must be an integer", lambda: inst.entropy(A, rows=2.0)),
    (ValueError, r"`scope` must be one of 'row', 'global'", lambda: inst.log_variance(A, scope="column")),
    (ValueError, r'`scope="global"` is one number', lambda: inst.log_variance(A, scope="global", rows=2)),
    (ValueError, r"`w` must be at least 0, got -1", lambda: inst.mass_within(A, -1)),
    (ValueError, r"`b` must be at least 1, got 0", lambda: inst.block_mass(A, 0)),
    (ValueError, r"`s` must be one of the 3 keys, got 3", lambda: inst.sink(A, 3)),
    (ValueError, r"must not be causal: the eigenvalues of a triangular", lambda: inst.spectral_gap(A, causal=True)),
    (ValueError, r"needs N == M >= 1, got N = 2 queries and M = 3", lambda: inst.spectral_gap(A[:2])),
    (ValueError, r"live rows, got row \(1,\) with sum 0", lambda: inst.spectral_gap(np.diag([1.0, 0.0]))),
    (ValueError, r"`weights` must be non-negative", lambda: inst.spectral_gap(SIGNED)),
    (ValueError, r"`phi_k` must be non-negative and finite, got -0.5", lambda: inst.spectral_gap_features(A, SIGNED)),
    (ValueError, r"`phi_q` must be non-negative and finite, got inf", lambda: inst.spectral_gap_features(A / 0.0, A)),
    (ValueError, r"live rows, got row \(0,\)", lambda: inst.spectral_gap_features(0 * A, A)),
    (ValueError, r"N = 3 queries and M = 2 keys", lambda: inst.spectral_gap_features(A, A[:2])),
    (ValueError, r"`a` and `b` must have the same last two axes", lambda: inst.compare(A, np.eye(4))),
    (ValueError, r"`b` must have rows that sum to 1", lambda: inst.compare(A, 2 * A)),
    (ValueError, r"leading axes of a, b must broadcast", lambda: inst.compare(np.stack([A] * 2), np.stack([A] * 3))),
    (ValueError, r"`v` must have as many tokens as there are keys, 3", lambda: inst.compare(A, A, v=np.ones((2, 2)))),
]


@pytest.mark.parametrize("kind, text, call", ERRORS, ids=[text for _, text, _ in ERRORS])
def test_errors(kind, text, call):
    with np.errstate(all="ignore"), pytest.raises(kind, match=text) as caught:
        call()
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)
