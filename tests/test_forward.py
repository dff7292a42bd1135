"""Every result against the paper's formula, on every backend: values, options, shapes, dtypes, sizes."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace

import numpy as np
import pytest
from cases import (
    BOTH_SIDES,
    CASES,
    CAST_ONCE,
    FLOAT64,
    MAIN,
    MAIN_CASES,
    SIXTEEN_BITS,
    SIZES,
    SQUARE,
    TOLERANCE,
    VALUES,
    Case,
    assert_bits,
    assert_close,
    assert_within,
    backends_of,
    error_bound,
    has_blocks,
    is_cosformer,
    is_distribution,
    is_elementary,
    on_backends,
    reads_the_call,
    rounded,
)

import linattn as la
from linattn.audit.measure import relative_error
from linattn.audit.quadratic import FORMULAS

BOUNDED = [case for case in CASES if is_distribution(case.attend) and is_elementary(case.attend)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case, backend", on_backends(CASES))
def test_out_is_the_formulas(case, backend, dtype, rng):
    args, options = case.draw(rng, dtype)
    out = case.attend(*args, **options, backend=backend)
    assert out.dtype == dtype
    assert out.shape == case.out_shape
    assert_close(out, case.formula(*args, **options), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case, backend", on_backends(BOUNDED))
def test_every_entry_is_within_the_bound(case, backend, dtype, rng):
    """|got - want| <= (2 gamma_D + 4 e_phi) A|v|: holds for each entry, whatever the norm of the rest."""
    args, options = case.draw(rng, dtype)
    q, k, v = args
    out = case.attend(*args, **options, backend=backend)
    absolute = case.formula(q, k, abs(v), **options)
    units = error_bound(case.attend, case.m, case.d)
    assert_within(out, case.formula(*args, **options), absolute, units, dtype)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("case, backend", on_backends([case for case in CASES if case.out_shape[-1] > 1]))
def test_sixteen_bits_are_rounded_once(case, backend, dtype, rng):
    """The error is that of rounding the best answer for the same inputs: nothing before it was in 16 bits."""
    args, options = case.draw(rng, dtype)
    out = case.attend(*args, **options, backend=backend)
    assert out.dtype == args[0].dtype
    want = case.formula(*args, **options)
    best = relative_error(rounded(want, dtype), want)
    assert 0 < relative_error(out, want) <= CAST_ONCE * best


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("attend", MAIN, ids=repr)
def test_sizes_around_the_chunks(attend, n, causal, rng):
    case = Case(attend, causal=causal, n=n, m=n, d=6, e=5)
    args, options = case.draw(rng)
    want = case.formula(*args, **options)
    for backend in backends_of(attend):
        assert_close(attend(*args, **options, backend=backend), want)


@pytest.mark.parametrize("n, m", [(1, 197), (197, 1), (3, 0), (0, 3)])
@pytest.mark.parametrize("attend", [attend for attend in MAIN if not has_blocks(attend)], ids=repr)
def test_few_queries_or_few_keys(attend, n, m, rng):
    case = Case(attend, n=n, m=m)
    args, options = case.draw(rng)
    for backend in backends_of(attend):
        out = attend(*args, **options, backend=backend)
        assert_close(out, case.formula(*args, **options))


EMPTY = {
    "batch": {"lead": ((0,), (0,), (0,))},
    "batch of keys": {"lead": ((0,), (1,), ())},
    "batch of queries": {"lead": ((1,), (0,), ())},
    "channels": {"d": 0},
    "values": {"e": 0},
    "everything": {"n": 0, "m": 0, "d": 0, "e": 0},
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", EMPTY.values(), ids=list(EMPTY))
@pytest.mark.parametrize("attend", [attend for attend in VALUES if not reads_the_call(attend)], ids=repr)
def test_empty_axes(attend, shape, causal, rng):
    """An empty result of the right shape and empty gradients; without channels the formula: no key weighs anything."""
    case = Case(attend, causal=causal, **shape)
    if not case.offered:
        case = replace(case, causal=False)
    args, options = case.draw(rng)
    for backend in backends_of(attend):
        out, backward = attend.vjp(*args, **options, backend=backend)
        assert_close(out, case.formula(*args, **options))
        grads = backward(case.cotangent(rng))
        assert [g.shape for g in grads] == [x.shape for x in args]
        assert all(np.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_are_the_formulas(case, rng):
    """And they make the result: weights @ v == out."""
    (q, k, v), options = case.draw(rng)
    q, k, v = (np.broadcast_to(x, (*case.out_shape[:-2], *x.shape[-2:])) for x in (q, k, v))
    weights = case.attend.weights(q, k, **options)
    assert_close(weights, case.formula.weights(q, k, **options))
    for backend in backends_of(case.attend):
        assert_close(case.attend(q, k, v, **options, backend=backend), weights @ v)


@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_weights_take_their_own_leading_shape(case, rng):
    (q, k, _), options = case.draw(rng, "float32")
    weights = case.attend.weights(q, k, **options)
    assert weights.dtype == "float32"
    assert_close(weights, case.formula.weights(q, k, **options), TOLERANCE["float32"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_vjp_gives_the_bits_of_the_call(case, rng):
    args, options = case.draw(rng)
    for backend in backends_of(case.attend):
        assert_bits(
            case.attend.vjp(*args, **options, backend=backend)[0], case.attend(*args, **options, backend=backend)
        )


FUNCTIONS = {
    la.Linear: la.linear_attention,
    la.CosFormer: la.cosformer,
    la.Softmax: la.softmax_attention,
    la.Performer: la.performer,
    la.LLN: la.lln,
    la.LLNDiag: la.lln_diag,
    la.Combiner: la.combiner,
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_functions_are_values_called(case, rng):
    args, options = case.draw(rng)
    function = FUNCTIONS[type(case.attend)]
    parameters = {field.name: getattr(case.attend, field.name) for field in fields(case.attend)}
    assert_bits(function(*args, **parameters, **options), case.attend(*args, **options))


@pytest.mark.parametrize("kind", FUNCTIONS, ids=lambda kind: kind.__name__)
def test_functions_say_what_the_value_and_its_call_say(kind):
    """The value's parameters, then the call's options, keyword-only, with the same defaults."""
    said = inspect.signature(FUNCTIONS[kind]).parameters
    value = inspect.signature(kind).parameters
    call = {name: p for name, p in inspect.signature(kind.__call__).parameters.items() if name != "self"}
    assert list(said) == [*list(call)[:3], *value, *list(call)[3:]]
    assert all(said[name].default == p.default for name, p in (call | dict(value)).items())
    assert all(said[name].kind is said[name].KEYWORD_ONLY for name in list(said)[3:])
    order = ["causal", "key_mask", "cu_seqlens", *(["positions"] if is_cosformer(kind()) else []), "backend", "out"]
    assert list(call)[3:] == order


def test_defaults_are_the_papers():
    assert la.Linear() == la.Linear("elu1", normalize=True, eps="safe")
    assert la.CosFormer(7) == la.CosFormer(7, feature_map="relu", normalize=True, eps="safe", align="start")
    assert la.Softmax() == la.Softmax(scale=None)
    plain = {"projection": None, "scale": None, "calibration": None, "eps": None}
    assert la.Performer() == la.Performer(256, seed=0, features="positive", kind="orthogonal", norms="chi", **plain)
    matched = {"alpha": None, "beta": None, "calibration": "paper", "scope": "tensor", "statistics": "detached"}
    assert la.LLN() == la.LLN(**matched)
    assert la.LLNDiag() == la.LLNDiag(**matched, block=None, ratio=0.5)
    plain = {"span": None, "width": None, "row_key": "self", "mix": "average", "scale": None}
    assert la.Combiner() == la.Combiner("fixed", pool="max", size_bias=False, **plain)
    assert set(FORMULAS) == {kind.__name__ for kind in FUNCTIONS}


@pytest.mark.parametrize("attend", VALUES, ids=repr)
def test_a_value_prints_as_the_code_that_makes_it(attend):
    names = {"BOTH_SIDES": BOTH_SIDES, "SQUARE": SQUARE}
    text = repr(attend).replace("FeatureMap('both_sides')", "BOTH_SIDES").replace("FeatureMap('square')", "SQUARE")
    again = eval(text, {**vars(la), **names})  # a value's own repr
    assert again == attend
    assert hash(again) == hash(attend)


def test_a_map_of_the_users_own_is_never_taken_for_ours(rng):
    """By what it does, not by its name."""
    disguised = la.Linear(replace(SQUARE, name="elu1"))
    case = Case(disguised, causal=True)
    args, options = case.draw(rng)
    for backend in backends_of(disguised):
        out, backward = disguised.vjp(*args, **options, backend=backend)
        assert_close(out, case.formula(*args, **options))
        d_out = case.cotangent(rng)
        plain = la.Linear(SQUARE).vjp(*args, **options, backend=backend)[1](d_out)
        for got, want in zip(backward(d_out), plain, strict=True):
            assert_bits(got, want)


@pytest.mark.parametrize("attend, backend", [(a, b) for a in MAIN for b in backends_of(a)], ids=str)
def test_left_out_backend_is_one_of_them(attend, backend, rng):
    """What runs without `backend` gives the numbers of those that run with it."""
    args, options = Case(attend, causal=True).draw(rng)
    assert_close(attend(*args, **options, backend=backend), attend(*args, **options), FLOAT64)
