"""The linear engine in the array API: the definition of both verbs.

    P(a, b, c)[t] = sum over s in span(t) of w(t, s) (a[t] . b[s]) c[s]      span: past (s <= t), future (s >= t), all
    w(t, s) = turn_a[t] . turn_b[s]                                          1 without turns

Tokens are cut into chunks, which are an axis and not a loop. Inside a chunk the pairs are formed; everything
before it comes through the sums S_i = sum_s turn_b[s, i] b[s] c[s]^T, kept in float64 where there is one.
"""

from __future__ import annotations

import math

from linattn import _arrays

FEATURE_MAPS = frozenset({"identity"})
CHUNK = 64
TRANSPOSED = {"past": "future", "future": "past", "all": "all"}


def forward(q, k, v, state, *, feature_map, span, turns, key_mask, normalize, eps, out, xp, chunk_size=CHUNK):
    """out (..., N, E), den (..., N) or None, and the state after all keys. Arguments: engines/linear.py."""
    phi_q, phi_k, v1, _ = operands(q, k, v, key_mask, normalize, eps, xp)
    turn_q, turn_k = turns or (None, None)
    num_den, total = product(phi_q, phi_k, v1, _value(state, xp), turn_q, turn_k, span, chunk_size, xp)
    if normalize:
        num, den = num_den[..., :-1], num_den[..., -1:]
        c, _, dead = divisor(den, eps, xp)
        num_den = xp.where(dead, xp.zeros_like(num), num / c)
        den = den[..., 0]
    else:
        den = None
    return _arrays.fill(out, _arrays.cast(num_den, q.dtype, xp)), den, _split(total, state[0], xp)


def backward(
    d_out, d_state, q, k, v, state, den,
    *, feature_map, span, turns, key_mask, normalize, eps, out, xp, chunk_size=CHUNK,
):  # fmt: skip
    """The lines of `forward`, last line first; values are centred, which changes nothing but the rounding.

    out = num / c                        G = cotangent of [num, den] = [g / c, -c' (g . out) / c]
    [num, den] = P(phi_q, phi_k, v1)     d_phi_q = P (G, v1, phi_k)
                                         d_phi_k = P'(v1, G, phi_q)    d_v1 = P'(phi_k, phi_q, G)    P': span transposed
    """
    phi_q, phi_k, v1, scale = operands(q, k, v, key_mask, normalize, eps, xp)
    turn_q, turn_k = turns or (None, None)
    turned, T = TRANSPOSED[span], xp.matrix_transpose
    run = _with(chunk_size, xp)
    before, after = _value(state, xp), d_state
    after = xp.zeros_like(before) if after is None else _arrays.cast(after, before.dtype, xp)
    g = _arrays.row_major(_arrays.cast(d_out, phi_q.dtype, xp))

    if normalize:
        mu = visible_mean(v1[..., :-1], key_mask, xp)  # (..., 1, E)
        vc = visible(v1[..., :-1] - mu, key_mask, xp)
        wide_mu = _arrays.cast(mu, before.dtype, xp)[..., None, :, :]
        s_num, s_den = before[..., :-1] - before[..., -1:] * wide_mu, before[..., -1:]
        after = xp.concat([after[..., :-1], after[..., -1:] + _sum(after[..., :-1] * wide_mu, xp)], axis=-1)

        den = den[..., None]
        c, slope, dead = divisor(den, eps, xp)
        g = xp.where(dead, xp.zeros_like(g), g / c)
        # dq~ = P(g / c, vc, phi_k);  D = phi_q . dq~ = g . (num - den mu) / c, without cancellation
        d_phi_q, _ = run(g, vc, phi_k, T(s_num), turn_q, turn_k, span)
        d = _sum(phi_q * d_phi_q, xp)
        g_den = -slope * d / c + _sum(g * mu, xp) * (1 - slope * den / c) if eps != "safe" else -d / c
        g_den = xp.where(dead, xp.zeros_like(g_den), g_den)
        # d_phi_q = dq~ + G_den P(1, 1, phi_k)
        ones_q, ones_k = _ones(phi_q, xp), _ones(phi_k, xp)
        seen, _ = run(ones_q, ones_k, phi_k, T(s_den), turn_q, turn_k, span)
        d_phi_q = d_phi_q + g_den * seen
        if scale is not None:
            d_phi_q = d_phi_q * scale
        v1, g1 = xp.concat([vc, v1[..., -1:]], axis=-1), xp.concat([g, g_den], axis=-1)
    else:
        d_phi_q, _ = run(g, v1, phi_k, T(before), turn_q, turn_k, span)
        g1 = g

    # heads of queries that share keys: each has sums of its own, the state's cotangent is added once to all of them
    nothing = xp.zeros_like(after)
    d_phi_k, x = run(v1, g1, phi_q, T(nothing), turn_k, turn_q, turned)
    d_v, _ = run(phi_k, phi_q, g, nothing[..., : g.shape[-1]], turn_k, turn_q, turned)
    lead = tuple(after.shape[:-3])
    d_phi_k = _shared(d_phi_k, lead, xp) + _rows(v1, _each(T(after)), turn_k, xp)
    d_v = _shared(d_v, lead, xp) + _rows(phi_k, _each(after[..., : g.shape[-1]]), turn_k, xp)
    d_before = _arrays.unbroadcast(T(x), tuple(after.shape), xp) + after
    if normalize:
        lost = _sum(d_before[..., :-1] * wide_mu, xp)
        d_before = xp.concat([d_before[..., :-1], d_before[..., -1:] - lost], axis=-1)

    d_state = _arrays.cast(d_before, state[0].dtype, xp)
    grads = (d_phi_q, visible(d_phi_k, key_mask, xp), visible(d_v, key_mask, xp))
    finished = (
        _arrays.fill(o, _arrays.cast(_arrays.unbroadcast(d_x, tuple(x.shape), xp), x.dtype, xp))
        for o, d_x, x in zip(out or (None, None, None), grads, (q, k, v), strict=True)
    )
    return *finished, d_state


