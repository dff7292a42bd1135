"""What happens to rows of a chunk before and after its products. Feature maps: _maps.py."""

from __future__ import annotations

from ._maps import BIAS, MANTISSA, identity_rows
from ._tiles import TILE
from ._vector import I64, operation, rowwise, two_sum

__all__ = [
    "add_later", "add_rows", "add_seen", "centre_rows", "centre_state", "clear_rows", "collect", "collect_weighted",
    "copy_rows", "divide_rows", "mean_rows", "row_dots", "scale_rows", "scale_rows_add",
    "step", "transpose", "turn_rows", "unturn_rows",
]  # fmt: skip

NV = TILE.vectors
PLAIN_DIVISION = 120  # behind 2^120 and before 2^-120 the reciprocal of a divisor may leave the normal range


clear_rows = rowwise(0, 1, lambda v: v.zero)
copy_rows = identity_rows
add_rows = rowwise(0, 1, lambda v, x, old: v.add(old, x))
centre_state = rowwise(1, 1, lambda v, den, s, e, mu: v.add(v.fma(v.neg(den), mu, s), e))
centre_rows = rowwise(0, 1, lambda v, x, mu: v.sub(x, mu))
scale_rows = rowwise(1, 1, lambda v, f, x: v.mul(f, x))
scale_rows_add = rowwise(1, 1, lambda v, f, x, old: v.fma(f, x, old))
turn_rows = rowwise(2, 2, lambda v, c, s, x: (v.mul(c, x), v.mul(s, x)))  # phi -> cos phi, sin phi
unturn_rows = rowwise(2, 1, lambda v, c, s, near, far: v.fma(c, near, v.mul(s, far)))


def _mean(v, share, x, mu):
    """mu + x share, x passed over unless it is finite; terms are scaled before they are added: no overflow."""
    term = v.mul(x, share)
    finite = v.compare(v.sub(term, term), "==", v.zero)
    return v.add(mu, v.where(finite, term, v.zero))


mean_rows = rowwise(1, 1, _mean)


@operation
def divide_rows(v, sizes, memories):
    """divide_rows(count, width, c, y, out): out[t] = y[t] / c[t], 0 where c[t] is 0.

    y (1/c), its remainder against c, and the quotient corrected by it: rounded as a division is, at a third of
    its time. Divisors whose reciprocal could leave the normal range are divided by.
    """
    count, width = sizes
    (cc, c_stride), (yy, y_stride), (oo, o_stride) = memories
    b, one = v.b, v.single()
    whole = b.sub(width, b.and_(width, I64(v.lanes - 1)))

    def by_product(w, y, c, r):
        q = w.mul(y, r)
        return w.fma(w.fma(w.neg(q), c, y), r, q)

    def by_division(w, y, c, r):
        return w.where(w.compare(c, "==", w.zero), w.zero, w.div(y, c))

    def row(t, _):
        c = cc.load(one, b.mul(t, c_stride))
        field = b.lshr(one.size_of(c), one.int_const(MANTISSA[one.bits]))
        low, high = (one.int_const(BIAS[one.bits] + e) for e in (-PLAIN_DIVISION, PLAIN_DIVISION))
        plain = b.or_(b.icmp_signed("<", field, low), b.icmp_signed(">", field, high))
        y_start, o_start = b.mul(t, y_stride), b.mul(t, o_stride)

        def part(divide, first, last, w):
            known, inverse = w.spread(c), w.spread(one.div(one.one, c))
            w.loop(first, last, w.lanes, [],
                   lambda x, _: oo.store(w, divide(w, yy.load(w, y_start, x), known, inverse), o_start, x))  # fmt: skip

        with b.if_else(plain) as (slow, fast):
            for branch, divide in ((slow, by_division), (fast, by_product)):
                with branch:
                    part(divide, I64(0), whole, v)
                    part(divide, whole, width, one)

    v.loop(I64(0), count, 1, [], row)


@operation
def row_dots(v, sizes, memories):
    """row_dots(count, width, x, y, dots): dots[t] = x[t] . y[t]; `width` is a multiple of the lanes."""
    count, width = sizes
    (xx, x_stride), (yy, y_stride), (dots, _) = memories

    def row(t, _):
        x_start, y_start = v.b.mul(t, x_stride), v.b.mul(t, y_stride)
        (total,) = v.loop(I64(0), width, v.lanes, [v.zero],
                          lambda i, acc: [v.fma(xx.load(v, x_start, i), yy.load(v, y_start, i), acc[0])])  # fmt: skip
        dots.store(v.single(), v.total(total), t)

    v.loop(I64(0), count, 1, [], row)


