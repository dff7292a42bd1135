"""The log-linear engine in the array API: the definition of both verbs.

    e^x = f 2^n      f in [2^-1/2, 2^1/2], n an integer: every log-feature is split once, in float64 where there is one
    A[t, s] = 2^-rho_t sum_r (fq 2^nq)[t, r] (fk 2^nk)[s, r]          [num, den][t] = sum_{s <= t} A[t, s] [v, 1][s]

A gauge is an integer g_r for each feature that is set aside from the keys and given to the queries,

    phi_q[t, r] = fq 2^(nq + g_r - rho_t)        phi_k[s, r] = fk 2^(nk - g_r)

so that the sums over r and s become matrix products. Powers of two round nothing, and any gauge gives the same
numbers as long as they stay in range. They do if g lies between the largest nk of the keys in the product and that of
all keys the query sees: then no exponent is positive, and what underflows is below den >= 1/2 by 2^-126 at least.

Causal: tokens are cut into chunks and each chunk into halves, quarters, and so on. The keys of a first half are all
seen by the queries of the second half, so a block of a level, b tokens by b, is one product with one gauge, the
running maximum at the end of its keys. Up the levels gauges rise on the keys' side and fall on the queries', by a
factor a block. Above the chunks the sums S of all earlier keys take over. No entry is ever formed that is not needed:
a NaN meets the queries that see it and no others, nothing asks for values, and the gauge of a token knows no later key.
"""

from __future__ import annotations

import math

from linattn import _arrays
from linattn.backends.reference.linear import visible, visible_mean

CHUNK = 128  # tokens; a power of two
NONE = -(2**29)  # the gauge of a feature that no key has had yet
LIMIT = 2**27  # |n| from here on is as good as NaN: a log of this size has no digit left that its exponential needs
# ln 2 in two parts, the first short enough that n times it is exact for every n that matters
LN2 = {"float64": (0.6931471824645996, -1.904654299957768e-09), "float32": (0.693115234375, 3.1946184945309415e-05)}

TABLES = {name: [2.0**-n for n in range(last)] + [0.0] for name, last in (("float64", 1023), ("float32", 127))}


def forward(lq, lk, v, state, *, span, key_mask, out, xp, chunk_size=CHUNK):
    """out (..., N, E), lse (..., N) and the state after all keys. Arguments: engines/loglinear.py."""
    dtype = _arrays.accumulator(v, xp)
    v1 = _with_ones(visible(_arrays.cast(v, dtype, xp), key_mask, xp), xp)
    if span == "past":
        grid = Chunks(lq, lk, state[2], key_mask, dtype, chunk_size, xp)
        num_den, total = grid.attend(v1, value(state, xp))
    else:
        grid = Whole(lq, lk, state[2], key_mask, dtype, chunk_size, xp)
        total = grid.sums(v1, value(state, xp))
        num_den = xp.matmul(grid.phi_q, _arrays.cast(total, dtype, xp))
    num, den = num_den[..., :-1], num_den[..., -1:]
    dead = den == 0
    c = xp.where(dead, xp.ones_like(den), den)
    result = xp.where(dead, xp.zeros_like(num), num / c)
    # LSE = rho ln 2 + log den
    lse = _arrays.cast(grid.rho, _arrays.wide(lq, xp), xp) * math.log(2) + xp.log(
        _arrays.cast(c, _arrays.wide(lq, xp), xp)
    )
    lse = xp.where(dead, xp.full_like(lse, -math.inf), lse)[..., 0]
    after = (*rounded(total, state[0], xp), xp.broadcast_to(grid.gauge, tuple(state[2].shape)))
    return _arrays.fill(out, _arrays.cast(result, v.dtype, xp)), _arrays.cast(lse, dtype, xp), after


