"""Vector code for the kernels: LLVM IR emitted through `numba.extending.intrinsic`.

LLVM's loop vectoriser keeps no tile of accumulators in registers and needs proofs about overlap that these kernels
cannot give, so vectors are spelled out: `Emitter` has their arithmetic, `Memory` their loads and stores, and
`rowwise` makes an operation on rows from the formula of one element. All sizes, offsets and strides are run-time
integers in elements: none is part of the machine code.

Kernels hold addresses (`pointer`), whose element type says how a number is stored: float32 and float64 as they are,
float16 as uint16 and bfloat16 as int16, both widened to float32 by every load and rounded once by every store.
"""

from __future__ import annotations

import itertools
from copy import copy

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ._tiles import TILE

__all__ = [
    "Emitter",
    "Memory",
    "behind",
    "operation",
    "pointer",
    "rowwise",
    "select_pointer",
    "stored_alike",
    "two_sum",
]

I64, I32, I16, I1, I8P = ir.IntType(64), ir.IntType(32), ir.IntType(16), ir.IntType(1), ir.IntType(8).as_pointer()
HALF, SINGLE, DOUBLE = ir.HalfType(), ir.FloatType(), ir.DoubleType()
STORED = {
    types.float32: (SINGLE, 4),
    types.float64: (DOUBLE, 8),
    types.uint16: (I16, 2),
    types.int16: (I16, 2),
    types.int64: (I64, 8),  # numbers of rows, read one by one
}

_numbers = itertools.count()


def declare(builder, name, function_type):
    """The function `name` of the module, declared once."""
    try:
        return builder.module.get_global(name)
    except KeyError:
        return ir.Function(builder.module, function_type, name)


