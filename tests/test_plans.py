"""Plans: what they cover, cost and refuse. The row sums of weights could not see a key that is met twice."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import linattn as la
from linattn.backends.reference import combiner as reference
from linattn.engines import combiner as engine
from linattn.plans.patterns import BUILDERS

NAMES = tuple(BUILDERS)


def pattern(name, n, size, causal):
    return la.Plan.pattern(name, n, size=None if name == "logsparse" else size, causal=causal)


def visible(n, causal):
    return np.tri(n, dtype=int) if causal else np.ones((n, n), int)


def met(plan, causal):
    """How often each key is to be met; "joint" meets the keys above in other columns a second time."""
    want = visible(plan.n, causal)
    if plan._key[0] == "joint":
        row, column = np.divmod(np.arange(plan.n), plan._key[2])
        want = want + ((row < row[:, None]) & (column != column[:, None]))
    return want


def spans_of(name):
    return (True,) if name == "joint" else (True, False)


# -- coverage ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_each_visible_key_is_met_exactly_once_and_no_other(name):
    """Every length up to 65: powers of two and one more are among them, and rows that are not whole."""
    for n in range(66):
        for causal in spans_of(name):
            for size in (None,) if name == "logsparse" else (None, 1, 2, 5, n + 1):
                plan = pattern(name, n, size, causal)
                np.testing.assert_array_equal(plan.coverage(), met(plan, causal), err_msg=repr(plan))


@given(st.sampled_from(NAMES), st.integers(1, 300), st.integers(1, 310), st.booleans(), st.integers(0, 2**32))
def test_a_mask_takes_keys_away_and_nothing_else(name, n, size, causal, seed):
    plan = pattern(name, n, size, causal or name == "joint")
    mask = np.random.default_rng(seed).random(n) > 0.4
    own = plan.restrict(mask)
    np.testing.assert_array_equal(own.coverage(), met(plan, causal or name == "joint") * mask)
    assert not np.any(own.members.lengths[own.users.indices] == 0)


def test_the_last_token_of_two_to_the_k_and_one():
    """It sees every token: levels up to ceil(log2(n - 1)) would leave it with itself alone."""
    for k in range(1, 9):
        n = (1 << k) + 1
        assert pattern("logsparse", n, None, True).coverage()[-1].tolist() == [1] * n


def test_spans_are_aligned_and_in_the_past():
    plan = pattern("fixed", 10, 4, True)
    assert [plan.members.row(r).tolist() for r in range(plan.n_regions)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [plan.users.row(t).tolist() for t in range(10)] == [[]] * 4 + [[0]] * 4 + [[0, 1]] * 2
    whole = pattern("fixed", 10, 4, False)
    assert whole.members.row(2).tolist() == [8, 9]
    assert all(t // 4 not in whole.users.row(t) for t in range(10))  # not its own span again


# -- cost -------------------------------------------------------------------------------------------------------

COUNTS = {  # direct, users, local; N tokens in n rows of w, causal and not
    "fixed": lambda N, w, n, K: ((N * (w + 1) // 2, N * (n - 1) // 2, N - w), (N * w, N * (n - 1), N)),
    "logsparse": lambda N, w, n, K: (
        (3 * N // 2, N * (K - 1) // 2, N * (K - 1) // 2),
        (2 * N, N * (K - 1), N * (K - 1)),
    ),
    "axial_vertical": lambda N, w, n, K: (
        (N * (w + n) // 2, (n - 1) * w * (w - 1), N * (n - 1) // 2),
        (N * (w + n - 1), N * (w - 1), N * (n - 1)),
    ),
    "axial_horizontal": lambda N, w, n, K: (
        (N * (w + n) // 2, N * (n - 1) // 2, (n - 1) * w * (w - 1)),
        (N * (w + n - 1), N * (n - 1), N * (w - 1)),
    ),
    "axial_rowmajor": lambda N, w, n, K: (
        (N * (w + 1) // 2, N * (n - 1) // 2, (n - 1) * w * w),
        (N * w, N * (n - 1), N * w),
    ),
}


@pytest.mark.parametrize("name", COUNTS)
def test_pairs_of_whole_grids(name):
    for n, w in ((64, 8), (64, 4), (128, 8)):
        for want, causal in zip(COUNTS[name](n, w, n // w, n.bit_length() - 1), (True, False), strict=True):
            assert tuple(pattern(name, n, w, causal).pairs()) == want


class Counted:
    """A namespace that counts the multiply-adds of products, and knows the largest array that was ever made."""

    def __init__(self):
        self.products, self.largest = 0, 0

    def __getattr__(self, name):
        function = getattr(np, name)
        if not callable(function) or isinstance(function, type):
            return function

        def run(*args, **options):
            y = function(*args, **options)
            if isinstance(y, np.ndarray):
                self.largest = max(self.largest, y.size)
                self.products += y.size * args[0].shape[-1] if name == "matmul" else 0
            return y

        return run


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ["fixed", "logsparse", "axial_vertical", "axial_horizontal", "axial_rowmajor"])
def test_the_cost_grows_as_promised(name, causal, rng):
    """Multiply-adds of both directions: N sqrt N, logsparse N log N; no array near N x N."""
    lengths, found = np.array([256, 1024, 4096]), []
    for n in lengths:
        q, k, v = rng.normal(size=(3, n, 2))
        options = engine.Options("max", False, "self", 0.7, None)
        xp, plans = Counted(), (la.Plan.pattern(name, n, causal=causal),)
        engine.forward(q, k, v, plans, options, room=reference, out=None, xp=xp)
        forward = xp.products
        engine.backward(v, q, k, v, plans, options, room=reference, out=None, xp=xp)
        found.append((forward, xp.products - forward))
        assert 4 * xp.largest < n * n or n < 1024
        assert forward <= 4 * 4 * sum(plans[0].pairs())  # dense blocks do at most the pairs of the other half as well
    growth = np.log2(lengths)[:, None] if name == "logsparse" else np.sqrt(lengths)[:, None]
    slope, _ = np.polyfit(np.log(lengths), np.log(np.array(found) / growth), 1)
    assert np.all(abs(slope - 1) < 0.08), slope


# -- plans of one's own -----------------------------------------------------------------------------------------


def routed(n, causal, rng, rep=False):
    """Clusters: a query meets its own cluster's keys, every other cluster is a region, cut at the query."""
    cluster = rng.integers(0, 3, n)
    direct, members, users = [], [], []
    for t in range(n):
        seen = np.arange(t + 1 if causal else n)
        direct.append(seen[cluster[seen] == cluster[t]].tolist())
        users.append([])
        for c in range(3):
            own = seen[cluster[seen] == c].tolist()
            if c != cluster[t] and own:
                users[-1].append(len(members))
                members.append(own)
    return la.Plan(n, direct, members, users, [m[len(m) // 2] for m in members] if rep else None)


@pytest.mark.parametrize("causal", [False, True])
def test_a_plan_of_ones_own(causal, rng):
    plan = routed(14, causal, rng)
    np.testing.assert_array_equal(plan.coverage(), visible(14, causal))
    assert plan.span == ("past" if causal else "all")
    assert plan == eval(repr(plan), vars(la))
    for again in (pickle.loads(pickle.dumps(plan)), routed(14, causal, np.random.default_rng(1), rep=True)):
        assert (again == plan) == (hash(again) == hash(plan)) == (again.has_rep is False)
    hash(la.Combiner(plan))


def test_a_pattern_prints_as_the_code_that_makes_it():
    for plan in (pattern("fixed", 9, 3, True), pattern("logsparse", 9, None, False)):
        assert eval(repr(plan), vars(la)) is plan
        assert pickle.loads(pickle.dumps(plan)) is plan
    assert repr(pattern("fixed", 9, 3, True)) == "Plan.pattern('fixed', 9, size=3, causal=True)"
    assert pattern("fixed", 100, None, True) == pattern("fixed", 100, 16, True) != pattern("fixed", 40, None, True)
    assert pattern("fixed", 5, 10**15, True) is pattern("fixed", 5, 5, True)  # no more is laid out than there is


def test_a_plan_and_its_edges_do_the_same(rng):
    """The lists that a pattern's blocks stand for, given as a plan, run by the other path."""
    q, k, v = rng.normal(size=(3, 2, 13, 4))
    for name in NAMES:
        for causal in spans_of(name):
            plan = pattern(name, 13, 4, causal)
            if name == "joint":  # no partition: not for a mechanism
                continue
            lists = ([e.row(i).tolist() for i in range(e.indptr.size - 1)] for e in plan._lists())
            own = la.Combiner(la.Plan(13, *lists, None if plan.rep is None else plan.rep.tolist()))
            named = la.Combiner(name, **({} if name == "logsparse" else {"span" if name == "fixed" else "width": 4}))
            for backend in ("reference", "numba"):
                want = named(q, k, v, causal=causal, backend=backend)
                np.testing.assert_allclose(own(q, k, v, causal=causal, backend=backend), want, rtol=0, atol=1e-14)


GOOD = {"n": 3, "direct": [[0], [0, 1], [2]], "members": [[0, 1]], "users": [[], [], [0]]}
BAD = {
    "n": ({"n": -1}, ValueError, r"`n` must be at least 0, got -1\."),
    "n real": ({"n": 3.0}, TypeError, r"`n` must be an integer, got 3\.0\."),
    "rows": ({"direct": [[0]]}, ValueError, r"`direct` must have n = 3 rows, got 1\."),
    "range": (
        {"direct": [[0], [3], []]},
        ValueError,
        r"`direct` must hold integers from 0 to below n = 3, got \[3\]\.",
    ),
    "negative": ({"members": [[-1]]}, ValueError, r"`members` must hold integers from 0 to below n = 3, got \[-1\]\."),
    "region": (
        {"users": [[], [], [1]]},
        ValueError,
        r"`users` must hold integers from 0 to below the number of regions = 1, got \[1\]\.",
    ),
    "reals": (
        {"direct": [[0.5], [1], [2]]},
        TypeError,
        r"`direct` must hold rows of integers, got \[0\.5\] in row 0\.",
    ),
    "twice": ({"direct": [[0, 0], [1], [2]]}, ValueError, r"`direct` must not hold a number twice in a row, got .*\."),
    "no list": ({"members": None}, TypeError, r"`members` must be a sequence of sequences of integers, got NoneType\."),
    "no row": ({"direct": [[0], 3, [2]]}, TypeError, r"`direct` must hold rows of integers, got 3 in row 1\."),
    "text": ({"users": [[], [], "0"]}, TypeError, r"`users` must hold rows of integers, got '0' in row 2\."),
    "rep shape": ({"rep": [0, 1]}, ValueError, r"`rep` must hold one member a region, 1 in all, got shape \(2,\)\."),
    "rep": ({"rep": [2]}, ValueError, r"`rep` must name a member of each region, got 2 for region 0\."),
    "rep real": ({"rep": [0.5]}, TypeError, r"`rep` must hold integers, got dtype float64\."),
}


@pytest.mark.parametrize("changes, error, pattern", BAD.values(), ids=BAD)
def test_plans_that_cannot_be(changes, error, pattern):
    with pytest.raises(error, match=f"^{pattern}$"):
        la.Plan(**(GOOD | changes))


BAD_PATTERNS = {
    "name": (("spiral", 9), {}, ValueError, r"`name` must be one of 'fixed', .*'joint', got 'spiral'"),
    "size of logsparse": (("logsparse", 9), {"size": 2}, ValueError, r"`size` must be None for 'logsparse'.*got 2"),
    "joint": (("joint", 9), {}, ValueError, r"`causal` must be True for 'joint'.*got False"),
    "size": (("fixed", 9), {"size": 0}, ValueError, r"`size` must be at least 1, got 0"),
    "causal": (("fixed", 9), {"causal": 1}, TypeError, r"`causal` must be True or False, got 1"),
}


@pytest.mark.parametrize("args, options, error, pattern", BAD_PATTERNS.values(), ids=BAD_PATTERNS)
def test_patterns_that_cannot_be(args, options, error, pattern):
    with pytest.raises(error, match=pattern):
        la.Plan.pattern(*args, **options)


@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_a_hole_or_an_overlap_is_an_error(backend, rng):
    q, k, v = rng.normal(size=(3, 3, 2))
    hole = la.Plan(3, [[0], [1], [2]], [[0, 1]], [[], [], [0]])
    overlap = la.Plan(3, [[0], [0, 1], [1, 2]], [[0, 1]], [[], [], [0]])
    future = la.Plan(3, [[0, 1], [0, 1], [2]], [[0, 1]], [[], [], [0]])
    for plan, said in (
        (hole, r"\(causal=True\), got 0 times for query 1 and key 0\."),
        (overlap, r"\(causal=True\), got 2 times for query 2 and key 1\."),
        (future, r"\(causal=True\), got 1 times for query 0 and key 1\."),
    ):
        assert plan.span is None
        with pytest.raises(ValueError, match=rf"^`pattern` must meet each visible key exactly once {said}$"):
            la.Combiner(plan)(q, k, v, causal=True, backend=backend)
    good = la.Combiner(la.Plan(**GOOD))
    good(q, k, v, causal=True, backend=backend)
    with pytest.raises(ValueError, match=r"\(causal=False\), got 0 times for query 0 and key 1\.$"):
        good(q, k, v, backend=backend)
    with pytest.raises(ValueError, match=r"^`pattern` must be a plan of the tokens at hand, N = 2, got one of 3\.$"):
        good(q[:2], k[:2], v[:2], causal=True, backend=backend)


def test_a_mask_of_a_plan():
    plan = la.Plan(**GOOD)
    with pytest.raises(TypeError, match=r"`key_mask` must be an array of bool .*got dtype int64"):
        plan.restrict([1, 0, 1])
    with pytest.raises(ValueError, match=r"`key_mask` must have shape \(n = 3,\), got \(2,\)"):
        plan.restrict([True, False])
