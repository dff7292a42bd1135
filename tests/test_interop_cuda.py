"""Arrays of a GPU go to CuPy and back: by a stand-in for CuPy where there is no GPU, on one where there is."""

from __future__ import annotations

from contextlib import contextmanager
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
from cases import assert_bits, assert_close, assert_gradients_close

import linattn as la

VALUES = [la.Linear(), la.CosFormer(64), la.LLN(alpha=0.8, beta=0.6), la.Softmax()]
STREAM = 4711


class StandIn:
    """CuPy as far as the way there and back goes: its arrays are NumPy's, and it tells what it was asked."""

    def __init__(self):
        self.entered, self.now, self.seen = [], [], []
        self.cuda = SimpleNamespace(Device=self.device, ExternalStream=self.stream)

    @contextmanager
    def inside(self, what):
        self.entered.append(what)
        self.now.append(what)
        yield
        self.now.pop()

    def device(self, number):
        return self.inside(("device", number))

    def stream(self, pointer, number):
        return self.inside(("stream", pointer, number))

    def from_dlpack(self, x):
        found = np.from_dlpack(x)
        self.seen.append((found.__array_interface__["data"][0], tuple(self.now)))
        return found


@pytest.fixture
def cupy(monkeypatch):
    """A stand-in, said to work."""
    stand_in, inner = StandIn(), import_module("linattn.interop._cuda")
    monkeypatch.setattr(inner, "_cupy", lambda: stand_in)
    monkeypatch.setattr(inner, "why_not", lambda: None)
    return stand_in


# ----------------------------------------------------------------------------------------------------- torch


@pytest.fixture
def torch_cuda(cupy, monkeypatch):
    """torch, its CPU for a GPU."""
    torch, inner = import_module("torch"), import_module("linattn.interop._torch_cuda")
    monkeypatch.setattr(inner, "is_cuda", lambda x: True)
    monkeypatch.setattr(import_module("linattn.interop._torch_call"), "_undisturbed", lambda *_: None)
    place = SimpleNamespace(index=3)
    monkeypatch.setattr(
        inner, "stream", lambda x: import_module("linattn.interop._cuda").in_stream(place.index, STREAM)
    )
    return torch


@pytest.mark.torch
@pytest.mark.parametrize("attend", VALUES, ids=repr)
def test_tensors_there_and_back(attend, torch_cuda, cupy, rng):
    attention = import_module("linattn.interop.torch").attention
    arrays, d_out = rng.normal(size=(3, 2, 9, 4)), rng.normal(size=(2, 9, 4))
    mask = rng.random((2, 9)) > 0.3
    args = [torch_cuda.from_numpy(x).requires_grad_() for x in arrays]
    out = attention(*args, attend, causal=True, key_mask=torch_cuda.from_numpy(mask))
    out.backward(torch_cuda.from_numpy(d_out))
    want, backward = attend.vjp(*arrays, causal=True, key_mask=mask)
    assert_bits(out.detach(), want)
    for x, y in zip(args, backward(d_out), strict=True):
        assert_bits(x.grad, y)
    where = (("device", 3), ("stream", STREAM, 3))
    assert cupy.entered == [*where, *where]  # forward, backward
    assert all(now == where for _, now in cupy.seen)  # every array was taken over in torch's stream
    pointers = [x.data_ptr() for x in args]
    assert [p for p, _ in cupy.seen[:3]] == pointers  # no copy


@pytest.mark.torch
def test_torchs_current_stream_is_handed_over(cupy, monkeypatch):
    torch, inner = import_module("torch"), import_module("linattn.interop._torch_cuda")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=STREAM + device.index))
    with inner.stream(SimpleNamespace(device=SimpleNamespace(index=1))):
        assert cupy.now == [("device", 1), ("stream", STREAM + 1, 1)]
    assert cupy.now == []


@pytest.mark.torch
def test_edges_and_refusals_of_tensors(torch_cuda, rng):
    attention = import_module("linattn.interop.torch").attention
    arrays = rng.normal(size=(3, 2, 9, 4))
    args = [torch_cuda.from_numpy(x).requires_grad_() for x in arrays]
    out = attention(*args, la.Linear(), cu_seqlens=torch_cuda.tensor([0, 4, 9]))
    assert_bits(out.detach(), la.Linear()(*arrays, cu_seqlens=[0, 4, 9]))
    with pytest.raises(RuntimeError, match="first derivatives in reverse mode alone"):
        torch_cuda.autograd.grad(out.sum(), args, create_graph=True)
    with pytest.raises(RuntimeError, match="q, k, v must be on one device, got q on cpu, k on meta, v on cpu"):
        attention(args[0], args[1].detach().to("meta"), args[2], la.Linear())


