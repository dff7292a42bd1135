"""One token of decoding (8 heads, 64 channels, linear attention with relu features): ours, a jitted JAX step, torch."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

import linattn as la
from linattn.backends.numba import linear as room

from .contenders import missing
from .timing import medians

__all__ = ["measure_steps", "step_profile"]

HEADS, CHANNELS, TOKENS, TIMES = 8, 64, 64, 20


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


def microseconds(jobs: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Medians of many calls. No result is kept: a decoding loop lets go of the state before."""

    def repeated(job):
        for _ in range(TIMES):
            job()

    runs = {name: lambda job=job: repeated(job) for name, job in jobs.items()}
    return {name: t / TIMES * 1e6 for name, t in medians(runs, seconds, clock=time.perf_counter).items()}


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
            jobs[name] = job
    return microseconds(jobs, seconds)


def step_profile(seconds: float) -> dict[str, float]:
    """Microseconds of a step of ours in its kernel, in what the room does around it, and in the checks before."""
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, HEADS, 1, CHANNELS)).astype("float32")
    attend = la.Linear("relu")
    _, state = attend.step(q, k, v, attend.init_state(k, v))
    sums, rest = (np.empty_like(x) for x in state.arrays)
    out, den = np.empty_like(v), np.empty(v.shape[:-1], v.dtype)
    options = {"feature_map": "relu", "span": "past", "normalize": True, "eps": "safe"}
    kind = room.kind_of(q.dtype)
    known = [room.described(x) for x in (q, k, v)]
    plan = room.layout(kind.real.itemsize, *known, *[None] * 4, *options.values(), False)
    arrays = room.operands(q, k, v, tuple(state.arrays), None, None, kind)
    made = [x.reshape(-1) for x in (out, den, sums, rest)]
    kernel, work = room.kernel("forward", q.dtype), room.scratch(kind.real, plan.scratch)

    def inside():
        kernel(*arrays, *made, work, plan.heads.table, plan.dims, plan.eps, 0, HEADS, 0, plan.slices)

    def around():
        room.forward(q, k, v, tuple(state.arrays), **options, turns=None, key_mask=None, out=None, xp=np)

    inside()
    if not np.array_equal(out, attend.step(q, k, v, state)[0]):
        raise AssertionError("the kernel alone must give what a step gives, got other bits.")
    runs = {"kernel": inside, "room": around, "step": lambda: attend.step(q, k, v, state)}
    found = microseconds(runs, seconds)
    return {
        "compiled kernel": found["kernel"],
        "result arrays, layout, call of the kernel": found["room"] - found["kernel"],
        "checks, state, closure of the VJP": found["step"] - found["room"],
    }
