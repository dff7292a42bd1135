"""The log-linear engine's bits and states, sequences in pieces, memory and array libraries."""

from __future__ import annotations

import inspect
import tracemalloc
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from array_api_extra.testing import lazy_xp_function
from cases import (
    FLOAT32,
    FLOAT64,
    assert_bits,
    assert_close,
    assert_gradients_close,
    complex_step,
    numpy_of,
)
from loglinear_cases import (
    FAR,
    ROOMS,
    SPANS,
    assert_same_sums,
    attend,
    draw,
    empty,
    formula,
    gradients,
    of_norm,
)

import linattn as la
from linattn.engines import log_features, loglinear
from linattn.engines.loglinear import LogLinearState


@pytest.fixture(params=ROOMS)
def room(request):
    return ROOMS[request.param]


# -- bits -----------------------------------------------------------------------------------------------------------


SUFFIXES = {
    "other keys": lambda lk, v, rng: (100 * rng.normal(size=lk.shape), v),
    "huge keys": lambda lk, v, rng: (lk + 300, v),
    "tiny keys": lambda lk, v, rng: (lk - 1e6, v),
    "NaN keys": lambda lk, v, rng: (np.full_like(lk, np.nan), v),
    "infinite keys": lambda lk, v, rng: (np.full_like(lk, np.inf), v),
    "dead keys": lambda lk, v, rng: (np.full_like(lk, -np.inf), v),
    "large values": lambda lk, v, rng: (lk, v + np.asarray(1e6, v.dtype)),
    "huge values": lambda lk, v, rng: (lk, v * np.asarray(1e30, v.dtype)),
    "NaN values": lambda lk, v, rng: (lk, np.full_like(v, np.nan)),
    "infinite values": lambda lk, v, rng: (lk, np.full_like(v, np.inf)),
}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_prefix_knows_nothing_of_what_follows(suffix, dtype, room, rng):
    """Bit for bit, also where a span opens in the middle of a block."""
    lq, lk, v = draw(rng, n=150, scale=3.0, dtype=dtype)
    want, want_lse, _ = attend(lq, lk, v, room)
    for t in (1, 2, 3, 47, 49, 64, 101, 149):
        late_lk, late_v = SUFFIXES[suffix](lk[:, t:], v[:, t:], rng)
        other_lk, other_v = np.concatenate([lk[:, :t], late_lk], 1), np.concatenate([v[:, :t], late_v], 1)
        out, lse, _ = attend(lq, other_lk, other_v, room)
        assert_bits(out[:, :t], want[:, :t])
        assert_bits(lse[:, :t], want_lse[:, :t])
        if "NaN" in suffix or "infinite" in suffix:
            assert not np.any(np.isfinite(out[:, t:]))


def test_gradients_of_a_prefix_survive_a_bad_suffix(room, rng):
    """Rows before a NaN key that get no cotangent from behind it keep their gradients finite, and d_lq its bits."""
    lq, lk, v = draw(rng, n=100, scale=3.0)
    d_out = rng.normal(size=v.shape)
    d_out[:, 60:] = 0
    want = gradients(d_out, lq, lk, v, room)
    bad = lk.copy()
    bad[:, 60:] = np.nan
    got = gradients(d_out, lq, bad, v, room)
    assert_bits(got[0][:, :60], want[0][:, :60])


def test_a_head_alone_has_the_bits_of_the_batch(room, rng):
    lq, lk, v = draw(rng, n=100, scale=10.0, lead=((3,), (3,), (3,)))
    for span in SPANS:
        out, _, state = attend(lq, lk, v, room, span=span)
        d_out = rng.normal(size=out.shape)
        grads = gradients(d_out, lq, lk, v, room, span=span)
        for i in range(3):
            one, _, state_of_one = attend(lq[i], lk[i], v[i], room, span=span)
            assert_bits(one, out[i])
            for x, y in zip(state_of_one, state):
                assert_bits(x, y[i])
            for x, y in zip(gradients(d_out[i], lq[i], lk[i], v[i], room, span=span), grads):
                assert_bits(x, y[i])


