"""`linattn.interop.jax`: the reference room under JAX's transformations, and the compiled kernels by callback."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import ml_dtypes
import numpy as np
import pytest
from cases import CASES, MAIN, SQUARE, VALUES, Case, assert_bits, assert_close, assert_gradients_close
from conftest import load_array_library

import linattn as la

HAVE = find_spec("jax") is not None
jax = import_module("jax") if HAVE else None
jnp = load_array_library("jax") if HAVE else None
interop = import_module("linattn.interop.jax") if HAVE else None
pytestmark = pytest.mark.jax

OWN_MAP = la.Linear(SQUARE)
CALLS = [
    case
    for case in CASES
    if case.attend in (*MAIN, OWN_MAP, *VALUES[4:13:4]) and (case.masked or case.moved or case.lead != Case.lead)
]
SOME = [*MAIN, la.CosFormer(), la.Linear(normalize=False), OWN_MAP, la.Linear("exp"), la.LLN()]


def causal_of(attend):
    return attend not in (la.CosFormer(), la.LLN())


def options_of(options):
    return {name: jnp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}


def draw(rng, *shape, n=3):
    return [jnp.asarray(rng.normal(size=shape)) for _ in range(n)]


@pytest.mark.parametrize("case", CALLS, ids=str)
def test_kernels_give_the_plain_verbs_bits(case, rng):
    """A map of the user's is differentiated by JAX, so to rounding."""
    args, options = case.draw(rng)
    given = options_of(options)
    if isinstance(given.get("positions"), tuple):
        given["positions"] = tuple(map(jnp.asarray, given["positions"]))
    d_out = case.cotangent(rng)
    run = lambda *a: interop.attention(*a, case.attend, backend="numba", **given)  # noqa: E731
    out, vjp = jax.vjp(run, *map(jnp.asarray, args))
    got = vjp(jnp.asarray(d_out))
    want, backward = case.attend.vjp(*args, **options)
    if isinstance(getattr(case.attend, "feature_map", ""), la.FeatureMap) or "positions" in options:
        assert_close(out, want)
        assert_gradients_close(got, backward(d_out))
    else:
        for mine, theirs in zip((out, *got), (want, *backward(d_out)), strict=True):
            assert_bits(mine, theirs)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("attend", MAIN, ids=repr)
def test_narrow_dtypes(attend, dtype, rng):
    args, _ = Case(attend, causal=True).draw(rng, dtype)
    out = interop.attention(*map(jnp.asarray, args), attend, causal=True, backend="numba")
    assert str(out.dtype) == dtype
    narrow = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    assert_bits(np.asarray(out), attend(*args, causal=True).astype(narrow))


@pytest.mark.parametrize("backend", ["reference", "numba"])
@pytest.mark.parametrize("attend", SOME, ids=repr)
def test_jit_grad_vmap(attend, backend, rng):
    """Together, against the plain verbs, example by example; shared keys are not repeated by the user."""
    causal = causal_of(attend)
    q, d_out = draw(rng, 3, 2, 7, 4, n=2)
    k, v = draw(rng, 7, 4, n=2)

    def loss(q, k, v, d_out):
        out = interop.attention(q, k, v, attend, causal=causal, backend=backend)
        return jnp.sum(out * d_out), out

    gradient = jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1, 2), has_aux=True), in_axes=(0, None, None, 0)))
    grads, outs = gradient(q, k, v, d_out)
    for i in range(3):
        out, backward = attend.vjp(*map(np.asarray, (q[i], k, v)), causal=causal)
        assert_close(outs[i], out)
        assert_gradients_close([g[i] for g in grads], backward(np.asarray(d_out[i])))


@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_mask_and_edges_under_jit(backend, rng):
    q, k, v = draw(rng, 2, 6, 4)
    mask = jnp.asarray(rng.random((2, 6)) > 0.4)
    for attend in (la.CosFormer(64), la.LLN(alpha=0.8, beta=0.6)) if backend == "reference" else MAIN:
        run = jax.jit(
            lambda q, k, v, mask, attend=attend: interop.attention(
                q, k, v, attend, causal=True, key_mask=mask, cu_seqlens=(0, 2, 6), backend=backend
            )
        )
        want = attend(*map(np.asarray, (q, k, v)), causal=True, key_mask=np.asarray(mask), cu_seqlens=[0, 2, 6])
        assert_close(run(q, k, v, mask), want)
        if backend == "numba":
            assert_close(jax.vmap(run)(*(x[:, None] for x in (q, k, v, mask)))[:, 0], want)


