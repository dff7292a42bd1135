"""However arguments lie in memory: the bits of plain copies, nothing written to, results of their own or in `out`."""

from __future__ import annotations

import numpy as np
import pytest
from cases import (
    BACKENDS,
    CASES,
    DTYPES,
    FLOAT64,
    LENGTH,
    MAIN,
    MAIN_CASES,
    SIXTEEN_BITS,
    Case,
    assert_bits,
    assert_close,
    backends_of,
    backends_of_steps,
    has_blocks,
    on_backends,
    rounded,
    values_on_backends,
)
from hypothesis import given
from hypothesis import strategies as st

import linattn as la


def both_directions(attend, args, d_out, options, backend):
    out, backward = attend.vjp(*args, **options, backend=backend)
    return out, *backward(d_out)


def sliced(x):
    """Every second entry of every axis of something larger."""
    whole = np.ones([2 * n + 1 for n in x.shape]).astype(x.dtype)
    whole[(slice(1, None, 2),) * x.ndim] = x
    return whole[(slice(1, None, 2),) * x.ndim]


def part_of_a_row(x):
    """Contiguous channels in rows of something wider, as a projection of q, k and v at once has them."""
    whole = np.full((*x.shape[:-1], x.shape[-1] + 3), np.nan).astype(x.dtype)
    whole[..., 2:-1] = x
    return whole[..., 2:-1]


def backwards(x):
    """Negative strides along the last two axes."""
    return np.flip(np.ascontiguousarray(np.flip(x, axis=(-1, -2)[: x.ndim])), axis=(-1, -2)[: x.ndim])


def tokens_backwards(x):
    """Channels contiguous, tokens from the last to the first."""
    return np.flip(np.ascontiguousarray(np.flip(x, axis=-2)), axis=-2) if x.ndim > 1 else backwards(x)


def heads_last(x):
    """(..., T, heads, channels) in memory, as many programs have it."""
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 0, -2)), -2, 0) if x.ndim > 2 else x


def misaligned(x):
    """Its first byte lies on an odd address."""
    raw = np.zeros(x.nbytes + 1, np.uint8)
    there = raw[1:].view(x.dtype).reshape(x.shape)
    there[...] = x
    assert not there.flags.aligned or x.itemsize == 1
    return there


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


def big_endian(x):
    return x.astype(x.dtype.newbyteorder(">"))


