"""The kernels of exact softmax. Definition: backends/reference/softmax.py.

Tiles of SIDE queries by SIDE keys, each formed, used and forgotten. Where keys come in turn for a tile of queries,
scores stand as keys x queries, so that maximum, exponential and sum run along the queries' lanes without a
horizontal sum. Pairs that do not see each other are left out of every product, so that NaN stays where it belongs.
Sums over many tiles are [S | E] as the states of the linear engine are: see _products.py.
"""

from __future__ import annotations

import math

from ._jit import helper
from ._maps import exp
from ._products import product, product_add, settle
from ._prologues import hide, hide_part
from ._rows import add_rows, centre_rows, clear_rows, copy_rows, divide_rows, scale_rows, scale_rows_add, transpose
from ._states import visible_mean
from ._tiles import TILE
from ._vector import I64, behind, operation, pointer, rowwise, select_pointer, stored_alike

__all__ = ["SIDE", "backward_kernel", "forward_kernel", "scratch_size"]

NV, ROWS, N_BYTES = TILE.vectors, TILE.rows, TILE.n_bytes
SIDE = 48 if 48 % TILE.columns(4) == 0 else 96  # whole tiles of matrix products, by rows and by columns
SETTLED_TILES = 4


def scratch_size(n_features: int, n_values: int, columns: int) -> int:
    """Numbers of scratch the kernels carve, the larger of both."""
    features, values = (-(-n // columns) * columns for n in (n_features, n_values))
    return SIDE * (7 * (features + values) + 2 * SIDE + 10) + values


# -- rows and tiles ---------------------------------------------------------------------------------------------

fill_rows = rowwise(1, 1, lambda v, number: number)
multiply_rows = rowwise(0, 1, lambda v, x, y: v.mul(x, y))


def _shift(v, old, top):
    """What to subtract from scores, and what earlier sums are worth against the new maximum."""
    base = v.where(v.compare(top, "==", v.const(-math.inf)), v.zero, top)
    return base, exp(v, v.sub(old, base))


def _weights(v, top, total, mean, p, d_p):
    """p = exp(s - top) / total,   d_s = p (d_p - D)"""
    p = v.div(exp(v, v.sub(p, top)), total)
    return p, v.mul(p, v.sub(d_p, mean))


shift_rows = rowwise(0, 2, _shift)
weight_rows = rowwise(3, 2, _weights)


def _columnwise(n_read, n_carried, body):
    """op(count, width, P, *others): down the columns of a tile, NV vectors at a time.

    `body(v, numbers of this row, carried)` -> what replaces them, carried; the first `n_read` of the others are rows
    that stay as they are, the next `n_carried` are carried from row to row and stored at the end.
    """

    def columnwise(v, sizes, memories):
        count, width = sizes
        tiles, rows = memories[: len(memories) - n_read - n_carried], memories[len(memories) - n_read - n_carried :]

        def part(x, _):
            known = [[m.load(v, x, k * v.lanes) for m, _ in rows[:n_read]] for k in range(NV)]
            carried = [m.load(v, x, k * v.lanes) for k in range(NV) for m, _ in rows[n_read:]]

            def row(t, carried):
                new = []
                for k in range(NV):
                    starts = [v.b.mul(t, stride) for _, stride in tiles]
                    numbers = [m.load(v, start, x, k * v.lanes) for (m, _), start in zip(tiles, starts, strict=True)]
                    made, after = body(v, numbers, known[k], carried[k * n_carried : (k + 1) * n_carried])
                    for (m, _), start, number in zip(tiles, starts, made, strict=False):
                        m.store(v, number, start, x, k * v.lanes)
                    new += after
                return new

            carried = v.loop(I64(0), count, 1, carried, row)
            for k in range(NV):
                for (m, _), number in zip(rows[n_read:], carried[k * n_carried :], strict=False):
                    m.store(v, number, x, k * v.lanes)

        v.loop(I64(0), width, NV * v.lanes, [], part)

    return operation(columnwise)


def _exp_sum(v, numbers, known, carried):
    p = exp(v, v.sub(numbers[0], known[0]))
    return [p], [v.add(carried[0], p)]


def _product_sum(v, numbers, known, carried):
    product = v.mul(*numbers)
    return [product], [v.add(carried[0], product)]


@operation
def rescale_rows(v, sizes, memories):
    """rescale_rows(count, width, factor, x): x[t] *= factor[t], rows whose factor is 1 passed over."""
    count, width = sizes
    (factors, _), (xx, stride) = memories
    b, one = v.b, v.single()

    def row(t, _):
        factor = factors.load(one, t)
        start = b.mul(t, stride)
        with b.if_then(b.fcmp_unordered("!=", factor, one.one)):
            f = v.spread(factor)
            v.loop(I64(0), width, v.lanes, [], lambda x, _: xx.store(v, v.mul(f, xx.load(v, start, x)), start, x))

    v.loop(I64(0), count, 1, [], row)


# largest(count, width, P, top); exp_sum(count, width, P, base, total): P = exp(P - base), total += its column sums;
# product_sum(count, width, dP, P, mean): dP *= P, mean += its column sums
largest = _columnwise(0, 1, lambda v, x, _, top: ([], [v.where(v.compare(x[0], ">", top[0]), x[0], top[0])]))
exp_sum = _columnwise(1, 1, _exp_sum)
product_sum = _columnwise(0, 1, _product_sum)


@helper
def transposed(x, count, width, padded, wide, out):
    """out[r, t] = x[t, r]; tokens missing in the last slice of a tile are zero. wide: count up to whole slices."""
    if wide > count:
        clear_rows(width, wide - count, out, count, SIDE)
    transpose(count, width, x, 0, padded, out, 0, SIDE)


@helper
def scores(a, a_at, a_stride, count, b, width, wide, cols, out):
    """out[m, :] = a[m] . b[:, :], b transposed."""
    product(width, a_stride, count, wide // cols, cols, cols, a, a_at, 1, b, 0, SIDE, out, 0, SIDE)


@helper
def hidden(mask, at, stride, s, masked):
    return masked and not mask[at + s * stride]


@helper
def add_seen(p, n_queries, n_keys, ahead, y, y_at, y_stride, padded, cols, out):
    """out[t] += sum over the keys s <= t + ahead of p[s, t] y[s]: common keys by tiles, the rest key by key."""
    if ahead >= n_keys - 1:
        product_add(n_keys, 1, n_queries, padded // cols, cols, cols, p, 0, SIDE, y, y_at, y_stride,
                    out, padded, 2 * padded)  # fmt: skip
        return
    for t in range(0, n_queries, ROWS):
        common = max(0, min(n_keys, t + ahead + 1))
        product_add(common, 1, ROWS, padded // cols, cols, cols, p, t, SIDE, y, y_at, y_stride,
                    out, t * 2 * padded + padded, 2 * padded)  # fmt: skip
        for m in range(t, min(n_queries, t + ROWS)):
            there = m * 2 * padded + padded
            for s in range(common, max(common, min(n_keys, m + ahead + 1))):
                scale_rows_add(1, padded, p, s * SIDE + m, 0, y, y_at + s * y_stride, 0, out, there, 0, out, there, 0)


@helper
def add_seeing(p, n_queries, n_keys, ahead, y, padded, cols, out):
    """out[s] += sum over the queries t >= s - ahead of p[t, s] y[t]."""
    if ahead >= n_keys - 1:
        product_add(n_queries, 1, n_keys, padded // cols, cols, cols, p, 0, SIDE, y, 0, padded,
                    out, padded, 2 * padded)  # fmt: skip
        return
    for s in range(0, n_keys, ROWS):
        common = max(0, min(n_queries, s + ROWS - 1 - ahead))
        product_add(n_queries - common, 1, ROWS, padded // cols, cols, cols, p, common * SIDE + s, SIDE,
                    y, common * padded, padded, out, s * 2 * padded + padded, 2 * padded)  # fmt: skip
        for m in range(s, min(n_keys, s + ROWS)):
            there = m * 2 * padded + padded
            for t in range(max(0, min(common, m - ahead)), common):
                scale_rows_add(1, padded, p, t * SIDE + m, 0, y, t * padded, 0, out, there, 0, out, there, 0)


# -- forward ----------------------------------------------------------------------------------------------------


def forward_kernel(salt):
    """The kernel with the salt of its cache key in its closure."""

    def softmax_forward(
        q_array, k_array, v_array, mask, out_array, lse, work_array, table, dims, scale, first, last
    ):  # fmt: skip
        """Heads first <= i < last.   top = max s,  total = sum exp(s - top),  out = sum exp(s - top) v / total"""
        salt  # noqa: B018
        N, M, D, E, offset = dims[0], dims[1], dims[2], dims[3], dims[4]
        q_stride, k_stride, v_stride, mask_stride = dims[5], dims[6], dims[7], dims[8]
        causal, masked = dims[10] == 1, dims[11] == 1
        lanes = N_BYTES // work_array.itemsize
        cols = NV * lanes
        Dp, Ep = (D + cols - 1) // cols * cols, (E + cols - 1) // cols * cols
        scale = work_array.dtype.type(scale)

        q, k, v, out = pointer(q_array), pointer(k_array), pointer(v_array), pointer(out_array)
        Q = pointer(work_array)
        QT = behind(Q, SIDE * Dp)
        K = behind(QT, SIDE * Dp)
        V = behind(K, SIDE * Dp)
        Y = behind(V, SIDE * Ep)
        P = behind(Y, SIDE * 2 * Ep)
        top = behind(P, SIDE * SIDE)
        base = behind(top, SIDE)
        factor = behind(base, SIDE)
        total = behind(factor, SIDE)
        constants = behind(total, 2 * SIDE)
        clear_rows(3, SIDE * Dp, Q, 0, SIDE * Dp)
        clear_rows(SIDE, Ep, V, 0, Ep)
        constants[0], constants[1] = -math.inf, scale

        for i in range(first, last):
            h, q_at = table[i, 1], table[i, 2]
            k_at, v_at, mask_at = table[i, 4], table[i, 5], table[i, 6]
            for c in range(0, N, SIDE):
                n = min(SIDE, N - c)
                wide = (n + cols - 1) // cols * cols
                scale_rows(n, D, constants, 1, 0, q, q_at + c * q_stride, q_stride, Q, 0, Dp)
                transposed(Q, n, D, Dp, wide, QT)
                clear_rows(SIDE, 2 * Ep, Y, 0, 2 * Ep)
                clear_rows(1, 2 * SIDE, total, 0, 0)
                fill_rows(1, SIDE, constants, 0, 0, top, 0, 0)
                seen = min(M, c + n + offset) if causal else M
                for b in range(0, seen, SIDE):
                    m = min(SIDE, M - b)
                    ahead = c + offset - b if causal else SIDE
                    direct = stored_alike(k, K) and m == SIDE
                    direct_v = direct and not masked and Ep == E
                    if not direct:
                        copy_rows(m, D, k, k_at + b * k_stride, k_stride, K, 0, Dp)
                    if not direct_v:
                        copy_rows(m, E, v, v_at + b * v_stride, v_stride, V, 0, Ep)
                    keys, seen_values = select_pointer(direct, k, K), select_pointer(direct_v, v, V)
                    keys_at, keys_stride = (k_at + b * k_stride, k_stride) if direct else (0, Dp)
                    values_at, values_stride = (v_at + b * v_stride, v_stride) if direct_v else (0, Ep)
                    if masked:
                        hide(mask, mask_at + b * mask_stride, mask_stride, m, V, Ep)
                    scores(keys, keys_at, keys_stride, m, QT, D, wide, cols, P)
                    if masked or ahead < m - 1:
                        for s in range(m):
                            blind = n if hidden(mask, mask_at, mask_stride, b + s, masked) else min(n, s - ahead)
                            if blind > 0:
                                fill_rows(1, blind, constants, 0, 0, P, s * SIDE, 0)
                    copy_rows(1, SIDE, top, 0, 0, base, 0, 0)
                    largest(m, wide, P, 0, SIDE, top, 0, 0)
                    shift_rows(1, SIDE, base, 0, 0, top, 0, 0, base, 0, 0, factor, 0, 0)
                    multiply_rows(2, SIDE, total, 0, SIDE, factor, 0, 0, total, 0, SIDE)
                    rescale_rows(n, 2 * Ep, factor, 0, 1, Y, 0, 2 * Ep)
                    exp_sum(m, wide, P, 0, SIDE, base, 0, 0, total, SIDE, 0)
                    add_seen(P, n, m, ahead, seen_values, values_at, values_stride, Ep, cols, Y)
                    if b // SIDE % SETTLED_TILES == SETTLED_TILES - 1:
                        settle(SIDE, Ep // lanes, Y, 0, 2 * Ep)
                        settle(1, SIDE // lanes, total, 0, 0)
                settle(SIDE, Ep // lanes, Y, 0, 2 * Ep)
                settle(1, SIDE // lanes, total, 0, 0)
                p = h * N + c
                divide_rows(n, E, total, 0, 1, Y, 0, 2 * Ep, out, p * E, E)
                for t in range(n):
                    lse[p + t] = top[t] + math.log(total[t]) if total[t] != 0 else constants[0]

    return softmax_forward


# -- backward ---------------------------------------------------------------------------------------------------


def backward_kernel(salt):
    """The kernel with the salt of its cache key in its closure."""

    def softmax_backward(
        d_out_array, q_array, k_array, v_array, mask, d_q_array, d_k_array, d_v_array,
        work_array, rows_array, table, dims, scale, first, last,
    ):  # fmt: skip
        """Heads first <= i < last; vc = v - mu: sum_s d_s = 0 makes any offset of v cancel.

        sweep 1, keys in turn    D_t = sum p d_p    d_q = scale (sum p d_p k - D sum p k)      d_p = g . vc
        sweep 2, queries in turn    d_v = sum p g    d_k = scale sum p (d_p - D) q
        `rows` keeps top, total and D of a head's queries.
        """
        salt  # noqa: B018
        N, M, D, E, offset = dims[0], dims[1], dims[2], dims[3], dims[4]
        q_stride, k_stride, v_stride, mask_stride, g_stride = dims[5], dims[6], dims[7], dims[8], dims[9]
        causal, masked = dims[10] == 1, dims[11] == 1
        lanes = N_BYTES // work_array.itemsize
        cols = NV * lanes
        Dp, Ep = (D + cols - 1) // cols * cols, (E + cols - 1) // cols * cols
        scale = work_array.dtype.type(scale)
        one = work_array.dtype.type(1)

        d_out, q, k, v = pointer(d_out_array), pointer(q_array), pointer(k_array), pointer(v_array)
        d_q, d_k, d_v = pointer(d_q_array), pointer(d_k_array), pointer(d_v_array)
        tops = pointer(rows_array)
        totals = behind(tops, N)
        means = behind(totals, N)
        Q = pointer(work_array)
        QT = behind(Q, SIDE * Dp)
        K = behind(QT, SIDE * Dp)
        Y = behind(K, SIDE * Dp)
        Z = behind(Y, SIDE * 2 * Dp)
        G = behind(Z, SIDE * 2 * Dp)
        GT = behind(G, SIDE * Ep)
        V = behind(GT, SIDE * Ep)
        U = behind(V, SIDE * Ep)
        P = behind(U, SIDE * 2 * Ep)
        dP = behind(P, SIDE * SIDE)
        top = behind(dP, SIDE * SIDE)
        base = behind(top, SIDE)
        factor = behind(base, SIDE)
        total = behind(factor, SIDE)
        mean = behind(total, 2 * SIDE)
        constants = behind(mean, 2 * SIDE)
        mu = behind(constants, SIDE)
        clear_rows(3, SIDE * Dp, Q, 0, SIDE * Dp)
        clear_rows(3, SIDE * Ep, G, 0, SIDE * Ep)
        constants[0], constants[1] = -math.inf, scale

        for i in range(first, last):
            j, h, q_at, g_at = table[i, 0], table[i, 1], table[i, 2], table[i, 3]
            k_at, v_at, mask_at = table[i, 4], table[i, 5], table[i, 6]
            same = i > first and table[i - 1, 0] == j  # another query head of the same keys: its d_k, d_v add
            if not same:
                visible_mean(v, v_at, v_stride, M, E, mask, mask_at, mask_stride, masked, top, mu)

            for c in range(0, N, SIDE):
                n = min(SIDE, N - c)
                wide = (n + cols - 1) // cols * cols
                scale_rows(n, D, constants, 1, 0, q, q_at + c * q_stride, q_stride, Q, 0, Dp)
                transposed(Q, n, D, Dp, wide, QT)
                copy_rows(n, E, d_out, g_at + c * g_stride, g_stride, G, 0, Ep)
                transposed(G, n, E, Ep, wide, GT)
                clear_rows(2 * SIDE, 2 * Dp, Y, 0, 2 * Dp)
                clear_rows(1, 4 * SIDE, total, 0, 0)
                fill_rows(1, SIDE, constants, 0, 0, top, 0, 0)
                seen = min(M, c + n + offset) if causal else M
                for b in range(0, seen, SIDE):
                    m = min(SIDE, M - b)
                    ahead = c + offset - b if causal else SIDE
                    direct = stored_alike(k, K) and m == SIDE and not masked and Dp == D
                    if not direct:
                        copy_rows(m, D, k, k_at + b * k_stride, k_stride, K, 0, Dp)
                    keys = select_pointer(direct, k, K)
                    keys_at, keys_stride = (k_at + b * k_stride, k_stride) if direct else (0, Dp)
                    centre_rows(m, E, v, v_at + b * v_stride, v_stride, mu, 0, 0, V, 0, Ep)
                    if masked:
                        hide(mask, mask_at + b * mask_stride, mask_stride, m, K, Dp)
                        hide(mask, mask_at + b * mask_stride, mask_stride, m, V, Ep)
                    scores(keys, keys_at, keys_stride, m, QT, D, wide, cols, P)
                    scores(V, 0, Ep, m, GT, E, wide, cols, dP)
                    if masked or ahead < m - 1:
                        for s in range(m):
                            blind = n if hidden(mask, mask_at, mask_stride, b + s, masked) else min(n, s - ahead)
                            if blind > 0:
                                fill_rows(1, blind, constants, 0, 0, P, s * SIDE, 0)
                                clear_rows(1, blind, dP, s * SIDE, 0)
                    copy_rows(1, SIDE, top, 0, 0, base, 0, 0)
                    largest(m, wide, P, 0, SIDE, top, 0, 0)
                    shift_rows(1, SIDE, base, 0, 0, top, 0, 0, base, 0, 0, factor, 0, 0)
                    multiply_rows(4, SIDE, total, 0, SIDE, factor, 0, 0, total, 0, SIDE)
                    rescale_rows(n, 2 * Dp, factor, 0, 1, Y, 0, 2 * Dp)
                    rescale_rows(n, 2 * Dp, factor, 0, 1, Z, 0, 2 * Dp)
                    exp_sum(m, wide, P, 0, SIDE, base, 0, 0, total, SIDE, 0)
                    product_sum(m, wide, dP, 0, SIDE, P, 0, SIDE, mean, SIDE, 0)
                    add_seen(dP, n, m, ahead, keys, keys_at, keys_stride, Dp, cols, Y)
                    add_seen(P, n, m, ahead, keys, keys_at, keys_stride, Dp, cols, Z)
                    if b // SIDE % SETTLED_TILES == SETTLED_TILES - 1:
                        settle(2 * SIDE, Dp // lanes, Y, 0, 2 * Dp)
                        settle(2, SIDE // lanes, total, 0, 2 * SIDE)
                settle(2 * SIDE, Dp // lanes, Y, 0, 2 * Dp)
                settle(2, SIDE // lanes, total, 0, 2 * SIDE)
                for t in range(n):
                    a = total[t] if total[t] != 0 else one
                    total[t], factor[t] = a, -mean[t] / a
                    tops[c + t], totals[c + t], means[c + t] = base[t], a, mean[t] / a
                scale_rows_add(n, D, factor, 0, 1, Z, 0, 2 * Dp, Y, 0, 2 * Dp, Y, 0, 2 * Dp)
                scale_rows(n, D, constants, 1, 0, Y, 0, 2 * Dp, Y, 0, 2 * Dp)
                divide_rows(n, D, total, 0, 1, Y, 0, 2 * Dp, d_q, (h * N + c) * D, D)

            for b in range(0, M, SIDE):
                m = min(SIDE, M - b)
                copy_rows(m, D, k, k_at + b * k_stride, k_stride, K, 0, Dp)
                centre_rows(m, E, v, v_at + b * v_stride, v_stride, mu, 0, 0, V, 0, Ep)
                if masked:
                    hide(mask, mask_at + b * mask_stride, mask_stride, m, K, Dp)
                    hide(mask, mask_at + b * mask_stride, mask_stride, m, V, Ep)
                wide = (m + cols - 1) // cols * cols
                transposed(K, m, D, Dp, wide, QT)
                transposed(V, m, E, Ep, wide, GT)
                clear_rows(SIDE, 2 * Dp, Y, 0, 2 * Dp)
                clear_rows(SIDE, 2 * Ep, U, 0, 2 * Ep)
                begin = max(0, b - offset) // SIDE * SIDE if causal else 0
                for c in range(begin, N, SIDE):
                    n = min(SIDE, N - c)
                    ahead = c + offset - b if causal else SIDE
                    scale_rows(n, D, constants, 1, 0, q, q_at + c * q_stride, q_stride, Q, 0, Dp)
                    copy_rows(n, E, d_out, g_at + c * g_stride, g_stride, G, 0, Ep)
                    scores(Q, 0, Dp, n, QT, D, wide, cols, P)
                    scores(G, 0, Ep, n, GT, E, wide, cols, dP)
                    weight_rows(n, m, tops, c, 1, totals, c, 1, means, c, 1,
                                P, 0, SIDE, dP, 0, SIDE, P, 0, SIDE, dP, 0, SIDE)  # fmt: skip
                    add_seeing(dP, n, m, ahead, Q, Dp, cols, Y)
                    add_seeing(P, n, m, ahead, G, Ep, cols, U)
                    if c // SIDE % SETTLED_TILES == SETTLED_TILES - 1:
                        settle(SIDE, Dp // lanes, Y, 0, 2 * Dp)
                        settle(SIDE, Ep // lanes, U, 0, 2 * Ep)
                settle(SIDE, Dp // lanes, Y, 0, 2 * Dp)
                settle(SIDE, Ep // lanes, U, 0, 2 * Ep)
                p = j * M + b
                if same:
                    add_rows(m, D, Y, 0, 2 * Dp, d_k, p * D, D, d_k, p * D, D)
                    add_rows(m, E, U, 0, 2 * Ep, d_v, p * E, E, d_v, p * E, E)
                else:
                    copy_rows(m, D, Y, 0, 2 * Dp, d_k, p * D, D)
                    copy_rows(m, E, U, 0, 2 * Ep, d_v, p * E, E)
                if masked:
                    hide_part(mask, mask_at + b * mask_stride, mask_stride, m, D, d_k, p * D, D)
                    hide_part(mask, mask_at + b * mask_stride, mask_stride, m, E, d_v, p * E, E)

    return softmax_backward
