"""The backward of the linear engine in two halves, for a stream whose later part is elsewhere.

    to_queries    d_q, h (one number a token: the cotangent of its denominator), and what reaches the incoming state
                  from these queries:  X = sum_t phi_q[t] [g / c, h][t]^T
    to_keys       d_k and d_v from h and the cotangent of the outgoing state

Together they are `linear.backward` of a causal call, task by task, and cost one product more, for X. Whoever holds the
earlier tokens gets X after the first half and runs the second with all that comes back to its keys.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import types

from . import threads
from ._calls import DIMS, MASK, TABLE, WORTH_SHARING, delivered, reads, writes
from ._jit import compile_kernel
from ._layout import SAFE, described, flat, kind_of, loadable, scratch
from ._linear import D_K, D_Q, D_V
from ._products import product_add, settle
from ._prologues import divisors, fill_up, query_features
from ._rows import clear_rows, collect_weighted, copy_rows, divide_rows
from ._states import rows_of_state, store_cotangent, visible_mean
from ._tiles import CHUNK, SETTLE, TILE
from ._vector import behind, pointer
from .linear import kernel, layout, operands

NV, N_BYTES = TILE.vectors, TILE.n_bytes


def reach_kernel(salt):
    """The kernel with the salt of its cache key in its closure."""

    def linear_reach(
        d_out_array, q_array, v_array, mask, turn_q_array, den_array, h_array, reach_array,
        work_array, table, dims, eps, first, last,
    ):  # fmt: skip
        """Heads first <= i < last: X = sum_t phi_q[t] [G_t, h_t - G_t . mu]^T, G = d_out / c."""
        salt  # noqa: B018
        N, M, D, E, F, E1 = dims[0], dims[1], dims[2], dims[3], dims[4], dims[5]
        q_stride, v_stride, mask_stride, turn_q_stride, g_stride = dims[6], dims[8], dims[9], dims[10], dims[12]
        which, normalize, mode, masked = dims[13], dims[15] == 1, dims[16], dims[17] == 1
        eps = work_array.dtype.type(eps)
        zero = work_array.dtype.type(0)
        scaled = normalize and mode == SAFE
        cols = NV * (N_BYTES // work_array.itemsize)
        S_slices, X_slices = (F + cols - 1) // cols, (E + cols - 1) // cols
        Fp, Ep, X_rows = S_slices * cols, X_slices * cols, rows_of_state(F)
        X_step = X_rows * 2 * cols

        d_out, q, v, turn_q = pointer(d_out_array), pointer(q_array), pointer(v_array), pointer(turn_q_array)
        den, h, reach = pointer(den_array), pointer(h_array), pointer(reach_array)
        Q = pointer(work_array)
        G = behind(Q, CHUNK * Fp)
        c_of = behind(G, CHUNK * Ep)
        power = behind(c_of, CHUNK)
        share = behind(power, CHUNK)
        RE = behind(share, CHUNK)
        mu = behind(RE, 2 * Fp)
        X = behind(mu, Ep)
        clear_rows(CHUNK, Fp, Q, 0, Fp)
        clear_rows(CHUNK, Ep, G, 0, Ep)
        clear_rows(1, Ep, mu, 0, Ep)

        for i in range(first, last):
            j, head = table[i, 0], table[i, 1]
            q_at, g_at, turn_q_at, den_at = table[i, 2], table[i, 4], table[i, 3], head * N
            if normalize:
                visible_mean(v, table[i, 6], v_stride, M, E, mask, table[i, 7], mask_stride, masked, share, mu)
            clear_rows(X_slices * X_rows, 2 * cols, X, 0, 2 * cols)
            clear_rows(2, Fp, RE, 0, Fp)
            for c in range(0, N, CHUNK):
                n = min(CHUNK, N - c)
                if normalize:
                    divisors(den, den_at + c, n, mode, eps, c_of)
                    divide_rows(n, E, c_of, 0, 1, d_out, g_at + c * g_stride, g_stride, G, 0, Ep)
                else:
                    copy_rows(n, E, d_out, g_at + c * g_stride, g_stride, G, 0, Ep)
                fill_up(n, Ep, G)
                query_features(q, q_at + c * q_stride, q_stride, n, D, F, Fp, which, scaled,
                               turn_q, turn_q_at + c * turn_q_stride, turn_q_stride, Q, power)  # fmt: skip
                if normalize:
                    collect_weighted(n, Fp, Q, 0, Fp, RE, 0, Fp, h, den_at + c, 1)
                product_add(n, 1, X_rows, X_slices, cols, X_step, Q, 0, Fp, G, 0, Ep, X, cols, 2 * cols)
                if (c + CHUNK) % SETTLE == 0:
                    settle(X_slices * X_rows, NV, X, 0, 2 * cols)
                    settle(1, S_slices * NV, RE, 0, 0)
            settle(X_slices * X_rows, NV, X, 0, 2 * cols)
            settle(1, S_slices * NV, RE, 0, 0)
            store_cotangent(X, F, E, E1, cols, mu, zero, reach, j * F * E1, False)
            if normalize:
                for f in range(F):
                    reach[j * F * E1 + f * E1 + E] += RE[f]

    return linear_reach


@cache
def _reach(dtype: np.dtype):
    stored, real = kind_of(dtype)[-2:]
    given, number, made = reads(stored), reads(real), writes(real)
    return compile_kernel(
        reach_kernel,
        (given, given, given, MASK, number, number, number, made, made, TABLE, DIMS, types.float64)
        + (types.intp, types.intp),
    )


def _plan(d_out, d_state, q, k, v, turns, key_mask, feature_map, span, normalize, eps):
    turn_q, turn_k = turns or (None, None)
    return layout(
        kind_of(q.dtype).real.itemsize, described(q), described(k), described(v), described(turn_q), described(turn_k),
        described(key_mask), described(d_out), feature_map, span, normalize, eps, d_state is not None,
    )  # fmt: skip


def serves(d_out, q, k, v, *, feature_map, span, turns, key_mask, normalize, eps):
    """Whether the halves take this call: causal, and no head of keys that several heads of queries share."""
    q, k, v = loadable(q, k, v)
    plan = _plan(d_out, None, q, k, v, turns, key_mask, feature_map, span, normalize, eps)
    alone = len(plan.heads.groups) == plan.n_heads + 1 and plan.heads.lead == q.shape[:-2] == k.shape[:-2]
    return bool(span == "past" and plan.n_heads and alone and v.shape[:-2] == k.shape[:-2])


def to_queries(
    d_out, q, k, v, state, den, *, feature_map, span, turns, key_mask, normalize, eps, reach
):  # fmt: skip
    """d_q, h, and X shaped like the state's sums if it is wanted, else None."""
    dtype = q.dtype
    d_out, q, k, v = loadable(d_out, q, k, v)
    kind = kind_of(q.dtype)
    real = kind.real
    plan = _plan(d_out, None, q, k, v, turns, key_mask, feature_map, span, normalize, eps)
    d_q, h = np.empty(q.shape, real), np.empty(q.shape[:-1], real)
    none = np.empty(0, real)
    g = flat(d_out if kind.stored is kind.seen_as else d_out.view(kind.seen_as))
    given = operands(q, k, v, state, turns, key_mask, kind)
    dens, rows = (none if den is None else den.reshape(-1)), h.reshape(plan.n_heads, -1)
    arrays = (g, none, *given, dens, d_q.reshape(-1), none, none, none)
    run, table, dims, eps_of = kernel("backward", q.dtype), plan.heads.table, plan.dims, plan.eps

    def share(i):
        own, slices = rows[table[i, 1]], max(1, plan.feature_slices)
        run(*arrays, scratch(real, plan.scratch), own, table, dims, eps_of, i, i + 1, D_Q, 0, slices)

    _over_heads(share, plan)
    return delivered(d_q, None, dtype), h, _reached(g, given, dens, h, state, plan, q.dtype, real) if reach else None


