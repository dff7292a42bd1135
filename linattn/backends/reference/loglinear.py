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
from linattn.backends.reference._gauges import CHUNK, GRIDS, NONE, power_above, total_of
from linattn.backends.reference.linear import visible, visible_mean


def forward(lq, lk, v, state, *, span, key_mask, out, xp, chunk_size=CHUNK):
    """out (..., N, E), lse (..., N) and the state after all keys. Arguments: engines/loglinear.py."""
    dtype = _arrays.accumulator(v, xp)
    lq, lk, v, key_mask = _laid(lq, lk, v, key_mask)
    v1 = _with_ones(visible(_arrays.cast(v, dtype, xp), key_mask, xp), xp)
    grid = GRIDS[span](lq, lk, state[2], key_mask, dtype, chunk_size, xp)
    num_den, total = grid.attend(v1, value(state, xp))
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
    lq, lk, v, key_mask = _laid(lq, lk, v, key_mask)
    d_out = _arrays.row_major(d_out)
    g, values = _arrays.cast(d_out, dtype, xp), visible(_arrays.cast(v, dtype, xp), key_mask, xp)
    before = value(state, xp)
    after = xp.zeros_like(before) if d_state is None else _arrays.cast(d_state, before.dtype, xp)
    mu = visible_mean(values, key_mask, xp)
    mu = mu if centre else xp.zeros_like(mu)
    v1 = _with_ones(visible(values - mu, key_mask, xp), xp)
    wide_mu = _arrays.cast(mu, before.dtype, xp)
    before = xp.concat([before[..., :-1] - before[..., -1:] * wide_mu, before[..., -1:]], axis=-1)
    after = xp.concat([after[..., :-1], after[..., -1:] + total_of(after[..., :-1] * wide_mu, xp)], axis=-1)

    grid = GRIDS[span](lq, lk, state[2], key_mask, dtype, chunk_size, xp)
    u, w = grid.to_queries(g, v1, before)
    den = total_of(w, xp)
    dead = den == 0
    c = xp.where(dead, xp.ones_like(den), den)
    go = total_of(u, xp) / c
    if d_lse is not None:
        go = go - _arrays.cast(d_lse, dtype, xp)[..., None]
    d_lq = xp.where(dead, xp.zeros_like(u), (u - go * w) / c)
    h = _joined(xp.where(dead, xp.zeros_like(g), g / c), xp.where(dead, xp.zeros_like(go), -go / c), xp)
    d_lk, d_v, d_before = grid.to_keys(h, v1, after)
    d_before = xp.concat([d_before[..., :-1], d_before[..., -1:] - total_of(d_before[..., :-1] * wide_mu, xp)], axis=-1)

    d_lk, d_v = visible(d_lk, key_mask, xp), visible(d_v, key_mask, xp)
    grads = (_arrays.unbroadcast(d_x, tuple(x.shape), xp) for d_x, x in ((d_lq, lq), (d_lk, lk), (d_v, v)))
    d_before = _arrays.unbroadcast(d_before, tuple(state[0].shape), xp)
    return *grads, _arrays.cast(d_before, state[0].dtype, xp)


def weights(lq, lk, *, span, key_mask, xp):
    """A[t, s] / den[t], (..., N, M); rows that see nothing are 0."""
    gauge = xp.full((lk.shape[-1],), NONE, dtype=xp.int32, device=_arrays.device(lk))
    size = power_above(lq.shape[-2])
    a = GRIDS[span](lq, lk, gauge, key_mask, _arrays.wide(lq, xp), size, xp).pairs()
    den = total_of(a, xp)
    dead = den == 0
    return xp.where(dead, xp.zeros_like(a), a / xp.where(dead, xp.ones_like(den), den))


# -- operands and state ----------------------------------------------------------------------------------------


def _laid(lq, lk, v, key_mask):
    """In C order: how arguments lie is no matter of rounding."""
    laid = [_arrays.row_major(x) for x in (lq, lk, v)]
    return *laid, None if key_mask is None else _arrays.row_major(key_mask)


def _with_ones(v, xp):
    return xp.concat([v, xp.ones((*v.shape[:-1], 1), dtype=v.dtype, device=_arrays.device(v))], axis=-1)


def _joined(a, b, xp):
    lead = _arrays.broadcast_shapes(tuple(a.shape[:-1]), tuple(b.shape[:-1]))
    return xp.concat([xp.broadcast_to(x, (*lead, x.shape[-1])) for x in (a, b)], axis=-1)


def value(state, xp):
    """sums + rest, in the dtype of running totals."""
    sums, rest = (_arrays.cast(x, _arrays.wide(x, xp), xp) for x in state[:2])
    return sums + rest


def rounded(total, like, xp):
    """A running total as (sums, rest) in the dtype of the state."""
    sums = _arrays.cast(total, like.dtype, xp)
    rest = _arrays.cast(total - _arrays.cast(sums, total.dtype, xp), like.dtype, xp)
    return sums, xp.where(xp.isfinite(rest), rest, xp.zeros_like(rest))
