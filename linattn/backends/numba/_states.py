"""States of the linear and log-linear engines in scratch: loaded, centred, transposed, stored, and their cotangents.

A state is cut into slices of `cols` columns; a row of a slice is [S | E], its sums and what they are owed. ZE is
[z | e], the same for the denominators. Names: _linear.py.
"""

from __future__ import annotations

from ._jit import helper
from ._rows import add_rows, centre_state, clear_rows, copy_rows, mean_rows, transpose
from ._tiles import CHUNK, TILE
from ._vector import behind

__all__ = [
    "load_centred", "load_cotangent", "load_state", "rows_of", "rows_of_state", "store_cotangent", "store_state",
    "transpose_state", "visible_mean",
]  # fmt: skip

ROWS = TILE.rows


@helper
def rows_of_state(n):
    """Rows a slice of a state has: whole tiles of matrix products."""
    return (n + ROWS - 1) // ROWS * ROWS


rows_of = rows_of_state.py_func


@helper
def load_state(sums, rest, at, column, E_all, F, E, E1, cols, S, ZE, Fp):
    """[S | E] of E columns from (sums, rest); the last column of all, if it is the denominators', to z and e."""
    S_rows = rows_of_state(F)
    for x in range(0, E, cols):
        place, there = x // cols * S_rows * 2 * cols, at + column + x
        clear_rows(S_rows, 2 * cols, S, place, 2 * cols)
        copy_rows(F, min(cols, E - x), sums, there, E1, S, place, 2 * cols)
        copy_rows(F, min(cols, E - x), rest, there, E1, S, place + cols, 2 * cols)
    clear_rows(2, Fp, ZE, 0, Fp)
    if E_all < E1:
        for f in range(F):
            ZE[f] = sums[at + f * E1 + E_all]
            ZE[Fp + f] = rest[at + f * E1 + E_all]


@helper
def store_state(S, ZE, column, E_all, F, E, E1, cols, Fp, sums, rest, at):
    S_rows = rows_of_state(F)
    for x in range(0, E, cols):
        place, there = x // cols * S_rows * 2 * cols, at + column + x
        copy_rows(F, min(cols, E - x), S, place, 2 * cols, sums, there, E1)
        copy_rows(F, min(cols, E - x), S, place + cols, 2 * cols, rest, there, E1)
    if E_all < E1 and column == 0:
        for f in range(F):
            sums[at + f * E1 + E_all] = ZE[f]
            rest[at + f * E1 + E_all] = ZE[Fp + f]


@helper
def load_centred(sums, rest, at, F, E, E1, cols, mu, S, ZE, Fp, Ep, room):
    """The state's transpose with centred values, S_num^T - mu S_den: rows E, columns F. `room` for F rows of Ep."""
    S_rows = rows_of_state(E)
    clear_rows(Fp // cols * S_rows, 2 * cols, S, 0, 2 * cols)
    clear_rows(2, Fp, ZE, 0, Fp)
    den = behind(room, F * Ep)
    for f in range(F):
        if E < E1:
            ZE[f] = sums[at + f * E1 + E]
            ZE[Fp + f] = rest[at + f * E1 + E]
        den[f] = ZE[f] + ZE[Fp + f]
    centre_state(F, E, den, 0, 1, sums, at, E1, rest, at, E1, mu, 0, 0, room, 0, Ep)
    for f in range(0, F, cols):
        transpose(min(cols, F - f), E, room, f * Ep, Ep, S, f // cols * S_rows * 2 * cols, 2 * cols)


@helper
def transpose_state(S, F, E, Fp, cols, out):
    """rows F, columns E -> rows E, columns F"""
    S_rows, out_rows = rows_of_state(F), rows_of_state(E)
    clear_rows(Fp // cols * out_rows, 2 * cols, out, 0, 2 * cols)
    for f in range(0, F, cols):
        n = min(cols, F - f)
        for x in range(0, E, cols):
            here, there = (x // cols * S_rows + f) * 2 * cols, (f // cols * out_rows + x) * 2 * cols
            for part in (0, cols):
                transpose(n, min(cols, E - x), S, here + part, 2 * cols, out, there + part, 2 * cols)


@helper
def load_cotangent(d_state, given, at, F, E, E1, Ep, cols, mu, X, ZE, Fp):
    """X from the cotangent of the outgoing state; r = X_den + X_num mu."""
    X_rows = rows_of_state(F)
    clear_rows(Ep // cols * X_rows, 2 * cols, X, 0, 2 * cols)
    clear_rows(2, Fp, ZE, 0, Fp)
    if given:
        for x in range(0, E, cols):
            copy_rows(F, min(cols, E - x), d_state, at + x, E1, X, x // cols * X_rows * 2 * cols, 2 * cols)
        if E < E1:
            for f in range(F):
                total = d_state[at + f * E1 + E]
                for x in range(E):
                    total += d_state[at + f * E1 + x] * mu[x]
                ZE[f] = total


@helper
def store_cotangent(X, F, E, E1, cols, mu, zero, d_state, at, add):
    """The cotangent of the incoming state: X, its last column -X_num mu without r; later heads of a group add."""
    X_rows = rows_of_state(F)
    if add:
        for x in range(0, E, cols):
            place, width = x // cols * X_rows * 2 * cols, min(cols, E - x)
            add_rows(F, width, X, place, 2 * cols, d_state, at + x, E1, d_state, at + x, E1)
    else:
        for x in range(0, E, cols):
            place, width = x // cols * X_rows * 2 * cols, min(cols, E - x)
            copy_rows(F, width, X, place, 2 * cols, d_state, at + x, E1)
    if E < E1:
        for f in range(F):
            total = zero
            for x in range(E):
                total -= X[(x // cols * X_rows + f) * 2 * cols + x % cols] * mu[x]
            p = at + f * E1 + E
            d_state[p] = d_state[p] + total if add else total


@helper
def visible_mean(v, at, stride, M, E, mask, mask_at, mask_stride, masked, share, mu):
    """The mean over visible, finite values; any finite number would do. `share` has room for a chunk."""
    clear_rows(1, E, mu, 0, E)
    seen = M
    if masked:
        seen = 0
        for s in range(M):
            seen += mask[mask_at + s * mask_stride]
    part = 1.0 / max(seen, 1)
    for b in range(0, M, CHUNK):
        count = min(CHUNK, M - b)
        for s in range(count):
            share[s] = part if not masked or mask[mask_at + (b + s) * mask_stride] else 0.0
        mean_rows(count, E, share, 0, 1, v, at + b * stride, stride, mu, 0, 0, mu, 0, 0)
