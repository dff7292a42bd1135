"""Log-features as integers and numbers near 1, and the gauges that keep their exponentials in range.

    e^x = f 2^n     f in [2^-1/2, 2^1/2] and n an integer

-inf is f = 0; NaN, inf and what is beyond LIMIT are f = NaN; both have n = NONE. A gauge m is one integer a feature,
NONE where no key has been yet. Integers lie in arrays of the kernels' float type, as bits.
"""

from __future__ import annotations

import math

from llvmlite import ir
from numba import types

from ._jit import helper
from ._maps import BIAS, LOG2E, MANTISSA, exp_near_0
from ._rows import scale_rows
from ._vector import I32, I64, Emitter, operation, rowwise

__all__ = [
    "NONE", "cotangent_rows", "excess_rows", "head_room", "key_rows", "multiply_rows", "multiply_rows_add", "none_rows",
    "query_rows", "raise_gauge", "row_limit", "split_rows", "top_rows", "turn_columns", "turn_features", "turn_of",
    "widen", "widen_by_logs",
]  # fmt: skip

NONE = -(2**29)
LIMIT = 2**27 * math.log(2)
LN2_PARTS = (0.6931471824645996, -1.904654299957768e-09)
ROUNDING = 52  # x + 1.5 2^52 has the integer nearest to x in its last bits
# A token whose log-feature exceeds the gauge by more bits opens a new span. Few spans, and far from either end.
BITS = {4: 30, 8: 430}
TOKENS = 20  # bits left for sums over tokens: 10^6 of them


def head_room(itemsize: int, n_features: int) -> tuple[int, int]:
    """The most bits over the gauge, and the bits left for them and the values in sums over features and tokens."""
    return BITS[itemsize], BIAS[8 * itemsize] - 1 - TOKENS - n_features.bit_length()


@helper
def row_limit(top, most, room):
    """The bits by which a token with values up to `top` may exceed the gauge: fewer where they are huge."""
    return min(most, max(0, room - math.frexp(top)[1]))


# -- elements ----------------------------------------------------------------------------------------------------


def _power(v, n):
    """2^n, 0 below the normal range; n at most the largest exponent."""
    low = v.b.icmp_signed("<", n, v.int_const(1 - BIAS[v.bits]))
    field = v.b.select(low, v.int_const(0), v.b.add(n, v.int_const(BIAS[v.bits])))
    return v.as_real(v.b.shl(field, v.int_const(MANTISSA[v.bits])))


def _rounded(v, x):
    """Of logarithms x: float64's arithmetic, x in it, which are usable, x / ln 2 rounded, and as an integer."""
    w = Emitter(v.context, v.b, types.float64, v.lanes)
    if x.type != w.type:
        x = v.b.fpext(x, w.type)
    usable = w.compare(w.as_real(w.size_of(x)), "<", w.const(LIMIT))
    magic = w.const(1.5 * 2.0**ROUNDING)
    n = w.sub(w.fma(x, w.const(LOG2E), magic), magic)
    whole = v.b.fptosi(n, ir.VectorType(I32, v.lanes) if v.lanes > 1 else I32)  # no number where x is not usable
    if v.bits > 32:
        whole = v.b.sext(whole, v.whole)
    return w, x, usable, n, v.b.select(usable, whole, v.int_const(NONE))


def _split(v, x):
    """f and n."""
    w, x, usable, n, whole = _rounded(v, x)
    r = x
    for part in LN2_PARTS:
        r = w.fma(n, w.const(-part), r)
    if v.bits < w.bits:
        r = v.b.fptrunc(r, v.type)
    zero = w.compare(x, "==", w.const(-math.inf))
    return v.where(usable, exp_near_0(v, r), v.where(zero, v.zero, v.const(math.nan))), v.as_real(whole)


def _larger(v, n, m):
    return v.as_real(v.larger(v.as_int(n), v.as_int(m)))


def _difference(v, n, m):
    return v.b.sub(v.as_int(n), v.as_int(m))


def _raised(v, n, m):
    new = _larger(v, n, m)
    return _power(v, _difference(v, m, new)), new


# -- rows ----------------------------------------------------------------------------------------------------------

split_rows = rowwise(0, 2, _split)  # x -> f, n
none_rows = rowwise(0, 1, lambda v: v.as_real(v.int_const(NONE)))
widen_by_logs = rowwise(0, 1, lambda v, x, m: _larger(v, v.as_real(_rounded(v, x)[-1]), m))
raise_gauge = rowwise(0, 2, _raised)  # n, m -> 2^(m - m'), m' = max(n, m)
turn_of = rowwise(0, 1, lambda v, old, new: _power(v, _difference(v, old, new)))  # 2^(old - new), old <= new
key_rows = rowwise(0, 1, lambda v, f, n, m: v.mul(f, _power(v, _difference(v, n, m))))  # f 2^(n - m)
multiply_rows = rowwise(0, 1, lambda v, x, y: v.mul(x, y))
multiply_rows_add = rowwise(0, 1, lambda v, x, y, old: v.fma(x, y, old))
# d_lq = phi (y - go z) / den
cotangent_rows = rowwise(2, 1, lambda v, go, share, phi, y, z: v.mul(v.mul(phi, share), v.fma(v.neg(go), z, y)))


