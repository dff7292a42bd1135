"""Feature maps and their VJPs as operations on rows, and the exponential they use."""

from __future__ import annotations

import struct

from ._jit import helper
from ._vector import I64, operation, rowwise

__all__ = ["MAPS", "exp", "exp_near_0", "identity_rows", "map_rows", "row_powers", "unmap_rows", "unmap_rows_add"]

IDENTITY, RELU, ELU1 = 0, 1, 2
MAPS = {"identity": IDENTITY, "relu": RELU, "elu1": ELU1}

# exp(r) = 1 + r + r^2 p(r) on |r| <= ln 2 / 2: interpolation in Chebyshev's points, errors 1.1e-8 and 3e-19 of exp.
# ln 2 = high + low, high short enough that n high is exact. Behind ENDS the result is 0 or inf.
POLYNOMIALS = {
    32: (0.5, 0.16666576666119928, 0.041666554212984150, 0.0083632328836826182, 0.0013926250831497612),
    64: (0.5, 0.16666666666666671, 0.041666666666666670, 0.0083333333333260831, 0.0013888888888883711,
         0.00019841269875002279, 2.4801587325677462e-05, 2.7557255170000887e-06, 2.7557273478718580e-07,
         2.5105312729622102e-08, 2.0914755325893202e-09),
}  # fmt: skip
LN2 = {32: (0.693145751953125, 1.4286068203094173e-06), 64: (0.6931471803691238, 1.9082149292705877e-10)}
ENDS = {32: (-105.0, 89.0), 64: (-746.0, 710.0)}
MANTISSA, BIAS = {32: 23, 64: 52}, {32: 127, 64: 1023}
LOG2E = 1.4426950408889634
WINDOW = (-1, 8)  # rows whose largest feature is at least 2^-1 and below 2^8 are left as they are


def _bits(number, width):
    """The bit pattern of a float of `width` bits, as an integer."""
    code, as_int = {32: ("<f", "<I"), 64: ("<d", "<Q")}[width]
    return struct.unpack(as_int, struct.pack(code, number))[0]


def exp_near_0(v, r):
    """exp(r) where |r| <= ln 2 / 2, or little more."""
    *lower, p = (v.const(c) for c in POLYNOMIALS[v.bits])
    for c in reversed(lower):
        p = v.fma(p, r, c)
    return v.add(v.fma(v.mul(r, r), p, r), v.one)


def exp(v, x):
    """exp(x) without a call or a branch. exp(inf) = inf, exp(-inf) = 0, NaN stays NaN; worst error below 1.5 ulp.

    x = n ln 2 + r with n = round(x / ln 2), exp(x) = 2^n exp(r). n is read from the bits of x / ln 2 + 1.5 2^m, whose
    last place is 1. 2^n is applied in two halves, so that results below the normal range come out right.
    """
    b, mantissa, bias = v.b, MANTISSA[v.bits], BIAS[v.bits]
    low, high = (v.const(end) for end in ENDS[v.bits])
    held = v.where(v.compare(x, "<", low), low, x)
    held = v.where(v.compare(held, ">", high), high, held)

    magic = 1.5 * 2.0**mantissa
    moved = v.fma(held, v.const(LOG2E), v.const(magic))
    n = v.sub(moved, v.const(magic))
    r = held
    for part in LN2[v.bits]:
        r = v.fma(n, v.const(-part), r)
    p = exp_near_0(v, r)

    twice = b.sub(v.as_int(moved), v.int_const(_bits(magic, v.bits) - 2 * bias))  # n + 2 bias > 0
    half = b.lshr(twice, v.int_const(1))
    for exponent in (half, b.sub(twice, half)):
        p = v.mul(p, v.as_real(b.shl(exponent, v.int_const(mantissa))))
    return p


def _positive(v, x, y):
    """0 where x <= 0, else y: NaN passes."""
    return v.where(v.compare(x, "<=", v.zero), v.zero, y)


def _elu1_slope(v, x):
    return v.where(v.compare(x, ">", v.zero), v.one, exp(v, x))


identity_rows = rowwise(0, 1, lambda v, x: x)
relu_rows = rowwise(0, 1, lambda v, x: _positive(v, x, x))
elu1_rows = rowwise(0, 1, lambda v, x: v.where(v.compare(x, ">", v.zero), v.add(v.one, x), exp(v, x)))

# d_x from x and d_phi, times the power of two the row of phi was scaled by
identity_back = rowwise(1, 1, lambda v, s, x, d: v.mul(d, s))
relu_back = rowwise(1, 1, lambda v, s, x, d: _positive(v, x, v.mul(d, s)))
elu1_back = rowwise(1, 1, lambda v, s, x, d: v.mul(v.mul(d, s), _elu1_slope(v, x)))
identity_back_add = rowwise(1, 1, lambda v, s, x, d, old: v.add(old, v.mul(d, s)))
relu_back_add = rowwise(1, 1, lambda v, s, x, d, old: v.add(old, _positive(v, x, v.mul(d, s))))
elu1_back_add = rowwise(1, 1, lambda v, s, x, d, old: v.add(old, v.mul(v.mul(d, s), _elu1_slope(v, x))))


