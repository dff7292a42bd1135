"""LLN and LLNDiag: two row-stochastic factors, scales matched to moments, blocks of softmax; and their authors' traps.

Values, gradients and streams over all mechanisms stand in the other files.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from cases import assert_bits, assert_close, assert_gradients_close, backends_of, complex_step

import linattn as la
from linattn import _lognormal, _scales
from linattn.audit import lln as formulas
from linattn.audit.quadratic import formula_of

FIXED = la.LLN(alpha=2.0, beta=1.5)


def gaussian(rng, n=23, d=6, e=4, lead=(2,), sigma=1.0):
    return [sigma * rng.normal(size=(*lead, n, width)) for width in (d, d)] + [rng.normal(size=(*lead, n, e))]


def softmax(x, axis=-1):
    p = np.exp(x - np.max(x, axis=axis, keepdims=True))
    return p / np.sum(p, axis=axis, keepdims=True)


# -- the definition -----------------------------------------------------------------------------------------------


def test_two_stochastic_factors(rng):
    """A = W Pi, Pi softmax over keys of beta k, W softmax over channels of alpha q + logsumexp(beta k)."""
    q, k, v = gaussian(rng)
    x, y = 2.0 * q, 1.5 * k
    z = np.log(np.sum(np.exp(y), axis=-2, keepdims=True))
    w, pi = softmax(x + z), np.swapaxes(softmax(y, axis=-2), -1, -2)
    assert_close(FIXED.weights(q, k), w @ pi)
    assert_close(FIXED(q, k, v), w @ (pi @ v))
    np.testing.assert_allclose(np.sum(FIXED.weights(q, k), axis=-1), 1, rtol=1e-14)
    small = np.sort(abs(np.linalg.eigvals(pi @ w)), axis=-1)
    large = np.sort(abs(np.linalg.eigvals(w @ pi)), axis=-1)[..., -6:]
    np.testing.assert_allclose(large, small, atol=1e-12)


def test_what_cancels(rng):
    """A(c q, alpha / c) = A; alpha = beta = 0 is uniform; a shift of a row of q or of all of k changes nothing."""
    q, k, v = gaussian(rng)
    want = FIXED(q, k, v, causal=True)
    assert_close(la.LLN(alpha=0.5, beta=1.5)(4 * q, k, v, causal=True), want)
    assert_close(FIXED(q + rng.normal(size=(2, 23, 1)), k - 7.0, v, causal=True), want)
    uniform = la.LLN(alpha=0.0, beta=0.0)(q, k, v, causal=True)
    assert_close(uniform, np.cumsum(v, axis=-2) / np.arange(1, 24)[:, None])
    shift = 300 * rng.normal(size=6)  # of a channel of k, taken off the same channel of q
    assert_close(FIXED(q - shift / 2.0, k + shift / 1.5, v, causal=True), want, 1e-11)
    assert np.max(abs(FIXED(q, k + shift / 300, v) - FIXED(q, k, v))) > 1e-2  # of k alone it matters


@pytest.mark.parametrize("causal", [False, True])
def test_identities_of_the_gradient(causal, rng):
    """Row shifts of q, one shift of each channel of q and k, one of all of k: no gradient along them."""
    q, k, v = gaussian(rng, lead=())
    attend = la.LLN(alpha=1.0, beta=1.0)
    d_out = rng.normal(size=v.shape)
    for backend in backends_of(attend):
        d_q, d_k, d_v = attend.vjp(q, k, v, causal=causal, backend=backend)[1](d_out)
        size = np.max(abs(d_k))
        assert np.max(abs(np.sum(d_q, axis=-1))) <= 1e-13 * size
        assert np.max(abs(np.sum(d_q, axis=0) - np.sum(d_k, axis=0))) <= 1e-12 * size
        assert abs(np.sum(d_k)) <= 1e-12 * size
        assert_close(np.sum(d_v, axis=0), np.sum(d_out, axis=0), 1e-13)


# -- the law of a log-sum and the scales --------------------------------------------------------------------------

TABLE = {  # D: a, b of the line, exact alpha at sigma = 1, V at the authors' chi = 9.1205
    8: (0.33899, -0.35808, 1.4075, 2.746),
    16: (0.25379, -0.38031, 1.6533, 1.950),
    32: (0.19376, -0.37617, 1.8902, 1.409),
    64: (0.14948, -0.35362, 2.1151, 1.029),
    96: (0.12863, -0.33443, 2.2407, 0.859),
    128: (0.11559, -0.31887, 2.3272, 0.756),
    256: (0.08897, -0.27699, 2.5271, 0.556),
}


@pytest.mark.parametrize("dim", TABLE)
def test_table_of_the_law(dim):
    a, b, alpha, at_paper = TABLE[dim]
    chis = np.arange(4, 9.01, 0.5)
    line = np.polyfit(chis, [_lognormal.variance(chi, dim) for chi in chis], 1)
    np.testing.assert_allclose(line, (a, b), atol=6e-6)
    chi, _ = _lognormal.matched(1.0, dim)
    assert math.sqrt(chi / 2) == pytest.approx(alpha, abs=6e-5)
    assert _lognormal.variance(9.1205, dim) == pytest.approx(at_paper, abs=6e-4)


@pytest.mark.parametrize("dim", [1, 2, 8, 64, 1000])
def test_matching_inverts_the_law(dim):
    """From nearly uniform to nearly one key; V rises; its derivative is that of a difference; the oracle agrees."""
    last = 0.0
    for target in (1e-9, 1e-5, 1e-3, 0.1, 1.0, 3.0, 40.0, 2000.0):
        chi, slope = _lognormal.matched(target, dim)
        assert chi > last
        last = chi
        assert _lognormal.variance(chi, dim) == pytest.approx(target, rel=3e-7 if chi < 1e-3 else 1e-9)
        near = [_lognormal.variance(chi * (1 + h), dim) for h in (-1e-3, 1e-3)]
        assert (near[1] - near[0]) / (2e-3 * chi) == pytest.approx(slope, rel=1e-5)
        if 1e-3 < target < 10:
            assert formulas.log_variance(chi, dim) == pytest.approx(target, rel=1e-9)
            assert formulas.chi_of(target, dim) == pytest.approx((chi, slope), rel=1e-8)


def test_one_channel_and_the_small_end():
    """D = 1: V = chi exactly. chi -> 0: V = chi / D + chi^2 (D - 1) / (2 D^2). Beyond the table the line goes on."""
    for chi in (1e-3, 0.5, 9.0, 400.0, 1e4):
        assert _lognormal.variance(chi, 1) == pytest.approx(chi, rel=1e-11)
        assert _lognormal.matched(chi, 1) == pytest.approx((chi, 1.0), rel=1e-9)
    for dim in (2, 64):
        series = 3e-4 / dim + 9e-8 * (dim - 1) / (2 * dim**2)
        assert _lognormal.law(3e-4, dim).variance == pytest.approx(series, rel=1e-7)
    far, slope = _lognormal.matched(1e9, 64)
    assert slope * far == pytest.approx(1e9, rel=1e-3)


def test_law_against_simulation():
    """Mean, variance and third cumulant of ln S, each within six standard errors."""
    n = 200_000
    logs = np.log(np.sum(np.exp(1.5 * np.random.default_rng(7).normal(size=(n, 8))), axis=-1))
    law = _lognormal.law(2.25, 8)
    centred = logs - logs.mean()
    assert abs(logs.mean() - law.mean) < 6 * logs.std() / math.sqrt(n)
    for power, want in ((2, law.variance), (3, law.third)):
        terms = centred**power
        assert abs(terms.mean() - want) < 6 * terms.std() / math.sqrt(n)


def test_skewness_of_the_numerator():
    for sigma, want in ((0.5, 0.674), (1.0, 0.886), (1.5, 0.743)):
        a, b = _scales.PAPER
        law = _lognormal.law((sigma**4 - b) / a, 64)
        assert law.third / law.variance**1.5 == pytest.approx(want, abs=1e-3)


def test_the_authors_line():
    """sigma = 1 gives alpha = 2.1355; a number of the tensor, mean removed, ddof 1."""
    q, k, _ = gaussian(np.random.default_rng(0), n=400, d=64)
    q, k = ((x - x.mean()) / x.std(ddof=1) for x in (q, k))
    attend = la.LLN().calibrate(q + 3.0, k - 2.0)
    assert (attend.alpha, attend.beta) == pytest.approx((2.1355, 2.1355), abs=1e-4)
    assert attend == la.LLN(alpha=attend.alpha, beta=attend.beta)


@pytest.mark.parametrize("calibration", ["paper", "exact", (0.2, -0.3)])
def test_scales_follow_the_scale_of_the_inputs(calibration, rng):
    """(3 q, k / 3) gives (alpha / 3, 3 beta), and the same result."""
    q, k, v = gaussian(rng, sigma=1.3)
    attend = la.LLN(calibration=calibration)
    one, other = attend.calibrate(q, k), attend.calibrate(3 * q, k / 3)
    assert (other.alpha, other.beta) == pytest.approx((one.alpha / 3, 3 * one.beta), rel=1e-12)
    assert_close(attend(3 * q, k / 3, v), attend(q, k, v), 1e-12)
    assert_close(attend(q, k, v), one(q, k, v), 1e-13)


def test_small_deviations():
    """The line: alpha grows without bound. Exact: alpha -> sigma_k sqrt(D / 2), and attention tends to uniform."""
    q, k, v = gaussian(np.random.default_rng(3), n=200, d=16)
    attend = la.LLN(calibration="exact").calibrate(1e-3 * q, 1e-3 * k)
    assert attend.alpha == pytest.approx(1e-3 * k.std(ddof=1) * math.sqrt(8), rel=1e-5)
    assert_close(attend(1e-3 * q, 1e-3 * k, v), np.broadcast_to(v.mean(-2, keepdims=True), v.shape), 1e-4)
    assert la.LLN().calibrate(1e-3 * q, 1e-3 * k).alpha > 1000


def test_scopes(rng):
    """One number, one a head, one a sequence and head: each group as if it were alone."""
    q, k, v = gaussian(rng, lead=(2, 3))
    q = q * np.array([0.5, 1.0, 2.0])[:, None, None]
    tensor, head, sample = (la.LLN(scope=scope).calibrate(q, k) for scope in ("tensor", "head", "sample"))
    assert isinstance(tensor.alpha, float)
    assert np.shape(head.alpha) == (3,)
    assert np.shape(sample.beta) == (2, 3)
    for i in range(3):
        assert la.LLN().calibrate(q[:, i], k[:, i]).alpha == pytest.approx(head.alpha[i], rel=1e-13)
        assert la.LLN().calibrate(q[1, i], k[1, i]).beta == pytest.approx(sample.beta[1][i], rel=1e-13)
    for scope, frozen in (("head", head), ("sample", sample)):
        assert_close(la.LLN(scope=scope)(q, k, v), frozen(q, k, v))
        assert_close(frozen(q, k, v, causal=True), formula_of(frozen)(q, k, v, causal=True))
    assert_close(
        la.LLN(scope="head").calibrate(q[0], k[0])(q[0], k[0], v[0]), la.LLN(scope="sample")(q[:1], k[:1], v[:1])[0]
    )


def test_queries_that_share_keys_share_alpha(rng):
    """Grouped queries: the state stays one for each head of keys."""
    q, k, v = rng.normal(size=(2, 4, 2, 23, 6)), rng.normal(size=(2, 4, 1, 23, 6)), rng.normal(size=(2, 4, 1, 23, 5))
    attend = la.LLN(scope="head").calibrate(q, k)
    assert np.shape(attend.alpha) == (4, 1)
    assert attend.init_state(k, v).arrays.sums.shape == (2, 4, 1, 6, 6)
    assert_close(attend(q, k, v), la.LLN(scope="head")(q, k, v))


@pytest.mark.parametrize("calibration", ["paper", "exact"])
def test_differentiated_statistics_are_another_gradient(calibration, rng):
    """Each against its own formula; they differ by percents."""
    args = gaussian(rng, n=9, lead=())
    d_out = rng.normal(size=args[2].shape)
    found = {}
    for statistics in ("detached", "differentiated"):
        attend = la.LLN(calibration=calibration, statistics=statistics)
        formula = formula_of(attend)
        want = complex_step(lambda *moved, f=formula: f(*moved), args, d_out, one_by_one=True)
        found[statistics] = attend.vjp(*args)[1](d_out)
        assert_gradients_close(found[statistics], want)
    (a, *_), (b, *_) = found.values()
    assert np.linalg.norm(a - b) > 0.005 * np.linalg.norm(a)


@pytest.mark.jax
def test_traced_arrays():
    """The line is a formula, also where values cannot be read: NaN for no variance. The quadrature must read them."""
    import jax
    import jax.numpy as jnp

    q, k, v = (jnp.asarray(x) for x in gaussian(np.random.default_rng(0)))
    attend = la.LLN()
    assert_close(jax.jit(attend)(q, k, v), attend(q, k, v), 1e-5)
    assert np.isnan(jax.jit(attend)(jnp.ones_like(q), k, v)).all()
    with pytest.raises(ValueError, match="must read the values of q and k, got traced arrays"):
        jax.jit(la.LLN(calibration="exact"))(q, k, v)
    exact = la.LLN(calibration="exact").calibrate(q, k)
    assert_close(jax.jit(exact)(q, k, v), la.LLN(calibration="exact")(q, k, v), 1e-5)


# -- hard inputs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-12), ("float32", 2e-6)])
@pytest.mark.parametrize("case", ["opposed", "outlier", "query", "drift", "both"])
def test_far_out_of_the_range_of_exp(case, dtype, tolerance, causal, rng):
    """One channel opposed by 200, a key at +200, a query at +200, keys drifting over +-300."""
    q, k, v = gaussian(rng, n=96, d=8)
    if case == "opposed":
        q[..., 0] -= 200
        k[..., 40, 0] += 200
    elif case == "outlier":
        k[..., 60, 3] += 200
    elif case == "query":
        q[..., 60, 3] += 200
    elif case == "drift":
        k += np.linspace(-300, 300, 96)[:, None] * np.sign(np.arange(8) - 3.5)
    else:
        q[..., ::2] += 200
        k[..., 1::2] -= 200
    attend = la.LLN(alpha=1.0, beta=1.0)
    args = [x.astype(dtype) for x in (q, k, v)]
    d_out = rng.normal(size=v.shape).astype(dtype)
    want = formula_of(attend)(*args, causal=causal)
    u = [rng.normal(size=x.shape) for x in args]
    moved = formula_of(attend)(*(x + 1e-30j * step for x, step in zip(args, u, strict=True)), causal=causal)
    terms = d_out * moved.imag / 1e-30
    for backend in backends_of(attend):
        out, backward = attend.vjp(*args, causal=causal, backend=backend)
        assert_close(out, want, tolerance)
        grads = backward(d_out)
        assert all(np.isfinite(g).all() for g in grads)
        got = sum(np.sum(d_x.astype("float64") * step) for d_x, step in zip(grads, u, strict=True))
        assert abs(got - np.sum(terms)) <= 10 * tolerance * np.sum(abs(terms))


def test_lln_row_sums_with_outlier(rng):
    """One maximum of beta k for all and an eps, as the authors have it, lose rows before an outlier; ours sum to 1."""
    q, k, _ = gaussian(rng, n=512, d=64, lead=())
    k[300, 5] += 20
    attend = la.LLN().calibrate(q, k)
    x, y = attend.alpha * q, attend.beta * k
    theirs = np.tril(np.exp(x - x.max(-1, keepdims=True)) @ np.exp(y - y.max()).T)
    assert np.min(np.sum(theirs, -1) / (np.sum(theirs, -1) + 1e-5)) < 1e-6
    for dtype, tolerance in (("float64", 1e-13), ("float32", 1e-6)):
        a = attend.weights(q.astype(dtype), k.astype(dtype), causal=True).astype("float64")
        assert np.max(abs(np.sum(a, axis=-1) - 1)) < tolerance


@pytest.mark.parametrize("attend", [FIXED, la.LLNDiag(alpha=2.0, beta=1.5, block=5)], ids=repr)
def test_lln_future_outlier_keeps_earlier_rows(attend, rng):
    """Bit for bit, whatever comes: an outlier past every limit, NaN, inf."""
    q, k, v = gaussian(rng, n=64)
    for backend in backends_of(attend):
        want = attend(q, k, v, causal=True, backend=backend)
        for suffix in (3.0, 1e3, -1e6, np.nan, np.inf):
            later = k.copy()
            later[..., 40:, :] = suffix * (1 + rng.random((2, 24, 6)))
            out = attend(q, later, v, causal=True, backend=backend)
            assert_bits(out[..., :40, :], want[..., :40, :])


def test_lln_causal_needs_scales(rng):
    """A later key moves earlier rows through sigma; so moments of the call are refused, and frozen ones are not."""
    q, k, v = gaussian(rng)
    louder = k.copy()
    louder[:, -1] *= 10
    first, second = (formula_of(la.LLN().calibrate(q, x))(q, k, v, causal=True) for x in (k, louder))
    assert np.max(abs(first[:, :-1] - second[:, :-1])) > 0.05
    for attend in (la.LLN(), la.LLNDiag(block=4), la.LLN(scope="sample", statistics="differentiated")):
        for call in (
            lambda a=attend: a(q, k, v, causal=True),
            lambda a=attend: a.vjp(q, k, v, causal=True),
            lambda a=attend: a.weights(q, k, causal=True),
            lambda a=attend: a.init_state(k, v),
        ):
            with pytest.raises(ValueError, match=r"cannot .* without `alpha` and `beta`: .* a look ahead; give both"):
                call()
        assert attend.calibrate(q, k)(q, k, v, causal=True).shape == v.shape


def test_lln_batch_independence(rng):
    """With scope="sample" a sample does not see its batch; with "tensor", the authors' one, it does."""
    q, k, v = gaussian(rng, lead=(2, 3))
    louder = [x * np.array([1.0, 1.5])[:, None, None, None] for x in (q, k)]
    sample, tensor = la.LLN(scope="sample"), la.LLN()
    assert_bits(sample(*louder, v)[0], sample(q, k, v)[0])
    assert np.max(abs(tensor(*louder, v)[0] - tensor(q, k, v)[0])) > 0.01
    assert_bits(sample(q[:1], k[:1], v[:1]), sample(q, k, v)[:1])


