"""The oracle's own tests: against sums written out pair by pair, mpmath, and finite differences."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import mpmath
import numpy as np
import pytest

from linattn.audit import measure
from linattn.audit.quadratic import FEATURE_MAPS, FEATURES, FORMULAS, Formula, cosine, formula_of

NAMES = sorted(FORMULAS)
GIVEN = {
    "LLN": {"alpha": 0.8, "beta": 0.6},
    "LLNDiag": {"alpha": 0.8, "beta": 0.6, "block": 4},
    "Performer": {"projection": lambda dim: np.random.default_rng(5).normal(size=(6, dim))},
}
FIXED = {name: type(FORMULAS[name])(FORMULAS[name].rule, **GIVEN.get(name, {})) for name in NAMES}
"""Each formula with what it cannot do without: nothing of it comes from the data of the call."""


@dataclass(frozen=True)
class Linear:
    """A value with the fields of the mechanism of that name: the oracle reads nothing else."""

    feature_map: object = "elu1"
    normalize: bool = True
    eps: object = "safe"


@dataclass(frozen=True)
class CosFormer:
    """Likewise."""

    length: int | None = None
    feature_map: str = "relu"
    normalize: bool = True
    eps: object = "safe"
    align: str = "start"


@dataclass(frozen=True)
class Softmax:
    """Likewise."""

    scale: float | None = None


def draw(rng, n=9, m=9, d=4, e=3, lead=(2,)):
    return (rng.normal(size=(*lead, tokens, channels)) for tokens, channels in ((n, d), (m, d), (m, e)))


# ------------------------------------------------------------------------------- written out with mpmath

MAPS = {
    "identity": lambda x: x,
    "relu": lambda x: max(x, mpmath.mpf(0)),
    "elu1": lambda x: 1 + x if x > 0 else mpmath.exp(x),
    "exp": mpmath.exp,
}


def similarity_linear(q, k, t, s, n, m, feature_map="elu1", **_):
    return mpmath.fdot(map(MAPS[feature_map], q[t]), map(MAPS[feature_map], k[s]))


def similarity_cosformer(q, k, t, s, n, m, feature_map="relu", length=None, align="start", **_):
    if align == "stretch":
        angle = mpmath.pi * (t + 1) / (2 * n) - mpmath.pi * (s + 1) / (2 * m)
    else:
        angle = mpmath.pi * (t - s) / (2 * (length or max(n, m)))
    return similarity_linear(q, k, t, s, n, m, feature_map) * mpmath.cos(angle)


def similarity_softmax(q, k, t, s, n, m, scale=None, **_):
    return mpmath.exp(mpmath.fdot(q[t], k[s]) * (scale or 1 / mpmath.sqrt(len(q[t]))))


def similarity_lln(q, k, t, s, n, m, alpha, beta):
    return mpmath.fsum(mpmath.exp(alpha * a + beta * b) for a, b in zip(q[t], k[s], strict=True))


def similarity_performer(q, k, t, s, n, m, projection):
    root = mpmath.mpf(len(q[t])) ** -0.25
    x, y = [root * a for a in q[t]], [root * b for b in k[s]]
    logs = (mpmath.fdot(w, x) + mpmath.fdot(w, y) - mpmath.fdot(y, y) / 2 for w in projection(len(x)).tolist())
    return mpmath.fsum(map(mpmath.exp, logs))


SIMILARITIES = {
    "Linear": similarity_linear,
    "CosFormer": similarity_cosformer,
    "Softmax": similarity_softmax,
    "LLN": similarity_lln,
    "Performer": similarity_performer,
}

PARAMETERS = [
    *(("Linear", {"feature_map": name}) for name in ("relu", "elu1", "exp")),
    ("Linear", {"feature_map": "identity", "normalize": False}),
    ("Linear", {"eps": ("add", 0.5)}),
    ("Linear", {"feature_map": "relu", "eps": ("clamp", 2.0)}),
    ("CosFormer", {}),
    ("CosFormer", {"length": 40, "eps": ("add", 0.25)}),
    ("CosFormer", {"align": "stretch"}),
    ("CosFormer", {"feature_map": "elu1", "normalize": False}),
    ("Softmax", {}),
    ("Softmax", {"scale": 3.0}),
    ("LLN", GIVEN["LLN"]),
    ("Performer", GIVEN["Performer"]),
]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name, parameters", PARAMETERS, ids=lambda x: x if isinstance(x, str) else ", ".join(x))
def test_weights_are_the_sums_written_out(name, parameters, causal, rng):
    """Each entry in 40 digits, with a mask and, if not causal, unequal lengths."""
    n, m = (6, 6) if causal else (5, 7)
    q, k, v = draw(rng, n, m, lead=())
    seen = rng.random(m) > 0.3
    got = FORMULAS[name].weights(q, k, causal=causal, key_mask=seen, **parameters)

    with mpmath.workdps(40):
        want = np.zeros((n, m))
        for t in range(n):
            row = [
                SIMILARITIES[name]([list(map(mpmath.mpf, x)) for x in q], k.tolist(), t, s, n, m, **parameters)
                if seen[s] and (s <= t or not causal)
                else mpmath.mpf(0)
                for s in range(m)
            ]
            den = mpmath.fsum(row)
            rule, x = parameters.get("eps", "safe"), 0.0
            if rule != "safe":
                rule, x = rule
            c = {"safe": den, "add": den + x, "clamp": max(den, mpmath.mpf(x))}[rule]
            if not parameters.get("normalize", True):
                c = 1
            want[t] = [float(a / c) if den else 0.0 for a in row]

    np.testing.assert_allclose(got, want, rtol=2e-14, atol=1e-300)
    out = FORMULAS[name](q, k, v, causal=causal, key_mask=seen, **parameters)
    np.testing.assert_allclose(out, want @ np.where(seen[:, None], v, 0), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("length, p, want", [(1, 0, 1), (1, 1, 0), (2, 1, 0.5**0.5), (3, 1, 0.75**0.5), (3, 2, 0.5)])
def test_cosine_where_it_is_algebraic(length, p, want):
    assert abs(cosine(np.array(p), length, np.dtype("float64")) - want) <= 3 * 2.0**-53 * want


def test_cosine_keeps_its_relative_accuracy():
    """Up to the end of the range, where cos(pi/2 p / length) has lost all of it."""
    length = 100_000
    p = np.array([0, 1, length // 2, length // 2 + 1, length - 1, length])
    with mpmath.workdps(40):
        want = np.array([float(mpmath.cos(mpmath.pi * int(x) / (2 * length))) for x in p[:-1]])
    got = cosine(p, length, np.dtype("float64"))
    assert np.max(abs(got[:-1] / want - 1)) <= 3 * 2.0**-53
    assert got[-1] == 0


# ------------------------------------------------------------------------------------------- what it takes


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_complex_step_is_the_derivative(name, causal, rng):
    """The imaginary part agrees with central differences, and the real part is the function."""
    x, u = list(draw(rng)), list(draw(rng))
    formula = Formula(FORMULAS[name].rule, **({"length": 20} if name == "CosFormer" else GIVEN.get(name, {})))

    def at(h):
        return formula(*(a + h * b for a, b in zip(x, u, strict=True)), causal=causal)

    step = at(1e-30j)
    differences = (at(1e-5) - at(-1e-5)) / 2e-5
    np.testing.assert_allclose(step.imag / 1e-30, differences, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(step.real, at(0.0), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_rows_of_the_whole(name, rng):
    q, k, v = draw(rng)
    formula = FIXED[name]
    some = np.array([7, 2, 2])
    for causal in (False, True):
        want = formula.weights(q, k, causal=causal)[:, some]
        np.testing.assert_array_equal(formula.weights(q, k, causal=causal, rows=some), want)
        np.testing.assert_array_equal(formula(q, k, v, causal=causal, rows=slice(3, 5)).shape, (2, 2, 3))


@pytest.mark.parametrize("name", NAMES)
def test_packed_sequences_are_calls_of_their_own(name, rng):
    q, k, v = draw(rng)
    edges, mask = [0, 4, 4, 9], rng.random((2, 9)) > 0.2
    formula = FIXED[name]
    out = formula(q, k, v, cu_seqlens=edges, key_mask=mask, causal=True)
    weights = formula.weights(q, k, cu_seqlens=edges, key_mask=mask, causal=True)
    for a, b in ((0, 4), (4, 9)):
        want = formula(q[:, a:b], k[:, a:b], v[:, a:b], key_mask=mask[:, a:b], causal=True)
        np.testing.assert_array_equal(out[:, a:b], want)
    np.testing.assert_allclose(weights @ v, out, rtol=0, atol=1e-14)
    assert not weights[:, :4, 4:].any()
    assert not weights[:, 4:, :4].any()


def test_positions_move_together(rng):
    q, k, v = draw(rng)
    p = np.arange(9.0)
    want = FORMULAS["CosFormer"](q, k, v, length=30)
    for given in (p, p + 11, (p + 3, p + 3), np.stack([p, p + 1])):
        np.testing.assert_allclose(FORMULAS["CosFormer"](q, k, v, length=30, positions=given), want, rtol=1e-13)
    order = rng.permutation(9)
    x, given = (a[:, order] for a in (q, k, v)), p[order]
    np.testing.assert_allclose(FORMULAS["CosFormer"](*x, length=30, positions=given), want[:, order], rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_leading_axes_broadcast(name, rng):
    q, k, v = rng.normal(size=(2, 3, 5, 4)), rng.normal(size=(2, 1, 6, 4)), rng.normal(size=(6, 2))
    k, v = (x[..., : 5 if name in ("LLNDiag", "Combiner") else 6, :] for x in (k, v))  # those need N == M
    whole = FIXED[name](q, k, v)
    assert whole.shape == (2, 3, 5, 2)
    np.testing.assert_allclose(whole[1, 2], FIXED[name](q[1, 2], k[1, 0], v), rtol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_dead_and_empty(name, rng):
    """Nothing visible gives zeros; M = 0, N = 0 and D = 0 give the formula's value."""
    q, k, v = draw(rng)
    hidden = np.zeros(9, dtype=bool)
    assert not FIXED[name](q, k, v, key_mask=hidden).any()
    if name == "Combiner":  # N == M, and regions make of equal scores no plain mean
        assert FIXED[name](q[:, :0], k[:, :0], v[:, :0]).shape == (2, 0, 3)
        return
    assert not FIXED[name](q, k[:, :0], v[:, :0]).any()
    assert FIXED[name](q[:, :0], k, v).shape == (2, 0, 3)
    flat = FIXED[name](q[..., :0], k[..., :0], v)
    mean = np.mean(v, -2, keepdims=True) * np.ones((9, 1))
    in_blocks = FORMULAS["Softmax"](q[..., :0], k[..., :0], v, cu_seqlens=[0, 4, 8, 9])
    want = {"Softmax": mean, "Performer": mean, "LLNDiag": in_blocks / 2}.get(name, np.zeros_like(v))
    np.testing.assert_allclose(flat, want)