LAID_OUT = [case for case in MAIN_CASES if case.d == 5 and (case.masked or case.moved or case.lead[0] == (2, 3))]
LAYOUTS = [
    sliced,
    part_of_a_row,
    np.asfortranarray,
    backwards,
    tokens_backwards,
    heads_last,
    misaligned,
    read_only,
    big_endian,
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("case, backend", on_backends(LAID_OUT))
def test_a_layout_changes_no_bit(case, backend, layout, rng):
    """Of q, k, v, d_out and the mask together, and of one of them alone: no layout is taken for another's."""

    def run(args, d_out, options):
        return both_directions(case.attend, args, d_out, options, backend)

    args, options = case.draw(rng)
    d_out = case.cotangent(rng)
    there = dict(options)
    if case.masked and layout is not big_endian:
        there["key_mask"] = layout(options["key_mask"]) if layout is not part_of_a_row else sliced(options["key_mask"])
    for x, y in zip(run([layout(x) for x in args], layout(d_out), there), run(args, d_out, options), strict=True):
        assert_bits(x, y)
    args, d_out = [x.astype("float32") for x in args], d_out.astype("float32")
    first = run(args, d_out, options)
    for i in range(3):
        mixed = [layout(x) if i == j else x for j, x in enumerate(args)]
        for x, y in zip(run(mixed, d_out, options), first, strict=True):
            assert_bits(x, y)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("attend, backend", values_on_backends(MAIN))
def test_a_layout_changes_no_bit_of_sixteen(attend, backend, dtype, rng):
    case = Case(attend, causal=True)
    args, options = case.draw(rng, dtype)
    d_out = case.cotangent(rng, dtype)
    first = both_directions(attend, args, d_out, options, backend)
    for layout in (sliced, part_of_a_row, backwards, misaligned, read_only):
        after = both_directions(attend, [layout(x) for x in args], layout(d_out), options, backend)
        for x, y in zip(after, first, strict=True):
            assert_bits(x, y)


@pytest.mark.parametrize("attend, backend", values_on_backends(MAIN))
def test_zero_strides(attend, backend, rng):
    """Broadcast views are read as what they show, d_out = 1 among them: sums of cotangents make it so."""
    case = Case(attend, causal=True)
    (q, k, v), options = case.draw(rng)
    shown = [
        np.broadcast_to(q[:, :1], q.shape),  # one token for all
        np.broadcast_to(k[..., :1], k.shape),  # one channel for all
        np.broadcast_to(v[:1], v.shape),  # one head for all
    ]
    for d_out in (np.ones(()), np.ones((4,)), rng.normal(size=(2, 1, 1)), rng.normal(size=(11, 1))):
        d_out = np.broadcast_to(d_out, case.out_shape)
        first = both_directions(attend, [x.copy() for x in shown], d_out.copy(), options, backend)
        for x, y in zip(both_directions(attend, shown, d_out, options, backend), first, strict=True):
            assert_bits(x, y)


@pytest.mark.filterwarnings("ignore:the matrix subclass")
@pytest.mark.parametrize("attend, backend", values_on_backends(MAIN))
def test_a_matrix_is_a_plain_array(attend, backend, rng):
    case = Case(attend, causal=True, lead=((), (), ()))
    args, options = case.draw(rng)
    d_out = case.cotangent(rng)
    first = both_directions(attend, args, d_out, options, backend)
    after = both_directions(attend, [np.matrix(x) for x in args], np.matrix(d_out), options, backend)
    for x, y in zip(after, first, strict=True):
        assert type(x) is np.ndarray
        assert_bits(x, y)


@pytest.mark.parametrize("attend, backend", values_on_backends(MAIN))
def test_one_array_for_all(attend, backend, rng):
    """q is k is v is d_out."""
    case = Case(attend, causal=True, d=4, e=4)
    (x, _, _), options = case.draw(rng)
    kept = x.copy()
    first = both_directions(attend, [x.copy() for _ in range(3)], x.copy(), options, backend)
    for a, b in zip(both_directions(attend, (x, x, x), x, options, backend), first, strict=True):
        assert_bits(a, b)
    assert_bits(x, kept)


# -- nothing is written to --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case, backend", on_backends(CASES))
def test_arguments_are_read_only_and_results_their_own(case, backend, rng):
    """A write would raise; and no result shares memory with an argument or with another result."""
    args, options = case.draw(rng)
    d_out = case.cotangent(rng)
    args, d_out = [read_only(x) for x in args], read_only(d_out)
    options = {name: read_only(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    given = [*args, d_out, *(x for x in options.values() if isinstance(x, np.ndarray))]
    results = both_directions(case.attend, args, d_out, options, backend)
    results = [*results, *case.attend.vjp(*args, **options, backend=backend)[1](d_out)]
    for i, x in enumerate(results):
        assert x.flags.writeable
        assert not any(np.shares_memory(x, y) for y in (*given, *results[:i]))
        x[...] = np.nan  # and nobody minds
    again = both_directions(case.attend, args, d_out, options, backend)
    assert np.isfinite(again[0]).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_are_their_own(case, rng):
    (q, k, _), options = case.draw(rng)
    q, k = read_only(q), read_only(k)
    weights = case.attend.weights(q, k, **options)
    assert not any(np.shares_memory(weights, x) for x in (q, k))


@pytest.mark.parametrize(
    "case, backend",
    on_backends([c for c in MAIN_CASES if c.causal and not c.packed and not c.moved], backends_of_steps),
)
def test_steps_write_to_nothing(case, backend, rng):
    """Arguments, the state and its cotangent are read only."""
    args, options = case.draw(rng)
    args = [read_only(x) for x in args]
    mask = options.get("key_mask")
    state = case.attend.init_state(*args[1:])
    for _ in range(2):
        for x in state.arrays:
            if x is not None:
                x.flags.writeable = False
        out, state, backward = case.attend.step_vjp(*args, state, key_mask=mask, backend=backend)
    for x in state.arrays:
        if x is not None:
            x.flags.writeable = False
    before = [None if x is None else x.copy() for x in state.arrays]
    d_q, d_k, d_v, d_state = backward(read_only(np.ones(out.shape)), state)
    for x, y in zip(state.arrays, before, strict=True):
        if x is not None:
            assert_bits(x, y)
    results = [out, d_q, d_k, d_v, *d_state.arrays]
    for i, x in enumerate(results):
        assert x is None or not any(np.shares_memory(x, y) for y in (*args, *results[:i]) if y is not None)


@pytest.mark.parametrize("attend, backend", values_on_backends(MAIN))
def test_no_warning_for_what_is_not_finite(attend, backend, rng):
    """NaN and inf are results, not news; whatever NumPy was told to do about them."""
    case = Case(attend, causal=True)
    args, options = case.draw(rng)
    args[0][0, 3], args[1][0, 4], args[2][1, 5] = np.nan, np.inf, -np.inf
    with np.errstate(all="raise"):
        both_directions(attend, args, case.cotangent(rng), options, backend)
        attend.weights(*args[:2], **options)
        if backend in backends_of_steps(attend):
            attend.step(*args, attend.init_state(*args[1:]), backend=backend)


# -- out= -------------------------------------------------------------------------------------------------------

PLACES = [np.empty_like, sliced, np.asfortranarray, backwards, misaligned]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
@pytest.mark.parametrize("case, backend", on_backends(LAID_OUT))
def test_results_go_to_out(case, backend, place, rng):
    """Into arrays of any layout, on the call and on its backward; what is returned is what was given."""
    for dtype in ("float32", "float16"):
        args, options = case.draw(rng, dtype)
        d_out = case.cotangent(rng, dtype)
        first = both_directions(case.attend, args, d_out, options, backend)
        room = place(rounded(np.zeros(case.out_shape), dtype))
        grads = tuple(place(np.zeros_like(x)) for x in args)
        assert case.attend(*args, **options, out=room, backend=backend) is room
        assert_bits(room, first[0])
        room[...] = 0
        out, backward = case.attend.vjp(*args, **options, out=room, backend=backend)
        assert out is room
        assert_bits(room, first[0])
        for x, y in zip(backward(d_out, out=grads), grads, strict=True):
            assert x is y
        for x, y in zip(grads, first[1:], strict=True):
            assert_bits(x, y)


@pytest.mark.parametrize("attend, backend", values_on_backends(MAIN))
def test_out_may_change_before_the_backward(attend, backend, rng):
    """Nothing of the backward rests on the array that the caller owns."""
    case = Case(attend, causal=True)
    args, options = case.draw(rng)
    d_out, room = case.cotangent(rng), np.zeros(case.out_shape)
    want = attend.vjp(*args, **options, backend=backend)[1](d_out)
    _, backward = attend.vjp(*args, **options, backend=backend, out=room)
    room[...] = np.nan
    for x, y in zip(backward(d_out), want, strict=True):
        assert_bits(x, y)


@pytest.mark.parametrize("attend, backend", values_on_backends(MAIN))
def test_d_out_may_be_where_out_was(attend, backend, rng):
    """The memory of a result is the caller's: its cotangent may stand there."""
    case = Case(attend, causal=True)
    args, options = case.draw(rng)
    d_out = case.cotangent(rng)
    want = attend.vjp(*args, **options, backend=backend)[1](d_out)
    out, backward = attend.vjp(*args, **options, backend=backend)
    out[...] = d_out
    for x, y in zip(backward(out), want, strict=True):
        assert_bits(x, y)


# -- types of options -------------------------------------------------------------------------------------------


def test_positions_of_any_real_type(rng):
    """Integers of any width and floats of any, one array or a pair, say the same positions."""
    attend = la.CosFormer(LENGTH)
    args, _ = Case(attend, causal=True).draw(rng)
    p = rng.permutation(40)[:11]
    for backend in backends_of(attend):
        want = attend(*args, causal=True, positions=p, backend=backend)
        for kind in ("uint8", "int16", "int64", "uint64", "float16", "float64"):
            assert_bits(attend(*args, causal=True, positions=p.astype(kind), backend=backend), want)
        assert_bits(attend(*args, causal=True, positions=(p, p), backend=backend), want)
        assert_bits(attend(*args, causal=True, positions=np.stack([p, p]), backend=backend), want)


def test_edges_of_any_integer_type(rng):
    attend = la.Linear()
    args, _ = Case(attend).draw(rng)
    want = attend(*args, cu_seqlens=[0, 4, 11])
    for edges in ((0, 4, 11), np.array([0, 4, 11], "uint8"), np.array([0, 4, 11], ">i4"), np.array([0, 4, 4, 11])):
        assert_bits(attend(*args, cu_seqlens=edges), want)


def test_numpy_numbers_as_parameters():
    assert la.CosFormer(np.int64(8)) == la.CosFormer(8)
    assert la.Softmax(scale=np.float32(0.5)) == la.Softmax(scale=0.5)
    assert hash(la.CosFormer(np.int64(8))) == hash(la.CosFormer(8))


# -- anything else ----------------------------------------------------------------------------------------------


@st.composite
def calls(draw):
    """A call of any shape, layout, dtype and options, with numbers from all of the format."""
    attend = draw(st.sampled_from([*MAIN, la.Linear("relu")]))
    dtype = draw(st.sampled_from(list(DTYPES)))
    causal = draw(st.booleans())
    n = draw(st.integers(0, 9))
    m = n if causal or has_blocks(attend) else draw(st.integers(0, 9))
    d, e = draw(st.integers(1, 5)), draw(st.integers(0, 5))
    leads = draw(
        st.sampled_from([((), (), ()), ((2,), (2,), (2,)), ((2, 2), (2, 1), ()), ((0,), (1,), ()), ((3,), (), (3,))])
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    size = 10.0 ** draw(st.sampled_from([-300, -30, -4, 0, 0, 0, 2]))
    shapes = ((*leads[0], n, d), (*leads[1], m, d), (*leads[2], m, e))
    with np.errstate(all="ignore"):
        q, k, v = (rounded(rng.normal(size=shape) * s, dtype) for shape, s in zip(shapes, (size, size, 1), strict=True))
    layout = draw(st.sampled_from([np.asarray, sliced, backwards, read_only, part_of_a_row]))
    options = {"causal": causal}
    if draw(st.booleans()):
        options["key_mask"] = rng.random((*leads[draw(st.integers(0, 1))], m)) > 0.3
    return attend, [layout(x) for x in (q, k, v)], options, draw(st.sampled_from(BACKENDS))


@given(calls())
def test_ones_give_ones_whatever_the_call(call):
    """v = 1 gives 1, or 0 in a row without weight; shapes and dtype are right; nothing raises."""
    attend, (q, k, v), options, backend = call
    backend = backend if backend in backends_of(attend) else None
    out, backward = attend.vjp(q, k, np.ones_like(v), **options, backend=backend)
    assert out.dtype == v.dtype
    assert out.shape[-2:] == (q.shape[-2], v.shape[-1])
    near = np.finfo("float32").eps if out.dtype != "float64" else FLOAT64
    wide = out.astype("float64")
    assert np.all((wide == 0) | (abs(wide - 1) <= 16 * near))
    grads = backward(np.ones_like(out))
    assert [(g.shape, g.dtype) for g in grads] == [(x.shape, x.dtype) for x in (q, k, v)]
    assert_close(attend(q, k, np.ones_like(v), **options, backend="reference"), wide, 16 * near + (out.itemsize == 2))