def test_lln_mask_is_not_causal_and_pads_are_not_in_sigma(rng):
    """A mask hides padding from the keys and from sigma of q and k: the padded call is the short one."""
    q, k, v = gaussian(rng)
    mask = np.arange(23) < 15
    for attend in (la.LLN(), la.LLN(calibration="exact", scope="sample"), la.LLNDiag(block=4)):
        short = attend(*(x[:, :15] for x in (q, k, v)))
        loud = [np.concatenate([x[:, :15], 1e3 + x[:, 15:]], axis=1) for x in (q, k, v)]
        assert_close(attend(*loud, key_mask=mask)[:, :15], short, 1e-12)
        back = [x[:, ::-1] for x in (q, k, v)]
        if isinstance(attend, la.LLN):  # blocks count positions
            assert_close(attend(*back, key_mask=mask[::-1])[:, :7:-1], attend(q, k, v, key_mask=mask)[:, :15], 1e-12)
    nothing = FIXED(q, k, v, key_mask=np.zeros(23, bool))
    assert not nothing.any()


# -- blocks -------------------------------------------------------------------------------------------------------


def test_a_block_beyond_the_sequence_is_a_mix_with_softmax(rng):
    q, k, v = gaussian(rng)
    for causal in (False, True):
        for ratio in (0.0, 0.25, 1.0):
            attend = la.LLNDiag(alpha=2.0, beta=1.5, block=23, ratio=ratio)
            want = ratio * FIXED(q, k, v, causal=causal) + (1 - ratio) * la.Softmax()(q, k, v, causal=causal)
            assert_close(attend(q, k, v, causal=causal), want)
    assert_close(la.LLNDiag(alpha=2.0, beta=1.5, block=1, ratio=0.5)(q, k, v), (FIXED(q, k, v) + v) / 2)


