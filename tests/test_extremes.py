"""The ends of what can be given: all of a format's numbers, any cuts, more elements than 32 bits count."""

from __future__ import annotations

from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
from cases import (
    BACKENDS,
    FLOAT64,
    MAIN,
    Case,
    assert_bits,
    assert_close,
    assert_gradients_close,
    backends_of_steps,
    has_blocks,
    values_on_backends,
)
from hypothesis import given
from hypothesis import strategies as st

import linattn as la
from linattn.audit import bounds, subjects, truth
from linattn.audit.units import PASSES, Arithmetic

VALUES = [*MAIN, la.Linear("relu"), la.Linear("relu", normalize=False)]
MARGIN = 2.0  # T as it is proved; the audit's families keep to 1


# ----------------------------------------------------------------------------------------- all of a format


@st.composite
def numbers(draw, n_most=8):
    """A call with numbers drawn from all finite ones of a format, sign, exponent and significand alike."""
    attend = draw(st.sampled_from(VALUES))
    dtype = draw(st.sampled_from(["float64", "float32"]))
    causal = draw(st.booleans())
    n = draw(st.integers(1, n_most))
    m = n if causal or has_blocks(attend) else draw(st.integers(1, n_most))
    d, e = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    limits = np.finfo(dtype)
    spread = draw(st.sampled_from([1, 10, 60, limits.maxexp - 2]))
    centre = draw(st.integers(limits.minexp + spread - 20, limits.maxexp - spread - 1)) if spread < 61 else 0

    def some(*shape):
        exponents = rng.integers(centre - spread, centre + spread + 1, shape)
        with np.errstate(all="ignore"):
            return np.ldexp(rng.uniform(-1, 1, shape), exponents).astype(dtype)

    q, k = some(n, d), some(m, d)
    centre, spread = draw(st.integers(-20, 20)), 3  # v and d_out of an ordinary size
    return attend, dtype, causal, q, k, some(m, e), some(n, e), draw(st.sampled_from(BACKENDS))


@given(numbers())
def test_finite_results_are_right_over_all_of_a_format(call):
    """Wherever the bound is claimed it holds; elsewhere nothing raises. Never a wrong finite number."""
    attend, dtype, causal, q, k, v, g, backend = call
    out, backward = attend.vjp(q, k, v, causal=causal, backend=backend)
    got = dict(zip(PASSES, (out, *backward(g)), strict=True))
    arithmetic = Arithmetic(dtype, getattr(attend, "normalize", True))
    exact = truth.truth(attend, q, k, v, g, arithmetic, causal=causal)
    n_features = subjects.n_rows(attend, q.shape[1])
    depth = bounds.depth(subjects.engine_of(attend), backend, dtype, n_keys=max(len(q), len(k)), n_features=n_features)
    most = np.finfo(dtype).max / 2.0**12
    for name in PASSES if not exact.unclaimed_backward else ("out",) if not exact.unclaimed else ():
        wide, unit = got[name].astype(exact.value[name].dtype), exact.unit(name, arithmetic, depth)
        in_range = exact.terms[name] <= most
        error = abs(wide - exact.value[name])
        with np.errstate(all="ignore"):
            far = np.where(in_range & (error != 0), error / unit, 0)
        assert np.all(far <= MARGIN), (name, float(np.max(far)))


