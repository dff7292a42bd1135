"""The recipe of docs/frameworks/distributed.rst: `python gloo_program.py RANK SIZE FILE`, states gathered by gloo."""

from __future__ import annotations

import sys

import numpy as np
import torch
import torch.distributed as dist

import linattn as la
from linattn import distributed


class Gloo(distributed.Communicator):
    def __init__(self):
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def _allgather(self, x):
        rows = [torch.empty(x.shape, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(rows, torch.from_numpy(x.copy()))
        return torch.stack(rows).numpy()


if __name__ == "__main__":
    rank, size, file = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=size)
    q, k, v, d_out = np.random.default_rng(0).normal(size=(4, 2, 41, 5))
    own = slice(41 * rank // size, 41 * (rank + 1) // size)
    attend = la.CosFormer(64)
    out, backward = distributed.vjp(*(x[:, own] for x in (q, k, v)), attend, Gloo(), causal=True)
    want, undo = attend.vjp(q, k, v, causal=True)
    for got, whole in zip((out, *backward(d_out[:, own])), (want, *undo(d_out)), strict=True):
        assert np.max(abs(got - whole[:, own])) < 1e-13 * np.max(abs(whole))
    dist.destroy_process_group()
    sys.stdout.write("ok")
