"""Attention and pools over a list of edges: a gather for each edge, rows of like length at a time.

Rows are filled up to a power of two (`mixing.rows`), at most twice the edges. What flows back to keys is gathered
through the transposed list: nothing is scattered, and the order of every sum is fixed.
"""

from __future__ import annotations

import math
from math import prod

from linattn import _arrays

GATHERED = 1 << 22  # numbers gathered at a time


def forward(q, sources, *, mixing, scale, out, xp):
    """As combiner.forward."""
    k, v, visible, bias = joined(sources, xp)
    finite, bad = split_bad(v, xp)
    lead = _leading(q, k, v, visible, bias)
    width = max(q.shape[-1], v.shape[-1])

    def rows(part):
        p, met = probabilities(q, k, visible, bias, mixing, part, scale, xp)
        y = xp.matmul(p[..., None, :], gathered(finite, part.keys, xp))[..., 0, :]
        reached = xp.any(gathered(bad, part.keys, xp) & met[..., None], axis=-2)
        return xp.where(reached, xp.full_like(y, math.nan), y)

    shape = (*lead, mixing.n_queries, v.shape[-1])
    y = by_rows(rows, mixing.rows, prod(lead) * width, shape, q, xp)
    return _arrays.fill(out, y)


def backward(d_out, q, sources, *, mixing, scale, xp):
    """As combiner.backward; p and d_s of every edge are kept on the way, and read again key by key."""
    k, v, visible, bias = joined(sources, xp)
    lead = tuple(d_out.shape[:-2])
    width = prod(lead) * max(q.shape[-1], v.shape[-1])
    n_keys = k.shape[-2]
    finite_q, finite_k = split_bad(q, xp)[0], split_bad(k, xp)[0]
    finite_g, bad_g = split_bad(d_out, xp)
    kept = []

    def queries(part):
        p, met = probabilities(q, k, visible, bias, mixing, part, scale, xp)
        g = xp.take(d_out, _index(part.rows, q, xp), axis=-2)
        d_p = xp.matmul(gathered(v, part.keys, xp), g[..., None])[..., 0]
        d_p = xp.where(met, d_p, xp.zeros_like(d_p))
        d_s = p * (d_p - xp.sum(p * d_p, axis=-1, keepdims=True, dtype=p.dtype))
        d_s = xp.where(met, d_s, xp.zeros_like(d_s))
        kept.append([_flat(x, lead, xp) for x in (p, d_s, met)])
        return scale * xp.matmul(d_s[..., None, :], gathered(finite_k, part.keys, xp))[..., 0, :]

    d_q = by_rows(queries, mixing.rows, width, (*lead, *q.shape[-2:]), q, xp)
    if not kept:
        return xp.zeros_like(q), [(xp.zeros_like(k_own), xp.zeros_like(v_own)) for k_own, v_own, _, _ in sources]
    p, d_s, met = (xp.concat(x, axis=-1) for x in zip(*kept, strict=True))
    places, (turned, order) = mixing.rows.places, mixing.turned

    def keys(part):
        at = places[order[part.entries]]
        real = _index(part.real, q, xp)
        p_own, d_s_own, met_own = (
            xp.where(real, picked(x, at, xp), xp.zeros_like(x[..., :1, None])) for x in (p, d_s, met)
        )
        t = part.keys
        d_k = scale * xp.matmul(d_s_own[..., None, :], gathered(finite_q, t, xp))[..., 0, :]
        d_v = xp.matmul(p_own[..., None, :], gathered(finite_g, t, xp))[..., 0, :]
        reached = xp.any(gathered(bad_g, t, xp) & met_own[..., None], axis=-2)
        return xp.concat([d_k, xp.where(reached, xp.full_like(d_v, math.nan), d_v)], axis=-1)

    both = by_rows(keys, turned, width, (*lead, n_keys, q.shape[-1] + v.shape[-1]), q, xp)
    d_sources, first = [], 0
    for k_own, v_own, _, _ in sources:
        last = first + k_own.shape[-2]
        part = both[..., first:last, :]
        d_k, d_v = part[..., : q.shape[-1]], part[..., q.shape[-1] :]
        d_sources.append(tuple(_arrays.unbroadcast(d, tuple(x.shape), xp) for d, x in ((d_k, k_own), (d_v, v_own))))
        first = last
    return _arrays.unbroadcast(d_q, tuple(q.shape), xp), d_sources