def test_the_default_block_is_the_number_of_channels(rng):
    args = gaussian(rng)
    assert_bits(la.LLNDiag()(*args), la.LLNDiag(block=6)(*args))
    a = la.LLNDiag(ratio=0.0).weights(*args[:2])
    far = np.arange(23)[:, None] // 6 != np.arange(23) // 6
    assert not a[:, far].any()
    np.testing.assert_allclose(np.sum(a, axis=-1), 1, rtol=1e-14)


def test_a_masked_block_leaves_lln_alone(rng):
    """Rows still sum to 1."""
    q, k, v = gaussian(rng)
    mask = np.ones(23, bool)
    mask[8:12] = False
    attend = la.LLNDiag(alpha=2.0, beta=1.5, block=4)
    out = attend(q, k, v, key_mask=mask)
    assert_close(out[:, 8:12], FIXED(q, k, v, key_mask=mask)[:, 8:12])
    np.testing.assert_allclose(attend(q, k, np.ones_like(v), key_mask=mask), 1, rtol=1e-13)


@pytest.mark.parametrize("masked", [False, True])
def test_blocks_in_any_split(masked, rng):
    """A block may be cut anywhere; the cache is dropped where it ends."""
    q, k, v = gaussian(rng, n=30)
    attend = la.LLNDiag(alpha=2.0, beta=(1.5, 1.0), block=7, ratio=(0.5, 0.3))
    mask = rng.random((2, 30)) > 0.4 if masked else None
    want = attend(q, k, v, causal=True, key_mask=mask)
    for edges in ([0, 7, 14, 30], [0, 3, 4, 9, 20, 30], list(range(31)), [0, 0, 30, 30]):
        state, parts = attend.init_state(k, v), []
        for a, b in pairwise(edges):
            seen = None if mask is None else mask[:, a:b]
            out, state = attend.step(q[:, a:b], k[:, a:b], v[:, a:b], state, key_mask=seen)
            assert state.arrays.k.shape[-2] == b % 7
            parts.append(out)
        assert_close(np.concatenate(parts, axis=-2), want)


