"""The kernels of the log-linear engine. Definition: backends/reference/loglinear.py; logarithms and gauges: _logs.py.

A gauge m is held over a span of tokens: phi_q = fq 2^(nq + m - rho), phi_k = fk 2^(nk - m), and inside the span all is
as in the linear engine, whose states and tiles these kernels use (_linear.py, _products.py). A token whose log-feature
exceeds the gauge by too much opens a new span: m rises to it, and the sums are multiplied by powers of two, exactly.
The gauge of a token depends on earlier tokens and on itself only. A state is handed on in the gauge of all its keys.

Blocks of T tokens keep their places when a span begins inside one: the block is run once for each span, with zeros for
the tokens of the others, so that no product changes its order.
"""

from __future__ import annotations

import math

from ._linear import N_BYTES, NV, W_SIZE, T
from ._log_prologues import (
    end_of_span,
    finish_keys,
    finish_queries,
    gauge_of_keys,
    lay_cotangents,
    lay_keys,
    lay_queries,
    lay_values,
    live_divisors,
    split_keys,
)
from ._logs import (
    key_rows,
    multiply_rows,
    none_rows,
    query_rows,
    raise_gauge,
    split_rows,
    turn_columns,
    turn_features,
    turn_of,
    widen,
)
from ._products import PAIRS, advance, pairs, pairs_back, product, product_add, retreat, settle
from ._prologues import fill_up, hide
from ._rows import (
    add_later,
    add_rows,
    add_seen,
    clear_rows,
    collect,
    collect_weighted,
    copy_rows,
    divide_rows,
    row_dots,
    step,
)
from ._states import (
    load_centred,
    load_cotangent,
    load_state,
    rows_of,
    rows_of_state,
    store_cotangent,
    store_state,
    transpose_state,
    visible_mean,
)
from ._tiles import CHUNK, SETTLE
from ._vector import behind, pointer

__all__ = ["backward_kernel", "forward_kernel", "scratch_size"]

LN2 = math.log(2)


