"""The kernels of the linear engine. Definition: backends/reference/linear.py.

Names. F: rows of a state, n_sums * D features with the turns multiplied in ([cos phi, sin phi] or phi).
A state is cut into slices of COLS columns; a row of a slice is [S | E], COLS sums and COLS of what their
rounding owes. Scratch rows are padded with zeros: Fp, Ep are F and E up to whole slices. All arrays are 1-D.

    table[i]   what one query head reads: columns of `Head`, in elements, sorted by the head of k and v
    dims       sizes, strides and switches: `Dims`
"""

from __future__ import annotations

from ._jit import helper, reduction
from ._layout import ADD, CLAMP, SAFE
from ._maps import copy_row, map_row, row_power, unmap_row
from ._tiles import CHUNK, TILE
from ._vector import advance, denominators, gather, product, retreat, scores, scores_back

__all__ = ["backward_kernel", "forward_kernel", "scratch_size"]

T, NV, ROWS, N_BYTES = TILE.tokens, TILE.vectors, TILE.rows, TILE.n_bytes
BLOCK = T * ROWS  # a ragged chunk is filled up to whole blocks of either tile


def scratch_size(n_features: int, n_values: int, columns: int) -> int:
    """Numbers of scratch the kernels carve, the larger of both."""
    features, values = (-(-n // columns) * columns for n in (n_features, n_values))
    return CHUNK * (3 * features + 3 * values + 2 * T + 2) + 4 * features * (values + 1) + values


# -- prologues --------------------------------------------------------------------------------------------------


@helper
def clear(x):
    zero = x.dtype.type(0)
    for i in range(x.size):
        x[i] = zero


@helper
def scale_row(x, factor):
    for i in range(x.size):
        x[i] *= factor


@helper
def turn_row(near, far, cosine, sine):
    """[phi, .] -> [cos phi, sin phi]"""
    for i in range(near.size):
        a = near[i]
        near[i] = cosine * a
        far[i] = sine * a


@helper
def features(x, at, stride, count, D, F, Fp, which, scaled, turns, turn_at, turn_stride, phi, power):
    """phi[t] = turn[t] (x) map(x[t]) for a chunk; if `scaled`, times power[t], a power of two."""
    for t in range(count):
        row = phi[t * Fp : t * Fp + D]
        start = at + t * stride
        map_row(which, x[start : start + D], row)
        if scaled:
            power[t] = row_power(row)
            scale_row(row, power[t])
        if F > D:
            p = turn_at + t * turn_stride
            turn_row(row, phi[t * Fp + D : t * Fp + F], turns[p], turns[p + 1])
    clear(phi[count * Fp : min(CHUNK, count + BLOCK) * Fp])


@helper
def values(x, at, stride, count, width, padded, out):
    """A chunk of rows into scratch."""
    for t in range(count):
        start = at + t * stride
        copy_row(x[start : start + width], out[t * padded : t * padded + width])
    clear(out[count * padded : min(CHUNK, count + BLOCK) * padded])


@helper
def centred_row(x, mu, out):
    for i in range(out.size):
        out[i] = x[i] - mu[i]


@helper
def centred_values(x, at, stride, count, width, padded, mu, out):
    """A chunk of v - mu into scratch."""
    for t in range(count):
        start = at + t * stride
        centred_row(x[start : start + width], mu, out[t * padded : t * padded + width])
    clear(out[count * padded : min(CHUNK, count + BLOCK) * padded])


@helper
def hide(mask, at, stride, count, x, padded):
    """Rows of keys nobody sees are zero: chosen away, not multiplied."""
    for t in range(count):
        if not mask[at + t * stride]:
            clear(x[t * padded : (t + 1) * padded])


# -- the divisor ------------------------------------------------------------------------------------------------


@helper
def divisor(den, mode, eps):
    """c(den). An infinite den makes NaN: finite numerators over it would be 0, a wrong finite number."""
    if mode == CLAMP:
        c = eps if den < eps else den
    elif mode == ADD:
        c = den + eps
    else:
        c = den
    return c + (c - c)


@helper
def divided_row(x, c, out):
    """out = x / c; 0 where nothing is seen."""
    if c == 0:
        clear(out)
    else:
        for i in range(out.size):
            out[i] = x[i] / c


@reduction
def dot(x, y):
    total = x.dtype.type(0)
    for i in range(x.size):
        total += x[i] * y[i]
    return total


# -- states -----------------------------------------------------------------------------------------------------


@helper
def load_state(sums, rest, at, F, E, E1, Fp, cols, S, z, e):
    """S, E of slices from (sums, rest); the last column, if there is one, to z and e."""
    clear(S)
    clear(z)
    clear(e)
    for f in range(F):
        for x in range(E):
            place = (x // cols * Fp + f) * 2 * cols + x % cols
            S[place] = sums[at + f * E1 + x]
            S[place + cols] = rest[at + f * E1 + x]
        if E1 > E:
            z[f] = sums[at + f * E1 + E]
            e[f] = rest[at + f * E1 + E]


@helper
def store_state(S, z, e, F, E, E1, Fp, cols, sums, rest, at):
    for f in range(F):
        for x in range(E):
            place = (x // cols * Fp + f) * 2 * cols + x % cols
            sums[at + f * E1 + x] = S[place]
            rest[at + f * E1 + x] = S[place + cols]
        if E1 > E:
            sums[at + f * E1 + E] = z[f]
            rest[at + f * E1 + E] = e[f]


@helper
def load_centred(sums, rest, at, F, E, E1, Ep, cols, mu, S, z, e):
    """The state's transpose with centred values, S_num^T - mu S_den: rows E, columns F."""
    clear(S)
    clear(z)
    clear(e)
    zero = S.dtype.type(0)
    for f in range(F):
        den = zero
        if E1 > E:
            z[f] = sums[at + f * E1 + E]
            e[f] = rest[at + f * E1 + E]
            den = z[f] + e[f]
        for x in range(E):
            place = (f // cols * Ep + x) * 2 * cols + f % cols
            S[place] = (sums[at + f * E1 + x] - den * mu[x]) + rest[at + f * E1 + x]


@helper
def transpose_state(S, F, E, Fp, Ep, cols, out):
    """rows F, columns E -> rows E, columns F"""
    clear(out)
    for f in range(F):
        for x in range(E):
            here, there = (x // cols * Fp + f) * 2 * cols + x % cols, (f // cols * Ep + x) * 2 * cols + f % cols
            out[there] = S[here]
            out[there + cols] = S[here + cols]


@helper
def load_cotangent(d_state, given, at, F, E, E1, Fp, cols, mu, X, r, e):
    """X from the cotangent of the outgoing state; r = X_den + X_num mu."""
    clear(X)
    clear(r)
    clear(e)
    if not given:
        return
    for f in range(F):
        lost = r.dtype.type(0)
        for x in range(E):
            value = d_state[at + f * E1 + x]
            X[(x // cols * Fp + f) * 2 * cols + x % cols] = value
            lost += value * mu[x]
        if E1 > E:
            r[f] = d_state[at + f * E1 + E] + lost


@helper
def add_cotangent(X, r, F, E, E1, Fp, cols, mu, d_state, at, first):
    """The cotangent of the incoming state: X, its last column r - X_num mu; later heads of a group add."""
    for f in range(F):
        lost = r.dtype.type(0)
        for x in range(E):
            value = X[(x // cols * Fp + f) * 2 * cols + x % cols]
            lost += value * mu[x]
            p = at + f * E1 + x
            d_state[p] = value if first else d_state[p] + value
        if E1 > E:
            p = at + f * E1 + E
            d_state[p] = r[f] - lost if first else d_state[p] + (r[f] - lost)


@helper
def add_rows(x, count, padded, z, e):
    """z + e += the sum of a chunk's rows: one Kahan step."""
    for t in range(count):
        row = x[t * padded : (t + 1) * padded]
        for i in range(e.size):
            e[i] += row[i]
    for i in range(e.size):
        owed, now = e[i], z[i]
        new = now + owed
        z[i] = new
        e[i] = owed - (new - now)


@helper
def add_row(row, factor, z, e):
    """z + e += factor row: one Kahan step."""
    for i in range(row.size):
        owed, now = factor * row[i] + e[i], z[i]
        new = now + owed
        z[i] = new
        e[i] = owed - (new - now)


@helper
def add_scaled(x, factor, out):
    for i in range(out.size):
        out[i] += factor * x[i]


@helper
def visible_mean(v, at, stride, M, E, mask, mask_at, mask_stride, masked, mu):
    """The mean over visible, finite values; any finite number would do. Terms are scaled first: no overflow."""
    one = mu.dtype.type(1)
    for x in range(E):
        mu[x] = 0
    seen = 0
    for s in range(M):
        if not masked or mask[mask_at + s * mask_stride]:
            seen += 1
    if seen == 0:
        return
    share = one / mu.dtype.type(seen)
    for s in range(M):
        if not masked or mask[mask_at + s * mask_stride]:
            start = at + s * stride
            row = v[start : start + E]
            for x in range(E):
                a = row[x] * share
                mu[x] += a if a - a == 0 else mu.dtype.type(0)


@helper
def unturn_row(near, far, cosine, sine):
    """d_phi = cos d_near + sin d_far, into near"""
    for i in range(near.size):
        near[i] = cosine * near[i] + sine * far[i]


@helper
def deliver_row(row, out, add):
    if add:
        for i in range(out.size):
            out[i] += row[i]
    else:
        for i in range(out.size):
            out[i] = row[i]


# -- forward ----------------------------------------------------------------------------------------------------


def forward_kernel(salt):
    """The kernel with the salt of its cache key in its closure."""

    def linear_forward(
        q, k, v, mask, turn_q, turn_k, sums, rest, out, den, new_sums, new_rest, work, table, dims, eps, first, last
    ):  # fmt: skip
        """Heads first <= i < last: out, den, and the state after all keys.

        past  n_t = Q_t S + sum_{j <= t} (Q_t . K_j) v_j      S += K^T v     block by block
        all   S += K^T v over all keys, then n_t = Q_t S
        """
        salt  # noqa: B018
        N, M, D, E, F, E1 = dims[0], dims[1], dims[2], dims[3], dims[4], dims[5]
        q_stride, k_stride, v_stride, mask_stride = dims[6], dims[7], dims[8], dims[9]
        turn_q_stride, turn_k_stride = dims[10], dims[11]
        which, causal, normalize, mode, masked = dims[13], dims[14], dims[15], dims[16], dims[17]
        eps = work.dtype.type(eps)
        scaled = normalize == 1 and mode == SAFE
        cols = NV * (N_BYTES // work.itemsize)
        Fp, Ep = -(-F // cols) * cols, -(-E // cols) * cols

        at = 0
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
        W = work[at : at + CHUNK * T]
        at += CHUNK * T
        d = work[at : at + CHUNK]
        at += CHUNK
        power = work[at : at + CHUNK]
        clear(Q)
        clear(K)
        clear(V)

        for i in range(first, last):
            j, h = table[i, 0], table[i, 1]
            q_at, k_at, v_at, mask_at = table[i, 2], table[i, 5], table[i, 6], table[i, 7]
            turn_q_at, turn_k_at = table[i, 3], table[i, 8]
            same = i > first and table[i - 1, 0] == j  # another query head of the same keys
            if causal == 1 or not same:
                load_state(sums, rest, j * F * E1, F, E, E1, Fp, cols, S, z, e)

            if causal == 0 and not same:
                for c in range(0, M, CHUNK):
                    n = min(CHUNK, M - c)
                    features(k, k_at + c * k_stride, k_stride, n, D, F, Fp, which, False,
                             turn_k, turn_k_at + c * turn_k_stride, turn_k_stride, K, power)  # fmt: skip
                    values(v, v_at + c * v_stride, v_stride, n, E, Ep, V)
                    if masked == 1:
                        hide(mask, mask_at + c * mask_stride, mask_stride, n, K, Fp)
                        hide(mask, mask_at + c * mask_stride, mask_stride, n, V, Ep)
                    if normalize == 1:
                        add_rows(K, n, Fp, z, e)
                    for x in range(0, Ep, cols):
                        for f in range(0, Fp, ROWS):
                            gather(K, f, Fp, V, x, Ep, n, S, (x // cols * Fp + f) * 2 * cols, 2 * cols)

            for c in range(0, N, CHUNK):
                n = min(CHUNK, N - c)
                features(q, q_at + c * q_stride, q_stride, n, D, F, Fp, which, scaled,
                         turn_q, turn_q_at + c * turn_q_stride, turn_q_stride, Q, power)  # fmt: skip
                if causal == 1:
                    features(k, k_at + c * k_stride, k_stride, n, D, F, Fp, which, False,
                             turn_k, turn_k_at + c * turn_k_stride, turn_k_stride, K, power)  # fmt: skip
                    values(v, v_at + c * v_stride, v_stride, n, E, Ep, V)
                    if masked == 1:
                        hide(mask, mask_at + c * mask_stride, mask_stride, n, K, Fp)
                        hide(mask, mask_at + c * mask_stride, mask_stride, n, V, Ep)
                    for t in range(0, n, T):
                        scores(Q, t * Fp, Fp, K, t * Fp, Fp, Fp, W, t * T)
                        if normalize == 1:
                            denominators(Q, t * Fp, Fp, K, t * Fp, Fp, Fp, z, e, W, t * T, d, t)
                    for x in range(0, Ep, cols):
                        for t in range(0, n, T):
                            advance(Q, t * Fp, Fp, K, t * Fp, Fp, V, t * Ep + x, Ep,
                                    S, x * Fp * 2, 2 * cols, F, W, t * T, Y, t * Ep + x, Ep)  # fmt: skip
                else:
                    if normalize == 1:
                        for t in range(n):
                            d[t] = dot(Q[t * Fp : (t + 1) * Fp], z)
                    for x in range(0, Ep, cols):
                        for t in range(0, n, ROWS):
                            product(Q, t * Fp, Fp, 1, S, x * Fp * 2, 2 * cols, F, Y, t * Ep + x, Ep)

                for t in range(n):
                    p = (h * N + c + t) * E
                    y, row = Y[t * Ep : t * Ep + E], out[p : p + E]
                    if normalize == 1:
                        den[h * N + c + t] = d[t]
                        divided_row(y, divisor(d[t], mode, eps), row)
                    else:
                        copy_row(y, row)

            if not same:
                store_state(S, z, e, F, E, E1, Fp, cols, new_sums, new_rest, j * F * E1)

    return linear_forward


# -- backward ---------------------------------------------------------------------------------------------------


@helper
def cotangents(d_out, at, stride, count, E, Ep, den, den_at, normalize, mode, eps, G):
    """G = d_out / c, 0 where den is 0: a chunk of rows into scratch."""
    for t in range(count):
        start = at + t * stride
        row, g = d_out[start : start + E], G[t * Ep : t * Ep + E]
        if normalize == 1:
            divided_row(row, divisor(den[den_at + t], mode, eps), g)
        else:
            copy_row(row, g)
    clear(G[count * Ep : min(CHUNK, count + BLOCK) * Ep])


@helper
def den_cotangent(phi, d_phi, g, mu, den, mode, eps):
    """G_den = (-c' D + (g . mu)(1 - c' den / c)) / c,   D = phi . dq~;   g is d_out / c already."""
    c = divisor(den, mode, eps)
    if c == 0:
        return c
    D = dot(phi, d_phi)
    if mode == SAFE:
        return -D / c
    if mode == ADD:
        return (dot(g, mu) * eps - D) / c
    if den < eps:
        return dot(g, mu)
    return -D / c


def backward_kernel(salt):
    """The kernel with the salt of its cache key in its closure."""

    def linear_backward(
        d_out, d_state, q, k, v, mask, turn_q, turn_k, sums, rest, den,
        d_q, d_k, d_v, d_before, work, h, table, dims, eps, first, last,
    ):  # fmt: skip
        """Heads first <= i < last: the lines of `linear_forward`, last line first; vc = v - mu, G = d_out / c.

        dq~_t  = P (G, vc, K)_t            h_t = cotangent of den_t
        d_fq_t = dq~_t + h_t z_t           z_t = sum_{s <= t} K_s
        d_v_t  = P'(K, Q, G)_t             P': s >= t
        d_fk_t = P'(vc, G, Q)_t + r_t      r_t = sum_{s >= t} h_s Q_s
        """
        salt  # noqa: B018
        N, M, D, E, F, E1 = dims[0], dims[1], dims[2], dims[3], dims[4], dims[5]
        q_stride, k_stride, v_stride, mask_stride = dims[6], dims[7], dims[8], dims[9]
        turn_q_stride, turn_k_stride, g_stride = dims[10], dims[11], dims[12]
        which, causal, normalize, mode, masked = dims[13], dims[14], dims[15], dims[16], dims[17]
        d_state_given = dims[18] == 1
        eps = work.dtype.type(eps)
        one = work.dtype.type(1)
        scaled = normalize == 1 and mode == SAFE
        cols = NV * (N_BYTES // work.itemsize)
        Fp, Ep = -(-F // cols) * cols, -(-E // cols) * cols

        at = 0
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
        mu = work[at : at + E]
        at += E
        W = work[at : at + CHUNK * T]
        at += CHUNK * T
        W2 = work[at : at + CHUNK * T]
        at += CHUNK * T
        power = work[at : at + CHUNK]
        clear(Q)
        clear(K)
        clear(V)
        clear(G)

        for i in range(first, last):
            j, head = table[i, 0], table[i, 1]
            q_at, k_at, v_at, mask_at = table[i, 2], table[i, 5], table[i, 6], table[i, 7]
            turn_q_at, turn_k_at, g_at = table[i, 3], table[i, 8], table[i, 4]
            same = i > first and table[i - 1, 0] == j  # another query head of the same keys: its d_k, d_v add
            state_at, den_at = j * F * E1, head * N
            if not same:
                if normalize == 1:
                    visible_mean(v, v_at, v_stride, M, E, mask, mask_at, mask_stride, masked == 1, mu)
                else:
                    clear(mu)

            load_cotangent(d_state, d_state_given and not same, state_at, F, E, E1, Fp, cols, mu, X, r, r_rest)

            # sweep 1, forward in time: d_q and h
            load_centred(sums, rest, state_at, F, E, E1, Ep, cols, mu, S, z, e)
            if causal == 0:
                for c in range(0, M, CHUNK):
                    n = min(CHUNK, M - c)
                    features(k, k_at + c * k_stride, k_stride, n, D, F, Fp, which, False,
                             turn_k, turn_k_at + c * turn_k_stride, turn_k_stride, K, power)  # fmt: skip
                    centred_values(v, v_at + c * v_stride, v_stride, n, E, Ep, mu, V)
                    if masked == 1:
                        hide(mask, mask_at + c * mask_stride, mask_stride, n, K, Fp)
                        hide(mask, mask_at + c * mask_stride, mask_stride, n, V, Ep)
                    if normalize == 1:
                        add_rows(K, n, Fp, z, e)
                    for f in range(0, Fp, cols):
                        for x in range(0, Ep, ROWS):
                            gather(V, x, Ep, K, f, Fp, n, S, (f // cols * Ep + x) * 2 * cols, 2 * cols)

            for c in range(0, N, CHUNK):
                n = min(CHUNK, N - c)
                cotangents(d_out, g_at + c * g_stride, g_stride, n, E, Ep, den, den_at + c, normalize, mode, eps, G)
                features(q, q_at + c * q_stride, q_stride, n, D, F, Fp, which, scaled,
                         turn_q, turn_q_at + c * turn_q_stride, turn_q_stride, Q, power)  # fmt: skip
                if causal == 1:
                    features(k, k_at + c * k_stride, k_stride, n, D, F, Fp, which, False,
                             turn_k, turn_k_at + c * turn_k_stride, turn_k_stride, K, power)  # fmt: skip
                    centred_values(v, v_at + c * v_stride, v_stride, n, E, Ep, mu, V)
                    if masked == 1:
                        hide(mask, mask_at + c * mask_stride, mask_stride, n, K, Fp)
                        hide(mask, mask_at + c * mask_stride, mask_stride, n, V, Ep)
                    for t in range(0, n, T):
                        scores(G, t * Ep, Ep, V, t * Ep, Ep, Ep, W, t * T)
                    for f in range(0, Fp, cols):
                        for t in range(0, n, T):
                            advance(G, t * Ep, Ep, V, t * Ep, Ep, K, t * Fp + f, Fp,
                                    S, f * Ep * 2, 2 * cols, E, W, t * T, Y, t * Fp + f, Fp)  # fmt: skip
                else:
                    for f in range(0, Fp, cols):
                        for t in range(0, n, ROWS):
                            product(G, t * Ep, Ep, 1, S, f * Ep * 2, 2 * cols, E, Y, t * Fp + f, Fp)
                for t in range(n):
                    y, phi = Y[t * Fp : (t + 1) * Fp], Q[t * Fp : (t + 1) * Fp]
                    if normalize == 1:
                        g = G[t * Ep : t * Ep + E]
                        h[c + t] = den_cotangent(phi, y, g, mu, den[den_at + c + t], mode, eps)
                        if causal == 1:
                            add_row(K[t * Fp : (t + 1) * Fp], one, z, e)
                        else:
                            add_row(phi, h[c + t], r, r_rest)
                        add_scaled(z, h[c + t], y)
                    near = y[:D]
                    if F > D:
                        p = turn_q_at + (c + t) * turn_q_stride
                        unturn_row(near, y[D:F], turn_q[p], turn_q[p + 1])
                    if scaled:
                        scale_row(near, power[t])
                    p = q_at + (c + t) * q_stride
                    unmap_row(which, q[p : p + D], near)
                    p = (den_at + c + t) * D
                    deliver_row(near, d_q[p : p + D], False)
                if causal == 0:
                    for x in range(0, Ep, cols):
                        for f in range(0, Fp, ROWS):
                            gather(Q, f, Fp, G, x, Ep, n, X, (x // cols * Fp + f) * 2 * cols, 2 * cols)

            # sweep 2, backward in time: d_k and d_v
            transpose_state(X, F, E, Fp, Ep, cols, S)
            for c in range((M - 1) // CHUNK * CHUNK, -1, -CHUNK):
                n = min(CHUNK, M - c)
                features(k, k_at + c * k_stride, k_stride, n, D, F, Fp, which, False,
                         turn_k, turn_k_at + c * turn_k_stride, turn_k_stride, K, power)  # fmt: skip
                centred_values(v, v_at + c * v_stride, v_stride, n, E, Ep, mu, V)
                if masked == 1:
                    hide(mask, mask_at + c * mask_stride, mask_stride, n, K, Fp)
                    hide(mask, mask_at + c * mask_stride, mask_stride, n, V, Ep)
                whole = -(-n // T) * T
                if causal == 1:
                    cotangents(d_out, g_at + c * g_stride, g_stride, n, E, Ep, den, den_at + c, normalize, mode, eps, G)
                    features(q, q_at + c * q_stride, q_stride, n, D, F, Fp, which, scaled,
                             turn_q, turn_q_at + c * turn_q_stride, turn_q_stride, Q, power)  # fmt: skip
                    for t in range(0, n, T):
                        scores_back(K, t * Fp, Fp, Q, t * Fp, Fp, Fp, W, t * T)
                        scores_back(V, t * Ep, Ep, G, t * Ep, Ep, Ep, W2, t * T)
                    for x in range(0, Ep, cols):
                        for t in range(whole - T, -1, -T):
                            retreat(K, t * Fp, Fp, Q, t * Fp, Fp, G, t * Ep + x, Ep,
                                    X, x * Fp * 2, 2 * cols, F, W, t * T, U, t * Ep + x, Ep)  # fmt: skip
                    for f in range(0, Fp, cols):
                        for t in range(whole - T, -1, -T):
                            retreat(V, t * Ep, Ep, G, t * Ep, Ep, Q, t * Fp + f, Fp,
                                    S, f * Ep * 2, 2 * cols, E, W2, t * T, Y, t * Fp + f, Fp)  # fmt: skip
                else:
                    for x in range(0, Ep, cols):
                        for t in range(0, n, ROWS):
                            product(K, t * Fp, Fp, 1, X, x * Fp * 2, 2 * cols, F, U, t * Ep + x, Ep)
                    for f in range(0, Fp, cols):
                        for t in range(0, n, ROWS):
                            product(V, t * Ep, Ep, 1, S, f * Ep * 2, 2 * cols, E, Y, t * Fp + f, Fp)
                for t in range(n - 1, -1, -1):
                    y = Y[t * Fp : (t + 1) * Fp]
                    if normalize == 1:
                        if causal == 1:
                            add_row(Q[t * Fp : (t + 1) * Fp], h[c + t], r, r_rest)
                        add_scaled(r, one, y)
                    near = y[:D]
                    if F > D:
                        p = turn_k_at + (c + t) * turn_k_stride
                        unturn_row(near, y[D:F], turn_k[p], turn_k[p + 1])
                    p = k_at + (c + t) * k_stride
                    unmap_row(which, k[p : p + D], near)
                    u = U[t * Ep : t * Ep + E]
                    if masked == 1 and not mask[mask_at + (c + t) * mask_stride]:
                        clear(near)
                        clear(u)
                    p = j * M + c + t
                    deliver_row(near, d_k[p * D : (p + 1) * D], same)
                    deliver_row(u, d_v[p * E : (p + 1) * E], same)
            add_cotangent(X, r, F, E, E1, Fp, cols, mu, d_before, state_at, not same)

    return linear_backward
