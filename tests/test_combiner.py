"""Combiner: every pattern against its definition, both rooms; pools, limits, masks, streams, memory, refusals."""

from __future__ import annotations

import re
import tracemalloc
from itertools import pairwise, product

import numpy as np
import pytest
from cases import (
    COMPLEX_STEP,
    FLOAT32,
    FLOAT64,
    TINY,
    assert_bits,
    assert_close,
    assert_gradients_close,
    is_distribution,
    numpy_of,
)
from test_plans import routed

import linattn as la
from linattn.audit.quadratic import formula_of

ROOMS = ("reference", "numba")
WIDE = {  # every pattern, by its own size
    "fixed": lambda size, **o: la.Combiner("fixed", span=size, **o),
    "logsparse": lambda size, **o: la.Combiner("logsparse", **o),
    "axial_vertical": lambda size, **o: la.Combiner("axial_vertical", width=size, **o),
    "axial_horizontal": lambda size, **o: la.Combiner("axial_horizontal", width=size, **o),
    "axial_rowmajor": lambda size, **o: la.Combiner("axial_rowmajor", width=size, **o),
    "wsum": lambda size, **o: la.Combiner("axial_rowmajor", width=size, row_key="wsum", **o),
    "average": lambda size, **o: la.Combiner("mixture", width=size, **o),
    "joint": lambda size, **o: la.Combiner("mixture", width=size, mix="joint", **o),
}
NAMES = tuple(WIDE)
HALVES = [(name, causal) for name in NAMES for causal in (True, False) if causal or name != "joint"]
LEADS = [((2,), (2,), (2,)), ((2, 3), (2, 1), (3,)), ((), (2,), (3, 1)), ((2,), (), ())]
ends = pytest.mark.parametrize("backend", ROOMS)
halves = pytest.mark.parametrize("name, causal", HALVES)
patterns = pytest.mark.parametrize("name", NAMES)


def draw(rng, n, lead=((2,), (2,), (2,)), d=4, e=3, ties=False):
    q, k, v = (rng.normal(size=(*x, n, width)) for x, width in zip(lead, (d, d, e), strict=True))
    return (np.round(q), np.round(k), v) if ties else (q, k, v)


def both_directions(attend, args, d_out, backend, **options):
    out, backward = attend.vjp(*args, **options, backend=backend)
    return out, *backward(d_out)


def agrees(attend, args, rng, backend, **options):
    """out against the formula, and one direction of its Jacobian against a complex step."""
    formula = formula_of(attend)
    out, backward = attend.vjp(*args, **options, backend=backend)
    assert_close(out, formula(*args, **options))
    d_out, *u = (rng.normal(size=x.shape) for x in (out, *args))
    terms = d_out * formula(*(x + 1j * TINY * y for x, y in zip(args, u, strict=True)), **options).imag / TINY
    grads = backward(d_out)
    assert [g.shape for g in grads] == [x.shape for x in args]
    products = [d_x * y for d_x, y in zip(grads, u, strict=True)]
    got, size = sum(np.sum(x) for x in products), sum(np.sum(abs(x)) for x in products)
    assert abs(got - np.sum(terms)) <= COMPLEX_STEP * (size + np.sum(abs(terms)))


# -- the definition ---------------------------------------------------------------------------------------------


