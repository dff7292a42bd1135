"""What one core can do: its multiply-adds, how fast it copies, and what fresh pages and a compensated state cost it.

Measured in the run that is judged by them.
"""

from __future__ import annotations

import functools
import mmap

import numpy as np
from numba import njit

from linattn.backends.numba._products import advance
from linattn.backends.numba._tiles import CHUNK, TILE
from linattn.backends.numba._vector import I64, operation, pointer

__all__ = ["copy_job", "page_jobs", "peak_job", "state_jobs"]

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


@operation
def _advance_plainly(v, sizes, memories):
    """_advance_plainly(blocks, slices, rows, step, B, A, C, S, O): the recurrence of `advance` without compensation.

    s += a_t c_t, o_t = b_t . s token by token: a state of plain sums, which loses digits as it grows.
    """
    (n_blocks, slices, rows, step), ((bb, ldb), (aa, lda), (cc, ldc), (ss, lds), (oo, ldo)) = sizes, memories
    b, tokens, vectors = v.b, range(TILE.tokens), range(TILE.vectors)
    columns = TILE.vectors * v.lanes

    def block(n, i):
        first, column = b.mul(i, I64(TILE.tokens)), b.mul(n, I64(columns))
        here = ss.behind(b.mul(n, step))
        left = [bb.behind(b.mul(first, ldb), (t, ldb)) for t in tokens]
        right = [aa.behind(b.mul(first, lda), (t, lda)) for t in tokens]
        value = [[cc.load(v, b.mul(first, ldc), column, (t, ldc), k * v.lanes) for k in vectors] for t in tokens]

        def body(x, acc):
            state = [here.load(v, b.mul(x, lds), k * v.lanes) for k in vectors]
            for t in tokens:
                key, query = right[t].spread(v, x), left[t].spread(v, x)
                for k in vectors:
                    state[k] = v.fma(key, value[t][k], state[k])
                    acc[t * len(vectors) + k] = v.fma(query, state[k], acc[t * len(vectors) + k])
            for k in vectors:
                here.store(v, state[k], b.mul(x, lds), k * v.lanes)
            return acc

        acc = v.loop(I64(0), rows, 1, [v.zero] * (len(tokens) * len(vectors)), body)
        for t in tokens:
            for k in vectors:
                oo.store(v, acc[t * len(vectors) + k], b.mul(first, ldo), column, (t, ldo), k * v.lanes)

    v.loop(I64(0), slices, 1, [], lambda n, _: v.loop(I64(0), n_blocks, 1, [], lambda i, _: block(n, i)))


def state_jobs(n_features=64, n_values=64, count=400):
    """The sweep over one chunk of tokens, again and again, with the state as it is kept and with plain sums."""
    columns = TILE.columns(4)
    slices, far = -(-n_values // columns), 2 * columns
    step, width, blocks = n_features * far, slices * columns, CHUNK // TILE.tokens
    q, k = np.full((2, CHUNK * n_features), 1e-3, np.float32)
    v, out = np.full((2, CHUNK * width), 1e-3, np.float32)
    state, pairs = np.zeros(slices * step, np.float32), np.zeros(CHUNK * 32, np.float32)

    @njit(nogil=True)
    def compensated(q, k, v, state, pairs, out):
        Q, K, V, S, W, O = pointer(q), pointer(k), pointer(v), pointer(state), pointer(pairs), pointer(out)  # noqa: E741
        for _ in range(count):
            advance(CHUNK, slices, n_features, step, Q, 0, n_features, K, 0, n_features, V, 0, width,
                    S, 0, far, W, 0, 0, O, 0, width, V, 0, width)  # fmt: skip

    @njit(nogil=True)
    def plain(q, k, v, state, pairs, out):
        Q, K, V, S, O = pointer(q), pointer(k), pointer(v), pointer(state), pointer(out)  # noqa: E741
        for _ in range(count):
            _advance_plainly(blocks, slices, n_features, step, Q, 0, n_features, K, 0, n_features, V, 0, width,
                             S, 0, far, O, 0, width)  # fmt: skip

    jobs = {"compensated": compensated, "plain": plain}
    for run in jobs.values():
        run(q, k, v, state, pairs, out)
    return {name: lambda run=run: run(q, k, v, state, pairs, out) for name, run in jobs.items()}


def page_jobs(n_bytes=2**24):
    """Writing results into memory the process has just been given, and into memory it has written before."""
    known = np.zeros(n_bytes, np.uint8)

    def fresh():
        with mmap.mmap(-1, n_bytes) as pages:
            np.frombuffer(pages, np.uint8).fill(1)

    return {"fresh pages": fresh, "pages in use": lambda: known.fill(1)}, n_bytes


def copy_job(n_bytes=2**26):
    """A job that copies, and the bytes it reads and writes."""
    here, there = np.ones(n_bytes, np.uint8), np.ones(n_bytes, np.uint8)
    return lambda: np.copyto(there, here), 2.0 * n_bytes
