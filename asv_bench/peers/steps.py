"""One token of decoding (8 heads, 64 channels, linear attention with relu features): ours, a jitted JAX step, torch."""

from __future__ import annotations

import time

import numpy as np

import linattn as la

from .contenders import missing
from .timing import medians

__all__ = ["measure_steps"]

HEADS, CHANNELS, TOKENS = 8, 64, 64


def ours(q, k, v):
    attend = la.Linear("relu")
    one = [x[:, :1].copy() for x in (q, k, v)]
    state = attend.init_state(k, v)
    outs = []
    for t in range(q.shape[1]):
        out, state = attend.step(q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1], state)
        outs.append(out[:, 0])
    return np.stack(outs, 1), lambda: attend.step(*one, state)


def jax_step(q, k, v):
    import jax
    import jax.numpy as jnp

    @jax.jit
    def step(sums, total, q, k, v):
        q, k = jax.nn.relu(q), jax.nn.relu(k)
        sums, total = sums + k[:, :, None] * v[:, None, :], total + k
        return jnp.einsum("hd,hde->he", q, sums) / (q * total).sum(-1)[:, None], sums, total

    heads, n, d = q.shape
    sums, total = jnp.zeros((heads, d, v.shape[-1])), jnp.zeros((heads, d))
    outs = []
    for t in range(n):
        out, sums, total = step(sums, total, q[:, t], k[:, t], v[:, t])
        outs.append(np.asarray(out))
    one = [jnp.asarray(x[:, 0]) for x in (q, k, v)]
    return np.stack(outs, 1), lambda: step(sums, total, *one)[0].block_until_ready()


def torch_step(q, k, v):
    import torch

    @torch.no_grad()
    def step(sums, total, q, k, v):
        q, k = torch.relu(q), torch.relu(k)
        sums, total = sums + k[:, :, None] * v[:, None, :], total + k
        return torch.einsum("hd,hde->he", q, sums) / (q * total).sum(-1, keepdim=True), sums, total

    q, k, v = (torch.from_numpy(x) for x in (q, k, v))
    heads, n, d = q.shape
    sums, total = torch.zeros(heads, d, v.shape[-1]), torch.zeros(heads, d)
    outs = []
    for t in range(n):
        out, sums, total = step(sums, total, q[:, t], k[:, t], v[:, t])
        outs.append(out.numpy())
    one = [x[:, 0].contiguous() for x in (q, k, v)]
    return np.stack(outs, 1), lambda: step(sums, total, *one)


def measure_steps(seconds: float) -> dict[str, float]:
    """Microseconds a token of each that agrees with ours."""
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, HEADS, TOKENS, CHANNELS)).astype("float32")
    jobs, first = {}, None
    for name, make in [("linattn", ours), ("JAX, jitted", jax_step), ("torch, eager", torch_step)]:
        try:
            out, job = make(q, k, v)
        except ImportError as error:
            missing.append(f"{name} ({error})")
            continue
        first = out if first is None else first
        if float(np.max(np.abs(out - first))) <= 1e-3:
            jobs[name] = lambda job=job: [job() for _ in range(20)]
    return {name: t / 20 * 1e6 for name, t in medians(jobs, seconds, clock=time.perf_counter).items()}