# -- the product ------------------------------------------------------------------------------------------------


def _with(chunk_size, xp):
    return lambda a, b, c, start, turn_a, turn_b, span: product(a, b, c, start, turn_a, turn_b, span, chunk_size, xp)


def product(a, b, c, start, turn_a, turn_b, span, chunk_size, xp):
    """P(a, b, c) + a . start, and the sums over all tokens, start included.

    a (..., N, A), b (..., M, A), c (..., M, C); start (..., n, A, C) in the dtype of running totals.
    A row that is not finite is zero in the products and NaN in what sees it, so that it stays where it belongs.
    """
    if span == "future":
        a, b, c = (xp.flip(x, axis=-2) for x in (a, b, c))
        turn_a, turn_b = (None if x is None else xp.flip(x, axis=-2) for x in (turn_a, turn_b))
        out, total = product(a, b, c, start, turn_a, turn_b, "past", chunk_size, xp)
        return xp.flip(out, axis=-2), total

    n_tokens = b.shape[-2]
    if n_tokens == 0:
        return _rows(a, _each(start), turn_a, xp), start
    bad_b, bad_c = ~xp.isfinite(b), ~xp.isfinite(c)
    b, c = xp.where(bad_b, xp.zeros_like(b), b), xp.where(bad_c, xp.zeros_like(c), c)
    bad = xp.any(bad_b, axis=-1, keepdims=True) | bad_c  # (..., M, C): spoils this column of the rows that see it

    size = min(chunk_size, n_tokens)
    b, c, turn_b = (_chunks(x, size, xp) for x in (b, c, turn_b))  # (..., chunks, size, .)
    n_sums, transpose = start.shape[-3], xp.matrix_transpose
    # one chunk's own sums, then all up to and including it
    own = [xp.matmul(transpose(_turned(b, turn_b, i)), c) for i in range(n_sums)]
    own = [_arrays.cast(x, start.dtype, xp) for x in own]
    starts = [x[..., None, :, :] for x in _each(start)]
    if span == "all":
        totals = [s + xp.sum(x, axis=-3, keepdims=True) for s, x in zip(starts, own, strict=True)]
        out = _rows(a, [x[..., 0, :, :] for x in totals], turn_a, xp)
        seen = xp.any(bad, axis=-2, keepdims=True)
    else:
        totals = [s + xp.cumulative_sum(x, axis=-3) for s, x in zip(starts, own, strict=True)]
        earlier = [
            xp.concat([xp.broadcast_to(s, (*x.shape[:-3], 1, *x.shape[-2:])), x[..., :-1, :, :]], axis=-3)
            for s, x in zip(starts, totals, strict=True)
        ]
        a, turn_a = _chunks(a, size, xp), _chunks(turn_a, size, xp)
        scores = xp.matmul(a, transpose(b))
        if turn_a is not None:
            scores = scores * xp.matmul(turn_a, transpose(turn_b))
        out = xp.matmul(xp.tril(scores), c) + _rows(a, earlier, turn_a, xp)
        out = xp.reshape(out, (*out.shape[:-3], out.shape[-3] * size, out.shape[-1]))[..., :n_tokens, :]
        seen = xp.cumulative_sum(_arrays.cast(bad, out.dtype, xp), axis=-2) > 0
    total = xp.stack([x[..., -1, :, :] for x in totals], axis=-3)
    spoiled = xp.any(bad, axis=-2, keepdims=True)[..., None, :, :]
    return _nan_where(seen, out, xp), _nan_where(spoiled, total, xp)


def _shared(x, lead, xp):
    """(..., T, A) summed over the leading axes that keys and values do not have."""
    return _arrays.unbroadcast(x, (*lead, *x.shape[-2:]), xp)


def _each(sums):
    """S_0, S_1, ... of sums (..., n, A, C)."""
    return [sums[..., i, :, :] for i in range(sums.shape[-3])]


