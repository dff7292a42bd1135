"""The products of the engines as register tiles: the token-blocked recurrence, its pairs, and matrix tiles.

The primitive, for the T tokens of a block and one slice of NV vectors of columns:

    out_t = b_t . (S + E) + sum_j W[t, j] c_j    W[t, j] = b_t . a_j, over j <= t (`advance`), j >= t (`retreat`)
    E += sum_t a_t c_t^T

T * NV accumulators and T * NV values stay in registers; a row of the state is loaded once for T tokens. S is large
and moves rarely: every few chunks `settle` carries E over, S' = S + E, and leaves in E what that rounded away. So a
sum over N tokens meets one rounding of its own size for each of N / 96 chunks, each repaid, and E's own roundings
are of the size of a chunk.

Callers pad with zeros: columns to whole slices, features to whole vectors, tokens to whole blocks.
"""

from __future__ import annotations

from ._tiles import TILE
from ._vector import I64, operation, two_sum

__all__ = ["PAIRS", "advance", "pairs", "pairs_back", "product", "product_add", "retreat", "settle"]

T, NV, ROWS = TILE.tokens, TILE.vectors, TILE.rows
SEEN = {
    False: [(t, j) for t in range(T) for j in range(t + 1)],
    True: [(t, j) for t in range(T) for j in range(t, T)],
}
PAIRS = 32  # numbers `pairs` may write for a block


