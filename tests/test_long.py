"""Long sums keep their digits: the error is bounded whatever the number of tokens."""

from __future__ import annotations

import numpy as np
import pytest
from cases import values_on_backends

import linattn as la

U = {"float32": 2.0**-24, "float64": 2.0**-53}
SHORT, LONG = 1_000, 100_000
VALUES = [la.Linear(), la.Linear("relu"), la.CosFormer(LONG)]


def worst(attend, backend, k, v, n_tokens, dtype):
    """max |out - v| / (u |v|) for one key and value repeated: the exact result is v, whatever the weights."""
    k = np.broadcast_to(k, (n_tokens, k.size)).astype(dtype)
    v = np.broadcast_to(v, (n_tokens, v.size)).astype(dtype)
    out = attend(k, k, v, causal=True, backend=backend)
    return np.max(abs(out.astype("float64") - v[0]) / (U[dtype] * abs(v[0].astype("float64"))))


@pytest.mark.parametrize("dtype", U)
@pytest.mark.parametrize("attend, backend", values_on_backends(VALUES))
def test_repeated_keys(attend, backend, dtype, rng):
    """The easy-looking input is the worst: rounding of repeated keys is biased and grows like N in a running sum.

    The bound 2 (D + e_phi / u) has no N in it: D is a block's tokens, the features and a few, in either room.
    """
    k, v = rng.uniform(0.5, 1.5, 16), rng.uniform(0.5, 1.5, 8)
    if dtype == "float64" and backend == "reference":
        bound = 2 * (LONG / 64 + 64 + 2 * 16 + 3) + 12  # float64 has no wider total: one rounding a chunk
    else:
        bound = 2 * (96 + 2 * 16 + 4) + 12
    assert worst(attend, backend, k, v, LONG, dtype) <= bound


@pytest.mark.parametrize("attend, backend", values_on_backends(VALUES))
def test_error_does_not_grow(attend, backend, rng):
    """Float32, a hundred times the tokens: at most twice the error (a running sum: eighty times)."""
    k, v = np.full(16, 0.1), np.full(8, 0.1)
    short = worst(attend, backend, k, v, SHORT, "float32")
    assert worst(attend, backend, k, v, LONG, "float32") <= 2 * max(short, 8)


@pytest.mark.parametrize("attend, backend", values_on_backends([la.Linear()]))
def test_a_long_stream_of_single_tokens(attend, backend):
    """The state carries what its sums round away from step to step."""
    k, v = np.full((64, 4), 0.1, "float32"), np.full((64, 2), 0.1, "float32")
    state = attend.init_state(k, v)
    for _ in range(300):
        _, state = attend.step(k, k, v, state, backend=backend)
    phi = np.exp(np.log1p(np.float32(0.1).astype("float64")))  # elu1(0.1) = 1.1
    want = 300 * 64 * phi * np.float32(0.1).astype("float64")
    sums, rest = (x.astype("float64") for x in state.arrays)
    assert np.all(abs((sums + rest)[..., :-1] - want) <= 16 * U["float32"] * want)


@pytest.mark.parametrize("attend, backend", values_on_backends([la.Linear(), la.CosFormer(20_000)]))
def test_gradients_of_a_long_sequence(attend, backend, rng):
    """sum_s d_v[s] = sum_t d_out[t], and constant values have no gradient in q and k: both over 20 000 tokens."""
    q, k = rng.normal(size=(2, 20_000, 8)).astype("float32")
    v = np.ones((20_000, 4), "float32")
    out, backward = attend.vjp(q, k, v, causal=True, backend=backend)
    d_out = rng.normal(size=out.shape).astype("float32")
    d_q, d_k, d_v = backward(d_out)
    live = np.any(out != 0, axis=-1)
    size = np.sum(abs(d_out[live]), axis=0, dtype="float64")
    error = abs(np.sum(d_v, axis=0, dtype="float64") - np.sum(d_out[live], axis=0, dtype="float64"))
    assert np.all(error <= 64 * U["float32"] * size)
    _, moved = attend.vjp(q, k, v * rng.normal(size=v.shape).astype("float32"), causal=True, backend=backend)
    for zero, usual in zip((d_q, d_k), moved(d_out)[:2], strict=True):
        assert np.linalg.norm(zero) <= 1e-6 * np.linalg.norm(usual)
