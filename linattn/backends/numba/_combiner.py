"""The kernels of the combiner engine. Definition: backends/reference/combiner.py.

A query lists the visible keys that it meets, those of the first source before those of the second, and then works on
that list alone: scores, softmax, values. So a key that is hidden or comes later is never read, NaN stays where it
belongs, and one kernel serves every plan. Lists are read off runs, which blocks give by arithmetic, or off edges.

All arrays are 1-D and contiguous; `table[i]` says which head of each array the i-th query head reads, sorted by the
head of k and v. What many queries add to a key is summed in float64.
"""

from __future__ import annotations

from ._jit import helper, reduction
from ._lists import add_to_rows, add_weighted_rows, dots_with_rows, largest_of_rows, softmax_row
from ._vector import pointer

__all__ = ["FIELDS", "RULES", "attend_back_kernel", "attend_kernel", "pool_back_kernel", "pool_kernel"]

ALL, UPTO, FROM, NOT, GROUPS_UPTO, GROUPS_NOT = range(6)
RULES = {"all": ALL, "upto": UPTO, "from": FROM, "not": NOT, "groups upto": GROUPS_UPTO, "groups not": GROUPS_NOT}
FIELDS = (
    "source", "rule", "shift", "q_groups", "q_size", "q_step", "q_stride", "q_first", "q_start",
    "k_size", "k_step", "k_stride", "k_base",
)  # fmt: skip
SOURCE, RULE, SHIFT, Q_GROUPS, Q_SIZE, Q_STEP, Q_STRIDE, Q_FIRST, Q_START, K_SIZE, K_STEP, K_STRIDE, K_BASE = range(13)
MAX, MEAN, REP = range(3)


# -- lists ----------------------------------------------------------------------------------------------------------


@helper
def place_of(block, t):
    """Group and place of query t in a block, or -1, -1."""
    t -= block[Q_START]
    if t < 0:
        return -1, -1
    if block[Q_STRIDE] == 1:
        g, i = t // block[Q_STEP], t % block[Q_STEP] - block[Q_FIRST]
    else:
        i, g = t // block[Q_STRIDE], t % block[Q_STRIDE] - block[Q_FIRST]
    if g < 0 or g >= block[Q_GROUPS] or i < 0 or i >= block[Q_SIZE]:
        return -1, -1
    return g, i