def scratch_size(n_features: int, n_values: int, columns: int) -> int:
    """Numbers of scratch the kernels carve, the larger of both; a call without a column has a slice all the same."""
    features, values = (max(1, -(-n // columns)) * columns for n in (n_features, n_values))
    states = 2 * columns * (features // columns * rows_of(n_values) + values // columns * rows_of(n_features))
    return CHUNK * (9 * features + 3 * values + 10) + states + 7 * features + 2 * values + columns + W_SIZE


# -- forward ----------------------------------------------------------------------------------------------------


def forward_kernel(salt):
    """The kernel with the salt of its cache key in its closure."""

    def loglinear_forward(
        lq_array, lk_array, v_array, mask, sums_array, rest_array, gauge_array, out_array, lse,
        new_sums_array, new_rest_array, new_gauge_array, work_array, table, dims, first, last, left, right,
    ):  # fmt: skip
        """Heads first <= i < last, slices left <= n < right of the values: out, lse, the state after all keys."""
        salt  # noqa: B018
        N, M, F, E_all = dims[0], dims[1], dims[2], dims[3]
        q_stride, k_stride, v_stride, mask_stride = dims[4], dims[5], dims[6], dims[7]
        causal, masked, most, room = dims[10] == 1, dims[11] == 1, dims[15], dims[16]
        E1 = E_all + 1
        cols = NV * (N_BYTES // work_array.itemsize)
        Fp, slices, S_rows = (F + cols - 1) // cols * cols, right - left, rows_of_state(F)
        E, Ep, column = min(E_all, right * cols) - left * cols, slices * cols, left * cols
        S_step = S_rows * 2 * cols

        lq, lk, v, out = pointer(lq_array), pointer(lk_array), pointer(v_array), pointer(out_array)
        sums, rest, gauge = pointer(sums_array), pointer(rest_array), pointer(gauge_array)
        new_sums, new_rest, new_gauge = pointer(new_sums_array), pointer(new_rest_array), pointer(new_gauge_array)
        Q = pointer(work_array)
        K = behind(Q, CHUNK * Fp)
        FQ = behind(K, CHUNK * Fp)
        FK = behind(FQ, CHUNK * Fp)
        NQ = behind(FK, CHUNK * Fp)
        NK = behind(NQ, CHUNK * Fp)
        V = behind(NK, CHUNK * Fp)
        Y = behind(V, CHUNK * Ep)
        d = behind(Y, CHUNK * Ep)
        den = behind(d, CHUNK)
        rho = behind(den, CHUNK)
        top = behind(rho, CHUNK)
        bits = behind(top, CHUNK)
        W = behind(bits, CHUNK)
        ZE = behind(W, W_SIZE)
        m = behind(ZE, 2 * Fp)
        m_top = behind(m, Fp)
        turn = behind(m_top, Fp)
        mu = behind(turn, Fp)
        S = behind(mu, Ep)
        if N == 1 and M == 1:  # a decoding step: straight from state to state
            clear_rows(4, Fp, Q, 0, CHUNK * Fp)
            none_rows(2, Fp, NQ, 0, CHUNK * Fp)
            none_rows(1, Fp, m, 0, 0)
            for i in range(first, last):
                j, head, p = table[i, 0], table[i, 1], table[i, 0] * F * E1
                split_keys(lk, table[i, 5], 0, v, table[i, 6], 0, mask, table[i, 7], 0, masked, 1, F, Fp, E_all,
                           FK, NK, top)  # fmt: skip
                split_rows(1, F, lq, table[i, 2], 0, FQ, 0, 0, NQ, 0, 0)
                copy_rows(1, F, gauge, j * F, 0, m, 0, 0)
                raise_gauge(1, Fp, NK, 0, 0, m, 0, 0, turn, 0, 0, m, 0, 0)
                query_rows(1, Fp, FQ, 0, 0, NQ, 0, 0, m, 0, 0, Q, 0, 0, rho, 0, 0)
                key_rows(1, Fp, FK, 0, 0, NK, 0, 0, m, 0, 0, K, 0, 0)
                copy_rows(1, E_all, v, table[i, 6], 0, V, 0, 0)
                V[E_all] = 1
                if masked and not mask[table[i, 7]]:
                    clear_rows(1, E1, V, 0, 0)
                row_dots(1, Fp, Q, 0, 0, K, 0, 0, d, 0, 0)
                step(F, E1, Q, 0, 0, K, 0, 0, V, 0, 0, d, 0, 0, turn, 0, 0, sums, p, E1, rest, p, E1,
                     new_sums, p, E1, new_rest, p, E1, Y, 0, 0)  # fmt: skip
                copy_rows(1, F, m, 0, 0, new_gauge, j * F, 0)
                d[0] = Y[E_all]
                live_divisors(d, 0, 1, den)
                divide_rows(1, E_all, den, 0, 0, Y, 0, 0, out, head * E_all, 0)
                lse[head] = rho[0] * LN2 + math.log(den[0]) if den[0] != 0 else -math.inf
            return

        clear_rows(4 * CHUNK, Fp, Q, 0, Fp)
        none_rows(2 * CHUNK, Fp, NQ, 0, Fp)
        clear_rows(2 * CHUNK, Ep, V, 0, Ep)
        clear_rows(1, Ep, mu, 0, Ep)

        for i in range(first, last):
            j, head = table[i, 0], table[i, 1]
            q_at, k_at, row_at, v_at, mask_at = table[i, 2], table[i, 5], table[i, 6], table[i, 6] + column, table[i, 7]
            same = i > first and table[i - 1, 0] == j  # another query head of the same keys
            if causal or not same:
                load_state(sums, rest, j * F * E1, column, E_all, F, E, E1, cols, S, ZE, Fp)
                none_rows(1, Fp, m, 0, Fp)
                copy_rows(1, F, gauge, j * F, F, m, 0, Fp)
                copy_rows(1, Fp, m, 0, Fp, m_top, 0, Fp)

            if not causal and not same:
                gauge_of_keys(lk, k_at, k_stride, mask, mask_at, mask_stride, masked, M, F, m)
                turn_of(1, Fp, m_top, 0, Fp, m, 0, Fp, turn, 0, Fp)
                turn_features(S, F, S_rows, slices, cols, ZE, Fp, turn)
                copy_rows(1, Fp, m, 0, Fp, m_top, 0, Fp)
                for c in range(0, M, CHUNK):
                    n = min(CHUNK, M - c)
                    split_keys(lk, k_at + c * k_stride, k_stride, v, row_at + c * v_stride, v_stride,
                               mask, mask_at + c * mask_stride, mask_stride, masked, n, F, Fp, E_all,
                               FK, NK, top)  # fmt: skip
                    lay_keys(FK, NK, m, 0, n, Fp, K)
                    lay_values(v, v_at + c * v_stride, v_stride, mu, mask, mask_at + c * mask_stride, mask_stride,
                               masked, 0, n, E, Ep, V)  # fmt: skip
                    collect(n, Fp, K, 0, Fp, ZE, 0, Fp, d, 0, 1)
                    product_add(n, 1, S_rows, slices, cols, S_step, K, 0, Fp, V, 0, Ep, S, cols, 2 * cols)
                    if (c + CHUNK) % SETTLE == 0:
                        settle(slices * S_rows, NV, S, 0, 2 * cols)
                        settle(1, Fp // cols * NV, ZE, 0, 0)
                settle(slices * S_rows, NV, S, 0, 2 * cols)
                settle(1, Fp // cols * NV, ZE, 0, 0)

            for c in range(0, N, CHUNK):
                n = min(CHUNK, N - c)
                split_rows(n, F, lq, q_at + c * q_stride, q_stride, FQ, 0, Fp, NQ, 0, Fp)
                if causal:
                    split_keys(lk, k_at + c * k_stride, k_stride, v, row_at + c * v_stride, v_stride,
                               mask, mask_at + c * mask_stride, mask_stride, masked, n, F, Fp, E_all,
                               FK, NK, top)  # fmt: skip
                    widen(n, Fp, NK, 0, Fp, m_top, 0, 0)
                    a = 0
                    while a < n:
                        b = end_of_span(NK, m, m_top, Fp, a, n, top, most, room, bits)
                        if b == a:  # a span opens
                            raise_gauge(1, Fp, NK, a * Fp, Fp, m, 0, Fp, turn, 0, Fp, m, 0, Fp)
                            turn_features(S, F, S_rows, slices, cols, ZE, Fp, turn)
                            b = end_of_span(NK, m, m_top, Fp, a + 1, n, top, most, room, bits)
                        lay_queries(FQ, NQ, m, a, b, Fp, Q, rho)
                        lay_keys(FK, NK, m, a, b, Fp, K)
                        lay_values(v, v_at + c * v_stride, v_stride, mu, mask, mask_at + c * mask_stride, mask_stride,
                                   masked, a, b, E, Ep, V)  # fmt: skip
                        s = a // T * T
                        w, p = s // T * PAIRS, c + CHUNK
                        pairs(b - s, Fp, True, Q, s * Fp, Fp, K, s * Fp, Fp, ZE, 0, Fp, W, w, 0, d, s, 1)
                        advance(b - s, slices, F, S_step, Q, s * Fp, Fp, K, s * Fp, Fp, V, s * Ep, Ep,
                                S, 0, 2 * cols, W, w, 0, Y, s * Ep, Ep, v, v_at + p * v_stride, v_stride)  # fmt: skip
                        live_divisors(d, a, b, den)
                        p = head * N + c
                        divide_rows(b - a, E, den, a, 1, Y, a * Ep, Ep, out, (p + a) * E_all + column, E_all)
                        for t in range(a, b if left == 0 else a):
                            lse[p + t] = rho[t] * LN2 + math.log(den[t]) if den[t] != 0 else -math.inf
                        a = b
                    if (c + CHUNK) % SETTLE == 0:
                        settle(slices * S_rows, NV, S, 0, 2 * cols)
                        settle(1, Fp // cols * NV, ZE, 0, 0)
                else:
                    lay_queries(FQ, NQ, m, 0, n, Fp, Q, rho)
                    fill_up(n, Fp, Q)
                    row_dots(n, Fp, Q, 0, Fp, ZE, 0, 0, d, 0, 1)
                    product(F, Fp, n, slices, S_step, cols, Q, 0, 1, S, 0, 2 * cols, Y, 0, Ep)
                    live_divisors(d, 0, n, den)
                    p = head * N + c
                    divide_rows(n, E, den, 0, 1, Y, 0, Ep, out, p * E_all + column, E_all)
                    for t in range(n if left == 0 else 0):
                        lse[p + t] = rho[t] * LN2 + math.log(den[t]) if den[t] != 0 else -math.inf

            if not same:
                turn_of(1, Fp, m, 0, Fp, m_top, 0, Fp, turn, 0, Fp)
                turn_features(S, F, S_rows, slices, cols, ZE, Fp, turn)
                settle(slices * S_rows, NV, S, 0, 2 * cols)
                settle(1, Fp // cols * NV, ZE, 0, 0)
                store_state(S, ZE, column, E_all, F, E, E1, cols, Fp, new_sums, new_rest, j * F * E1)
                if left == 0:
                    copy_rows(1, F, m_top, 0, Fp, new_gauge, j * F, F)

    return loglinear_forward


# -- backward ---------------------------------------------------------------------------------------------------


def backward_kernel(salt):
    """The kernel with the salt of its cache key in its closure."""

    def loglinear_backward(
        d_out_array, d_lse, d_state_array, lq_array, lk_array, v_array, mask, sums_array, rest_array, gauge_array,
        d_lq_array, d_lk_array, d_v_array, d_before_array, work_array, marks_array, den_array, h_array,
        table, dims, first, last,
    ):  # fmt: skip
        """Heads first <= i < last: the lines of `loglinear_forward`, last line first; vc = v - mu, G = d_out / den.

        y_t   = P (d_out, vc, K)_t     z_t = sum_{s <= t} K_s
        d_lq  = Q (y - go z) / den     den = Q . z,  go = Q . y / den - d_lse
        d_v_t = P'(K, Q, G)_t          P': s >= t
        d_lk  = K (P'(vc, G, Q) + r)   r_t = sum_{s >= t} h_s Q_s,  h = -go / den
        """
        salt  # noqa: B018
        N, M, F, E = dims[0], dims[1], dims[2], dims[3]
        q_stride, k_stride, v_stride, mask_stride, g_stride, l_stride = (
            dims[4], dims[5], dims[6], dims[7], dims[8], dims[9],
        )  # fmt: skip
        causal, masked, d_state_given = dims[10] == 1, dims[11] == 1, dims[12] == 1
        d_lse_given, centre, most, room = dims[13] == 1, dims[14] == 1, dims[15], dims[16]
        E1, zero = E + 1, work_array.dtype.type(0)
        cols = NV * (N_BYTES // work_array.itemsize)
        S_slices, X_slices = (F + cols - 1) // cols, (E + cols - 1) // cols
        Fp, Ep, S_rows, X_rows = S_slices * cols, X_slices * cols, rows_of_state(E), rows_of_state(F)
        S_step, X_step = S_rows * 2 * cols, X_rows * 2 * cols

        d_out, d_state = pointer(d_out_array), pointer(d_state_array)
        lq, lk, v = pointer(lq_array), pointer(lk_array), pointer(v_array)
        sums, rest, gauge = pointer(sums_array), pointer(rest_array), pointer(gauge_array)
        d_lq, d_lk, d_v = pointer(d_lq_array), pointer(d_lk_array), pointer(d_v_array)
        d_before, marks, den, h = pointer(d_before_array), pointer(marks_array), pointer(den_array), pointer(h_array)
        Q = pointer(work_array)
        K = behind(Q, CHUNK * Fp)
        FQ = behind(K, CHUNK * Fp)
        FK = behind(FQ, CHUNK * Fp)
        NQ = behind(FK, CHUNK * Fp)
        NK = behind(NQ, CHUNK * Fp)
        Y = behind(NK, CHUNK * Fp)
        Z = behind(Y, CHUNK * Fp)
        spans = behind(Z, CHUNK * Fp)
        V = behind(spans, CHUNK * Fp)
        G = behind(V, CHUNK * Ep)
        U = behind(G, CHUNK * Ep)
        d = behind(U, CHUNK * Ep)
        dots = behind(d, CHUNK)
        go = behind(dots, CHUNK)
        share = behind(go, CHUNK)
        rho = behind(share, CHUNK)
        top = behind(rho, CHUNK)
        bits = behind(top, CHUNK)
        ones = behind(bits, CHUNK)
        edges = behind(ones, CHUNK)
        opened = behind(edges, CHUNK)
        W = behind(opened, CHUNK)
        ZE = behind(W, W_SIZE)
        RE = behind(ZE, 2 * Fp)
        m = behind(RE, 2 * Fp)
        m_top = behind(m, Fp)
        turn = behind(m_top, Fp)
        mu = behind(turn, Fp)
        S = behind(mu, Ep)
        X = behind(S, S_slices * S_step)
        clear_rows(4 * CHUNK, Fp, Q, 0, Fp)
        none_rows(2 * CHUNK, Fp, NQ, 0, Fp)
        clear_rows(3 * CHUNK, Fp, Y, 0, Fp)
        clear_rows(3 * CHUNK, Ep, V, 0, Ep)
        clear_rows(1, Ep, mu, 0, Ep)
        for t in range(CHUNK):
            ones[t] = 1

        for i in range(first, last):
            j, head = table[i, 0], table[i, 1]
            q_at, g_at, l_at = table[i, 2], table[i, 3], table[i, 4]
            k_at, v_at, mask_at = table[i, 5], table[i, 6], table[i, 7]
            same = i > first and table[i - 1, 0] == j  # another query head of the same keys: its d_lk, d_v add
            state_at = j * F * E1
            if centre and not same:
                visible_mean(v, v_at, v_stride, M, E, mask, mask_at, mask_stride, masked, dots, mu)

            # sweep 1, forward in time: d_lq, den and h
            load_centred(sums, rest, state_at, F, E, E1, cols, mu, S, ZE, Fp, Ep, X)
            load_cotangent(d_state, d_state_given and not same, state_at, F, E, E1, Ep, cols, mu, X, RE, Fp)
            none_rows(1, Fp, m, 0, Fp)
            copy_rows(1, F, gauge, j * F, F, m, 0, Fp)
            copy_rows(1, Fp, m, 0, Fp, m_top, 0, Fp)
            if not causal:
                gauge_of_keys(lk, k_at, k_stride, mask, mask_at, mask_stride, masked, M, F, m)
                turn_of(1, Fp, m_top, 0, Fp, m, 0, Fp, turn, 0, Fp)
                turn_columns(S, E, S_rows, Fp, cols, turn)
                multiply_rows(2, Fp, ZE, 0, Fp, turn, 0, 0, ZE, 0, Fp)
                copy_rows(1, Fp, m, 0, Fp, m_top, 0, Fp)
                for c in range(0, M, CHUNK):
                    n = min(CHUNK, M - c)
                    split_keys(lk, k_at + c * k_stride, k_stride, v, v_at + c * v_stride, v_stride,
                               mask, mask_at + c * mask_stride, mask_stride, masked, n, F, Fp, E,
                               FK, NK, top)  # fmt: skip
                    lay_keys(FK, NK, m, 0, n, Fp, K)
                    lay_values(v, v_at + c * v_stride, v_stride, mu, mask, mask_at + c * mask_stride, mask_stride,
                               masked, 0, n, E, Ep, V)  # fmt: skip
                    collect(n, Fp, K, 0, Fp, ZE, 0, Fp, dots, 0, 1)
                    product_add(n, 1, S_rows, S_slices, cols, S_step, V, 0, Ep, K, 0, Fp, S, cols, 2 * cols)
                    if (c + CHUNK) % SETTLE == 0:
                        settle(S_slices * S_rows, NV, S, 0, 2 * cols)
                        settle(1, S_slices * NV, ZE, 0, 0)
                settle(S_slices * S_rows, NV, S, 0, 2 * cols)
                settle(1, S_slices * NV, ZE, 0, 0)

            for c in range(0, N, CHUNK):
                n = min(CHUNK, N - c)
                split_rows(n, F, lq, q_at + c * q_stride, q_stride, FQ, 0, Fp, NQ, 0, Fp)
                copy_rows(n, E, d_out, g_at + c * g_stride, g_stride, G, 0, Ep)
                fill_up(n, Ep, G)
                if causal:
                    copy_rows(1, Fp, m, 0, Fp, marks, c // CHUNK * Fp, Fp)
                    split_keys(lk, k_at + c * k_stride, k_stride, v, v_at + c * v_stride, v_stride,
                               mask, mask_at + c * mask_stride, mask_stride, masked, n, F, Fp, E,
                               FK, NK, top)  # fmt: skip
                    widen(n, Fp, NK, 0, Fp, m_top, 0, 0)
                    a = 0
                    while a < n:
                        b = end_of_span(NK, m, m_top, Fp, a, n, top, most, room, bits)
                        if b == a:  # a span opens
                            raise_gauge(1, Fp, NK, a * Fp, Fp, m, 0, Fp, turn, 0, Fp, m, 0, Fp)
                            turn_columns(S, E, S_rows, Fp, cols, turn)
                            multiply_rows(2, Fp, ZE, 0, Fp, turn, 0, 0, ZE, 0, Fp)
                            b = end_of_span(NK, m, m_top, Fp, a + 1, n, top, most, room, bits)
                        lay_queries(FQ, NQ, m, a, b, Fp, Q, rho)
                        lay_keys(FK, NK, m, a, b, Fp, K)
                        lay_values(v, v_at + c * v_stride, v_stride, mu, mask, mask_at + c * mask_stride, mask_stride,
                                   masked, a, b, E, Ep, V)  # fmt: skip
                        s = a // T * T
                        w, p = s // T * PAIRS, c + CHUNK
                        pairs(b - s, Ep, False, G, s * Ep, Ep, V, s * Ep, Ep, ZE, 0, Fp, W, w, 0, d, s, 1)
                        # rows of earlier spans are done: what their block writes over them is not read again
                        advance(b - s, S_slices, E, S_step, G, s * Ep, Ep, V, s * Ep, Ep, K, s * Fp, Fp,
                                S, 0, 2 * cols, W, w, 0, Y, s * Fp, Fp,
                                v, v_at + p * v_stride, v_stride, d_out, g_at + p * g_stride, g_stride)  # fmt: skip
                        clear_rows(b - a, Fp, Z, a * Fp, Fp)
                        add_seen(b - a, Fp, K, a * Fp, Fp, ZE, 0, Fp, ones, 0, 1, Z, a * Fp, Fp)
                        finish_queries(a, b, F, Fp, Q, Y, Z, a * Fp, Fp, d_lse, d_lse_given,
                                       l_at + c * l_stride, l_stride, d, dots, go, share, den, h, c,
                                       d_lq, (head * N + c) * F)  # fmt: skip
                        a = b
                    if (c + CHUNK) % SETTLE == 0:
                        settle(S_slices * S_rows, NV, S, 0, 2 * cols)
                        settle(1, S_slices * NV, ZE, 0, 0)
                else:
                    lay_queries(FQ, NQ, m, 0, n, Fp, Q, rho)
                    fill_up(n, Fp, Q)
                    product(E, Ep, n, S_slices, S_step, cols, G, 0, 1, S, 0, 2 * cols, Y, 0, Fp)
                    finish_queries(0, n, F, Fp, Q, Y, ZE, 0, 0, d_lse, d_lse_given, l_at + c * l_stride, l_stride,
                                   d, dots, go, share, den, h, c, d_lq, (head * N + c) * F)  # fmt: skip
                    lay_cotangents(d_out, g_at + c * g_stride, g_stride, behind(den, c), 0, n, E, Ep, G)
                    collect_weighted(n, Fp, Q, 0, Fp, RE, 0, Fp, h, c, 1)
                    product_add(n, 1, X_rows, X_slices, cols, X_step, Q, 0, Fp, G, 0, Ep, X, cols, 2 * cols)
                    if (c + CHUNK) % SETTLE == 0:
                        settle(X_slices * X_rows, NV, X, 0, 2 * cols)
                        settle(1, S_slices * NV, RE, 0, 0)

            # sweep 2, backward in time: d_lk and d_v; the outgoing state's cotangent stands at the gauge of all keys
            turn_of(1, Fp, m, 0, Fp, m_top, 0, Fp, turn, 0, Fp)
            turn_features(X, F, X_rows, X_slices, cols, RE, Fp, turn)
            settle(X_slices * X_rows, NV, X, 0, 2 * cols)
            settle(1, S_slices * NV, RE, 0, 0)
            transpose_state(X, F, E, Fp, cols, S)
            for c in range((M - 1) // CHUNK * CHUNK, -1, -CHUNK):
                n = min(CHUNK, M - c)
                split_keys(lk, k_at + c * k_stride, k_stride, v, v_at + c * v_stride, v_stride,
                           mask, mask_at + c * mask_stride, mask_stride, masked, n, F, Fp, E, FK, NK, top)  # fmt: skip
                if causal:
                    split_rows(n, F, lq, q_at + c * q_stride, q_stride, FQ, 0, Fp, NQ, 0, Fp)
                    # the spans of this chunk, again; where one opens, earlier tokens have another gauge
                    copy_rows(1, Fp, marks, c // CHUNK * Fp, Fp, spans, 0, Fp)
                    copy_rows(1, Fp, spans, 0, Fp, m_top, 0, Fp)
                    widen(n, Fp, NK, 0, Fp, m_top, 0, 0)
                    n_spans, b = 0, 0
                    while b < n:
                        a, here = b, n_spans * Fp
                        if n_spans:
                            copy_rows(1, Fp, spans, here - Fp, Fp, spans, here, Fp)
                        edges[n_spans], opened[n_spans] = a, 0
                        b = end_of_span(NK, behind(spans, here), m_top, Fp, a, n, top, most, room, bits)
                        if b == a:
                            opened[n_spans] = 1
                            raise_gauge(1, Fp, NK, a * Fp, Fp, spans, here, Fp, turn, 0, Fp, spans, here, Fp)
                            b = end_of_span(NK, behind(spans, here), m_top, Fp, a + 1, n, top, most, room, bits)
                        n_spans += 1
                    b = n
                    for k in range(n_spans - 1, -1, -1):
                        a = int(edges[k])
                        copy_rows(1, Fp, spans, k * Fp, Fp, m, 0, Fp)
                        lay_keys(FK, NK, m, a, b, Fp, K)
                        lay_values(v, v_at + c * v_stride, v_stride, mu, mask, mask_at + c * mask_stride, mask_stride,
                                   masked, a, b, E, Ep, V)  # fmt: skip
                        lay_cotangents(d_out, g_at + c * g_stride, g_stride, behind(den, c), a, b, E, Ep, G)
                        lay_queries(FQ, NQ, m, a, b, Fp, Q, rho)
                        s = a // T * T
                        w, p = s // T * PAIRS, max(0, c - CHUNK)
                        pairs_back(b - s, Fp, False, K, s * Fp, Fp, Q, s * Fp, Fp, RE, 0, Fp, W, w, 0, d, s, 1)
                        retreat(b - s, X_slices, F, X_step, K, s * Fp, Fp, Q, s * Fp, Fp, G, s * Ep, Ep,
                                X, 0, 2 * cols, W, w, 0, U, s * Ep, Ep,
                                v, v_at + p * v_stride, v_stride, d_out, g_at + p * g_stride, g_stride)  # fmt: skip
                        pairs_back(b - s, Ep, False, V, s * Ep, Ep, G, s * Ep, Ep, RE, 0, Fp, W, w, 0, d, s, 1)
                        retreat(b - s, S_slices, E, S_step, V, s * Ep, Ep, G, s * Ep, Ep, Q, s * Fp, Fp,
                                S, 0, 2 * cols, W, w, 0, Y, s * Fp, Fp)  # fmt: skip
                        add_later(b - a, Fp, Q, a * Fp, Fp, RE, 0, Fp, h, c + a, 1, Y, a * Fp, Fp)
                        finish_keys(a, b, F, Fp, E, Ep, K, Y, U, same, d_lk, d_v, j * M + c)
                        if opened[k] == 1:
                            if k:
                                copy_rows(1, Fp, spans, (k - 1) * Fp, Fp, m_top, 0, Fp)
                            else:
                                copy_rows(1, Fp, marks, c // CHUNK * Fp, Fp, m_top, 0, Fp)
                            turn_of(1, Fp, m_top, 0, Fp, m, 0, Fp, turn, 0, Fp)
                            turn_columns(S, E, S_rows, Fp, cols, turn)
                            turn_features(X, F, X_rows, X_slices, cols, RE, Fp, turn)
                            copy_rows(1, Fp, m_top, 0, Fp, m, 0, Fp)
                        b = a
                    if c % SETTLE == 0:
                        settle(X_slices * X_rows, NV, X, 0, 2 * cols)
                        settle(S_slices * S_rows, NV, S, 0, 2 * cols)
                        settle(1, S_slices * NV, RE, 0, 0)
                else:
                    lay_keys(FK, NK, m, 0, n, Fp, K)
                    fill_up(n, Fp, K)
                    lay_values(v, v_at + c * v_stride, v_stride, mu, mask, mask_at + c * mask_stride, mask_stride,
                               masked, 0, n, E, Ep, V)  # fmt: skip
                    fill_up(n, Ep, V)
                    product(F, Fp, n, X_slices, X_step, cols, K, 0, 1, X, 0, 2 * cols, U, 0, Ep)
                    product(E, Ep, n, S_slices, S_step, cols, V, 0, 1, S, 0, 2 * cols, Y, 0, Fp)
                    add_rows(n, Fp, RE, 0, 0, Y, 0, Fp, Y, 0, Fp)
                    finish_keys(0, n, F, Fp, E, Ep, K, Y, U, same, d_lk, d_v, j * M + c)
                if masked:
                    p = j * M + c
                    hide(mask, mask_at + c * mask_stride, mask_stride, n, behind(d_lk, p * F), F)
                    hide(mask, mask_at + c * mask_stride, mask_stride, n, behind(d_v, p * E), E)
            if not causal:
                none_rows(1, Fp, m_top, 0, Fp)
                copy_rows(1, F, gauge, j * F, F, m_top, 0, Fp)
                turn_of(1, Fp, m_top, 0, Fp, m, 0, Fp, turn, 0, Fp)
                turn_features(X, F, X_rows, X_slices, cols, RE, Fp, turn)
            settle(X_slices * X_rows, NV, X, 0, 2 * cols)
            settle(1, S_slices * NV, RE, 0, 0)
            store_cotangent(X, F, E, E1, cols, mu, zero, d_before, state_at, same)
            for f in range(F):
                d_before[state_at + f * E1 + E] += RE[f]

    return loglinear_backward
