"""Who sees whom: no bit of a row depends on what it does not see, and what is not finite stays where it is seen."""

from __future__ import annotations

import numpy as np
import pytest
from cases import (
    BOTH_SIDES,
    CHUNKS,
    FLOAT64,
    LENGTH,
    MAIN,
    VALUES,
    Case,
    assert_bits,
    assert_close,
    backends_of,
    can_be_causal,
    is_combiner,
    is_distribution,
    sees_others,
    values_on_backends,
)

import linattn as la

CAUSAL = [attend for attend in VALUES if can_be_causal(attend)]
CONTAINED = [
    la.Linear(),
    la.Linear("relu"),
    la.Linear(BOTH_SIDES),
    la.Linear("identity", normalize=False),
    la.CosFormer(LENGTH),
    la.Softmax(),
]
N = max(CHUNKS) + 6
BORDERS = sorted({1, 20, N - 1} | {t + i for t in CHUNKS for i in (-1, 0, 1)})
BEHIND = N - CHUNKS[-1] + 1  # where a ragged chunk leaves what the one before it had
NEAR = 1e-14  # rows that do not see a bad token: a room may do them another way, not to another result


def drawn(attend, rng, causal=True, n=N):
    """q, k, v, d_out and options; no row is without weight, under relu neither."""
    case = Case(attend, causal=causal, n=n, m=n)
    args, _ = case.draw(rng)
    for x in args[:2]:
        x[..., 0] = 0.1 + abs(x[..., 0])
    return args, case.cotangent(rng), {"causal": causal}


def both_directions(attend, args, d_out, options, backend):
    out, backward = attend.vjp(*args, **options, backend=backend)
    return out, *backward(d_out)


def assert_near(got, want, size, tolerance=NEAR):
    """Entry by entry, within a part of the largest of `size`."""
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.max(abs(size)))


def changed(x, t, values):
    """x with other tokens from t on."""
    x = x.copy()
    x[:, t:] = values[:, t:]
    return x


# -- finite changes: not a bit ----------------------------------------------------------------------------------


@pytest.mark.parametrize("attend, backend", values_on_backends(CAUSAL))
def test_later_tokens_change_no_bit_of_earlier_rows(attend, backend, rng):
    args, _, options = drawn(attend, rng)
    others = [100 * rng.normal(size=x.shape) for x in args]
    for dtype in ("float64", "float32"):
        given = [x.astype(dtype) for x in args]
        out = attend(*given, **options, backend=backend)
        for t in BORDERS:
            moved = [changed(x, t, y.astype(dtype)) for x, y in zip(given, others, strict=True)]
            after = attend(*moved, **options, backend=backend)
            assert_bits(after[:, :t], out[:, :t])
            assert np.any(after[:, t:] != out[:, t:])


@pytest.mark.parametrize("attend, backend", values_on_backends(CAUSAL))
def test_earlier_queries_change_no_bit_of_later_cotangents(attend, backend, rng):
    """d_k[s] and d_v[s] come from the rows t >= s, d_q[t] from its own."""
    args, d_out, options = drawn(attend, rng)
    first = both_directions(attend, args, d_out, options, backend)
    for t in BORDERS:
        moved = d_out.copy()
        moved[:, :t] = rng.normal(size=moved[:, :t].shape)
        after = both_directions(attend, args, moved, options, backend)
        for x, y in zip(after, first, strict=True):
            assert_bits(x[:, t:], y[:, t:])
        assert np.any(after[3][:, :t] != first[3][:, :t])


@pytest.mark.parametrize("attend, backend", values_on_backends([a for a in CAUSAL if not is_combiner(a)]))
def test_later_keys_change_no_gradient_of_earlier_queries(attend, backend, rng):
    """But for rounding: values are centred on their mean, which knows all. Not Combiner: it pools queries."""
    args, d_out, options = drawn(attend, rng)
    first = both_directions(attend, args, d_out, options, backend)
    for t in BORDERS:
        moved = [args[0], *(changed(x, t, rng.normal(size=x.shape)) for x in args[1:])]
        after = both_directions(attend, moved, d_out, options, backend)
        assert_near(after[1][:, :t], first[1][:, :t], first[1], FLOAT64)


@pytest.mark.parametrize("attend, backend", values_on_backends(CAUSAL))
def test_a_huge_suffix_stays_behind(attend, backend, rng):
    """Its sums overflow, those before it do not."""
    args, _, options = drawn(attend, rng)
    out = attend(*args, **options, backend=backend)
    moved = [changed(x, 20, 1e300 * abs(x)) for x in args]
    after = attend(*moved, **options, backend=backend)
    assert_near(after[:, :20], out[:, :20], out)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("attend, backend", values_on_backends([a for a in VALUES if not sees_others(a)]))