def probabilities(q, k, visible, bias, mixing, part, scale, xp):
    """p (..., rows, width) of some rows, and which of their entries are met."""
    own = xp.take(q, _index(part.rows, q, xp), axis=-2)
    s = scale * xp.matmul(gathered(k, part.keys, xp), own[..., None])[..., 0]
    if bias is not None:
        s = s + picked(bias, part.keys, xp)
    met = _index(part.real, q, xp)
    if visible is not None:
        met = met & picked(visible, part.keys, xp)
    met = xp.broadcast_to(met, _arrays.broadcast_shapes(tuple(met.shape), tuple(s.shape)))
    s = xp.where(met, s, xp.full_like(s, -math.inf))
    top = xp.max(s, axis=-1, keepdims=True)
    p = xp.exp(s - xp.where(top == -math.inf, xp.zeros_like(top), top))
    total = xp.sum(p, axis=-1, keepdims=True, dtype=p.dtype)
    return p / xp.where(total == 0, xp.ones_like(total), total), met


# -- pools ----------------------------------------------------------------------------------------------------------


def sizes(visible, like, *, mixing, xp):
    """As combiner.sizes."""
    n_regions = mixing.n_queries
    if visible is None:
        return _arrays.cast(xp.asarray(mixing.edges.lengths.copy(), device=_arrays.device(like)), like.dtype, xp)
    lead = tuple(visible.shape[:-1])

    def rows(part):
        met = picked(visible, part.keys, xp) & _index(part.real, like, xp)
        return xp.sum(xp.astype(met, like.dtype), axis=-1, keepdims=True, dtype=like.dtype)

    return by_rows(rows, mixing.rows, prod(lead), (*lead, n_regions, 1), like, xp)[..., 0]


def pool(x, visible, mixing, kind, xp):
    """As combiner._pool: (..., R, C) and the function that takes its cotangent back to x."""
    lead = _arrays.broadcast_shapes(tuple(x.shape[:-2]), () if visible is None else tuple(visible.shape[:-1]))
    width = x.shape[-1]
    shape = (*lead, mixing.n_queries, width)
    step = prod(lead) * width
    shares = []  # of each entry in its region's pool

    def rows(part):
        met = _index(part.real, x, xp)
        if visible is not None:
            met = met & picked(visible, part.keys, xp)
        met = xp.broadcast_to(met, (*lead, *part.keys.shape))[..., None]
        values = gathered(x, part.keys, xp)
        empty = ~xp.any(met, axis=-2, keepdims=True)
        if kind == "mean":
            ones = xp.astype(met, x.dtype)
            count = xp.sum(ones, axis=-2, keepdims=True, dtype=x.dtype)
            share = ones / xp.where(empty, xp.ones_like(count), count)
            y = xp.sum(xp.where(met, values, xp.zeros_like(values)) * share, axis=-2, dtype=x.dtype)
            share = xp.broadcast_to(share, (*share.shape[:-1], width))
        else:
            chosen = _chosen(values, met, part, mixing.rep, kind, xp)
            y = xp.sum(xp.where(chosen, values, xp.zeros_like(values)), axis=-2, dtype=x.dtype)
            share = xp.astype(xp.broadcast_to(chosen, (*lead, *part.keys.shape, width)), x.dtype)
        shares.append(_flat_rows(share, lead, xp))
        return y

    pooled = by_rows(rows, mixing.rows, step, shape, x, xp)
    places = mixing.rows.places

    def backward(d_pooled):
        if not shares:
            return xp.zeros_like(x)
        share = xp.concat(shares, axis=-2)
        turned, order = mixing.turned

        def tokens(part):
            at = _index(part.real, x, xp)[..., None]
            own = gathered(share, places[order[part.entries]], xp)
            d = gathered(d_pooled, part.keys, xp)
            # share o d: 0 NaN is NaN, so what has no share is left out
            return xp.sum(xp.where(at & (own != 0), own * d, xp.zeros_like(d)), axis=-2, dtype=x.dtype)

        full = (*lead, x.shape[-2], width)
        d_x = by_rows(tokens, turned, step, full, x, xp)
        return _arrays.unbroadcast(d_x, tuple(x.shape), xp)

    return pooled, backward


