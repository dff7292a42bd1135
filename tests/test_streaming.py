"""Streams: any split equals the whole pass, states merge, stay usable, change rooms, and go to disk and back."""

from __future__ import annotations

import json
import warnings
import zipfile
from dataclasses import replace
from io import BytesIO
from itertools import pairwise

import numpy as np
import pytest
from cases import (
    BOTH_SIDES,
    CPU,
    DTYPES,
    FLOAT64,
    LENGTH,
    MAIN,
    SQUARE,
    TOLERANCE,
    VALUES,
    Case,
    assert_bits,
    assert_close,
    backends_of_steps,
    can_be_causal,
    is_elementary,
    rounded,
    state_formula,
    streams_on_backends,
    value_of,
    values_on_backends,
)

import linattn as la

STREAMED = [attend for attend in VALUES if can_be_causal(attend)]
LINEAR = [attend for attend in STREAMED if is_elementary(attend)]


def stream(attend, args, edges, *, key_mask=None, backend=None, state=None):
    """out and the last state of a stream cut at `edges`."""
    q, k, v = args
    state = attend.init_state(k, v) if state is None else state
    parts = []
    for a, b in pairwise(edges):
        seen = None if key_mask is None else key_mask[..., a:b]
        out, state = attend.step(q[..., a:b, :], k[..., a:b, :], v[..., a:b, :], state, key_mask=seen, backend=backend)
        parts.append(out)
    return np.concatenate(parts, axis=-2), state


def cut(rng, n, n_cuts):
    """Edges of a random split; some parts are empty."""
    return [0, *sorted(rng.integers(0, n + 1, n_cuts)), n]


# -- splits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attend, backend", [(x, backend) for x in STREAMED for backend in backends_of_steps(x)])
def test_a_good_step_excuses_no_bad_one(attend, backend, rng):
    """What was checked for one token is checked again for another that is not like it."""
    q, k, v = rng.normal(size=(3, 2, 1, 4))
    state = attend.init_state(k, v)
    _, state = attend.step(q, k, v, state, backend=backend)
    attend.step(q, k, v, state, backend=backend)
    narrow = [x.astype("float32") for x in (q, k, v)]
    wrong = [
        (TypeError, (*narrow, state), {}),  # a state in another dtype
        (TypeError, (narrow[0], k, v, state), {}),
        (ValueError, (q[..., :3], k, v, state), {}),
        (ValueError, (q, k, v[..., :3], state), {}),  # a state of other values
        (ValueError, (q, np.concat([k, k], -2), v, state), {}),
        (TypeError, (q, k, v, state), {"key_mask": np.ones((2, 1))}),
        (ValueError, (q, k, v, state), {"backend": "abacus"}),
        (ValueError, (q, k, v, state), {"backend": ["numba"]}),
        (TypeError, (q.tolist(), k, v, state), {}),
        (TypeError, (np.ma.array(q), k, v, state), {}),
        (TypeError, (q, k, v, state.arrays), {}),
    ]
    for error, args, options in wrong:
        with pytest.raises(error):
            attend.step(*args, **{"backend": backend, **options})


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("attend, backend", streams_on_backends(STREAMED))
def test_any_split_is_the_whole_pass(attend, backend, masked, rng):
    """Token by token, at once, and cut at random; the state of each part is that of a whole pass over it."""
    case = Case(attend, causal=True, masked=masked, n=13, m=13)
    for dtype, tolerance in TOLERANCE.items():
        args, options = case.draw(rng, dtype)
        mask = options.get("key_mask")
        whole = case.formula(*args, **options)
        for edges in ([0, 13], list(range(14)), cut(rng, 13, 2), cut(rng, 13, 5)):
            out, state = stream(attend, args, edges, key_mask=mask, backend=backend)
            assert out.dtype == dtype
            assert_close(out, whole, tolerance)
            assert (state.start, state.position) == (0, 13)
            if is_elementary(attend):
                k, v = (x.astype("float64") for x in args[1:])
                assert_close(value_of(state), state_formula(attend, k, v, key_mask=mask), tolerance)


