"""The CUDA kernels on the host's simulator: the whole room, both directions, against formulas in float64.

Nothing here has met a GPU: the simulator runs the same text, one block at a time, threads in an order that a schedule
decides. What a GPU alone can show is asked by `python -m linattn.backends.cupy.check`.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from cases import CASES, DTYPES, LENGTH, SQUARE, TOLERANCE, assert_bits, assert_close, assert_gradients_close
from simulator import SCHEDULES, Simulator
from test_backends import LEADS, RULES, as_reference, in_float64, linear_call

import linattn as la
from linattn import _arrays, backends
from linattn.audit import quadratic
from linattn.audit.measure import relative_error
from linattn.backends.cupy import linear as room
from linattn.backends.cupy import plan, specs
from linattn.backends.reference import linear as reference
from linattn.engines.features import MAPS

XP = _arrays.namespace(np.ones(1))
MANY = plan.Card(64, 232448, (9, 0))  # so many multiprocessors that a call is cut into segments
FEW = plan.Card(1, 232448, (9, 0))
ROUNDINGS = 1.4  # out, over one rounding of the best answer: operands are rounded to 16 bits as well
# on the way to a gradient four operands are rounded: cotangent, value, score or state, feature; float16: one
GRADIENT = {"bfloat16": 4 * 2**-9, "float16": 2**-11}
STATE = {"bfloat16": 2**-9, "float16": 2**-11}  # features are rounded, or keys times a turn


@pytest.fixture
def simulator(monkeypatch):
    """`simulator(card, schedule)` puts a simulated device under the room; segments are short."""
    monkeypatch.setattr(plan, "SHORTEST", 64)

    def made(card=FEW, schedule=0, sources=None):
        device = Simulator(card=card, schedule=schedule, sources=sources)
        monkeypatch.setattr(room, "device_of", lambda x: device)
        return device

    return made


def drawn(rng, dtype, rule, span, turned, masked, lead, n, m, d, e):
    """The arguments of a call in `dtype`, and in float64 as the reference room wants them: the same numbers."""
    stated = dtype if dtype == "float64" else "float32"
    (q, k, v, state), options = linear_call(rng, stated, rule, span, turned, masked, lead, n, m, d=d, e=e)
    args = *(x.astype(DTYPES[dtype]) for x in (q, k, v)), state
    wide = as_reference(*in_float64((*map(quadratic.wide, args[:3]), state), options))
    return args, options, wide


def judged(args, options, wide, d_out, d_state):
    """(what the room gives, what is right): out, the state's value, and the four cotangents."""
    out, den, after = room.forward(*args, **options)
    got = room.backward(d_out, d_state, *args, den, **options)
    want, want_den, want_after = reference.forward(*wide[0], **wide[1])
    d_q, d_k, d_v, d_before = reference.backward(quadratic.wide(d_out), d_state, *wide[0], want_den, **wide[1])
    vjp, mask = MAPS[options["feature_map"]].vjp, options["key_mask"]
    d_q, d_k = (vjp(d_x, quadratic.wide(x), XP) for d_x, x in ((d_q, args[0]), (d_k, args[1])))
    if mask is not None:
        d_k = np.where(np.any(mask, axis=tuple(range(mask.ndim - 1)))[:, None], d_k, 0)
    return (out, np.add(*after), got), (want, np.add(*want_after), (d_q, d_k, d_v, d_before))


CALLS = [  # span, N, M, turned, masked, lead, rule, card
    ("past", 150, 150, False, True, LEADS[1], RULES[0], FEW),
    ("past", 200, 200, True, False, LEADS[0], RULES[1], MANY),
    ("past", 150, 150, True, True, LEADS[3], RULES[2], MANY),
    ("past", 70, 70, False, False, LEADS[2], RULES[3], FEW),
    ("past", 1, 1, True, False, LEADS[0], RULES[0], FEW),
    ("all", 5, 150, True, True, LEADS[1], RULES[2], MANY),
    ("all", 70, 40, False, True, LEADS[0], RULES[1], FEW),
]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_exact_kernel(simulator, call, dtype, rng):
    """float32 and float64, any width: out, state and all cotangents within the library's promise."""
    span, n, m, turned, masked, lead, rule, card = call
    device = simulator(card)
    args, options, wide = drawn(rng, dtype, rule, span, turned, masked, lead, n, m, 13, 21)
    d_out = rng.normal(size=(*np.broadcast_shapes(*lead[:3], lead[3] if masked else ()), n, 21)).astype(dtype)
    d_state = rng.normal(size=args[3][0].shape).astype(dtype)
    (out, after, grads), (want, want_after, want_grads) = judged(args, options, wide, d_out, d_state)
    assert_close(out, want, TOLERANCE[dtype])
    assert_close(after, want_after, TOLERANCE[dtype])
    assert_gradients_close(grads, want_grads, 2 * TOLERANCE[dtype])
    assert {launch.instance.file for launch in device.launched} <= {"exact", "scan"}
    assert (card is MANY) == any(launch.instance.file == "scan" for launch in device.launched)


