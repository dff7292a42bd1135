"""What the kernels of the linear engine do to a chunk before and after its products: features, masks, divisors.

Scratch rows are padded with zeros: Fp, Ep are F and E up to whole slices. Names: _linear.py.
"""

from __future__ import annotations

from ._jit import helper
from ._layout import ADD, CLAMP
from ._maps import map_rows, row_powers
from ._rows import clear_rows, turn_rows
from ._tiles import CHUNK, TILE

__all__ = [
    "den_cotangents", "divisors", "features", "fill_up", "hide", "hide_part", "query_features",
]  # fmt: skip

BLOCK = TILE.tokens * TILE.rows  # a ragged chunk is filled up to whole blocks of either tile


@helper
def fill_up(count, padded, x):
    """Zero the rows behind a ragged chunk that blocks and tiles still read."""
    clear_rows(min(CHUNK, count + BLOCK) - count, padded, x, count * padded, padded)


@helper
def features(x, at, stride, count, D, F, Fp, which, turns, turn_at, turn_stride, phi):
    """phi[t] = turn[t] (x) map(x[t]) for a chunk."""
    map_rows(which, count, D, x, at, stride, phi, Fp)
    if F > D:
        turn_rows(count, D, turns, turn_at, turn_stride, turns, turn_at + 1, turn_stride,
                  phi, 0, Fp, phi, 0, Fp, phi, D, Fp)  # fmt: skip
    fill_up(count, Fp, phi)


@helper
def query_features(x, at, stride, count, D, F, Fp, which, scaled, turns, turn_at, turn_stride, phi, power):
    """The same, each row scaled by a power of two, which cancels in the ratio."""
    map_rows(which, count, D, x, at, stride, phi, Fp)
    if scaled:
        row_powers(count, D, phi, 0, Fp, power, 0, 1)
    if F > D:
        turn_rows(count, D, turns, turn_at, turn_stride, turns, turn_at + 1, turn_stride,
                  phi, 0, Fp, phi, 0, Fp, phi, D, Fp)  # fmt: skip
    fill_up(count, Fp, phi)


@helper
def hide_part(mask, at, stride, count, width, x, x_at, x_stride):
    """Rows of keys nobody sees are zero: chosen away, not multiplied."""
    for t in range(count):
        if not mask[at + t * stride]:
            clear_rows(1, width, x, x_at + t * x_stride, 0)


@helper
def hide(mask, at, stride, count, x, padded):
    """The same for whole rows of scratch."""
    hide_part(mask, at, stride, count, padded, x, 0, padded)


# -- the divisor ------------------------------------------------------------------------------------------------


@helper
def divisors(den, at, count, mode, eps, c):
    """c[t] = c(den). An infinite den makes NaN: finite numerators over it would be 0, a wrong finite number."""
    for t in range(count):
        d = den[at + t]
        if mode == CLAMP:
            d = eps if d < eps else d
        elif mode == ADD:
            d = d + eps
        c[t] = d + (d - d)


@helper
def den_cotangents(dots, den, at, count, mode, eps, shifts, c, h):
    """h = (-c' D + (g . mu)(1 - c' den / c)) / c with D = phi . dq~ in `dots`, (g / c) . mu in `shifts`."""
    for t in range(count):
        if c[t] == 0:
            h[t] = c[t]
        elif mode == CLAMP and den[at + t] < eps:
            h[t] = shifts[t]
        elif mode == ADD:
            h[t] = (shifts[t] * eps - dots[t]) / c[t]
        else:
            h[t] = -dots[t] / c[t]
