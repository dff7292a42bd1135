"""What must not change the result: order, scale, company, copies, masked keys; and what the result must be then."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from cases import (
    BACKENDS,
    BOTH_SIDES,
    CASES,
    CHUNKS,
    FLOAT64,
    LENGTH,
    MAIN,
    TOLERANCE,
    VALUES,
    Case,
    U,
    assert_bits,
    assert_close,
    assert_gradients_close,
    assert_within,
    backends_of,
    can_be_causal,
    complex_step,
    error_bound,
    has_blocks,
    is_cosformer,
    is_distribution,
    on_backends,
    reads_the_call,
    sees_others,
    streams_on_backends,
    values_on_backends,
)

import linattn as la

DISTRIBUTIONS = [case for case in CASES if is_distribution(case.attend)]
HOMOGENEOUS = [la.Linear("relu"), la.CosFormer(LENGTH), la.CosFormer(), la.CosFormer(align="stretch")]


def both_directions(attend, args, d_out, options, backend):
    out, backward = attend.vjp(*args, **options, backend=backend)
    return out, *backward(d_out)


def permuted(x, order):
    return np.take(x, order, axis=-2)


# -- order ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attend, backend", values_on_backends([a for a in VALUES if not has_blocks(a)]))
def test_the_order_of_keys_does_not_matter(attend, backend, rng):
    """Without causality: permuted keys, values and masks (with their positions) give the same, gradients go along."""
    case = Case(attend, n=7, m=13, masked=can_be_causal(attend))
    (q, k, v), options = case.draw(rng)
    d_out = case.cotangent(rng)
    if is_cosformer(attend):
        if attend.length is None:
            options = {"key_mask": None}
        else:
            options["positions"] = (np.arange(7), np.arange(13))
    order = np.arange(13) if is_cosformer(attend) and attend.length is None else rng.permutation(13)
    there = dict(options)
    if there.get("key_mask") is not None:
        there["key_mask"] = there["key_mask"][:, order]
    if "positions" in there:
        there["positions"] = (np.arange(7), order)
    first = both_directions(attend, (q, k, v), d_out, options, backend)
    after = both_directions(attend, (q, permuted(k, order), permuted(v, order)), d_out, there, backend)
    assert_close(after[0], first[0])
    back = np.argsort(order)
    assert_gradients_close((after[1], permuted(after[2], back), permuted(after[3], back)), first[1:])


@pytest.mark.parametrize("attend, backend", values_on_backends([la.Linear(), la.Linear(BOTH_SIDES), la.Softmax()]))
def test_permuted_queries_are_permuted_rows(attend, backend, rng):
    case = Case(attend, n=13, m=7)
    (q, k, v), options = case.draw(rng)
    order = rng.permutation(13)
    out = attend(q, k, v, **options, backend=backend)
    assert_close(attend(permuted(q, order), k, v, **options, backend=backend), permuted(out, order))


# -- weights are a distribution ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case, backend", on_backends(DISTRIBUTIONS))
def test_the_result_is_within_the_hull_of_the_visible_values(case, backend, dtype, rng):
    (q, k, v), options = case.draw(rng, dtype)
    out = case.attend(q, k, v, **options, backend=backend)
    weights = case.attend.weights(q, k, **options)
    assert np.all(weights >= 0)
    mask = options.get("key_mask", np.ones(case.m, dtype=bool))[..., None]
    low = np.min(np.where(mask, v, np.inf), axis=-2, keepdims=True)
    high = np.max(np.where(mask, v, -np.inf), axis=-2, keepdims=True)
    slack = 4 * (case.m + 2 * case.d + 3) * U[dtype] * np.max(abs(v))
    live = case.attend(q, k, np.ones_like(v), **options, backend=backend) > 0.5
    assert np.all(np.where(live, (low - slack <= out) & (out <= high + slack), out == 0))


@pytest.mark.parametrize("case, backend", on_backends(DISTRIBUTIONS))
def test_ones_give_ones(case, backend, rng):
    """v = 1 gives 1, or 0 where nothing has weight; c v gives c out."""
    (q, k, v), options = case.draw(rng)
    out = case.attend(q, k, np.ones_like(v), **options, backend=backend)
    want = np.round(case.formula(q, k, np.ones_like(v), **options))
    assert np.all(abs(out - want) <= FLOAT64)
    assert np.all((out == 0) == (want == 0))


@pytest.mark.parametrize("case, backend", on_backends(CASES))
def test_linear_in_v(case, backend, rng):
    (q, k, v), options = case.draw(rng)
    u = rng.normal(size=v.shape)

    def run(v):
        return case.attend(q, k, v, **options, backend=backend)

    assert_close(run(3 * u - v / 2), 3 * run(u) - run(v) / 2)


@pytest.mark.parametrize(
    "attend, backend", values_on_backends([a for a in VALUES if is_distribution(a) and not has_blocks(a)])
)
def test_one_key_gives_its_value(attend, backend, rng):
    q, k = (abs(rng.normal(size=(2, n, 4))) for n in (5, 1))
    v = rng.normal(size=(2, 1, 3))
    assert_close(attend(q, k, v, backend=backend), np.broadcast_to(v, (2, 5, 3)))


# -- scale ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("attend, backend", values_on_backends(HOMOGENEOUS))
def test_powers_of_two_change_no_bit(attend, backend, dtype, rng):
    """relu(2^a q) = 2^a relu(q): it cancels, under "safe" exactly; and d_q takes 2^-a."""
    causal = can_be_causal(attend)
    case = Case(attend, causal=causal, n=70, m=70)
    (q, k, v), options = case.draw(rng, dtype)
    d_out = case.cotangent(rng, dtype)
    first = both_directions(attend, (q, k, v), d_out, options, backend)
    two = np.dtype(dtype).type(2)
    for a, b in ((40, -40), (-40, 40), (13, 0), (0, -7), (40, 40), (-40, -40)):
        after = both_directions(attend, (q * two**a, k * two**b, v), d_out, options, backend)
        assert_bits(after[0], first[0])
        assert_bits(after[1] * two**a, first[1])
        assert_bits(after[2] * two**b, first[2])
        assert_bits(after[3], first[3])


@pytest.mark.parametrize("attend, backend", values_on_backends(HOMOGENEOUS[:2]))
def test_each_row_has_a_scale_of_its_own(attend, backend, rng):
    """Queries of one call may differ by 2^80: their rows are those they have alone."""
    case = Case(attend, causal=True)
    (q, k, v), options = case.draw(rng)
    d_out = case.cotangent(rng)
    scale = 2.0 ** rng.integers(-40, 41, (2, case.n, 1))
    first = both_directions(attend, (q, k, v), d_out, options, backend)
    after = both_directions(attend, (q * scale, k, v), d_out, options, backend)
    assert_bits(after[0], first[0])
    assert_bits(after[1] * scale, first[1])
    assert_bits(after[2], first[2])


@pytest.mark.parametrize("size", [1e-23, 1e-19, 1e18, 1e19], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("attend, backend", values_on_backends(HOMOGENEOUS[:2]))
def test_tiny_and_huge_features_in_float32(attend, backend, causal, size, rng):
    """Their products under- or overflow, the ratio does not: under "safe" rows are scaled first."""
    case = Case(attend, causal=causal, n=20, m=20, d=16)
    (q, k, v), options = case.draw(rng)
    q, k, v = ((x * s).astype("float32") for x, s in ((q, size), (k, size), (v, 1.0)))
    d_out = case.cotangent(rng, "float32")
    wide = [x.astype("float64") for x in (q, k, v, d_out)]
    out, *grads = both_directions(attend, (q, k, v), d_out, options, backend)
    assert_close(out, case.formula(*wide[:3], **options), TOLERANCE["float32"])
    for got, want in zip(
        grads, complex_step(lambda *moved: case.formula(*moved, **options), wide[:3], wide[3]), strict=True
    ):
        assert_close(got, want, TOLERANCE["float32"])


@pytest.mark.parametrize(
    "attend, backend",
    values_on_backends([la.CosFormer(LENGTH, eps=("clamp", 1e-6)), la.Linear("relu", eps=("add", 1e-6))]),
)
def test_an_eps_of_others_is_not_invariant(attend, backend, rng):
    """The rule they chose: q and k times 1e-3 change the result by a part that has nothing to do with rounding."""
    (q, k, v), options = Case(attend, causal=True).draw(rng)
    one, other = (attend(q * c, k * c, v, **options, backend=backend) for c in (1.0, 1e-3))
    assert np.max(abs(one - other)) > 0.01
    small = attend(q * 1e-3, k * 1e-3, v, **options, backend=backend)
    assert_close(small, Case(attend, causal=True).formula(q * 1e-3, k * 1e-3, v, causal=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_elu1_far_below_zero_is_the_exponential(backend, rng):
    """elu(x) + 1 computed as it is written is 0 in float32 from -17.4 on."""
    attend = la.Linear("elu1")
    q, k = (rng.uniform(-20, -16, (2, 30, 4)).astype("float32") for _ in range(2))
    v = rng.normal(size=(2, 30, 3)).astype("float32")
    for causal in (False, True):
        case = Case(la.Linear("elu1"), causal=causal)
        wide = [x.astype("float64") for x in (q, k, v)]
        want = case.formula(*wide, causal=causal, feature_map="exp")
        absolute = case.formula(*wide[:2], abs(wide[2]), causal=causal, feature_map="exp")
        out = attend(q, k, v, causal=causal, backend=backend)
        assert_within(out, want, absolute, error_bound(attend, 30, 4), "float32")


@pytest.mark.parametrize("attend, backend", values_on_backends([la.Linear(BOTH_SIDES), la.Softmax()]))
def test_an_offset_of_scores_cancels(attend, backend, rng):
    """exp(s + c) = exp(s) exp(c): under softmax a shift of all keys along a query is one of its whole row."""
    if isinstance(attend, la.Softmax):
        (q, k, v), options = Case(attend, causal=True).draw(rng)
        out = attend(q, k, v, **options, backend=backend)
        assert_close(attend(q, k + 7.0, v, **options, backend=backend), out)
    else:  # phi(-x) is phi(x) with its halves swapped
        (q, k, v), options = Case(attend, causal=True).draw(rng)
        assert_close(attend(-q, -k, v, **options, backend=backend), attend(q, k, v, **options, backend=backend))


# -- copies -----------------------------------------------------------------------------------------------------


TWICE = [
    attend
    for attend in VALUES
    if is_distribution(attend) and not has_blocks(attend) and not reads_the_call(attend)
    if attend != la.CosFormer(align="stretch")
]


@pytest.mark.parametrize("attend, backend", values_on_backends(TWICE))
def test_all_keys_twice(attend, backend, rng):
    (q, k, v), _ = Case(attend, n=13, m=7).draw(rng)
    options, twice = {}, {}
    if is_cosformer(attend) and attend.length is None:
        attend = la.CosFormer(13)
    if is_cosformer(attend):
        options = {"positions": (np.arange(13), np.arange(7))}
        twice = {"positions": (np.arange(13), np.tile(np.arange(7), 2))}
    out = attend(q, k, v, **options, backend=backend)
    assert_close(attend(q, np.concatenate([k, k], 1), np.concatenate([v, v], 1), **twice, backend=backend), out)


BROADCAST = [case for case in CASES if not case.moved and len(case.lead[0]) <= 2 and not reads_the_call(case.attend)]


@pytest.mark.parametrize("case, backend", on_backends(BROADCAST))
def test_broadcast_arguments_are_repeated_ones(case, backend, rng):
    """The same result, and gradients summed over the copies."""
    args, options = case.draw(rng)
    d_out = case.cotangent(rng)
    lead = case.out_shape[:-2]
    repeated = [np.ascontiguousarray(np.broadcast_to(x, (*lead, *x.shape[-2:]))) for x in args]
    first = both_directions(case.attend, args, d_out, options, backend)
    after = both_directions(case.attend, repeated, d_out, options, backend)
    assert_close(first[0], after[0])

    def summed(d_x, x):
        d_x = d_x.sum(axis=tuple(range(d_x.ndim - x.ndim)))
        stretched = tuple(i for i, n in enumerate(x.shape) if n == 1 and d_x.shape[i] != 1)
        return d_x.sum(axis=stretched, keepdims=True)

    assert_gradients_close(first[1:], [summed(d_x, x) for d_x, x in zip(after[1:], args, strict=True)], FLOAT64)


# -- company ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("attend, backend", values_on_backends([a for a in VALUES if not sees_others(a)]))
def test_a_head_alone_has_the_bits_it_has_among_others(attend, backend, causal, rng):
    if causal and not can_be_causal(attend):
        causal = False
    case = Case(attend, causal=causal, n=70, m=70, lead=((3, 2), (3, 2), (3, 2)))
    args, options = case.draw(rng, "float32")
    d_out = case.cotangent(rng, "float32")
    among = both_directions(attend, args, d_out, options, backend)
    for head in ((0, 0), (1, 1), (2, 0)):
        alone = both_directions(attend, [x[head] for x in args], d_out[head], options, backend)
        for x, y in zip(alone, among, strict=True):
            assert_bits(x, y[head])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("attend, backend", values_on_backends([a for a in VALUES if not reads_the_call(a)]))
def test_packed_sequences_have_the_bits_of_separate_calls(attend, backend, causal, rng):
    """State, positions and chunks start again in each; empty ones are nothing."""
    if causal and not can_be_causal(attend):
        causal = False
    n = 140
    case = Case(attend, causal=causal, masked=can_be_causal(attend), n=n, m=n)
    args, options = case.draw(rng, "float32")
    d_out = case.cotangent(rng, "float32")
    edges = [0, 0, 1, 50, 50, 115, n]
    packed = both_directions(attend, args, d_out, {**options, "cu_seqlens": np.array(edges)}, backend)
    for a, b in pairwise(edges):
        own = dict(options)
        if "key_mask" in own:
            own["key_mask"] = own["key_mask"][:, a:b]
        alone = both_directions(attend, [x[:, a:b] for x in args], d_out[:, a:b], own, backend)
        for x, y in zip(alone, packed, strict=True):
            assert_bits(x, y[:, a:b])


# -- masked keys ------------------------------------------------------------------------------------------------

MASKABLE = [attend for attend in VALUES if can_be_causal(attend) and not has_blocks(attend)]


@pytest.mark.parametrize("hidden", [0.0, 1e300, np.nan, np.inf], ids=str)
@pytest.mark.parametrize("attend, backend", values_on_backends(MASKABLE))
def test_a_masked_key_is_a_removed_key(attend, backend, hidden, rng):
    """Whatever it holds; its gradients are exactly 0."""
    case = Case(attend, n=7, m=13)
    (q, k, v), _ = case.draw(rng)
    d_out = case.cotangent(rng)
    seen = rng.random(13) > 0.4
    k[:, ~seen], v[:, ~seen] = hidden, hidden
    options = {"positions": (np.arange(7), np.arange(13))} if is_cosformer(attend) else {}
    without = {"positions": (np.arange(7), np.flatnonzero(seen))} if is_cosformer(attend) else {}
    got = both_directions(attend, (q, k, v), d_out, {"key_mask": seen, **options}, backend)
    want = both_directions(attend, (q, k[:, seen], v[:, seen]), d_out, without, backend)
    assert_close(got[0], want[0])
    assert_gradients_close((got[1], got[2][:, seen], got[3][:, seen]), want[1:])
    assert not got[2][:, ~seen].any()
    assert not got[3][:, ~seen].any()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("attend, backend", values_on_backends([attend for attend in MAIN if not has_blocks(attend)]))
def test_what_a_hidden_key_holds_changes_no_bit(attend, backend, causal, rng):
    """Of results and gradients, over a chunk and a part of the next."""
    n = CHUNKS[-1] + 9
    case = Case(attend, causal=causal, n=n, m=n)
    (q, k, v), options = case.draw(rng)
    d_out, seen = case.cotangent(rng), rng.random(n) > 0.4
    results = []
    for hidden in (0.0, np.nan, np.inf):
        k[:, ~seen], v[:, ~seen] = hidden, hidden
        results.append(both_directions(attend, (q, k, v), d_out, options | {"key_mask": seen}, backend))
    for got in results[1:]:
        for x, want in zip(got, results[0], strict=True):
            assert_bits(x, want)


@pytest.mark.parametrize("attend, backend", streams_on_backends(MASKABLE))
def test_a_mask_in_a_stream(attend, backend, rng):
    """Hidden NaN never enters a state."""
    case = Case(attend, causal=True, masked=True)
    (q, k, v), options = case.draw(rng)
    mask = options["key_mask"]
    want = case.formula(q, k, v, **options)
    k, v = np.where(mask[..., None], k, np.nan), np.where(mask[..., None], v, np.nan)
    assert_close(attend(q, k, v, **options, backend=backend), want)
    state, outs = attend.init_state(k, v), []
    for a, b in ((0, 4), (4, 5), (5, 11)):
        out, state = attend.step(q[:, a:b], k[:, a:b], v[:, a:b], state, key_mask=mask[:, a:b], backend=backend)
        outs.append(out)
    assert_close(np.concatenate(outs, axis=1), want)


@pytest.mark.parametrize("attend, backend", values_on_backends(MASKABLE))
def test_rows_that_see_nothing_are_zero(attend, backend, rng):
    """With zero gradients, exactly; one head may see nothing while another does."""
    case = Case(attend, n=7, m=13)
    (q, k, v), _ = case.draw(rng)
    mask = np.array([[False] * 13, [True] * 13])
    got = both_directions(attend, (q, k, v), case.cotangent(rng), {"key_mask": mask}, backend)
    for x in got:
        assert not x[0].any()
        assert x[1].any()


@pytest.mark.parametrize("attend", [attend for attend in MAIN if not has_blocks(attend)], ids=repr)
def test_a_mask_of_its_own_leading_shape(attend, rng):
    """(..., M) broadcasts with the leading axes of q, k and v, and may have more of them."""
    case = Case(attend, n=7, m=13, lead=((), (), ()))
    (q, k, v), _ = case.draw(rng)
    mask = rng.random((3, 2, 13)) > 0.4
    d_out = rng.normal(size=(3, 2, 7, 4))
    for backend in backends_of(attend):
        got = both_directions(attend, (q, k, v), d_out, {"key_mask": mask}, backend)
        assert_close(got[0], case.formula(q, k, v, key_mask=mask))
        each = [both_directions(attend, (q, k, v), d_out[i], {"key_mask": mask[i]}, backend) for i in np.ndindex(3, 2)]
        assert_gradients_close(got[1:], [sum(x[j] for x in each) for j in (1, 2, 3)])