@pytest.mark.parametrize("attend, backend", streams_on_backends(MAIN))
def test_splits_across_chunks(attend, backend, rng):
    n = 197
    case = Case(attend, causal=True, n=n, m=n, d=6, lead=((2, 2), (2, 1), (2, 1)))
    args, options = case.draw(rng)
    whole = case.formula(*args, **options)
    for edges in ([0, 64, 128, n], [0, 48, 96, n], [0, 1, n - 1, n], cut(rng, n, 4)):
        out, _ = stream(attend, args, edges, backend=backend)
        assert_close(out, whole)


@pytest.mark.parametrize("attend, backend", streams_on_backends(MAIN))
def test_prefill_then_decode(attend, backend, rng):
    """Many tokens, then one at a time: one verb for both."""
    case = Case(attend, causal=True, n=60, m=60, d=8)
    args, options = case.draw(rng)
    out, _ = stream(attend, args, [0, 50, *range(51, 61)], backend=backend)
    assert_close(out, case.formula(*args, **options))


@pytest.mark.parametrize("attend, backend", values_on_backends(MAIN))
def test_a_call_on_a_prefix_is_a_prefix_of_the_call(attend, backend, rng):
    case = Case(attend, causal=True, n=70, m=70)
    args, options = case.draw(rng)
    whole = attend(*args, **options, backend=backend)
    for n in (0, 1, 20, 65):
        assert_close(attend(*(x[:, :n] for x in args), causal=True, backend=backend), whole[:, :n])


@pytest.mark.parametrize("attend, backend", streams_on_backends(STREAMED))
def test_a_step_does_not_see_what_follows(attend, backend, rng):
    """Bits: the first steps know nothing of the tokens that come later, however many."""
    case = Case(attend, causal=True)
    args, _ = case.draw(rng)
    first, state = stream(attend, args, [0, 3, 5], backend=backend)
    after, _ = stream(attend, args, [0, 3, 5, 11], backend=backend)
    assert_bits(after[:, :5], first)
    others = [np.concatenate([x[:, :5], 3 * x[:, 5:]], axis=1) for x in args]
    again, _ = stream(attend, others, [0, 3, 5, 11], backend=backend)
    assert_bits(again[:, :5], first)
    assert state.position == 5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("attend, backend", streams_on_backends([la.Linear(), la.CosFormer(4 * LENGTH), la.Softmax()]))
