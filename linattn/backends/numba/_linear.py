"""The kernels of the linear engine. Definition: backends/reference/linear.py.

Names. F: rows of a state, n_sums * D features with the turns multiplied in ([cos phi, sin phi] or phi).
A state is cut into slices of COLS columns; a row of a slice is [S | E], COLS sums and COLS of what they are owed.
Scratch rows are padded with zeros: Fp, Ep are F and E up to whole slices.

    table[i]   what one query head reads: its first elements, sorted by the head of k and v; columns: _layout.py
    dims       sizes, strides and switches, in the order the kernels unpack them
"""

from __future__ import annotations

from ._layout import SAFE
from ._maps import map_rows, row_powers, unmap_rows, unmap_rows_add
from ._products import PAIRS, advance, pairs, pairs_back, product, product_add, retreat, settle
from ._prologues import den_cotangents, divisors, features, fill_up, hide, hide_part, query_features
from ._rows import (
    add_later,
    add_rows,
    add_seen,
    centre_rows,
    clear_rows,
    collect,
    collect_weighted,
    copy_rows,
    divide_rows,
    row_dots,
    scale_rows_add,
    step,
    turn_rows,
    unturn_rows,
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
from ._tiles import CHUNK, SETTLE, TILE
from ._vector import behind, pointer, select_pointer, stored_alike

__all__ = ["D_K", "D_Q", "D_V", "backward_kernel", "forward_kernel", "scratch_size"]

T, NV, N_BYTES = TILE.tokens, TILE.vectors, TILE.n_bytes
W_SIZE = CHUNK // T * PAIRS
D_Q, D_V, D_K = 1, 2, 4  # what a call of the backward kernel makes


def scratch_size(n_features: int, n_values: int, columns: int) -> int:
    """Numbers of scratch the kernels carve, the larger of both; a call without a column has a slice all the same."""
    features, values = (max(1, -(-n // columns)) * columns for n in (n_features, n_values))
    states = 2 * columns * (features // columns * rows_of(n_values) + values // columns * rows_of(n_features))
    return CHUNK * (3 * features + 3 * values + 5) + states + 5 * features + 2 * values + W_SIZE


# -- forward ----------------------------------------------------------------------------------------------------


def forward_kernel(salt):
    """The kernel with the salt of its cache key in its closure."""

    def linear_forward(
        q_array, k_array, v_array, mask, turn_q_array, turn_k_array, sums_array, rest_array,
        out_array, den_array, new_sums_array, new_rest_array, work_array, table, dims, eps, first, last, left, right,
    ):  # fmt: skip
        """Heads first <= i < last, slices left <= n < right of the values' columns: out, den, the state after all keys.

        past  n_t = Q_t S + sum_{j <= t} (Q_t . K_j) v_j      S += K^T v     block by block
        all   S += K^T v over all keys, then n_t = Q_t S
        """
        salt  # noqa: B018
        N, M, D, E_all, F, E1 = dims[0], dims[1], dims[2], dims[3], dims[4], dims[5]
        q_stride, k_stride, v_stride, mask_stride = dims[6], dims[7], dims[8], dims[9]
        turn_q_stride, turn_k_stride = dims[10], dims[11]
        which, causal, normalize, mode, masked = dims[13], dims[14] == 1, dims[15] == 1, dims[16], dims[17] == 1
        eps = work_array.dtype.type(eps)
        scaled = normalize and mode == SAFE
        cols = NV * (N_BYTES // work_array.itemsize)
        Fp, slices, S_rows = (F + cols - 1) // cols * cols, right - left, rows_of_state(F)
        E, Ep, column = min(E_all, right * cols) - left * cols, slices * cols, left * cols
        S_step = S_rows * 2 * cols

        q, k, v, out = pointer(q_array), pointer(k_array), pointer(v_array), pointer(out_array)
        turn_q, turn_k = pointer(turn_q_array), pointer(turn_k_array)
        sums, rest = pointer(sums_array), pointer(rest_array)
        new_sums, new_rest, den = pointer(new_sums_array), pointer(new_rest_array), pointer(den_array)
        Q = pointer(work_array)
        K = behind(Q, CHUNK * Fp)
        V = behind(K, CHUNK * Fp)
        Y = behind(V, CHUNK * Ep)
        d = behind(Y, CHUNK * Ep)
        c_of = behind(d, CHUNK)
        power = behind(c_of, CHUNK)
        W = behind(power, CHUNK)
        ZE = behind(W, W_SIZE)
        S = behind(ZE, 2 * Fp)
        if N == 1 and M == 1:  # a decoding step: straight from state to state
            clear_rows(2, Fp, Q, 0, CHUNK * Fp)
            for i in range(first, last):
                j, head = table[i, 0], table[i, 1]
                map_rows(which, 1, D, q, table[i, 2], 0, Q, Fp)
                map_rows(which, 1, D, k, table[i, 5], 0, K, Fp)
                copy_rows(1, E, v, table[i, 6], 0, V, 0, 0)
                V[E] = 1
                if masked and not mask[table[i, 7]]:
                    clear_rows(1, D, K, 0, 0)
                    clear_rows(1, E1, V, 0, 0)
                if scaled:
                    row_powers(1, D, Q, 0, 0, power, 0, 0)
                if F > D:
                    turn_rows(1, D, turn_q, table[i, 3], 0, turn_q, table[i, 3] + 1, 0, Q, 0, 0, Q, 0, 0, Q, D, 0)
                    turn_rows(1, D, turn_k, table[i, 8], 0, turn_k, table[i, 8] + 1, 0, K, 0, 0, K, 0, 0, K, D, 0)
                row_dots(1, Fp, Q, 0, 0, K, 0, 0, d, 0, 0)
                p = j * F * E1
                step(F, E1, Q, 0, 0, K, 0, 0, V, 0, 0, d, 0, 0, sums, p, E1, rest, p, E1,
                     new_sums, p, E1, new_rest, p, E1, Y, 0, 0)  # fmt: skip
                if normalize:
                    den[head] = Y[E]
                    divisors(den, head, 1, mode, eps, c_of)
                    divide_rows(1, E, c_of, 0, 0, Y, 0, 0, out, head * E, 0)
                else:
                    copy_rows(1, E, Y, 0, 0, out, head * E, 0)
            return

        clear_rows(2 * CHUNK, Fp, Q, 0, Fp)
        clear_rows(CHUNK, Ep, V, 0, Ep)

        for i in range(first, last):
            j, head = table[i, 0], table[i, 1]
            q_at, k_at, v_at, mask_at = table[i, 2], table[i, 5], table[i, 6] + column, table[i, 7]
            turn_q_at, turn_k_at = table[i, 3], table[i, 8]
            same = i > first and table[i - 1, 0] == j  # another query head of the same keys
            if causal or not same:
                load_state(sums, rest, j * F * E1, column, E_all, F, E, E1, cols, S, ZE, Fp)

            if not causal and not same:
                for c in range(0, M, CHUNK):
                    n = min(CHUNK, M - c)
                    features(k, k_at + c * k_stride, k_stride, n, D, F, Fp, which,
                             turn_k, turn_k_at + c * turn_k_stride, turn_k_stride, K)  # fmt: skip
                    copy_rows(n, E, v, v_at + c * v_stride, v_stride, V, 0, Ep)
                    if masked:
                        hide(mask, mask_at + c * mask_stride, mask_stride, n, K, Fp)
                        hide(mask, mask_at + c * mask_stride, mask_stride, n, V, Ep)
                    if normalize:
                        collect(n, Fp, K, 0, Fp, ZE, 0, Fp, d, 0, 1)
                    product_add(n, 1, S_rows, slices, cols, S_step, K, 0, Fp, V, 0, Ep, S, cols, 2 * cols)
                    if (c + CHUNK) % SETTLE == 0:
                        settle(slices * S_rows, NV, S, 0, 2 * cols)
                        settle(1, Fp // cols * NV, ZE, 0, 0)
                settle(slices * S_rows, NV, S, 0, 2 * cols)
                settle(1, Fp // cols * NV, ZE, 0, 0)

            for c in range(0, N, CHUNK):
                n = min(CHUNK, N - c)
                query_features(q, q_at + c * q_stride, q_stride, n, D, F, Fp, which, scaled,
                               turn_q, turn_q_at + c * turn_q_stride, turn_q_stride, Q, power)  # fmt: skip
                if causal:
                    features(k, k_at + c * k_stride, k_stride, n, D, F, Fp, which,
                             turn_k, turn_k_at + c * turn_k_stride, turn_k_stride, K)  # fmt: skip
                    direct = stored_alike(v, V) and not masked and n == CHUNK and Ep == E
                    if not direct:
                        copy_rows(n, E, v, v_at + c * v_stride, v_stride, V, 0, Ep)
                        fill_up(n, Ep, V)
                    if masked:
                        hide(mask, mask_at + c * mask_stride, mask_stride, n, K, Fp)
                        hide(mask, mask_at + c * mask_stride, mask_stride, n, V, Ep)
                    values = select_pointer(direct, v, V)
                    values_at, values_stride = (v_at + c * v_stride, v_stride) if direct else (0, Ep)
                    pairs(n, Fp, normalize, Q, 0, Fp, K, 0, Fp, ZE, 0, Fp, W, 0, 0, d, 0, 1)
                    advance(n, slices, F, S_step, Q, 0, Fp, K, 0, Fp, values, values_at, values_stride,
                            S, 0, 2 * cols, W, 0, 0, Y, 0, Ep,
                            q, q_at + (c + CHUNK) * q_stride, q_stride, k, k_at + (c + CHUNK) * k_stride, k_stride,
                            v, v_at + (c + CHUNK) * v_stride, v_stride,
                            out, (head * N + c) * E_all + column, E_all)  # fmt: skip
                    if (c + CHUNK) % SETTLE == 0:
                        settle(slices * S_rows, NV, S, 0, 2 * cols)
                        settle(1, Fp // cols * NV, ZE, 0, 0)
                else:
                    if normalize:
                        row_dots(n, Fp, Q, 0, Fp, ZE, 0, 0, d, 0, 1)
                    product(F, Fp, n, slices, S_step, cols, Q, 0, 1, S, 0, 2 * cols, Y, 0, Ep)

                p = head * N + c
                if normalize:
                    if left == 0:
                        for t in range(n):
                            den[p + t] = d[t]
                    divisors(d, 0, n, mode, eps, c_of)
                    divide_rows(n, E, c_of, 0, 1, Y, 0, Ep, out, p * E_all + column, E_all)
                else:
                    copy_rows(n, E, Y, 0, Ep, out, p * E_all + column, E_all)

            if not same:
                settle(slices * S_rows, NV, S, 0, 2 * cols)
                settle(1, Fp // cols * NV, ZE, 0, 0)
                store_state(S, ZE, column, E_all, F, E, E1, cols, Fp, new_sums, new_rest, j * F * E1)

    return linear_forward


# -- backward ---------------------------------------------------------------------------------------------------


def backward_kernel(salt):
    """The kernel with the salt of its cache key in its closure."""

    def linear_backward(
        d_out_array, d_state_array, q_array, k_array, v_array, mask, turn_q_array, turn_k_array,
        sums_array, rest_array, den_array, d_q_array, d_k_array, d_v_array, d_before_array,
        work_array, h_array, table, dims, eps, first, last, tasks, left, right,
    ):  # fmt: skip
        """Heads first <= i < last: the lines of `linear_forward`, last line first; vc = v - mu, G = d_out / c.

        Of the three `tasks` D_Q makes d_q and h, D_V makes d_v and most of the state's cotangent, and D_K, which
        needs both to be done, makes d_k: all of it, or slices left <= n < right of its columns if there are no turns.

        dq~_t  = P (G, vc, K)_t            h_t = cotangent of den_t
        d_fq_t = dq~_t + h_t z_t           z_t = sum_{s <= t} K_s
        d_v_t  = P'(K, Q, G)_t             P': s >= t
        d_fk_t = P'(vc, G, Q)_t + r_t      r_t = sum_{s >= t} h_s Q_s
        """
        salt  # noqa: B018
        N, M, D, E, F, E1 = dims[0], dims[1], dims[2], dims[3], dims[4], dims[5]
        q_stride, k_stride, v_stride, mask_stride = dims[6], dims[7], dims[8], dims[9]
        turn_q_stride, turn_k_stride, g_stride = dims[10], dims[11], dims[12]
        which, causal, normalize, mode, masked = dims[13], dims[14] == 1, dims[15] == 1, dims[16], dims[17] == 1
        d_state_given = dims[18] == 1
        eps = work_array.dtype.type(eps)
        one, zero = work_array.dtype.type(1), work_array.dtype.type(0)
        scaled = normalize and mode == SAFE
        cols = NV * (N_BYTES // work_array.itemsize)
        S_slices, X_slices = (F + cols - 1) // cols, (E + cols - 1) // cols
        column, width = left * cols, min(D, right * cols) - left * cols  # of d_k
        make_q, make_v, make_k = tasks & D_Q != 0, tasks & D_V != 0, tasks & D_K != 0
        Fp, Ep, S_rows, X_rows = S_slices * cols, X_slices * cols, rows_of_state(E), rows_of_state(F)
        S_step, X_step = S_rows * 2 * cols, X_rows * 2 * cols

        d_out, d_state = pointer(d_out_array), pointer(d_state_array)
        q, k, v = pointer(q_array), pointer(k_array), pointer(v_array)
        turn_q, turn_k = pointer(turn_q_array), pointer(turn_k_array)
        sums, rest = pointer(sums_array), pointer(rest_array)
        d_q, d_k, d_v = pointer(d_q_array), pointer(d_k_array), pointer(d_v_array)
        d_before, den, h = pointer(d_before_array), pointer(den_array), pointer(h_array)
        Q = pointer(work_array)
        K = behind(Q, CHUNK * Fp)
        Y = behind(K, CHUNK * Fp)
        V = behind(Y, CHUNK * Fp)
        G = behind(V, CHUNK * Ep)
        U = behind(G, CHUNK * Ep)
        c_of = behind(U, CHUNK * Ep)
        power = behind(c_of, CHUNK)
        dots = behind(power, CHUNK)
        shifts = behind(dots, CHUNK)
        unit = behind(shifts, CHUNK)
        W = behind(unit, CHUNK)
        ZE = behind(W, W_SIZE)
        RE = behind(ZE, 2 * Fp)
        mu = behind(RE, 2 * Fp)
        S = behind(mu, Ep)
        X = behind(S, Fp // cols * S_rows * 2 * cols)
        clear_rows(2 * CHUNK, Fp, Q, 0, Fp)
        clear_rows(2 * CHUNK, Ep, V, 0, Ep)
        clear_rows(1, Ep, mu, 0, Ep)
        unit[0] = one

        for i in range(first, last):
            j, head = table[i, 0], table[i, 1]
            q_at, k_at, v_at, mask_at = table[i, 2], table[i, 5], table[i, 6], table[i, 7]
            turn_q_at, turn_k_at, g_at = table[i, 3], table[i, 8], table[i, 4]
            same = i > first and table[i - 1, 0] == j  # another query head of the same keys: its d_k, d_v add
            state_at, den_at = j * F * E1, head * N
            if normalize and not same:
                visible_mean(v, v_at, v_stride, M, E, mask, mask_at, mask_stride, masked, dots, mu)
            # sweep 1, forward in time: d_q and h
            if make_q:
                load_centred(sums, rest, state_at, F, E, E1, cols, mu, S, ZE, Fp, Ep, X)
            load_cotangent(d_state, d_state_given and not same, state_at, F, E, E1, Ep, cols, mu, X, RE, Fp)
            if make_q and not causal:
                for c in range(0, M, CHUNK):
                    n = min(CHUNK, M - c)
                    features(k, k_at + c * k_stride, k_stride, n, D, F, Fp, which,
                             turn_k, turn_k_at + c * turn_k_stride, turn_k_stride, K)  # fmt: skip
                    centre_rows(n, E, v, v_at + c * v_stride, v_stride, mu, 0, 0, V, 0, Ep)
                    if masked:
                        hide(mask, mask_at + c * mask_stride, mask_stride, n, K, Fp)
                        hide(mask, mask_at + c * mask_stride, mask_stride, n, V, Ep)
                    if normalize:
                        collect(n, Fp, K, 0, Fp, ZE, 0, Fp, dots, 0, 1)
                    product_add(n, 1, S_rows, S_slices, cols, S_step, V, 0, Ep, K, 0, Fp, S, cols, 2 * cols)
                    if (c + CHUNK) % SETTLE == 0:
                        settle(S_slices * S_rows, NV, S, 0, 2 * cols)
                        settle(1, S_slices * NV, ZE, 0, 0)
                settle(S_slices * S_rows, NV, S, 0, 2 * cols)
                settle(1, S_slices * NV, ZE, 0, 0)

            for c in range(0, N if make_q else 0, CHUNK):
                n = min(CHUNK, N - c)
                if normalize:
                    divisors(den, den_at + c, n, mode, eps, c_of)
                    divide_rows(n, E, c_of, 0, 1, d_out, g_at + c * g_stride, g_stride, G, 0, Ep)
                else:
                    copy_rows(n, E, d_out, g_at + c * g_stride, g_stride, G, 0, Ep)
                fill_up(n, Ep, G)
                query_features(q, q_at + c * q_stride, q_stride, n, D, F, Fp, which, scaled,
                               turn_q, turn_q_at + c * turn_q_stride, turn_q_stride, Q, power)  # fmt: skip
                if causal:
                    features(k, k_at + c * k_stride, k_stride, n, D, F, Fp, which,
                             turn_k, turn_k_at + c * turn_k_stride, turn_k_stride, K)  # fmt: skip
                    centre_rows(n, E, v, v_at + c * v_stride, v_stride, mu, 0, 0, V, 0, Ep)
                    fill_up(n, Ep, V)
                    if masked:
                        hide(mask, mask_at + c * mask_stride, mask_stride, n, K, Fp)
                        hide(mask, mask_at + c * mask_stride, mask_stride, n, V, Ep)
                    pairs(n, Ep, False, G, 0, Ep, V, 0, Ep, ZE, 0, Fp, W, 0, 0, dots, 0, 1)
                    p = c + CHUNK
                    advance(n, S_slices, E, S_step, G, 0, Ep, V, 0, Ep, K, 0, Fp, S, 0, 2 * cols, W, 0, 0, Y, 0, Fp,
                            q, q_at + p * q_stride, q_stride, k, k_at + p * k_stride, k_stride,
                            v, v_at + p * v_stride, v_stride, d_out, g_at + p * g_stride, g_stride,
                            d_q, (den_at + c) * D, D)  # fmt: skip
                    if (c + CHUNK) % SETTLE == 0:
                        settle(S_slices * S_rows, NV, S, 0, 2 * cols)
                else:
                    product(E, Ep, n, S_slices, S_step, cols, G, 0, 1, S, 0, 2 * cols, Y, 0, Fp)
                if normalize:
                    row_dots(n, Fp, Q, 0, Fp, Y, 0, Fp, dots, 0, 1)
                    if mode != SAFE:
                        row_dots(n, Ep, G, 0, Ep, mu, 0, 0, shifts, 0, 1)
                    den_cotangents(dots, den, den_at + c, n, mode, eps, shifts, c_of, behind(h, c))
                    if causal:
                        add_seen(n, Fp, K, 0, Fp, ZE, 0, Fp, h, c, 1, Y, 0, Fp)
                        if (c + CHUNK) % SETTLE == 0:
                            settle(1, S_slices * NV, ZE, 0, 0)
                    else:
                        collect_weighted(n, Fp, Q, 0, Fp, RE, 0, Fp, h, c, 1)
                        scale_rows_add(n, Fp, h, c, 1, ZE, 0, 0, Y, 0, Fp, Y, 0, Fp)
                if F > D:
                    p = turn_q_at + c * turn_q_stride
                    unturn_rows(n, D, turn_q, p, turn_q_stride, turn_q, p + 1, turn_q_stride,
                                Y, 0, Fp, Y, D, Fp, Y, 0, Fp)  # fmt: skip
                if scaled:
                    unmap_rows(which, n, D, power, 1, q, q_at + c * q_stride, q_stride, Y, Fp, d_q, (den_at + c) * D, D)
                else:
                    unmap_rows(which, n, D, unit, 0, q, q_at + c * q_stride, q_stride, Y, Fp, d_q, (den_at + c) * D, D)
                if not causal:
                    product_add(n, 1, X_rows, X_slices, cols, X_step, Q, 0, Fp, G, 0, Ep, X, cols, 2 * cols)
                    if (c + CHUNK) % SETTLE == 0:
                        settle(X_slices * X_rows, NV, X, 0, 2 * cols)
                        settle(1, S_slices * NV, RE, 0, 0)

            # sweep 2, backward in time: d_v and d_k
            if make_q and not causal:
                settle(X_slices * X_rows, NV, X, 0, 2 * cols)
                settle(1, S_slices * NV, RE, 0, 0)
            transpose_state(X, F, E, Fp, cols, S)
            for c in range((M - 1) // CHUNK * CHUNK if make_v or make_k else -1, -1, -CHUNK):
                n = min(CHUNK, M - c)
                features(k, k_at + c * k_stride, k_stride, n, D, F, Fp, which,
                         turn_k, turn_k_at + c * turn_k_stride, turn_k_stride, K)  # fmt: skip
                centre_rows(n, E, v, v_at + c * v_stride, v_stride, mu, 0, 0, V, 0, Ep)
                fill_up(n, Ep, V)
                if masked:
                    hide(mask, mask_at + c * mask_stride, mask_stride, n, K, Fp)
                    hide(mask, mask_at + c * mask_stride, mask_stride, n, V, Ep)
                if causal:
                    if normalize:
                        divisors(den, den_at + c, n, mode, eps, c_of)
                        divide_rows(n, E, c_of, 0, 1, d_out, g_at + c * g_stride, g_stride, G, 0, Ep)
                    else:
                        copy_rows(n, E, d_out, g_at + c * g_stride, g_stride, G, 0, Ep)
                    fill_up(n, Ep, G)
                    query_features(q, q_at + c * q_stride, q_stride, n, D, F, Fp, which, scaled,
                                   turn_q, turn_q_at + c * turn_q_stride, turn_q_stride, Q, power)  # fmt: skip
                    p = max(0, c - CHUNK)
                    if make_v:
                        pairs_back(n, Fp, False, K, 0, Fp, Q, 0, Fp, RE, 0, Fp, W, 0, 0, dots, 0, 1)
                        retreat(n, X_slices, F, X_step, K, 0, Fp, Q, 0, Fp, G, 0, Ep, X, 0, 2 * cols, W, 0, 0,
                                U, 0, Ep, v, v_at + p * v_stride, v_stride,
                                d_out, g_at + p * g_stride, g_stride, d_v, (j * M + c) * E, E)  # fmt: skip
                    if make_k:
                        pairs_back(n, Ep, False, V, 0, Ep, G, 0, Ep, RE, 0, Fp, W, 0, 0, dots, 0, 1)
                        retreat(n, right - left, E, S_step, V, 0, Ep, G, 0, Ep, Q, column, Fp,
                                S, left * S_step, 2 * cols, W, 0, 0, Y, column, Fp,
                                q, q_at + p * q_stride, q_stride, k, k_at + p * k_stride, k_stride,
                                d_k, (j * M + c) * D + column, D)  # fmt: skip
                        if normalize:
                            add_later(n, (right - left) * cols, Q, column, Fp, RE, column, Fp, h, c, 1,
                                      Y, column, Fp)  # fmt: skip
                    if c % SETTLE == 0:
                        settle(X_slices * X_rows, NV, X, 0, 2 * cols)
                        settle(S_slices * S_rows, NV, S, 0, 2 * cols)
                        settle(1, S_slices * NV, RE, 0, 0)
                else:
                    product(F, Fp, n, X_slices, X_step, cols, K, 0, 1, X, 0, 2 * cols, U, 0, Ep)
                    product(E, Ep, n, S_slices, S_step, cols, V, 0, 1, S, 0, 2 * cols, Y, 0, Fp)
                    if normalize:
                        add_rows(n, Fp, RE, 0, 0, Y, 0, Fp, Y, 0, Fp)
                if make_k:
                    if F > D:
                        p = turn_k_at + c * turn_k_stride
                        unturn_rows(n, D, turn_k, p, turn_k_stride, turn_k, p + 1, turn_k_stride,
                                    Y, 0, Fp, Y, D, Fp, Y, 0, Fp)  # fmt: skip
                    p, y, k_here = (j * M + c) * D + column, behind(Y, column), k_at + c * k_stride + column
                    if same:
                        unmap_rows_add(which, n, width, unit, 0, k, k_here, k_stride, y, Fp, d_k, p, D)
                    else:
                        unmap_rows(which, n, width, unit, 0, k, k_here, k_stride, y, Fp, d_k, p, D)
                    if masked:
                        hide_part(mask, mask_at + c * mask_stride, mask_stride, n, width, d_k, p, D)
                if make_v:
                    p = (j * M + c) * E
                    if same:
                        add_rows(n, E, U, 0, Ep, d_v, p, E, d_v, p, E)
                    else:
                        copy_rows(n, E, U, 0, Ep, d_v, p, E)
                    if masked:
                        hide_part(mask, mask_at + c * mask_stride, mask_stride, n, E, d_v, p, E)
            if make_v:
                settle(X_slices * X_rows, NV, X, 0, 2 * cols)
                store_cotangent(X, F, E, E1, cols, mu, zero, d_before, state_at, same)
            if make_k and normalize:
                settle(1, S_slices * NV, RE, 0, 0)
                for f in range(column, F if F > D else column + width):
                    d_before[state_at + f * E1 + E] += RE[f]

    return linear_backward