@pytest.mark.torch
def test_cupy_by_name_needs_cupy_and_a_gpu(monkeypatch, rng):
    torch, attention = import_module("torch"), import_module("linattn.interop.torch").attention
    q = torch.from_numpy(rng.normal(size=(2, 9, 4)))
    with pytest.raises(ValueError, match="cupy has no operator for tensors on cpu"):
        attention(q, q, q, la.Linear(), backend="cupy")
    monkeypatch.setattr(import_module("linattn.interop._torch_cuda"), "is_cuda", lambda x: True)
    monkeypatch.setattr(import_module("linattn.interop._cuda"), "why_not", lambda: "there is no NVIDIA driver")
    with pytest.raises(ImportError, match=r"cannot be loaded \(there is no NVIDIA driver\)"):
        attention(q, q, q, la.Linear(), backend="cupy")


# ------------------------------------------------------------------------------------------------------- JAX


@pytest.mark.jax
@pytest.mark.parametrize("attend", VALUES, ids=repr)
@pytest.mark.parametrize("edges", [None, (0, 4, 9)])
def test_jax_arrays_there_and_back(attend, edges, cupy, monkeypatch, rng):
    jax, inner = import_module("jax"), import_module("linattn.interop.jax")
    device = SimpleNamespace(platform="gpu", local_hardware_id=2)
    monkeypatch.setattr(inner, "_device_of", lambda x: device)
    arrays, d_out = rng.normal(size=(3, 2, 9, 4)).astype("float32"), rng.normal(size=(2, 9, 4)).astype("float32")
    args = [jax.numpy.asarray(x) for x in arrays]
    run = lambda *a: inner.attention(*a, attend, causal=True, cu_seqlens=edges, backend="cupy")  # noqa: E731
    out, undo = jax.vjp(run, *args)
    want, backward = attend.vjp(*arrays, causal=True, cu_seqlens=edges)
    assert_bits(np.asarray(out), want)
    for x, y in zip(undo(jax.numpy.asarray(d_out)), backward(d_out), strict=True):
        assert_bits(np.asarray(x), y)
    assert cupy.entered == [("device", 2)] * 2
    assert [p for p, _ in cupy.seen[:3]] == [x.unsafe_buffer_pointer() for x in args]  # no copy


@pytest.mark.jax
def test_refusals_of_jax_arrays(cupy, monkeypatch, rng):
    jax, inner = import_module("jax"), import_module("linattn.interop.jax")
    q = jax.numpy.asarray(rng.normal(size=(2, 9, 4)))
    run = lambda q: inner.attention(q, q, q, la.Linear(), backend="cupy")  # noqa: E731
    with pytest.raises(ValueError, match="cupy has no way to JAX arrays on cpu"):
        run(q)
    with pytest.raises(jax.errors.ConcretizationTypeError, match="runs at once, it cannot be traced"):
        jax.jit(run)(q)
    places = iter([SimpleNamespace(platform="gpu"), SimpleNamespace(platform="gpu"), SimpleNamespace(platform="cpu")])
    monkeypatch.setattr(inner, "_device_of", lambda x: next(places))
    with pytest.raises(ValueError, match="All arrays must be on one device"):
        run(q)


# -------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.torch
@pytest.mark.parametrize("attend", VALUES, ids=repr)
def test_tensors_on_this_card(attend, rng):
    """In a stream that is not the default one, straight after the work that makes the arguments."""
    torch, attention = import_module("torch"), import_module("linattn.interop.torch").attention
    arrays, d_out = rng.normal(size=(3, 2, 200, 64)), rng.normal(size=(2, 200, 64))
    want, backward = attend.vjp(*arrays, causal=True)
    with torch.cuda.stream(torch.cuda.Stream()):
        busy = torch.ones(4096, 4096, device="cuda")
        for _ in range(20):
            busy = busy @ busy / 4096
        args = [(torch.from_numpy(x).cuda() + 0 * busy[0, 0]).requires_grad_() for x in arrays]
        out = attention(*args, attend, causal=True, backend="cupy")
        grads = torch.autograd.grad(out, args, torch.from_numpy(d_out).cuda())
    torch.cuda.synchronize()
    assert_close(out.detach().cpu(), want)
    assert_gradients_close([x.cpu() for x in grads], backward(d_out), 1e-13)


@pytest.mark.gpu
@pytest.mark.jax
@pytest.mark.parametrize("attend", VALUES, ids=repr)
def test_jax_arrays_on_this_card(attend, rng):
    jax, attention = import_module("jax"), import_module("linattn.interop.jax").attention
    arrays, d_out = rng.normal(size=(3, 2, 200, 64)).astype("float32"), rng.normal(size=(2, 200, 64)).astype("float32")
    args = [jax.device_put(x, jax.devices("gpu")[0]) for x in arrays]
    out, undo = jax.vjp(lambda *a: attention(*a, attend, causal=True, backend="cupy"), *args)
    want, backward = attend.vjp(*arrays.astype("float64"), causal=True)
    assert_close(np.asarray(out), want, 1e-5)
    assert_gradients_close([np.asarray(x) for x in undo(jax.numpy.asarray(d_out))], backward(d_out), 1e-5)
