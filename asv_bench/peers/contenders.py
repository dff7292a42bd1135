"""The contenders: what each computes, and the two jobs, forward alone and forward with backward, that are timed.

A contender makes its jobs from q, k, v, d_out of shape (heads, tokens, channels), NumPy float32. Its forward job
returns out as NumPy; its second job returns out's gradients for q, k, v. Peers keep their arrays in their own form
before the clock starts. All are causal; linear ones use the features relu, normalised.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import linattn as la

__all__ = ["Contender", "contenders", "missing"]

Jobs = tuple[Callable[[], Any], Callable[[], Any]]


class Contender(NamedTuple):
    """One way to compute a mechanism."""

    name: str
    computes: str  # "linear", "cosformer" or "softmax"
    make: Callable[..., Jobs]
    longest: int = 10**9  # tokens it is asked for


missing: list[str] = []


# -- ours -------------------------------------------------------------------------------------------------------


def ours(attend: Any, reuse: bool) -> Callable[..., Jobs]:
    """Through the public face: fresh results, or `out=` filled again and again."""

    def make(q, k, v, d_out):
        out = np.empty_like(v) if reuse else None
        grads = tuple(np.empty_like(x) for x in (q, k, v)) if reuse else None

        def forward():
            return attend(q, k, v, causal=True, out=out)

        def both():
            _, backward = attend.vjp(q, k, v, causal=True, out=out)
            return backward(d_out, out=grads)

        return forward, both

    return make


def attends(n_tokens: int) -> dict[str, Any]:
    """What a contender may compute, as ours."""
    return {"linear": la.Linear("relu"), "cosformer": la.CosFormer(n_tokens), "softmax": la.Softmax()}


def our_contenders(n_tokens: int) -> list[Contender]:
    return [
        Contender(name, computes, ours(attend, reuse))
        for computes, attend in attends(n_tokens).items()
        for name, reuse in (("linattn", False), ("linattn, out=", True))
    ]


def turned(xp, x, angles):
    """[x cos, x sin]: cosFormer's pair weight as plain features."""
    cos, sin = xp.cos(angles)[:, None], xp.sin(angles)[:, None]
    return xp.concatenate([x * cos, x * sin], -1)


def angles_of(n_tokens: int) -> np.ndarray:
    return (math.pi / 2 / n_tokens * np.arange(n_tokens)).astype("float32")


# -- torch ------------------------------------------------------------------------------------------------------


def torch_jobs(f) -> Callable[..., Jobs]:
    import torch

    def make(q, k, v, d_out):
        q, k, v, d_out = (torch.from_numpy(x)[None] for x in (q, k, v, d_out))
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]

        def forward():
            with torch.no_grad():
                return f(q, k, v)[0].numpy()

        def both():
            return [d_x[0].numpy() for d_x in torch.autograd.grad(f(*leaves), leaves, d_out)]

        return forward, both

    return make


def torch_contenders(n_tokens: int) -> list[Contender]:
    import torch

    def chunked(size, turn):
        """Chunks side by side: masked squares within, cumulated states between."""

        def f(q, k, v):
            q, k = torch.relu(q), torch.relu(k)
            if turn:
                angles = torch.from_numpy(angles_of(n_tokens))
                q, k = turned(torch, q, angles), turned(torch, k, angles)
            shape = (*q.shape[:2], -1, size)
            q, k, v = (x.reshape(*shape, x.shape[-1]) for x in (q, k, v))
            inner = torch.tril(q @ k.transpose(-1, -2))
            sums, total = k.transpose(-1, -2) @ v, k.sum(-2)
            sums, total = torch.cumsum(sums, 2) - sums, torch.cumsum(total, 2) - total
            den = inner.sum(-1, keepdim=True) + q @ total[..., None]
            return ((inner @ v + q @ sums) / den).flatten(2, 3)

        return torch_jobs(f)

    sdpa = torch.nn.functional.scaled_dot_product_attention
    return [
        *[Contender(f"torch, chunks of {n}", "linear", chunked(n, False)) for n in (64, 128)],
        *[Contender(f"torch, chunks of {n}", "cosformer", chunked(n, True)) for n in (64, 128)],
        Contender("torch SDPA", "softmax", torch_jobs(lambda q, k, v: sdpa(q, k, v, is_causal=True)), 8192),
    ]