def _reached(g, given, dens, h, state, plan, dtype, real):
    q, _, v, mask, turn_q = given[:5]
    reached = np.empty(state[0].shape, real)
    arrays = (g, q, v, mask, turn_q, dens, h.reshape(-1), reached.reshape(-1))
    run = _reach(dtype)

    def share(i):
        run(*arrays, scratch(real, plan.scratch), plan.heads.table, plan.dims, plan.eps, i, i + 1)

    _over_heads(share, plan)
    return reached


def to_keys(
    d_out, d_state, q, k, v, state, den, h, *, feature_map, span, turns, key_mask, normalize, eps
):  # fmt: skip
    """d_k and d_v; `d_state` is None or the cotangent of the outgoing state's value."""
    dtype = k.dtype
    d_out, q, k, v = loadable(d_out, q, k, v)
    kind = kind_of(q.dtype)
    real = kind.real
    plan = _plan(d_out, d_state, q, k, v, turns, key_mask, feature_map, span, normalize, eps)
    d_k, d_v, d_before = np.empty(k.shape, real), np.empty(v.shape, real), np.empty(state[0].shape, real)
    none, rows = d_before.reshape(-1)[:0], h.reshape(plan.n_heads, -1)
    arrays = (
        flat(d_out if kind.stored is kind.seen_as else d_out.view(kind.seen_as)),
        none if d_state is None else np.ascontiguousarray(d_state, real).reshape(-1),
        *operands(q, k, v, state, turns, key_mask, kind),
        none if den is None else den.reshape(-1),
        none, d_k.reshape(-1), d_v.reshape(-1), d_before.reshape(-1),
    )  # fmt: skip
    run, table, dims, eps_of = kernel("backward", q.dtype), plan.heads.table, plan.dims, plan.eps

    def share(i):
        own, slices = rows[table[i, 1]], max(1, plan.feature_slices)
        run(*arrays, scratch(real, plan.scratch), own, table, dims, eps_of, i, i + 1, D_V | D_K, 0, slices)

    _over_heads(share, plan)
    return delivered(d_k, None, dtype), delivered(d_v, None, dtype)


def _over_heads(share, plan):
    n_threads = threads.number() if plan.cost >= WORTH_SHARING else 1
    threads.run(share, list(range(plan.n_heads)), n_threads)