def test_heads_do_not_see_each_other(attend, backend, causal, rng):
    """Not a bit, in either direction; likewise the sequences of a packed call."""
    if causal and not can_be_causal(attend):
        causal = False
    args, d_out, options = drawn(attend, rng, causal, n=11)
    first = both_directions(attend, args, d_out, options, backend)
    moved = [np.concatenate([x[:1], rng.normal(size=x[1:].shape)]) for x in (*args, d_out)]
    after = both_directions(attend, moved[:3], moved[3], options, backend)
    for x, y in zip(after, first, strict=True):
        assert_bits(x[0], y[0])
    options["cu_seqlens"] = [0, 4, 11]
    first = both_directions(attend, args, d_out, options, backend)
    moved = [changed(x, 4, rng.normal(size=x.shape)) for x in (*args, d_out)]
    after = both_directions(attend, moved[:3], moved[3], options, backend)
    for x, y in zip(after, first, strict=True):
        assert_bits(x[:, :4], y[:, :4])


# -- what is not finite -----------------------------------------------------------------------------------------

BAD = [np.nan, np.inf, -np.inf]


def spoiled(attend, args, options, which, t, bad, backend, channel=1):
    """The call with one bad number in head 0, what the formula says of it, and the call without."""
    clean = attend(*args, **options, backend=backend)
    args = [x.copy() for x in args]
    args[which][0, t, channel] = bad
    want = Case(attend).formula(*args, **options)
    return attend(*args, **options, backend=backend), want, clean


@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("attend, backend", values_on_backends(CONTAINED))
def test_a_bad_key_stays_in_the_rows_that_see_it(attend, backend, causal, bad, rng):
    """An infinite one may have a limit (no weight: it is as good as absent), and then it is taken."""
    args, _, options = drawn(attend, rng, causal)
    for t in (5, CHUNKS[0], N - 1):
        out, want, clean = spoiled(attend, args, options, 1, t, bad, backend)
        assert_bits(out[1], clean[1])
        first = t if causal else 0
        assert_near(out[0, :first], clean[0, :first], clean)
        finite = np.isfinite(want)
        assert np.isnan(out[0, first:]).all() or not np.isnan(bad)
        np.testing.assert_array_equal(np.isfinite(out), finite)
        assert_close(out[finite], want[finite])


@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("attend, backend", values_on_backends(CONTAINED))
def test_a_bad_value_stays_in_its_column(attend, backend, causal, bad, rng):
    """In the rows that see its token, also those that give it no weight."""
    args, _, options = drawn(attend, rng, causal)
    for t in (5, CHUNKS[0], N - 1):
        out, want, clean = spoiled(attend, args, options, 2, t, bad, backend)
        seen = np.zeros(out.shape, dtype=bool)
        seen[0, t if causal else 0 :, 1] = True
        np.testing.assert_array_equal(np.isnan(want), seen)
        assert not np.isfinite(out[seen]).any()
        assert np.isnan(out[seen]).all() or not np.isnan(bad)
        assert_bits(out[1], clean[1])
        assert_near(out[~seen], clean[~seen], clean)


@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("attend, backend", values_on_backends(CONTAINED))
def test_a_bad_query_spoils_its_own_row(attend, backend, causal, bad, rng):
    args, _, options = drawn(attend, rng, causal)
    for t in (0, 5, BEHIND, CHUNKS[0], N - 1):
        out, want, clean = spoiled(attend, args, options, 0, t, bad, backend)
        others = np.arange(N) != t
        assert_bits(out[:, others], clean[:, others])
        finite = np.isfinite(want[0, t])
        assert np.isnan(out[0, t]).all() or not np.isnan(bad)
        np.testing.assert_array_equal(np.isfinite(out[0, t]), finite)
        assert_close(out[0, t][finite], want[0, t][finite])


def alive(attend, x):
    """Entries that a cotangent passes: relu's are those above 0."""
    return x > 0 if getattr(attend, "feature_map", "") == "relu" else np.ones(x.shape, dtype=bool)


@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("attend, backend", values_on_backends(CONTAINED))
def test_a_bad_cotangent_goes_to_its_query_and_to_the_keys_it_sees(attend, backend, causal, bad, rng):
    """d_q of its row, d_k of what the row sees, and of d_v its column alone."""
    args, d_out, options = drawn(attend, rng, causal)
    q, k, _ = args
    first = both_directions(attend, args, d_out, options, backend)
    for t in (5, BEHIND, CHUNKS[0], N - 1):
        moved = d_out.copy()
        moved[0, t, 1] = bad
        _, d_q, d_k, d_v = both_directions(attend, args, moved, options, backend)
        last = t if causal else N - 1
        hit_q, hit_k, hit_v = (np.zeros(x.shape, dtype=bool) for x in args)
        hit_q[0, t], hit_k[0, : last + 1], hit_v[0, : last + 1, 1] = True, True, True
        for got, hit, clean in (
            (d_q, hit_q & alive(attend, q), first[1]),
            (d_k, hit_k & alive(attend, k), first[2]),
            (d_v, hit_v, first[3]),
        ):
            assert not np.isfinite(got[hit]).any()
            assert_near(got[~hit], clean[~hit], clean)
        for got, clean in zip((d_q, d_k, d_v), first[1:], strict=True):
            assert_bits(got[1], clean[1])