def backward(d_out, d_lse, d_state, lq, lk, v, state, *, span, key_mask, centre, xp, chunk_size=CHUNK):
    """The lines of `forward`, last line first; values are centred, which changes nothing but the rounding.

    go[t] = g[t] . (out[t] - mu) - d_lse[t]        g = d_out, mu the mean of v
    d_lq  = (u - go w) / den                       u[t, r] = sum_s phi_q[t, r] phi_k[s, r] (g[t] . (v[s] - mu))
    h     = [g, -go] / den                         w[t, r] = sum_s phi_q[t, r] phi_k[s, r],   den = sum_r w
    d_lk[s, r] = sum_t phi_q[t, r] phi_k[s, r] (h[t] . [v - mu, 1][s])            d_v[s] = sum_t A[t, s] h[t]

    Not `centre`: mu = 0. The cotangents of states are those of the sums of [v, 1] in any case.
    """
    dtype = _arrays.accumulator(v, xp)
    g, values = _arrays.cast(d_out, dtype, xp), visible(_arrays.cast(v, dtype, xp), key_mask, xp)
    before = value(state, xp)
    after = xp.zeros_like(before) if d_state is None else _arrays.cast(d_state, before.dtype, xp)
    mu = visible_mean(values, key_mask, xp)
    mu = mu if centre else xp.zeros_like(mu)
    v1 = _with_ones(visible(values - mu, key_mask, xp), xp)
    wide_mu = _arrays.cast(mu, before.dtype, xp)
    before = xp.concat([before[..., :-1] - before[..., -1:] * wide_mu, before[..., -1:]], axis=-1)
    after = xp.concat([after[..., :-1], after[..., -1:] + _sum(after[..., :-1] * wide_mu, xp)], axis=-1)

    grid = (Chunks if span == "past" else Whole)(lq, lk, state[2], key_mask, dtype, chunk_size, xp)
    u, w = grid.to_queries(g, v1, before)
    den = _sum(w, xp)
    dead = den == 0
    c = xp.where(dead, xp.ones_like(den), den)
    go = _sum(u, xp) / c
    if d_lse is not None:
        go = go - _arrays.cast(d_lse, dtype, xp)[..., None]
    d_lq = xp.where(dead, xp.zeros_like(u), (u - go * w) / c)
    h = _joined(xp.where(dead, xp.zeros_like(g), g / c), xp.where(dead, xp.zeros_like(go), -go / c), xp)
    d_lk, d_v, d_before = grid.to_keys(h, v1, after)
    d_before = xp.concat([d_before[..., :-1], d_before[..., -1:] - _sum(d_before[..., :-1] * wide_mu, xp)], axis=-1)

    d_lk, d_v = visible(d_lk, key_mask, xp), visible(d_v, key_mask, xp)
    grads = (_arrays.unbroadcast(d_x, tuple(x.shape), xp) for d_x, x in ((d_lq, lq), (d_lk, lk), (d_v, v)))
    d_before = _arrays.unbroadcast(d_before, tuple(state[0].shape), xp)
    return *grads, _arrays.cast(d_before, state[0].dtype, xp)


def weights(lq, lk, *, span, key_mask, xp):
    """A[t, s] / den[t], (..., N, M); rows that see nothing are 0."""
    gauge = xp.full((lk.shape[-1],), NONE, dtype=xp.int32, device=_arrays.device(lk))
    n_tokens, dtype = lq.shape[-2], _arrays.wide(lq, xp)
    if span == "past" and n_tokens:
        grid = Chunks(lq, lk, gauge, key_mask, dtype, _power_above(n_tokens), xp)
        a = grid.pairs()[..., :n_tokens, :n_tokens]
    else:
        grid = Whole(lq, lk, gauge, key_mask, dtype, CHUNK, xp)
        a = xp.matmul(grid.phi_q, xp.matrix_transpose(grid.phi_k))
    den = _sum(a, xp)
    dead = den == 0
    return xp.where(dead, xp.zeros_like(a), a / xp.where(dead, xp.ones_like(den), den))


# -- every key -------------------------------------------------------------------------------------------------


