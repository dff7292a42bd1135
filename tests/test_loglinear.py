"""The log-linear engine against its quadratic form: values, gradients, hostile data, masks, and others' mistakes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from cases import (
    COMPLEX_STEP,
    FLOAT32,
    FLOAT64,
    assert_bits,
    assert_close,
    assert_gradients_close,
    complex_step,
)
from loglinear_cases import (
    FAMILIES,
    FAR,
    NORMS,
    ROOMS,
    SPANS,
    assert_same_sums,
    attend,
    draw,
    empty,
    families,
    formula,
    formula_lse,
    gradients,
    of_norm,
    performer_logs,
    seen_by,
)

from linattn.audit.loglinear import log_similarity, log_weights
from linattn.audit.measure import relative_error
from linattn.backends.reference import loglinear as reference
from linattn.engines import loglinear
from linattn.engines.loglinear import NONE, Options


@pytest.fixture(params=ROOMS)
def room(request):
    return ROOMS[request.param]


# -- against the quadratic form ------------------------------------------------------------------------------------


SHAPES = [
    {"n": 1},
    {"n": 2, "r": 1, "e": 1},
    {"n": 61},
    {"n": 150, "e": 33, "r": 17},
    {"n": 300, "scale": 30.0},
    {"n": 40, "lead": ((2, 3), (2, 1), (2, 1))},
    {"n": 40, "lead": ((), (3, 1), (2,))},
    {"n": 40, "lead": ((3,), (), (3,))},
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_is_the_quadratic_form(shape, span, masked, room, rng):
    lq, lk, v = draw(rng, **shape)
    key_mask = rng.random(lk.shape[:-1]) > 0.4 if masked else None
    out, lse, _ = attend(lq, lk, v, room, span=span, key_mask=key_mask)
    assert_close(out, formula(lq, lk, v, span, key_mask))
    want = np.broadcast_to(formula_lse(lq, lk, span, key_mask), lse.shape)
    assert np.array_equal(np.isneginf(lse), np.isneginf(want))
    live = np.isfinite(want)
    assert np.max(abs(lse[live] - want[live]), initial=0) <= FLOAT64 * shape.get("scale", 1.0) * 100


@pytest.mark.parametrize("n, m", [(7, 200), (200, 7), (1, 1), (3, 0), (0, 3), (0, 0)])
def test_cross_attention(n, m, room, rng):
    lq, lk, v = draw(rng, n=n, m=m, scale=10.0)
    out, lse, _ = attend(lq, lk, v, room, span="all")
    assert_close(out, formula(lq, lk, v, "all"))
    assert lse.shape == (2, n)
    d_lq, d_lk, d_v, _ = gradients(np.ones_like(out), lq, lk, v, room, span="all")
    assert (d_lq.shape, d_lk.shape, d_v.shape) == (lq.shape, lk.shape, v.shape)


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("shape", [{"r": 0}, {"e": 0}, {"n": 0}, {"lead": ((0,), (0,), (0,))}], ids=str)
def test_empty_axes(shape, span, room, rng):
    lq, lk, v = draw(rng, **shape)
    out, lse, state = attend(lq, lk, v, room, span=span)
    assert out.shape == (*v.shape[:-1], v.shape[-1])
    assert not np.any(out) or v.shape[-1]
    grads = gradients(np.ones_like(out), lq, lk, v, room, span=span)
    assert [x.shape for x in grads[:3]] == [x.shape for x in (lq, lk, v)]
    assert lse.shape == out.shape[:-1]
    assert state.sums.shape[-2:] == (lq.shape[-1], v.shape[-1] + 1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("lead", [((2,), (2,), (2,)), ((2, 2), (2, 1), ())], ids=str)
def test_gradients_against_complex_step(lead, scale, span, masked, room, rng):
    """With cotangents of lse as well."""
    lq, lk, v = draw(rng, n=9, r=4, e=3, scale=scale, lead=lead)
    key_mask = rng.random(lk.shape[:-1]) > 0.3 if masked else None
    out, lse, _ = attend(lq, lk, v, room, span=span, key_mask=key_mask)
    d_out, d_lse = rng.normal(size=out.shape), rng.normal(size=lse.shape)
    d_lse = np.where(np.isneginf(lse), 0, d_lse)

    def both(lq, lk, v):
        lead = np.broadcast_shapes(*(x.shape[:-2] for x in (lq, lk, v)))
        y = formula(lq, lk, v, span, key_mask)
        rows = formula_lse(lq, lk, span, key_mask)[..., None]
        rows = np.where(np.isneginf(rows.real), 0, rows)
        return np.concatenate([np.broadcast_to(x, (*lead, *x.shape[-2:])) for x in (y, rows)], axis=-1)

    want = complex_step(both, (lq, lk, v), np.concatenate([d_out, d_lse[..., None]], axis=-1))
    got = gradients(d_out, lq, lk, v, room, span=span, key_mask=key_mask, d_lse=d_lse)[:3]
    assert_gradients_close(got, want)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_cotangents_of_states(scale, room, rng):
    """A step between two states: cotangents of the outgoing sums in, of the incoming sums out."""
    lq, lk, v = draw(rng, n=60, r=4, e=3, scale=scale)
    cut = 23
    _, _, before = attend(lq[:, :cut], lk[:, :cut], v[:, :cut], room)
    late = lq[:, cut:], lk[:, cut:], v[:, cut:]
    out, _, after = attend(*late, room, state=before)
    d_out, d_state = rng.normal(size=out.shape), rng.normal(size=after.sums.shape)
    got = gradients(d_out, *late, room, state=before, d_state=d_state)

    gauge, new_gauge = before.gauge.astype(float), after.gauge.astype(float)

    def everything(lq, lk, v, sums):
        """[num, den] by pairs in units of 2^(largest exponent), and the sums at their new gauge."""
        ln2 = np.log(2)
        logs = lq[..., :, None, :] + lk[..., None, :, :]
        seen = np.tri(lq.shape[-2], dtype=bool)[..., None]
        top = np.max(np.where(seen, logs.real, -np.inf), axis=(-1, -2))
        held = lq + gauge[..., None, :] * ln2
        top = np.maximum(top, np.max(held.real, axis=-1))[..., None]
        a = np.sum(np.where(seen, np.exp(np.where(seen, logs, 0) - top[..., None]), 0), axis=-1)
        v1 = np.concatenate([v, np.ones((*v.shape[:-1], 1))], axis=-1)
        num_den = a @ v1 + np.exp(held - top) @ sums
        new = np.exp((gauge - new_gauge) * ln2)[..., None] * sums
        new = new + np.swapaxes(np.exp(lk - new_gauge[..., None, :] * ln2), -1, -2) @ v1
        y = num_den[..., :-1] / num_den[..., -1:]
        flat = [x.reshape(*x.shape[:-2], 1, -1) for x in (y, new)]
        lead = np.broadcast_shapes(*(x.shape[:-1] for x in flat))
        flat = [np.broadcast_to(x, (*lead, x.shape[-1])) for x in flat]
        return np.concatenate(flat, axis=-1)

    cotangent = np.concatenate([x.reshape(2, 1, -1) for x in (d_out, d_state)], axis=-1)
    sums = before.sums + before.rest
    assert_close(everything(*late, sums)[..., : out[0].size].reshape(out.shape), out)
    assert_gradients_close(got, complex_step(everything, (*late, sums), cotangent))


def test_weights_are_the_definition(rng):
    for span in SPANS:
        for n in (1, 5, 16, 33):
            lq, lk, v = draw(rng, n=n, scale=50.0)
            got = loglinear.weights(lq, lk, Options(span, None), np)
            assert np.max(abs(got - log_weights(lq, lk, seen_by(lq, lk, span)))) <= FLOAT64
            assert_close(got @ v, attend(lq, lk, v, reference, span=span)[0])


@pytest.mark.parametrize("lead", [((2,), (2,), (2,)), ((2, 3), (2, 1), (2, 1)), ((), (3, 1), (2,))], ids=str)
@pytest.mark.parametrize("chunk_size", [1, 2, 4, 16])
def test_chunks_change_rounding_alone(chunk_size, lead, rng):
    lq, lk, v = draw(rng, n=11, r=3, e=2, scale=20.0, lead=lead)
    state = tuple(empty(lk, v))
    given = {"span": "past", "key_mask": None, "xp": np, "chunk_size": chunk_size}
    out, _, _ = reference.forward(lq, lk, v, state, out=None, **given)
    assert_close(out, formula(lq, lk, v))
    d_out = rng.normal(size=out.shape)
    got = reference.backward(d_out, None, None, lq, lk, v, state, centre=True, **given)[:3]
    assert_gradients_close(got, complex_step(formula, (lq, lk, v), d_out))


@pytest.mark.parametrize("lead", [((2,), (2,), (2,)), ((2, 3), (2, 1), (2, 1)), ((), (3, 1), (2,))], ids=str)
@pytest.mark.parametrize("span", SPANS)
def test_rooms_agree_over_many_chunks(span, lead, rng):
    lq, lk, v = draw(rng, n=300, scale=10.0, lead=lead)
    d_out = rng.normal(size=(*np.broadcast_shapes(*lead), 300, 4))
    first, *others = (gradients(d_out, lq, lk, v, room, span=span) for room in ROOMS.values())
    for other in others:
        assert_gradients_close(other, first)


@pytest.mark.parametrize("bits", [430, 58, 2, 0, -1])
def test_any_number_of_spans(bits, rng, monkeypatch):
    """From one span for all tokens to one for each: the same results."""
    logs = pytest.importorskip("linattn.backends.numba._logs")
    monkeypatch.setattr(logs, "BITS", {4: min(bits, 100), 8: bits})
    for dtype, tolerance in (("float64", FLOAT64), ("float32", FLOAT32)):
        lq, lk, v = draw(rng, n=200, scale=5.0, dtype=dtype)
        out, _, state = attend(lq, lk, v, ROOMS["numba"])
        assert_close(out, formula(lq, lk, v), tolerance)
        assert_same_sums(state, attend(lq, lk, v, reference)[2], tolerance)
        d_out = rng.normal(size=out.shape).astype(dtype)
        got, want = (gradients(d_out, lq, lk, v, ROOMS[name]) for name in ("numba", "reference"))
        assert_gradients_close(got, want, 10 * tolerance)


# -- hostile data -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("norm", NORMS)
def test_families_in_float64(norm, family, room, rng):
    q, k = families(rng, norm)[family]
    lq, lk = performer_logs(q, k, rng)
    v = rng.normal(size=(150, 8))
    for span in SPANS:
        assert_close(attend(lq, lk, v, room, span=span)[0], formula(lq, lk, v, span), 1e-12)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("norm", NORMS)
def test_families_in_float32(norm, family, room, rng):
    """Logarithms in float64, all else in float32."""
    q, k = families(rng, norm)[family]
    lq, lk = performer_logs(q.astype("float32"), k.astype("float32"), rng)
    v, d_out = (rng.normal(size=(150, 8)).astype("float32") for _ in range(2))
    for span in SPANS:
        out, lse, _ = attend(lq, lk, v, room, span=span)
        assert out.dtype == lse.dtype == np.float32
        assert_close(out, formula(lq, lk, v.astype("float64"), span), 4e-7)
        got = gradients(d_out, lq, lk, v, room, span=span)
        want = gradients(d_out.astype("float64"), lq, lk, v.astype("float64"), reference, span=span)
        # bounded by the sum of terms: where one key has all the weight the true d_lq is zero
        size = np.linalg.norm(d_out) * np.linalg.norm(v) / np.sqrt(v.size)
        for got_x, want_x in zip(got[:3], want[:3]):
            assert np.linalg.norm(got_x - want_x) <= 1e-6 * (np.linalg.norm(want_x) + size)


DRIFTS = {
    "rising": lambda lq, lk, t: (lq, lk + 30 * t),
    "falling": lambda lq, lk, t: (lq, lk - 30 * t),
    "late": lambda lq, lk, t: (lq, np.where(t == 0, -1000, lk)),
    "early": lambda lq, lk, t: (lq, np.where(t == 0, 1000, lk)),
    "crossing": lambda lq, lk, t: (lq, lk + 40 * t * np.cos(np.arange(lk.shape[-1]))),
    "opposed": lambda lq, lk, t: (lq - 200 * np.eye(lq.shape[-1])[0], lk + 200 * np.eye(lq.shape[-1])[0]),
    "shifted": lambda lq, lk, t: (lq + 1e7, lk - 2e7),
}


@pytest.mark.parametrize("dtype, tolerance", [("float64", FLOAT64), ("float32", FLOAT32)])
@pytest.mark.parametrize("drift", DRIFTS)
def test_drifts(drift, dtype, tolerance, room, rng):
    lq, lk, v = draw(rng, n=150, scale=2.0, dtype=dtype)
    lq, lk = DRIFTS[drift](lq, lk, np.arange(150)[:, None])
    for span in SPANS:
        assert_close(attend(lq, lk, v, room, span=span)[0], formula(lq, lk, v.astype("float64"), span), tolerance)


def test_features_that_are_zero(room, rng):
    """-inf here and there is a feature of 0; a row with no feature in common with its keys sees nothing."""
    lq, lk, v = draw(rng, n=100, r=5)
    lk = np.where(rng.random(lk.shape) < 0.5, -np.inf, lk)
    lq = np.where(rng.random(lq.shape) < 0.5, -np.inf, lq)
    lq[0, 40], lk[1, :30] = -np.inf, -np.inf
    lq[1, :30] = 5.0
    for span in SPANS:
        out, lse, _ = attend(lq, lk, v, room, span=span)
        assert_close(out, formula(lq, lk, v, span))
        dead = np.isneginf(formula_lse(lq, lk, span))
        assert np.array_equal(np.isneginf(lse), dead)
        assert dead[0, 40]
        assert not np.any(out[dead])
        d_lq, d_lk, _, _ = gradients(np.ones_like(out), lq, lk, v, room, span=span)
        assert not np.any(d_lq[dead])
        assert np.all(np.isfinite(d_lk))


@pytest.mark.parametrize("factor", [1e30, 1e-30])
def test_huge_and_tiny_values(factor, room, rng):
    lq, lk, v = draw(rng, n=150, scale=20.0, dtype="float32")
    v = v * np.float32(factor)
    out, _, state = attend(lq, lk, v, room)
    assert_close(out, formula(lq, lk, v.astype("float64")), FLOAT32)
    assert np.all(np.isfinite(state.sums))


def test_logs_out_of_range_are_nan_and_nothing_else(room, rng):
    lq, lk, v = draw(rng, n=20)
    want = attend(lq, lk, v, room)[0]
    for bad in (np.nan, np.inf, 1e9, -1e9, 1e300):
        spoiled = lk.copy()
        spoiled[0, 7, 2] = bad
        out = attend(lq, spoiled, v, room)[0]
        assert np.all(np.isnan(out[0, 7:]))
        assert_bits(out[0, :7], want[0, :7])
        assert_bits(out[1], want[1])
        spoiled = lq.copy()
        spoiled[0, 7, 2] = bad
        out = attend(spoiled, lk, v, room)[0]
        assert np.all(np.isnan(out[0, 7]))
        assert_bits(np.delete(out[0], 7, axis=0), np.delete(want[0], 7, axis=0))


# -- identities ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("span", SPANS)
def test_invariances(span, room, rng):
    """A number for each row of lq, and one for each feature moved from lk to lq, change nothing."""
    lq, lk, v = draw(rng, n=100, scale=3.0)
    want, want_lse, _ = attend(lq, lk, v, room, span=span)
    rows = 300 * rng.normal(size=(2, 100, 1))
    out, lse, _ = attend(lq + rows, lk, v, room, span=span)
    assert_close(out, want, 1e-12)  # the logarithms themselves are rounded
    assert_close(lse - rows[..., 0], want_lse, 1e-12)
    gauge = 300.0 * rng.integers(-1, 2, size=6)
    assert_close(attend(lq - gauge, lk + gauge, v, room, span=span)[0], want, 1e-12)


@pytest.mark.parametrize("span", SPANS)
def test_sums_of_gradients(span, room, rng):
    lq, lk, v = draw(rng, n=100, scale=3.0)
    key_mask = rng.random((2, 100)) > 0.3
    out, lse, _ = attend(lq, lk, v, room, span=span, key_mask=key_mask)
    d_out, d_lse = rng.normal(size=out.shape), rng.normal(size=lse.shape)
    live = np.isfinite(lse)
    d_lq, d_lk, d_v, _ = gradients(d_out, lq, lk, v, room, span=span, key_mask=key_mask, d_lse=d_lse)
    assert np.max(abs(np.sum(d_lq, axis=-1) - np.where(live, d_lse, 0))) <= COMPLEX_STEP
    assert_close(np.sum(d_v, axis=1), np.sum(np.where(live[..., None], d_out, 0), axis=1), COMPLEX_STEP)
    # moving a feature from keys to queries changes nothing
    assert np.max(abs(np.sum(d_lq, axis=1) - np.sum(d_lk, axis=1))) <= 1e-11
    assert not np.any(d_lk[~key_mask])
    assert not np.any(d_v[~key_mask])


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e6])
@pytest.mark.parametrize("span", SPANS)
def test_an_offset_of_the_values_leaves_the_gradients(span, offset, room, rng):
    lq, lk, v = draw(rng, n=150, scale=2.0, dtype="float32")
    v = v + np.float32(offset)
    d_out = rng.normal(size=v.shape).astype("float32")
    got = gradients(d_out, lq, lk, v, room, span=span)[:3]
    centred = v.astype("float64") - offset
    want = gradients(d_out.astype("float64"), lq, lk, centred, reference, span=span)[:3]
    for x, y in zip(got, want):
        assert_close(x, y, 1e-6)


def test_ones_give_ones_and_all_results_lie_between_their_values(room, rng):
    lq, lk, v = draw(rng, n=100, scale=30.0, dtype="float32")
    for span in SPANS:
        assert_close(attend(lq, lk, np.ones_like(v), room, span=span)[0], np.ones_like(v), FLOAT32)
        out = attend(lq, lk, v, room, span=span)[0]
        assert np.all(abs(out) <= np.max(abs(v), axis=1, keepdims=True) * (1 + 1e-6))


# -- masks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("span", SPANS)
def test_a_masked_key_is_as_good_as_absent(span, room, rng):
    """In numerator and normaliser; whatever stands under the mask."""
    lq, lk, v = draw(rng, n=60, scale=5.0, lead=((), (), ()))
    key_mask = rng.random(60) > 0.4
    key_mask[:3] = False
    keep = np.flatnonzero(key_mask)
    want = formula(lq, lk, v, span, key_mask)
    want_state = attend(lq[keep], lk[keep], v[keep], room)[2]
    d_out = rng.normal(size=v.shape)
    clean = gradients(d_out, lq, lk, v, room, span=span, key_mask=key_mask)
    for bad in (np.nan, np.inf, 1e300):
        hidden_lk, hidden_v = np.where(key_mask[:, None], lk, bad), np.where(key_mask[:, None], v, bad)
        out, _, state = attend(lq, hidden_lk, hidden_v, room, span=span, key_mask=key_mask)
        assert_close(out, want)
        assert_same_sums(state, want_state, FLOAT64)
        for x, y in zip(gradients(d_out, lq, hidden_lk, hidden_v, room, span=span, key_mask=key_mask), clean):
            assert_bits(x, y)


def test_nothing_visible(room, rng):
    lq, lk, v = draw(rng, n=60)
    nothing = np.zeros((2, 60), dtype=bool)
    for span in SPANS:
        out, lse, state = attend(lq, lk, v, room, span=span, key_mask=nothing)
        assert not np.any(out)
        assert np.all(np.isneginf(lse))
        assert np.all(state.gauge == NONE)
        for x in gradients(np.ones_like(out), lq, lk, v, room, span=span, key_mask=nothing):
            assert not np.any(x)


def test_mask_in_normaliser(room, rng):
    """Masking the values alone would leave masked keys in the denominator: rows of ones would not stay ones."""
    lq, lk, v = draw(rng, n=60)
    key_mask = np.arange(60) % 2 == 0
    out = attend(lq, lk, np.ones_like(v), room, key_mask=key_mask)[0]
    assert_close(out, np.ones_like(v))
    a, _ = log_similarity(lq, lk, seen_by(lq, lk, "past"))
    values_alone = np.sum(a * key_mask, axis=-1) / np.sum(a, axis=-1)
    assert np.min(values_alone) < 0.7


# -- what others do, and why not -----------------------------------------------------------------------------------


def leaky(lq, lk, v, eps=0.0, dtype=np.float64):
    """Features stabilised by the maximum of a row of lq and the maximum of all of lk, causal."""
    phi_q = np.exp((lq - np.max(lq, axis=-1, keepdims=True)).astype(dtype)) + dtype(eps)
    phi_k = np.exp((lk - np.max(lk)).astype(dtype)) + dtype(eps)
    a = np.tril(phi_q @ np.swapaxes(phi_k, -1, -2))
    return a @ v.astype(dtype) / np.sum(a, axis=-1, keepdims=True)


def test_key_max_leak(room, rng):
    """With eps, one maximum over all keys lets the last key move the first rows; here it moves nothing."""
    q, k = rng.normal(size=(2, 64, 16)) * 2
    lq, lk = performer_logs(q, k, rng)
    v = rng.normal(size=(64, 8))
    moved = lk.copy()
    moved[-1] += 20
    assert relative_error(leaky(lq, moved, v, 1e-4)[:32], leaky(lq, lk, v, 1e-4)[:32]) > 0.1
    assert_bits(attend(lq, moved, v, room)[0][:63], attend(lq, lk, v, room)[0][:63])


def test_scalar_max_opposed_keys(room, rng):
    """q = 50 e_1, k = -50 e_1: their maxima lie on different features, one scalar for each side loses the products."""
    q, k = (s * 50 * np.eye(16)[0] + rng.normal(size=(100, 16)) for s in (1, -1))
    lq, lk = performer_logs(q.astype("float32"), k.astype("float32"), rng, 64)
    v = rng.normal(size=(100, 8)).astype("float32")
    want = formula(lq, lk, v.astype("float64"))
    with np.errstate(all="ignore"):
        scalar = leaky(lq, lk, v, dtype=np.float32)
    assert not relative_error(scalar, want) < 1e-2
    assert_close(attend(lq, lk, v, room)[0], want, FAR)


def test_reverse_subtract(room, rng):
    """States rewound by subtracting keys, against recomputed ones: the gradient of the first tokens."""
    lq, lk, v = draw(rng, n=2000, r=16, e=8, lead=((), (), ()), dtype="float32")
    lk = lk + np.where(np.arange(2000)[:, None] < 16, 0, np.log(3))
    d_out = rng.normal(size=v.shape).astype("float32")
    d_out[16:] = 0
    want = gradients(d_out.astype("float64"), lq, lk, v.astype("float64"), reference)[0][:16]
    phi_q, phi_k = np.exp(lq).astype("float32"), np.exp(lk).astype("float32")
    v1 = np.concatenate([v, np.ones((2000, 1), "float32")], axis=-1)
    state = np.zeros((16, 9), "float32")
    for t in range(2000):
        state = state + phi_k[t][:, None] * v1[t]
    rewound = np.zeros((16, 16), "float32")
    for t in range(1999, -1, -1):
        if t < 16:
            num_den = phi_q[t] @ state
            h = np.append(d_out[t], -(d_out[t] @ num_den[:-1]) / num_den[-1]) / num_den[-1]
            rewound[t] = phi_q[t] * (state @ h)
        state = state - phi_k[t][:, None] * v1[t]
    assert relative_error(rewound, want) > 1e-5
    assert_close(gradients(d_out, lq, lk, v, room)[0][:16], want, FAR)


def test_float16_features(room, rng):
    """float16 inputs have float32 features: in float16 they would vanish."""
    q, k = (of_norm(rng.normal(size=(150, 16)), 20).astype("float16") for _ in range(2))
    lq, lk = performer_logs(q, k, rng)
    v = rng.normal(size=(150, 8)).astype("float16")
    want = formula(lq, lk, v.astype("float64"))
    with np.errstate(all="ignore"):
        assert not relative_error(leaky(lq, lk, v, dtype=np.float16), want) < 0.1
    for dtype in ("float16", ml_dtypes.bfloat16):
        out, lse, state = attend(lq, lk, v.astype(dtype), room)
        assert out.dtype == dtype
        assert lse.dtype == state.sums.dtype == np.float32
        want = formula(lq, lk, v.astype(dtype).astype("float64"))
        assert relative_error(out.astype("float64"), want) <= 1.1 * relative_error(
            want.astype(dtype).astype("float64"), want
        )


def test_saved_out_offset(room, rng):
    """g . out from a rounded `out` loses what the values share; recomputed from centred values it does not."""
    lq, lk, v = draw(rng, n=100, dtype="float32")
    v = v + np.float32(1e4)
    d_out = rng.normal(size=v.shape).astype("float32")
    want = gradients(d_out.astype("float64"), lq, lk, v.astype("float64"), reference)[0]
    out = formula(lq, lk, v.astype("float64")).astype("float32").astype("float64")
    a = log_weights(lq, lk, seen_by(lq, lk, "past"))
    # sum over keys of the weights of each feature times (g . v - g . out)
    share = np.exp(lq[..., :, None, :] + lk[..., None, :, :] - formula_lse(lq, lk)[..., None, None])
    share = np.where(np.tri(100, dtype=bool)[..., None], share, 0)
    terms = d_out.astype("float64") @ np.swapaxes(v.astype("float64"), -1, -2) - np.sum(d_out * out, -1, keepdims=True)
    assert_close(np.sum(share, axis=-1), a)
    saved = np.sum(share * terms[..., None], axis=-2)
    assert relative_error(saved, want) > 1e-4
    assert_close(gradients(d_out, lq, lk, v, room)[0], want, 1e-6)
