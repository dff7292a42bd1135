"""One source on every array library: same results, and the library, dtype and device of what came in."""

from __future__ import annotations

import pickle
from importlib import import_module

import numpy as np
import pytest
from cases import (
    MAIN,
    MAIN_CASES,
    TOLERANCE,
    Case,
    assert_close,
    assert_gradients_close,
    numpy_of,
)

import linattn as la

CASES = [case for case in MAIN_CASES if case.d == 5 and (case.masked or case.moved or case.lead[0] == (2, 3))]
CASES = [
    case for case in CASES if not case.packed or case.attend == la.Softmax()
]  # a call of a shape takes JAX seconds
CASES += [Case(attend, causal=causal, n=70, m=70) for attend in MAIN for causal in (False, True)]  # beyond one chunk


def converted(xp, *arrays):
    return tuple(xp.asarray(np.array(x)) for x in arrays)


def options_of(xp, options):
    """The options of a call with their arrays from the library."""
    given = dict(options)
    if "key_mask" in given:
        (given["key_mask"],) = converted(xp, given["key_mask"])
    if "positions" in given:
        pair = given["positions"]
        given["positions"] = converted(xp, *pair) if isinstance(pair, tuple) else converted(xp, pair)[0]
    return given


def kind(x):
    return type(x).__module__.partition(".")[0].removesuffix("lib")


def traced(xp, function):
    """As JAX runs it, for an operation by itself takes it longer; on other libraries the function itself."""
    return import_module("jax").jit(function) if "jax" in xp.__name__ else function


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_results(xp, case, rng):
    args, options = case.draw(rng)
    d_out = case.cotangent(rng)
    want, want_backward = case.attend.vjp(*args, **options, backend="reference")
    given = options_of(xp, options)

    def both_directions(q, k, v, d_out):
        out, backward = case.attend.vjp(q, k, v, **given, backend="reference")
        return out, *backward(d_out)

    there = converted(xp, *args, d_out)
    out, *grads = traced(xp, both_directions)(*there)
    assert_close(out, want)
    assert_gradients_close(grads, want_backward(d_out))
    for x in (out, *grads):
        assert kind(x) == kind(there[0])
        assert x.dtype == there[0].dtype
        assert x.device == there[0].device


@pytest.mark.parametrize("attend", MAIN, ids=repr)
def test_streams(xp, attend, rng):
    (q, k, v), _ = Case(attend, n=4, m=4).draw(rng)
    want = attend(q, k, v, causal=True)
    q, k, v = converted(xp, q, k, v)
    state, parts = attend.init_state(k, v), []
    for a, b in ((0, 2), (2, 2), (2, 4)):
        out, state = attend.step(q[:, a:b, ...], k[:, a:b, ...], v[:, a:b, ...], state)
        parts.append(numpy_of(out))
    assert_close(np.concatenate(parts, axis=1), want)
    assert kind(state.arrays[0]) == kind(q)
    merged = attend.merge(state, attend.init_state(k, v, position=4))
    assert merged.position == 4
    assert_close(merged.arrays[0], numpy_of(state.arrays[0]))


@pytest.mark.parametrize("attend", MAIN, ids=repr)
def test_float32_stays_float32(xp, attend, rng):
    args, _ = Case(attend).draw(rng, "float32")
    there = converted(xp, *args)

    def both_directions(q, k, v):
        out, backward = attend.vjp(q, k, v, causal=True, backend="reference")
        return out, *backward(out)

    results = traced(xp, both_directions)(*there)
    assert all(x.dtype == there[0].dtype == xp.float32 for x in results)
    assert_close(results[0], attend(*(x.astype("float64") for x in args), causal=True), TOLERANCE["float32"])


@pytest.mark.strict
@pytest.mark.parametrize("attend", MAIN, ids=repr)
def test_results_stay_on_the_device(attend, rng):
    """array-api-strict has a second device: whatever is made anew must go there too."""
    import array_api_strict as xp

    device = xp.Device("device1")
    (q, k, values), options = Case(attend, masked=True, causal=True, n=72, m=72).draw(rng)
    q, k, v, mask = (xp.asarray(x, device=device) for x in (q, k, values, options["key_mask"]))
    out, backward = attend.vjp(q, k, v, causal=True, key_mask=mask)
    state = attend.init_state(k, v)
    step, state = attend.step(q, k, v, state, key_mask=mask)
    weights = attend.weights(q, k, key_mask=mask)
    arrays = [x for x in state.arrays if x is not None]
    assert all(x.device == device for x in (out, *backward(out), step, *arrays, weights))
    merged = attend.merge(state, attend.init_state(k, v, position=72))
    _, _, backward = attend.step_vjp(q[:, :1, ...], k[:, :1, ...], v[:, :1, ...], merged)
    *grads, d_state = backward(out[:, :1, ...])
    arrays = [x for x in (*merged.arrays, *d_state.arrays) if x is not None]
    assert all(x.device == device for x in (*arrays, *grads))
    packed = attend(q, k, v, cu_seqlens=[0, 0, 30, 72], causal=True)
    assert packed.device == device
    with pytest.raises(ValueError, match="one device"):
        attend(q, k, xp.asarray(values, device=xp.Device("CPU_DEVICE")))