class Whole:
    """All queries see all keys: one gauge, the maximum over the keys."""

    def __init__(self, lq, lk, gauge, key_mask, dtype, chunk_size, xp):
        fq, nq, fk, nk = operands(lq, lk, key_mask, dtype, xp)
        powers = Powers(lq, xp)
        before = gauge[..., None, :]
        n_keys = lk.shape[-2]
        now = xp.maximum(before, xp.max(nk, axis=-2, keepdims=True)) if n_keys else before
        raised = nq + now
        self.rho = _largest(raised, xp)
        self.gauge = now[..., 0, :]
        self.phi_q = fq * powers(raised - self.rho, dtype)
        self.phi_k = fk * powers(nk - now, dtype)
        self.shift = powers(gauge - self.gauge, _arrays.wide(lq, xp))[..., None]
        self.chunk_size, self.xp = chunk_size, xp

    def sums(self, v1, before):
        """S = 2^(gauge before - gauge) S before + sum_s phi_k[s] v1[s]^T"""
        return before * self.shift + self.contracted(self.phi_k, v1, before)

    def contracted(self, a, b, like):
        """a^T b over the tokens, chunk by chunk in their dtype, the chunks in that of `like`."""
        xp, n_tokens = self.xp, a.shape[-2]
        size = min(self.chunk_size, max(n_tokens, 1))
        a, b = (_chunked(x, size, 0, xp) for x in (a, b))
        own = _arrays.cast(xp.matmul(xp.matrix_transpose(a), b), like.dtype, xp)
        return xp.sum(own, axis=-3, dtype=like.dtype)

    def to_queries(self, g, v1, before):
        xp = self.xp
        total = _arrays.cast(self.sums(v1, before), g.dtype, xp)
        u = self.phi_q * xp.matmul(g, xp.matrix_transpose(total[..., :-1]))
        w = self.phi_q * xp.matrix_transpose(total[..., -1:])
        return u, w

    def to_keys(self, h, v1, after):
        xp = self.xp
        total = after + _arrays.unbroadcast(self.contracted(self.phi_q, h, after), tuple(after.shape), xp)
        b = _arrays.cast(total, h.dtype, xp)
        d_lk = self.phi_k * xp.matmul(v1, xp.matrix_transpose(b))
        return d_lk, xp.matmul(self.phi_k, b[..., :-1]), total * self.shift


# -- earlier keys ----------------------------------------------------------------------------------------------