@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("attend, backend", values_on_backends([a for a in CONTAINED if is_distribution(a)]))
def test_gradients_beside_a_nan(attend, backend, causal, which, rng):
    """What does not see it has the gradient it had; what sees it has none that is finite; other heads not a bit."""
    args, d_out, options = drawn(attend, rng, causal)
    first = both_directions(attend, args, d_out, options, backend)
    for t in (5, CHUNKS[0], N - 1):
        moved = [x.copy() for x in args]
        moved["qkv".index(which)][0, t, 1] = np.nan
        after = both_directions(attend, moved, d_out, options, backend)
        for got, clean in zip(after, first, strict=True):
            assert_bits(got[1], clean[1])
        _, d_q, d_k, d_v = after
        sees = np.zeros(N, dtype=bool)
        sees[t if causal or which == "q" else 0 : t + 1 if which == "q" else N] = True
        assert_near(d_q[0, ~sees], first[1][0, ~sees], first[1], FLOAT64)
        assert np.isnan(d_q[0, sees][alive(attend, args[0])[0, sees]]).all()
        if which == "q":
            if causal:
                assert_near(d_k[0, t + 1 :], first[2][0, t + 1 :], first[2], FLOAT64)
            assert np.isnan(d_v[0, : t + 1]).all()
        elif which == "v":
            assert_close(d_v, first[3])  # knows nothing of the values
        else:
            assert np.isnan(d_v[0]).all()


@pytest.mark.parametrize("attend, backend", values_on_backends([la.Linear("relu"), la.CosFormer(LENGTH)]))
def test_a_row_without_weight_stays_zero(attend, backend, rng):
    """Whatever it would see: its weights are none, and no cotangent passes it."""
    args, d_out, options = drawn(attend, rng)
    args[0][:, 7] = -1.0  # relu(q) = 0
    args[2][:, 5] = np.nan
    d_out[:, 7] = np.inf
    out, d_q, _, d_v = both_directions(attend, args, d_out, options, backend)
    assert not out[:, 7].any()
    assert not d_q[:, 7].any()
    assert np.isfinite(d_v).all()
    assert np.isfinite(out[:, :5]).all()


@pytest.mark.parametrize("attend, backend", values_on_backends(CONTAINED))
def test_a_bad_token_stays_in_the_state(attend, backend, rng):
    """Steps after it see it, the state before it does not."""
    args, _, _ = drawn(attend, rng, n=12)
    _, k, v = args
    _, before = attend.step(*(x[:, :4] for x in args), attend.init_state(k, v), backend=backend)
    want, _ = attend.step(*(x[:, 8:] for x in args), before, backend=backend)
    v[0, 5, 1] = np.nan
    _, after = attend.step(*(x[:, 4:8] for x in args), before, backend=backend)
    out, _ = attend.step(*(x[:, 8:] for x in args), after, backend=backend)
    assert np.isnan(out[0, :, 1]).all()
    assert np.isfinite(np.delete(out, 1, axis=2)).all()
    assert np.isfinite(out[1]).all()
    again, _ = attend.step(*(x[:, 8:] for x in args), before, backend=backend)
    assert_bits(again, want)


@pytest.mark.parametrize("eps", ["safe", ("clamp", 1e-6), ("add", 1e-6)], ids=str)
@pytest.mark.parametrize("value", [la.Linear, la.CosFormer])
def test_an_infinite_denominator_is_no_zero(value, eps):
    """num is finite and den is not: a quotient of 0 would be a wrong finite number."""
    x = np.full((3, 2), 1e20, "float32")
    v = np.full((3, 1), 1e-30, "float32")
    attend = value(eps=eps) if value is la.CosFormer else value("relu", eps=eps)
    for backend in backends_of(attend):
        out = attend(x, x, v, backend=backend)
        assert np.all(np.isnan(out) | (abs(out / v - 1) < 1e-6))
        if eps == "safe":
            assert np.isfinite(out).all()


@pytest.mark.parametrize("attend, backend", values_on_backends(MAIN))
def test_values_near_the_largest_number(attend, backend, rng):
    """Finite while the sum of |v| phi is; else inf or NaN, never something smaller."""
    q, k, v = np.ones((3, 4, 2))
    most = np.finfo("float64").max
    out = attend(q, k, v * most / 64, backend=backend)
    assert_close(out / most, v / 64)
    out = attend(q, k, v * most, backend=backend)
    assert np.all(~np.isfinite(out) | (abs(out / most - 1) < 1e-13))