def test_sixteen_bit_streams_keep_wide_sums(attend, backend, dtype, rng):
    """The state of a linear stream is in float32, so that a thousand ones still count."""
    n = 1000
    q = k = rounded(np.ones((n, 2)), dtype)
    v = rounded(np.concatenate([np.zeros((n // 2, 1)), np.ones((n // 2, 1))]), dtype)
    out, state = stream(attend, (q, k, v), [0, *range(400, n + 1, 200)], backend=backend)
    assert out.dtype == DTYPES[dtype]
    if is_elementary(attend):
        assert state.arrays.sums.dtype == "float32"
    best = Case(attend, causal=True).formula(q, k, v, causal=True)
    assert np.all(abs(out.astype("float64") - best) <= 1.1 * abs(rounded(best, dtype).astype("float64") - best).max())


# -- states -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attend, backend", streams_on_backends(STREAMED))
def test_old_states_stay_usable(attend, backend, rng):
    """A step changes no state: two futures of one past, and the past's arrays as they were."""
    args, _ = Case(attend, causal=True).draw(rng)
    _, state = stream(attend, args, [0, 6], backend=backend)
    kept = [None if x is None else x.copy() for x in state.arrays]
    tail = [x[:, 6:] for x in args]
    one, _ = attend.step(*tail, state, backend=backend)
    attend.step(*(2 * x for x in tail), state, backend=backend)
    two, after = attend.step(*tail, state, backend=backend)
    assert_bits(two, one)
    for x, y in zip(state.arrays, kept, strict=True):
        if x is not None:
            assert_bits(x, y)
    for x in after.arrays:
        assert x is None or not any(np.shares_memory(x, y) for y in (*tail, *state.arrays) if y is not None)


@pytest.mark.parametrize("attend, backend", streams_on_backends(STREAMED))
def test_states_share_no_memory_with_what_made_them(attend, backend, rng):
    """Writing to the arrays of a step afterwards changes nothing in its state."""
    args, _ = Case(attend, causal=True).draw(rng)
    head, tail = ([x[:, a:b].copy() for x in args] for a, b in ((0, 6), (6, 11)))
    _, state = attend.step(*head, attend.init_state(*args[1:]), backend=backend)
    want, _ = attend.step(*tail, state, backend=backend)
    for x in head:
        x[...] = np.nan
    got, _ = attend.step(*tail, state, backend=backend)
    assert_bits(got, want)


@pytest.mark.parametrize("attend", STREAMED, ids=repr)
def test_a_state_goes_on_in_another_room(attend, rng):
    args, options = (case := Case(attend, causal=True)).draw(rng)
    whole = case.formula(*args, **options)
    rooms = backends_of_steps(attend)
    for first in rooms:
        for second in rooms:
            _, state = stream(attend, args, [0, 5], backend=first)
            out, _ = attend.step(*(x[:, 5:] for x in args), state, backend=second)
            assert_close(out, whole[:, 5:])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("attend, backend", streams_on_backends(STREAMED))
def test_states_of_two_parts_merge(attend, backend, masked, rng):
    """Made apart, each at its own positions, they go on as one stream."""
    case = Case(attend, causal=True, masked=masked)
    args, options = case.draw(rng)
    mask = options.get("key_mask")
    parts = []
    for a, b in ((0, 4), (4, 4), (4, 8)):
        state = attend.init_state(*args[1:], position=a)
        seen = None if mask is None else mask[:, a:b]
        parts.append(attend.step(*(x[:, a:b] for x in args), state, key_mask=seen, backend=backend)[1])
    merged = attend.merge(attend.merge(parts[0], parts[1]), parts[2])
    assert (merged.start, merged.position) == (0, 8)
    seen = None if mask is None else mask[:, 8:]
    out, _ = attend.step(*(x[:, 8:] for x in args), merged, key_mask=seen, backend=backend)
    assert_close(out, case.formula(*args, **options)[:, 8:])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_merging_loses_nothing(dtype):
    """What an addition rounds away stays in `rest`: a small part is still there after a large one."""
    attend = la.Linear("identity", normalize=False)
    tiny = np.finfo(dtype).eps / 8
    one, small = (np.full((1, 1), x, dtype) for x in (1.0, tiny))
    states = [attend.step(x * 0 + 1, x * 0 + 1, x, attend.init_state(x, x))[1] for x in (one, small, -one)]
    total = attend.merge(attend.merge(states[0], states[1]), states[2])
    assert value_of(total).item() == tiny


@pytest.mark.parametrize("attend", STREAMED, ids=repr)
def test_an_empty_state_sees_nothing(attend, rng):
    """Made of shapes alone: the number of tokens and the values of k and v do not matter."""
    (_, k, v), _ = Case(attend, causal=True).draw(rng)
    state, other = attend.init_state(k, v), attend.init_state(np.full_like(k[:, :0], np.nan), v[:, :0])
    for name, x, y in zip(state.arrays._fields, state.arrays, other.arrays, strict=True):
        if x is not None:
            assert_bits(x, y)
            assert not x.any() or (name == "gauge" and np.all(x < -(2**28)))  # no scale yet
    assert (state.start, state.position) == (0, 0)
    assert attend.init_state(k, v, position=3).position == 3
    assert repr(attend) in repr(state)


def test_a_state_of_cosformer_knows_its_position(rng):
    """A stream begun at a position gives what the call gives there."""
    attend = la.CosFormer(20)
    args, _ = Case(attend, causal=True).draw(rng)
    want = attend(*args, causal=True, positions=np.arange(9, 20))
    out, state = attend.step(*args, attend.init_state(*args[1:], position=9))
    assert_close(out, want)
    assert (state.start, state.position) == (9, 20)
    assert attend(*args, causal=True, positions=np.arange(9, 20)).shape == out.shape


# -- files ------------------------------------------------------------------------------------------------------

STORED = [*MAIN, la.Linear("relu", eps=("add", 0.5)), la.CosFormer(LENGTH, eps=("clamp", 1e-6)), la.Softmax(scale=0.25)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("attend", STORED, ids=repr)
def test_a_state_comes_back_from_disk_bit_for_bit(attend, masked, dtype, rng, tmp_path):
    args, options = Case(attend, causal=True, masked=masked).draw(rng, dtype)
    mask = options.get("key_mask")
    _, state = stream(attend, [x[:, :7] for x in args], [0, 7], key_mask=None if mask is None else mask[:, :7])
    file = tmp_path / "state.npz"
    la.save_state(file, state)
    again = la.load_state(file)
    assert again.attend == state.attend
    assert (again.start, again.position) == (state.start, state.position)
    for x, y in zip(again.arrays, state.arrays, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            assert_bits(x, y)
            assert x.flags.writeable
    for got, want in zip(*(attend.step(*(x[:, 7:] for x in args), s)[:1] for s in (again, state)), strict=True):
        assert_bits(got, want)
    assert [f.name for f in tmp_path.iterdir()] == ["state.npz"]


@pytest.mark.parametrize("attend", MAIN, ids=repr)
def test_states_of_empty_axes_come_back(attend, rng, tmp_path):
    _, k, v = rng.normal(size=(3, 0, 4, 2))
    for state in (attend.init_state(k, v), attend.init_state(k[..., :0], v)):
        la.save_state(str(tmp_path / "state.npz"), state)
        for x, y in zip(la.load_state(str(tmp_path / "state.npz")).arrays, state.arrays, strict=True):
            if y is not None:
                assert_bits(x, y)


def test_a_file_is_replaced_whole_or_not_at_all(rng, tmp_path):
    """A state that cannot be saved leaves the old file as it was, and nothing beside it."""
    file = tmp_path / "state.npz"
    _, k, v = rng.normal(size=(3, 2, 4, 2))
    la.save_state(file, la.Linear().init_state(k, v))
    kept = file.read_bytes()
    for bad in (la.Linear(SQUARE), la.Linear(BOTH_SIDES)):
        with pytest.raises(TypeError, match=r"`state` cannot be saved: `feature_map` of .* is not plain data"):
            la.save_state(file, bad.init_state(k, v))
    with pytest.raises(TypeError, match="`state` must be a State, got ndarray"):
        la.save_state(file, k)
    assert file.read_bytes() == kept
    assert len(list(tmp_path.iterdir())) == 1


def npy(x, version=(1, 0)):
    """The bytes of an .npy file."""
    stream = BytesIO()
    np.lib.format.write_array(stream, np.asarray(x), version=version, allow_pickle=True)
    return stream.getvalue()


@pytest.fixture
def members(rng, tmp_path):
    """The members of a good file of a linear state, by name; `write` makes a file of them."""
    _, k, v = rng.normal(size=(3, 2, 3))
    _, state = la.Linear().step(k, k, v, la.Linear().init_state(k, v))
    la.save_state(tmp_path / "good.npz", state)
    with zipfile.ZipFile(tmp_path / "good.npz") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write(file, members, **options):
    with zipfile.ZipFile(file, "w", **options) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def test_a_member_that_comes_twice_is_refused(members, tmp_path):
    """Readers differ in which of the two they take."""
    file = tmp_path / "twice.npz"
    write(file, members)
    with zipfile.ZipFile(file, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("sums.npy", members["sums.npy"])
    with pytest.raises(ValueError, match="is not a linattn state: it must hold"):
        la.load_state(file)


def with_header(members, **changes):
    """The members with other entries in the header; None takes an entry out."""
    header = json.loads(np.load(BytesIO(members["header.npy"])).tobytes())
    header = {name: x for name, x in (header | changes).items() if x is not None}
    return members | {"header.npy": npy(np.frombuffer(json.dumps(header).encode(), np.uint8))}


def described(shape, dtype="float64"):
    return {name: {"dtype": dtype, "shape": shape} for name in ("sums", "rest")}


def declared(data, shape):
    """An .npy that says it has this shape and holds the data of another."""
    head = BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f8", "fortran_order": False, "shape": shape})
    return head.getvalue() + data


HOSTILE = {
    "another magic": lambda m: with_header(m, magic="a state"),
    "a later version": lambda m: with_header(m, version=2),
    "an unknown mechanism": lambda m: with_header(m, mechanism="Softmin"),
    "a mechanism's name as code": lambda m: with_header(m, mechanism="__import__('os')"),
    "parameters it does not have": lambda m: with_header(m, parameters={"feature_map": "elu1", "scale": 1.0}),
    "parameters it refuses": lambda m: with_header(m, parameters={"feature_map": "cubic"}),
    "a map that is not plain": lambda m: with_header(m, parameters={"feature_map": {"name": "x"}}),
    "an unknown kind": lambda m: with_header(m, kind="State"),
    "the kind of another engine": lambda m: with_header(m, kind="SoftmaxState"),
    "an unknown key": lambda m: with_header(m, note="hello"),
    "a missing key": lambda m: with_header(m, position=None),
    "a negative position": lambda m: with_header(m, position=-1),
    "a position before the start": lambda m: with_header(m, start=5),
    "a position that is no integer": lambda m: with_header(m, position="2"),
    "an unknown dtype": lambda m: with_header(m, arrays=described([1, 3, 4], "complex128")),
    "another dtype than the array": lambda m: with_header(m, arrays=described([1, 3, 4], "float32")),
    "another shape than the array": lambda m: with_header(m, arrays=described([1, 4, 3])),
    "an oversized shape in the header": lambda m: with_header(m, arrays=described([1 << 40, 3, 4])),
    "a negative shape": lambda m: with_header(m, arrays=described([-1, -3, 4])),
    "a shape that is no list": lambda m: with_header(m, arrays=described("134")),
    "arrays that are no table": lambda m: with_header(m, arrays=["sums", "rest"]),
    "a missing array": lambda m: {n: x for n, x in m.items() if n != "rest.npy"},
    "no header": lambda m: {n: x for n, x in m.items() if n != "header.npy"},
    "an extra member": lambda m: m | {"more.npy": m["sums.npy"]},
    "an extra file": lambda m: m | {"readme.txt": b"hello"},
    "an oversized declared shape": lambda m: m | {"sums.npy": declared(b"\0" * 96, (1 << 40, 3, 4))},
    "oversized in both": lambda m: with_header(
        m | {"sums.npy": declared(b"\0" * 96, (1 << 40, 3, 4))}, arrays=described([1 << 40, 3, 4])
    ),
    "trailing bytes": lambda m: m | {"sums.npy": m["sums.npy"] + b"\0"},
    "missing bytes": lambda m: m | {"sums.npy": m["sums.npy"][:-1]},
    "an object array": lambda m: m | {"sums.npy": npy(np.array([{"a": 1}], dtype=object))},
    "an object header": lambda m: m | {"header.npy": npy(np.array([{"magic": 1}], dtype=object))},
    "a Fortran array": lambda m: m | {"sums.npy": npy(np.asfortranarray(np.load(BytesIO(m["sums.npy"]))))},
    "a big-endian array": lambda m: m | {"sums.npy": npy(np.load(BytesIO(m["sums.npy"])).astype(">f8"))},
    "another .npy version": lambda m: m | {"sums.npy": npy(np.load(BytesIO(m["sums.npy"])), (2, 0))},
    "no .npy at all": lambda m: m | {"sums.npy": b"\x93NUMPZ" + m["sums.npy"][6:]},
    "an empty member": lambda m: m | {"sums.npy": b""},
    "a header that is no JSON": lambda m: m | {"header.npy": npy(np.frombuffer(b"{" * 9, np.uint8))},
    "a header that is a list": lambda m: m | {"header.npy": npy(np.frombuffer(b"[1]", np.uint8))},
    "a header nested too deep": lambda m: m | {"header.npy": npy(np.frombuffer(b"[" * 60000, np.uint8))},
    "a header that is too long": lambda m: m | {"header.npy": npy(np.zeros(1 << 17, np.uint8))},
    "a header that is no text": lambda m: m | {"header.npy": npy(np.full(9, 255, np.uint8))},
}


@pytest.mark.parametrize("spoil", HOSTILE.values(), ids=list(HOSTILE))
def test_what_is_not_a_state_is_refused(spoil, members, tmp_path):
    """One sentence that names the file, before anything of a declared size is made."""
    file = tmp_path / "bad.npz"
    write(file, spoil(members))
    with pytest.raises(ValueError, match=r"`.*bad\.npz` is not a linattn state: "):
        la.load_state(file)
    write(file, members)
    assert la.load_state(file).attend == la.Linear()


@pytest.mark.parametrize("n_bytes", [0, 1, 30, 200, -1, -30])
def test_a_truncated_file_is_refused(n_bytes, members, tmp_path):
    file = tmp_path / "bad.npz"
    write(file, members)
    file.write_bytes(file.read_bytes()[:n_bytes])
    with pytest.raises(ValueError, match="is not a linattn state"):
        la.load_state(file)


def test_a_damaged_or_packed_file_is_refused(members, tmp_path):
    """Bytes that do not fit their checksum, and compressed members: a few of them can hold a great many zeros."""
    file = tmp_path / "bad.npz"
    write(file, members)
    data = bytearray(file.read_bytes())
    data[data.index(members["sums.npy"]) + 130] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="is not a linattn state"):
        la.load_state(file)
    write(file, members, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"is not a linattn state: .* is compressed"):
        la.load_state(file)
    write(file, members)
    with zipfile.ZipFile(file, "a") as archive, warnings.catch_warnings(action="ignore"):
        archive.writestr("sums.npy", members["sums.npy"])  # a second one of the same name
    with pytest.raises(ValueError, match="is not a linattn state"):
        la.load_state(file)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        la.load_state(tmp_path / "none.npz")


@pytest.mark.parametrize("backend", CPU)
def test_a_loaded_state_that_does_not_fit_is_refused(backend, members, tmp_path, rng):
    """A file may be well formed and belong to other shapes: the step says so."""
    zeros = np.zeros((1, 7, 2))
    changed = with_header(members, arrays=described([1, 7, 2])) | {"sums.npy": npy(zeros), "rest.npy": npy(zeros)}
    write(tmp_path / "other.npz", changed)
    state = la.load_state(tmp_path / "other.npz")
    q, k, v = rng.normal(size=(3, 2, 3))
    with pytest.raises(ValueError, match=r"`state` does not fit: its `sums` must have shape \(1, 3, 4\)"):
        la.Linear().step(q, k, v, state, backend=backend)


def test_merged_and_copied_states_are_values(rng):
    """A state is frozen; `replace` makes another."""
    _, k, v = rng.normal(size=(3, 2, 3))
    state = la.Linear().init_state(k, v)
    with pytest.raises(AttributeError):
        state.position = 3
    assert replace(state, position=3).position == 3
    assert state.position == 0
    assert_close(value_of(la.Linear().merge(state, state)), value_of(state), FLOAT64)
