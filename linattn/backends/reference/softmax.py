"""The softmax engine in the array API: exact, a block of queries at a time, never N x M.

    p[t, s] = exp(scale q[t] . k[s]) / sum over visible s' of exp(scale q[t] . k[s'])        out[t] = sum_s p[t, s] v[s]

Query t sees the keys s <= t + offset if `span` is "past" (offset: keys that came before the first query), else all.
A row that sees nothing is 0. What is not finite is zero in the products and NaN in what sees it.
"""

from __future__ import annotations

import math

from linattn import _arrays
from linattn.backends.reference.linear import visible, visible_mean

ROWS = 128  # queries a block: ROWS x M scores exist at a time


def forward(q, k, v, *, scale, span, offset, key_mask, out, xp, rows=ROWS):
    """out (..., N, E) and lse (..., N), the logarithm of each row's sum."""
    wide_q, wide_k, wide_v = operands(q, k, v, key_mask, xp)
    finite_v, bad = _split_bad(wide_v, xp)
    reached = _any_up_to(bad, xp)
    lead = _lead(q, k, v, key_mask)
    parts = []
    for first, last, n_seen in _blocks(q.shape[-2], k.shape[-2], span, offset, rows):
        p, total, top, _ = rows_of(wide_q, wide_k, first, last, n_seen, scale, span, offset, key_mask, xp)
        y = xp.matmul(p, finite_v[..., :n_seen, :]) / _nonzero(total, xp)
        if n_seen:
            y = _nan_where(_seen_by_rows(reached, first, last, span, offset), y, xp)
        log_total = xp.log(_nonzero(total, xp))
        lse = xp.where(total == 0, xp.full_like(total, -math.inf), top + log_total)
        parts.append((_stretch(y, lead, xp), _stretch(lse, lead, xp)))
    if not parts:
        empty = xp.zeros((*lead, 0, v.shape[-1]), dtype=q.dtype, device=_arrays.device(q))
        return _arrays.fill(out, empty), _arrays.cast(xp.sum(empty, axis=-1), wide_q.dtype, xp)
    y, lse = (xp.concat(list(x), axis=-2) for x in zip(*parts, strict=True))
    return _arrays.fill(out, _arrays.cast(y, q.dtype, xp)), lse[..., 0]


def backward(d_out, q, k, v, *, scale, span, offset, key_mask, out, xp, rows=ROWS):
    """A block's rows are whole, so p is made again from its own maximum: a saved lse would round every weight.

    out = p v                    d_v = p^T g            d_p = g v^T  (v centred: sum_s d_s = 0 makes any offset cancel)
    p = softmax(s)               d_s = p o (d_p - sum_s p o d_p)
    s = scale q k^T              d_q = scale d_s k      d_k = scale d_s^T q
    """
    wide_q, wide_k, wide_v = operands(q, k, v, key_mask, xp)
    g = _arrays.row_major(_arrays.cast(d_out, wide_q.dtype, xp))
    finite_q, _ = _split_bad(wide_q, xp)
    finite_k, _ = _split_bad(wide_k, xp)
    finite_g, bad_g = _split_bad(g, xp)
    vc = visible(wide_v - visible_mean(wide_v, key_mask, xp), key_mask, xp)
    transpose, n_keys = xp.matrix_transpose, k.shape[-2]
    d_q_parts, d_k, d_v = [], None, None
    for first, last, n_seen in _blocks(q.shape[-2], n_keys, span, offset, rows):
        p, total, _, seen = rows_of(wide_q, wide_k, first, last, n_seen, scale, span, offset, key_mask, xp)
        p = p / _nonzero(total, xp)
        d_p = xp.matmul(g[..., first:last, :], transpose(vc[..., :n_seen, :]))
        d_p = xp.where(seen, d_p, xp.zeros_like(d_p))
        d_s = p * (d_p - xp.sum(p * d_p, axis=-1, keepdims=True, dtype=p.dtype))
        d_s = xp.where(seen, d_s, xp.zeros_like(d_s))
        d_q_parts.append(scale * xp.matmul(d_s, finite_k[..., :n_seen, :]))
        d_k_part = scale * xp.matmul(transpose(d_s), finite_q[..., first:last, :])
        d_v_part = xp.matmul(transpose(p), finite_g[..., first:last, :])
        d_k, d_v = _add(d_k, d_k_part, n_keys, xp), _add(d_v, d_v_part, n_keys, xp)
    if d_k is None:
        grads = tuple(xp.zeros_like(x) for x in (q, k, v))
    else:
        d_v = _nan_where(_keys_reached(bad_g, n_keys, span, offset, xp), d_v, xp)
        grads = (xp.concat(d_q_parts, axis=-2), visible(d_k, key_mask, xp), visible(d_v, key_mask, xp))
    return tuple(
        _arrays.fill(o, _arrays.cast(_arrays.unbroadcast(d_x, tuple(x.shape), xp), x.dtype, xp))
        for o, d_x, x in zip(out or (None, None, None), grads, (q, k, v), strict=True)
    )


