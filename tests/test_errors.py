"""Every refusal: the right exception, one sentence with the argument, the rule and what came, and nothing done."""

from __future__ import annotations

import re
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from cases import MAIN, backends_of_steps, can_be_causal, values_on_backends

import linattn as la
from linattn import backends

COS = la.CosFormer(4096)


def qkv(n=5, m=None, d=3, e=2, lead=(), dtype="float64"):
    m = n if m is None else m
    return tuple(np.ones((*lead, *shape), dtype) for shape in ((n, d), (m, d), (m, e)))


def refuses(error, pattern, call):
    """`call` raises `error` with one sentence that matches."""
    with pytest.raises(error, match=pattern) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")


# -- arrays -----------------------------------------------------------------------------------------------------

BAD_ARRAYS = {
    "list": (lambda q, k, v: (q.tolist(), k, v), TypeError, r"`q` must be an array, got list"),
    "none": (lambda q, k, v: (q, None, v), TypeError, r"`k` must be an array, got NoneType"),
    "number": (lambda q, k, v: (q, k, 1.0), TypeError, r"`v` must be an array, got float"),
    "numpy number": (lambda q, k, v: (q, k, np.float64(1)), TypeError, r"`v` must be an array"),
    "masked": (lambda q, k, v: (q, np.ma.masked_array(k), v), TypeError, r"`k`.*masked array.*`key_mask`"),
    "one axis": (lambda q, k, v: (q[0], k, v), ValueError, r"`q` must have at least 2 axes.*\(3,\)"),
    "channels": (lambda q, k, v: (q[:, :2], k, v), ValueError, r"q and k .*last axis.*\(5, 2\).*\(5, 3\)"),
    "tokens": (lambda q, k, v: (q, k, v[:4]), ValueError, r"k and v .*tokens.*\(5, 3\).*\(4, 2\)"),
    "leading axes": (
        lambda q, k, v: (np.ones((2, 5, 3)), np.ones((3, 5, 3)), v),
        ValueError,
        r"leading axes.*broadcast.*\(2,\).*\(3,\)",
    ),
    "two dtypes": (lambda q, k, v: (q, k.astype("float32"), v), TypeError, r"one dtype.*float64, float32, float64"),
}
BAD_DTYPES = ["int64", "uint8", "bool", "complex128", "object", np.longdouble]


@pytest.mark.parametrize("attend", MAIN, ids=repr)
@pytest.mark.parametrize("change, error, pattern", BAD_ARRAYS.values(), ids=BAD_ARRAYS)
def test_arrays_that_do_not_fit(attend, change, error, pattern):
    args = change(*qkv())
    refuses(error, pattern, lambda: attend(*args))
    refuses(error, pattern, lambda: attend.vjp(*args))
    state = attend.init_state(*qkv()[1:]) if can_be_causal(attend) else None
    refuses(error, pattern, lambda: attend.step(*args, state))