@pytest.mark.parametrize("name", NAMES)
def test_bad_values_stay_where_they_are_seen(name, rng):
    q, k, v = draw(rng)
    clean = FIXED[name](q, k, v, causal=True)
    k[0, 5, 1], v[1, 3, 2] = np.nan, np.inf
    out = FIXED[name](q, k, v, causal=True)
    assert np.isnan(out[0, 5:]).all()
    assert np.isnan(out[1, 3:, 2]).all()
    out[0, 5:], out[1, 3:, 2] = clean[0, 5:], clean[1, 3:, 2]
    np.testing.assert_array_equal(out, clean)
    seen = np.ones((2, 9), dtype=bool)
    seen[0, 5] = seen[1, 3] = False
    assert np.isfinite(FIXED[name](q, k, v, causal=True, key_mask=seen)).all()


def test_types(rng):
    """Widened, never narrowed."""
    q, k, v = draw(rng)
    for dtype, want in {"float16": "float64", "float32": "float64", "longdouble": "longdouble"}.items():
        out = FORMULAS["CosFormer"](*(x.astype(dtype) for x in (q, k, v)), length=20)
        assert out.dtype == want
    assert FORMULAS["Softmax"](q.astype("complex64"), k, v).dtype == "complex128"
    with pytest.raises(ValueError, match="as many queries as keys, got 3 and 9"):
        FORMULAS["Linear"](q[:, :3], k, v, causal=True)
    with pytest.raises(ValueError, match="`eps` must be"):
        FORMULAS["Linear"](q, k, v, eps="loose")
    with pytest.raises(ValueError, match="`align` must be"):
        FORMULAS["CosFormer"](q, k, v, align="left")


