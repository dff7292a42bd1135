"""Log-features as integers and numbers near 1, and the gauges that keep their exponentials in range.

    e^x = f 2^n     f in [2^-1/2, 2^1/2] and n an integer

-inf is f = 0; NaN, inf and what is beyond LIMIT are f = NaN; both have n = NONE. Rows have Fp numbers, filled up
with f = 0, n = NONE. A gauge m is one integer a feature, NONE where no key has been yet.
"""

from __future__ import annotations

import math

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ._jit import helper
from ._maps import BIAS, LOG2E, MANTISSA, exp

__all__ = [
    "NONE", "first_excess", "head_room", "key_row", "query_row", "raise_gauge", "row_limit", "same_gauge", "split_row",
    "turn_columns", "turn_rows", "turned", "widen_gauge", "widen_gauge_rows",
]  # fmt: skip

NONE = -(2**29)
LIMIT = 2**27 * math.log(2)
LN2_HIGH, LN2_LOW = 0.6931471824645996, -1.904654299957768e-09  # n LN2_HIGH is exact for |n| < 2^27
SHIFTER = 1.5 * 2.0**52  # x + SHIFTER - SHIFTER is x rounded to an integer
# A token whose log-feature exceeds the gauge by more bits opens a new span. Few spans, and far from either end.
BITS = {4: 30, 8: 430}
TOKENS = 20  # bits left for sums over tokens: 10^6 of them


@intrinsic
def power(typing, like, n):
    """2^n in the type of `like`, 0 below the normal range; n at most the largest exponent."""
    if not isinstance(n, types.Integer) or n.bitwidth != 32:
        return None
    signature = like(like, n)

    def codegen(context, b, sig, args):
        width = sig.return_type.bitwidth
        real = ir.FloatType() if width == 32 else ir.DoubleType()
        whole = ir.IntType(width)
        n = args[1] if width == 32 else b.sext(args[1], whole)
        low = b.icmp_signed("<", n, whole(1 - BIAS[width]))
        field = b.select(low, whole(0), b.add(n, whole(BIAS[width])))
        return b.bitcast(b.shl(field, whole(MANTISSA[width])), real)

    return signature, codegen


@helper
def split_row(x, f, n):
    """f and n of one token's logarithms x (float64)."""
    for i in range(x.size):
        a = x[i]
        usable = abs(a) < LIMIT
        y = a if usable else 0.0
        whole = (y * LOG2E + SHIFTER) - SHIFTER
        e = exp(f.dtype.type((y - whole * LN2_HIGH) - whole * LN2_LOW))
        other = f.dtype.type(0.0 if a == -math.inf else math.nan)
        f[i] = e if usable else other
        n[i] = types.int32(whole) if usable else types.int32(NONE)


@helper
def widen_gauge(x, m):
    """m = max(m, n(x)): the gauge of all keys."""
    for i in range(x.size):
        a = x[i]
        usable = abs(a) < LIMIT
        y = a if usable else 0.0
        whole = types.int32((y * LOG2E + SHIFTER) - SHIFTER) if usable else types.int32(NONE)
        m[i] = max(m[i], whole)


@helper
def excess(n, m):
    """By how many bits a key exceeds the gauge."""
    most = types.int32(-(2**31))
    for i in range(n.size):
        most = max(most, types.int32(n[i] - m[i]))
    return most


@helper
def first_excess(n, limits, m, Fp, t, count):
    """The first row from t on that opens a span, or count."""
    while t < count and excess(n[t * Fp : (t + 1) * Fp], m) <= limits[t]:
        t += 1
    return t


def head_room(itemsize: int, n_features: int) -> tuple[int, int]:
    """The most bits over the gauge, and the bits left for them and the values in sums over features and tokens."""
    return BITS[itemsize], BIAS[8 * itemsize] - 1 - TOKENS - n_features.bit_length()


@helper
def row_limit(v, most, room):
    """The bits by which this token may exceed the gauge: fewer where its values are huge."""
    top = v.dtype.type(0)
    for i in range(v.size):
        a = abs(v[i])
        if a - a == 0 and a > top:
            top = a
    return types.int32(min(most, max(0, room - math.frexp(top)[1])))


@helper
def widen_gauge_rows(n, count, Fp, m):
    """m = max(m, n of a chunk's rows)"""
    for t in range(count):
        row = n[t * Fp : (t + 1) * Fp]
        for i in range(m.size):
            m[i] = max(m[i], row[i])


@helper
def raise_gauge(n, m, turn):
    """m' = max(m, n), turn = 2^(m - m')."""
    for i in range(turn.size):
        new = max(m[i], n[i])
        turn[i] = power(turn[i], types.int32(m[i] - new))
        m[i] = new


@helper
def turned(old, new, turn):
    """turn = 2^(old - new), where old <= new."""
    for i in range(turn.size):
        turn[i] = power(turn[i], types.int32(old[i] - new[i]))


@helper
def same_gauge(a, b):
    differ = 0
    for i in range(a.size):
        differ |= a[i] ^ b[i]
    return differ == 0


@helper
def query_row(f, n, m, phi):
    """phi = f 2^(n + m - rho), rho = max (n + m): no exponent is positive. Gives rho."""
    rho = types.int32(-(2**31))
    for i in range(n.size):
        rho = max(rho, types.int32(n[i] + m[i]))
    for i in range(phi.size):
        phi[i] = f[i] * power(phi[i], types.int32(n[i] + m[i] - rho))
    return rho


@helper
def key_row(f, n, m, phi):
    """phi = f 2^(n - m)"""
    for i in range(phi.size):
        phi[i] = f[i] * power(phi[i], types.int32(n[i] - m[i]))


@helper
def multiply(x, factors):
    for i in range(x.size):
        x[i] *= factors[i]


@helper
def multiply_row(x, factor):
    for i in range(x.size):
        x[i] *= factor


@helper
def turn_rows(S, z, e, turn, F, Fp, slices, cols):
    """A state whose rows are features, and its sums of features, in another gauge."""
    multiply(z, turn)
    multiply(e, turn)
    for f in range(F):
        if turn[f] != 1:
            for i in range(slices):
                place = (i * Fp + f) * 2 * cols
                multiply_row(S[place : place + 2 * cols], turn[f])


@helper
def turn_columns(S, turn, rows, padded, slices, cols):
    """A state whose columns are features in another gauge."""
    for i in range(slices):
        factors = turn[i * cols : (i + 1) * cols]
        for x in range(rows):
            place = (i * padded + x) * 2 * cols
            multiply(S[place : place + cols], factors)
            multiply(S[place + cols : place + 2 * cols], factors)
