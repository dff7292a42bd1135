"""The hand-derived backward: against the formula's derivative, our own forward moved, autodiff, and identities."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from cases import (
    BACKENDS,
    BOTH_SIDES,
    CASES,
    CAST_ONCE,
    COMPLEX_STEP,
    LENGTH,
    MAIN,
    MAIN_CASES,
    SIXTEEN_BITS,
    SIZES,
    TINY,
    TOLERANCE,
    VALUES,
    Case,
    assert_bits,
    assert_close,
    assert_gradients_close,
    backends_of,
    can_be_causal,
    complex_step,
    holds_moments,
    is_combiner,
    is_distribution,
    is_elementary,
    numpy_of,
    on_backends,
    reads_the_call,
    rounded,
    state_formula,
    state_with,
    step_formula,
    streams_on_backends,
    values_on_backends,
)

import linattn as la
from linattn.audit.measure import relative_error

SHORT = [case for case in CASES if case.d * case.e < 100]


# -- against the formula ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SHORT, ids=str)
def test_vjp_is_the_formulas_derivative(case, rng):
    """Every entry of d_q, d_k and d_v, by complex step: nothing cancels."""
    args, options = case.draw(rng)
    d_out = case.cotangent(rng)
    whole = reads_the_call(case.attend)
    want = complex_step(lambda *moved: case.formula(*moved, **options), args, d_out, one_by_one=whole)
    for backend in backends_of(case.attend):
        _, backward = case.attend.vjp(*args, **options, backend=backend)
        assert_gradients_close(backward(d_out), want)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [n for n in SIZES if n])
@pytest.mark.parametrize("attend", [*MAIN, la.Linear("identity", normalize=False)], ids=repr)
def test_one_direction_for_sizes_around_the_chunks(attend, n, causal, rng):
    """<J u, d_out> = <u, J^T d_out>: one random direction has all of the Jacobian in it."""
    case = Case(attend, causal=causal, n=n, m=n, d=6, e=5)
    args, options = case.draw(rng)
    d_out, *u = (rng.normal(size=x) for x in (case.out_shape, *(x.shape for x in args)))
    moved = (x + 1j * TINY * step for x, step in zip(args, u, strict=True))
    terms = d_out * case.formula(*moved, **options).imag / TINY
    for backend in backends_of(attend):
        grads = attend.vjp(*args, **options, backend=backend)[1](d_out)
        got = sum(np.sum(d_x * step) for d_x, step in zip(grads, u, strict=True))
        size = sum(np.sum(abs(d_x * step)) for d_x, step in zip(grads, u, strict=True))
        assert abs(got - np.sum(terms)) <= COMPLEX_STEP * (size + np.sum(abs(terms)))


@pytest.mark.parametrize("case, backend", on_backends([case for case in SHORT if not holds_moments(case.attend)]))
def test_directional_derivative_of_our_own_forward(case, backend, rng):
    """Central differences, extrapolated once: the backward belongs to the forward that ran."""
    args, options = case.draw(rng)
    d_out, *u = (rng.normal(size=x) for x in (case.out_shape, *(x.shape for x in args)))
    grads = case.attend.vjp(*args, **options, backend=backend)[1](d_out)

    def loss(h):
        moved = (x + h * y for x, y in zip(args, u, strict=True))
        return np.sum(d_out * case.attend(*moved, **options, backend=backend))

    def change(h):
        return (loss(h) - loss(-h)) / (2 * h)

    h = 2.0**-16  # short enough to stay off the kinks; the error is about u / h and h^4
    want = (4 * change(h / 2) - change(h)) / 3
    size = sum(np.sum(abs(d_x * y)) for d_x, y in zip(grads, u, strict=True))
    got = sum(np.sum(d_x * y) for d_x, y in zip(grads, u, strict=True))
    assert abs(got - want) <= 1e-8 * size


@pytest.mark.parametrize("case", [replace(case, d=16) for case in SHORT if case.d > 1], ids=str)
def test_float32(case, rng):
    """Well scaled: with 16 channels no relu row is left with next to no weight."""
    args, options = case.draw(rng, "float32")
    d_out = case.cotangent(rng, "float32")
    wide = [x.astype("float64") for x in (*args, d_out)]
    whole = reads_the_call(case.attend)
    want = complex_step(lambda *moved: case.formula(*moved, **options), wide[:3], wide[3], one_by_one=whole)
    for backend in backends_of(case.attend):
        grads = case.attend.vjp(*args, **options, backend=backend)[1](d_out)
        assert [g.dtype for g in grads] == ["float32"] * 3
        assert_gradients_close(grads, want, TOLERANCE["float32"])


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("case, backend", on_backends([case for case in MAIN_CASES if 1 < case.e < 10]))
def test_sixteen_bits_are_rounded_once(case, backend, dtype, rng):
    """Each cotangent is as good as the best answer in its format, and in the format of its input."""
    args, options = case.draw(rng, dtype)
    d_out = case.cotangent(rng, dtype)
    wide = [x.astype("float64") for x in (*args, d_out)]
    grads = case.attend.vjp(*args, **options, backend=backend)[1](d_out)
    for got, want in zip(
        grads, complex_step(lambda *moved: case.formula(*moved, **options), wide[:3], wide[3]), strict=True
    ):
        assert got.dtype == args[0].dtype
        assert relative_error(got, want) <= CAST_ONCE * relative_error(rounded(want, dtype), want)


@pytest.mark.parametrize("case, backend", on_backends(MAIN_CASES))
def test_backward_can_be_called_again(case, backend, rng):
    """Nothing that it keeps is used up; it is linear in d_out."""
    args, options = case.draw(rng)
    d_out, other = case.cotangent(rng), case.cotangent(rng)
    _, backward = case.attend.vjp(*args, **options, backend=backend)
    first, second, third = backward(d_out), backward(other), backward(d_out)
    for a, b in zip(first, third, strict=True):
        assert_bits(a, b)
    both = backward(d_out - 2 * other)
    assert_gradients_close(both, [a - 2 * b for a, b in zip(first, second, strict=True)])


# -- states -----------------------------------------------------------------------------------------------------

STREAMED = [attend for attend in VALUES if can_be_causal(attend)]
CUTS = [(0, 4, 5, 11), (0, 0, 7, 11)]  # three parts: a state's cotangent must be handed on


STATE_LEADS = [((2,), (2,), (2,)), ((2, 3), (2, 1), (3,)), ((2, 3), (2, 1), ()), ((), (3, 1), (2,))]


@pytest.mark.parametrize("lead", STATE_LEADS, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("attend, backend", values_on_backends([a for a in STREAMED if is_elementary(a)]))
def test_cotangents_of_states_from_the_formula(attend, backend, masked, lead, rng):
    """One step between two states: d_q, d_k, d_v and the cotangent of the incoming state."""
    case = Case(attend, causal=True, masked=masked, lead=lead)
    (q, k, v), options = case.draw(rng)
    mask = options.get("key_mask")
    first = 3
    empty = attend.init_state(k, v, position=first)
    if masked:
        mask = np.broadcast_to(mask, (*np.broadcast_shapes(*lead[1:]), case.m))
    sums = abs(rng.normal(size=empty.arrays.sums.shape))
    d_out, d_sums = case.cotangent(rng), rng.normal(size=sums.shape)

    def loss(q, k, v, sums):
        out = step_formula(attend, q, k, v, sums, first, mask)
        after = sums + state_formula(attend, k, v, first, mask)
        over_state = tuple(range(after.ndim - d_sums.ndim, after.ndim))
        over_out = tuple(range(out.ndim - d_out.ndim, out.ndim))
        return np.sum(out * d_out, axis=over_out) + np.sum(after * d_sums, axis=over_state)

    q4 = q.reshape(*(1,) * (d_out.ndim - q.ndim), *q.shape)
    want = complex_step(lambda *a: loss(*a), [q4, k, v, sums], np.ones(()))
    out, after, backward = attend.step_vjp(q, k, v, state_with(empty, sums=sums), key_mask=mask, backend=backend)
    assert_close(out, step_formula(attend, q, k, v, sums, first, mask))
    d_q, d_k, d_v, d_state = backward(d_out, state_with(after, sums=d_sums))
    want[0] = want[0].reshape(q.shape)
    assert_gradients_close((d_q, d_k, d_v, d_state.arrays.sums), want)
    assert not np.any(d_state.arrays.rest)
    assert d_state.position == first


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("attend, backend", streams_on_backends(STREAMED))
def test_a_stream_cut_in_three_has_the_gradient_of_the_whole(attend, backend, cuts, masked, rng):
    case = Case(attend, causal=True, masked=masked)
    args, options = case.draw(rng)
    mask = options.get("key_mask")
    d_out = case.cotangent(rng)
    want = complex_step(lambda *moved: case.formula(*moved, **options), args, d_out)

    state, backwards = attend.init_state(*args[1:]), []
    for a, b in pairwise(cuts):
        part = [x[:, a:b] for x in args]
        seen = None if mask is None else mask[:, a:b]
        _, state, backward = attend.step_vjp(*part, state, key_mask=seen, backend=backend)
        backwards.append((a, b, backward))
    d_state, parts = None, []
    for a, b, backward in reversed(backwards):
        *grads, d_state = backward(d_out[:, a:b], d_state)
        parts.insert(0, grads)
    assert_gradients_close([np.concatenate(d_x, axis=1) for d_x in zip(*parts, strict=True)], want)


@pytest.mark.parametrize("backend", backends_of(la.Softmax()))
def test_cotangent_of_a_cache_adds_to_that_of_its_keys_and_values(backend, rng):
    case = Case(la.Softmax(), causal=True)
    (q, k, v), _ = case.draw(rng)
    d_out = case.cotangent(rng)
    _, state = case.attend.step(q[:, :4], k[:, :4], v[:, :4], case.attend.init_state(k, v), backend=backend)
    _, after, backward = case.attend.step_vjp(q[:, 4:], k[:, 4:], v[:, 4:], state, backend=backend)
    *plain, d_plain = backward(d_out[:, 4:])
    d_keys, d_values = rng.normal(size=k.shape), rng.normal(size=v.shape)
    *moved, d_moved = backward(d_out[:, 4:], state_with(after, k=d_keys, v=d_values))
    assert_bits(moved[0], plain[0])
    got = [a - b for a, b in zip((*moved[1:], *d_moved.arrays[:2]), (*plain[1:], *d_plain.arrays[:2]), strict=True)]
    assert_gradients_close(got, (d_keys[:, 4:], d_values[:, 4:], d_keys[:, :4], d_values[:, :4]))


# -- other people's autodiff through the reference room -------------------------------------------------------------

THROUGH = [case for case in CASES if case.d * case.e < 100 and case.lead != ((), (3, 1), (2,))]
FEW = [case for case in THROUGH if case.attend in MAIN and case.lead == Case.lead and not case.packed]


def converted(options, asarray):
    """Options in an array library: what is an array goes over."""
    return {name: asarray(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}


@pytest.mark.torch
@pytest.mark.parametrize("case", THROUGH, ids=str)
def test_torch_differentiates_the_reference_room(case, rng):
    import torch

    args, options = case.draw(rng)
    d_out = case.cotangent(rng)
    tensors = [torch.tensor(x, requires_grad=True) for x in args]
    out = case.attend(*tensors, **converted(options, torch.tensor))
    want = torch.autograd.grad(out, tensors, torch.tensor(d_out))
    for backend in backends_of(case.attend):
        got = case.attend.vjp(*args, **options, backend=backend)[1](d_out)
        assert_gradients_close(got, [g.numpy() for g in want])


@pytest.mark.torch
@pytest.mark.parametrize("attend", [la.Linear(), la.CosFormer(LENGTH), la.Softmax()], ids=repr)
def test_torch_gradcheck(attend):
    """Ours as a torch function: gradcheck moves every entry; its double differentiates our backward."""
    import torch

    args = [torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    args = [x.requires_grad_(True) for x in args]
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v, causal=True), args[:3])
    assert torch.autograd.gradgradcheck(lambda q, k, v: attend(q, k, v, causal=True), args[:3])
    # our backward, moved: its derivative is the transposed second derivative
    assert torch.autograd.gradcheck(lambda q, k, v, g: attend.vjp(q, k, v, causal=True)[1](g), args)


@pytest.mark.jax
@pytest.mark.parametrize("case", FEW, ids=str)
def test_jax_differentiates_the_reference_room(case, rng):
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    args, options = case.draw(rng)
    d_out = case.cotangent(rng)
    options_there = converted(options, jnp.asarray)

    @jax.jit
    def gradient(q, k, v, g):
        return jax.vjp(lambda *a: case.attend(*a, **options_there), q, k, v)[1](g)

    want = gradient(*map(jnp.asarray, (*args, d_out)))
    for backend in backends_of(case.attend):
        got = case.attend.vjp(*args, **options, backend=backend)[1](d_out)
        assert_gradients_close(got, [np.asarray(g) for g in want])


# -- identities -------------------------------------------------------------------------------------------------

DISTRIBUTIONS = [case for case in SHORT if is_distribution(case.attend)]


@pytest.mark.parametrize("case, backend", on_backends(DISTRIBUTIONS))
def test_sums_of_d_v(case, backend, rng):
    """Rows of weights sum to 1: sum_s d_v = sum of d_out over the live rows, those that give 1 for v = 1."""
    (q, k, v), options = case.draw(rng)
    d_out = case.cotangent(rng)
    live = case.attend(q, k, np.ones_like(v), **options, backend=backend)
    _, _, d_v = case.attend.vjp(q, k, v, **options, backend=backend)[1](d_out)
    axes = tuple(range(d_out.ndim - 1))
    assert_close(np.sum(d_v, axis=tuple(range(d_v.ndim - 1))), np.sum(live * d_out, axis=axes), COMPLEX_STEP)


ELEMENTARY = [case for case in DISTRIBUTIONS if is_elementary(case.attend)]
HOMOGENEOUS = [case for case in ELEMENTARY if case.attend.feature_map == "relu"]


@pytest.mark.parametrize("case, backend", on_backends(HOMOGENEOUS))
def test_a_scale_of_q_or_k_has_no_gradient(case, backend, rng):
    """It cancels: q[t] . d_q[t] = 0 in each row, and sum_s k[s] . d_k[s] = 0."""
    (q, k, v), options = case.draw(rng)
    d_q, d_k, _ = case.attend.vjp(q, k, v, **options, backend=backend)[1](case.cotangent(rng))
    size = np.sum(abs(k * d_k))  # of q, if D = 1, nothing is left
    assert np.all(abs(np.sum(q * d_q, axis=-1)) <= COMPLEX_STEP * size)
    assert abs(np.sum(k * d_k)) <= COMPLEX_STEP * size


FIRST_ROW_ALONE = [a for a in STREAMED if is_distribution(a) and not is_combiner(a)]  # regions pool queries


@pytest.mark.parametrize("attend, backend", values_on_backends(FIRST_ROW_ALONE))
def test_first_causal_row_has_no_gradient_of_q(attend, backend, rng):
    """It has one key to see: out = v[0] whatever q[0] is."""
    case = Case(attend, causal=True)
    args, _ = case.draw(rng)
    for dtype, tolerance in TOLERANCE.items():
        d_q, d_k, _ = attend.vjp(*(x.astype(dtype) for x in args), causal=True, backend=backend)[1](
            case.cotangent(rng, dtype)
        )
        assert np.all(abs(d_q[:, 0]) <= tolerance * np.max(abs(d_k)))


@pytest.mark.parametrize("case, backend", on_backends([case for case in DISTRIBUTIONS if case.n == case.m]))
def test_an_offset_of_v_changes_no_gradient(case, backend, rng):
    """d_q and d_k are those of v + c, and 0 where v is constant."""
    (q, k, v), options = case.draw(rng)
    d_out = case.cotangent(rng)
    plain = case.attend.vjp(q, k, v, **options, backend=backend)[1](d_out)
    moved = case.attend.vjp(q, k, v + 4.0, **options, backend=backend)[1](d_out)
    assert_gradients_close(moved, plain)
    flat = case.attend.vjp(q, k, np.full_like(v, 3.0), **options, backend=backend)[1](d_out)
    for d_x, like in zip(flat[:2], plain[:2], strict=True):
        assert np.max(abs(d_x)) <= COMPLEX_STEP * np.max(abs(like), initial=1.0)


@pytest.mark.parametrize("offset", [1e3, 1e4])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "attend, backend", values_on_backends([la.Linear(), la.Linear(BOTH_SIDES), la.CosFormer(LENGTH), la.Softmax()])
)
def test_values_far_from_zero(attend, backend, causal, offset, rng):
    """float32, v = 1000 + noise: d_q and d_k to 1e-6, each, where the uncentred sums err by 1e-3."""
    case = Case(attend, causal=causal, n=40, m=40, d=8, e=3, lead=((), (), ()))
    (q, k, v), options = case.draw(rng)
    q, k, v = (x.astype("float32") for x in (q, k, v + offset))
    d_out = case.cotangent(rng, "float32")
    wide = [x.astype("float64") for x in (q, k, v - np.float32(offset), d_out)]  # exact; no gradient sees an offset
    want = complex_step(lambda *moved: case.formula(*moved, **options), wide[:3], wide[3])
    got = attend.vjp(q, k, v, **options, backend=backend)[1](d_out)
    for d_x, right in zip(got, want, strict=True):
        assert_close(d_x, right, 1e-6)


@pytest.mark.parametrize("attend, backend", values_on_backends([la.Linear("relu"), la.CosFormer(LENGTH)]))
def test_rows_without_weight_pass_no_gradient(attend, backend, rng):
    """den == 0: out = 0, and no cotangent passes, also where d_out is large."""
    case = Case(attend, causal=True)
    (q, k, v), options = case.draw(rng)
    q[:, 3] = -abs(q[:, 3])  # relu(q) = 0
    k[:, 0] = -abs(k[:, 0])  # the first row sees nothing
    d_out = case.cotangent(rng)
    out, backward = attend.vjp(q, k, v, **options, backend=backend)
    assert not out[:, [0, 3]].any()
    grads = backward(d_out)
    assert not grads[0][:, [0, 3]].any()
    d_out[:, [0, 3]] = 1e200
    for got, want in zip(backward(d_out), grads, strict=True):
        assert_bits(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name, at_zero", [("relu", 0.0), ("elu1", 1.0)])
def test_subgradients_at_zero(name, at_zero, backend):
    """relu'(0) = 0, elu1'(0) = 1, at -0 too."""
    attend = la.Linear(name, normalize=False)
    q, k, v = np.array([[0.0], [-0.0]]), np.ones((2, 1)), np.ones((2, 1))
    d_q, _, _ = attend.vjp(q, k, v, backend=backend)[1](np.ones((2, 1)))
    phi_k = {"relu": 1.0, "elu1": 2.0}[name]
    assert d_q.tolist() == [[at_zero * 2 * phi_k]] * 2
    assert numpy_of(d_q).dtype == "float64"