def test_a_map_of_the_users_own(rng):
    q, k, v = draw(rng)

    class Square:
        @staticmethod
        def phi(x, xp):
            return xp.multiply(x, x)

    want = FORMULAS["Linear"](q**2, k**2, v, feature_map="identity")
    np.testing.assert_array_equal(FORMULAS["Linear"](q, k, v, feature_map=Square()), want)
    np.testing.assert_array_equal(FORMULAS["Linear"](q, k, v, feature_map=np.square), want)
    assert set(FEATURE_MAPS) == set(MAPS)


# ------------------------------------------------------------------------------------ the oracle's short cuts


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "masked": True}, {"masked": True}])
@pytest.mark.parametrize(
    "attend",
    [
        Linear(),
        Linear("relu", eps=("add", 0.5)),
        Linear("exp", eps=("clamp", 9.0)),
        CosFormer(300),
        CosFormer(normalize=False),
        CosFormer(align="stretch"),
        Softmax(),
    ],
    ids=str,
)
def test_oracle_agrees_with_the_formula(attend, options, rng, monkeypatch):
    """In blocks of rows, and in linear time where there are features: out and |A| |v|."""
    q, k, v = draw(rng, 200, 200)
    options = dict(options)
    if options.pop("masked", False):
        options["key_mask"] = rng.random(200) > 0.3
    if options.get("causal") and getattr(attend, "align", "") == "stretch":
        options.pop("causal")
    formula = formula_of(attend)
    want = formula(q, k, v, **options)
    absolute = formula(q, k, abs(v), **options)
    monkeypatch.setattr(measure, "PAIRS_AT_ONCE", 3000)
    for most in (2**28, 1000):
        monkeypatch.setattr(measure, "PAIRS_IN_ALL", most)
        answer = measure.oracle(attend, q, k, v, **options)
        assert measure.relative_error(answer.out, want) < 2e-15
        assert measure.relative_error(answer.absolute, absolute) < 2e-15
    some = np.array([150, 3])
    np.testing.assert_allclose(measure.oracle(attend, q, k, v, rows=some, **options).out, want[:, some], 1e-12)


