"""The kernels of the log-linear engine. Definition: backends/reference/loglinear.py; logarithms and gauges: _logs.py.

A gauge m is held over a span of tokens: phi_q = fq 2^(nq + m - rho), phi_k = fk 2^(nk - m), and inside the span all is
as in the linear engine, whose states and tiles these kernels use (_linear.py, _vector.py). A token whose log-feature
exceeds the gauge by too much opens a new span: m rises to it, and the sums are multiplied by powers of two, exactly.
The gauge of a token depends on earlier tokens and on itself only. A state is handed on in the gauge of all its keys.

Blocks of T tokens keep their places when a span begins inside one: the block is run once for each span, with zeros for
the tokens of the others, so that no product changes its order.
"""

from __future__ import annotations

import math

from ._jit import helper
from ._linear import (
    BLOCK,
    N_BYTES,
    NV,
    ROWS,
    T,
    add_cotangent,
    add_row,
    add_rows,
    clear,
    deliver_row,
    divided_row,
    dot,
    load_centred,
    load_cotangent,
    load_state,
    store_state,
    transpose_state,
    visible_mean,
)
from ._logs import (
    NONE,
    first_excess,
    key_row,
    query_row,
    raise_gauge,
    row_limit,
    same_gauge,
    split_row,
    turn_columns,
    turn_rows,
    turned,
    widen_gauge,
    widen_gauge_rows,
)
from ._maps import copy_row
from ._tiles import CHUNK
from ._vector import advance, denominators, gather, product, retreat, scores, scores_back

__all__ = ["backward_kernel", "forward_kernel", "integers", "scratch_size"]

LN2 = math.log(2)