SWEEPS = [  # dtype, D, E and a call; builds are what costs here
    ("bfloat16", 64, 64, CALLS[0]),
    ("bfloat16", 64, 128, ("past", 200, 200, False, True, LEADS[1], RULES[1], MANY)),
    ("bfloat16", 64, 64, CALLS[2]),
    ("bfloat16", 64, 64, ("past", 130, 130, False, False, LEADS[0], RULES[3], FEW)),
    ("bfloat16", 64, 64, ("all", 70, 150, False, True, LEADS[0], RULES[0], FEW)),
    ("float16", 64, 64, CALLS[0]),
]


@pytest.mark.parametrize("dtype, d, e, call", SWEEPS, ids=str)
def test_sweep(simulator, dtype, d, e, call, rng):
    """16 bits on the tensor core: out within 1.4 roundings, cotangents within the error of rounded operands."""
    span, n, m, turned, masked, lead, rule, card = call
    device = simulator(card)
    args, options, wide = drawn(rng, dtype, rule, span, turned, masked, lead, n, m, d, e)
    shape = (*np.broadcast_shapes(*lead[:3], lead[3] if masked else ()), n, e)
    d_out, d_state = rng.normal(size=shape).astype(DTYPES[dtype]), rng.normal(size=args[3][0].shape).astype("float32")
    (out, after, grads), (want, want_after, want_grads) = judged(args, options, wide, d_out, d_state)
    rounding = relative_error(want.astype(DTYPES[dtype]), want)
    limit = ROUNDINGS if rule[1] else 2.0  # without the ratio nothing of the roundings cancels
    assert relative_error(out, want) <= limit * rounding
    assert_close(after, want_after, STATE[dtype] if turned or rule[0] == "elu1" else 1e-6)
    for got, right in zip(grads, want_grads, strict=True):
        assert_close(got, right, GRADIENT[dtype])
    files = {launch.instance.file for launch in device.launched}
    assert "sweep" in files
    assert dtype == "float16" or "exact" not in files
    assert device.conflicts == 0  # of shared memory's banks


@pytest.mark.parametrize("dtype, d", [("float32", 13), ("bfloat16", 64)])
def test_schedules_do_not_matter(simulator, dtype, d, rng):
    """Whatever order threads run in, the bits are the same."""
    args, options, _ = drawn(rng, dtype, RULES[0], "past", False, True, LEADS[0], 150, 150, d, d)
    d_out = rng.normal(size=(2, 150, d)).astype(DTYPES[dtype])
    results = []
    for schedule in SCHEDULES:
        simulator(MANY, schedule)
        out, den, after = room.forward(*args, **options)
        results.append((out, den, *after, *room.backward(d_out, None, *args, den, **options)))
    for other in results[1:]:
        for x, y in zip(other, results[0], strict=True):
            assert_bits(x, y)


@pytest.mark.parametrize("dtype, d", [("float32", 13), ("bfloat16", 64)])
def test_what_is_not_finite_stays_where_it_belongs(simulator, dtype, d, rng):
    """A bad value spoils its column from its row on; a bad key all columns; earlier rows keep their bits."""
    simulator()
    args, options, _ = drawn(rng, dtype, RULES[1], "past", False, False, LEADS[0], 150, 150, d, d)
    q, k, v, state = args
    want, *_ = room.forward(*args, **options)
    t, x = 77, 5
    for bad in (np.nan, np.inf):
        spoiled = v.copy()
        spoiled[0, t, x] = bad
        out, *_ = room.forward(q, k, spoiled, state, **options)
        others = np.ones(out.shape, bool)
        others[0, t:, x] = False
        assert not np.any(np.isfinite(quadratic.wide(out[0, t:, x])))
        assert_bits(out[others], want[others])
    spoiled = k.copy()
    spoiled[0, t, x] = np.nan
    out, *_ = room.forward(q, spoiled, v, state, **options)
    assert np.all(np.isnan(quadratic.wide(out[0, t:])))
    assert_bits(out[0, :t], want[0, :t])
    assert_bits(out[1], want[1])


