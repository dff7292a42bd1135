"""Every room does what the reference room does: the verbs of each engine, called directly, both directions."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module

import numpy as np
import pytest
from cases import (
    CHUNKS,
    CPU,
    FLOAT64,
    MAIN,
    MAIN_CASES,
    TOLERANCE,
    Case,
    assert_bits,
    assert_close,
    assert_gradients_close,
    backends_of,
    has_room,
    on_backends,
    values_on_backends,
)

from linattn import _arrays
from linattn.audit import quadratic
from linattn.engines.features import MAPS

XP = _arrays.namespace(np.ones(1))


def room(backend, engine):
    return import_module(f"linattn.backends.{backend}.{engine}")


OTHERS = [
    pytest.param(backend, engine, id=f"{backend} {engine}")
    for backend in CPU
    for engine in ("linear", "softmax")
    if backend != "reference" and has_room(backend, engine)
]
LINEAR_ROOMS = [backend for backend in CPU if has_room(backend, "linear")]

# -- the linear engine's verbs ----------------------------------------------------------------------------------

LEADS = [((2,), (2,), (2,), (2,)), ((2, 3), (2, 1), (3,), ()), ((), (), (2,), ()), ((3,), (), (), (3,))]  # q k v mask
RULES = [
    ("relu", True, "safe"),
    ("elu1", True, ("clamp", 20.0)),
    ("elu1", True, ("add", 0.5)),
    ("identity", False, "safe"),
]


def linear_call(rng, dtype, rule, span, turned, masked, lead, n, m, d=16, e=5):
    """Positional arguments of forward, and its options."""
    lead_q, lead_k, lead_v, lead_mask = lead
    q, k, v = (
        rng.normal(size=(*x, *shape)).astype(dtype)
        for x, shape in ((lead_q, (n, d)), (lead_k, (m, d)), (lead_v, (m, e)))
    )
    turns = None
    if turned:
        angles = [rng.uniform(0, np.pi / 2, (*x, tokens)) for x, tokens in (((), n), (lead_k, m))]
        turns = tuple(np.stack([np.cos(x), np.sin(x)], axis=-1).astype(dtype) for x in angles)
    mask = rng.random((*lead_mask, m)) > 0.3 if masked else None
    lead_kv = np.broadcast_shapes(lead_k, lead_v, lead_mask if masked else ())
    name, normalize, eps = rule
    sums = abs(rng.normal(size=(*lead_kv, 1 + turned, d, e + normalize))).astype(dtype)
    rest = np.finfo(dtype).eps / 4 * sums * rng.uniform(-1, 1, sums.shape).astype(dtype)  # what rounding owes
    options = {"feature_map": name, "span": span, "turns": turns, "key_mask": mask}
    return (q, k, v, (sums, rest)), {**options, "normalize": normalize, "eps": eps, "out": None, "xp": XP}


def in_float64(args, options):
    """The same call in float64: the reference's own rounding is not the other room's error."""
    q, k, v, state = args
    turns = options["turns"] and tuple(quadratic.wide(x) for x in options["turns"])
    return (*map(quadratic.wide, (q, k, v)), tuple(map(quadratic.wide, state))), {**options, "turns": turns}


def as_reference(args, options):
    """The same call for the reference room, which leaves elementwise maps to the engine."""
    q, k, v, state = args
    phi = MAPS[options["feature_map"]].phi
    return (phi(q, XP), phi(k, XP), v, state), {**options, "feature_map": "identity"}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("lead", LEADS, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    "span, n, m", [("past", 53, 53), ("all", 5, 50), ("all", 50, 0), ("past", 1, 1), ("past", 0, 0)]
)
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("backend", [b for b in LINEAR_ROOMS if b != "reference"])
def test_linear_verbs(backend, rule, span, n, m, turned, masked, lead, dtype, rng):
    """out, den, the state, and all cotangents with a state's among them."""
    args, options = linear_call(rng, dtype, rule, span, turned, masked, lead, n, m)
    there, reference = room(backend, "linear"), room("reference", "linear")
    if rule[0] not in there.FEATURE_MAPS:
        args, options = as_reference(args, options)
    want_args, want_options = as_reference(*in_float64(args, options))
    out, den, after = there.forward(*args, **options)
    want, want_den, want_after = reference.forward(*want_args, **want_options)
    assert_close(out, want, TOLERANCE[dtype])
    assert out.dtype == dtype
    for x, y in zip(after, want_after, strict=True):
        assert (x.shape, x.dtype) == (y.shape, dtype)
    assert_close(np.add(*after), np.add(*want_after), TOLERANCE[dtype])

    d_out, d_state = rng.normal(size=out.shape).astype(dtype), rng.normal(size=after[0].shape).astype(dtype)
    vjp = MAPS[options["feature_map"]].vjp
    for given in (d_state, None):
        got = there.backward(d_out, given, *args, den, **options)
        d_q, d_k, d_v, d_before = reference.backward(d_out, given, *want_args, want_den, **want_options)
        if masked:
            d_k = np.where(
                np.any(options["key_mask"], axis=tuple(range(options["key_mask"].ndim - 1)))[:, None], d_k, 0
            )
        want = vjp(d_q, args[0], XP), vjp(d_k, args[1], XP), d_v, d_before
        assert [x.dtype for x in got] == [dtype] * 4
        # twice the usual: four relu features may leave a row with next to no weight, and its gradient is 1 / den
        assert_gradients_close(got, want, 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("backend", LINEAR_ROOMS)
def test_maps_of_a_room_are_maps_of_the_engine(backend):
    assert set(MAPS) >= room(backend, "linear").FEATURE_MAPS


@pytest.mark.parametrize("backend", LINEAR_ROOMS)
@pytest.mark.parametrize("turned", [False, True])
def test_both_parts_of_a_state_count(backend, turned, rng):
    """Its value is sums + rest, however it is divided between the two."""
    args, options = linear_call(rng, "float64", RULES[1], "past", turned, False, LEADS[0], 9, 9)
    q, k, v, (sums, rest) = args
    if RULES[1][0] not in room(backend, "linear").FEATURE_MAPS:
        (q, k, v, _), options = as_reference(args, options)
    run = room(backend, "linear").forward
    out, _, after = run(q, k, v, (sums, rest), **options)
    moved, _, other = run(q, k, v, (sums / 2, sums / 2 + rest), **options)
    assert_close(moved, out, FLOAT64)
    assert_close(np.add(*other), np.add(*after), FLOAT64)


# -- the softmax engine's verbs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("lead", LEADS, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "span, n, m", [("past", 53, 53), ("past", 5, 70), ("past", 1, 40), ("all", 5, 50), ("all", 4, 0), ("past", 0, 3)]
)
@pytest.mark.parametrize("backend", [b for b in CPU if b != "reference" and has_room(b, "softmax")])
def test_softmax_verbs(backend, span, n, m, masked, lead, dtype, rng):
    """out, lse and all cotangents, with keys before the first query too."""
    lead_q, lead_k, lead_v, lead_mask = lead
    q, k, v = (
        rng.normal(size=(*x, *shape)).astype(dtype)
        for x, shape in ((lead_q, (n, 6)), (lead_k, (m, 6)), (lead_v, (m, 5)))
    )
    mask = rng.random((*lead_mask, m)) > 0.3 if masked else None
    offset = m - n if span == "past" else 0
    options = {"scale": 0.4, "span": span, "offset": offset, "key_mask": mask, "out": None, "xp": XP}
    there, reference = room(backend, "softmax"), room("reference", "softmax")
    out, lse = there.forward(q, k, v, **options)
    want, want_lse = reference.forward(q, k, v, **options)
    assert_close(out, want, TOLERANCE[dtype])
    assert lse.shape == want_lse.shape
    alive = np.isfinite(want_lse)
    np.testing.assert_array_equal(np.isneginf(lse), ~alive)
    assert_close(lse[alive], want_lse[alive], TOLERANCE[dtype])
    d_out = rng.normal(size=out.shape).astype(dtype)
    got = there.backward(d_out, q, k, v, **options)
    assert_gradients_close(got, reference.backward(d_out, q, k, v, **options), TOLERANCE[dtype])