def fast_transformers_contenders(n_tokens: int) -> list[Contender]:
    """The package's compiled kernel for the numerators, and its way to the denominators."""
    import torch
    from fast_transformers.causal_product import causal_dot_product

    def f(q, k, v):
        q, k = torch.relu(q), torch.relu(k)
        den = torch.einsum("bhnd,bhnd->bhn", q, k.cumsum(2))
        return causal_dot_product(q, k, v) / den[..., None]

    return [Contender("fast-transformers", "linear", torch_jobs(f))]


def performer_pytorch_contenders(n_tokens: int) -> list[Contender]:
    import torch
    from performer_pytorch.performer_pytorch import causal_linear_attention_noncuda

    def f(q, k, v):
        return causal_linear_attention_noncuda(torch.relu(q), torch.relu(k), v, eps=0)

    return [Contender("performer-pytorch", "linear", torch_jobs(f), 2048)]


# -- JAX --------------------------------------------------------------------------------------------------------


def jax_contenders(n_tokens: int) -> list[Contender]:
    import jax
    import jax.numpy as jnp

    def features(q, k, turn):
        q, k = jax.nn.relu(q), jax.nn.relu(k)
        if turn:
            angles = jnp.asarray(angles_of(n_tokens))
            q, k = turned(jnp, q, angles), turned(jnp, k, angles)
        return q, k

    def cut(size, *arrays):
        return [x.reshape(x.shape[0], -1, size, x.shape[-1]) for x in arrays]

    def scan(size, turn):
        def f(q, k, v):
            shape = v.shape
            q, k, v = cut(size, *features(q, k, turn), v)
            mask = jnp.tril(jnp.ones((size, size), q.dtype))

            def step(state, x):
                sums, total = state
                q, k, v = x
                inner = jnp.einsum("hid,hjd->hij", q, k) * mask
                den = inner.sum(-1) + jnp.einsum("hid,hd->hi", q, total)
                out = (inner @ v + q @ sums) / den[..., None]
                return (sums + jnp.einsum("hjd,hje->hde", k, v), total + k.sum(1)), out

            heads, rows, columns = q.shape[0], q.shape[-1], v.shape[-1]
            start = jnp.zeros((heads, rows, columns), q.dtype), jnp.zeros((heads, rows), q.dtype)
            out = jax.lax.scan(step, start, tuple(x.swapaxes(0, 1) for x in (q, k, v)))[1]
            return out.swapaxes(0, 1).reshape(shape)

        return f

    def chunks(size, turn):
        def f(q, k, v):
            shape = v.shape
            q, k, v = cut(size, *features(q, k, turn), v)
            inner = jnp.einsum("hcid,hcjd->hcij", q, k) * jnp.tril(jnp.ones((size, size), q.dtype))
            sums, total = jnp.einsum("hcjd,hcje->hcde", k, v), k.sum(2)
            sums, total = jnp.cumsum(sums, 1) - sums, jnp.cumsum(total, 1) - total
            den = inner.sum(-1) + jnp.einsum("hcid,hcd->hci", q, total)
            return ((inner @ v + q @ sums) / den[..., None]).reshape(shape)

        return f

    def jobs(f):
        forward, both = jax.jit(f), jax.jit(lambda q, k, v, d_out: jax.vjp(f, q, k, v)[1](d_out))

        def make(*arrays):
            arrays = [jax.device_put(x) for x in arrays]
            return (
                lambda: np.asarray(forward(*arrays[:3]).block_until_ready()),
                lambda: [np.asarray(x.block_until_ready()) for x in both(*arrays)],
            )

        return make

    return [
        Contender(f"JAX, {name} of {size}", computes, jobs(f(size, computes == "cosformer")))
        for computes in ("linear", "cosformer")
        for name, f, size in [("scan", scan, 64), ("scan", scan, 128), ("chunks", chunks, 128)]
    ]


def contenders(n_tokens: int, computes: str) -> list[Contender]:
    """Ours and those peers that are installed."""
    found = our_contenders(n_tokens)
    for package, make in [
        ("torch", torch_contenders),
        ("fast-transformers", fast_transformers_contenders),
        ("performer-pytorch", performer_pytorch_contenders),
        ("jax", jax_contenders),
    ]:
        try:
            found += make(n_tokens)
        except ImportError as error:
            line = f"{package} ({error})"
            if line not in missing:
                missing.append(line)
    return [c for c in found if c.computes == computes and n_tokens <= c.longest]