def test_states_with_blocks_merge_at_boundaries(rng):
    q, k, v = gaussian(rng, n=30)
    attend = la.LLNDiag(alpha=2.0, beta=1.5, block=5)
    want = attend(q, k, v, causal=True)

    def state(a, b):
        return attend.step(q[:, a:b], k[:, a:b], v[:, a:b], attend.init_state(k, v, position=a))[1]

    merged = attend.merge(state(0, 10), state(10, 23))
    assert_close(attend.step(q[:, 23:], k[:, 23:], v[:, 23:], merged)[0], want[:, 23:])
    for earlier, later in ((state(0, 9), state(9, 20)), (state(0, 10), state(15, 20))):
        with pytest.raises(ValueError, match="`later` must begin where `earlier` ends and a block begins"):
            attend.merge(earlier, later)


def test_states_are_saved(rng, tmp_path):
    q, k, v = gaussian(rng)
    for attend in (la.LLN(scope="head").calibrate(q, k), la.LLNDiag(block=5).calibrate(q, k)):
        _, state = attend.step(q[:, :9], k[:, :9], v[:, :9], attend.init_state(k, v))
        la.save_state(tmp_path / "state.npz", state)
        again = la.load_state(tmp_path / "state.npz")
        assert again.attend == attend
        rest = [x[:, 9:] for x in (q, k, v)]
        assert_bits(attend.step(*rest, again)[0], attend.step(*rest, state)[0])