def test_oracle_of_packed_and_moved(rng):
    q, k, v = draw(rng, 30, 30)
    attend, p = CosFormer(99), rng.uniform(0, 99, size=30)
    for options in ({"cu_seqlens": [0, 7, 30]}, {"positions": p}, {"positions": p, "cu_seqlens": [0, 7, 30]}):
        want = formula_of(attend)(q, k, v, causal=True, **options)
        np.testing.assert_allclose(measure.oracle(attend, q, k, v, causal=True, **options).out, want, 1e-12, 1e-14)


def test_features_for_every_linear_formula():
    """Softmax has none; of the exponentials those of a sum over all keys."""
    assert set(FEATURES) == set(FORMULAS) - {"Softmax", "LLNDiag", "Combiner"}


# ------------------------------------------------------------------------------------------------- metrics


def test_relative_error():
    want = np.array([3.0, 4.0])
    assert measure.relative_error(want, want) == 0
    assert measure.relative_error(want + [0, 0.5], want) == pytest.approx(0.1)
    assert measure.relative_error(1e300 * (want + [0, 0.5]), 1e300 * want) == pytest.approx(0.1)
    assert measure.relative_error(np.zeros(2), np.zeros(2)) == 0
    assert measure.relative_error(want, np.zeros(2)) == np.inf
    assert np.isnan(measure.relative_error([np.nan, 4], want))
    assert measure.relative_error(np.zeros((0, 3)), np.zeros((0, 3))) == 0


@pytest.mark.parametrize("dtype, u", [("float32", 2**-24), ("float16", 2**-11), ("bfloat16", 2**-8)])
def test_one_rounding_is_half_a_unit(dtype, u, rng):
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    assert measure.unit_roundoff(dtype) == u
    want = rng.normal(size=1000)
    got = want.astype(dtype)
    assert measure.weighted_error(got, want, abs(want)) <= 1
    assert measure.weighted_error(got.astype("float64"), want, abs(want), dtype) <= 1
    assert 0.1 < measure.error_in_eps(got, want) < 0.5
    p50, p99, most = measure.ulps(got, want)
    assert 0.1 < p50 <= p99 <= most <= 0.5


def test_spacing_is_the_formats():
    for dtype in ("float16", "float32", "float64"):
        info = np.finfo(dtype)
        want = np.array([1, 1.5, 2, 3.9, info.tiny, info.tiny / 2], dtype)
        spacing = np.spacing(want)
        got = want.astype(np.longdouble) + spacing
        assert measure.ulps(want, got)[2] <= 1.0001
        assert measure.smallest_normal(dtype) == info.tiny


def test_bad_results_do_not_pass():
    """A NaN is never a small error, and a wrong number where nothing may be is a large one."""
    want = np.array([1.0, 0.0])
    for metric in (
        measure.relative_error,
        measure.error_in_eps,
        lambda x, y: measure.weighted_error(x, y, abs(y)),
    ):
        assert not metric(np.array([np.nan, 0.0]), want) <= 1e30
    assert measure.weighted_error(np.array([1.0, 1e-3]), want, abs(want)) > 1e30
    assert measure.ulps(np.zeros(0), np.zeros(0)) == (0, 0, 0)


def test_repr():
    assert repr(formula_of(Softmax())) == "Formula(softmax, scale=None)"
