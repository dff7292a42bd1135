"""What one core can do: its multiply-adds, and how fast it copies. Measured in the run that is judged by them."""

from __future__ import annotations

import functools

import numpy as np
from numba import njit

from linattn.backends.numba._tiles import TILE
from linattn.backends.numba._vector import I64, operation, pointer

__all__ = ["copy_job", "peak_job"]

CHAINS = 24 if TILE.n_bytes == 64 or TILE.unit == "neon" else 12  # accumulators that stay in registers
TIMES = 4


@operation
def _multiply_add(v, sizes, memories):
    """count * TIMES multiply-adds in each of CHAINS independent vectors."""
    (count,), ((x, _),) = sizes, memories
    factor, term = x.spread(v, 0), x.spread(v, 1)

    def body(_, sums):
        for _ in range(TIMES):
            sums = [v.fma(s, factor, term) for s in sums]
        return sums

    sums = v.loop(I64(0), count, 1, [x.load(v, n * v.lanes) for n in range(CHAINS)], body)
    for n, s in enumerate(sums):
        x.store(v, s, n * v.lanes)


@functools.cache
def _compiled():
    @njit(nogil=True)
    def multiply_add(x, count):
        _multiply_add(count, pointer(x), 0, 0)

    return multiply_add


def peak_job(dtype="float32", count=50_000):
    """A job on one core, and the floating-point operations it does (a multiply-add is two)."""
    lanes = TILE.lanes(np.dtype(dtype).itemsize)
    x = np.full(CHAINS * lanes + 2, 0.5, dtype)
    run = _compiled()
    run(x, 1)
    return lambda: run(x, count), 2.0 * count * TIMES * CHAINS * lanes


def copy_job(n_bytes=2**26):
    """A job that copies, and the bytes it reads and writes."""
    here, there = np.ones(n_bytes, np.uint8), np.ones(n_bytes, np.uint8)
    return lambda: np.copyto(there, here), 2.0 * n_bytes
