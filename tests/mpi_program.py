"""A program for `mpiexec -n SIZE python mpi_program.py WHAT`: prints one line a rank, "ok" or what went wrong."""

from __future__ import annotations

import sys
from itertools import pairwise

import numpy as np
import pytest
from mpi4py import MPI

import linattn as la
from linattn import distributed


def shards(n_tokens, size):
    """Uneven on purpose: the last rank but one has none, if there are enough."""
    edges = [0, *sorted((n_tokens * (r + 1) ** 2) // size**2 for r in range(size - 1)), n_tokens]
    if size > 2:
        edges[-3] = edges[-2]
    return [slice(a, b) for a, b in pairwise(edges)]


def same_as_one_process(comm):
    rng = np.random.default_rng(0)
    q, k, v, d_out = rng.normal(size=(4, 2, 3, 101, 5))
    mask = rng.random((2, 1, 101)) > 0.3
    own = shards(101, comm.size)[comm.rank]
    worst = 0.0
    values = (la.Linear(), la.CosFormer(128), la.Linear("relu", normalize=False))
    for attend in (*values, la.Performer(12, seed=0), la.LLN(alpha=9.0, beta=7.0)):
        for causal in (False, True):
            want, undo = attend.vjp(q, k, v, causal=causal, key_mask=mask)
            args = (x[..., own, :] for x in (q, k, v))
            out, backward = distributed.vjp(*args, attend, comm, causal=causal, key_mask=mask[..., own])
            pairs = zip((out, *backward(d_out[..., own, :])), (want, *undo(d_out)), strict=True)
            worst = max(worst, *(np.linalg.norm(a - b[..., own, :]) / np.linalg.norm(b) for a, b in pairs))
    assert worst < 1e-13, worst


def scanned(comm):
    same_as_one_process(distributed.MPIComm(scan="exscan"))


def order(comm):
    """Matrices do not commute: an exclusive scan in the order of ranks, and one from the last."""
    comm = distributed.MPIComm(scan="exscan")
    matrices = np.random.default_rng(0).normal(size=(comm.size, 3, 3))

    def merge(earlier, later):
        a, b = (x.view(np.float64).reshape(3, 3) for x in (earlier, later))
        return (a @ b).reshape(-1).view(np.uint8)

    for reverse in (False, True):
        seen = matrices[comm.rank + 1 :] if reverse else matrices[: comm.rank]
        found = comm.exscan(matrices[comm.rank].reshape(-1).view(np.uint8), merge, reverse=reverse)
        if not len(seen):
            assert found is None
            continue
        want = np.linalg.multi_dot([np.eye(3), np.eye(3), *seen])
        assert np.allclose(found.view(np.float64).reshape(3, 3), want, rtol=1e-12, atol=1e-12)
    assert comm.bytes_sent == comm.bytes_received == 2 * 72


def device_buffers(comm):
    import torch

    comm = distributed.MPIComm(device_buffers=True)
    handed = []
    gather = comm.comm.Allgather
    comm.comm = Handing(comm.comm, lambda x, rows: (handed.append(type(x)), gather(x, rows))[1])
    q, k, v, d_out = np.random.default_rng(0).normal(size=(4, 2, 21, 5))
    own = shards(21, comm.size)[comm.rank]
    for attend in (la.CosFormer(32), la.LLN(alpha=2.0, beta=1.0)):
        want, undo = attend.vjp(q, k, v, causal=True)
        args = [torch.from_numpy(x[:, own].copy()) for x in (q, k, v)]
        out, backward = distributed.vjp(*args, attend, comm, causal=True)
        pairs = zip((out, *backward(torch.from_numpy(d_out[:, own].copy()))), (want, *undo(d_out)), strict=True)
        assert max(np.linalg.norm(a.numpy() - b[:, own]) / np.linalg.norm(b) for a, b in pairs) < 1e-13
    assert handed.count(torch.Tensor) == 2 * (2 + 3)  # the arrays of a state, forward and backward


class Handing:
    """A communicator whose gathering is watched."""

    def __init__(self, comm, gather):
        self.comm, self.Allgather = comm, gather

    def __getattr__(self, name):
        return getattr(self.comm, name)


def disagree(comm):
    q = np.zeros((2 + (comm.rank == comm.size - 1), 5, 4))
    with pytest.raises(ValueError, match="Shards must agree"):
        distributed.attention(q, q, q, la.Linear(), comm, causal=True)


def fail(comm):
    """One rank raises between two collectives; without the guard the others would wait for ever."""
    with comm.guard():
        if comm.rank == comm.size - 1:
            raise MemoryError("rank out of memory on purpose")
        q = np.zeros((2, 5, 4))
        distributed.attention(q, q, q, la.Linear(), comm)


def wrong_kind(comm):
    with pytest.raises(TypeError, match="must be an intracommunicator of mpi4py, got Group"):
        distributed.MPIComm(MPI.COMM_WORLD.Get_group())
    with pytest.raises(ValueError, match="`scan` must be one of gather, exscan, got 'tree'"):
        distributed.MPIComm(scan="tree")


if __name__ == "__main__":
    world = distributed.MPIComm()
    programs = (same_as_one_process, scanned, order, device_buffers, disagree, fail, wrong_kind)
    {f.__name__: f for f in programs}[sys.argv[1]](world)
    sys.stdout.write(f"rank {world.rank} of {world.size}: ok\n")