def _largest(v, width, number):
    """The largest integer number(x) of a row, x = 0, lanes, ... up to `width`, a multiple of the lanes."""
    (found,) = v.loop(I64(0), width, v.lanes, [v.int_const(-(2**31))], lambda x, acc: [v.larger(acc[0], number(x))])
    return v.fold(found, v.larger)


@operation
def query_rows(v, sizes, memories):
    """query_rows(count, width, f, n, m, phi, rho): phi = f 2^(n + m - rho), rho = max (n + m): no positive exponent."""
    count, width = sizes
    (ff, ldf), (nn, ldn), (mm, _), (phi, ldp), (rho, _) = memories
    b, one = v.b, v.single()

    def row(t, _):
        f_start, n_start, p_start = b.mul(t, ldf), b.mul(t, ldn), b.mul(t, ldp)

        def raised(x):
            return b.add(v.as_int(nn.load(v, n_start, x)), v.as_int(mm.load(v, x)))

        largest = _largest(v, width, raised)
        everywhere = v.as_int(v.spread(one.as_real(largest)))

        def element(x, _):
            phi.store(v, v.mul(ff.load(v, f_start, x), _power(v, b.sub(raised(x), everywhere))), p_start, x)

        v.loop(I64(0), width, v.lanes, [], element)
        rho.store(one, b.sitofp(largest, one.type), t)

    v.loop(I64(0), count, 1, [], row)


@operation
def excess_rows(v, sizes, memories):
    """excess_rows(count, width, n, m, bits): by how many bits each key exceeds the gauge, at most."""
    count, width = sizes
    (nn, ldn), (mm, _), (bits, _) = memories
    b, one = v.b, v.single()

    def row(t, _):
        start = b.mul(t, ldn)
        largest = _largest(v, width, lambda x: _difference(v, nn.load(v, start, x), mm.load(v, x)))
        bits.store(one, b.sitofp(largest, one.type), t)

    v.loop(I64(0), count, 1, [], row)


@operation
def widen(v, sizes, memories):
    """widen(count, width, n, m): m = max(m, n of every row)."""
    count, width = sizes
    (nn, ldn), (mm, _) = memories

    def part(x, _):
        (found,) = v.loop(I64(0), count, 1, [v.as_int(mm.load(v, x))],
                          lambda t, acc: [v.larger(acc[0], v.as_int(nn.load(v, v.b.mul(t, ldn), x)))])  # fmt: skip
        mm.store(v, v.as_real(found), x)

    v.loop(I64(0), width, v.lanes, [], part)


@operation
def top_rows(v, sizes, memories):
    """top_rows(count, width, x, top): the largest finite |x| of each row; any `width`."""
    count, width = sizes
    (xx, ldx), (top, _) = memories
    b, one = v.b, v.single()
    whole = b.sub(width, b.and_(width, I64(v.lanes - 1)))

    def row(t, _):
        start = b.mul(t, ldx)

        def largest(w, first, last, found):
            def body(x, acc):
                a = xx.load(w, start, x)
                finite = w.compare(w.sub(a, a), "==", w.zero)
                return [w.larger(acc[0], b.select(finite, w.size_of(a), w.int_const(0)))]

            return w.loop(first, last, w.lanes, [found], body)[0]

        in_vectors = v.fold(largest(v, I64(0), whole, v.int_const(0)), v.larger)
        top.store(one, one.as_real(largest(one, whole, width, in_vectors)), t)

    v.loop(I64(0), count, 1, [], row)


# -- states in another gauge ---------------------------------------------------------------------------------------


@helper
def turn_features(S, F, S_rows, slices, cols, ZE, Fp, turn):
    """A state whose rows are features, and the sums of features, times turn."""
    for x in range(slices):
        place = x * S_rows * 2 * cols
        scale_rows(F, 2 * cols, turn, 0, 1, S, place, 2 * cols, S, place, 2 * cols)
    multiply_rows(2, Fp, ZE, 0, Fp, turn, 0, 0, ZE, 0, Fp)


@helper
def turn_columns(S, E, S_rows, Fp, cols, turn):
    """A state whose columns are features, times turn."""
    for f in range(0, Fp, cols):
        place = f // cols * S_rows * 2 * cols
        multiply_rows(E, cols, S, place, 2 * cols, turn, f, 0, S, place, 2 * cols)
        multiply_rows(E, cols, S, place + cols, 2 * cols, turn, f, 0, S, place + cols, 2 * cols)
