"""The inner loops as vector code: LLVM IR emitted through `numba.extending.intrinsic`.

LLVM's loop vectoriser keeps no tile of accumulators in registers, so the tile is spelled out here: explicit
vectors of `TILE.n_bytes` and fused multiply-adds. All arrays are 1-D and contiguous; offsets and strides are
run-time integers in elements, so no size is part of the machine code. Callers pad: columns to whole tiles,
features to whole vectors, tokens to whole blocks, all with zeros.

The primitive, for the T tokens of a block and one slice of NV vectors of columns:

    out_t = b_t . S + sum_j W[t, j] c_j      W[t, j] = b_t . a_j, over j <= t (`advance`), j >= t (`retreat`)
    S + E += sum_t a_t c_t^T                 S, E one rounded sum and what rounding took: a Kahan step a block
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ._tiles import TILE

__all__ = ["advance", "denominators", "gather", "product", "product_add", "retreat", "scores", "scores_back"]

I64, I32 = ir.IntType(64), ir.IntType(32)
INT = types.intp
T, NV, ROWS = TILE.tokens, TILE.vectors, TILE.rows


def declare(builder, name, function_type):
    """The function `name` of the module, declared once."""
    try:
        return builder.module.get_global(name)
    except KeyError:
        return ir.Function(builder.module, function_type, name)


class Emitter:
    """Loads, stores, broadcasts and multiply-adds of one vector type inside one function."""

    def __init__(self, context, builder, array_type):
        self.context, self.b = context, builder
        self.itemsize = array_type.dtype.bitwidth // 8
        self.lanes = TILE.lanes(self.itemsize)
        scalar = ir.FloatType() if self.itemsize == 4 else ir.DoubleType()
        self.type = ir.VectorType(scalar, self.lanes)
        self.zero = ir.Constant(self.type, [0.0] * self.lanes)
        name = f"llvm.fmuladd.v{self.lanes}f{8 * self.itemsize}"
        self._fma = declare(builder, name, ir.FunctionType(self.type, [self.type] * 3))

    def data(self, array_type, value):
        """The address of an array's first element."""
        return self.context.make_array(array_type)(self.context, self.b, value).data

    def at(self, base, *offsets):
        """The address of base[sum of offsets]; an offset is an integer, an IR value, or a pair to multiply."""
        total = None
        for offset in offsets:
            if isinstance(offset, tuple):
                offset = self.b.mul(I64(offset[0]), offset[1])
            elif isinstance(offset, int):
                offset = I64(offset)
            total = offset if total is None else self.b.add(total, offset)
        return self.b.gep(base, [total])

    def load(self, address):
        return self.b.load(self.b.bitcast(address, self.type.as_pointer()), align=self.itemsize)

    def store(self, value, address):
        self.b.store(value, self.b.bitcast(address, self.type.as_pointer()), align=self.itemsize)

    def spread(self, address):
        """The number at `address` in every lane."""
        empty = ir.Constant(self.type, ir.Undefined)
        one = self.b.insert_element(empty, self.b.load(address), I32(0))
        lanes = ir.Constant(ir.VectorType(I32, self.lanes), [0] * self.lanes)
        return self.b.shuffle_vector(one, empty, lanes)

    def fma(self, x, y, z):
        """x y + z, fused where the machine can."""
        return self.b.call(self._fma, [x, y, z])

    def total(self, vector):
        """The sum over the lanes, halves folded in a fixed order."""
        half = self.lanes // 2
        while half:
            lanes = ir.Constant(ir.VectorType(I32, self.lanes), [i ^ half for i in range(self.lanes)])
            vector = self.b.fadd(vector, self.b.shuffle_vector(vector, vector, lanes))
            half //= 2
        return self.b.extract_element(vector, I32(0))

    def loop(self, start, stop, step, carried, body):
        """for i in range(start, stop, step): carried = body(i, carried)."""
        b, before = self.b, self.b.block
        head, done = b.append_basic_block("head"), b.append_basic_block("done")
        b.cbranch(b.icmp_signed("<", start, stop), head, done)
        b.position_at_end(head)
        i = b.phi(I64)
        i.add_incoming(start, before)
        inside = [b.phi(value.type) for value in carried]
        for phi, value in zip(inside, carried, strict=True):
            phi.add_incoming(value, before)
        new = body(i, list(inside))
        following, end = b.add(i, I64(step)), b.block
        i.add_incoming(following, end)
        for phi, value in zip(inside, new, strict=True):
            phi.add_incoming(value, end)
        b.cbranch(b.icmp_signed("<", following, stop), head, done)
        b.position_at_end(done)
        out = [b.phi(value.type) for value in carried]
        for phi, first, value in zip(out, carried, new, strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(value, end)
        return out


def _void(arguments):
    return types.void(*arguments)


def _kahan(v, now, owed, place, rest):
    """S' = S + y, E' = y - (S' - S): the sum and what its rounding took."""
    new = v.b.fadd(now, owed)
    v.store(new, place)
    v.store(v.b.fsub(owed, v.b.fsub(new, now)), rest)


def _make_block(backward_in_time):
    """The primitive: `advance` (a token sees itself and earlier ones) or `retreat` (itself and later ones).

    b[b0 + t ldb + x], a[a0 + t lda + x], c[c0 + t ldc + column], out likewise; row x of the state slice is
    s[s0 + x lds : ... + 2 NV L], S left and E right of it; w[w0 + t T + j].
    """

    @intrinsic
    def block(typing, B, b0, ldb, A, a0, lda, C, c0, ldc, S, s0, lds, rows, W, w0, O, o0, ldo):  # noqa: E741
        signature = _void((B, INT, INT, A, INT, INT, C, INT, INT, S, INT, INT, INT, W, INT, O, INT, INT))

        def codegen(context, builder, sig, args):
            bb, b0, ldb, aa, a0, lda, cc, c0, ldc, ss, s0, lds, rows, ww, w0, oo, o0, ldo = args
            v = Emitter(context, builder, S)
            bb, aa, cc, ss, ww, oo = (
                v.data(kind, x) for kind, x in zip((B, A, C, S, W, O), (bb, aa, cc, ss, ww, oo), strict=True)
            )
            value = [[v.load(v.at(cc, c0, (t, ldc), n * v.lanes)) for n in range(NV)] for t in range(T)]
            left = [v.at(bb, b0, (t, ldb)) for t in range(T)]
            right = [v.at(aa, a0, (t, lda)) for t in range(T)]
            state = v.at(ss, s0)

            def body(x, acc):
                place = [v.at(state, builder.mul(x, lds), n * v.lanes) for n in range(2 * NV)]
                now = [v.load(p) for p in place[:NV]]
                owed = [v.load(p) for p in place[NV:]]
                for t in range(T):
                    f = v.spread(v.at(left[t], x))
                    for n in range(NV):
                        acc[t * NV + n] = v.fma(f, now[n], acc[t * NV + n])
                    a = v.spread(v.at(right[t], x))
                    for n in range(NV):
                        owed[n] = v.fma(a, value[t][n], owed[n])
                for n in range(NV):
                    _kahan(v, now[n], owed[n], place[n], place[NV + n])
                return acc

            acc = v.loop(I64(0), rows, 1, [v.zero] * (T * NV), body)
            for t in range(T):
                for j in range(t, T) if backward_in_time else range(t + 1):
                    pair = v.spread(v.at(ww, w0, t * T + j))
                    for n in range(NV):
                        acc[t * NV + n] = v.fma(pair, value[j][n], acc[t * NV + n])
                for n in range(NV):
                    v.store(acc[t * NV + n], v.at(oo, o0, (t, ldo), n * v.lanes))
            return context.get_dummy_value()

        return signature, codegen

    return block


def _make_scores(backward_in_time):
    """W[t, j] = b_t . a_j for the pairs of one block; `width` features, a multiple of the lanes."""

    @intrinsic
    def pairs(typing, B, b0, ldb, A, a0, lda, width, W, w0):
        signature = _void((B, INT, INT, A, INT, INT, INT, W, INT))

        def codegen(context, builder, sig, args):
            bb, b0, ldb, aa, a0, lda, width, ww, w0 = args
            v = Emitter(context, builder, W)
            bb, aa, ww = v.data(B, bb), v.data(A, aa), v.data(W, ww)
            seen = [(t, j) for t in range(T) for j in (range(t, T) if backward_in_time else range(t + 1))]

            def body(x, acc):
                left = [v.load(v.at(bb, b0, (t, ldb), x)) for t in range(T)]
                right = [v.load(v.at(aa, a0, (t, lda), x)) for t in range(T)]
                return [v.fma(left[t], right[j], s) for (t, j), s in zip(seen, acc, strict=True)]

            acc = v.loop(I64(0), width, v.lanes, [v.zero] * len(seen), body)
            for (t, j), s in zip(seen, acc, strict=True):
                builder.store(v.total(s), v.at(ww, w0, t * T + j))
            return context.get_dummy_value()

        return signature, codegen

    return pairs


advance, retreat = _make_block(False), _make_block(True)
scores, scores_back = _make_scores(False), _make_scores(True)


@intrinsic
def denominators(typing, B, b0, ldb, A, a0, lda, width, Z, E, W, w0, D, d0):
    """The primitive for a column of ones: den_t = b_t . z + sum_{j <= t} W[t, j], then z + e += sum_t a_t."""
    signature = _void((B, INT, INT, A, INT, INT, INT, Z, E, W, INT, D, INT))

    def codegen(context, builder, sig, args):
        bb, b0, ldb, aa, a0, lda, width, zz, ee, ww, w0, dd, d0 = args
        v = Emitter(context, builder, Z)
        bb, aa, zz, ee, ww, dd = (
            v.data(kind, x) for kind, x in zip((B, A, Z, E, W, D), (bb, aa, zz, ee, ww, dd), strict=True)
        )

        def body(x, acc):
            z, e = v.at(zz, x), v.at(ee, x)
            now, owed = v.load(z), v.load(e)
            for t in range(T):
                acc[t] = v.fma(v.load(v.at(bb, b0, (t, ldb), x)), now, acc[t])
                owed = builder.fadd(owed, v.load(v.at(aa, a0, (t, lda), x)))
            _kahan(v, now, owed, z, e)
            return acc

        acc = v.loop(I64(0), width, v.lanes, [v.zero] * T, body)
        for t in range(T):
            den = v.total(acc[t])
            for j in range(t + 1):
                den = builder.fadd(den, builder.load(v.at(ww, w0, t * T + j)))
            builder.store(den, v.at(dd, d0, t))
        return context.get_dummy_value()

    return signature, codegen


def _panel(v, aa, a0, lda_row, lda_col, bb, b0, ldb, count):
    """ROWS x NV accumulators of A B over `count` terms; A has any two strides."""
    left = [v.at(aa, a0, (m, lda_row)) for m in range(ROWS)]
    right = v.at(bb, b0)

    def body(i, acc):
        row = v.b.mul(i, ldb)
        values = [v.load(v.at(right, row, n * v.lanes)) for n in range(NV)]
        column = v.b.mul(i, lda_col)
        for m in range(ROWS):
            f = v.spread(v.at(left[m], column))
            for n in range(NV):
                acc[m * NV + n] = v.fma(f, values[n], acc[m * NV + n])
        return acc

    return v.loop(I64(0), count, 1, [v.zero] * (ROWS * NV), body)


@intrinsic
def gather(typing, A, a0, lda, C, c0, ldc, count, S, s0, lds):
    """S + E += sum_{t < count} a_t c_t^T for ROWS features a[a0 + t lda + x]: one Kahan step a row."""
    signature = _void((A, INT, INT, C, INT, INT, INT, S, INT, INT))

    def codegen(context, builder, sig, args):
        aa, a0, lda, cc, c0, ldc, count, ss, s0, lds = args
        v = Emitter(context, builder, S)
        aa, cc, ss = v.data(A, aa), v.data(C, cc), v.data(S, ss)
        acc = _panel(v, aa, a0, I64(1), lda, cc, c0, ldc, count)
        for m in range(ROWS):
            for n in range(NV):
                place = v.at(ss, s0, (m, lds), n * v.lanes)
                rest = v.at(ss, s0, (m, lds), (NV + n) * v.lanes)
                _kahan(v, v.load(place), builder.fadd(v.load(rest), acc[m * NV + n]), place, rest)
        return context.get_dummy_value()

    return signature, codegen


def _make_product(add):
    """ROWS x NV vectors of o (+)= sum_i a[a0 + m lda_row + i lda_col] b[b0 + i ldb + column]."""

    @intrinsic
    def panel(typing, A, a0, lda_row, lda_col, B, b0, ldb, count, O, o0, ldo):  # noqa: E741
        signature = _void((A, INT, INT, INT, B, INT, INT, INT, O, INT, INT))

        def codegen(context, builder, sig, args):
            aa, a0, lda_row, lda_col, bb, b0, ldb, count, oo, o0, ldo = args
            v = Emitter(context, builder, O)
            aa, bb, oo = v.data(A, aa), v.data(B, bb), v.data(O, oo)
            acc = _panel(v, aa, a0, lda_row, lda_col, bb, b0, ldb, count)
            for m in range(ROWS):
                for n in range(NV):
                    place = v.at(oo, o0, (m, ldo), n * v.lanes)
                    value = acc[m * NV + n]
                    v.store(builder.fadd(v.load(place), value) if add else value, place)
            return context.get_dummy_value()

        return signature, codegen

    return panel


product, product_add = _make_product(False), _make_product(True)