# -- errors -------------------------------------------------------------------------------------------------------

Q = np.random.default_rng(0).normal(size=(5, 6))
EMPTY = np.ones((0, 5, 6))
FLAT = np.ones_like(Q)


def refused(kind=la.LLN, **parameters):
    return lambda: kind(**parameters)


def called(*args, kind=la.LLN, **parameters):
    return lambda: kind(**parameters)(*(args or (Q, Q, Q)))


ERRORS = [
    (ValueError, r"must be given together, got `alpha` without `beta`", refused(alpha=1.0)),
    (ValueError, r"must be given together, got `beta` without `alpha`", refused(beta=(1.0,))),
    (TypeError, r"`alpha` must be a real number, got 'one'", refused(alpha="one", beta=1.0)),
    (ValueError, r"`beta` must be finite, got inf", refused(alpha=1.0, beta=np.inf)),
    (ValueError, r"`alpha` must be a number or one a head, got \(\)", refused(alpha=(), beta=1.0)),
    (ValueError, r"`alpha` must be a number or one a head", refused(alpha=((1.0,), 2.0), beta=1.0)),
    (
        ValueError,
        r"`alpha` must broadcast .* \(\)|got shape \(3,\)",
        called(Q[None].repeat(2, 0), Q, Q, alpha=(1, 2, 3), beta=1),
    ),
    (ValueError, r"`calibration` must be one of 'paper', 'exact', got 'best'", refused(calibration="best")),
    (ValueError, r"`calibration` must be a name or \(a, b\) of a line", refused(calibration=(1, 2, 3))),
    (ValueError, r"`calibration` must be a rising line .* got a = -1", refused(calibration=(-1, 0))),
    (ValueError, r"must give chi = \(V - b\) / a > 0 .* got -", called(calibration=(0.1, 1e9))),
    (ValueError, r"`scope` must be one of", refused(scope="row")),
    (ValueError, r"`statistics` must be one of", refused(statistics="frozen")),
    (ValueError, r"`k` must vary, got a standard deviation of 0", called(Q, FLAT, Q)),
    (ValueError, r"`q` must vary, got a standard deviation of 0", called(FLAT, Q, Q, calibration="exact")),
    (ValueError, r"`q` must have at least two visible numbers in each scope=\"tensor\", got 0", called(*[EMPTY] * 3)),
    (ValueError, r"at least two visible numbers in each scope=\"sample\", got 0", called(*[EMPTY] * 3, scope="sample")),
    (ValueError, r"at least two visible numbers .* got 1", called(Q[:1, :1], Q[:, :1], Q)),
    (ValueError, r"`q` must have at least two", lambda: la.LLN().calibrate(EMPTY, EMPTY)),
    (ValueError, r"`k` must have at least two", lambda: la.LLN()(Q[:4], Q, Q, key_mask=np.zeros(5, bool))),
    (ValueError, r"`block` must be at least 1, got 0", refused(la.LLNDiag, block=0)),
    (TypeError, r"`block` must be an integer, got 1.5", refused(la.LLNDiag, block=1.5)),
    (ValueError, r"`ratio` must be within 0 .. 1, got 2", refused(la.LLNDiag, ratio=(0.5, 2.0))),
    (ValueError, r"needs N == M, got N = 4 and M = 5", called(Q[:4], Q, Q, kind=la.LLNDiag)),
    (
        ValueError,
        r"`ratio` must broadcast",
        called(*[Q[None].repeat(2, 0)] * 3, kind=la.LLNDiag, ratio=(0.1, 0.2, 0.3)),
    ),
]


@pytest.mark.parametrize("kind, text, call", ERRORS, ids=[text for _, text, _ in ERRORS])
def test_errors(kind, text, call):
    with np.errstate(all="ignore"), pytest.raises(kind, match=text) as caught:
        call()
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)
