"""Operations on the rows that a list of numbers picks: dots, softmax, weighted sums, additions, maxima.

Rows are contiguous, `width` numbers each; row s starts at s width behind the given place. Whole vectors first, then
single numbers, so that nothing outside a row is read or written.
"""

from __future__ import annotations

import math

from llvmlite import ir

from ._maps import exp
from ._tiles import TILE
from ._vector import DOUBLE, I64, operation

__all__ = ["add_to_rows", "add_weighted_rows", "dots_with_rows", "largest_of_rows", "softmax_row"]

SLICE = 2 * TILE.vectors  # vectors of a row held in registers at a time
TERMS = 32  # of a sum before it joins the sum of sums: so many roundings are of the size of a few terms


def _row(v, rows, keys, m, width, *offsets):
    """The place of the row that entry m of the list names."""
    return rows.behind(v.b.mul(keys.load(v.single(), m), width), *offsets)


def _slices(v, width, part):
    """`part(v, n, x)` for each slice of n vectors from column x on: of SLICE vectors, of one, of single numbers."""
    b, one = v.b, v.single()
    whole = b.mul(b.sdiv(width, I64(SLICE * v.lanes)), I64(SLICE * v.lanes))
    vectors = b.mul(b.sdiv(width, I64(v.lanes)), I64(v.lanes))
    v.loop(I64(0), whole, SLICE * v.lanes, [], lambda x, _: part(v, SLICE, x))
    v.loop(whole, vectors, v.lanes, [], lambda x, _: part(v, 1, x))
    v.loop(vectors, width, 1, [], lambda x, _: part(one, 1, x))


@operation
def dots_with_rows(v, sizes, memories):
    """dots_with_rows(first, last, width, X, ROWS, KEYS, OUT): out[m] = x . rows[keys[m]] for first <= m < last."""
    first, last, width = sizes
    (xx, _), (rows, _), (keys, _), (out, _) = memories
    b, one = v.b, v.single()
    vectors = b.mul(b.sdiv(width, I64(v.lanes)), I64(v.lanes))

    def sums(m, n):
        """The dots with n rows, a vector each, and what the single numbers behind them add."""
        places = [_row(v, rows, keys, b.add(m, I64(i)), width) for i in range(n)]

        def products(x, acc):
            own = xx.load(v, x)
            return [v.fma(own, place.load(v, x), s) for place, s in zip(places, acc, strict=True)]

        def singles(x, acc):
            own = xx.load(one, x)
            return [one.fma(own, place.load(one, x), s) for place, s in zip(places, acc, strict=True)]

        acc = v.loop(I64(0), vectors, v.lanes, [v.zero] * n, products)
        return acc, v.loop(vectors, width, 1, [one.zero] * n, singles)

    def group(m, _):
        acc, rest = sums(m, v.lanes)
        vector, lane = v.totals(acc)
        behind = ir.Constant(v.type, ir.Undefined)
        for i, s in enumerate(rest):
            behind = b.insert_element(behind, s, I64(i))
        out.store(v, v.add(v.shuffle(vector, vector, [lane[i] for i in range(v.lanes)]), behind), m)

    def alone(m, _):
        (acc,), (rest,) = sums(m, 1)
        out.store(one, one.add(v.total(acc), rest), m)

    count = b.sub(last, first)
    grouped = b.add(first, b.mul(b.sdiv(count, I64(v.lanes)), I64(v.lanes)))
    v.loop(first, grouped, v.lanes, [], group)
    v.loop(grouped, last, 1, [], alone)


@operation
def add_weighted_rows(v, sizes, memories):
    """add_weighted_rows(first, last, width, P, ROWS, KEYS, OUT): out += sum over m of p[m] rows[keys[m]].

    first <= m < last, TERMS at a time, in two interleaved sums.
    """
    first, last, width = sizes
    (pp, _), (rows, _), (keys, _), (out, _) = memories
    b, single = v.b, v.single()

    def part(w, n, x):
        def term(m, acc):
            place = _row(w, rows, keys, m, width, x)
            p = w.spread(pp.load(single, m))
            return [w.fma(p, place.load(w, i * w.lanes), s) for i, s in enumerate(acc)]

        def some(start, total):
            end = b.add(start, I64(TERMS))
            end = b.select(b.icmp_signed("<", end, last), end, last)
            paired = b.sub(end, b.and_(b.sub(end, start), I64(1)))

            def two(m, acc):
                return [*term(m, acc[:n]), *term(b.add(m, I64(1)), acc[n:])]

            acc = w.loop(start, paired, 2, [w.zero] * (2 * n), two)
            acc[:n] = w.loop(paired, end, 1, acc[:n], term)
            return [w.add(s, w.add(acc[i], acc[n + i])) for i, s in enumerate(total)]

        total = w.loop(first, last, TERMS, [out.load(w, x, i * w.lanes) for i in range(n)], some)
        for i, s in enumerate(total):
            out.store(w, s, x, i * w.lanes)

    _slices(v, width, part)