def _rows(a, sums, turn_a, xp):
    """sum_i turn_a[t, i] a[t] . S_i"""
    parts = [xp.matmul(a, _arrays.cast(s, a.dtype, xp)) for s in sums]
    if turn_a is None:
        return parts[0]
    return turn_a[..., :1] * parts[0] + turn_a[..., 1:] * parts[1]


def _turned(b, turn_b, i):
    return b if turn_b is None else turn_b[..., i : i + 1] * b


def _chunks(x, size, xp):
    """(..., T, d) -> (..., chunks, size, d), the last chunk filled with zeros; None stays None."""
    if x is None:
        return None
    *lead, n_tokens, width = x.shape
    missing = -n_tokens % size
    if missing:
        x = xp.concat([x, xp.broadcast_to(xp.zeros_like(x[..., :1, :]), (*lead, missing, width))], axis=-2)
    return xp.reshape(x, (*lead, (n_tokens + missing) // size, size, width))


def _nan_where(condition, x, xp):
    return xp.where(condition, xp.full((), math.nan, dtype=x.dtype, device=_arrays.device(x)), x)


# -- operands and state -----------------------------------------------------------------------------------------


def operands(q, k, v, key_mask, normalize, eps, xp):
    """phi_q, phi_k, v1 in the accumulation dtype, and the powers of two by which the rows of phi_q were scaled."""
    dtype = _arrays.accumulator(q, xp)
    phi_q, phi_k, v1 = (_arrays.cast(x, dtype, xp) for x in (q, k, v))
    phi_k, v1 = visible(phi_k, key_mask, xp), visible(v1, key_mask, xp)
    phi_q, phi_k, v1 = (_arrays.row_major(x) for x in (phi_q, phi_k, v1))
    scale = None
    if normalize:
        v1 = xp.concat([v1, _ones(v1, xp)], axis=-1)
        if eps == "safe" and phi_q.shape[-1] > 0:
            # cancels in the ratio, exactly; keeps products of tiny or huge features in range
            scale = _power_of_two(xp.max(xp.abs(phi_q), axis=-1, keepdims=True), xp)
            phi_q = phi_q * scale
    return phi_q, phi_k, v1, scale


def _power_of_two(x, xp):
    """2^-floor(log2 x), where x is positive and finite; else 1."""
    usable = (x > 0) & xp.isfinite(x)
    most = 1022 if _arrays.dtype_name(x) == "float64" else 126
    exponent = xp.floor(xp.log2(xp.where(usable, x, xp.ones_like(x))))
    exponent = xp.where(
        exponent > most, xp.full_like(x, most), xp.where(exponent < -most, xp.full_like(x, -most), exponent)
    )
    return 2.0**-exponent


def divisor(den, eps, xp):
    """c, c' = dc/d_den, and which rows have no weight at all (out = 0 and no gradient passes).

    An infinite den makes NaN: finite numerators over it would be 0, a wrong finite number.
    """
    one, zero = xp.ones_like(den), xp.zeros_like(den)
    c, slope, dead = den, one, zero > 0
    if eps == "safe":
        dead = den == 0
        c = xp.where(dead, one, den)
    elif eps[0] == "add":
        c = den + eps[1]
    else:
        low = den < eps[1]  # NaN is not low and passes
        c, slope = xp.where(low, xp.full_like(den, eps[1]), den), xp.where(low, zero, one)
    return xp.where(xp.isinf(c), xp.full_like(c, math.nan), c), slope, dead


def visible(x, key_mask, xp):
    """Masked keys are chosen away, not multiplied: 0 * NaN is NaN."""
    return x if key_mask is None else xp.where(key_mask[..., None], x, xp.zeros_like(x))


def visible_mean(v, key_mask, xp):
    """Mean over the visible, finite values, (..., 1, E); any finite number would do."""
    known = xp.isfinite(v)
    if key_mask is not None:
        known = known & key_mask[..., None]
    count = xp.sum(_arrays.cast(known, v.dtype, xp), axis=-2, keepdims=True, dtype=v.dtype)
    total = xp.sum(xp.where(known, v, xp.zeros_like(v)), axis=-2, keepdims=True, dtype=v.dtype)
    mean = total / xp.where(count == 0, xp.ones_like(count), count)
    return xp.where(xp.isfinite(mean), mean, xp.zeros_like(mean))


def _ones(x, xp):
    """A column of ones beside x, which may have no columns itself."""
    return xp.ones((*x.shape[:-1], 1), dtype=x.dtype, device=_arrays.device(x))


def _sum(x, xp):
    return xp.sum(x, axis=-1, keepdims=True, dtype=x.dtype)


def _value(state, xp):
    """sums + rest, in the dtype of running totals."""
    sums, rest = (_arrays.cast(x, _arrays.wide(x, xp), xp) for x in state)
    return sums + rest


def _split(total, like, xp):
    """A running total as (sums, rest) in the dtype of the state."""
    sums = _arrays.cast(total, like.dtype, xp)
    rest = _arrays.cast(total - _arrays.cast(sums, total.dtype, xp), like.dtype, xp)
    return sums, xp.where(xp.isfinite(rest), rest, xp.zeros_like(rest))