def test_a_prefix_knows_nothing_of_what_follows(simulator, rng):
    args, options, _ = drawn(rng, "bfloat16", RULES[1], "past", False, False, LEADS[0], 200, 200, 64, 64)
    simulator(MANY)
    want, *_ = room.forward(*args, **options)
    q, k, v = (x.copy() for x in args[:3])
    for x in (q, k, v):
        x[:, 131:] = rng.normal(size=x[:, 131:].shape).astype(x.dtype)
    out, *_ = room.forward(q, k, v, args[3], **options)
    assert_bits(out[:, :131], want[:, :131])


@pytest.mark.parametrize("dtype, d", [("float32", 13), ("bfloat16", 64)])
def test_layouts_are_views(simulator, dtype, d, rng):
    """Transposed heads, broadcast heads, reversed tokens, a zero stride in d_out: the same bits as of copies."""
    simulator()
    q, k, v = (rng.normal(size=(2, 90, 3, d)).astype(DTYPES[dtype]) for _ in range(3))
    views = q.transpose(0, 2, 1, 3)[..., ::-1, :], k.transpose(0, 2, 1, 3)[:, :1], v.transpose(0, 2, 1, 3)
    state = tuple(np.zeros((2, 3, 1, d, d + 1), "float32") for _ in range(2))
    options = {"feature_map": "elu1", "span": "past", "turns": None, "key_mask": None, "normalize": True}
    options |= {"eps": "safe", "out": None, "xp": XP}
    d_out = np.broadcast_to(np.ones((), DTYPES[dtype]), (2, 3, 90, d))
    results = []
    for copied in (False, True):
        args = [np.ascontiguousarray(x) if copied else x for x in (*views, d_out)]
        out, den, after = room.forward(*args[:3], state, **options)
        results.append((out, *after, *room.backward(args[3], None, *args[:3], state, den, **options)))
    if dtype == "float32":
        for x, y in zip(*results, strict=True):
            assert_bits(x, y)
    else:  # an operand that the tensor core cannot load goes the exact way: close, not equal
        for x, y in zip(*results, strict=True):
            assert_close(x, quadratic.wide(y), GRADIENT[dtype])


def test_nothing_is_written_past_the_end(simulator, rng):
    """out= and the gradients' out= are parts of larger arrays whose other rows stay as they are."""
    simulator()
    args, options, _ = drawn(rng, "bfloat16", RULES[1], "past", False, False, LEADS[0], 150, 150, 64, 64)
    room_of = {name: np.full((2, 256, 64), 7, ml_dtypes.bfloat16) for name in ("out", "q", "k", "v")}
    parts = {name: x[:, 50:200] for name, x in room_of.items()}
    out, den, _ = room.forward(*args, **{**options, "out": parts["out"]})
    assert out is parts["out"]
    grads = tuple(parts[name] for name in "qkv")
    room.backward(out, None, *args, den, **{**options, "out": grads})
    for x in room_of.values():
        assert np.all(np.isfinite(quadratic.wide(x)))
        assert np.all(x[:, :50] == 7)
        assert np.all(x[:, 200:] == 7)


@pytest.mark.parametrize("shape", [(0, 0, 4, 4), (5, 5, 0, 4), (3, 0, 4, 4), (4, 4, 900, 3)], ids=str)
def test_what_no_kernel_serves_runs_in_the_reference(simulator, shape, rng):
    n, m, d, e = shape
    device = simulator()
    span = "past" if n == m else "all"
    args, options, wide = drawn(rng, "float64", RULES[1], span, False, True, LEADS[0], n, m, d, e)
    d_out = rng.normal(size=(2, n, e))
    (out, after, grads), (want, want_after, want_grads) = judged(args, options, wide, d_out, None)
    assert device.launched == []
    assert_close(out, want)
    assert_close(after, want_after)
    assert_gradients_close(grads, want_grads)


