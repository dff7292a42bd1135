"""Gauges of the log-linear engine in the array API: logarithms as powers of two, and the products they make.

A grid is built from the logarithms of queries and keys. Its verbs: `attend`, `to_queries` and `to_keys` of the
backward, `pairs`. What they compute, and why no exponent is positive: loglinear.py.
"""

from __future__ import annotations

import math
from typing import Any

from linattn import _arrays

CHUNK = 128  # tokens; a power of two
NONE = -(2**29)  # the gauge of a feature that no key has had yet
LIMIT = 2**27  # |n| from here on is as good as NaN: a log of this size has no digit left that its exponential needs
# ln 2 in two parts, the first short enough that n times it is exact for every n that matters
LN2 = {"float64": (0.6931471824645996, -1.904654299957768e-09), "float32": (0.693115234375, 3.1946184945309415e-05)}

TABLES = {name: [2.0**-n for n in range(last)] + [0.0] for name, last in (("float64", 1023), ("float32", 127))}

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

    def attend(self, v1, before):
        """[num, den] of all queries and the sums after all keys."""
        total = self.sums(v1, before)
        return self.xp.matmul(self.phi_q, _arrays.cast(total, self.phi_q.dtype, self.xp)), total

    def pairs(self):
        """A[t, s]"""
        return self.xp.matmul(self.phi_q, self.xp.matrix_transpose(self.phi_k))

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
        size = self.size = min(chunk_size, power_above(n_tokens))
        fq, nq, fk, nk = operands(lq, lk, key_mask, dtype, xp)
        powers = Powers(lq, xp)
        nk = _padded(nk, size, NONE, xp)
        top = xp.maximum(running_maximum(nk, xp), gauge[..., None, :])
        self.gauge = top[..., -1, :] if top.shape[-2] else gauge
        first = (*top.shape[:-2], min(1, top.shape[-2]), top.shape[-1])
        before = xp.concat(
            [xp.broadcast_to(gauge[..., None, :], first), top[..., : max(top.shape[-2] - 1, 0), :]], axis=-2
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
        out = total_of(self.own_q * self.phi_k, xp) * c
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
            return q * total_of(g, xp), q
        g, c = self.values(g), self.values(v1)
        w = self.own_q * self.phi_k
        u = w * total_of(g * c[..., :-1], xp)
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
            return k * total_of(h, xp), total_of(k, xp) * h[..., :-1], after
        h, c = self.values(h), self.values(v1)
        own = self.own_q * self.phi_k
        d_lk = own * total_of(h * c, xp)
        d_v = total_of(own, xp) * h[..., :-1]
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
        xp, n = self.xp, self.n_tokens
        if n == 0:
            return xp.matmul(self.uncut(self.phi_q), xp.matrix_transpose(self.uncut(self.phi_k)))
        a = total_of(self.own_q * self.phi_k, xp)[..., None]  # (..., chunks, blocks, width, width)
        for width, q, k in self.levels():
            if width is not None:
                shape = (*a.shape[:-3], a.shape[-3] // 2, 2, width, width)
                a = xp.reshape(a, shape)
                first, second = a[..., 0, :, :], a[..., 1, :, :]
                seen = xp.matmul(q, xp.matrix_transpose(k))
                above, below = xp.concat([first, xp.zeros_like(first)], axis=-1), xp.concat([seen, second], axis=-1)
                a = xp.concat([above, below], axis=-2)
        return xp.reshape(a, (*a.shape[:-4], a.shape[-2], a.shape[-1]))[..., :n, :n]


GRIDS: dict[str, Any] = {"past": Chunks, "all": Whole}  # one for each span


def _widths(size):
    """1, 2, 4, ... below size."""
    return [1 << level for level in range(size.bit_length() - 1)]


def power_above(n):
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


# -- logarithms ------------------------------------------------------------------------------------------------


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
        return xp.reshape(xp.take(table, _arrays.indices(index, xp), axis=0), tuple(n.shape))


def _largest(x, xp):
    """The maximum over the features, 0 where there are none."""
    if x.shape[-1] == 0:
        return xp.zeros((*x.shape[:-1], 1), dtype=x.dtype, device=_arrays.device(x))
    return xp.max(x, axis=-1, keepdims=True)


def total_of(x, xp):
    """The sum over the last axis, kept."""
    return xp.sum(x, axis=-1, keepdims=True, dtype=x.dtype)