@pytest.mark.parametrize("attend", MAIN[:2], ids=repr)
def test_scan_carries_a_state(attend, rng):
    """A token at a time in one compiled loop, and the gradient through all of it."""
    q, k, v = draw(rng, 2, 9, 4)

    def streamed(q, k, v):
        def token(state, rows):
            out, state = attend.step(*(x[:, None, :] for x in rows), state)
            return state, out[:, 0, :]

        rows = tuple(x.swapaxes(0, 1) for x in (q, k, v))
        state, outs = jax.lax.scan(token, attend.init_state(k[:, :0, :], v[:, :0, :]), rows)
        return outs.swapaxes(0, 1), state

    out, state = jax.jit(streamed)(q, k, v)
    want, backward = attend.vjp(*map(np.asarray, (q, k, v)), causal=True)
    assert_close(out, want)
    assert (int(state.start), int(state.position), state.attend) == (0, 9, attend)
    d_out = rng.normal(size=want.shape)
    got = jax.grad(lambda *a: jnp.sum(streamed(*a)[0] * d_out), argnums=(0, 1, 2))(q, k, v)
    assert_gradients_close(got, backward(d_out))


def test_a_state_goes_through_jit_and_on(rng):
    attend = la.CosFormer(8)
    q, k, v = draw(rng, 2, 9, 4)
    step = jax.jit(attend.step)
    out, state = step(q[:, :5], k[:, :5], v[:, :5], attend.init_state(k, v))
    second, state = attend.step(q[:, 5:], k[:, 5:], v[:, 5:], state)
    assert_close(jnp.concat([out, second], axis=1), attend(*map(np.asarray, (q, k, v)), causal=True))
    with pytest.raises(ValueError, match="position 9 .* is outside|outside 0 .. length"):  # noqa: RUF043
        attend.step(q[:, :1], k[:, :1], v[:, :1], state)
    later = jax.jit(lambda k, v: attend.init_state(k, v, position=5))(k[:, :0], v[:, :0])
    with pytest.raises(ValueError, match="must have been begun"):
        attend.merge(state, later)


def test_second_derivatives_are_the_references(rng):
    q, k, v = draw(rng, 5, 3)
    loss = lambda q, backend: jnp.sum(interop.attention(q, k, v, la.Linear(), backend=backend) ** 2)  # noqa: E731
    moved, h = rng.normal(size=q.shape), 1e-5
    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    _, second = jax.jvp(lambda q: gradient(q, "reference"), (q,), (moved,))
    difference = (gradient(q + h * moved, "reference") - gradient(q - h * moved, "reference")) / (2 * h)
    assert_close(second, difference, 1e-8)
    with pytest.raises((TypeError, ValueError)):
        jax.hessian(loss)(q, "numba")


def test_refusals(rng):
    q, k, v = draw(rng, 2, 5, 4)
    run, attend = interop.attention, la.Linear()
    for error, match, call in (
        (TypeError, "`q` must be a jax.Array, got ndarray", lambda: run(np.asarray(q), k, v, attend)),
        (TypeError, "`mechanism` must be a value", lambda: run(q, k, v, "softmax")),
        (TypeError, "int", lambda: run(*(x.astype(int) for x in (q, k, v)), attend, backend="numba")),
        (ValueError, "no way to JAX arrays", lambda: run(q, k, v, attend, backend="cupy")),
        (ValueError, "as many queries as keys", lambda: run(q[:, :3], k, v, attend, causal=True, backend="numba")),
        (ValueError, "must rise from 0", lambda: run(q, k, v, attend, cu_seqlens=[0, 4])),
        (ValueError, "cannot be causal", lambda: run(q, k, v, la.CosFormer(), causal=True, backend="numba")),
        (ValueError, "outside 0 .. length", lambda: run(q, k, v, la.CosFormer(3), causal=True, backend="numba")),
        (TypeError, "`positions` is for CosFormer", lambda: run(q, k, v, attend, positions=[1], backend="numba")),
    ):
        with pytest.raises(error, match=match):
            call()


def test_traced_edges_are_refused_with_jaxs_own_error(rng):
    q, k, v = draw(rng, 2, 5, 4)
    run = jax.jit(lambda edges: interop.attention(q, k, v, la.Linear(), cu_seqlens=edges))
    with pytest.raises(jax.errors.ConcretizationTypeError, match="`cu_seqlens` decides shapes"):
        run(jnp.asarray([0, 5]))


def test_plain_verbs_name_the_library_under_jit(rng):
    """The compiled room takes NumPy arrays; a traced one is not moved behind the user's back."""
    q, k, v = draw(rng, 2, 5, 4)
    with pytest.raises(TypeError, match=r"`backend='numba'` takes numpy arrays, got jax"):
        jax.jit(lambda q: la.Linear()(q, k, v, backend="numba"))(q)