class Emitter:
    """Arithmetic of one float type in vectors of `lanes`, or on single numbers if `lanes` is 1."""

    def __init__(self, context, builder, real, lanes=None):
        self.context, self.b, self.real = context, builder, real
        self.scalar, self.itemsize = STORED[real]
        self.bits = 8 * self.itemsize
        self.lanes = TILE.lanes(self.itemsize) if lanes is None else lanes
        self.type = self.widened(self.scalar)
        self.whole = self.widened(ir.IntType(self.bits))
        suffix = f"f{self.bits}" if self.lanes == 1 else f"v{self.lanes}f{self.bits}"
        self._fma = declare(builder, f"llvm.fmuladd.{suffix}", ir.FunctionType(self.type, [self.type] * 3))
        self.zero, self.one = self.const(0.0), self.const(1.0)

    def single(self):
        """The same arithmetic on single numbers."""
        return Emitter(self.context, self.b, self.real, 1)

    def widened(self, element):
        return element if self.lanes == 1 else ir.VectorType(element, self.lanes)

    def const(self, number):
        return ir.Constant(self.type, number if self.lanes == 1 else [number] * self.lanes)

    def int_const(self, number):
        return ir.Constant(self.whole, number if self.lanes == 1 else [number] * self.lanes)

    def add(self, x, y):
        return self.b.fadd(x, y)

    def sub(self, x, y):
        return self.b.fsub(x, y)

    def mul(self, x, y):
        return self.b.fmul(x, y)

    def div(self, x, y):
        return self.b.fdiv(x, y)

    def fma(self, x, y, z):
        """x y + z, fused where the machine can."""
        return self.b.call(self._fma, [x, y, z])

    def neg(self, x):
        return self.b.fneg(x)

    def where(self, condition, x, y):
        return self.b.select(condition, x, y)

    def compare(self, x, how, y):
        """False where either is NaN."""
        return self.b.fcmp_ordered(how, x, y)

    def as_int(self, x):
        return self.b.bitcast(x, self.whole)

    def as_real(self, x):
        return self.b.bitcast(x, self.type)

    def size_of(self, x):
        """The bit pattern of |x|: ordered as |x| is, NaN above all."""
        return self.b.and_(self.as_int(x), self.int_const((1 << (self.bits - 1)) - 1))

    def larger(self, x, y):
        """The larger of two integers."""
        return self.b.select(self.b.icmp_signed(">", x, y), x, y)

    def any(self, condition):
        """Whether a condition holds in any lane."""
        mask = ir.IntType(self.lanes)
        return self.b.icmp_unsigned("!=", self.b.bitcast(condition, mask), mask(0))

    def spread(self, number):
        """A single number in every lane."""
        if self.lanes == 1:
            return number
        empty = ir.Constant(self.type, ir.Undefined)
        one = self.b.insert_element(empty, number, I32(0))
        return self.shuffle(one, empty, [0] * self.lanes)

    def shuffle(self, x, y, lanes):
        return self.b.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))

    def fold(self, vector, combine):
        """All lanes combined into one number: halves upon halves, in a fixed order."""
        half = self.lanes // 2
        while half:
            vector = combine(vector, self.shuffle(vector, vector, [i ^ half for i in range(self.lanes)]))
            half //= 2
        return vector if self.lanes == 1 else self.b.extract_element(vector, I32(0))

    def total(self, vector):
        """The sum over the lanes."""
        return self.fold(vector, self.add)

    def totals(self, vectors):
        """The sums over the lanes of `lanes` vectors, as one vector, and the lane in which each stands.

        Two vectors at a time: the first halves of their groups of lanes side by side, plus the second halves.
        """
        groups = [(x, [i]) for i, x in enumerate(vectors)]
        size = self.lanes
        while size > 1:
            half, merged = size // 2, []
            for (x, of_x), (y, of_y) in zip(groups[::2], groups[1::2], strict=True):
                order = [
                    (which, g * size + i) for g in range(self.lanes // size) for which in (0, 1) for i in range(half)
                ]
                first = [which * self.lanes + lane for which, lane in order]
                both = self.add(self.shuffle(x, y, first), self.shuffle(x, y, [lane + half for lane in first]))
                merged.append((both, [n for pair in zip(of_x, of_y, strict=True) for n in pair]))
            groups, size = merged, half
        vector, owners = groups[0]
        return vector, {owner: lane for lane, owner in enumerate(owners)}

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
        new = body(i, list(inside)) or []
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


class Memory:
    """Numbers at an address, `start` + offset: single ones, or `v.lanes` in a row."""

    def __init__(self, v, kind, base, start=None):
        self.b, self.stored = v.b, kind.dtype
        self.element, self.itemsize = STORED[kind.dtype]
        self.base = base if start is None else v.b.gep(base, [start])

    def behind(self, *offsets):
        """What lies `offsets` further on."""
        further = copy(self)
        further.base = self.at(*offsets)
        return further

    def ask(self, *offsets, to_write=False):
        """Have the cache line there on its way; harmless behind an array's end."""
        kind = ir.FunctionType(ir.VoidType(), [I8P, I32, I32, I32])
        address = self.b.bitcast(self.at(*offsets), I8P)
        self.b.call(declare(self.b, "llvm.prefetch.p0", kind), [address, I32(int(to_write)), I32(2), I32(1)])

    def at(self, *offsets):
        """The address behind the sum of offsets: integers, IR values, or pairs to multiply."""
        total = None
        for offset in offsets:
            if isinstance(offset, tuple):
                offset = self.b.mul(I64(offset[0]), offset[1])
            elif isinstance(offset, int):
                offset = I64(offset)
            total = offset if total is None else self.b.add(total, offset)
        return self.b.gep(self.base, [total])

    def load(self, v, *offsets):
        stored = v.widened(self.element)
        x = self.b.load(self.b.bitcast(self.at(*offsets), stored.as_pointer()), align=self.itemsize)
        if self.stored == types.uint16:  # float16
            return self.b.fpext(self.b.bitcast(x, v.widened(HALF)), v.type)
        if self.stored == types.int16:  # bfloat16: the upper half of a float32
            return self.b.bitcast(self.b.shl(self.b.zext(x, v.whole), v.int_const(16)), v.type)
        return x

    def store(self, v, x, *offsets):
        if self.stored == types.uint16:
            x = self.b.bitcast(self.b.fptrunc(x, v.widened(HALF)), v.widened(I16))
        elif self.stored == types.int16:
            x = self.b.trunc(self._rounded(v, x), v.widened(I16))
        self.b.store(x, self.b.bitcast(self.at(*offsets), x.type.as_pointer()), align=self.itemsize)

    def _rounded(self, v, x):
        """The upper 16 bits of x, to nearest, ties to even; a NaN stays one."""
        b, bits = self.b, v.as_int(x)
        odd = b.and_(b.lshr(bits, v.int_const(16)), v.int_const(1))
        rounded = b.add(bits, b.add(odd, v.int_const(0x7FFF)))
        quiet = b.or_(bits, v.int_const(0x400000))
        return b.lshr(b.select(b.fcmp_unordered("uno", x, x), quiet, rounded), v.int_const(16))

    def spread(self, v, *offsets):
        """The number there in every lane."""
        return v.spread(self.load(v.single(), *offsets) if self.itemsize == 2 else self.b.load(self.at(*offsets)))


def operation(codegen):
    """An intrinsic without a result from `codegen(v, sizes, memories)`.

    Called in a kernel with integers first, then for each array its pointer, first element and stride:
    op(count, ..., x, x_at, x_stride, ...). `v` has the type of the last array that is not 16 bits wide.
    The code becomes a function of its own, once for each combination of types, so that it is compiled once however
    often it is called; an operation is worth a call if it does a whole chunk's work.
    """
    number = next(_numbers)

    @intrinsic
    def op(typing, *args):
        packed = len(args) == 1 and isinstance(args[0], types.BaseTuple)  # Numba asks twice: loose, then packed
        kinds = tuple(args[0]) if packed else args
        arrays = [i for i, kind in enumerate(kinds) if isinstance(kind, types.CPointer)]
        stored = [kinds[i].dtype for i in arrays]
        real = next((kind for kind in reversed(stored) if kind in (types.float32, types.float64)), types.float32)

        def generate(context, builder, signature, values):
            values = cgutils.unpack_tuple(builder, values[0], len(kinds))
            values = [
                x if isinstance(kind, types.CPointer) else context.cast(builder, x, kind, types.intp)
                for x, kind in zip(values, kinds, strict=True)
            ]
            name = f"linattn_{codegen.__name__}_{number}_" + "_".join(str(kind) for kind in stored)
            function = builder.module.globals.get(name)
            if function is None:
                kind = ir.FunctionType(ir.VoidType(), [x.type for x in values])
                function = ir.Function(builder.module, kind, name)
                function.linkage = "internal"
                function.attributes.add("noinline")
                function.attributes.add("optsize")  # loops as written: not unrolled, not vectorised once more
                inner = ir.IRBuilder(function.append_basic_block())
                v = Emitter(context, inner, real)
                given = list(function.args)
                memories = [(Memory(v, kinds[i], given[i], given[i + 1]), given[i + 2]) for i in arrays]
                codegen(v, given[: arrays[0]], memories)
                inner.ret_void()
            builder.call(function, values)
            return context.get_dummy_value()

        return types.void(types.StarArgTuple(kinds)), generate

    return op


def two_sum(v, x, y):
    """The rounded sum of x and y, and what rounding took, exactly, whichever is larger."""
    total = v.add(x, y)
    seen = v.sub(total, x)
    return total, v.add(v.sub(x, v.sub(total, seen)), v.sub(y, seen))


def rowwise(n_scalars, n_outputs, body):
    """op(count, width, *scalars, *inputs, *outputs): outputs[t][x] = body(v, *scalars[t], *inputs[t][x]).

    Whole vectors first, then single numbers, so that nothing outside a row is read or written. An output may be an
    input.
    """

    def codegen(v, sizes, memories):
        count, width = sizes
        scalars, rest = memories[:n_scalars], memories[n_scalars:]
        inputs, outputs = rest[: len(rest) - n_outputs], rest[len(rest) - n_outputs :]
        b = v.b
        whole = b.sub(width, b.and_(width, I64(v.lanes - 1)))

        def row(t, _):
            of_row = [m.load(v.single(), b.mul(t, stride)) for m, stride in scalars]
            starts = [b.mul(t, stride) for _, stride in (*inputs, *outputs)]

            def part(w):
                known = [w.spread(s) for s in of_row]

                def element(x, _):
                    read = [m.load(w, start, x) for (m, _), start in zip(inputs, starts, strict=False)]
                    made = body(w, *known, *read)
                    made = made if isinstance(made, tuple) else (made,)
                    for (m, _), start, value in zip(outputs, starts[len(inputs) :], made, strict=True):
                        m.store(w, value, start, x)

                return element

            v.loop(I64(0), whole, v.lanes, [], part(v))
            v.loop(whole, width, 1, [], part(v.single()))

        v.loop(I64(0), count, 1, [], row)

    return operation(codegen)


@intrinsic
def pointer(typing, array):
    """The address of an array's first element. The array must outlive it: kernels' arguments do."""
    kind = types.CPointer(array.dtype)

    def codegen(context, builder, signature, args):
        return context.make_array(array)(context, builder, args[0]).data

    return kind(array), codegen


@intrinsic
def stored_alike(typing, x, y):
    """Whether numbers at x and at y are stored in the same type."""

    def codegen(context, builder, signature, args):
        return context.get_constant(types.boolean, x == y)

    return types.boolean(x, y), codegen


@intrinsic
def select_pointer(typing, condition, x, y):
    """x if condition else y; the condition must not hold where they are not `stored_alike`."""
    signature = y(condition, x, y)

    def codegen(context, builder, signature, args):
        if x != y:
            return args[2]
        return builder.select(context.cast(builder, args[0], condition, types.boolean), args[1], args[2])

    return signature, codegen


@intrinsic
def behind(typing, x, count):
    """The address `count` elements behind x."""

    def codegen(context, builder, signature, args):
        return builder.gep(args[0], [args[1]])

    return x(x, types.intp), codegen