def _places(v, back):
    """Where `pairs` puts W[t, j] and, behind them, den_t: key -> place, in vectors of totals."""
    keys = [*SEEN[back], *(("den", t) for t in range(T))]
    return keys, -(-len(keys) // v.lanes)


def _make_pairs(back):
    def pairs(v, sizes, memories):
        """pairs(count, width, with_den, B, A, ZE, W, D): W[t, j] = b_t . a_j, block by block; if with_den also
        den_t = b_t . (z + e) + sum_{j <= t} W[t, j] and e += sum_t a_t, the primitive for a column of ones.

        ZE is [z | e], its stride the distance between them; a block's W is PAIRS numbers wide.
        """
        count, width, with_den = sizes
        (bb, ldb), (aa, lda), (ze, half), (ww, _), (dd, _) = memories
        keys, n_vectors = _places(v, back)
        n_pairs = len(SEEN[back])

        def block(first, dens):
            b_start, a_start = v.b.mul(first, ldb), v.b.mul(first, lda)

            def products(x, acc):
                left = [bb.load(v, b_start, (t, ldb), x) for t in range(T)]
                right = [aa.load(v, a_start, (t, lda), x) for t in range(T)]
                made = [v.fma(left[t], right[j], s) for (t, j), s in zip(SEEN[back], acc, strict=False)]
                if dens:
                    owed = ze.load(v, half, x)
                    now = v.add(ze.load(v, x), owed)
                    made += [v.fma(left[t], now, s) for t, s in enumerate(acc[n_pairs:])]
                    for t in range(T):
                        owed = v.add(owed, right[t])
                    ze.store(v, owed, half, x)
                return made

            sums = v.loop(I64(0), width, v.lanes, [v.zero] * (n_pairs + dens * T), products)
            sums += [v.zero] * (n_vectors * v.lanes - len(sums))
            start = v.b.mul(v.b.sdiv(first, I64(T)), I64(PAIRS))
            for n in range(n_vectors):
                vector, lane = v.totals(sums[n * v.lanes : (n + 1) * v.lanes])
                ww.store(v, v.shuffle(vector, vector, [lane[i] for i in range(v.lanes)]), start, n * v.lanes)
            if dens:
                one = v.single()
                for t in range(T):
                    den = ww.load(one, start, keys.index(("den", t)))
                    for j in range(t + 1):
                        den = v.add(den, ww.load(one, start, keys.index((t, j))))
                    dd.store(one, den, first, t)

        if back:
            v.loop(I64(0), count, T, [], lambda t, _: block(t, False))
            return
        with v.b.if_else(v.b.icmp_signed("!=", with_den, I64(0))) as (full, bare):
            with full:
                v.loop(I64(0), count, T, [], lambda t, _: block(t, True))
            with bare:
                v.loop(I64(0), count, T, [], lambda t, _: block(t, False))

    return operation(pairs)


def _make_blocks(back):
    def blocks(v, sizes, memories):
        """advance(count, slices, rows, step, B, A, C, S, W, O, *next): the primitive for a chunk of tokens, from the
        first block to the last or, back, from the last to the first, slice of columns by slice.

        b[t ldb + x], a[t lda + x], c[t ldc + column], o[t ldo + column]; row x of slice n is
        s[n step + x lds : ... + 2 NV L], S left and E right of it. Of the arrays `next`, a cache line of each token is
        asked for with every slice, so that they are near when their turn comes.
        """
        count, slices, rows, step = sizes
        (bb, ldb), (aa, lda), (cc, ldc), (ss, lds), (ww, _), (oo, ldo), *ahead = memories
        b, keys, columns = v.b, _places(v, back)[0], NV * v.lanes
        n_blocks = b.sdiv(b.add(count, I64(T - 1)), I64(T))

        def block(n, i):
            if back:
                i = b.sub(b.sub(n_blocks, I64(1)), i)
            first, column, state = b.mul(i, I64(T)), b.mul(n, I64(columns)), b.mul(n, step)
            b_start, a_start = b.mul(first, ldb), b.mul(first, lda)
            c_start, o_start = b.add(b.mul(first, ldc), column), b.add(b.mul(first, ldo), column)
            w_start = b.mul(i, I64(PAIRS))
            for m, stride in ahead:
                start = b.add(b.mul(first, stride), column)
                for t in range(T):
                    m.ask(start, (t, stride))
            value = [[cc.load(v, c_start, (t, ldc), k * v.lanes) for k in range(NV)] for t in range(T)]
            left = [bb.behind(b_start, (t, ldb)) for t in range(T)]
            right = [aa.behind(a_start, (t, lda)) for t in range(T)]
            here = ss.behind(state)

            def body(x, acc):
                row = b.mul(x, lds)
                owed = [here.load(v, row, (NV + k) * v.lanes) for k in range(NV)]
                now = [v.add(here.load(v, row, k * v.lanes), owed[k]) for k in range(NV)]
                for t in range(T):
                    f = left[t].spread(v, x)
                    for k in range(NV):
                        acc[t * NV + k] = v.fma(f, now[k], acc[t * NV + k])
                if TILE.reload:  # too few registers to keep E while S is used: read it again
                    b.fence("seq_cst", "singlethread")
                    owed = [here.load(v, row, (NV + k) * v.lanes) for k in range(NV)]
                for t in range(T):
                    f = right[t].spread(v, x)
                    for k in range(NV):
                        owed[k] = v.fma(f, value[t][k], owed[k])
                for k in range(NV):
                    here.store(v, owed[k], row, (NV + k) * v.lanes)
                return acc

            acc = v.loop(I64(0), rows, 1, [v.zero] * (T * NV), body)
            for t in range(T):
                for j in range(t, T) if back else range(t + 1):
                    pair = ww.spread(v, w_start, keys.index((t, j)))
                    for k in range(NV):
                        acc[t * NV + k] = v.fma(pair, value[j][k], acc[t * NV + k])
                for k in range(NV):
                    oo.store(v, acc[t * NV + k], o_start, (t, ldo), k * v.lanes)

        v.loop(I64(0), slices, 1, [], lambda n, _: v.loop(I64(0), n_blocks, 1, [], lambda i, _: block(n, i)))

    return operation(blocks)


pairs, pairs_back = _make_pairs(False), _make_pairs(True)
advance, retreat = _make_blocks(False), _make_blocks(True)


@operation
def settle(v, sizes, memories):
    """settle(rows, vectors, S): S' = S + E, E' = what that addition rounded away, exactly (two-sum).

    Row x holds `vectors` vectors of S and as many of E behind them.
    """
    rows, vectors = sizes
    ((ss, lds),) = memories
    far = v.b.mul(vectors, I64(v.lanes))

    def row(x, _):
        start = v.b.mul(x, lds)

        def part(i, _):
            new, lost = two_sum(v, ss.load(v, start, i), ss.load(v, start, far, i))
            ss.store(v, new, start, i)
            ss.store(v, lost, start, far, i)

        v.loop(I64(0), far, v.lanes, [], part)

    v.loop(I64(0), rows, 1, [], row)


def _make_product(add):
    def product(v, sizes, memories):
        """product(terms, lda_row, rows, slices, b_step, o_step, A, B, O): in slices of NV vectors of columns,

        o[n o_step + m ldo + column] (+)= sum_{i < terms} a[m lda_row + i lda] b[n b_step + i ldb + column]

        for whole tiles of ROWS rows; A has any two strides, its transpose is as good.
        """
        terms, lda_row, rows, slices, b_step, o_step = sizes
        (aa, lda), (bb, ldb), (oo, ldo) = memories
        b = v.b

        def tile(n, row):
            a_start, b_start = b.mul(row, lda_row), b.mul(n, b_step)
            left = [aa.behind(a_start, (m, lda_row)) for m in range(ROWS)]
            right = bb.behind(b_start)

            def body(i, acc):
                here, column = b.mul(i, ldb), b.mul(i, lda)
                values = [right.load(v, here, k * v.lanes) for k in range(NV)]
                for m in range(ROWS):
                    f = left[m].spread(v, column)
                    for k in range(NV):
                        acc[m * NV + k] = v.fma(f, values[k], acc[m * NV + k])
                return acc

            acc = v.loop(I64(0), terms, 1, [v.zero] * (ROWS * NV), body)
            start = b.add(b.mul(n, o_step), b.mul(row, ldo))
            for m in range(ROWS):
                for k in range(NV):
                    value = acc[m * NV + k]
                    if add:
                        value = v.add(oo.load(v, start, (m, ldo), k * v.lanes), value)
                    oo.store(v, value, start, (m, ldo), k * v.lanes)

        v.loop(I64(0), slices, 1, [], lambda n, _: v.loop(I64(0), rows, ROWS, [], lambda m, _: tile(n, m)))

    return operation(product)


product, product_add = _make_product(False), _make_product(True)