@helper
def run_of(block, t, n_keys, run):
    """run = [first key, how many, first key behind a gap, how many]: what t meets in a block, `stride` apart."""
    g, i = place_of(block, t)
    if g < 0:
        run[0] = run[1] = run[2] = run[3] = 0
        return
    base, stride = block[K_BASE] + g * block[K_STEP], block[K_STRIDE]
    first, last = 0, min(block[K_SIZE], (n_keys - base + stride - 1) // stride)  # those that exist
    gap = last
    rule, shift = block[RULE], block[SHIFT]
    if rule == UPTO:
        last = gap = min(last, i + shift + 1)
    elif rule == FROM:
        first = max(0, i + shift)
    elif rule == NOT:
        gap = i + shift
    elif rule == GROUPS_UPTO:
        last = gap = min(last, g + 1)
    elif rule == GROUPS_NOT:
        gap = g
    gap = last if gap < first or gap > last else gap
    run[0], run[1] = base + first * stride, max(0, gap - first)
    run[2], run[3] = base + (gap + 1) * stride, max(0, last - gap - 1)


@helper
def find_runs(blocks, dims, runs):
    """The runs of all queries, (blocks, queries, 4): the same for every head."""
    N = dims[0]
    for b in range(blocks.shape[0]):
        for t in range(N):
            at = 4 * (b * N + t)
            run_of(blocks[b], t, dims[1 + blocks[b, SOURCE]], runs[at : at + 4])


@helper
def count_on(keys, base, stride):
    for j in range(keys.size):
        keys[j] = base + j * stride


@helper
def list_run(start, count, stride, mask, mask_at, masked, keys, n):
    """Adds the visible keys of a run behind the first n; gives their number."""
    if not masked:
        count_on(keys[n : n + count], start, stride)
        return n + count
    for j in range(count):
        s = start + j * stride
        if mask[mask_at + s]:
            keys[n] = s
            n += 1
    return n


@helper
def list_keys(blocks, runs, indptr, indices, t, dims, mask, mask_at, alive, alive_at, keys):
    """The keys of query t: their number in the first source, and in both."""
    N, n_tokens, masked, some_dead = dims[0], dims[1], dims[5] == 1, dims[6] == 1
    n = first = 0
    for b in range(blocks.shape[0]):  # those of the first source come first
        at, stride = 4 * (b * N + t), blocks[b, K_STRIDE]
        for i in range(at, at + 4, 2):
            if blocks[b, SOURCE] == 0:
                n = first = list_run(runs[i], runs[i + 1], stride, mask, mask_at, masked, keys, n)
            else:
                n = list_run(runs[i], runs[i + 1], stride, alive, alive_at, some_dead, keys, n)
    if blocks.shape[0] > 0:
        return first, n
    for e in range(indptr[t], indptr[t + 1]):
        s = indices[e]
        if s < n_tokens:
            if not masked or mask[mask_at + s]:
                keys[n] = s
                n += 1
            first = n
        elif not some_dead or alive[alive_at + s - n_tokens]:
            keys[n] = s - n_tokens
            n += 1
    return first, n


# -- rows -----------------------------------------------------------------------------------------------------------


@reduction
def dot(x, y):
    total = x.dtype.type(0)
    for i in range(x.size):
        total += x[i] * y[i]
    return total


@helper
def add_one(p, a, out):
    for x in range(out.size):
        out[x] += p * a[x]


@helper
def add_row(a, out):
    for x in range(out.size):
        out[x] += a[x]


@helper
def clear(x):
    zero = x.dtype.type(0)
    for i in range(x.size):
        x[i] = zero


@helper
def divide_row(x, divisor):
    for i in range(x.size):
        x[i] /= divisor


@helper
def copy_row(x, out):
    for i in range(out.size):
        out[i] = x[i]


# -- softmax --------------------------------------------------------------------------------------------------------


@helper
def scores_of_keys(x, k, k_at, kappa, kappa_at, bias, bias_at, biased, keys, first, n, scale, numbers, s):
    """The weights of a query's keys, not yet divided by their sum, and the sum; `numbers` is scratch, two of them."""
    D, own, out, listed = x.size, pointer(x), pointer(s), pointer(keys)
    dots_with_rows(0, first, D, own, 0, 0, pointer(k), k_at, 0, listed, 0, 0, out, 0, 0)
    dots_with_rows(first, n, D, own, 0, 0, pointer(kappa), kappa_at, 0, listed, 0, 0, out, 0, 0)
    numbers[0] = scale
    if biased:
        for m in range(n):
            s[m] *= scale
        for m in range(first, n):
            s[m] += bias[bias_at + keys[m]]
        numbers[0] = 1
    softmax_row(n, out, 0, 0, pointer(numbers), 0, 0)
    return numbers[1]


# -- kernels --------------------------------------------------------------------------------------------------------
# dims      queries, keys of the first and the second source, D, E, masked, some dead, biased
# table     query head, head of k and v as they group, then the heads of q, k, v, mask, kappa, u, alive, bias, d_out


def attend_kernel(salt):
    """The kernel with the salt of its cache key in its closure."""

    def combiner_attend(
        q, k, v, mask, kappa, u, alive, bias, out, keys, s, two,
        table, blocks, runs, indptr, indices, dims, scale, first, last,
    ):  # fmt: skip
        """Heads first <= h < last.   out = sum p v / sum p, p = exp(scale q . k + bias - max)"""
        salt  # noqa: B018
        N, M, R, D, E, biased = dims[0], dims[1], dims[2], dims[3], dims[4], dims[7] == 1
        scale = s.dtype.type(scale)
        listed = pointer(keys)
        find_runs(blocks, dims, runs)
        for h in range(first, last):
            q_at, k_at, v_at, mask_at = table[h, 2] * N * D, table[h, 3] * M * D, table[h, 4] * M * E, table[h, 5] * M
            kappa_at, u_at, alive_at, bias_at = (
                table[h, 6] * R * D,
                table[h, 7] * R * E,
                table[h, 8] * R,
                table[h, 9] * R,
            )
            for t in range(N):
                m, n = list_keys(blocks, runs, indptr, indices, t, dims, mask, mask_at, alive, alive_at, keys)
                at = (table[h, 0] * N + t) * E
                y = out[at : at + E]
                clear(y)
                x = q[q_at + t * D : q_at + (t + 1) * D]
                total = scores_of_keys(x, k, k_at, kappa, kappa_at, bias, bias_at, biased, keys, m, n, scale, two, s)
                if total != 0:
                    add_weighted_rows(0, m, E, pointer(s), 0, 0, pointer(v), v_at, 0, listed, 0, 0, pointer(y), 0, 0)
                    add_weighted_rows(m, n, E, pointer(s), 0, 0, pointer(u), u_at, 0, listed, 0, 0, pointer(y), 0, 0)
                    divide_row(y, total)

    return combiner_attend


def attend_back_kernel(salt):
    """The kernel with the salt of its cache key in its closure."""

    def combiner_attend_back(
        d_out, q, k, v, mask, kappa, u, alive, bias, d_q, d_k, d_v, d_kappa, d_u, keys, s, dp, two, wide,
        table, blocks, runs, indptr, indices, dims, scale, first, last,
    ):  # fmt: skip
        """Heads first <= h < last; d_k and d_v of a head of keys after its last query head.

        d_p = g . v,   d_s = p (d_p - sum p d_p),   d_q = scale sum d_s k,   d_k += scale d_s q,   d_v += p g
        """
        salt  # noqa: B018
        N, M, R, D, E, biased = dims[0], dims[1], dims[2], dims[3], dims[4], dims[7] == 1
        scale = s.dtype.type(scale)
        listed, weights, d_scores = pointer(keys), pointer(s), pointer(dp)
        wide_k, wide_v = wide[: M * D], wide[M * D : M * (D + E)]
        wide_kappa, wide_u = wide[M * (D + E) : M * (D + E) + R * D], wide[M * (D + E) + R * D :]
        find_runs(blocks, dims, runs)
        for h in range(first, last):
            q_at, k_at, v_at, mask_at = table[h, 2] * N * D, table[h, 3] * M * D, table[h, 4] * M * E, table[h, 5] * M
            kappa_at, u_at, alive_at, bias_at = (
                table[h, 6] * R * D,
                table[h, 7] * R * E,
                table[h, 8] * R,
                table[h, 9] * R,
            )
            g_at, head, group = table[h, 10] * N * E, table[h, 0], table[h, 1]
            if h == first or table[h - 1, 1] != group:
                clear(wide_k)
                clear(wide_v)
            clear(wide_kappa)
            clear(wide_u)
            for t in range(N):
                m, n = list_keys(blocks, runs, indptr, indices, t, dims, mask, mask_at, alive, alive_at, keys)
                at = (head * N + t) * D
                y = d_q[at : at + D]
                clear(y)
                x, g = q[q_at + t * D : q_at + (t + 1) * D], d_out[g_at + t * E : g_at + (t + 1) * E]
                total = scores_of_keys(x, k, k_at, kappa, kappa_at, bias, bias_at, biased, keys, m, n, scale, two, s)
                if total == 0:
                    continue
                p, ds = s[:n], dp[:n]
                divide_row(p, total)
                own = pointer(g)
                dots_with_rows(0, m, E, own, 0, 0, pointer(v), v_at, 0, listed, 0, 0, d_scores, 0, 0)
                dots_with_rows(m, n, E, own, 0, 0, pointer(u), u_at, 0, listed, 0, 0, d_scores, 0, 0)
                delta = dot(p, ds)
                for j in range(n):
                    ds[j] = scale * p[j] * (ds[j] - delta)
                add_weighted_rows(0, m, D, d_scores, 0, 0, pointer(k), k_at, 0, listed, 0, 0, pointer(y), 0, 0)
                add_weighted_rows(m, n, D, d_scores, 0, 0, pointer(kappa), kappa_at, 0, listed, 0, 0, pointer(y), 0, 0)
                add_to_rows(0, m, D, d_scores, 0, 0, pointer(x), 0, 0, listed, 0, 0, pointer(wide_k), 0, 0)
                add_to_rows(m, n, D, d_scores, 0, 0, pointer(x), 0, 0, listed, 0, 0, pointer(wide_kappa), 0, 0)
                add_to_rows(0, m, E, weights, 0, 0, own, 0, 0, listed, 0, 0, pointer(wide_v), 0, 0)
                add_to_rows(m, n, E, weights, 0, 0, own, 0, 0, listed, 0, 0, pointer(wide_u), 0, 0)
            copy_row(wide_kappa, d_kappa[head * R * D : (head + 1) * R * D])
            copy_row(wide_u, d_u[head * R * E : (head + 1) * R * E])
            if h == last - 1 or table[h + 1, 1] != group:
                copy_row(wide_k, d_k[group * M * D : (group + 1) * M * D])
                copy_row(wide_v, d_v[group * M * E : (group + 1) * M * E])

    return combiner_attend_back


# -- pools ----------------------------------------------------------------------------------------------------------


@helper
def representative(keys, n, rep):
    """The last of the listed tokens that is not behind `rep`, else the first."""
    last, lowest = -1, keys[0]
    for m in range(n):
        last = keys[m] if last < keys[m] <= rep else last
        lowest = min(lowest, keys[m])
    return lowest if last < 0 else last


def pool_kernel(salt):
    """The kernel with the salt of its cache key in its closure."""

    def combiner_pool(
        x, mask, out, who, bits, keys, wide, table, blocks, runs, indptr, indices, rep, dims, kind, first, last
    ):
        """Heads first <= h < last: out[r] of the members of r, and the token each number comes from, -1: none.

        `bits` is the memory of `who` as real numbers.
        """
        salt  # noqa: B018
        R, N, C = dims[0], dims[1], dims[3]
        listed = pointer(keys)
        find_runs(blocks, dims, runs)
        for h in range(first, last):
            x_at, mask_at = table[h, 2] * N * C, table[h, 5] * N
            for r in range(R):
                _, n = list_keys(blocks, runs, indptr, indices, r, dims, mask, mask_at, mask, 0, keys)
                at = (table[h, 0] * R + r) * C
                y, own = out[at : at + C], who[at : at + C]
                clear(y)
                if n == 0:
                    own[:] = -1
                elif kind == REP:
                    s = representative(keys, n, rep[r])
                    own[:] = s
                    copy_row(x[x_at + s * C : x_at + (s + 1) * C], y)
                elif kind == MEAN:
                    own[:] = -1
                    clear(wide)
                    for m in range(n):
                        add_row(x[x_at + keys[m] * C : x_at + (keys[m] + 1) * C], wide)
                    for c in range(C):
                        y[c] = wide[c] / n
                else:
                    largest_of_rows(n, C, pointer(x), x_at, 0, listed, 0, 0, pointer(bits), at, 0, pointer(y), 0, 0)

    return combiner_pool


def pool_back_kernel(salt):
    """The kernel with the salt of its cache key in its closure."""

    def combiner_pool_back(
        d_pooled, mask, who, d_x, keys, wide, table, blocks, runs, indptr, indices, dims, kind, first, last
    ):  # fmt: skip
        """Heads first <= h < last: each cotangent to the token it comes from, or to all members in equal shares."""
        salt  # noqa: B018
        R, N, C = dims[0], dims[1], dims[3]
        find_runs(blocks, dims, runs)
        for h in range(first, last):
            mask_at = table[h, 5] * N
            clear(wide)
            for r in range(R):
                at = (table[h, 0] * R + r) * C
                d = d_pooled[at : at + C]
                if kind == MEAN:
                    _, n = list_keys(blocks, runs, indptr, indices, r, dims, mask, mask_at, mask, 0, keys)
                    for m in range(n):
                        add_one(1.0 / n, d, wide[keys[m] * C : (keys[m] + 1) * C])
                else:
                    for c in range(C):
                        if who[at + c] >= 0:
                            wide[who[at + c] * C + c] += d[c]
            copy_row(wide, d_x[table[h, 0] * N * C : (table[h, 0] + 1) * N * C])

    return combiner_pool_back