@pytest.mark.parametrize("attend", MAIN, ids=repr)
@pytest.mark.parametrize("dtype", BAD_DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_dtypes_that_are_not_offered(attend, dtype):
    args = [x.astype(dtype) for x in qkv()]
    name = np.dtype(dtype).name
    refuses(TypeError, rf"`q`.*dtype {name}.*float64, float32, float16, bfloat16", lambda: attend(*args))
    mixed = qkv()[0], args[1], qkv()[2]
    refuses(TypeError, rf"`k`.*dtype {name}|one dtype", lambda: attend(*mixed))


@pytest.mark.torch
@pytest.mark.parametrize("attend", MAIN, ids=repr)
def test_mixed_libraries(attend):
    torch = pytest.importorskip("torch")
    q, k, v = qkv()
    refuses(TypeError, r"one array library.*torch.*numpy", lambda: attend(torch.ones(5, 3), k, v))
    tensors = [torch.ones(x.shape, dtype=torch.float64) for x in (q, k, v)]
    mask = np.ones(5, bool)
    refuses(TypeError, r"`key_mask`.*library.*numpy.*torch", lambda: attend(*tensors, key_mask=mask))
    refuses(TypeError, r"numba.*numpy.*torch", lambda: attend(*tensors, backend="numba"))
    _, backward = attend.vjp(*tensors)
    refuses(TypeError, r"`d_out`.*library.*torch.*numpy", lambda: backward(np.ones((5, 2))))


# -- options ----------------------------------------------------------------------------------------------------

BAD_OPTIONS = {
    "causal": ({"causal": 1}, TypeError, r"`causal` must be True or False, got 1"),
    "mask dtype": ({"key_mask": np.ones(5)}, TypeError, r"`key_mask`.*bool.*float64"),
    "mask list": ({"key_mask": [True] * 5}, TypeError, r"`key_mask`.*bool.*list"),
    "mask length": ({"key_mask": np.ones(4, bool)}, ValueError, r"`key_mask` must have shape .*M = 5.*\(4,\)"),
    "mask lead": ({"key_mask": np.ones((3, 5), bool)}, ValueError, r"`key_mask`.*shape.*\(3, 5\)"),
    "cu_seqlens start": ({"cu_seqlens": [1, 5]}, ValueError, r"`cu_seqlens` must rise from 0 to N = 5.*\[1, 5\]"),
    "cu_seqlens end": ({"cu_seqlens": [0, 4]}, ValueError, r"`cu_seqlens`.*0.*N"),
    "cu_seqlens falls": ({"cu_seqlens": [0, 3, 2, 5]}, ValueError, r"`cu_seqlens`.*0.*N"),
    "cu_seqlens empty": ({"cu_seqlens": []}, ValueError, r"`cu_seqlens`.*0.*N"),
    "cu_seqlens reals": ({"cu_seqlens": np.array([0.0, 5.0])}, TypeError, r"`cu_seqlens` must hold integers"),
    "cu_seqlens two axes": ({"cu_seqlens": np.array([[0, 5]])}, ValueError, r"`cu_seqlens`.*one axis"),
    "backend": ({"backend": "tpu"}, ValueError, r"`backend`.*reference, numba, cupy.*'tpu'"),
    "cupy": ({"backend": "cupy"}, TypeError, r"cupy.*cupy arrays.*numpy"),
    "out dtype": ({"out": np.ones((2, 5, 2), "float32")}, TypeError, r"`out` must have dtype float64.*float32"),
    "out shape": ({"out": np.ones((2, 5, 3))}, ValueError, r"`out` must have shape \(2, 5, 2\).*\(2, 5, 3\)"),
    "out list": ({"out": [1.0]}, TypeError, r"`out` must be an array, got list"),
}


@pytest.mark.parametrize("attend", MAIN, ids=repr)
@pytest.mark.parametrize("options, error, pattern", BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_options_that_do_not_fit(attend, options, error, pattern):
    args = qkv(lead=(2,))
    kept = [x.copy() for x in args]
    refuses(error, pattern, lambda: attend(*args, **options))
    refuses(error, pattern, lambda: attend.vjp(*args, **options))
    for x, y in zip(args, kept, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("attend", MAIN, ids=repr)
def test_causal_needs_as_many_queries_as_keys(attend):
    args = qkv(5, 7)
    refuses(ValueError, r"`causal`.*N = 5.*M = 7.*`step`", lambda: attend(*args, causal=True))
    refuses(ValueError, r"N == M.*N = 5.*M = 7", lambda: attend(*args, cu_seqlens=[0, 7]))
    refuses(ValueError, r"`causal`.*N = 5.*M = 7", lambda: attend.weights(*args[:2], causal=True))


@pytest.mark.parametrize("attend", MAIN, ids=repr)
def test_results_that_cannot_be_filled(attend):
    q, k, v = np.ones((3, 5, 2))
    fixed = np.ones((5, 2))
    fixed.flags.writeable = False
    refuses(ValueError, r"`out` must be writeable", lambda: attend(q, k, v, out=fixed))
    for x in (q, k, v):
        refuses(ValueError, r"`out`.*overlap", lambda x=x: attend(q, k, v, out=x))
    refuses(ValueError, r"`out`.*overlap", lambda: attend(q, k, v, out=v[::-1]))
    out, backward = attend.vjp(q, k, v)
    fresh = [np.ones((5, 2)) for _ in range(3)]
    refuses(TypeError, r"`out` of a backward.*tuple.*list", lambda: backward(out, out=fresh))
    refuses(TypeError, r"`out` of a backward.*tuple", lambda: backward(out, out=(fresh[0], fresh[1])))
    refuses(ValueError, r"d_k.*overlap", lambda: backward(out, out=(fresh[0], fresh[0], fresh[1])))
    refuses(ValueError, r"d_v.*overlap", lambda: backward(out, out=(fresh[0], fresh[1], v)))
    refuses(ValueError, r"d_q.*shape \(5, 2\).*\(4, 2\)", lambda: backward(out, out=(np.ones((4, 2)), *fresh[1:])))
    refuses(ValueError, r"d_q.*overlap", lambda: backward(fresh[0], out=tuple(fresh)))


@pytest.mark.parametrize("attend, backend", values_on_backends(MAIN))
def test_cotangents_that_do_not_fit(attend, backend):
    q, k, v = qkv()
    _, backward = attend.vjp(q, k, v, backend=backend)
    shape = r"`d_out` must have the shape of `out` \(5, 2\), got \(5, 3\)"
    refuses(ValueError, shape, lambda: backward(np.ones((5, 3))))
    refuses(TypeError, r"`d_out`.*dtype of `out` \(float64\), got float32", lambda: backward(np.ones((5, 2), "f4")))
    refuses(TypeError, r"`d_out` must be an array, got NoneType", lambda: backward(None))


# -- positions --------------------------------------------------------------------------------------------------


def test_positions_outside_the_length():
    q, k, v = qkv()
    attend = la.CosFormer(8)
    for bad, shown in (([0, 1, 2, 9, 20], "9"), ([0, 1, -1, 2, 3], "-1"), ([0, 1, 2, 3, np.nan], "nan")):
        pattern = rf"position {shown} .*outside 0 \.\. length=8"
        refuses(ValueError, pattern, lambda p=bad: attend(q, k, v, positions=np.array(p, float)))
        refuses(ValueError, pattern, lambda p=bad: attend.weights(q, k, positions=np.array(p, float)))
    assert attend(*qkv(9)).shape == (9, 2)  # the last position may be `length`
    refuses(ValueError, r"position 9 .*length=8", lambda: attend(*qkv(10)))
    refuses(ValueError, r"position.*length=4096", lambda: COS(*qkv(4098, d=1, e=1), causal=True))


@pytest.mark.parametrize(
    "positions, error, pattern",
    [
        ([0, 1, 2, 3, 4], TypeError, r"`positions` must be an array, got list"),
        (np.array(list("abcde")), TypeError, r"`positions` must hold integers or real numbers"),
        (np.ones(4), ValueError, r"`positions` must have shape .*5.*\(4,\)"),
        (np.ones((3, 5)), ValueError, r"`positions`.*broadcast"),
        ((np.ones(5), np.ones(4)), ValueError, r"`positions` must have shape .*M = 5"),
    ],
)
def test_positions_that_do_not_fit(positions, error, pattern):
    refuses(error, pattern, lambda: COS(*qkv(lead=(2,)), positions=positions))


@pytest.mark.parametrize("attend", [la.CosFormer(), la.CosFormer(align="stretch")], ids=repr)
def test_cosformer_without_length(attend):
    q, k, v = qkv()
    mask = np.ones(5, bool)
    for call, asked in (
        (lambda: attend(q, k, v, causal=True), "causal"),
        (lambda: attend(q, k, v, key_mask=mask), "key_mask"),
        (lambda: attend(q, k, v, positions=np.arange(5)), "positions"),
        (lambda: attend.init_state(k, v), "stream"),
    ):
        refuses(ValueError, rf"{re.escape(repr(attend))}.*{asked}.*`length`", call)


def test_positions_are_cosformers_alone():
    with pytest.raises(TypeError, match="positions"):
        la.Linear()(*qkv(), positions=np.arange(5))


# -- streams ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attend", MAIN, ids=repr)
def test_states_that_do_not_fit(attend):
    q, k, v = qkv(lead=(2,))
    state = attend.init_state(k, v)
    other = la.Linear("relu", eps=("add", 1e-6)) if not isinstance(attend, la.Softmax) else la.Softmax(scale=3.0)
    pattern = rf"`state`.*{re.escape(repr(other))}.*{re.escape(repr(attend))}"
    refuses(ValueError, pattern, lambda: attend.step(q, k, v, other.init_state(k, v)))
    refuses(TypeError, r"`state` must be a state.*NoneType", lambda: attend.step(q, k, v, None))
    refuses(ValueError, r"`state` does not fit", lambda: attend.step(q, k, np.ones((2, 5, 3)), state))
    refuses(ValueError, r"`state` does not fit", lambda: attend.step(q[0], k[0], v[0], state))
    single = [x.astype("float32") for x in (q, k, v)]
    refuses(TypeError, r"`state` must hold float32, got float64", lambda: attend.step(*single, state))
    refuses(ValueError, r"`causal`.*N = 4.*M = 5", lambda: attend.step(q[:, :4], k, v, state))
    refuses(TypeError, r"`later|`state` must be a state", lambda: attend.merge(state, k))
    refuses(ValueError, r"does not fit", lambda: attend.merge(state, attend.init_state(k[0], v[0])))
    refuses(ValueError, r"`position` must be at least 0, got -1", lambda: attend.init_state(k, v, position=-1))
    refuses(TypeError, r"`position` must be an integer, got 0\.5", lambda: attend.init_state(k, v, position=0.5))
    refuses(ValueError, r"k and v .*tokens", lambda: attend.init_state(k, v[:, :3]))


@pytest.mark.parametrize("attend", MAIN, ids=repr)
def test_cotangents_of_states_that_do_not_fit(attend):
    q, k, v = qkv()
    out, after, backward = attend.step_vjp(q, k, v, attend.init_state(k, v))
    refuses(TypeError, r"`state` must be a state", lambda: backward(out, q))
    small = attend.step(*qkv(5, e=1), attend.init_state(*qkv(5, e=1)[1:]))[1]
    refuses(ValueError, r"`d_state` does not fit", lambda: backward(out, small))
    if isinstance(attend, la.Softmax):
        refuses(ValueError, r"`d_state` does not fit", lambda: backward(out, attend.init_state(k, v)))
    narrow = replace(after, arrays=after.arrays._replace(**{after.arrays._fields[0]: after.arrays[0].astype("f4")}))
    refuses(TypeError, r"`d_state` must hold float64, got float32", lambda: backward(out, narrow))


def test_a_stream_ends_at_the_length():
    attend = la.CosFormer(8)
    q, k, v = qkv(6)
    _, state = attend.step(q, k, v, attend.init_state(k, v))
    kept = state.arrays.sums.copy()
    refuses(ValueError, r"position 9 .*length=8", lambda: attend.step(*qkv(4), state))
    np.testing.assert_array_equal(state.arrays.sums, kept)
    assert state.position == 6
    assert attend.step(*qkv(3), state)[1].position == 9


def test_states_merge_where_they_meet():
    _, k, v = qkv()
    earlier, later = COS.init_state(k, v), COS.init_state(k, v, position=7)
    refuses(ValueError, r"`later`.*position.*\(0\), got 7", lambda: COS.merge(earlier, later))


# -- values -----------------------------------------------------------------------------------------------------

BAD_VALUES = {
    "length 0": (lambda: la.CosFormer(0), ValueError, r"`length` must be at least 1, got 0"),
    "length real": (lambda: la.CosFormer(8.0), TypeError, r"`length` must be an integer, got 8\.0"),
    "length bool": (lambda: la.CosFormer(True), TypeError, r"`length` must be an integer, got True"),
    "align": (
        lambda: la.CosFormer(8, align="end"),
        ValueError,
        r"`align` must be one of 'start', 'stretch', got 'end'",
    ),
    "align type": (lambda: la.CosFormer(8, align=None), TypeError, r"`align` must be one of"),
    "stretch length": (lambda: la.CosFormer(8, align="stretch"), ValueError, r"`length` must be left out.*8"),
    "map": (lambda: la.Linear("gelu"), ValueError, r"`feature_map` must be one of .*'relu'.*, got 'gelu'"),
    "map type": (lambda: la.Linear(np.exp), TypeError, r"`feature_map` must be a name or a FeatureMap"),
    "normalize": (lambda: la.Linear(normalize=1), TypeError, r"`normalize` must be True or False, got 1"),
    "eps name": (lambda: la.Linear(eps="none"), ValueError, r"`eps` must be \"safe\".*'none'"),
    "eps number": (lambda: la.Linear(eps=1e-6), TypeError, r"`eps` must be \"safe\".*1e-06"),
    "eps kind": (lambda: la.Linear(eps=("mul", 1.0)), ValueError, r"`eps` must be"),
    "eps zero": (lambda: la.Linear(eps=("add", 0.0)), ValueError, r"`eps=\(\"add\", x\)` must be positive.*0\.0"),
    "eps nan": (lambda: la.Linear(eps=("add", float("nan"))), ValueError, r"must be positive and finite, got nan"),
    "scale": (lambda: la.Softmax(scale=-1.0), ValueError, r"`scale` must be positive and finite, got -1\.0"),
    "scale type": (lambda: la.Softmax(scale="1"), TypeError, r"`scale` must be a real number, got '1'"),
    "scale inf": (lambda: la.Softmax(scale=float("inf")), ValueError, r"`scale` must be positive and finite"),
    "map name": (lambda: la.FeatureMap(1, abs, abs), TypeError, r"`name` must be a string, got 1"),
    "map function": (lambda: la.FeatureMap("f", 1, abs), TypeError, r"`phi` must be a function, got 1"),
    "map vjp": (lambda: la.FeatureMap("f", abs, None), TypeError, r"`vjp` must be a function, got None"),
}


@pytest.mark.parametrize("make, error, pattern", BAD_VALUES.values(), ids=BAD_VALUES)
def test_values_that_cannot_be(make, error, pattern):
    refuses(error, pattern, make)


def test_elu_name_is_an_error():
    """cosFormer's own code takes act_fun="elu" and fails inside torch; an unknown name gives None there."""
    for name in ("elu", "none", ""):
        refuses(ValueError, rf"`feature_map`.*got '{name}'", lambda name=name: la.CosFormer(8, feature_map=name))


def test_functions_have_nothing_of_their_own():
    """The one-call functions refuse with the sentences of the values."""
    q, k, v = qkv()
    refuses(ValueError, r"`length` must be at least 1", lambda: la.cosformer(q, k, v, length=0))
    refuses(ValueError, r"`feature_map`", lambda: la.linear_attention(q, k, v, feature_map="gelu"))
    refuses(ValueError, r"`scale`", lambda: la.softmax_attention(q, k, v, scale=0.0))
    with pytest.raises(TypeError):
        la.cosformer(q, k)  # v is never taken from somewhere else


def test_bfloat16_is_known_by_name():
    """A 16-bit dtype that NumPy does not know by itself is no stranger; an 8-bit one is."""
    args = [x.astype(ml_dtypes.bfloat16) for x in qkv()]
    assert la.Linear()(*args).dtype == ml_dtypes.bfloat16
    strange = [x.astype(ml_dtypes.float8_e5m2) for x in qkv()]
    refuses(TypeError, r"dtype float8_e5m2.*float64, float32, float16, bfloat16", lambda: la.Linear()(*strange))


# -- libraries, devices, rooms ----------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize("attend", MAIN, ids=repr)
def test_everything_comes_from_one_library(attend):
    import torch

    q, k, v = qkv()
    there = [torch.ones(x.shape, dtype=torch.float64) for x in (q, k, v)]
    refuses(TypeError, r"`out`.*library of the inputs \(numpy\).*torch", lambda: attend(q, k, v, out=there[2]))
    refuses(TypeError, r"`out`.*library of the inputs \(torch\).*numpy", lambda: attend(*there, out=v.copy()))
    state, other = attend.init_state(k, v), attend.init_state(*there[1:])
    refuses(TypeError, r"`state` must hold arrays of numpy, got torch", lambda: attend.step(q, k, v, other))
    refuses(TypeError, r"`state` must hold arrays of torch, got numpy", lambda: attend.step(*there, state))
    refuses(TypeError, r"Both states.*one library.*numpy, torch", lambda: attend.merge(state, other))
    refuses(TypeError, r"`state` must hold NumPy arrays.*torch", lambda: la.save_state("state.npz", other))
    tokens = torch.arange(5)
    refuses(TypeError, r"`positions`.*numpy.*torch", lambda: COS(q, k, v, positions=tokens))


def test_everything_is_on_one_device():
    import array_api_strict as xp

    q, k, v = (xp.asarray(x) for x in qkv())
    refuses(
        ValueError,
        r"q, k, v must be on one device, got .*device1",
        lambda: la.Linear()(q, k.to_device(xp.Device("device1")), v),
    )


@pytest.mark.jax
def test_nothing_is_written_to_arrays_that_cannot_be():
    import jax.numpy as jnp

    q, k, v = (jnp.asarray(x, "float32") for x in qkv())
    refuses(TypeError, r"`out` must be a writeable array", lambda: la.Linear()(q, k, v, out=q))
    refuses(
        TypeError,
        r"`cu_seqlens`.*readable integers.*traced",
        lambda: la.Linear()(q, k, v, cu_seqlens=jnp.asarray([0, 5])),
    )


def test_masked_edges():
    edges = np.ma.masked_array([0, 5])
    refuses(TypeError, r"`cu_seqlens`.*masked array", lambda: la.Linear()(*qkv(), cu_seqlens=edges))


@pytest.mark.parametrize("attend", MAIN, ids=repr)
def test_a_room_that_cannot_serve(attend, monkeypatch):
    """By name it is an error that says why; left out, the reference room takes over."""
    args = qkv()
    want = attend(*args, backend="reference")
    load = backends.load
    for reason, error, pattern in (
        ("no linear engine", ValueError, r"`backend='numba'`: numba has no linear engine; use the reference"),
        (
            "ImportError: no llvm",
            ImportError,
            r"`backend='numba'` cannot be loaded \(ImportError: no llvm\).*pip install",
        ),
    ):
        monkeypatch.setattr(
            backends, "load", lambda room, engine, r=reason: r if room == "numba" else load(room, engine)
        )
        refuses(error, pattern, lambda: attend(*args, backend="numba"))
        np.testing.assert_array_equal(attend(*args), want)
    monkeypatch.setattr(backends, "load", lambda room, engine: "RuntimeError: no driver")
    monkeypatch.setattr(backends._arrays, "library", lambda x: "cupy")  # no CuPy is needed to be told so
    extra = r"cannot be loaded.*no driver.*pip install linattn\[gpu\]"
    refuses(ImportError, extra, lambda: backends.resolve("cupy", args[0], "linear"))


# -- nothing is done --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attend, backend", values_on_backends(MAIN))
def test_a_refused_call_writes_nothing(attend, backend):
    """Neither to `out` nor to a state: both are as they were, and the next call is right."""
    q, k, v = (np.arange(10.0).reshape(5, 2) / (i + 1) for i in range(3))
    room, grads = np.full((5, 2), 7.0), tuple(np.full((5, 2), 7.0) for _ in range(3))
    for options, error, _ in BAD_OPTIONS.values():
        with pytest.raises(error):
            attend(q, k, v, **({"out": room, "backend": backend} | options))
    _, backward = attend.vjp(q, k, v, backend=backend)
    for d_out in (np.ones((4, 2)), np.ones((5, 2), "float32"), [1.0]):
        with pytest.raises((TypeError, ValueError)):
            backward(d_out, out=grads)
    fixed = np.zeros((5, 2))
    fixed.flags.writeable = False
    with pytest.raises(ValueError, match="writeable"):
        backward(np.ones((5, 2)), out=(*grads[:2], fixed))
    for x in (room, *grads):
        np.testing.assert_array_equal(x, 7.0)

    backend = backend if backend in backends_of_steps(attend) else None
    _, state = attend.step(q, k, v, attend.init_state(k, v), backend=backend)
    kept = [None if x is None else x.copy() for x in state.arrays]
    for bad in ((q[:3], k, v), (q, k, v[:, :1]), (q.astype("float32"), k, v), ([1.0], k, v)):
        with pytest.raises((TypeError, ValueError)):
            attend.step(*bad, state, backend=backend)
    for x, y in zip(state.arrays, kept, strict=True):
        np.testing.assert_array_equal(x, y)