@pytest.mark.parametrize("backend", [b for b in CPU if has_room(b, "softmax")])
def test_lse_is_the_logarithm_of_the_sum(backend, rng):
    q, k, v = rng.normal(size=(3, 2, 7, 5))
    options = {"scale": 0.4, "span": "all", "offset": 0, "key_mask": None, "out": None, "xp": XP}
    _, lse = room(backend, "softmax").forward(q, k, v, **options)
    assert_close(lse, np.log(np.sum(np.exp(0.4 * q @ k.swapaxes(-1, -2)), axis=-1)))


# -- through the public verbs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_rooms_agree(case, rng):
    """Both directions, both precisions."""
    for dtype, tolerance in TOLERANCE.items():
        args, options = case.draw(rng, dtype)
        d_out = case.cotangent(rng, dtype)
        rooms = [case.attend.vjp(*args, **options, backend=backend) for backend in backends_of(case.attend)]
        for out, _ in rooms[1:]:
            assert_close(out, rooms[0][0], tolerance)
        for _, backward in rooms[1:]:
            if dtype == "float64":
                assert_gradients_close(backward(d_out), rooms[0][1](d_out))


@pytest.mark.parametrize("chunk_size", [1, 3, 16, 150, 300])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_chunk_size_of_the_reference_changes_rounding_alone(dtype, turned, chunk_size, rng):
    """4 D u, with D the longest chain of sums: tokens and features."""
    n, d = 150, 16
    args, options = linear_call(rng, dtype, RULES[0], "past", turned, True, LEADS[1], n, n, d)
    args, options = as_reference(args, options)
    reference = room("reference", "linear")
    tolerance = 4 * (n + d + 3) * np.finfo(dtype).eps / 2
    want, want_den, want_after = reference.forward(*args, **options)
    out, den, after = reference.forward(*args, **options, chunk_size=chunk_size)
    assert_close(out, want, tolerance)
    assert_close(after[0], want_after[0], tolerance)
    d_out, d_state = rng.normal(size=out.shape).astype(dtype), rng.normal(size=after[0].shape).astype(dtype)
    got = reference.backward(d_out, d_state, *args, den, **options, chunk_size=chunk_size)
    assert_gradients_close(got, reference.backward(d_out, d_state, *args, want_den, **options), tolerance)


