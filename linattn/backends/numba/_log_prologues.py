"""What the kernels of the log-linear engine do to a chunk before and after its products. Names: _loglinear.py.

Keys and queries are split once a chunk and laid down span by span, in the gauge of the span.
"""

from __future__ import annotations

from ._jit import helper
from ._logs import (
    cotangent_rows,
    excess_rows,
    key_rows,
    multiply_rows,
    multiply_rows_add,
    none_rows,
    query_rows,
    row_limit,
    split_rows,
    top_rows,
    widen_by_logs,
)
from ._prologues import hide
from ._rows import add_rows, centre_rows, clear_rows, copy_rows, divide_rows, row_dots
from ._tiles import TILE
from ._vector import behind

__all__ = [
    "end_of_span", "finish_keys", "finish_queries", "gauge_of_keys", "lay_cotangents", "lay_keys", "lay_queries",
    "lay_values", "live_divisors", "split_keys",
]  # fmt: skip

T = TILE.tokens


@helper
def split_keys(lk, at, stride, v, v_at, v_stride, mask, mask_at, mask_stride, masked, count, F, Fp, E, f, n, top):
    """A chunk of keys, masked ones as the logarithm of 0, and the size of their values."""
    split_rows(count, F, lk, at, stride, f, 0, Fp, n, 0, Fp)
    top_rows(count, E, v, v_at, v_stride, top, 0, 1)
    if masked:
        for t in range(count):
            if not mask[mask_at + t * mask_stride]:
                clear_rows(1, F, f, t * Fp, Fp)
                none_rows(1, F, n, t * Fp, Fp)


@helper
def end_of_span(n, m, m_top, Fp, first, count, top, most, room, bits):
    """The first row from `first` on that exceeds the gauge by too much, or count. m_top: the gauge of these rows."""
    if first < count:
        excess_rows(1, Fp, m_top, 0, 0, m, 0, 0, bits, first, 0)
        largest = top[first]
        for t in range(first + 1, count):
            largest = max(largest, top[t])
        if bits[first] <= row_limit(largest, most, room):
            return count
    excess_rows(count - first, Fp, n, first * Fp, Fp, m, 0, 0, bits, first, 1)
    for t in range(first, count):
        if bits[t] > row_limit(top[t], most, room):
            return t
    return count


@helper
def clear_others(a, b, width, x):
    """Zeros for the tokens of the blocks of a <= t < b that are not among them."""
    start, stop = a // T * T, (b + T - 1) // T * T
    clear_rows(a - start, width, x, start * width, width)
    clear_rows(stop - b, width, x, b * width, width)


@helper
def lay_keys(f, n, m, a, b, Fp, K):
    key_rows(b - a, Fp, f, a * Fp, Fp, n, a * Fp, Fp, m, 0, 0, K, a * Fp, Fp)
    clear_others(a, b, Fp, K)


@helper
def lay_queries(f, n, m, a, b, Fp, Q, rho):
    query_rows(b - a, Fp, f, a * Fp, Fp, n, a * Fp, Fp, m, 0, 0, Q, a * Fp, Fp, rho, a, 1)
    clear_others(a, b, Fp, Q)


@helper
def lay_values(v, at, stride, mu, mask, mask_at, mask_stride, masked, a, b, E, Ep, V):
    """v - mu; zeros for masked keys."""
    centre_rows(b - a, E, v, at + a * stride, stride, mu, 0, 0, V, a * Ep, Ep)
    clear_others(a, b, Ep, V)
    if masked:
        hide(mask, mask_at + a * mask_stride, mask_stride, b - a, behind(V, a * Ep), Ep)


@helper
def lay_cotangents(d_out, at, stride, den, a, b, E, Ep, G):
    """d_out / den, 0 where den is 0."""
    divide_rows(b - a, E, den, a, 1, d_out, at + a * stride, stride, G, a * Ep, Ep)
    clear_others(a, b, Ep, G)


@helper
def gauge_of_keys(lk, at, stride, mask, mask_at, mask_stride, masked, count, F, m):
    """m = max(m, n of every visible key)"""
    if not masked:
        widen_by_logs(count, F, lk, at, stride, m, 0, 0, m, 0, 0)
        return
    for s in range(count):
        if mask[mask_at + s * mask_stride]:
            widen_by_logs(1, F, lk, at + s * stride, stride, m, 0, 0, m, 0, 0)


@helper
def live_divisors(d, a, b, den):
    """den, NaN where it is infinite: finite numerators over it would be 0, a wrong finite number."""
    for t in range(a, b):
        den[t] = d[t] + (d[t] - d[t])


@helper
def finish_queries(a, b, F, Fp, Q, Y, Z, Z_at, Z_stride, d_lse, lse_given, l_at, l_stride, d, dots, go, share,
                   den, h, at, d_lq, d_lq_at):  # fmt: skip
    """d_lq = Q (Y - go Z) / den, den = Q . Z, go = Q . Y / den - d_lse, h = -go / den; 0 in rows that see nothing."""
    row_dots(b - a, Fp, Q, a * Fp, Fp, Z, Z_at, Z_stride, d, a, 1)
    row_dots(b - a, Fp, Q, a * Fp, Fp, Y, a * Fp, Fp, dots, a, 1)
    live_divisors(d, a, b, behind(den, at))
    for t in range(a, b):
        c = den[at + t]
        if c == 0:
            go[t], share[t], h[at + t] = c, c, c
        else:
            go[t] = dots[t] / c - d_lse[l_at + t * l_stride] if lse_given else dots[t] / c
            share[t] = 1 / c
            h[at + t] = -go[t] / c
    cotangent_rows(b - a, F, go, a, 1, share, a, 1, Q, a * Fp, Fp, Y, a * Fp, Fp, Z, Z_at, Z_stride,
                   d_lq, d_lq_at + a * F, F)  # fmt: skip


@helper
def finish_keys(a, b, F, Fp, E, Ep, K, Y, U, add, d_lk, d_v, at):
    """d_lk = K Y and d_v = U; later heads of a group add."""
    here, there = (at + a) * F, (at + a) * E
    if add:
        multiply_rows_add(b - a, F, K, a * Fp, Fp, Y, a * Fp, Fp, d_lk, here, F, d_lk, here, F)
        add_rows(b - a, E, U, a * Ep, Ep, d_v, there, E, d_v, there, E)
    else:
        multiply_rows(b - a, F, K, a * Fp, Fp, Y, a * Fp, Fp, d_lk, here, F)
        copy_rows(b - a, E, U, a * Ep, Ep, d_v, there, E)