@pytest.mark.parametrize("heads", [1, 5])
@pytest.mark.parametrize("span", SPANS)
def test_threads_change_no_bit(span, heads, rng):
    """Work is shared out by heads and, where they are few, by columns of the values."""
    lq, lk, v = draw(rng, n=1500, r=64, e=70, scale=10.0, lead=((heads,), (heads,), (heads,)), dtype="float32")
    found = []
    for n in (1, 2, 3):
        with la.threads(n):
            out, lse, state = attend(lq, lk, v, ROOMS["numba"], span=span)
            found.append((out, lse, *state, *gradients(v, lq, lk, v, ROOMS["numba"], span=span)))
    for other in found[1:]:
        for x, y in zip(other, found[0]):
            assert_bits(x, y)


def test_one_token_at_a_time_has_a_kernel_of_its_own(rng):
    """It gives what the blocks give, masked or not, and the same state in all rooms."""
    lq, lk, v = draw(rng, n=60, scale=20.0, lead=((2, 3), (2, 1), (2, 1)))
    key_mask = rng.random((2, 1, 60)) > 0.3
    states = dict.fromkeys(ROOMS)
    for t in range(60):
        outs = []
        for name, room in ROOMS.items():
            token = slice(t, t + 1)
            y, _, states[name] = attend(
                lq[..., token, :], lk[..., token, :], v[..., token, :], room,
                key_mask=key_mask[..., token], state=states[name],
            )  # fmt: skip
            outs.append(y)
        assert_close(outs[0], outs[-1])
    first, *others = states.values()
    for other in others:
        assert_same_sums(other, first, FLOAT64)
        assert np.array_equal(other.gauge, first.gauge)


def test_the_gauge_is_invisible(room, rng):
    """A state in another gauge, the same value: the same bits."""
    lq, lk, v = draw(rng, n=40, scale=2.0)
    _, _, state = attend(lq, lk, v, room)
    more = draw(rng, n=30, scale=2.0)
    want, want_lse, want_state = attend(*more, room, state=state)
    shift = np.broadcast_to(np.arange(6), state.gauge.shape).astype(np.int32)
    moved = LogLinearState(*(np.ldexp(x, -shift[..., None]) for x in state[:2]), state.gauge + shift)
    out, lse, after = attend(*more, room, state=moved)
    assert_bits(out, want)
    assert_close(lse, want_lse)
    assert_same_sums(after, want_state, 0)


# -- states -------------------------------------------------------------------------------------------------------


def test_the_gauge_of_a_state_is_that_of_its_keys(room, rng):
    """The same in every room and for every split."""
    lq, lk, v = draw(rng, n=100, scale=30.0)
    want = np.max(np.rint(lk / np.log(2)), axis=-2)
    for span in SPANS:
        _, _, state = attend(lq, lk, v, room, span=span)
        assert np.array_equal(state.gauge, want)
        assert state.gauge.dtype == np.int32
        assert np.all(state.sums[..., -1] >= 2**-0.5 * (1 - 1e-12))
    _, _, state = attend(lq[:, :33], lk[:, :33], v[:, :33], room)
    _, _, state = attend(lq[:, 33:], lk[:, 33:], v[:, 33:], room, state=state)
    assert np.array_equal(state.gauge, want)


@pytest.mark.parametrize("dtype, tolerance", [("float64", FLOAT64), ("float32", FLOAT32)])
@pytest.mark.parametrize("cuts", [range(121), (0, 1, 1, 50, 120), (0, 48, 96, 120), (0, 119, 120)], ids=str)
def test_streams_in_any_split(cuts, dtype, tolerance, room, rng):
    lq, lk, v = draw(rng, n=120, scale=20.0, dtype=dtype)
    cuts, state, parts = list(cuts), None, []
    for a, b in pairwise(cuts):
        y, _, state = attend(lq[:, a:b], lk[:, a:b], v[:, a:b], room, state=state)
        parts.append(y)
    want, _, whole = attend(lq, lk, v, room)
    assert_close(np.concatenate(parts, axis=1), want, tolerance)
    assert_same_sums(state, whole, tolerance)