@st.composite
def bits(draw):
    """A call with arbitrary bit patterns: NaN of every kind, inf, subnormals, both zeros."""
    attend = draw(st.sampled_from(MAIN))
    dtype, integer = draw(
        st.sampled_from(
            [("float64", "uint64"), ("float32", "uint32"), ("float16", "uint16"), (ml_dtypes.bfloat16, "uint16")]
        )
    )
    n, d, e = draw(st.integers(1, 6)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    top = np.iinfo(integer).max
    q, k, v, g = (rng.integers(0, top, s, integer, endpoint=True).view(dtype) for s in ((n, d), (n, d), (n, e), (n, e)))
    return attend, q, k, v, g, draw(st.sampled_from(BACKENDS)), draw(st.integers(0, n - 1))


@given(bits())
def test_any_bits_are_taken_and_later_ones_change_nothing_before(call):
    """No error, no warning; rows before token t are the bits they are with zeros from t on, unless those are NaN."""
    attend, q, k, v, g, backend, t = call
    out, backward = attend.vjp(q, k, v, causal=True, backend=backend)
    grads = backward(g)
    assert [x.dtype for x in (out, *grads)] == [q.dtype] * 4
    k, v = k.copy(), v.copy()
    k[t:], v[t:] = 0, 0
    assert_same_up_to_rounding(attend(q, k, v, causal=True, backend=backend)[:t], out[:t])


def assert_same_up_to_rounding(got, want):
    """NaN where NaN, inf where inf: a suffix that is not finite may cost a prefix its last bits, and nothing more."""
    limits = ml_dtypes.finfo(got.dtype)
    tolerance, least = 64 * float(limits.eps), float(limits.smallest_normal)
    got, want = got.astype("float64"), want.astype("float64")
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    np.testing.assert_array_equal(np.isposinf(got), np.isposinf(want))
    finite = np.isfinite(want)
    got, want = got[finite], want[finite]
    assert np.all(abs(got - want) <= tolerance * (abs(want) + least))


# ---------------------------------------------------------------------------------------------- any cuts


@given(st.data())
def test_any_cuts_of_a_stream_and_any_packing(data):
    """Edges anywhere, repeats among them: steps are the whole pass, packed segments are calls of their own."""
    attend = data.draw(st.sampled_from([*MAIN, la.CosFormer(200, feature_map="elu1")]))
    backend = data.draw(st.sampled_from(backends_of_steps(attend)))
    n = data.draw(st.integers(0, 130))
    edges = [0, *sorted(data.draw(st.lists(st.integers(0, n), max_size=5))), n]
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    (q, k, v), _ = Case(attend, causal=True, n=n, m=n).draw(rng)
    mask = rng.random(n) > data.draw(st.sampled_from([0.0, 0.3]))
    whole = attend(q, k, v, causal=True, key_mask=mask, backend=backend)
    state, parts = attend.init_state(k, v), []
    for a, b in pairwise(edges):
        y, state = attend.step(q[:, a:b], k[:, a:b], v[:, a:b], state, key_mask=mask[a:b], backend=backend)
        parts.append(y)
    assert_close(np.concatenate(parts, axis=1), whole, FLOAT64)
    packed, back = attend.vjp(q, k, v, causal=True, key_mask=mask, cu_seqlens=edges, backend=backend)
    grads = back(np.ones_like(packed))
    for a, b in pairwise(edges):
        part = [x[:, a:b] for x in (q, k, v)]
        alone, alone_back = attend.vjp(*part, causal=True, key_mask=mask[a:b], backend=backend)
        assert_bits(packed[:, a:b], alone)
        if b > a:
            assert_gradients_close([x[:, a:b] for x in grads], alone_back(np.ones_like(alone)), FLOAT64)


# ------------------------------------------------------------------------------------------- range, size


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "attend, backend", values_on_backends([la.Linear(), la.Linear("identity"), la.CosFormer(2000)])
)
def test_sixteen_bits_divide_before_they_round(attend, backend, causal):
    """float16 ends at 65504: sums over 2000 keys of 64 features do not fit, their quotient does."""
    x = np.ones((2000, 64), "float16")
    v = np.linspace(0.5, 2, 2000, dtype="float16")[:, None]
    out = attend(x, x, v, causal=causal, backend=backend)
    want = np.float64(v).cumsum() / np.arange(1, 2001)
    assert np.isfinite(out).all()
    if isinstance(attend, la.Linear):
        want = want if causal else np.full(2000, want[-1])
        assert np.all(abs(out[:, 0] - want) <= 1.01 * 2.0**-11 * want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("attend", MAIN, ids=repr)
def test_elements_beyond_two_to_the_31(attend, backend, tmp_path, rng):
    """Heads that lie 2^31 elements apart in one file: offsets of 32 bits would read something else."""
    n, d, apart = 50, 8, 2**31 + 2**12
    store = np.memmap(tmp_path / "sparse", "float16", "w+", shape=(apart + 3 * n * d,))  # takes no room on disk
    plain = rng.normal(size=(3, 2, n, d)).astype("float16")
    views = []
    for i, x in enumerate(plain):
        strides = (apart * 2, d * 2, 2)
        view = np.lib.stride_tricks.as_strided(store[i * n * d :], (2, n, d), strides)
        view[...] = x
        views.append(view)
    args = [np.asarray(view) for view in views]
    out, backward = attend.vjp(*args, causal=True, backend=backend)
    want, backward_there = attend.vjp(*plain, causal=True, backend=backend)
    assert_bits(out, want)
    d_out = rng.normal(size=out.shape).astype("float16")
    for got, there in zip(backward(d_out), backward_there(d_out), strict=True):
        assert_bits(got, there)


TOKENS_OF_MANY, CHANNELS_OF_MANY = 2**25 + 1, 64  # together more than 2^31 numbers, 4.3 GB of float16


@pytest.mark.slow
def test_a_result_of_more_than_two_to_the_31_elements():
    """Values and results alike, of one head: only the first key and the last have weight."""
    q = np.ones((1, TOKENS_OF_MANY, 1), "float16")
    k = np.zeros_like(q)
    k[:, [0, -1]] = 1
    v = np.full((1, TOKENS_OF_MANY, CHANNELS_OF_MANY), 5, "float16")
    v[:, 0], v[:, -1] = 1, 3
    out = la.Linear("relu")(q, k, v, causal=True, backend="numba")
    assert out.size > 2**31
    assert np.all(out[:, :-1] == 1)
    assert np.all(out[:, -1] == 2)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements_of_softmax():
    """A result of that many; one key."""
    q = np.ones((1, TOKENS_OF_MANY, 1), "float16")
    v = np.arange(CHANNELS_OF_MANY, dtype="float16").reshape(1, 1, -1)
    out = la.Softmax()(q, q[:, :1], v, backend="numba")
    assert out.size > 2**31
    assert all(np.all(out[:, part] == v) for part in (slice(0, 2**20), slice(-(2**20), None), slice(2**24, 2**24 + 99)))