def scratch_size(n_features: int, n_values: int, columns: int) -> int:
    """Numbers of scratch the kernels carve, the larger of both."""
    features, values = (-(-n // columns) * columns for n in (n_features, n_values))
    return CHUNK * (5 * features + 3 * values + 2 * T + 1) + 4 * features * values + 5 * features + values


def integers(n_features: int, columns: int) -> int:
    """The same for integers."""
    features = -(-n_features // columns) * columns
    return (3 * CHUNK + 3) * features + 3 * CHUNK + 1


# -- prologues --------------------------------------------------------------------------------------------------


@helper
def fill_none(n):
    for i in range(n.size):
        n[i] = NONE


@helper
def split_rows(x, at, stride, count, F, Fp, f, n):
    """A chunk of logarithms into scratch; the columns from F on keep what they have."""
    for t in range(count):
        start = at + t * stride
        split_row(x[start : start + F], f[t * Fp : t * Fp + F], n[t * Fp : t * Fp + F])


@helper
def split_keys(lk, at, stride, v, v_at, v_stride, mask, mask_at, mask_stride, masked, count, F, Fp, E, most, room,
               f, n, limits):  # fmt: skip
    """A chunk of keys, masked ones as the logarithm of 0, and by how many bits each may exceed the gauge."""
    split_rows(lk, at, stride, count, F, Fp, f, n)
    for t in range(count):
        start = v_at + t * v_stride
        limits[t] = row_limit(v[start : start + E], most, room)
        if masked and not mask[mask_at + t * mask_stride]:
            clear(f[t * Fp : (t + 1) * Fp])
            fill_none(n[t * Fp : (t + 1) * Fp])


@helper
def centred_row(x, mu, out):
    for i in range(mu.size):
        out[i] = x[i] - mu[i]


@helper
def lay_values(v, at, stride, mu, mask, mask_at, mask_stride, masked, a, b, E, Ep, V):
    """v - mu of the rows a <= t < b; zeros for the others of their blocks and for masked keys."""
    for t in range(a // T * T, min(CHUNK, (b // BLOCK + 1) * BLOCK)):
        row = V[t * Ep : (t + 1) * Ep]
        if t < a or t >= b or (masked and not mask[mask_at + t * mask_stride]):
            clear(row)
        else:
            start = at + t * stride
            centred_row(v[start : start + E], mu, row)


@helper
def lay_keys(f, n, m, a, b, Fp, K):
    for t in range(a // T * T, min(CHUNK, (b // BLOCK + 1) * BLOCK)):
        row = K[t * Fp : (t + 1) * Fp]
        if t < a or t >= b:
            clear(row)
        else:
            key_row(f[t * Fp : (t + 1) * Fp], n[t * Fp : (t + 1) * Fp], m, row)


@helper
def lay_queries(f, n, m, a, b, Fp, Q, rho):
    for t in range(a // T * T, min(CHUNK, (b // BLOCK + 1) * BLOCK)):
        row = Q[t * Fp : (t + 1) * Fp]
        if t < a or t >= b:
            clear(row)
        else:
            rho[t] = query_row(f[t * Fp : (t + 1) * Fp], n[t * Fp : (t + 1) * Fp], m, row)


@helper
def lay_cotangents(d_out, at, stride, den, divided, a, b, E, Ep, G):
    """d_out, or d_out / den with 0 where den is 0, of the rows a <= t < b."""
    for t in range(a // T * T, min(CHUNK, (b // BLOCK + 1) * BLOCK)):
        row = G[t * Ep : (t + 1) * Ep]
        if t < a or t >= b:
            clear(row)
        else:
            start = at + t * stride
            if divided:
                divided_row(d_out[start : start + E], den[t], row[:E])
            else:
                copy_row(d_out[start : start + E], row[:E])


@helper
def load_gauge(gauge, at, F, m):
    fill_none(m)
    for f in range(F):
        m[f] = gauge[at + f]


@helper
def gauge_of_keys(lk, at, stride, mask, mask_at, mask_stride, masked, count, F, m):
    """m = max(m, n of every visible key)"""
    for s in range(count):
        if not masked or mask[mask_at + s * mask_stride]:
            start = at + s * stride
            widen_gauge(lk[start : start + F], m[:F])


@helper
def finished(den):
    """A den that is infinite makes NaN: finite numerators over it would be 0, a wrong finite number."""
    return den + (den - den)


@helper
def query_cotangent(phi, y, z, d_lse, c_go, t, out):
    """d_lq = phi (y - go z) / den, den = phi . z, go = phi . y / den - d_lse. den and go to c_go."""
    den = finished(dot(phi, z))
    c_go[2 * t] = den
    if den == 0:
        c_go[2 * t + 1] = 0
        clear(out)
        return
    go = dot(phi, y) / den - d_lse
    c_go[2 * t + 1] = go
    for i in range(out.size):
        out[i] = phi[i] * (y[i] - go * z[i]) / den


@helper
def ratio(c_go, t):
    """-go / den, the cotangent of den."""
    return -c_go[2 * t + 1] / c_go[2 * t] if c_go[2 * t] != 0 else c_go[2 * t]


@helper
def key_cotangent(phi, y, r, out, masked, add):
    """d_lk = phi (y + r)"""
    for i in range(out.size):
        d = phi[i] * (y[i] + r[i])
        d = r.dtype.type(0) if masked else d
        out[i] = out[i] + d if add else d


# -- forward ----------------------------------------------------------------------------------------------------


def forward_kernel(salt):
    """The kernel with the salt of its cache key in its closure."""

    def loglinear_forward(
        lq, lk, v, mask, sums, rest, gauge, out, lse, new_sums, new_rest, new_gauge,
        work, whole, table, dims, first, last,
    ):  # fmt: skip
        """Heads first <= i < last: out, lse, and the state after all keys."""
        salt  # noqa: B018
        N, M, F, E = dims[0], dims[1], dims[2], dims[3]
        q_stride, k_stride, v_stride, mask_stride = dims[4], dims[5], dims[6], dims[7]
        causal, masked, most, room = dims[10] == 1, dims[11] == 1, dims[15], dims[16]
        E1 = E + 1
        cols = NV * (N_BYTES // work.itemsize)
        Fp, Ep = -(-F // cols) * cols, -(-E // cols) * cols

        at = 0
        FQ = work[at : at + CHUNK * Fp]
        at += CHUNK * Fp
        FK = work[at : at + CHUNK * Fp]
        at += CHUNK * Fp
        Q = work[at : at + CHUNK * Fp]
        at += CHUNK * Fp
        K = work[at : at + CHUNK * Fp]
        at += CHUNK * Fp
        V = work[at : at + CHUNK * Ep]
        at += CHUNK * Ep
        Y = work[at : at + CHUNK * Ep]
        at += CHUNK * Ep
        S = work[at : at + 2 * Fp * Ep]
        at += 2 * Fp * Ep
        z = work[at : at + Fp]
        at += Fp
        e = work[at : at + Fp]
        at += Fp
        turn = work[at : at + Fp]
        at += Fp
        mu = work[at : at + E]
        at += E
        W = work[at : at + CHUNK * T]
        at += CHUNK * T
        d = work[at : at + CHUNK]
        NQ, NK, m = whole[: CHUNK * Fp], whole[CHUNK * Fp : 2 * CHUNK * Fp], whole[2 * CHUNK * Fp :][:Fp]
        top = whole[(2 * CHUNK + 1) * Fp :][:Fp]
        at = (2 * CHUNK + 2) * Fp
        limits, rho = whole[at : at + CHUNK], whole[at + CHUNK : at + 2 * CHUNK]
        clear(work)
        fill_none(NQ)
        fill_none(NK)

        for i in range(first, last):
            j, head = table[i, 0], table[i, 1]
            q_at, k_at, v_at, mask_at = table[i, 2], table[i, 5], table[i, 6], table[i, 7]
            same = i > first and table[i - 1, 0] == j
            if causal or not same:
                load_state(sums, rest, j * F * E1, F, E, E1, Fp, cols, S, z, e)
                load_gauge(gauge, j * F, F, m)
                copy_row(m, top)

            if not causal and not same:
                gauge_of_keys(lk, k_at, k_stride, mask, mask_at, mask_stride, masked, M, F, m)
                turned(top, m, turn)
                turn_rows(S, z, e, turn, F, Fp, Ep // cols, cols)
                copy_row(m, top)
                for c in range(0, M, CHUNK):
                    n = min(CHUNK, M - c)
                    split_keys(lk, k_at + c * k_stride, k_stride, v, v_at + c * v_stride, v_stride,
                               mask, mask_at + c * mask_stride, mask_stride, masked, n, F, Fp, E, most, room,
                               FK, NK, limits)  # fmt: skip
                    lay_keys(FK, NK, m, 0, n, Fp, K)
                    lay_values(v, v_at + c * v_stride, v_stride, mu, mask, mask_at + c * mask_stride, mask_stride,
                               masked, 0, n, E, Ep, V)  # fmt: skip
                    add_rows(K, n, Fp, z, e)
                    for x in range(0, Ep, cols):
                        for f in range(0, Fp, ROWS):
                            gather(K, f, Fp, V, x, Ep, n, S, (x // cols * Fp + f) * 2 * cols, 2 * cols)

            for c in range(0, N, CHUNK):
                n = min(CHUNK, N - c)
                split_rows(lq, q_at + c * q_stride, q_stride, n, F, Fp, FQ, NQ)
                if causal:
                    split_keys(lk, k_at + c * k_stride, k_stride, v, v_at + c * v_stride, v_stride,
                               mask, mask_at + c * mask_stride, mask_stride, masked, n, F, Fp, E, most, room,
                               FK, NK, limits)  # fmt: skip
                    widen_gauge_rows(NK, n, Fp, top)
                a = 0
                while a < n:
                    if causal:
                        b = first_excess(NK, limits, m, Fp, a, n)
                        if b == a:  # a span opens
                            raise_gauge(NK[a * Fp : (a + 1) * Fp], m, turn)
                            turn_rows(S, z, e, turn, F, Fp, Ep // cols, cols)
                            b = first_excess(NK, limits, m, Fp, a + 1, n)
                        start = a // T * T
                        lay_queries(FQ, NQ, m, a, b, Fp, Q, rho)
                        lay_keys(FK, NK, m, a, b, Fp, K)
                        lay_values(v, v_at + c * v_stride, v_stride, mu, mask, mask_at + c * mask_stride, mask_stride,
                                   masked, a, b, E, Ep, V)  # fmt: skip
                        for t in range(start, b, T):
                            scores(Q, t * Fp, Fp, K, t * Fp, Fp, Fp, W, t * T)
                            denominators(Q, t * Fp, Fp, K, t * Fp, Fp, Fp, z, e, W, t * T, d, t)
                        for x in range(0, Ep, cols):
                            for t in range(start, b, T):
                                advance(Q, t * Fp, Fp, K, t * Fp, Fp, V, t * Ep + x, Ep,
                                        S, x * Fp * 2, 2 * cols, F, W, t * T, Y, t * Ep + x, Ep)  # fmt: skip
                    else:
                        b = n
                        lay_queries(FQ, NQ, m, 0, n, Fp, Q, rho)
                        for t in range(n):
                            d[t] = dot(Q[t * Fp : (t + 1) * Fp], z)
                        for x in range(0, Ep, cols):
                            for t in range(0, n, ROWS):
                                product(Q, t * Fp, Fp, 1, S, x * Fp * 2, 2 * cols, F, Y, t * Ep + x, Ep)
                    for t in range(a, b):
                        p = head * N + c + t
                        den = finished(d[t])
                        divided_row(Y[t * Ep : t * Ep + E], den, out[p * E : (p + 1) * E])
                        lse[p] = rho[t] * LN2 + math.log(den) if den != 0 else -math.inf
                    a = b

            if not same:
                turned(m, top, turn)
                turn_rows(S, z, e, turn, F, Fp, Ep // cols, cols)
                store_state(S, z, e, F, E, E1, Fp, cols, new_sums, new_rest, j * F * E1)
                for f in range(F):
                    new_gauge[j * F + f] = top[f]

    return loglinear_forward


# -- backward ---------------------------------------------------------------------------------------------------


def backward_kernel(salt):
    """The kernel with the salt of its cache key in its closure."""

    def loglinear_backward(
        d_out, d_lse, d_state, lq, lk, v, mask, sums, rest, gauge,
        d_lq, d_lk, d_v, d_before, work, whole, marks, c_go, table, dims, first, last,
    ):  # fmt: skip
        """Heads first <= i < last: the lines of `loglinear_forward`, last line first; vc = v - mu, G = d_out / den.

        y_t   = P (d_out, vc, K)_t     z_t = sum_{s <= t} K_s
        d_lq  = Q (y - go z) / den     den = Q . z,  go = Q . y / den - d_lse
        d_v_t = P'(K, Q, G)_t          P': s >= t
        d_lk  = K (P'(vc, G, Q) + r)   r_t = sum_{s >= t} -go_s / den_s Q_s
        """
        salt  # noqa: B018
        N, M, F, E = dims[0], dims[1], dims[2], dims[3]
        q_stride, k_stride, v_stride, mask_stride = dims[4], dims[5], dims[6], dims[7]
        g_stride, l_stride = dims[8], dims[9]
        causal, masked, d_state_given = dims[10] == 1, dims[11] == 1, dims[12] == 1
        d_lse_given, centre, most, room = dims[13] == 1, dims[14] == 1, dims[15], dims[16]
        E1 = E + 1
        zero, one = work.dtype.type(0), work.dtype.type(1)
        cols = NV * (N_BYTES // work.itemsize)
        Fp, Ep = -(-F // cols) * cols, -(-E // cols) * cols

        at = 0
        FQ = work[at : at + CHUNK * Fp]
        at += CHUNK * Fp
        FK = work[at : at + CHUNK * Fp]
        at += CHUNK * Fp
        Q = work[at : at + CHUNK * Fp]
        at += CHUNK * Fp
        K = work[at : at + CHUNK * Fp]
        at += CHUNK * Fp
        Y = work[at : at + CHUNK * Fp]
        at += CHUNK * Fp
        V = work[at : at + CHUNK * Ep]
        at += CHUNK * Ep
        G = work[at : at + CHUNK * Ep]
        at += CHUNK * Ep
        U = work[at : at + CHUNK * Ep]
        at += CHUNK * Ep
        S = work[at : at + 2 * Fp * Ep]
        at += 2 * Fp * Ep
        X = work[at : at + 2 * Fp * Ep]
        at += 2 * Fp * Ep
        z = work[at : at + Fp]
        at += Fp
        e = work[at : at + Fp]
        at += Fp
        r = work[at : at + Fp]
        at += Fp
        r_rest = work[at : at + Fp]
        at += Fp
        turn = work[at : at + Fp]
        at += Fp
        mu = work[at : at + E]
        at += E
        W = work[at : at + CHUNK * T]
        at += CHUNK * T
        W2 = work[at : at + CHUNK * T]
        at += CHUNK * T
        den = work[at : at + CHUNK]
        NQ, NK, m = whole[: CHUNK * Fp], whole[CHUNK * Fp : 2 * CHUNK * Fp], whole[2 * CHUNK * Fp :][:Fp]
        top = whole[(2 * CHUNK + 1) * Fp :][:Fp]
        at = (2 * CHUNK + 2) * Fp
        m_now = whole[at : at + Fp]
        at += Fp
        spans = whole[at : at + CHUNK * Fp]
        at += CHUNK * Fp
        limits, rho = whole[at : at + CHUNK], whole[at + CHUNK : at + 2 * CHUNK]
        edges = whole[at + 2 * CHUNK : at + 3 * CHUNK + 1]
        clear(work)
        fill_none(NQ)
        fill_none(NK)

        for i in range(first, last):
            j, head = table[i, 0], table[i, 1]
            q_at, g_at, l_at = table[i, 2], table[i, 3], table[i, 4]
            k_at, v_at, mask_at = table[i, 5], table[i, 6], table[i, 7]
            same = i > first and table[i - 1, 0] == j  # another query head of the same keys: its d_lk, d_v add
            state_at = j * F * E1
            if not same:
                if centre:
                    visible_mean(v, v_at, v_stride, M, E, mask, mask_at, mask_stride, masked, mu)
                else:
                    clear(mu)

            # sweep 1, forward in time: d_lq, den and go
            load_centred(sums, rest, state_at, F, E, E1, Ep, cols, mu, S, z, e)
            load_gauge(gauge, j * F, F, m)
            copy_row(m, top)
            if not causal:
                gauge_of_keys(lk, k_at, k_stride, mask, mask_at, mask_stride, masked, M, F, m)
                turned(top, m, turn)
                copy_row(m, top)
                turn_columns(S, turn, E, Ep, Fp // cols, cols)
                turn_rows(S, z, e, turn, 0, Fp, 0, cols)
                for c in range(0, M, CHUNK):
                    n = min(CHUNK, M - c)
                    split_keys(lk, k_at + c * k_stride, k_stride, v, v_at + c * v_stride, v_stride,
                               mask, mask_at + c * mask_stride, mask_stride, masked, n, F, Fp, E, most, room,
                               FK, NK, limits)  # fmt: skip
                    lay_keys(FK, NK, m, 0, n, Fp, K)
                    lay_values(v, v_at + c * v_stride, v_stride, mu, mask, mask_at + c * mask_stride, mask_stride,
                               masked, 0, n, E, Ep, V)  # fmt: skip
                    add_rows(K, n, Fp, z, e)
                    for f in range(0, Fp, cols):
                        for x in range(0, Ep, ROWS):
                            gather(V, x, Ep, K, f, Fp, n, S, (f // cols * Ep + x) * 2 * cols, 2 * cols)
            load_cotangent(d_state, d_state_given and not same, state_at, F, E, E1, Fp, cols, mu, X, r, r_rest)

            for c in range(0, N, CHUNK):
                n = min(CHUNK, N - c)
                split_rows(lq, q_at + c * q_stride, q_stride, n, F, Fp, FQ, NQ)
                if causal:
                    copy_row(m, marks[c // CHUNK * Fp : (c // CHUNK + 1) * Fp])
                    split_keys(lk, k_at + c * k_stride, k_stride, v, v_at + c * v_stride, v_stride,
                               mask, mask_at + c * mask_stride, mask_stride, masked, n, F, Fp, E, most, room,
                               FK, NK, limits)  # fmt: skip
                    widen_gauge_rows(NK, n, Fp, top)
                a = 0
                while a < n:
                    if causal:
                        b = first_excess(NK, limits, m, Fp, a, n)
                        if b == a:
                            raise_gauge(NK[a * Fp : (a + 1) * Fp], m, turn)
                            turn_columns(S, turn, E, Ep, Fp // cols, cols)
                            turn_rows(S, z, e, turn, 0, Fp, 0, cols)
                            b = first_excess(NK, limits, m, Fp, a + 1, n)
                        start = a // T * T
                        lay_cotangents(d_out, g_at + c * g_stride, g_stride, den, False, a, b, E, Ep, G)
                        lay_queries(FQ, NQ, m, a, b, Fp, Q, rho)
                        lay_keys(FK, NK, m, a, b, Fp, K)
                        lay_values(v, v_at + c * v_stride, v_stride, mu, mask, mask_at + c * mask_stride, mask_stride,
                                   masked, a, b, E, Ep, V)  # fmt: skip
                        for t in range(start, b, T):
                            scores(G, t * Ep, Ep, V, t * Ep, Ep, Ep, W, t * T)
                        for f in range(0, Fp, cols):
                            for t in range(start, b, T):
                                advance(G, t * Ep, Ep, V, t * Ep, Ep, K, t * Fp + f, Fp,
                                        S, f * Ep * 2, 2 * cols, E, W, t * T, Y, t * Fp + f, Fp)  # fmt: skip
                    else:
                        b = n
                        lay_cotangents(d_out, g_at + c * g_stride, g_stride, den, False, 0, n, E, Ep, G)
                        lay_queries(FQ, NQ, m, 0, n, Fp, Q, rho)
                        for f in range(0, Fp, cols):
                            for t in range(0, n, ROWS):
                                product(G, t * Ep, Ep, 1, S, f * Ep * 2, 2 * cols, E, Y, t * Fp + f, Fp)
                    for t in range(a, b):
                        phi, y = Q[t * Fp : (t + 1) * Fp], Y[t * Fp : (t + 1) * Fp]
                        if causal:
                            add_row(K[t * Fp : (t + 1) * Fp], one, z, e)
                        given = d_lse[l_at + (c + t) * l_stride] if d_lse_given else zero
                        p = (head * N + c + t) * F
                        query_cotangent(phi[:F], y[:F], z[:F], given, c_go, c + t, d_lq[p : p + F])
                        if not causal:
                            add_row(phi, ratio(c_go, c + t), r, r_rest)
                            den[t] = c_go[2 * (c + t)]
                    a = b
                if not causal:
                    lay_cotangents(d_out, g_at + c * g_stride, g_stride, den, True, 0, n, E, Ep, G)
                    for x in range(0, Ep, cols):
                        for f in range(0, Fp, ROWS):
                            gather(Q, f, Fp, G, x, Ep, n, X, (x // cols * Fp + f) * 2 * cols, 2 * cols)

            # sweep 2, backward in time: d_lk and d_v; the outgoing state's cotangent stands at the gauge of all keys
            if not same_gauge(m, top):
                turned(m, top, turn)
                turn_rows(X, r, r_rest, turn, F, Fp, Ep // cols, cols)
            transpose_state(X, F, E, Fp, Ep, cols, S)
            for c in range((M - 1) // CHUNK * CHUNK, -1, -CHUNK):
                n = min(CHUNK, M - c)
                split_keys(lk, k_at + c * k_stride, k_stride, v, v_at + c * v_stride, v_stride,
                           mask, mask_at + c * mask_stride, mask_stride, masked, n, F, Fp, E, most, room,
                           FK, NK, limits)  # fmt: skip
                n_spans = 0
                if causal:
                    split_rows(lq, q_at + c * q_stride, q_stride, n, F, Fp, FQ, NQ)
                    for t in range(n):
                        den[t] = c_go[2 * (c + t)]
                    # the spans of this chunk, again
                    copy_row(marks[c // CHUNK * Fp : (c // CHUNK + 1) * Fp], m_now)
                    b = 0
                    while b < n:
                        edges[n_spans], a = b, b
                        b = first_excess(NK, limits, m_now, Fp, a, n)
                        if b == a:
                            raise_gauge(NK[a * Fp : (a + 1) * Fp], m_now, turn)
                            b = first_excess(NK, limits, m_now, Fp, a + 1, n)
                        copy_row(m_now, spans[n_spans * Fp : (n_spans + 1) * Fp])
                        n_spans += 1
                else:
                    copy_row(m, spans[:Fp])
                    edges[0] = 0
                    n_spans = 1
                edges[n_spans] = n
                for i_span in range(n_spans - 1, -1, -1):
                    a, b = edges[i_span], edges[i_span + 1]
                    m_span = spans[i_span * Fp : (i_span + 1) * Fp]
                    if not same_gauge(m_span, m):
                        turned(m_span, m, turn)
                        turn_columns(S, turn, E, Ep, Fp // cols, cols)
                        turn_rows(X, r, r_rest, turn, F, Fp, Ep // cols, cols)
                        copy_row(m_span, m)
                    lay_keys(FK, NK, m, a, b, Fp, K)
                    lay_values(v, v_at + c * v_stride, v_stride, mu, mask, mask_at + c * mask_stride, mask_stride,
                               masked, a, b, E, Ep, V)  # fmt: skip
                    if causal:
                        lay_cotangents(d_out, g_at + c * g_stride, g_stride, den, True, a, b, E, Ep, G)
                        lay_queries(FQ, NQ, m, a, b, Fp, Q, rho)
                        start, whole_end = a // T * T, -(-b // T) * T
                        for t in range(start, b, T):
                            scores_back(K, t * Fp, Fp, Q, t * Fp, Fp, Fp, W, t * T)
                            scores_back(V, t * Ep, Ep, G, t * Ep, Ep, Ep, W2, t * T)
                        for x in range(0, Ep, cols):
                            for t in range(whole_end - T, start - 1, -T):
                                retreat(K, t * Fp, Fp, Q, t * Fp, Fp, G, t * Ep + x, Ep,
                                        X, x * Fp * 2, 2 * cols, F, W, t * T, U, t * Ep + x, Ep)  # fmt: skip
                        for f in range(0, Fp, cols):
                            for t in range(whole_end - T, start - 1, -T):
                                retreat(V, t * Ep, Ep, G, t * Ep, Ep, Q, t * Fp + f, Fp,
                                        S, f * Ep * 2, 2 * cols, E, W2, t * T, Y, t * Fp + f, Fp)  # fmt: skip
                    else:
                        for x in range(0, Ep, cols):
                            for t in range(0, n, ROWS):
                                product(K, t * Fp, Fp, 1, X, x * Fp * 2, 2 * cols, F, U, t * Ep + x, Ep)
                        for f in range(0, Fp, cols):
                            for t in range(0, n, ROWS):
                                product(V, t * Ep, Ep, 1, S, f * Ep * 2, 2 * cols, E, Y, t * Fp + f, Fp)
                    for t in range(b - 1, a - 1, -1):
                        if causal:
                            add_row(Q[t * Fp : (t + 1) * Fp], ratio(c_go, c + t), r, r_rest)
                        hidden = masked and not mask[mask_at + (c + t) * mask_stride]
                        p, u = j * M + c + t, U[t * Ep : t * Ep + E]
                        if hidden:
                            clear(u)
                        key_cotangent(K[t * Fp : t * Fp + F], Y[t * Fp : t * Fp + F], r[:F], d_lk[p * F : (p + 1) * F],
                                      hidden, same)  # fmt: skip
                        deliver_row(u, d_v[p * E : (p + 1) * E], same)

            load_gauge(gauge, j * F, F, m_now)
            if not same_gauge(m_now, m):
                turned(m_now, m, turn)
                turn_rows(X, r, r_rest, turn, F, Fp, Ep // cols, cols)
            add_cotangent(X, r, F, E, E1, Fp, cols, mu, d_before, state_at, not same)

    return loglinear_backward
