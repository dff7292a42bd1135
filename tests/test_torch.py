"""`linattn.interop.torch`: the operators give the plain verbs' bits, and every torch machine takes them."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import numpy as np
import pytest
from cases import (
    CASES,
    DTYPES,
    MAIN,
    SIXTEEN_BITS,
    SQUARE,
    VALUES,
    Case,
    assert_bits,
    assert_close,
    assert_gradients_close,
)

import linattn as la

torch = import_module("torch") if find_spec("torch") else None
interop = import_module("linattn.interop.torch") if torch else None
pytestmark = pytest.mark.torch

OWN_MAP = la.Linear(SQUARE)
CALLS = [
    case
    for case in CASES
    if case.attend in (*MAIN, OWN_MAP, *VALUES[4:13:4]) and (case.masked or case.moved or case.lead != Case.lead)
]
OF_MOMENTS = la.LLN(statistics="differentiated")
OPERATORS = [
    la.Linear(), la.CosFormer(64), la.Softmax(), la.CosFormer(), la.Linear(normalize=False), OWN_MAP, la.Linear("exp"),
    la.Performer(12, seed=0), la.LLN(alpha=0.8, beta=0.6), OF_MOMENTS, la.LLNDiag(alpha=0.8, beta=0.6, block=4),
]  # fmt: skip
ADVICE = 'backend="reference"'


def to_torch(x):
    """The same memory as a tensor."""
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def to_numpy(x):
    return import_module("linattn.interop._torch_ops").view(x)


def options_of(options):
    return {name: to_torch(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}


def leaves(*arrays):
    return [to_torch(x).requires_grad_() for x in arrays]


def tensors(rng, *shape, dtype="float64", n=3, grad=True):
    return [torch.from_numpy(rng.normal(size=shape)).to(getattr(torch, dtype)).requires_grad_(grad) for _ in range(n)]


def causal_of(attend):
    return attend not in (la.CosFormer(), OF_MOMENTS)


# ------------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("case", CALLS, ids=str)
def test_results_and_gradients_are_the_plain_verbs(case, rng):
    """To the bit; a map of the user's is differentiated by torch, so to rounding."""
    args, options = case.draw(rng)
    if isinstance(options.get("positions"), tuple):
        options["positions"] = tuple(np.asarray(p) for p in options["positions"])
    given = options_of(options)
    if isinstance(options.get("positions"), tuple):
        given["positions"] = tuple(map(to_torch, options["positions"]))
    q, k, v = leaves(*args)
    out = interop.attention(q, k, v, case.attend, **given)
    d_out = case.cotangent(rng)
    got = torch.autograd.grad(out, (q, k, v), to_torch(d_out))
    want, backward = case.attend.vjp(*args, **options)
    if isinstance(getattr(case.attend, "feature_map", ""), la.FeatureMap):
        assert_close(out, want)
        assert_gradients_close(got, backward(d_out))
    else:
        assert_bits(out, want)
        for mine, theirs in zip(got, backward(d_out), strict=True):
            assert_bits(mine, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("attend", [*MAIN, OWN_MAP], ids=repr)
def test_every_dtype(attend, dtype, rng):
    """Sixteen bits are accumulated in float32, also through a map of the user's."""
    case = Case(attend, causal=True, masked=True)
    args, options = case.draw(rng, dtype)
    q, k, v = leaves(*args)
    out = interop.attention(q, k, v, attend, **options_of(options))
    d_out = case.cotangent(rng, dtype)
    got = torch.autograd.grad(out, (q, k, v), to_torch(d_out))
    want, backward = attend.vjp(*args, **options)
    assert {x.dtype for x in (out, *got)} == {getattr(torch, dtype)}
    if attend != OWN_MAP:
        for mine, theirs in zip((out, *got), (want, *backward(d_out)), strict=True):
            assert_bits(to_numpy(mine), theirs)
        return
    tolerance = {"float64": 1e-13, "float32": 5e-7, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
    for mine, theirs in zip((out, *got), (want, *backward(d_out)), strict=True):
        assert_close(to_numpy(mine).astype("float64"), np.asarray(theirs, "float64"), tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_share_memory(dtype):
    """No copy on the way in, whatever the strides, nor on the way out."""
    ops = import_module("linattn.interop._torch_ops")
    x = torch.zeros(3, 5, 4, dtype=getattr(torch, dtype)).transpose(0, 1)[1:]
    seen = ops.view(x)
    assert seen.__array_interface__["data"][0] == x.data_ptr()
    assert (seen.shape, seen.dtype) == (tuple(x.shape), np.dtype(DTYPES[dtype]))
    again = ops.tensor(np.ascontiguousarray(seen))
    assert again.dtype is x.dtype
    fresh = np.zeros(3, DTYPES[dtype])
    assert ops.tensor(fresh).data_ptr() == fresh.__array_interface__["data"][0]


def test_grouped_heads_are_enable_gqa(rng):
    q, k, v = (to_torch(rng.normal(size=(2, heads, 9, 8))) for heads in (6, 2, 2))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    grouped = q.reshape(2, 2, 3, 9, 8)
    got = interop.attention(grouped, k[:, :, None], v[:, :, None], la.Softmax(), causal=True)
    assert_close(got.reshape(2, 6, 9, 8), want)


def test_key_mask_means_what_sdpas_does(rng):
    q, k, v = tensors(rng, 2, 3, 7, 4, grad=False)
    mask = torch.from_numpy(rng.random((2, 1, 7)) > 0.3)
    mask[..., 0] = True
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[..., None, :])
    assert_close(interop.attention(q, k, v, la.Softmax(), key_mask=mask), want)


@pytest.mark.parametrize("attend", [attend for attend in OPERATORS if attend != OF_MOMENTS], ids=repr)
def test_empty(attend):
    for n in (0, 1):
        q, k, v = (torch.zeros(2, n, 4, requires_grad=True) for _ in range(3))
        out = interop.attention(q, k, v, attend, causal=causal_of(attend), cu_seqlens=[0, n])
        out.sum().backward()
        assert out.shape == q.grad.shape == (2, n, 4)


# ---------------------------------------------------------------------------------------- torch's machines


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("attend", OPERATORS, ids=repr)
def test_opcheck(attend, dtype, rng, monkeypatch):
    """Schema, fake, autograd registration and tracing, on the very calls that `attention` and `step` make."""
    calls = []
    inner = import_module("linattn.interop._torch_call")
    monkeypatch.setattr(inner, "_undisturbed", lambda *_: None)
    monkeypatch.setattr(inner, "_run", lambda operator, *args: calls.append((operator, args)) or operator(*args))
    args = tensors(rng, 2, 6, 4, dtype=dtype)
    mask = torch.from_numpy(rng.random((2, 6)) > 0.4)
    interop.attention(*args, attend, causal=causal_of(attend), key_mask=mask if causal_of(attend) else None)
    interop.attention(*args, attend, cu_seqlens=torch.tensor([0, 2, 6]))
    if causal_of(attend):
        state = attend.init_state(*args[1:])
        _, state = interop.step(*args, attend, state)
        interop.step(*args, attend, state)
    assert len(calls) >= 2
    for operator, given in calls:
        given = tuple(x.detach().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x for x in given)
        torch.library.opcheck(operator, given)


@pytest.mark.parametrize("attend", OPERATORS, ids=repr)
def test_the_short_way_is_the_operators(attend, rng, monkeypatch):
    """Where nothing listens the dispatcher is passed by: the same bits, and the same where it is not."""
    inner = import_module("linattn.interop._torch_call")
    args, d_out = tensors(rng, 2, 9, 4), torch.from_numpy(rng.normal(size=(2, 9, 4)))
    mask = torch.from_numpy(rng.random((2, 9)) > 0.3) if causal_of(attend) else None
    ran = []
    short = inner._undisturbed
    monkeypatch.setattr(inner, "_undisturbed", lambda *given: ran.append(short(*given)) or ran[-1])

    def results():
        out = interop.attention(*args, attend, causal=causal_of(attend), key_mask=mask)
        grads = torch.autograd.grad(out, args, d_out, retain_graph=True)
        once_more = torch.autograd.grad(out, args, d_out, retain_graph=True)
        batched = torch.autograd.grad(out, args, torch.stack([d_out, 2 * d_out]), is_grads_batched=True)
        with torch.no_grad():
            again = interop.attention(*args, attend, causal=causal_of(attend), key_mask=mask)
        return [out, *grads, *once_more, *batched, again]

    got = results()
    assert (ran == [None, None]) == (attend == OWN_MAP)
    monkeypatch.setattr(inner, "_undisturbed", lambda *_: None)
    for x, y in zip(got, results(), strict=True):
        assert_bits(x.detach(), y.detach())


def test_the_short_way_is_left_where_somebody_listens(rng):
    """A checkpoint frees what was kept, a profiler sees the operator, a change in place is found out."""
    attend = la.Linear()
    args = tensors(rng, 2, 6, 4)
    want = torch.autograd.grad(interop.attention(*args, attend).sum(), args)
    again = torch.utils.checkpoint.checkpoint(lambda *a: interop.attention(*a, attend), *args, use_reentrant=False)
    for x, y in zip(torch.autograd.grad(again.sum(), args), want, strict=True):
        assert_bits(x, y)
    with torch.profiler.profile() as seen:
        interop.attention(*args, attend)
    assert "linattn::linear" in {event.name for event in seen.events()}
    moved = [x * 1.0 for x in args]
    out = interop.attention(*moved, attend)
    moved[0] += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("attend", OPERATORS, ids=repr)
def test_gradcheck(attend, rng):
    args = tensors(rng, 2, 5, 3)
    assert torch.autograd.gradcheck(lambda *a: interop.attention(*a, attend, causal=causal_of(attend)), args)
    assert torch.autograd.gradcheck(lambda *a: interop.attention(*a, attend, cu_seqlens=[0, 2, 5]), args)


def check_compiled(attend, backend, rng, causal):
    def value_and_gradients(q, k, v, d_out):
        out = interop.attention(q, k, v, attend, causal=causal)
        return out, torch.autograd.grad(out, (q, k, v), d_out)

    def traced(q, k, v):
        return 2 * interop.attention(q, k, v, attend, causal=causal)

    torch.compiler.reset()
    compiled = torch.compile(traced, fullgraph=True, backend=backend, dynamic=True)
    for n in (5, 7, 12):  # lengths change
        args = tensors(rng, 2, n, 4)
        d_out = torch.from_numpy(rng.normal(size=(2, n, 4)))
        out, grads = value_and_gradients(*args, d_out)
        got = compiled(*args)
        assert_bits(got, 2 * out)
        for mine, theirs in zip(torch.autograd.grad(got, args, d_out / 2), grads, strict=True):
            assert_bits(mine, theirs)


@pytest.mark.parametrize("attend", [attend for attend in OPERATORS if attend != OWN_MAP], ids=repr)
def test_compile_fullgraph_gives_the_eager_bits(attend, rng):
    check_compiled(attend, "aot_eager", rng, causal_of(attend))


def test_compile_with_a_map_of_the_users(rng):
    torch.compiler.reset()
    q, k, v = tensors(rng, 2, 6, 4)
    compiled = torch.compile(lambda *a: interop.attention(*a, OWN_MAP), fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(q, k, v).sum(), (q, k, v))
    assert_gradients_close(got, torch.autograd.grad(interop.attention(q, k, v, OWN_MAP).sum(), (q, k, v)))


def test_a_compiled_function_takes_edges_and_positions(rng):
    torch.compiler.reset()
    attend, (q, k, v) = la.CosFormer(64), tensors(rng, 2, 6, 4)
    positions = torch.tensor([0.0, 1, 5, 9, 10, 64], dtype=torch.float64)
    compiled = torch.compile(lambda *a, **o: interop.attention(*a, attend, **o), fullgraph=True, backend="aot_eager")
    for options in ({"cu_seqlens": torch.tensor([0, 2, 6])}, {"positions": positions, "causal": True}):
        assert_bits(compiled(q, k, v, **options), interop.attention(q, k, v, attend, **options))
    with pytest.raises(ValueError, match=r"position 65 .* is outside"):
        compiled(q, k, v, positions=positions + 1, causal=True)
    with pytest.raises(ValueError, match="`cu_seqlens` must rise"):
        compiled(q, k, v, cu_seqlens=torch.tensor([0, 5]))


@pytest.mark.parametrize("attend", MAIN, ids=repr)
def test_export_keeps_the_operator(attend, rng):
    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            return interop.attention(q, k, v, attend, causal=True)

    args = tuple(tensors(rng, 2, 6, 4, grad=False))
    tokens = torch.export.Dim("tokens", min=2, max=500)
    program = torch.export.export(Layer(), args, dynamic_shapes=({1: tokens},) * 3)
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert any(name.startswith("linattn.") and "turns" not in name for name in names), names
    longer = tuple(tensors(rng, 2, 33, 4, grad=False))
    assert_bits(program.module()(*longer), Layer()(*longer))


@pytest.mark.parametrize("attend", OPERATORS, ids=repr)
def test_vmap(attend, rng):
    """Over any of the arguments, along any axis; also over the backward, a gradient a sample."""
    causal = causal_of(attend)
    q, k, v = tensors(rng, 3, 2, 6, 4)
    mask = torch.from_numpy(rng.random((3, 6)) > 0.4)
    run = lambda q, k, v: interop.attention(q, k, v, attend, causal=causal)  # noqa: E731
    for dims in ((0, 0, 0), (0, None, None), (None, 0, 0), (None, None, 0), (1, 0, None)):
        given = [x if d == 0 else x.transpose(0, 1) if d == 1 else x[0] for x, d in zip((q, k, v), dims, strict=True)]
        got = torch.vmap(run, dims)(*given)
        each = [[x[0] if d is None else x[i] for x, d in zip((q, k, v), dims, strict=True)] for i in range(3)]
        assert_bits(got, torch.stack([run(*own) for own in each]))
    if causal:
        masked = torch.vmap(lambda q, m: interop.attention(q, k[0], v[0], attend, causal=True, key_mask=m))(q, mask)
        assert_bits(masked, interop.attention(q, k[0], v[0], attend, causal=True, key_mask=mask[:, None]))
    out = run(q[0], k[0], v[0])
    d_out = torch.from_numpy(rng.normal(size=(5, *out.shape)))
    got = torch.autograd.grad(out, (q, k, v), d_out, is_grads_batched=True, retain_graph=True)
    for i in range(5):
        want = torch.autograd.grad(out, (q, k, v), d_out[i], retain_graph=True)
        assert_gradients_close([x[i] for x in got], want, 1e-14)


def test_vmap_of_a_shared_key_sums_over_heads_not_over_the_batch(rng):
    q, d_out = tensors(rng, 3, 2, 6, 4, n=2, grad=False)
    k, v = tensors(rng, 6, 4, n=2)

    def gradient(q, d_out):
        out = interop.attention(q, k, v, la.Linear(), causal=True)
        return (
            torch.ops.linattn.linear_backward(
                d_out,
                None,
                q,
                k,
                v,
                torch.ones(2, 6, dtype=q.dtype),
                *[None] * 6,
                "elu1",
                True,
                True,
                "safe",
                0.0,
            )[1]
            + 0 * out.sum()
        )

    got = torch.vmap(gradient)(q, d_out)
    for i in range(3):
        assert_close(got[i], gradient(q[i], d_out[i]).detach().numpy())


def test_vmap_through_a_stream(rng):
    attend = la.CosFormer(64)
    q, k, v = tensors(rng, 3, 6, 4, grad=False)

    def two_steps(q, k, v):
        first, state = interop.step(q[:4], k[:4], v[:4], attend, attend.init_state(k[:0], v[:0]))
        second, _ = interop.step(q[4:], k[4:], v[4:], attend, state)
        return torch.cat([first, second])

    assert_close(torch.vmap(two_steps)(q, k, v), interop.attention(q, k, v, attend, causal=True))


@pytest.mark.parametrize("attend", MAIN, ids=repr)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_autocast_changes_nothing(attend, backend, rng):
    """It would make the reference's matrix products 16-bit."""
    args = tensors(rng, 2, 9, 8, dtype="float32")
    want = interop.attention(*args, attend, causal=True, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert_bits(interop.attention(*args, attend, causal=True, backend=backend), want)


@pytest.mark.parametrize("attend", [attend for attend in OPERATORS if attend != OF_MOMENTS], ids=repr)
def test_what_the_kernels_lack_the_reference_has(attend, rng):
    causal, (q, k, v) = causal_of(attend), tensors(rng, 2, 5, 3)

    def loss(q, backend=None):
        return (interop.attention(q, k, v, attend, causal=causal, backend=backend) ** 2).sum()

    with pytest.raises(RuntimeError, match=ADVICE):
        torch.func.grad(loss)(q.detach())
    d_q = torch.autograd.grad(loss(q), q, create_graph=True)[0]
    with pytest.raises(RuntimeError, match=ADVICE):
        torch.autograd.grad(d_q.sum(), q)
    assert_close(torch.func.grad(lambda q: loss(q, "reference"))(q.detach()), d_q.detach().numpy(), 1e-12)
    small = tensors(rng, 4, 2)
    small = [x.detach().abs().add(0.1).requires_grad_() for x in small]
    second = lambda *a: interop.attention(*a, attend, causal=causal, backend="reference")  # noqa: E731
    assert torch.autograd.gradgradcheck(second, small)


def test_other_engines_run_the_reference(rng):
    """A value that no operator knows is plain tensor code, or an error if the kernels were asked for by name."""

    class Other(la.Softmax):
        pass

    args = tensors(rng, 2, 5, 4)
    assert_close(interop.attention(*args, Other(), causal=True), la.Softmax()(*args, causal=True).detach().numpy())
    with pytest.raises(ValueError, match="numba has no operator for"):
        interop.attention(*args, Other(), backend="numba")


# ------------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize("attend", [a for a in OPERATORS if causal_of(a)], ids=repr)
@pytest.mark.parametrize("masked", [False, True])
def test_steps_are_one_pass_and_so_are_their_gradients(attend, masked, rng):
    args = tensors(rng, 2, 9, 4)
    mask = torch.from_numpy(rng.random((2, 9)) > 0.3) if masked else None
    d_out = torch.from_numpy(rng.normal(size=(2, 9, 4)))
    out = interop.attention(*args, attend, causal=True, key_mask=mask)
    want = torch.autograd.grad(out, args, d_out)
    state, parts = attend.init_state(*(x[:, :0].detach() for x in args[1:])), []
    for a, b in ((0, 4), (4, 5), (5, 5), (5, 9)):
        own = None if mask is None else mask[:, a:b]
        part, state = interop.step(*(x[:, a:b] for x in args), attend, state, key_mask=own)
        parts.append(part)
    streamed = torch.cat(parts, dim=-2)
    assert state.position == 9
    assert_close(streamed, out.detach().numpy())
    assert_gradients_close(torch.autograd.grad(streamed, args, d_out), want)


def test_states_of_the_plain_verbs_go_on_here(rng):
    attend, args = la.CosFormer(64), tensors(rng, 2, 6, 4, grad=False)
    first = [x[:, :4] for x in args]
    _, state = attend.step(*first, attend.init_state(*first[1:]))
    out, after = interop.step(*(x[:, 4:] for x in args), attend, state)
    assert_close(out, attend(*args, causal=True)[:, 4:])
    assert after.arrays.sums.data_ptr() != state.arrays.sums.data_ptr()


def test_an_empty_step_gives_a_state_of_its_own(rng):
    attend, args = la.Linear(), tensors(rng, 2, 4, 4, grad=False)
    _, state = interop.step(*args, attend, attend.init_state(*args[1:]))
    _, same = interop.step(*(x[:, :0] for x in args), attend, state)
    assert_bits(same.arrays.sums, state.arrays.sums)
    assert same.arrays.sums.data_ptr() != state.arrays.sums.data_ptr()


# ------------------------------------------------------------------------------------------------ refusals


def test_refusals(rng):
    q, k, v = tensors(rng, 2, 5, 4)
    attend = la.Linear()
    run = interop.attention
    for error, match, call in (
        (TypeError, "`q` must be a torch Tensor, got ndarray", lambda: run(q.detach().numpy(), k, v, attend)),
        (TypeError, "`mechanism` must be a value", lambda: run(q, k, v, la.Linear)),
        (TypeError, "dtype int64", lambda: run(*(x.detach().long() for x in (q, k, v)), attend)),
        (TypeError, "dtype complex128", lambda: run(*(x.detach().to(torch.complex128) for x in (q, k, v)), attend)),
        (TypeError, "one dtype", lambda: run(q, k.float(), v, attend)),
        (RuntimeError, "must be on one device, got q on cpu, k on meta", lambda: run(q, k.to("meta"), v, attend)),
        (ValueError, "same last axis", lambda: run(q[..., :3], k, v, attend)),
        (ValueError, "same number of tokens", lambda: run(q, k, v[:, :3], attend)),
        (ValueError, "must broadcast", lambda: run(q, k[:1].expand(3, -1, -1), v, attend)),
        (ValueError, "as many queries as keys", lambda: run(q[:, :3], k, v, attend, causal=True)),
        (ValueError, "`key_mask` must have shape", lambda: run(q, k, v, attend, key_mask=torch.ones(3).bool())),
        (TypeError, "`key_mask` must be an array of bool", lambda: run(q, k, v, attend, key_mask=torch.ones(5))),
        (ValueError, "must rise from 0 to N", lambda: run(q, k, v, attend, cu_seqlens=[0, 4])),
        (ValueError, "must rise from 0 to N", lambda: run(q, k, v, attend, cu_seqlens=torch.tensor([0, 4]))),
        (TypeError, "`cu_seqlens` must hold integers", lambda: run(q, k, v, attend, cu_seqlens=torch.ones(2))),
        (ValueError, "needs N == M", lambda: run(q[:, :3], k, v, attend, cu_seqlens=torch.tensor([0, 5]))),
        (TypeError, "`positions` is for CosFormer", lambda: run(q, k, v, attend, positions=torch.arange(5))),
        (ValueError, "`backend` must be one of", lambda: run(q, k, v, attend, backend="fast")),
        (ValueError, "no operator for tensors on cpu", lambda: run(q, k, v, attend, backend="cupy")),
        (ValueError, "cannot be causal", lambda: run(q, k, v, la.CosFormer(), causal=True)),
        (ValueError, "outside 0 .. length", lambda: run(q, k, v, la.CosFormer(3), causal=True)),
        (
            TypeError,
            "dense tensor",
            lambda: run(torch.sparse_coo_tensor(size=(2, 5, 4), dtype=q.dtype, check_invariants=False), k, v, attend),
        ),
        (TypeError, "must be a state", lambda: interop.step(q, k, v, attend, None)),
        (ValueError, "cannot be used with", lambda: interop.step(q, k, v, attend, la.Softmax().init_state(k, v))),
    ):
        with pytest.raises(error, match=match):
            call()


def test_edges_cannot_be_mapped(rng):
    q, k, v = tensors(rng, 2, 5, 4, grad=False)
    edges = torch.tensor([[0, 2, 5], [0, 3, 5]])
    with pytest.raises(RuntimeError, match="cannot be mapped by vmap"):
        torch.vmap(lambda q, e: interop.attention(q, k[0], v[0], la.Linear(), cu_seqlens=e))(q, edges)


def test_no_gradient_of_integers():
    """torch's own sentence and type."""
    with pytest.raises(RuntimeError, match="floating point"):
        torch.zeros(2, 3, 4, dtype=torch.int64, requires_grad=True)


def test_sixteen_bit_names():
    assert {getattr(torch, name) for name in SIXTEEN_BITS} == {torch.float16, torch.bfloat16}