def test_a_split_on_the_chunk_grid_changes_no_bit(room, rng):
    lq, lk, v = draw(rng, n=600, scale=3.0)
    want, _, whole = attend(lq, lk, v, room)
    first, _, state = attend(lq[:, :384], lk[:, :384], v[:, :384], room)
    second, _, state = attend(lq[:, 384:], lk[:, 384:], v[:, 384:], room, state=state)
    assert_bits(np.concatenate([first, second], axis=1), want)
    for x, y in zip(state, whole):
        assert_bits(x, y)


def test_every_room_goes_on_with_any_state(rng):
    lq, lk, v = draw(rng, n=90, scale=20.0)
    want = formula(lq, lk, v)[:, 40:]
    for first in ROOMS.values():
        for second in ROOMS.values():
            _, _, state = attend(lq[:, :40], lk[:, :40], v[:, :40], first)
            assert_close(attend(lq[:, 40:], lk[:, 40:], v[:, 40:], second, state=state)[0], want)


def test_laws_of_merge(room, rng):
    lq, lk, v = draw(rng, n=90, scale=30.0)
    parts = [attend(lq[:, a:b], lk[:, a:b], v[:, a:b], room)[2] for a, b in ((0, 20), (20, 65), (65, 90))]
    whole = attend(lq, lk, v, room)[2]
    a, b, c = parts
    ab = loglinear.merge(a, b, np)
    for x, y in zip(ab, loglinear.merge(b, a, np)):
        assert_bits(x, y)
    for x, y in zip(loglinear.merge(a, empty(lk, v), np), a):
        assert_bits(x, y)
    one, other = loglinear.merge(ab, c, np), loglinear.merge(a, loglinear.merge(b, c, np), np)
    assert_same_sums(one, other, FLOAT64)
    assert_same_sums(one, whole, FLOAT64)
    assert np.array_equal(one.gauge, whole.gauge)


def test_sequence_parallel(room, rng):
    """Summaries of uneven segments, an exclusive scan with merge, local passes: forward and backward of the whole.

    Backward: e^(lq - lse) summarised like keys, with values g and -(g . out - d_lse), scanned from the right.
    """
    lq, lk, v = draw(rng, n=110, scale=10.0)
    edges = [0, 13, 60, 61, 110]
    ranks = [slice(a, b) for a, b in pairwise(edges)]
    local = [attend(lk[:, :0], lk[:, s], v[:, s], room, span="all")[2] for s in ranks]
    befores = [empty(lk, v)]
    for state in local[:-1]:
        befores.append(loglinear.merge(befores[-1], state, np))
    parts = [attend(lq[:, s], lk[:, s], v[:, s], room, state=state) for s, state in zip(ranks, befores)]
    out, lse = (np.concatenate([p[i] for p in parts], axis=1) for i in (0, 1))
    assert_close(out, attend(lq, lk, v, room)[0])

    d_out = rng.normal(size=out.shape)
    h = np.concatenate([d_out, -np.sum(d_out * out, axis=-1, keepdims=True)], axis=-1)
    logs = lq - lse[..., None]
    later, found = empty(lk, v), []
    for s, (_, _, after) in zip(reversed(ranks), reversed(parts)):
        d_state = np.ldexp(later.sums + later.rest, np.clip(later.gauge + after.gauge, -1000, 1000)[..., None])
        before = befores[len(ranks) - 1 - len(found)]
        local_args = d_out[:, s], lq[:, s], lk[:, s], v[:, s], room
        found.append(gradients(*local_args, state=before, d_state=d_state)[:3])
        # the same summary of the queries; its own column of ones is not asked for
        of_queries = attend(logs[:, :0], logs[:, s], h[:, s], room, span="all")[2]
        of_queries = LogLinearState(of_queries.sums[..., :-1], of_queries.rest[..., :-1], of_queries.gauge)
        later = loglinear.merge(later, of_queries, np)
    got = [np.concatenate([f[i] for f in reversed(found)], axis=1) for i in range(3)]
    assert_gradients_close(got, gradients(d_out, lq, lk, v, room)[:3])


# -- Linear("exp"), and sequences in pieces ---------------------------------------------------------------------------


EXP = la.Linear("exp")