# -- torch ------------------------------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # array-api-compat's own
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("attend", MAIN, ids=repr)
def test_torch_compiles_without_a_break(attend, causal, rng):
    torch = pytest.importorskip("torch")
    args = [torch.tensor(x) for x in Case(attend).draw(rng)[0]]
    want = attend(*args, causal=causal)  # Performer draws its matrix here: a compiler cannot
    torch.compiler.reset()
    compiled = torch.compile(lambda q, k, v: attend(q, k, v, causal=causal), fullgraph=True, backend="aot_eager")
    assert_close(compiled(*args), numpy_of(want))


@pytest.mark.torch
@pytest.mark.parametrize("attend", MAIN, ids=repr)
def test_torch_vmap(attend, rng):
    torch = pytest.importorskip("torch")
    args = [torch.tensor(x) for x in Case(attend, lead=((3,),) * 3).draw(rng)[0]]
    mapped = torch.func.vmap(lambda q, k, v: attend(q, k, v, causal=True))(*args)
    assert_close(mapped, numpy_of(attend(*args, causal=True)))


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("attend", MAIN, ids=repr)
def test_torch_sixteen_bits(attend, dtype, rng):
    torch = pytest.importorskip("torch")
    args = [torch.tensor(x).to(getattr(torch, dtype)) for x in Case(attend).draw(rng)[0]]
    out, backward = attend.vjp(*args, causal=True)
    want = attend(*(x.double() for x in args), causal=True)
    assert out.dtype == args[0].dtype
    rounding = torch.linalg.norm(want.to(out.dtype).double() - want)
    assert torch.linalg.norm(out.double() - want) <= 1.1 * rounding
    assert all(x.dtype == out.dtype and bool(torch.all(torch.isfinite(x))) for x in backward(out))


# -- JAX --------------------------------------------------------------------------------------------------------


@pytest.mark.jax
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("attend", MAIN, ids=repr)
def test_jax_traces(attend, causal, rng):
    """jit with the value as a static argument; vmap; forward and backward in one traced function."""
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", True)
    given, _ = Case(attend, lead=((3,),) * 3).draw(rng)
    want, backward = attend.vjp(*given, causal=causal)
    args = [jax.numpy.asarray(x) for x in given]
    compiled = jax.jit(lambda a, q, k, v: a(q, k, v, causal=causal), static_argnums=0)
    assert_close(compiled(attend, *args), want)
    mapped = jax.jit(jax.vmap(lambda q, k, v: attend(q, k, v, causal=causal)))
    assert_close(mapped(*args), want)

    @jax.jit
    def both_directions(q, k, v, d_out):
        out, back = attend.vjp(q, k, v, causal=causal)
        return out, back(d_out)

    out, grads = both_directions(*args, jax.numpy.asarray(want))
    assert_close(out, want)
    assert_gradients_close(grads, backward(want))


@pytest.mark.jax
def test_jax_without_64_bits(rng):
    """Without x64 a running total is float32: still right, and nothing warns."""
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", False)
    try:
        args, _ = Case(la.CosFormer(512), n=200, m=200).draw(rng, "float32")
        out = jax.jit(lambda q, k, v: la.CosFormer(512)(q, k, v, causal=True))(*map(jax.numpy.asarray, args))
        assert out.dtype == "float32"
        wide = (x.astype("float64") for x in args)
        assert_close(out, la.CosFormer(512)(*wide, causal=True), TOLERANCE["float32"])
    finally:
        jax.config.update("jax_enable_x64", True)


# -- values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, code",
    [
        (la.Linear(), "Linear()"),
        (la.Linear("relu", eps=("clamp", 1e-6)), "Linear('relu', eps=('clamp', 1e-06))"),
        (la.CosFormer(4096), "CosFormer(4096)"),
        (la.CosFormer(align="stretch", normalize=False), "CosFormer(normalize=False, align='stretch')"),
        (la.Softmax(scale=0.5), "Softmax(scale=0.5)"),
    ],
    ids=repr,
)
def test_a_value_prints_as_the_code_that_makes_it(value, code):
    assert repr(value) == code
    made = eval(code, vars(la))
    assert made == value
    assert hash(made) == hash(value)
    assert pickle.loads(pickle.dumps(value)) == value
    assert value != la.CosFormer(4097)
    with pytest.raises(AttributeError):
        value.eps = 1.0