@ends
@halves
def test_every_pattern_is_its_definition(name, causal, backend, rng):
    """Whole and ragged grids, ties, masks, biases, pools, leading axes that broadcast."""
    grids = [(1, 2), (2, 4), (5, 3), (8, 4), (9, 2), (12, 4), (14, 5), (17, None)]
    for i, (n, size) in enumerate(grids):
        attend = WIDE[name](size, pool=("max", "mean")[i % 2], size_bias=i % 3 == 0, scale=(None, 0.7)[i % 2])
        for j in (0, 1):
            lead = LEADS[i % 4 - j]
            shape = (None, (n,), (np.broadcast_shapes(*lead)[-1], n))[(i // 2 + j) % 3]
            mask = None if shape is None else rng.random(shape) > 0.4
            options = {"causal": causal} | ({} if mask is None else {"key_mask": mask})
            agrees(attend, draw(rng, n, lead, ties=i % 4 > 1), rng, backend, **options)


@ends
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rep, row_key", [(False, "self"), (True, "self"), (True, "wsum")])
def test_a_plan_of_ones_own_is_its_definition(rep, row_key, causal, backend, rng):
    for n, pool, mask in ((13, "max", None), (9, "mean", rng.random(9) > 0.4), (12, "max", rng.random((2, 12)) > 0.5)):
        attend = la.Combiner(routed(n, causal, rng, rep), pool=pool, size_bias=pool == "mean", row_key=row_key)
        options = {} if mask is None else {"key_mask": mask}
        for ties in (False, True):
            agrees(attend, draw(rng, n, ties=ties), rng, backend, causal=causal, **options)


@halves
def test_weights_are_the_formulas_and_a_distribution(name, causal, rng):
    """Rows sum to 1, and every visible key has weight."""
    for n, size in ((9, 4), (16, 4), (17, 5)):
        attend = WIDE[name](size)
        assert is_distribution(attend)
        q, k, v = draw(rng, n)
        weights = attend.weights(q, k, causal=causal)
        assert_close(weights, formula_of(attend).weights(q, k, causal=causal))
        np.testing.assert_array_equal(weights > 0, np.broadcast_to(np.tri(n) > 0 if causal else True, weights.shape))
        assert np.all(abs(weights.sum(axis=-1) - 1) <= 1e-15 * n)
        for backend in ROOMS:
            assert_close(attend(q, k, v, causal=causal, backend=backend), weights @ v)


@ends
@halves
def test_our_own_forward_moved(name, causal, backend, rng):
    """Central differences, extrapolated once: the backward belongs to the forward that ran."""
    attend, args = WIDE[name](4), draw(rng, 14)
    d_out, *u = (rng.normal(size=x.shape) for x in (args[2], *args))
    grads = attend.vjp(*args, causal=causal, backend=backend)[1](d_out)

    def change(h):
        ends_of = (
            attend(*(x + s * y for x, y in zip(args, u, strict=True)), causal=causal, backend=backend) for s in (h, -h)
        )
        high, low = (np.sum(d_out * out) for out in ends_of)
        return (high - low) / (2 * h)

    h = 2.0**-16
    products = [d_x * y for d_x, y in zip(grads, u, strict=True)]
    want, size = (4 * change(h / 2) - change(h)) / 3, sum(np.sum(abs(x)) for x in products)
    assert abs(sum(np.sum(x) for x in products) - want) <= 1e-8 * size


@ends
@halves
def test_float32(name, causal, backend, rng):
    """256 tokens, 16 channels: to the library's promise, gradients each."""
    attend = WIDE[name](16)
    args = [x.astype("float32") for x in draw(rng, 256, ((), (), ()), 16, 16)]
    d_out = rng.normal(size=(256, 16)).astype("float32")
    got = both_directions(attend, args, d_out, backend, causal=causal)
    wide = [x.astype("float64") for x in (*args, d_out)]
    want = both_directions(attend, wide[:3], wide[3], "reference", causal=causal)
    assert_close(want[0], formula_of(attend)(*wide[:3], causal=causal))
    for x, y in zip(got, want, strict=True):
        assert x.dtype == "float32"
        assert_close(x, y, FLOAT32)


# -- pools ------------------------------------------------------------------------------------------------------


@ends
@halves
def test_of_equal_maxima_the_lowest_index_takes_all(name, causal, backend, rng):
    """All queries and keys the same in one channel: d_q and d_k of that channel's maxima go to first members."""
    attend, n = WIDE[name](4), 16
    args = draw(rng, n, ((), (), ()), ties=True)
    d_out = rng.normal(size=(n, 3))
    got = both_directions(attend, args, d_out, backend, causal=causal)[1:]
    want = []
    for i, x in enumerate(args):  # the formula's maxima take the lowest index, imaginary parts move what was chosen
        step = 1j * TINY * np.eye(x.size).reshape(x.size, *x.shape)
        moved = formula_of(attend)(*(x + step if i == j else y for j, y in enumerate(args)), causal=causal)
        want.append(np.sum(d_out * moved.imag / TINY, axis=(1, 2)).reshape(x.shape))
    assert_gradients_close(got, want)


# -- limits -----------------------------------------------------------------------------------------------------

SOFTMAX = [
    *(("fixed", 1, n) for n in (1, 2, 7, 9)),
    *(("fixed", n, n) for n in (1, 5, 8)),
    ("fixed", 20, 7),
    ("fixed", 10**15, 7),
    ("average", 10**15, 7),
    *((name, 1, 7) for name in NAMES if name not in ("fixed", "logsparse")),
    *((name, size, 7) for name in NAMES if name not in ("fixed", "logsparse") for size in (7, 9)),
    ("axial_vertical", 4, 8),
    ("axial_vertical", 4, 7),
    ("axial_horizontal", 2, 8),
    ("axial_horizontal", 2, 7),
    ("average", 2, 4),
    ("logsparse", None, 1),
    ("logsparse", None, 2),
]


@ends
@pytest.mark.parametrize("name, size, n", SOFTMAX)
def test_limits_are_exact_softmax(name, size, n, backend, rng):
    """Regions of one member, or none."""
    for causal in (True, False) if name != "joint" else (True,):
        for pool in ("max", "mean"):
            attend, args, d_out = WIDE[name](size, pool=pool), draw(rng, n), rng.normal(size=(2, n, 3))
            got = both_directions(attend, args, d_out, backend, causal=causal)
            want = both_directions(la.Softmax(), args, d_out, backend, causal=causal)
            assert_close(got[0], want[0])
            assert_gradients_close(got[1:], want[1:])


@ends
@halves
def test_the_size_bias_restores_softmax_where_keys_are_equal(name, causal, backend, rng):
    """All keys the same: uniform weights with it; the scores of regions count for one without."""
    if name == "joint":
        return
    q, _, v = draw(rng, 24)
    k = np.broadcast_to(rng.normal(size=4), q.shape)
    out = WIDE[name](6, size_bias=True)(q, k, v, causal=causal, backend=backend)
    assert_close(out, la.Softmax()(q, k, v, causal=causal, backend=backend))


def test_a_row_without_the_bias():
    """24 tokens in spans of 6: six keys and three regions of six are nine equal scores."""
    q, v = np.zeros((24, 4)), np.eye(24)
    last = la.Combiner(span=6)(q, q, v, causal=True)[-1]
    np.testing.assert_allclose(last, np.repeat([1 / 54, 1 / 9], [18, 6]), rtol=1e-14)
    np.testing.assert_allclose(la.Combiner(span=6, size_bias=True)(q, q, v, causal=True)[-1], 1 / 24, rtol=1e-14)


# -- identities -------------------------------------------------------------------------------------------------


@ends
@halves
def test_an_offset_of_all_keys_changes_nothing(name, causal, backend, rng):
    attend, (q, k, v), d_out = WIDE[name](4), draw(rng, 14), rng.normal(size=(2, 14, 3))
    first = both_directions(attend, (q, k, v), d_out, backend, causal=causal)
    after = both_directions(attend, (q, k + rng.normal(size=4), v), d_out, backend, causal=causal)
    assert_gradients_close(after, first)
    assert np.max(abs(first[2].sum(axis=-2))) <= COMPLEX_STEP * np.max(abs(first[2]))
    weights = attend.weights(q, k, causal=causal)
    assert_close(first[3], np.swapaxes(weights, -1, -2) @ d_out)  # d_v = A^T d_out
    flat = both_directions(attend, (q, k, np.full_like(v, 3.0)), d_out, backend, causal=causal)
    assert max(np.max(abs(x)) for x in flat[1:3]) <= COMPLEX_STEP * np.max(abs(first[1]))


def test_blocks_of_weights_have_rank_one(rng):
    """What a region's users give its members differs by a factor alone."""
    q, k, _ = draw(rng, 16, ((), (), ()))
    for name in ("fixed", "logsparse", "axial_vertical", "axial_horizontal"):
        attend = WIDE[name](4)
        (plan,), weights = attend.plans(16, causal=True), attend.weights(q, k, causal=True)
        users, _ = plan.users.transposed(plan.n_regions)
        blocks = [weights[np.ix_(users.row(r), plan.members.row(r))] for r in range(plan.n_regions)]
        large = [block for block in blocks if min(block.shape) > 1]
        assert large or name == "axial_horizontal"
        assert all(np.linalg.svd(block)[1][1] <= 1e-15 for block in large)


@ends
def test_the_order_within_a_far_span_does_not_matter(backend, rng):
    attend, args = la.Combiner(span=4), draw(rng, 16)
    order = np.r_[0:4, 7, 4, 6, 5, 8:16]
    out, moved = (attend(*x, causal=True, backend=backend) for x in (args, [x[:, order] for x in args]))
    assert_close(moved[:, 8:], out[:, 8:])


# -- who sees whom ----------------------------------------------------------------------------------------------


@ends
@patterns
def test_later_tokens_change_no_bit_of_earlier_rows(name, backend, rng):
    attend, args = WIDE[name](4), draw(rng, 19)
    out = attend(*args, causal=True, backend=backend)
    for t in (1, 4, 5, 8, 16, 18):
        moved = [np.concatenate([x[:, :t], 100 * rng.normal(size=x[:, t:].shape)], axis=1) for x in args]
        after = attend(*moved, causal=True, backend=backend)
        assert_bits(after[:, :t], out[:, :t])
        assert np.any(after[:, t:] != out[:, t:])


@ends
@patterns
def test_what_is_not_finite_stays_where_it_is_seen(name, backend, rng):
    """A bad key, query or value at t: the rows before t, the other head, and other columns of v are as they were."""
    attend, args, d_out = WIDE[name](4), draw(rng, 19), rng.normal(size=(2, 19, 3))
    clean = both_directions(attend, args, d_out, backend, causal=True)
    for which, t, bad in product(range(3), (2, 9, 18), (np.nan, np.inf, -np.inf)):
        moved = [x.copy() for x in args]
        moved[which][0, t, 1] = bad
        out, *grads = both_directions(attend, moved, d_out, backend, causal=True)
        for x, y in zip((out, *grads), clean, strict=True):
            assert_bits(x[1], y[1])
        assert_bits(out[0, :t], clean[0][0, :t])
        seen = np.zeros(out[0].shape, bool)
        seen[t:, 1 if which == 2 else slice(None)] = True
        if which == 2:
            assert not np.isfinite(out[0][seen]).any()
            assert_close(out[0][~seen], clean[0][0][~seen], 1e-14)
        elif np.isnan(bad):
            assert np.isnan(out[0, t]).all()
            assert which == 0 or np.isnan(out[0, t:]).all()


@ends
@halves
def test_hidden_keys_are_hidden(name, causal, backend, rng):
    """Whatever they hold, in pools too, and their gradients are exactly 0; their own queries get a result."""
    attend, (q, k, v), d_out = WIDE[name](4), draw(rng, 18), rng.normal(size=(2, 18, 3))
    mask = rng.random(18) > 0.4
    want = both_directions(attend, (q, k, v), d_out, backend, causal=causal, key_mask=mask)
    assert_close(want[0], formula_of(attend)(q, k, v, causal=causal, key_mask=mask))
    for held in (1e300, np.nan, np.inf):
        hidden = [np.where(mask[:, None], x, held) for x in (k, v)]
        got = both_directions(attend, (q, *hidden), d_out, backend, causal=causal, key_mask=mask)
        assert_close(got[0], want[0])
        assert_gradients_close(got[1:], want[1:])
        assert not any(x[:, ~mask].any() for x in got[2:])
    loud = np.where(mask[:, None], q, 1e3)  # a hidden position is not pooled as a query either
    after = attend(loud, k, v, causal=causal, key_mask=mask, backend=backend)
    assert_close(after[:, mask], want[0][:, mask])


@ends
@halves
def test_regions_and_rows_that_see_nothing(name, causal, backend, rng):
    """A region hidden whole has weight 0, a row that sees nothing is 0 with gradients 0; nothing is NaN."""
    attend, args, d_out = WIDE[name](4), draw(rng, 18), rng.normal(size=(2, 18, 3))
    mask = np.ones((2, 18), bool)
    mask[0, :9], mask[1] = False, False
    got = both_directions(attend, args, d_out, backend, causal=causal, key_mask=mask)
    assert all(np.isfinite(x).all() for x in got)
    assert_close(got[0], formula_of(attend)(*args, causal=causal, key_mask=mask))
    dead = slice(0, 9 if causal else 0)
    assert not any(x[1].any() for x in got)
    assert not got[0][0, dead].any()
    assert not got[2][0, :9].any()
    assert got[0][0, 9:].any()


@ends
@halves
def test_trailing_padding_is_a_shorter_sequence(name, causal, backend, rng):
    """Negative keys: a pad of zeros would win every maximum."""
    attend, (q, k, v) = WIDE[name](4), draw(rng, 23)
    q, k = -abs(q), -abs(k)
    for n in (13, 16, 17):
        short = [x[:, :n] for x in (q, k, v)]
        want = attend(*short, causal=causal, backend=backend)
        assert_close(want, formula_of(attend)(*short, causal=causal))
        got = attend(q, k, v, causal=causal, key_mask=np.arange(23) < n, backend=backend)
        assert_close(got[:, :n], want)


@ends
@halves
@pytest.mark.parametrize("dtype, size", [("float32", 1e3), ("float32", 1e18), ("float64", 1e100)])
def test_huge_scores(name, causal, dtype, size, backend, rng):
    """exp would overflow by far; the maximum of a row is taken out first."""
    attend = WIDE[name](4)
    q, k, v = (x.astype(dtype) for x in draw(rng, 19))
    out = attend(q * np.dtype(dtype).type(size), k * np.dtype(dtype).type(size), v, causal=causal, backend=backend)
    assert np.isfinite(out).all()
    wide = [x.astype("float64") for x in (q * np.dtype(dtype).type(size), k * np.dtype(dtype).type(size), v)]
    assert_close(out, formula_of(attend)(*wide, causal=causal), FLOAT64 if dtype == "float64" else FLOAT32)


@ends
@halves
@pytest.mark.parametrize("shape", [(0, 5, 4, 3), (2, 0, 4, 3), (2, 5, 0, 3), (2, 5, 4, 0), (2, 1, 4, 3)], ids=str)
def test_empty_axes(name, causal, shape, backend):
    lead, n, d, e = shape
    args = [np.ones((lead, n, width)) for width in (d, d, e)]
    attends = [WIDE[name](2)] + ([la.Combiner(la.Plan(0, [], [], []))] if n == 0 else [])
    for attend in attends:
        out, backward = attend.vjp(*args, causal=causal, key_mask=np.ones(n, bool), backend=backend)
        assert_close(out, np.ones((lead, n, e)))
        assert [x.shape for x in backward(np.ones_like(out))] == [x.shape for x in args]
        assert attend.weights(*args[:2], causal=causal).shape == (lead, n, n)


@patterns
def test_patterns_on_the_strict_library(name, rng):
    """No slice out of bounds, no operation beside the standard; a user's plan too."""
    import array_api_strict as xp

    q, k, v = draw(rng, 14)
    mask = rng.random(14) > 0.3
    for attend in (WIDE[name](4), la.Combiner(routed(14, True, rng))):
        want = both_directions(attend, (q, k, v), v, "reference", causal=True, key_mask=mask)
        there = [xp.asarray(x) for x in (q, k, v)]
        got = both_directions(attend, there, there[2], "reference", causal=True, key_mask=xp.asarray(mask))
        assert_gradients_close([numpy_of(x) for x in got], want)


# -- memory -----------------------------------------------------------------------------------------------------


@ends
@pytest.mark.parametrize("name", ["fixed", "logsparse", "axial_vertical", "axial_horizontal", "axial_rowmajor"])
def test_memory_stays_far_below_a_matrix_of_weights(name, backend, rng):
    """Beyond the result a forward takes less than six times q, k and v; nothing N x N is stored either way."""
    n = 2048
    q, k, v, d_out = (x.astype("float32") for x in rng.normal(size=(4, 1, n, 64)))
    attend = WIDE[name](None)
    attend.vjp(q[:, :40], k[:, :40], v[:, :40], causal=True, backend=backend)[1](d_out[:, :40])  # compiled
    taken = []
    for run in (
        lambda: attend(q, k, v, causal=True, backend=backend),
        lambda: both_directions(attend, (q, k, v), d_out, backend, causal=True),
    ):
        tracemalloc.start()
        run()
        taken.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert taken[0] - q.nbytes < 6 * 3 * q.nbytes
    assert taken[0] < n * n * 4 or backend == "reference"
    assert taken[1] < 2 * n * n * 4


# -- streams ----------------------------------------------------------------------------------------------------


@patterns
def test_streams_are_the_whole_pass(name, rng):
    """At any cuts, forward and backward, with masks, ties and heads that broadcast."""
    calls = ((19, 4, "max", False), (13, 4, "mean", True), (16, 3, "max", True), (7, 1, "max", False))
    for n, size, pool, masked in calls:
        attend = WIDE[name](size, pool=pool, size_bias=masked)
        q, k, v = draw(rng, n, ((2, 3), (2, 1), (1, 3)), ties=masked)
        mask = rng.random((2, 1, n)) > 0.4 if masked else None
        out, backward = attend.vjp(q, k, v, causal=True, key_mask=mask, backend="reference")
        d_out = rng.normal(size=out.shape)
        state, outs, backs = attend.init_state(k, v), [], []
        cuts = [0, *sorted(rng.integers(0, n + 1, 3)), n]
        for a, b in pairwise(cuts):
            seen = None if mask is None else mask[..., a:b]
            y, state, back = attend.step_vjp(q[..., a:b, :], k[..., a:b, :], v[..., a:b, :], state, key_mask=seen)
            outs.append(y)
            backs.append(back)
        assert_close(np.concatenate(outs, axis=-2), out)
        d_state, parts = None, []
        for back, (a, b) in reversed(list(zip(backs, pairwise(cuts), strict=True))):
            *grads, d_state = back(d_out[..., a:b, :], d_state)
            parts.insert(0, grads)
        assert_gradients_close([np.concatenate(x, axis=-2) for x in zip(*parts, strict=True)], backward(d_out))


@patterns
def test_states_merge_where_regions_end_and_go_to_disk(name, rng, tmp_path):
    attend, n = WIDE[name](4), 29
    q, k, v = draw(rng, n)
    mask = rng.random((2, n)) > 0.3
    want = attend(q, k, v, causal=True, key_mask=mask, backend="reference")

    def run(first, last, state=None):
        state = attend.init_state(k, v, position=first) if state is None else state
        part = (x[:, first:last] for x in (q, k, v))
        return attend.step(*part, state, key_mask=mask[:, first:last])

    for a, b in ((8, 12), (0, 5), (16, 24), (16, 16), (8, 8), (4, 8)):
        merged = attend.merge(run(0, a)[1], run(a, b)[1])
        la.save_state(tmp_path / "state.npz", merged)
        out, _ = run(b, n, la.load_state(tmp_path / "state.npz"))
        assert_close(out, want[:, b:])
    parts = run(0, 6)[1], run(6, 11)[1]
    with pytest.raises(ValueError, match=r"merges states where regions end only: .*got [56]"):
        attend.merge(*parts)
    assert attend.merge(parts[0], attend.init_state(k, v, position=6)).position == 6


def test_a_stream_of_spans_is_smaller_than_a_cache(rng):
    q, k, v = draw(rng, 64, ((), (), ()))
    _, state = la.Combiner(span=8).step(q, k, v, la.Combiner(span=8).init_state(k, v))
    assert sum(x.size for x in state.arrays if x is not None) < (k.size + v.size) / 4
    assert state.arrays.k.shape == (0, 4)


NOT_STREAMED = {
    "a default": (
        la.Combiner(),
        r"`Combiner\(\)` cannot be streamed: give `span`, whose default depends",
    ),
    "width": (la.Combiner("axial_rowmajor"), r"cannot be streamed: give `width`"),
    "mixture": (la.Combiner("mixture"), r"cannot be streamed: give `width`"),
    "a plan": (la.Combiner(la.Plan(1, [[0]], [], [[]])), r"`Combiner` of a plan cannot be streamed"),
}


@pytest.mark.parametrize("attend, pattern", NOT_STREAMED.values(), ids=NOT_STREAMED)
def test_what_cannot_be_streamed_says_so(attend, pattern, rng):
    _, k, v = draw(rng, 5)
    with pytest.raises(ValueError, match=pattern):
        attend.init_state(k, v)


def test_steps_are_the_reference_rooms(rng):
    q, k, v = draw(rng, 5)
    attend = la.Combiner(span=2)
    with pytest.raises(ValueError, match=r"`backend='numba'`: numba has no steps of Combiner"):
        attend.step(q, k, v, attend.init_state(k, v), backend="numba")


# -- refusals ---------------------------------------------------------------------------------------------------

BAD = {
    "unknown": (
        {"pattern": "spiral"},
        ValueError,
        r"`pattern` must be one of 'fixed', 'logsparse', 'axial_vertical', .*, 'mixture', got 'spiral'",
    ),
    "type": ({"pattern": 3}, TypeError, r"`pattern` must be one of .*got 3"),
    "width of fixed": ({"width": 4}, ValueError, r"`Combiner` of 'fixed' must not be given width=4: it has no width"),
    "span of logsparse": ({"pattern": "logsparse", "span": 4}, ValueError, r"'logsparse' must not be given span=4"),
    "width of logsparse": ({"pattern": "logsparse", "width": 4}, ValueError, r"must not be given width=4"),
    "span of a grid": (
        {"pattern": "axial_vertical", "span": 4},
        ValueError,
        r"not be given span=4: it has no span",
    ),
    "span of a plan": ({"pattern": la.Plan(0, [], [], []), "span": 4}, ValueError, r"`Combiner` of a plan must not"),
    "span 0": ({"span": 0}, ValueError, r"`span` must be at least 1, got 0"),
    "span real": ({"span": 2.0}, TypeError, r"`span` must be an integer, got 2\.0"),
    "pool": ({"pool": "sum"}, ValueError, r"`pool` must be one of 'max', 'mean', got 'sum'"),
    "size_bias": ({"size_bias": 1}, TypeError, r"`size_bias` must be True or False, got 1"),
    "row_key": ({"pattern": "axial_rowmajor", "row_key": "max"}, ValueError, r"`row_key` must be one of .*got 'max'"),
    "row_key elsewhere": ({"row_key": "wsum"}, ValueError, r"must not be given row_key='wsum': no token stands"),
    "mix": ({"pattern": "mixture", "mix": "sum"}, ValueError, r"`mix` must be one of 'average', 'joint', got 'sum'"),
    "mix elsewhere": ({"mix": "joint"}, ValueError, r"must not be given mix='joint': it is no mixture"),
    "scale": ({"scale": 0.0}, ValueError, r"`scale` must be positive and finite, got 0\.0"),
}


@pytest.mark.parametrize("parameters, error, pattern", BAD.values(), ids=BAD)
def test_values_that_cannot_be(parameters, error, pattern, rng):
    for make in (la.Combiner, lambda **p: la.combiner(*draw(rng, 5), **p)):
        with pytest.raises(error, match=pattern) as caught:
            make(**parameters)
        assert str(caught.value).endswith(".")
        assert "\n" not in str(caught.value)


@ends
def test_calls_that_cannot_be(backend, rng):
    q, k, v = draw(rng, 5)
    attend = la.Combiner(span=2)
    said = r"`Combiner` is for self-attention, it needs N == M, got N = 4 and M = 5\."
    for call in (
        lambda: attend(q[:, :4], k, v, backend=backend),
        lambda: attend.vjp(q[:, :4], k, v, backend=backend),
        lambda: attend.weights(q[:, :4], k),
    ):
        with pytest.raises(ValueError, match=said):
            call()
    joint = la.Combiner("mixture", mix="joint", width=2)
    with pytest.raises(ValueError, match=rf"`{re.escape(repr(joint))}` must be causal: .*got causal=False\."):
        joint(q, k, v, backend=backend)
    with pytest.raises(ValueError, match=r"`n` must be at least 0, got -1"):
        attend.plans(-1)