@pytest.mark.parametrize("backend", ROOMS)
@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-12), ("float32", FAR)])
def test_linear_exp_beyond_the_range_of_exp(dtype, tolerance, backend, rng):
    q, k = (of_norm(rng.normal(size=(2, 100, 8)), 400).astype(dtype) for _ in range(2))
    v = rng.normal(size=(2, 100, 8)).astype(dtype)
    for causal, span in ((True, "past"), (False, "all")):
        out = EXP(q, k, v, causal=causal, backend=backend)
        assert_close(out, formula(*(x.astype("float64") for x in (q, k, v)), span), tolerance)


def test_linear_exp_with_other_options_is_the_plain_sum(rng):
    q, k, v = rng.normal(size=(3, 2, 20, 4))
    a = np.tril(np.exp(q) @ np.swapaxes(np.exp(k), -1, -2))
    den = np.sum(a, axis=-1, keepdims=True)
    assert_close(la.Linear("exp", normalize=False)(q, k, v, causal=True), a @ v)
    assert_close(la.Linear("exp", eps=("add", 3.0))(q, k, v, causal=True), a @ v / (den + 3))
    assert_close(EXP(q, k, v, causal=True), a @ v / den)


@pytest.mark.parametrize("backend", ROOMS)
def test_files_keep_states_bit_for_bit(backend, rng, tmp_path):
    q, k, v = rng.normal(size=(3, 2, 20, 4))
    _, state = EXP.step(q, k, v, EXP.init_state(k, v), backend=backend)
    la.save_state(tmp_path / "state.npz", state)
    again = la.load_state(tmp_path / "state.npz")
    assert again.attend == state.attend
    for x, y in zip(again.arrays, state.arrays):
        assert_bits(x, y)
    with pytest.raises(ValueError, match="was made by"):
        la.Linear("elu1").step(q, k, v, again)
    with pytest.raises(ValueError, match="must have shape"):
        EXP.step(q[..., :2], k[..., :2], v, again)


@pytest.mark.parametrize("backend", ROOMS)
@pytest.mark.parametrize("causal, n, m", [(True, 100, 100), (False, 100, 130), (False, 3, 100), (False, 100, 3)])
def test_pieces_give_what_the_whole_gives(causal, n, m, backend, rng, monkeypatch):
    """Values, a state and its cotangent on the way; pieces on the chunk grid, or off it."""
    q, k = rng.normal(size=(2, 2, n, 5)), rng.normal(size=(2, 1, m, 5))
    v = 1e4 + rng.normal(size=(2, 1, m, 3))
    key_mask = rng.random((2, 1, m)) > 0.3
    d_out = rng.normal(size=(2, 2, n, 3))
    options = {"causal": causal, "key_mask": key_mask, "backend": backend}
    found = []
    for piece in (log_features.PIECE, 48, 17):
        monkeypatch.setattr(log_features, "PIECE", piece)
        monkeypatch.setattr(log_features, "WHOLE", 0)
        out, back = EXP.vjp(q, k, v, **options)
        into = np.empty_like(out)
        assert EXP(q, k, v, out=into, **options) is into
        assert_bits(into, out)
        found.append((out, *back(d_out)))
    for other in found[1:]:
        assert_close(other[0], found[0][0])
        assert_gradients_close(other[1:], found[0][1:])


@pytest.mark.parametrize("backend", ROOMS)
def test_pieces_of_a_step(backend, rng, monkeypatch):
    q, k, v = rng.normal(size=(3, 2, 120, 5))
    start = EXP.step(q[:, :20], k[:, :20], v[:, :20], EXP.init_state(k, v), backend=backend)[1]
    late = [x[:, 20:] for x in (q, k, v)]
    d_out, d_sums = rng.normal(size=(2, 100, 5)), rng.normal(size=(2, 5, 6))
    found = []
    for piece in (log_features.PIECE, 48, 17):
        monkeypatch.setattr(log_features, "PIECE", piece)
        monkeypatch.setattr(log_features, "WHOLE", 0)
        out, state, back = EXP.step_vjp(*late, start, backend=backend)
        d_state = replace(
            state, arrays=LogLinearState(d_sums, np.zeros_like(d_sums), np.zeros_like(state.arrays.gauge))
        )
        *grads, d_start = back(d_out, d_state)
        found.append((out, state.arrays, [*grads, d_start.arrays.sums]))
    for out, arrays, grads in found[1:]:
        assert_close(out, found[0][0])
        assert_same_sums(arrays, found[0][1], FLOAT64)
        assert_gradients_close(grads, found[0][2])