@operation
def add_to_rows(v, sizes, memories):
    """add_to_rows(first, last, width, P, X, KEYS, WIDE): wide[keys[m]] += p[m] x for first <= m < last, in float64."""
    first, last, width = sizes
    (pp, _), (xx, _), (keys, _), (wide, _) = memories
    b = v.b

    def doubled(w, memory, *offsets):
        number = memory.load(w, *offsets)
        return number if memory.element == DOUBLE else b.fpext(number, w.type)

    def part(w, n, x):
        own, one = [doubled(w, xx, x, i * w.lanes) for i in range(n)], w.single()

        def add(m, _):
            place, p = _row(w, wide, keys, m, width, x), w.spread(doubled(one, pp, m))
            for i in range(n):
                place.store(w, w.fma(p, own[i], place.load(w, i * w.lanes)), i * w.lanes)

        w.loop(first, last, 1, [], add)

    _slices(v, width, part)


@operation
def largest_of_rows(v, sizes, memories):
    """largest_of_rows(count, width, ROWS, KEYS, WHO, OUT): the maximum of each column, and the row that it comes from.

    Of equal numbers the first of the list counts, and NaN before all. `who` holds bit patterns of integers.
    """
    count, width = sizes
    (rows, _), (keys, _), (who, _), (out, _) = memories
    b, single = v.b, v.single()

    def part(w, n, x):
        def number(m):
            key = keys.load(single, m)
            return w.spread(single.as_real(b.trunc(key, single.whole) if w.bits < 64 else key))

        def keep(m, held):
            place, own = _row(w, rows, keys, m, width, x), number(m)
            best, whose = [], []
            for i in range(n):
                new, old = place.load(w, i * w.lanes), held[i]
                is_nan = b.and_(b.fcmp_unordered("uno", new, new), b.fcmp_ordered("ord", old, old))
                wins = b.or_(w.compare(new, ">", old), is_nan)
                best.append(w.where(wins, new, old))
                whose.append(w.where(wins, own, held[n + i]))
            return best + whose

        begin = _row(w, rows, keys, I64(0), width, x)
        start = [begin.load(w, i * w.lanes) for i in range(n)] + [number(I64(0))] * n
        held = w.loop(I64(1), count, 1, start, keep)
        for i in range(n):
            out.store(w, held[i], x, i * w.lanes)
            who.store(w, held[n + i], x, i * w.lanes)

    _slices(v, width, part)


@operation
def softmax_row(v, sizes, memories):
    """softmax_row(count, S, NUMBERS): s = exp(f s - max f s), where numbers = [f, and then the sum of s].

    All are 0 if no score is above -inf.
    """
    (count,) = sizes
    (ss, _), (numbers, _) = memories
    b, one = v.b, v.single()
    vectors = b.mul(b.sdiv(count, I64(v.lanes)), I64(v.lanes))
    factor, lowest = numbers.load(one, 0), one.const(-math.inf)

    def larger(w):
        return lambda x, y: w.where(w.compare(y, ">", x), y, x)

    def scaled(w):
        f = w.spread(factor)

        def body(m, top):
            s = w.mul(f, ss.load(w, m))
            ss.store(w, s, m)
            return [larger(w)(top[0], s)]

        return body

    (tops,) = v.loop(I64(0), vectors, v.lanes, [v.spread(lowest)], scaled(v))
    (top,) = one.loop(vectors, count, 1, [v.fold(tops, larger(v))], scaled(one))
    base = one.where(one.compare(top, "==", lowest), one.zero, top)

    def weights(w):
        taken_off = w.spread(base)

        def body(m, total):
            p = exp(w, w.sub(ss.load(w, m), taken_off))
            ss.store(w, p, m)
            return [w.add(total[0], p)]

        return body

    (sums,) = v.loop(I64(0), vectors, v.lanes, [v.zero], weights(v))
    (total,) = one.loop(vectors, count, 1, [v.total(sums)], weights(one))
    numbers.store(one, total, 1)