def operands(q, k, v, key_mask, xp):
    q, k, v = (_arrays.cast(x, _arrays.accumulator(x, xp), xp) for x in (q, k, v))
    return tuple(_arrays.row_major(x) for x in (q, visible(k, key_mask, xp), visible(v, key_mask, xp)))


def _lead(q, k, v, key_mask):
    leads = [tuple(x.shape[:-2]) for x in (q, k, v)]
    return _arrays.broadcast_shapes(*leads, *([] if key_mask is None else [tuple(key_mask.shape[:-1])]))


def _blocks(n_queries, n_keys, span, offset, rows):
    """(first query, behind the last, number of keys they can see)"""
    for first in range(0, n_queries, rows):
        last = min(first + rows, n_queries)
        yield first, last, n_keys if span == "all" else min(last + offset, n_keys)


def rows_of(q, k, first, last, n_seen, scale, span, offset, key_mask, xp):
    """exp(s - top), its row sums, top, and who sees whom, for the queries first .. last - 1."""
    scores = scale * xp.matmul(q[..., first:last, :], xp.matrix_transpose(k[..., :n_seen, :]))
    seen = xp.ones_like(scores[..., :, :], dtype=xp.bool)
    if span == "past":
        t = xp.arange(first + offset, last + offset, device=_arrays.device(q))[:, None]
        seen = seen & (xp.arange(n_seen, device=_arrays.device(q))[None, :] <= t)
    if key_mask is not None:
        seen = seen & key_mask[..., None, :n_seen]
    if n_seen == 0:
        zero = xp.sum(scores, axis=-1, keepdims=True, dtype=scores.dtype)
        return scores, zero, zero, seen
    scores = xp.where(seen, scores, xp.full_like(scores, -math.inf))
    top = xp.max(scores, axis=-1, keepdims=True)
    top = xp.where(top == -math.inf, xp.zeros_like(top), top)
    p = xp.exp(scores - top)
    return p, xp.sum(p, axis=-1, keepdims=True, dtype=p.dtype), top, seen


def _split_bad(x, xp):
    """x with zeros where it is not finite, and where that was."""
    bad = ~xp.isfinite(x)
    return xp.where(bad, xp.zeros_like(x), x), bad


def _any_up_to(bad, xp):
    """Whether any of the tokens up to each one is bad."""
    return xp.cumulative_sum(xp.astype(bad, xp.int32), axis=-2) > 0


def _seen_by_rows(reached, first, last, span, offset):
    if span == "all":
        return reached[..., -1:, :]
    return reached[..., first + offset : last + offset, :]


def _keys_reached(bad_g, n_keys, span, offset, xp):
    """Keys that a row with a bad cotangent sees: all that are not behind the last such row."""
    later = xp.flip(_any_up_to(xp.flip(bad_g, axis=-2), xp), axis=-2)  # any row from t on
    if span == "all":
        return later[..., :1, :]
    before = xp.broadcast_to(later[..., :1, :], (*later.shape[:-2], offset, later.shape[-1]))
    return xp.concat([before, later], axis=-2)[..., :n_keys, :]


def _nonzero(total, xp):
    return xp.where(total == 0, xp.ones_like(total), total)


def _nan_where(condition, x, xp):
    return xp.where(condition, xp.full_like(x[..., :1, :1], math.nan), x)


def _stretch(x, lead, xp):
    return xp.broadcast_to(x, (*lead, *x.shape[-2:]))


def _add(total, part, n_keys, xp):
    """A running total over blocks, in float64 where there is one; `part` reaches the first keys only."""
    part = _arrays.cast(part, _arrays.wide(part, xp), xp)
    missing = n_keys - part.shape[-2]
    if missing:
        zeros = xp.zeros((*part.shape[:-2], missing, part.shape[-1]), dtype=part.dtype, device=_arrays.device(part))
        part = xp.concat([part, zeros], axis=-2)
    return part if total is None else total + part