@pytest.mark.parametrize("backend", ROOMS)
def test_memory(backend, rng):
    """Backward keeps the inputs; at no time is there anything of N x R x E, nor N x R for long sequences."""
    n, r, e = 8192, 64, 32
    q, k = rng.normal(size=(2, n, r)).astype("float32")
    v = rng.normal(size=(n, e)).astype("float32")
    EXP.vjp(q[:64], k[:64], v[:64], causal=True, backend=backend)[1](v[:64])  # compiled
    tracemalloc.start()
    try:
        out, back = EXP.vjp(q, k, v, causal=True, backend=backend)
        kept, peak = tracemalloc.get_traced_memory()
        assert kept <= out.nbytes + 2 * 4 * n + 2e5
        assert peak <= n * r * e * 4 / 4
        tracemalloc.reset_peak()
        back(v)
        assert tracemalloc.get_traced_memory()[1] <= n * r * e * 4 / 2
    finally:
        tracemalloc.stop()


# -- other libraries ------------------------------------------------------------------------------------------------


def run_exp(q, k, v, causal):
    return EXP(q, k, v, causal=causal)


def run_exp_vjp(q, k, v, d_out, causal):
    return EXP.vjp(q, k, v, causal=causal)[1](d_out)


lazy_xp_function(run_exp)
lazy_xp_function(run_exp_vjp)


@pytest.mark.parametrize("causal", [False, True])
def test_every_library_and_traced(xp, causal, rng):
    q, k, v, d_out = 8 * rng.normal(size=(4, 2, 19, 3))
    args = [xp.asarray(x) for x in (q, k, v, d_out)]
    span = "past" if causal else "all"
    assert_close(run_exp(*args[:3], causal=causal), formula(q, k, v, span))
    want = complex_step(lambda *x: formula(*x, span), (q, k, v), d_out)
    assert_gradients_close(run_exp_vjp(*args, causal=causal), want)


def test_every_library_streams(xp, rng):
    q, k, v = rng.normal(size=(3, 2, 4, 3))
    early, late = ([xp.asarray(x[:, a : a + 2]) for x in (q, k, v)] for a in (0, 2))
    _, state, _ = EXP.step_vjp(*early, EXP.init_state(*early[1:]))
    y, after, back = EXP.step_vjp(*late, state)
    assert_close(y, formula(q, k, v)[:, 2:])
    assert len(back(y, after)) == 4
    assert_close(EXP.merge(state, state).arrays.sums, 2 * numpy_of(state.arrays.sums))


@pytest.mark.torch
def test_torch_differentiates_the_reference(rng):
    import torch

    q, k, v, d_out = 8 * rng.normal(size=(4, 2, 19, 3))
    args = [torch.tensor(x, requires_grad=True) for x in (q, k, v)]
    EXP(*args, causal=True).backward(torch.tensor(d_out))
    assert_gradients_close([x.grad for x in args], EXP.vjp(q, k, v, causal=True)[1](d_out))


@pytest.mark.jax
def test_jax_differentiates_the_reference(rng):
    import jax

    jax.config.update("jax_enable_x64", True)
    q, k, v, d_out = 8 * rng.normal(size=(4, 2, 19, 3))
    grad = jax.jit(jax.grad(lambda *x: (EXP(*x, causal=True) * d_out).sum(), (0, 1, 2)))
    args = [jax.numpy.asarray(x) for x in (q, k, v)]
    assert_gradients_close(grad(*args), EXP.vjp(q, k, v, causal=True)[1](d_out))


def test_rooms_have_one_signature():
    for verb in ("forward", "backward"):
        signatures = []
        for room in ROOMS.values():
            parameters = inspect.signature(getattr(room, verb)).parameters
            signatures.append([name for name in parameters if name != "chunk_size"])
        assert all(x == signatures[0] for x in signatures)