def test_state_parts_both_count(simulator, rng):
    """A state's value is sums + rest, however it is divided between the two."""
    simulator()
    args, options, _ = drawn(rng, "float64", RULES[1], "past", True, False, LEADS[0], 9, 9, 16, 5)
    q, k, v, (sums, rest) = args
    out, _, after = room.forward(q, k, v, (sums, rest), **options)
    moved, _, other = room.forward(q, k, v, (sums / 2, sums / 2 + rest), **options)
    assert_close(moved, out)
    assert_close(np.add(*other), np.add(*after))


def test_rounding_is_carried(simulator):
    """A hundred thousand equal float32 keys: the state's error stays that of a rounding."""
    simulator()
    n = 40000
    q = k = np.full((n, 1), 1.0, "float32")
    v = np.full((n, 1), 0.1, "float32")
    state = tuple(np.zeros((1, 1, 2), "float32") for _ in range(2))
    options = {"feature_map": "identity", "span": "past", "turns": None, "key_mask": None, "normalize": True}
    _, _, after = room.forward(q, k, v, state, **options, eps="safe", out=None, xp=XP)
    want = n * quadratic.wide(v[0, 0])
    assert abs(np.add(*map(quadratic.wide, after))[0, 0, 0] - want) <= 64 * 2.0**-24 * want  # one chunk's own sum


def test_every_instance_is_named_once():
    names = [instance.name for instance in specs.INSTANCES]
    assert len(set(names)) == len(names)


PUBLIC = [  # values that differ in what the engine hands down
    la.Linear(),
    la.Linear("relu", eps=("add", 0.5)),
    la.Linear("identity", normalize=False),
    la.Linear(SQUARE),
    la.CosFormer(LENGTH),
    la.CosFormer(LENGTH, feature_map="elu1", normalize=False),
]


@pytest.mark.parametrize("case", [case for case in CASES if case.attend in PUBLIC], ids=str)
def test_through_the_public_verbs(simulator, monkeypatch, case, rng):
    """Every case of the table, forward and backward, is what the reference room gives."""
    args, options = case.draw(rng)
    d_out = case.cotangent(rng)
    want, want_backward = case.attend.vjp(*args, **options, backend="reference")
    want_grads = want_backward(d_out)
    simulator()
    monkeypatch.setattr(backends, "resolve", lambda *_: room)
    out, backward = case.attend.vjp(*args, **options)
    assert_close(out, want)
    assert_gradients_close(backward(d_out), want_grads)


@pytest.mark.parametrize("attend", PUBLIC, ids=repr)
def test_streams(simulator, monkeypatch, attend, rng):
    """Prefill, then decoding, token by token: the whole pass to rounding, and a cotangent through the states."""
    simulator()
    monkeypatch.setattr(backends, "resolve", lambda *_: room)
    q, k, v = abs(rng.normal(size=(3, 2, 40, 7)))
    want = attend(q, k, v, causal=True)
    state, parts = attend.init_state(k, v), []
    for first, last in ((0, 37), (37, 38), (38, 38), (38, 39), (39, 40)):
        out, state = attend.step(q[:, first:last], k[:, first:last], v[:, first:last], state)
        parts.append(out)
    assert_close(np.concatenate(parts, axis=1), want)


def test_values_far_from_zero(simulator, rng):
    """v + 1000 in float32: the gradients keep 1e-6, for values are centred there, by the mean of some of them."""
    simulator()
    args, options, _ = drawn(rng, "float32", RULES[1], "past", False, True, LEADS[0], 600, 600, 13, 13)
    q, k, v, state = args
    v = (1000 + v).astype("float32")
    state = tuple(np.zeros_like(x) for x in state)
    options |= {"eps": "safe"}
    d_out = rng.normal(size=(2, 600, 13)).astype("float32")
    wide = as_reference(*in_float64((q, k, v, state), options))
    (_, _, got), (_, _, want) = judged((q, k, v, state), options, wide, d_out, None)
    for x, y in zip(got[:3], want[:3], strict=True):
        assert_close(x, y, 1e-6)
