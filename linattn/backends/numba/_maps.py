"""Feature maps as prologues, their VJPs as epilogues, and the exponential both use.

Each runs over distinct 1-D slices, which is what lets LLVM vectorise it.
"""

from __future__ import annotations

import struct

from llvmlite import ir
from numba.extending import intrinsic

from ._jit import helper
from ._vector import declare

__all__ = ["MAPS", "copy_row", "exp", "map_row", "row_power", "unmap_row"]

IDENTITY, RELU, ELU1 = 0, 1, 2
MAPS = {"identity": IDENTITY, "relu": RELU, "elu1": ELU1}

# exp(r) = 1 + r + r^2 p(r) on |r| <= ln 2 / 2: interpolation in Chebyshev's points, errors 1.1e-8 and 3e-19 of exp.
# ln 2 = high + low, high short enough that n high is exact. Behind `ends` the result is 0 or inf.
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


def _bits(number, width):
    """The bit pattern of a float of `width` bits, as an integer."""
    code, as_int = {32: ("<f", "<I"), 64: ("<d", "<Q")}[width]
    return struct.unpack(as_int, struct.pack(code, number))[0]


@intrinsic
def exp(typing, x):
    """exp(x) without a call or a branch, so that loops over it vectorise. exp(inf) = inf, exp(-inf) = 0, NaN = NaN.

    x = n ln 2 + r with n = round(x / ln 2), exp(x) = 2^n exp(r). n is read from the bits of x / ln 2 + 1.5 2^m, whose
    last place is 1. 2^n is applied in two halves, so that results below the normal range come out right.
    """
    signature = x(x)

    def codegen(context, b, sig, args):
        width = sig.return_type.bitwidth
        real = ir.FloatType() if width == 32 else ir.DoubleType()
        whole = ir.IntType(width)
        mantissa, bias = MANTISSA[width], BIAS[width]
        fma = declare(b, f"llvm.fmuladd.f{width}", ir.FunctionType(real, [real] * 3))
        low, high = (ir.Constant(real, end) for end in ENDS[width])
        held = b.select(b.fcmp_ordered("<", args[0], low), low, args[0])
        held = b.select(b.fcmp_ordered(">", held, high), high, held)

        magic = 1.5 * 2.0**mantissa
        moved = b.call(fma, [held, ir.Constant(real, LOG2E), ir.Constant(real, magic)])
        n = b.fsub(moved, ir.Constant(real, magic))
        r = held
        for part in LN2[width]:
            r = b.call(fma, [n, ir.Constant(real, -part), r])
        *lower, highest = (ir.Constant(real, c) for c in POLYNOMIALS[width])
        p = highest
        for c in reversed(lower):
            p = b.call(fma, [p, r, c])
        p = b.call(fma, [b.fmul(r, r), p, r])
        p = b.fadd(p, ir.Constant(real, 1.0))

        twice = b.sub(b.bitcast(moved, whole), whole(_bits(magic, width) - 2 * bias))  # n + 2 bias > 0
        half = b.lshr(twice, whole(1))
        for exponent in (half, b.sub(twice, half)):
            p = b.fmul(p, b.bitcast(b.shl(exponent, whole(mantissa)), real))
        return p

    return signature, codegen


@intrinsic
def power_below(typing, x):
    """2^-floor(log2 x) for x > 0, finite; 1 for 0, inf and NaN; within the normal range at both ends."""
    signature = x(x)

    def codegen(context, b, sig, args):
        width = sig.return_type.bitwidth
        whole = ir.IntType(width)
        real = ir.FloatType() if width == 32 else ir.DoubleType()
        mantissa, bias = MANTISSA[width], BIAS[width]
        bits = b.and_(b.bitcast(args[0], whole), whole((1 << (width - 1)) - 1))
        field = b.lshr(bits, whole(mantissa))
        turned = b.sub(whole(2 * bias), field)
        turned = b.select(b.icmp_signed("<", turned, whole(1)), whole(1), turned)
        turned = b.select(b.icmp_signed(">", turned, whole(2 * bias - 1)), whole(2 * bias - 1), turned)
        none = b.or_(b.icmp_signed("==", bits, whole(0)), b.icmp_signed("==", field, whole(2 * bias + 1)))
        turned = b.select(none, whole(bias), turned)
        return b.bitcast(b.shl(turned, whole(mantissa)), real)

    return signature, codegen


@intrinsic
def larger_size(typing, x, y):
    """The larger of |x| and |y| by their bit patterns: one unsigned maximum, and NaN wins."""
    signature = x(x, x)

    def codegen(context, b, sig, args):
        width = sig.return_type.bitwidth
        whole = ir.IntType(width)
        real = ir.FloatType() if width == 32 else ir.DoubleType()
        mask = whole((1 << (width - 1)) - 1)
        first, second = (b.and_(b.bitcast(a, whole), mask) for a in args)
        return b.bitcast(b.select(b.icmp_signed(">", first, second), first, second), real)

    return signature, codegen


@helper
def copy_row(x, phi):
    for i in range(phi.size):
        phi[i] = x[i]


@helper
def relu_row(x, phi):
    zero = phi.dtype.type(0)
    for i in range(phi.size):
        a = x[i]
        phi[i] = zero if a <= zero else a  # NaN passes


@helper
def elu1_row(x, phi):
    zero, one = phi.dtype.type(0), phi.dtype.type(1)
    for i in range(phi.size):
        a = x[i]
        below = exp(a)
        phi[i] = one + a if a > zero else below


@helper
def map_row(which, x, phi):
    """phi = the feature map of one token's x."""
    if which == RELU:
        relu_row(x, phi)
    elif which == ELU1:
        elu1_row(x, phi)
    else:
        copy_row(x, phi)


@helper
def relu_back(x, d_phi):
    zero = d_phi.dtype.type(0)
    for i in range(d_phi.size):
        d_phi[i] = zero if x[i] <= zero else d_phi[i]


@helper
def elu1_back(x, d_phi):
    zero, one = d_phi.dtype.type(0), d_phi.dtype.type(1)
    for i in range(d_phi.size):
        a = x[i]
        below = exp(a)
        d_phi[i] *= one if a > zero else below


@helper
def unmap_row(which, x, d_phi):
    """d_x from d_phi, in place: relu'(0) = 0, elu1' = min(phi, 1)."""
    if which == RELU:
        relu_back(x, d_phi)
    elif which == ELU1:
        elu1_back(x, d_phi)


@helper
def row_power(phi):
    """The power of two that brings the largest |phi| of a row into [1, 2)."""
    largest = phi.dtype.type(0)
    for i in range(phi.size):
        largest = larger_size(largest, phi[i])
    return power_below(largest)