# -- the same bits ----------------------------------------------------------------------------------------------


def both_directions(attend, args, d_out, options, backend):
    out, backward = attend.vjp(*args, **options, backend=backend)
    return [out, *backward(d_out)]


@pytest.mark.parametrize("case, backend", on_backends(MAIN_CASES))
def test_repeats_have_the_same_bits(case, backend, rng):
    args, options = case.draw(rng, "float32")
    d_out = case.cotangent(rng, "float32")
    first = both_directions(case.attend, args, d_out, options, backend)
    for again in (both_directions(case.attend, [x.copy() for x in args], d_out, options, backend) for _ in range(2)):
        for x, y in zip(again, first, strict=True):
            assert_bits(x, y)


@pytest.mark.parametrize("attend, backend", values_on_backends(MAIN))
def test_threads_do_not_disturb_each_other(attend, backend, rng):
    """Calls that run at once, of different shapes, give the bits they give one by one."""
    jobs = []
    for n in (30, 70, 49, 131):
        for causal in (False, True):
            case = Case(attend, causal=causal, n=n, m=n, d=8, e=8)
            args, options = case.draw(rng, "float32")
            jobs.append((attend, args, case.cotangent(rng, "float32"), options, backend))
    want = [both_directions(*job) for job in jobs]
    with ThreadPoolExecutor(7) as pool:
        for got, alone in zip(pool.map(lambda job: both_directions(*job), jobs * 3), want * 3, strict=True):
            for x, y in zip(got, alone, strict=True):
                assert_bits(x, y)


def test_a_number_of_threads_changes_no_bits(rng, tmp_path):
    """1, 2 and 7 of the compiled rooms' threads, each in a process of its own."""
    args = rng.normal(size=(4, 3, 130, 8)).astype("float32")
    np.save(tmp_path / "args.npy", args)
    code = (
        "import sys, hashlib, numpy as np, linattn as la\n"
        "q, k, v, g = np.load(sys.argv[1])\n"
        "for attend in (la.Linear(), la.CosFormer(512), la.Softmax(), la.Combiner(span=16)):\n"
        "    out, backward = attend.vjp(q, k, v, causal=True)\n"
        "    print(hashlib.sha256(b''.join(x.tobytes() for x in (out, *backward(g)))).hexdigest())\n"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "args.npy")],
            env={**os.environ, "NUMBA_NUM_THREADS": n, "LINATTN_NUM_THREADS": n},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for n in ("1", "2", "7")
    }
    assert len(said) == 1
    assert len(set(said.pop().split())) == 4


def test_chunks_of_the_rooms_differ():
    """The sizes that tests take surround the chunk of every room."""
    assert len(set(CHUNKS)) == len(CHUNKS) == len(LINEAR_ROOMS)


def test_kernels_stay_inside_their_scratch(monkeypatch, rng):
    """Also without a feature, a column or a token: what stands around the scratch is untouched."""
    rooms, given, margin, mark = [room("numba", name) for name in ("linear", "loglinear", "softmax")], [], 4096, 7.25

    def guarded(dtype, size):
        whole = np.full(size + 2 * margin, mark, dtype)
        start = margin + -whole[margin:].ctypes.data % 64 // whole.itemsize
        given.append((whole, start, start + size))
        return whole[start : start + size]

    for module in rooms:
        monkeypatch.setattr(module, "scratch", guarded)
    for attend in MAIN:
        for dtype in ("float64", "float32"):
            for n, d, e in (
                (0, 0, 0),
                (0, 3, 0),
                (0, 3, 2),
                (1, 3, 0),
                (1, 1, 16),
                (5, 3, 0),
                (5, 16, 33),
                (60, 17, 0),
            ):
                q, k = rng.normal(size=(2, n, d)).astype(dtype)
                v = rng.normal(size=(n, e)).astype(dtype)
                for causal in (False, True):
                    out, backward = attend.vjp(q, k, v, causal=causal, backend="numba")
                    backward(np.ones_like(out))
    assert len(given) > 100
    for whole, start, stop in given:
        assert np.all(whole[:start] == mark)
        assert np.all(whole[stop:] == mark)