def _chosen(values, met, part, rep, kind, xp):
    """The one entry of each region that stands for it: the first maximum per channel, or the representative."""
    place = xp.reshape(xp.arange(part.keys.shape[-1], device=_arrays.device(values)), (-1, 1))
    if kind == "max":
        values = xp.where(met, values, xp.full_like(values, -math.inf))
        return (xp.argmax(values, axis=-2, keepdims=True) == place) & met
    # the last that is met and not behind the representative, else the first that is met; rows are sorted
    before = met & _index((part.keys <= rep[part.rows, None])[..., None], values, xp)
    last = xp.max(xp.where(before, place, xp.full_like(place, -1)), axis=-2, keepdims=True)
    first = xp.argmax(xp.astype(met, xp.int32), axis=-2, keepdims=True)
    return (xp.where(last < 0, first, last) == place) & met


# -- parts ----------------------------------------------------------------------------------------------------------


def by_rows(function, rows, width, shape, like, xp):
    """`function` of each part, (..., rows, C), put together in the order of the rows; `width` numbers an entry."""
    parts = [function(part) for part in rows.parts(GATHERED // max(1, width))]
    if not parts:
        return xp.zeros(shape, dtype=like.dtype, device=_arrays.device(like))
    y = xp.concat([xp.broadcast_to(y, (*shape[:-2], *y.shape[-2:])) for y in parts], axis=-2)
    return xp.take(y, _index(rows.order, like, xp), axis=-2)


def gathered(x, index, xp):
    """x (..., n, C) at index (m, w): (..., m, w, C)."""
    flat = xp.take(x, _index(index.reshape(-1), x, xp), axis=-2)
    return xp.reshape(flat, (*x.shape[:-2], *index.shape, x.shape[-1]))


def picked(x, index, xp):
    """x (..., n) at index (m, w): (..., m, w)."""
    return xp.reshape(xp.take(x, _index(index.reshape(-1), x, xp), axis=-1), (*x.shape[:-1], *index.shape))


def joined(sources, xp):
    """The sources as one: their tokens one behind the other."""
    if len(sources) == 1:
        return sources[0]
    visible, bias = (_joined_rows(sources, i, xp) for i in (2, 3))
    return _concat([k for k, _, _, _ in sources], -2, xp), _concat([v for _, v, _, _ in sources], -2, xp), visible, bias


def _joined_rows(sources, i, xp):
    """visible (i = 2) or bias (i = 3) of all sources; None if no source has one."""
    if all(source[i] is None for source in sources):
        return None
    rows = []
    for source in sources:
        k, device = source[0], _arrays.device(source[0])
        neutral = (
            xp.ones((k.shape[-2],), dtype=xp.bool, device=device)
            if i == 2
            else xp.zeros((k.shape[-2],), dtype=k.dtype, device=device)
        )
        rows.append(neutral if source[i] is None else source[i])
    return _concat(rows, -1, xp)


def _concat(parts, axis, xp):
    """Along `axis`; the axes before it broadcast."""
    inner = -axis
    lead = _arrays.broadcast_shapes(*(tuple(x.shape[: x.ndim - inner]) for x in parts))
    return xp.concat([xp.broadcast_to(x, (*lead, *x.shape[x.ndim - inner :])) for x in parts], axis=axis)


def _index(array, like, xp):
    """A NumPy array of indices or flags on the device of `like`."""
    return xp.asarray(array.copy(), device=_arrays.device(like))


def _flat(x, lead, xp):
    """(..., rows, width) -> (*lead, rows width)"""
    x = xp.broadcast_to(x, (*lead, *x.shape[-2:]))
    return xp.reshape(x, (*lead, x.shape[-2] * x.shape[-1]))


def _flat_rows(x, lead, xp):
    """(..., rows, width, C) -> (*lead, rows width, C)"""
    return xp.reshape(x, (*lead, x.shape[-3] * x.shape[-2], x.shape[-1]))


def _leading(q, k, v, visible, bias):
    leads = [tuple(x.shape[:-2]) for x in (q, k, v)] + [tuple(x.shape[:-1]) for x in (visible, bias) if x is not None]
    return _arrays.broadcast_shapes(*leads)


def split_bad(x, xp):
    """x with zeros where it is not finite, and where that was."""
    bad = ~xp.isfinite(x)
    return xp.where(bad, xp.zeros_like(x), x), bad