@helper
def map_rows(which, count, width, x, x_at, x_stride, phi, phi_stride):
    """phi[t] = the feature map of x[t]."""
    if which == RELU:
        relu_rows(count, width, x, x_at, x_stride, phi, 0, phi_stride)
    elif which == ELU1:
        elu1_rows(count, width, x, x_at, x_stride, phi, 0, phi_stride)
    else:
        identity_rows(count, width, x, x_at, x_stride, phi, 0, phi_stride)


@helper
def unmap_rows(which, count, width, s, s_step, x, x_at, x_stride, d, d_stride, out, out_at, out_stride):
    """out[t] = d_x from d_phi = d[t] s[t]: relu'(0) = 0, elu1' = min(phi, 1)."""
    if which == RELU:
        relu_back(count, width, s, 0, s_step, x, x_at, x_stride, d, 0, d_stride, out, out_at, out_stride)
    elif which == ELU1:
        elu1_back(count, width, s, 0, s_step, x, x_at, x_stride, d, 0, d_stride, out, out_at, out_stride)
    else:
        identity_back(count, width, s, 0, s_step, x, x_at, x_stride, d, 0, d_stride, out, out_at, out_stride)


@helper
def unmap_rows_add(which, count, width, s, s_step, x, x_at, x_stride, d, d_stride, out, out_at, out_stride):
    """The same, added to out[t]."""
    if which == RELU:
        relu_back_add(count, width, s, 0, s_step, x, x_at, x_stride, d, 0, d_stride,
                      out, out_at, out_stride, out, out_at, out_stride)  # fmt: skip
    elif which == ELU1:
        elu1_back_add(count, width, s, 0, s_step, x, x_at, x_stride, d, 0, d_stride,
                      out, out_at, out_stride, out, out_at, out_stride)  # fmt: skip
    else:
        identity_back_add(count, width, s, 0, s_step, x, x_at, x_stride, d, 0, d_stride,
                          out, out_at, out_stride, out, out_at, out_stride)  # fmt: skip


def _power(v, size):
    """2^-floor(log2 x) from the bit pattern of x; 1 inside WINDOW, for 0, inf and NaN; normal at both ends."""
    b, bias = v.b, BIAS[v.bits]
    field = b.lshr(size, v.int_const(MANTISSA[v.bits]))
    turned = b.sub(v.int_const(2 * bias), field)
    turned = v.larger(turned, v.int_const(1))
    turned = b.select(b.icmp_signed(">", turned, v.int_const(2 * bias - 1)), v.int_const(2 * bias - 1), turned)
    low, high = (v.int_const(bias + e) for e in WINDOW)
    inside = b.and_(b.icmp_signed(">=", field, low), b.icmp_signed("<", field, high))
    unusable = b.or_(b.icmp_signed("==", size, v.int_const(0)), b.icmp_signed(">", field, v.int_const(2 * bias)))
    turned = b.select(b.or_(inside, unusable), v.int_const(bias), turned)
    return v.as_real(b.shl(turned, v.int_const(MANTISSA[v.bits])))


@operation
def row_powers(v, sizes, memories):
    """row_powers(count, width, phi, power): power[t] brings the largest |phi[t]| into [1, 2), unless it is in WINDOW;
    phi[t] is multiplied by it.
    """
    count, width = sizes
    (phi, stride), (power, _) = memories
    b, one = v.b, v.single()
    whole = b.sub(width, b.and_(width, I64(v.lanes - 1)))

    def row(t, _):
        start = b.mul(t, stride)

        def largest(w, first, last, found):
            return w.loop(first, last, w.lanes, [found],
                          lambda x, found: [w.larger(found[0], w.size_of(phi.load(w, start, x)))])[0]  # fmt: skip

        def scale(w, first, last, factor):
            w.loop(first, last, w.lanes, [], lambda x, _: phi.store(w, w.mul(phi.load(w, start, x), factor), start, x))

        lanes = largest(v, I64(0), whole, v.int_const(0))
        ends = [_bits(2.0**e, v.bits) for e in WINDOW]
        big, low = (v.any(b.icmp_signed(">=", lanes, v.int_const(end))) for end in (ends[1], ends[0]))
        power.store(one, one.one, t)
        # most rows are in the window and have no rest behind their vectors: one look at all lanes tells
        settled = b.and_(b.and_(low, b.not_(big)), b.icmp_signed("==", whole, width))
        with b.if_then(b.not_(settled)):
            factor = _power(one, largest(one, whole, width, v.fold(lanes, v.larger)))
            with b.if_then(b.fcmp_unordered("!=", factor, one.one)):
                power.store(one, factor, t)
                scale(v, I64(0), whole, v.spread(factor))
                scale(one, whole, width, factor)

    v.loop(I64(0), count, 1, [], row)
