"""The recipe of docs/frameworks/distributed.rst: a sequence over the devices of one JAX program, by `shard_map`."""

from __future__ import annotations

import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"  # before JAX starts

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

import linattn as la
import linattn.interop.jax

assert linattn.interop.jax  # makes states pytrees
jax.config.update("jax_enable_x64", True)
TOKENS = PartitionSpec(None, "tokens")


def own_tokens(attend, q, k, v):
    """A device's part: all devices' states are gathered, and those before this device's are merged in order."""
    empty = attend.init_state(k, v)
    _, own = attend.step(q, k, v, empty)
    states = jax.lax.all_gather(own.arrays, "tokens")
    before = empty
    for r in range(jax.device_count()):
        with_r = attend.merge(before, type(own)(attend, jax.tree.map(lambda x, r=r: x[r], states)))
        arrays = jax.tree.map(
            lambda a, b, r=r: jnp.where(r < jax.lax.axis_index("tokens"), b, a), before.arrays, with_r.arrays
        )
        before = type(own)(attend, arrays)
    return attend.step(q, k, v, before)[0]


if __name__ == "__main__":
    mesh = Mesh(np.array(jax.devices()), ("tokens",))
    q, k, v, d_out = np.random.default_rng(0).normal(size=(4, 2, 40, 5))
    for attend in (la.Linear(), la.LLN(alpha=3.0, beta=2.0)):
        run = jax.jit(
            jax.shard_map(
                lambda q, k, v, attend=attend: own_tokens(attend, q, k, v),
                mesh=mesh, in_specs=(TOKENS,) * 3, out_specs=TOKENS, check_vma=False,
            )
        )  # fmt: skip
        out, vjp = jax.vjp(run, *map(jnp.asarray, (q, k, v)))
        want, undo = attend.vjp(q, k, v, causal=True)
        for got, whole in zip((out, *vjp(jnp.asarray(d_out))), (want, *undo(d_out)), strict=True):
            assert np.max(abs(got - whole)) < 1e-13 * np.max(abs(whole)), attend
    sys.stdout.write("ok")
