"""What cosFormer's paper and page promise: its table of angles, its symmetries, its limits."""

from __future__ import annotations

import math
from itertools import pairwise

import mpmath
import numpy as np
import pytest
from cases import FLOAT64, assert_bits, assert_close, values_on_backends

import linattn as la
from linattn import _arrays
from linattn.audit import quadratic
from linattn.mechanisms.cosformer import angle_table

XP = _arrays.namespace(np.ones(1))
U = {"float64": 2.0**-53, "float32": 2.0**-24}


def exact_table(positions, length):
    """cos and sin of pi p / (2 length) in 40 digits."""
    with mpmath.workdps(40):
        angles = [mpmath.pi * int(p) / (2 * length) for p in positions]
        return [(mpmath.cos(a), mpmath.sin(a)) for a in angles]


def some_positions(length, rng):
    ends = {0, 1, length // 2, length // 2 + 1, length - 1, length} & set(range(length + 1))
    return np.array(sorted(ends | set(rng.integers(0, length + 1, 40).tolist())))


# -- the table --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 3, 7, 64, 100, 4096, 100_000, 10**6])
def test_table_is_right_to_a_rounding(length, rng):
    """Relative error of every entry: 3 u in float64, one rounding more than that in float32."""
    positions = some_positions(length, rng)
    table = angle_table(positions.astype(float), length, XP)
    for got, want in zip(table, exact_table(positions, length), strict=True):
        for x, exact in zip(got, want, strict=True):
            size = abs(float(exact)) if abs(exact) > 1e-30 else 0.0
            assert abs(float(mpmath.mpf(float(x)) - exact)) <= 3 * U["float64"] * size + 1e-39
            single = float(np.float32(x))
            assert abs(float(mpmath.mpf(single) - exact)) <= U["float32"] * (1 + 1e-6) * size + 1e-39


@pytest.mark.parametrize("length", [1, 2, 3, 5, 64, 4095, 4096, 99_999, 10**6])
def test_table_has_no_negative_cosine(length):
    """cos(pi/2 * p / length), as written in the authors' code, ends below 0; ours ends at 0."""
    positions = np.arange(length + 1.0)
    for table in (angle_table(positions, length, XP), angle_table(positions, length, XP).astype("float32")):
        assert np.all(table >= 0)
        assert table[-1, 0] == 0
        assert table[-1, 1] == 1
        assert tuple(table[0]) == (1, 0)
        assert np.all(np.diff(table[:, 0]) <= 0)
        assert np.all(np.diff(table[:, 1]) >= 0)


@pytest.mark.parametrize("length", [64, 4096, 100_000])
def test_pair_weight_in_float32(length, rng):
    """cos a cos b + sin a sin b: only non-negative terms, so a few roundings whatever the length."""
    p, s = rng.integers(0, length + 1, (2, 2000))
    table = angle_table(np.arange(length + 1.0), length, XP).astype("float32")
    got = np.sum(table[p] * table[s], axis=-1, dtype="float32")
    distance = abs(p - s)
    want = np.where(
        2 * distance <= length,
        np.cos(distance * math.pi / (2 * length)),
        np.sin((length - distance) * math.pi / (2 * length)),
    )
    assert np.max(abs(got - want) / np.where(want == 0, 1, want), where=want > 0, initial=0) <= 4 * U["float32"]


def test_algebraic_cosines():
    """length 1, 2, 3: weights 1, sqrt(3)/2, sqrt(2)/2, 1/2, 0 between equal features."""
    for length, weights in (
        (1, [1, 0]),
        (2, [1, math.sqrt(0.5), 0]),
        (3, [1, math.sqrt(0.75), 0.5, 0]),
    ):
        ones = np.ones((length + 1, 1))
        got = la.CosFormer(length, normalize=False).weights(ones, ones)
        t = np.arange(length + 1)
        want = np.array(weights)[abs(t[:, None] - t)]
        assert np.all(abs(got - want) <= 3 * U["float64"])


# -- symmetries and limits --------------------------------------------------------------------------------------


def draw(rng, n=37, m=None, d=16, e=3, lead=(2,)):
    m = n if m is None else m
    return [rng.normal(size=(*lead, *shape)) for shape in ((n, d), (m, d), (m, e))]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("attend, backend", values_on_backends([la.CosFormer(64)]))
def test_only_differences_of_positions_count(attend, backend, causal, rng):
    q, k, v = draw(rng)
    p = np.arange(37)
    moved = attend(q, k, v, causal=causal, positions=p + 27, backend=backend)
    assert_close(moved, attend(q, k, v, causal=causal, backend=backend))
    halves = attend(q, k, v, causal=causal, positions=p + 0.5, backend=backend)
    assert_close(halves, attend(q, k, v, causal=causal, backend=backend))


@pytest.mark.parametrize("attend, backend", values_on_backends([la.CosFormer(64), la.CosFormer()]))
def test_a_reversed_sequence_gives_the_reversed_result(attend, backend, rng):
    args = draw(rng)
    reversed_args = [x[:, ::-1] for x in args]
    assert_close(attend(*reversed_args, backend=backend)[:, ::-1], attend(*args, backend=backend))


@pytest.mark.parametrize("attend, backend", values_on_backends([la.CosFormer(64)]))
def test_tokens_move_with_their_positions(attend, backend, rng):
    q, k, v = draw(rng)
    order = rng.permutation(37)
    got = attend(q, k[:, order], v[:, order], positions=(np.arange(37), order), backend=backend)
    assert_close(got, attend(q, k, v, backend=backend))


@pytest.mark.parametrize("causal", [False, True])
def test_a_long_length_is_plain_relu(causal, rng):
    """w = cos(pi (t - s) / (2 length)) = 1 - O((N / length)^2)."""
    args = draw(rng)
    assert_close(la.CosFormer(10**9)(*args, causal=causal), la.Linear("relu")(*args, causal=causal))


@pytest.mark.parametrize("causal", [False, True])
def test_a_fixed_length_does_not_look_at_how_long_the_input_is(causal, rng):
    """With the authors' length = N the first 32 tokens change by percents when the sequence grows."""
    q, k, v = draw(rng, 64)
    attend, short = la.CosFormer(64), [x[:, :32] for x in (q, k, v)]
    mask = np.arange(64) < 32
    assert_close(attend(q, k, v, causal=causal, key_mask=mask)[:, :32], attend(*short, causal=causal))
    if not causal:
        drift = la.CosFormer()(*short) - la.CosFormer(64)(*short)
        assert np.linalg.norm(drift) > 0.01 * np.linalg.norm(la.CosFormer(64)(*short))


@pytest.mark.parametrize("causal", [False, True])
def test_left_padding_needs_nothing_but_a_mask(causal, rng):
    q, k, v = draw(rng, 20)
    padded = [np.concatenate([rng.normal(size=(2, 7, x.shape[-1])), x], axis=1) for x in (q, k, v)]
    mask = np.arange(27) >= 7
    attend = la.CosFormer(64)
    assert_close(attend(*padded, causal=causal, key_mask=mask)[:, 7:], attend(q, k, v, causal=causal))


def test_a_padded_batch_is_each_sequence_alone(rng):
    q, k, v = draw(rng, 24, lead=(3,))
    lengths = [24, 1, 13]
    mask = np.arange(24) < np.array(lengths)[:, None]
    together = la.CosFormer(64)(q, k, v, key_mask=mask)
    for i, n in enumerate(lengths):
        assert_close(together[i, :n], la.CosFormer(64)(q[i, :n], k[i, :n], v[i, :n]))


@pytest.mark.parametrize("attend, backend", values_on_backends([la.CosFormer(64), la.CosFormer()]))
def test_packed_sequences_are_separate_calls_to_the_bit(attend, backend, rng):
    args, edges = draw(rng), [0, 5, 5, 6, 37]
    causal = attend.length is not None
    packed = attend(*args, causal=causal, cu_seqlens=edges, backend=backend)
    for a, b in pairwise(edges):
        alone = attend(*(x[:, a:b] for x in args), causal=causal, backend=backend)
        assert_bits(packed[:, a:b], alone)


def test_rows_whose_features_meet_no_key_are_zero(rng):
    q, k, v = draw(rng, 5, lead=())
    q[2] = -abs(q[2])
    out, backward = la.CosFormer(8).vjp(q, k, v, causal=True)
    d_q, _, d_v = backward(np.ones_like(out))
    assert np.all(out[2] == 0)
    assert np.all(d_q[2] == 0)
    live = np.any(out != 0, axis=-1)
    assert_close(np.sum(d_v, axis=0), np.full(3, np.count_nonzero(live)))  # each live row hands on all of its d_out


def test_causal_is_autoregressive(rng):
    """With length = N, as the authors' code has it when N = M."""
    q, k, v = draw(rng, 16)
    attend = la.CosFormer(16)
    before = attend(q, k, v, causal=True)
    k[:, 9:], v[:, 9:] = rng.normal(size=(2, 7, 16)), 1e3
    assert_bits(attend(q, k, v, causal=True)[:, :9], before[:, :9])


# -- the authors' code ------------------------------------------------------------------------------------------


def authors(q, k, v, causal, eps=1e-6):
    """The authors' module with identity projections: [phi sin, phi cos] features, index from 1, clamped divisor."""
    n, m = q.shape[-2], k.shape[-2]
    unit = math.pi / 2 / max(n, m)
    wide = []
    for x, count in ((q, n), (k, m)):
        angle = unit * np.arange(1, count + 1)[:, None]
        phi = np.maximum(x, 0)
        wide.append(np.concatenate([phi * np.sin(angle), phi * np.cos(angle)], axis=-1))
    a = wide[0] @ np.swapaxes(wide[1], -1, -2)
    if causal:
        a = np.tril(a)
    return a @ v / np.maximum(np.sum(a, axis=-1, keepdims=True), eps)


@pytest.mark.parametrize("causal, n, m", [(False, 20, 20), (True, 20, 20), (False, 20, 33), (False, 33, 20)])
def test_the_authors_result(causal, n, m, rng):
    args = draw(rng, n, m)
    attend = la.CosFormer(max(n, m), eps=("clamp", 1e-6))
    assert_close(attend(*args, causal=causal), authors(*args, causal))


def test_safe_does_not_depend_on_the_scale(rng):
    """The clamp does: with q and k a thousandth it moves the result by percents."""
    q, k, v = draw(rng, 20, lead=())
    small = q * 2.0**-10, k * 2.0**-10, v
    assert_bits(la.CosFormer(64)(*small, causal=True), la.CosFormer(64)(q, k, v, causal=True))
    clamped = la.CosFormer(64, eps=("clamp", 1e-4))
    change = clamped(*small, causal=True) - clamped(q, k, v, causal=True)
    assert np.linalg.norm(change) > 0.01 * np.linalg.norm(clamped(q, k, v, causal=True))


def test_stretch_is_one_based_and_meets_at_both_ends(rng):
    q, k, v = draw(rng, 20, 50)
    want = quadratic.FORMULAS["CosFormer"](q, k, v, align="stretch")
    assert_close(la.CosFormer(align="stretch")(q, k, v), want)
    assert np.linalg.norm(la.CosFormer()(q, k, v) - want) > 0.05 * np.linalg.norm(want)


@pytest.mark.parametrize("attend, backend", values_on_backends([la.CosFormer(4096)]))
def test_only_old_keys_alive(attend, backend, rng):
    """Float32, keys 0 .. 2 alone have features: a rotated state loses 3e-4 here; the absolute frame a few u."""
    q, k, v = (abs(x).astype("float32") for x in draw(rng, 4096, d=8, e=2, lead=()))
    k[3:] = -1
    wide = [x.astype("float64") for x in (q, k, v)]
    want = quadratic.FORMULAS["CosFormer"](wide[0], wide[1][:3], wide[2][:3], length=4096)
    got = attend(q, k, v, causal=True, backend=backend)
    error = abs(got[3:] - want[3:]) / want[3:]  # v >= 0: relative, entry by entry
    assert np.max(error) <= 64 * U["float32"]


def test_float64_is_float64(rng):
    """The authors' table is float32 even in a float64 module (2.5e-8)."""
    args = draw(rng, 300)
    want = quadratic.FORMULAS["CosFormer"](*args, length=300, causal=True)
    assert_close(la.CosFormer(300)(*args, causal=True), want, FLOAT64)


def test_one_query_against_a_cache(rng):
    """The authors' code gives a single query the index 1 and the cache's length; a state keeps its position."""
    q, k, v = draw(rng, 12, lead=())
    attend = la.CosFormer(64)
    state = attend.init_state(k, v)
    _, state = attend.step(q[:11], k[:11], v[:11], state)
    last, _ = attend.step(q[11:], k[11:], v[11:], state)
    assert_close(last, attend(q, k, v, causal=True)[11:])
