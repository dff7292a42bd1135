"""The kernels of exact softmax. Definition: backends/reference/softmax.py.

Tiles of CHUNK queries by CHUNK keys, each formed, used and forgotten. Where keys come in turn for a tile of queries,
scores stand as keys x queries, so that maximum, exponential and sum run along the queries' lanes without a
horizontal sum. Pairs that do not see each other are left out of every product, so that NaN stays where it belongs.
"""

from __future__ import annotations

import math

from ._jit import helper
from ._linear import add_scaled, centred_values, clear, deliver_row, divided_row, hide, scale_row, values, visible_mean
from ._maps import exp
from ._tiles import CHUNK, TILE
from ._vector import product, product_add

__all__ = ["backward_kernel", "forward_kernel", "scratch_size"]

NV, ROWS, N_BYTES = TILE.vectors, TILE.rows, TILE.n_bytes


def scratch_size(n_features: int, n_values: int, columns: int) -> int:
    """Numbers of scratch the kernels carve, the larger of both."""
    features, values = (-(-n // columns) * columns for n in (n_features, n_values))
    return CHUNK * (5 * (features + values) + 2 * CHUNK + 5) + values


@helper
def packed(x, at, stride, count, width, factor, out):
    """out[r, t] = factor x[t, r]: a chunk transposed, tokens missing at its end zero."""
    clear(out[: width * CHUNK])
    for t in range(count):
        row = x[at + t * stride : at + t * stride + width]
        for r in range(width):
            out[r * CHUNK + t] = factor * row[r]


@helper
def scores_of(a, n_rows, padded, b, width, cols, out):
    """out[m, :] = a[m] . b[:, :] for whole tiles of rows; b is packed."""
    for m in range(0, n_rows, ROWS):
        for x in range(0, CHUNK, cols):
            product(a, m * padded, padded, 1, b, x, CHUNK, width, out, m * CHUNK + x, CHUNK)


@helper
def forget(p, s, n_queries, first_seen_by, hidden):
    """Key s of a tile keys x queries: -inf for the queries before `first_seen_by`, for all if hidden."""
    row = p[s * CHUNK : (s + 1) * CHUNK]
    for t in range(n_queries if hidden else min(first_seen_by, n_queries)):
        row[t] = -math.inf


@helper
def keep_larger(row, top):
    for t in range(top.size):
        top[t] = row[t] if row[t] > top[t] else top[t]


@helper
def shift(old, top, factor):
    """factor = exp(old - top), what earlier sums are worth against the new maximum; `old` becomes what to subtract."""
    zero = top.dtype.type(0)
    for t in range(top.size):
        base = zero if top[t] == -math.inf else top[t]
        factor[t] = exp(old[t] - base)
        old[t] = base


@helper
def exp_row(row, base, total):
    for t in range(total.size):
        row[t] = exp(row[t] - base[t])
        total[t] += row[t]


@helper
def times(x, y):
    for t in range(x.size):
        x[t] *= y[t]


@helper
def add_times(x, y, total):
    """x *= y, total += x"""
    for t in range(total.size):
        x[t] *= y[t]
        total[t] += x[t]


@helper
def rescale_rows(x, factor, count, padded):
    for t in range(count):
        if factor[t] != 1:
            scale_row(x[t * padded : (t + 1) * padded], factor[t])


@helper
def add_seen(p, n_queries, n_keys, ahead, y, padded, cols, out):
    """out[t] += sum over the keys s <= t + ahead of p[s, t] y[s]: common keys by tiles, the rest key by key."""
    for t in range(0, n_queries, ROWS):
        common = max(0, min(n_keys, t + ahead + 1))
        for x in range(0, padded, cols):
            product_add(p, t, 1, CHUNK, y, x, padded, common, out, t * padded + x, padded)
        for m in range(t, min(n_queries, t + ROWS)):
            for s in range(common, max(common, min(n_keys, m + ahead + 1))):
                add_scaled(y[s * padded : (s + 1) * padded], p[s * CHUNK + m], out[m * padded : (m + 1) * padded])


@helper
def add_seeing(p, n_queries, n_keys, ahead, y, padded, cols, out):
    """out[s] += sum over the queries t >= s - ahead of p[t, s] y[t]."""
    for s in range(0, n_keys, ROWS):
        common = max(0, min(n_queries, s + ROWS - 1 - ahead))
        for x in range(0, padded, cols):
            product_add(p, common * CHUNK + s, 1, CHUNK, y, common * padded + x, padded, n_queries - common,
                        out, s * padded + x, padded)  # fmt: skip
        for m in range(s, min(n_keys, s + ROWS)):
            for t in range(max(0, min(common, m - ahead)), common):
                add_scaled(y[t * padded : (t + 1) * padded], p[t * CHUNK + m], out[m * padded : (m + 1) * padded])


def forward_kernel(salt):
    """The kernel with the salt of its cache key in its closure."""

    def softmax_forward(q, k, v, mask, out, lse, work, table, dims, scale, first, last):
        """Heads first <= i < last.   top = max s,  total = sum exp(s - top),  out = sum exp(s - top) v / total"""
        salt  # noqa: B018
        N, M, D, E, offset = dims[0], dims[1], dims[2], dims[3], dims[4]
        q_stride, k_stride, v_stride, mask_stride = dims[5], dims[6], dims[7], dims[8]
        causal, masked = dims[10] == 1, dims[11] == 1
        cols = NV * (N_BYTES // work.itemsize)
        Dp, Ep = -(-D // cols) * cols, -(-E // cols) * cols
        scale = work.dtype.type(scale)
        one = work.dtype.type(1)

        at = 0
        QT = work[at : at + CHUNK * Dp]
        at += CHUNK * Dp
        K = work[at : at + CHUNK * Dp]
        at += CHUNK * Dp
        V = work[at : at + CHUNK * Ep]
        at += CHUNK * Ep
        Y = work[at : at + CHUNK * Ep]
        at += CHUNK * Ep
        P = work[at : at + CHUNK * CHUNK]
        at += CHUNK * CHUNK
        top = work[at : at + CHUNK]
        at += CHUNK
        base = work[at : at + CHUNK]
        at += CHUNK
        factor = work[at : at + CHUNK]
        at += CHUNK
        total = work[at : at + CHUNK]
        clear(K)
        clear(V)

        for i in range(first, last):
            h, q_at = table[i, 1], table[i, 2]
            k_at, v_at, mask_at = table[i, 4], table[i, 5], table[i, 6]
            for c in range(0, N, CHUNK):
                n = min(CHUNK, N - c)
                packed(q, q_at + c * q_stride, q_stride, n, D, scale, QT)
                clear(Y)
                clear(total)
                for t in range(CHUNK):
                    top[t] = -math.inf
                seen = min(M, c + n + offset) if causal else M
                for b in range(0, seen, CHUNK):
                    m = min(CHUNK, M - b)
                    ahead = c + offset - b if causal else CHUNK
                    values(k, k_at + b * k_stride, k_stride, m, D, Dp, K)
                    values(v, v_at + b * v_stride, v_stride, m, E, Ep, V)
                    if masked:
                        hide(mask, mask_at + b * mask_stride, mask_stride, m, V, Ep)
                    scores_of(K, m, Dp, QT, D, cols, P)
                    if masked or ahead < m - 1:
                        for s in range(m):
                            forget(P, s, n, s - ahead, masked and not mask[mask_at + (b + s) * mask_stride])
                    for t in range(CHUNK):
                        base[t] = top[t]
                    for s in range(m):
                        keep_larger(P[s * CHUNK : (s + 1) * CHUNK], top)
                    shift(base, top, factor)
                    times(total, factor)
                    rescale_rows(Y, factor, n, Ep)
                    for s in range(m):
                        exp_row(P[s * CHUNK : (s + 1) * CHUNK], base, total)
                    add_seen(P, n, m, ahead, V, Ep, cols, Y)
                for t in range(n):
                    p = h * N + c + t
                    divided_row(Y[t * Ep : t * Ep + E], total[t], out[p * E : (p + 1) * E])
                    lse[p] = top[t] + math.log(total[t]) if total[t] != 0 else -math.inf * one

    return softmax_forward


def backward_kernel(salt):
    """The kernel with the salt of its cache key in its closure."""

    def softmax_backward(d_out, q, k, v, mask, d_q, d_k, d_v, work, rows, table, dims, scale, first, last):
        """Heads first <= i < last; vc = v - mu: sum_s d_s = 0 makes any offset of v cancel.

        sweep 1, keys in turn    D_t = sum p d_p    d_q = scale (sum p d_p k - D sum p k)      d_p = g . vc
        sweep 2, queries in turn    d_v = sum p g    d_k = scale sum p (d_p - D) q
        rows keeps top, total and D of a head's queries.
        """
        salt  # noqa: B018
        N, M, D, E, offset = dims[0], dims[1], dims[2], dims[3], dims[4]
        q_stride, k_stride, v_stride, mask_stride, g_stride = dims[5], dims[6], dims[7], dims[8], dims[9]
        causal, masked = dims[10] == 1, dims[11] == 1
        cols = NV * (N_BYTES // work.itemsize)
        Dp, Ep = -(-D // cols) * cols, -(-E // cols) * cols
        scale = work.dtype.type(scale)
        one, zero = work.dtype.type(1), work.dtype.type(0)

        at = 0
        QT = work[at : at + CHUNK * Dp]
        at += CHUNK * Dp
        K = work[at : at + CHUNK * Dp]
        at += CHUNK * Dp
        Y = work[at : at + CHUNK * Dp]
        at += CHUNK * Dp
        Z = work[at : at + CHUNK * Dp]
        at += CHUNK * Dp
        GT = work[at : at + CHUNK * Ep]
        at += CHUNK * Ep
        V = work[at : at + CHUNK * Ep]
        at += CHUNK * Ep
        U = work[at : at + CHUNK * Ep]
        at += CHUNK * Ep
        P = work[at : at + CHUNK * CHUNK]
        at += CHUNK * CHUNK
        dP = work[at : at + CHUNK * CHUNK]
        at += CHUNK * CHUNK
        top = work[at : at + CHUNK]
        at += CHUNK
        base = work[at : at + CHUNK]
        at += CHUNK
        factor = work[at : at + CHUNK]
        at += CHUNK
        total = work[at : at + CHUNK]
        at += CHUNK
        mean = work[at : at + CHUNK]
        at += CHUNK
        mu = work[at : at + E]
        clear(K)
        clear(V)

        for i in range(first, last):
            j, h, q_at, g_at = table[i, 0], table[i, 1], table[i, 2], table[i, 3]
            k_at, v_at, mask_at = table[i, 4], table[i, 5], table[i, 6]
            same = i > first and table[i - 1, 0] == j  # another query head of the same keys: its d_k, d_v add
            if not same:
                visible_mean(v, v_at, v_stride, M, E, mask, mask_at, mask_stride, masked, mu)

            for c in range(0, N, CHUNK):
                n = min(CHUNK, N - c)
                packed(q, q_at + c * q_stride, q_stride, n, D, scale, QT)
                packed(d_out, g_at + c * g_stride, g_stride, n, E, one, GT)
                clear(Y)
                clear(Z)
                clear(total)
                clear(mean)
                for t in range(CHUNK):
                    top[t] = -math.inf
                seen = min(M, c + n + offset) if causal else M
                for b in range(0, seen, CHUNK):
                    m = min(CHUNK, M - b)
                    ahead = c + offset - b if causal else CHUNK
                    values(k, k_at + b * k_stride, k_stride, m, D, Dp, K)
                    centred_values(v, v_at + b * v_stride, v_stride, m, E, Ep, mu, V)
                    if masked:
                        hide(mask, mask_at + b * mask_stride, mask_stride, m, K, Dp)
                        hide(mask, mask_at + b * mask_stride, mask_stride, m, V, Ep)
                    scores_of(K, m, Dp, QT, D, cols, P)
                    scores_of(V, m, Ep, GT, E, cols, dP)
                    if masked or ahead < m - 1:
                        for s in range(m):
                            hidden = masked and not mask[mask_at + (b + s) * mask_stride]
                            forget(P, s, n, s - ahead, hidden)
                            if hidden or s > ahead:
                                clear(dP[s * CHUNK : s * CHUNK + (n if hidden else min(n, s - ahead))])
                    for t in range(CHUNK):
                        base[t] = top[t]
                    for s in range(m):
                        keep_larger(P[s * CHUNK : (s + 1) * CHUNK], top)
                    shift(base, top, factor)
                    times(total, factor)
                    times(mean, factor)
                    rescale_rows(Y, factor, n, Dp)
                    rescale_rows(Z, factor, n, Dp)
                    for s in range(m):
                        row = P[s * CHUNK : (s + 1) * CHUNK]
                        exp_row(row, base, total)
                        add_times(dP[s * CHUNK : (s + 1) * CHUNK], row, mean)
                    add_seen(dP, n, m, ahead, K, Dp, cols, Y)
                    add_seen(P, n, m, ahead, K, Dp, cols, Z)
                for t in range(n):
                    y = Y[t * Dp : t * Dp + D]
                    a = total[t] if total[t] != 0 else one
                    mean[t] /= a
                    add_scaled(Z[t * Dp : t * Dp + D], -mean[t], y)
                    scale_row(y, scale)
                    p = (h * N + c + t) * D
                    divided_row(y, a, d_q[p : p + D])
                    rows[c + t], rows[N + c + t], rows[2 * N + c + t] = (
                        zero if top[t] == -math.inf else top[t], a, mean[t],
                    )  # fmt: skip

            for b in range(0, M, CHUNK):
                m = min(CHUNK, M - b)
                values(k, k_at + b * k_stride, k_stride, m, D, Dp, K)
                centred_values(v, v_at + b * v_stride, v_stride, m, E, Ep, mu, V)
                if masked:
                    hide(mask, mask_at + b * mask_stride, mask_stride, m, K, Dp)
                    hide(mask, mask_at + b * mask_stride, mask_stride, m, V, Ep)
                packed(K, 0, Dp, m, D, one, QT)
                packed(V, 0, Ep, m, E, one, GT)
                clear(Y)
                clear(U)
                begin = max(0, b - offset) // CHUNK * CHUNK if causal else 0
                for c in range(begin, N, CHUNK):
                    n = min(CHUNK, N - c)
                    ahead = c + offset - b if causal else CHUNK
                    values(q, q_at + c * q_stride, q_stride, n, D, Dp, K)
                    values(d_out, g_at + c * g_stride, g_stride, n, E, Ep, V)
                    scale_row(K, scale)
                    scores_of(K, n, Dp, QT, D, cols, P)
                    scores_of(V, n, Ep, GT, E, cols, dP)
                    for t in range(n):
                        weights_row(
                            P[t * CHUNK : t * CHUNK + m], dP[t * CHUNK : t * CHUNK + m],
                            rows[c + t], rows[N + c + t], rows[2 * N + c + t],
                        )  # fmt: skip
                    add_seeing(dP, n, m, ahead, K, Dp, cols, Y)
                    add_seeing(P, n, m, ahead, V, Ep, cols, U)
                for s in range(m):
                    y, u = Y[s * Dp : s * Dp + D], U[s * Ep : s * Ep + E]
                    if masked and not mask[mask_at + (b + s) * mask_stride]:
                        clear(y)
                        clear(u)
                    p = j * M + b + s
                    deliver_row(y, d_k[p * D : (p + 1) * D], same)
                    deliver_row(u, d_v[p * E : (p + 1) * E], same)

    return softmax_backward


@helper
def weights_row(p, d_p, top, total, mean):
    """p = exp(s - top) / total,   d_s = p (d_p - D)"""
    for s in range(p.size):
        p[s] = exp(p[s] - top) / total
        d_p[s] = p[s] * (d_p[s] - mean)