class Chunks:
    """Queries see the keys up to their own: chunks of tokens, halves of halves inside.

    Tokens lie as (..., chunks, size, .). `ends[level]` has the running maximum of nk at the end of each block of
    2^level tokens, (..., chunks, size / 2^level, R), `starts[level]` the one before its first token.
    """

    def __init__(self, lq, lk, gauge, key_mask, dtype, chunk_size, xp):
        n_tokens = lk.shape[-2]
        self.n_tokens, self.xp, self.dtype = n_tokens, xp, dtype
        size = self.size = min(chunk_size, _power_above(n_tokens))
        fq, nq, fk, nk = operands(lq, lk, key_mask, dtype, xp)
        powers = Powers(lq, xp)
        nk = _padded(nk, size, NONE, xp)
        top = xp.maximum(running_maximum(nk, xp), gauge[..., None, :])
        self.gauge = top[..., -1, :] if top.shape[-2] else gauge
        before = xp.concat(
            [xp.broadcast_to(gauge[..., None, :], tuple(top[..., :1, :].shape)), top[..., :-1, :]], axis=-2
        )
        raised = _padded(nq, size, 0, xp) + top
        rho = _largest(raised, xp)
        self.rho = rho[..., :n_tokens, :]
        fq = _padded(fq, size, 0, xp)
        # a query with its own key, in the gauge of its own token; then without it, in that of the token before
        self.own_q = self.cut(fq * powers(raised - rho, dtype))
        self.phi_q = self.own_q * self.cut(powers(before - top, dtype))
        self.phi_k = self.cut(_padded(fk, size, 0, xp) * powers(nk - top, dtype))
        top, before = self.cut(top), self.cut(before)
        # what a level's blocks have to be multiplied with to reach the gauge of the next level
        self.lower, self.raise_ = [], []
        for width in _widths(size):
            ends, starts = top[..., width - 1 :: width, :], before[..., ::width, :]
            self.lower.append(powers(starts[..., 0::2, :] - starts[..., 1::2, :], dtype)[..., None, :])
            self.raise_.append(powers(ends[..., 0::2, :] - ends[..., 1::2, :], dtype)[..., None, :])
        self.shift = powers(before[..., 0, :] - top[..., -1, :], _arrays.wide(lq, xp))[..., None]  # (..., chunks, R, 1)

    def cut(self, x):
        return self.xp.reshape(x, (*x.shape[:-2], x.shape[-2] // self.size, self.size, x.shape[-1]))

    def uncut(self, x):
        x = self.xp.reshape(x, (*x.shape[:-3], x.shape[-3] * x.shape[-2], x.shape[-1]))
        return x[..., : self.n_tokens, :]

    def values(self, x):
        """(..., N, E) -> (..., chunks, size, E), filled with zeros."""
        return self.cut(_padded(x, self.size, 0, self.xp))

    def levels(self):
        """For each level phi_q of the second halves and phi_k of the first halves, (..., blocks, width, R).

        At last, as level None, phi_q in the gauge before the chunk and phi_k in that after it, (..., chunks, size, R).
        """
        xp, phi_q, phi_k = self.xp, self.phi_q, self.phi_k
        for level, width in enumerate(_widths(self.size)):
            q, k = _halves(phi_q, width, xp), _halves(phi_k, width, xp)
            yield width, q[1], k[0]
            phi_q = _merged(q[0], q[1] * self.lower[level], xp)
            phi_k = _merged(k[0] * self.raise_[level], k[1], xp)
        yield None, phi_q, phi_k

    def before_each(self, own, first, shift):
        """S of each chunk and the last one: S' = shift S + own, a chunk at a time; first (..., R, E + 1)."""
        xp, seen, now = self.xp, [], first
        for c in range(own.shape[-3]):
            seen.append(now)
            now = now * shift[..., c, :, :] + own[..., c, :, :]
        return xp.stack(seen, axis=-3), now

    def attend(self, v1, first):
        """[num, den] of all queries and the sums after all keys."""
        xp, dtype, T = self.xp, self.dtype, self.xp.matrix_transpose
        if self.n_tokens == 0:
            return xp.matmul(self.uncut(self.phi_q), _arrays.cast(first, dtype, xp)), first
        c = self.values(v1)
        out = _sum(self.own_q * self.phi_k, xp) * c
        for width, q, k in self.levels():
            if width is None:
                own = _arrays.cast(xp.matmul(T(k), c), first.dtype, xp)
                sums, total = self.before_each(own, first, self.shift)
                out = out + xp.matmul(q, _arrays.cast(sums, dtype, xp))
            else:
                early, late = _halves(out, width, xp)
                out = _merged(early, late + xp.matmul(xp.matmul(q, T(k)), _halves(c, width, xp)[0]), xp)
        return self.uncut(out), total

    def to_queries(self, g, v1, first):
        """u and w, (..., N, R)."""
        xp, dtype, T = self.xp, self.dtype, self.xp.matrix_transpose
        if self.n_tokens == 0:
            q = self.uncut(self.phi_q)
            return q * _sum(g, xp), q
        g, c = self.values(g), self.values(v1)
        w = self.own_q * self.phi_k
        u = w * _sum(g * c[..., :-1], xp)
        w = xp.broadcast_to(w, tuple(u.shape))
        for width, q, k in self.levels():
            if width is None:
                own = _arrays.cast(xp.matmul(T(k), c), first.dtype, xp)
                sums = _arrays.cast(self.before_each(own, first, self.shift)[0], dtype, xp)
                u = u + q * xp.matmul(g, T(sums[..., :-1]))
                w = w + q * T(sums[..., -1:])
            else:
                scores = xp.matmul(_halves(g, width, xp)[1], T(_halves(c[..., :-1], width, xp)[0]))
                early, late = _halves(u, width, xp)
                u = _merged(early, late + q * xp.matmul(scores, k), xp)
                early, late = _halves(w, width, xp)
                w = _merged(early, late + q * xp.sum(k, axis=-2, keepdims=True, dtype=dtype), xp)
        return self.uncut(u), self.uncut(w)

    def to_keys(self, h, v1, after):
        """d_lk, d_v and the cotangent of the incoming sums."""
        xp, dtype, T = self.xp, self.dtype, self.xp.matrix_transpose
        if self.n_tokens == 0:
            k = self.uncut(self.phi_k)
            return k * _sum(h, xp), _sum(k, xp) * h[..., :-1], after
        h, c = self.values(h), self.values(v1)
        own = self.own_q * self.phi_k
        d_lk = own * _sum(h * c, xp)
        d_v = _sum(own, xp) * h[..., :-1]
        for width, q, k in self.levels():
            if width is None:
                own = _arrays.cast(xp.matmul(T(q), h), after.dtype, xp)
                # the state is that of its keys: queries that share them add up, in it and in what the pairs gave
                lead = tuple(after.shape[:-2])
                own, d_lk, d_v = (_arrays.unbroadcast(x, (*lead, *x.shape[-3:]), xp) for x in (own, d_lk, d_v))
                sums, total = self.before_each(xp.flip(own, axis=-3), after, xp.flip(self.shift, axis=-3))
                sums = _arrays.cast(xp.flip(sums, axis=-3), dtype, xp)
                d_lk = d_lk + k * xp.matmul(c, T(sums))
                d_v = d_v + xp.matmul(k, sums[..., :-1])
            else:
                late_h, early_c = _halves(h, width, xp)[1], _halves(c, width, xp)[0]
                early, late = _halves(d_lk, width, xp)
                d_lk = _merged(early + k * xp.matmul(xp.matmul(early_c, T(late_h)), q), late, xp)
                early, late = _halves(d_v, width, xp)
                d_v = _merged(early + xp.matmul(xp.matmul(k, T(q)), late_h[..., :-1]), late, xp)
        return self.uncut(d_lk), self.uncut(d_v), total

    def pairs(self):
        """A[t, s] of one chunk that holds all tokens: the triangle, grown from its diagonal."""
        xp = self.xp
        a = _sum(self.own_q * self.phi_k, xp)[..., None]  # (..., chunks, blocks, width, width)
        for width, q, k in self.levels():
            if width is not None:
                shape = (*a.shape[:-3], a.shape[-3] // 2, 2, width, width)
                a = xp.reshape(a, shape)
                first, second = a[..., 0, :, :], a[..., 1, :, :]
                seen = xp.matmul(q, xp.matrix_transpose(k))
                above, below = xp.concat([first, xp.zeros_like(first)], axis=-1), xp.concat([seen, second], axis=-1)
                a = xp.concat([above, below], axis=-2)
        return xp.reshape(a, (*a.shape[:-4], a.shape[-2], a.shape[-1]))


def _widths(size):
    """1, 2, 4, ... below size."""
    return [1 << level for level in range(size.bit_length() - 1)]


def _power_above(n):
    return 1 << max(n - 1, 0).bit_length()


def _halves(x, width, xp):
    """(..., chunks, size, d) -> its blocks' first and second halves, (..., chunks, blocks, width, d) each."""
    x = xp.reshape(x, (*x.shape[:-2], x.shape[-2] // (2 * width), 2, width, x.shape[-1]))
    return x[..., 0, :, :], x[..., 1, :, :]


def _merged(first, second, xp):
    """The inverse of `_halves`."""
    x = xp.stack([first, second], axis=-3)
    return xp.reshape(x, (*x.shape[:-4], x.shape[-4] * 2 * x.shape[-2], x.shape[-1]))


def _padded(x, size, value, xp):
    """(..., T, d) filled up to whole chunks."""
    *lead, n_tokens, width = x.shape
    missing = -n_tokens % size
    if missing == 0:
        return x
    filling = xp.full((*lead, missing, width), value, dtype=x.dtype, device=_arrays.device(x))
    return xp.concat([x, filling], axis=-2)


def _chunked(x, size, value, xp):
    x = _padded(x, size, value, xp)
    return xp.reshape(x, (*x.shape[:-2], x.shape[-2] // size, size, x.shape[-1]))


def running_maximum(x, xp):
    """max over the rows up to each, (..., T, R): pairs first, then between them."""
    n = x.shape[-2]
    if n <= 1:
        return x
    if n % 2:
        x = xp.concat([x, x[..., -1:, :]], axis=-2)
    even, odd = x[..., 0::2, :], x[..., 1::2, :]
    pairs = running_maximum(xp.maximum(even, odd), xp)
    even = xp.concat([even[..., :1, :], xp.maximum(even[..., 1:, :], pairs[..., :-1, :])], axis=-2)
    x = xp.stack([even, pairs], axis=-2)
    return xp.reshape(x, (*x.shape[:-3], 2 * x.shape[-3], x.shape[-1]))[..., :n, :]


# -- operands and state ----------------------------------------------------------------------------------------


def operands(lq, lk, key_mask, dtype, xp):
    """fq, nq, fk, nk with e^l = f 2^n; a key nobody sees has the logarithm of 0."""
    if key_mask is not None:
        lk = xp.where(key_mask[..., None], lk, xp.full_like(lk, -math.inf))
    return *split(lq, dtype, xp), *split(lk, dtype, xp)


def split(x, dtype, xp):
    """f in `dtype` and n (int32) with e^x = f 2^n; f = 0 for -inf, NaN for NaN, inf and beyond LIMIT, with n = NONE."""
    x = _arrays.cast(x, _arrays.wide(x, xp), xp)
    high, low = LN2[_arrays.dtype_name(x)]
    usable = xp.abs(x) < LIMIT * math.log(2)
    y = xp.where(usable, x, xp.zeros_like(x))
    n = xp.round(y / math.log(2))
    f = _arrays.cast(xp.exp((y - n * high) - n * low), dtype, xp)
    other = xp.where(x == -math.inf, xp.zeros_like(f), xp.full_like(f, math.nan))
    whole = xp.astype(n, xp.int32)
    return xp.where(usable, f, other), xp.where(usable, whole, xp.full_like(whole, NONE))


class Powers:
    """2^n for n <= 0, exact, 0 below the normal range; from tables, since no library promises that its pow is exact."""

    def __init__(self, like, xp):
        self.like, self.xp, self.tables = like, xp, {}

    def __call__(self, n, dtype):
        xp = self.xp
        if dtype not in self.tables:
            numbers = TABLES["float64" if dtype == xp.float64 else "float32"]
            self.tables[dtype] = xp.asarray(numbers, dtype=dtype, device=_arrays.device(self.like))
        table = self.tables[dtype]
        index = xp.reshape(xp.clip(-n, 0, table.shape[0] - 1), (-1,))
        return xp.reshape(xp.take(table, index, axis=0), tuple(n.shape))


def _largest(x, xp):
    """The maximum over the features, 0 where there are none."""
    if x.shape[-1] == 0:
        return xp.zeros((*x.shape[:-1], 1), dtype=x.dtype, device=_arrays.device(x))
    return xp.max(x, axis=-1, keepdims=True)


def _with_ones(v, xp):
    return xp.concat([v, xp.ones((*v.shape[:-1], 1), dtype=v.dtype, device=_arrays.device(v))], axis=-1)


def _joined(a, b, xp):
    lead = _arrays.broadcast_shapes(tuple(a.shape[:-1]), tuple(b.shape[:-1]))
    return xp.concat([xp.broadcast_to(x, (*lead, x.shape[-1])) for x in (a, b)], axis=-1)


def _sum(x, xp):
    return xp.sum(x, axis=-1, keepdims=True, dtype=x.dtype)


def value(state, xp):
    """sums + rest, in the dtype of running totals."""
    sums, rest = (_arrays.cast(x, _arrays.wide(x, xp), xp) for x in state[:2])
    return sums + rest


def rounded(total, like, xp):
    """A running total as (sums, rest) in the dtype of the state."""
    sums = _arrays.cast(total, like.dtype, xp)
    rest = _arrays.cast(total - _arrays.cast(sums, total.dtype, xp), like.dtype, xp)
    return sums, xp.where(xp.isfinite(rest), rest, xp.zeros_like(rest))