def _make_running(weighted, back, spread):
    """Running sums of rows, in registers along a chunk. ZE is [z | e], e what z is owed, its stride their distance.

    weighted: e += h[t] a[t], else e += a[t]; back: from the last row to the first.
    spread: y[t] += h[t] (z + e), or z + e where the sum itself is weighted; else no y.
    """

    def codegen(v, sizes, memories):
        count, width = sizes
        (aa, lda), (ze, half), (hh, _), *rest = memories
        b, one = v.b, v.single()

        def part(x, _):
            z = [ze.load(v, x, n * v.lanes) for n in range(NV)]

            def token(i, e):
                t = b.sub(b.sub(count, I64(1)), i) if back else i
                start, h = b.mul(t, lda), v.spread(hh.load(one, t))
                for n in range(NV):
                    a = aa.load(v, start, x, n * v.lanes)
                    e[n] = v.fma(h, a, e[n]) if weighted else v.add(e[n], a)
                if spread:
                    ((yy, ldy),) = rest
                    start = b.mul(t, ldy)
                    for n in range(NV):
                        y, now = yy.load(v, start, x, n * v.lanes), v.add(z[n], e[n])
                        yy.store(v, v.add(y, now) if weighted else v.fma(h, now, y), start, x, n * v.lanes)
                return e

            e = v.loop(I64(0), count, 1, [ze.load(v, half, x, n * v.lanes) for n in range(NV)], token)
            for n in range(NV):
                ze.store(v, e[n], half, x, n * v.lanes)

        v.loop(I64(0), width, NV * v.lanes, [], part)

    return operation(codegen)


add_seen = _make_running(False, False, True)  # y[t] += h[t] sum over s <= t of a[s]
add_later = _make_running(True, True, True)  # y[t] += sum over s >= t of h[s] a[s]
collect = _make_running(False, False, False)  # e += sum a[t]
collect_weighted = _make_running(True, False, False)  # e += sum h[t] a[t]


def _turned(v, rows):
    """The transpose of `lanes` vectors: halves of pairs exchanged, then quarters, down to single numbers."""
    rows, lanes = list(rows), range(v.lanes)
    far = v.lanes // 2
    while far:
        for i in (i for i in lanes if not i & far):
            a, b = rows[i], rows[i + far]
            rows[i] = v.shuffle(a, b, [x + v.lanes - far if x & far else x for x in lanes])
            rows[i + far] = v.shuffle(a, b, [x + v.lanes if x & far else x + far for x in lanes])
        far //= 2
    return rows


@operation
def transpose(v, sizes, memories):
    """transpose(count, width, x, out): out[i][t] = x[t][i], squares of vectors first, then single numbers."""
    count, width = sizes
    (xx, x_stride), (oo, o_stride) = memories
    b, one = v.b, v.single()
    whole_count, whole_width = (b.sub(n, b.and_(n, I64(v.lanes - 1))) for n in sizes)

    def square(t, i):
        x_start, o_start = b.mul(t, x_stride), b.mul(i, o_stride)
        rows = _turned(v, [xx.load(v, x_start, i, (n, x_stride)) for n in range(v.lanes)])
        for n, row in enumerate(rows):
            oo.store(v, row, o_start, t, (n, o_stride))

    def numbers(t, first):
        start = b.mul(t, x_stride)
        v.loop(first, width, 1, [], lambda i, _: oo.store(one, xx.load(one, start, i), b.mul(i, o_stride), t))

    def rows(t, _):
        v.loop(I64(0), whole_width, v.lanes, [], lambda i, _: square(t, i))

    v.loop(I64(0), whole_count, v.lanes, [], rows)
    v.loop(I64(0), whole_count, 1, [], lambda t, _: numbers(t, whole_width))
    v.loop(whole_count, count, 1, [], lambda t, _: numbers(t, I64(0)))


@operation
def step(v, sizes, memories):
    """step(rows, width, Q, K, V, W, [turn,] sums, rest, new_sums, new_rest, Y): one token, from state to state.

    y = q . (S + E) + (q . k) v,    S' + E' = S + E + k v^T    with S' the rounded sum and E' the rest of it, exactly

    S, E are sums and rest, times turn if it is given.
    """
    rows, width = sizes
    (qq, _), (kk, _), (vv, _), (ww, _), *turn, (ss, s_row), (ee, e_row), (s2, s2_row), (e2, e2_row), (yy, _) = memories
    b = v.b

    def part(w, first, last, n):
        def columns(x, _):
            values = [vv.load(w, x, i * w.lanes) for i in range(n)]

            def row(f, acc):
                query, key, *factors = (m.spread(w, f) for m in (qq, kk, *(m for m, _ in turn)))
                for i in range(n):
                    s, e = (m.load(w, b.mul(f, stride), x, i * w.lanes) for m, stride in ((ss, s_row), (ee, e_row)))
                    for factor in factors:
                        s, e = w.mul(s, factor), w.mul(e, factor)
                    acc[i] = w.fma(query, w.add(s, e), acc[i])
                    new, lost = two_sum(w, s, w.fma(key, values[i], e))
                    s2.store(w, new, b.mul(f, s2_row), x, i * w.lanes)
                    e2.store(w, lost, b.mul(f, e2_row), x, i * w.lanes)
                return acc

            acc = w.loop(I64(0), rows, 1, [w.zero] * n, row)
            for i in range(n):
                yy.store(w, w.fma(ww.spread(w, 0), values[i], acc[i]), x, i * w.lanes)

        w.loop(first, last, n * w.lanes, [], columns)

    whole = b.sub(width, b.and_(width, I64(NV * v.lanes - 1)))
    part(v, I64(0), whole, NV)
    part(v.single(), whole, width, 1)
