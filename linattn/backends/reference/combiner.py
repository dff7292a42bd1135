"""The combiner engine in the array API: the definition of its verbs.

    p[t, .] = one softmax over all keys j that t meets, of every source:  scale q[t] . k[j] + bias[j]
    out[t]  = sum_j p[t, j] v[j]              a query that meets nothing: 0
    pooled[r] = maximum, mean or representative of the tokens that region r meets; 0 if it meets none

Who meets whom is a `mixing` (plans/mixing.py): blocks, which are batched products, or lists of edges (_edges.py). A
source of keys is (k, v, visible or None, bias or None). Entries beyond the end of an axis are filled in and hidden.
"""

from __future__ import annotations

import math

from linattn import _arrays
from linattn.backends.reference import _edges, _scans


def forward(q, sources, *, mixing, scale, out, xp):
    """out (..., N, E). q (..., N, D); of each source k (..., M, D), v (..., M, E), visible and bias (..., M)."""
    if mixing.blocks is None:
        return _edges.forward(q, sources, mixing=mixing, scale=scale, out=out, xp=xp)
    n, lead = mixing.n_queries, leading(q, sources)
    y = xp.zeros((*lead, n, sources[0][1].shape[-1]), dtype=q.dtype, device=_arrays.device(q))
    spoiled = xp.zeros(tuple(y.shape), dtype=xp.bool, device=_arrays.device(q))
    for block, p, _ in probabilities(q, sources, mixing, scale, xp):
        _, v, visible, _ = sources[block.source]
        finite, bad = split_bad(view(v, block.keys, xp), xp)
        y = y + place(xp.matmul(p, finite), block.queries, n, xp)
        # what is not finite spoils its column in the rows that meet it, and no other
        bad = bad & present(v, visible, block.keys, xp)
        spoiled = spoiled | spread(_scans.tally(bad, block, xp) > 0, block.queries, n, xp)
    return _arrays.fill(out, xp.where(spoiled, xp.full_like(y, math.nan), y))


def backward(d_out, q, sources, *, mixing, scale, xp):
    """d_q and (d_k, d_v) of each source, shaped like their primals; visible and bias are constants.

    out = sum p v          d_v = p^T g          d_p = g v^T
    p = softmax(s)         d_s = p o (d_p - D)  D = sum p o d_p over all sources
    s = scale q k^T + b    d_q = scale d_s k    d_k = scale d_s^T q
    """
    if mixing.blocks is None:
        return _edges.backward(d_out, q, sources, mixing=mixing, scale=scale, xp=xp)
    n, T = mixing.n_queries, xp.matrix_transpose
    finite_q, _ = split_bad(q, xp)
    finite_g, bad_g = split_bad(d_out, xp)
    parts = []
    mean = xp.zeros((*d_out.shape[:-1], 1), dtype=d_out.dtype, device=_arrays.device(d_out))
    for block, p, seen in probabilities(q, sources, mixing, scale, xp):
        d_p = xp.matmul(view(d_out, block.queries, xp), T(view(sources[block.source][1], block.keys, xp)))
        d_p = xp.where(seen, d_p, xp.zeros_like(d_p))
        mean = mean + place(_sum(p * d_p, xp), block.queries, n, xp)
        parts.append((block, p, d_p, seen))

    d_q = xp.zeros_like(q)
    d_sources = [[xp.zeros_like(k), xp.zeros_like(v)] for k, v, _, _ in sources]
    for block, p, d_p, seen in parts:
        k, v, visible, _ = sources[block.source]
        d_s = p * (d_p - view(mean, block.queries, xp))
        d_s = xp.where(seen, d_s, xp.zeros_like(d_s))
        finite_k, _ = split_bad(view(k, block.keys, xp), xp)
        d_k = scale * xp.matmul(T(d_s), view(finite_q, block.queries, xp))
        d_v = xp.matmul(T(p), view(finite_g, block.queries, xp))
        # a bad cotangent reaches the values of the keys its row meets
        reached = _scans.tally_back(view(bad_g, block.queries, xp), block, xp) > 0
        reached = reached & present(v, visible, block.keys, xp)
        if block.keys.shared:
            d_k, d_v = (xp.sum(x, axis=-3, keepdims=True, dtype=x.dtype) for x in (d_k, d_v))
        d_v = xp.where(reached, xp.full_like(d_v, math.nan), d_v)
        d_q = _plus(d_q, place(scale * xp.matmul(d_s, finite_k), block.queries, n, xp), xp)
        grads = d_sources[block.source]
        for i, d_x in enumerate((d_k, d_v)):
            grads[i] = _plus(grads[i], place(d_x, block.keys, mixing.n_keys[block.source], xp), xp)
    return d_q, [tuple(pair) for pair in d_sources]


def probabilities(q, sources, mixing, scale, xp):
    """[(block, p, seen)], each (..., G, I, J): one softmax for all blocks that a query is in."""
    if not mixing.blocks:
        return []
    n = mixing.n_queries
    scores, top = [], None
    for block in mixing.blocks:
        k, v, visible, bias = sources[block.source]
        s = scale * xp.matmul(view(q, block.queries, xp), xp.matrix_transpose(view(k, block.keys, xp)))
        if bias is not None:
            s = s + xp.matrix_transpose(view(bias[..., None], block.keys, xp))
        seen = rule_of(block, q, xp) & xp.matrix_transpose(present(v, visible, block.keys, xp))
        s = xp.where(seen, s, xp.full_like(s, -math.inf))
        scores.append((block, s, seen))
        own = place(xp.max(s, axis=-1, keepdims=True), block.queries, n, xp, -math.inf)
        top = own if top is None else xp.where(_scans.larger(own, top, xp), own, top)
    top = xp.where(top == -math.inf, xp.zeros_like(top), top)
    total, weights = xp.zeros_like(top), []
    for block, s, seen in scores:
        p = xp.exp(s - view(top, block.queries, xp))
        total = total + place(_sum(p, xp), block.queries, n, xp)
        weights.append((block, p, seen))
    total = xp.where(total == 0, xp.ones_like(total), total)
    return [(block, p / view(total, block.queries, xp, 1.0), seen) for block, p, seen in weights]


# -- pools ----------------------------------------------------------------------------------------------------------


def pool(x, visible, *, mixing, kind, xp):
    """(..., R, C) of x (..., N, C): "max", "mean", or "rep", the representative, of each region's visible members."""
    return _pool(x, visible, mixing, kind, xp)[0]


def pool_vjp(d_pooled, x, visible, *, mixing, kind, xp):
    """d_x, shaped like x."""
    return _pool(x, visible, mixing, kind, xp)[1](d_pooled)


def sizes(visible, like, *, mixing, xp):
    """(..., R): how many visible members each region has, in the dtype of `like` (..., N, C)."""
    if mixing.blocks is None:
        return _edges.sizes(visible, like, mixing=mixing, xp=xp)
    counts = [_count(like[..., :1], visible, block, xp) for block in mixing.blocks]
    counts = [xp.astype(x, like.dtype)[..., 0] for x in counts]
    if not counts:
        return xp.zeros((0,), dtype=like.dtype, device=_arrays.device(like))
    return xp.concat(counts, axis=-1)


def _count(like, visible, block, xp):
    """Visible members of the regions of one block, (..., regions, 1)."""
    met = present(like, visible, block.keys, xp)
    return in_order(_wide(_scans.tally(met, block, xp), block.queries, xp), block.queries, xp)


def _pool(x, visible, mixing, kind, xp):
    """The pooled regions and the function that takes their cotangent back."""
    if mixing.blocks is None:
        return _edges.pool(x, visible, mixing, kind, xp)
    if not mixing.blocks:
        return x[..., :0, :], lambda d_pooled: xp.zeros_like(x)
    parts, backs = [], []
    for block in mixing.blocks:
        y, back = _pool_block(x, visible, block, kind, xp)
        parts.append(y)
        backs.append(back)
    lead = _arrays.broadcast_shapes(*(tuple(y.shape[:-2]) for y in parts))

    def backward(d_pooled):
        d_x, first = xp.zeros_like(x), 0
        for y, back in zip(parts, backs, strict=True):
            last = first + y.shape[-2]
            d_x = d_x + back(d_pooled[..., first:last, :])
            first = last
        return d_x

    return xp.concat([xp.broadcast_to(y, (*lead, *y.shape[-2:])) for y in parts], axis=-2), backward


def _pool_block(x, visible, block, kind, xp):
    rule, queries = block.rule, block.queries
    members = view(x, block.keys, xp)
    there = present(x, visible, block.keys, xp)  # (..., G, J, 1)
    count = _wide(_scans.tally(there, block, xp), queries, xp)
    empty = count == 0
    if kind == "max":
        y, saved = _scans.pooled_max(xp.where(there, members, xp.full_like(members, -math.inf)), rule, xp)
        back = lambda d: _scans.pooled_max_vjp(d, saved, rule, xp)  # noqa: E731
    elif kind == "mean":
        share = 1 / xp.astype(xp.where(empty, xp.ones_like(count), count), x.dtype)
        y = _scans.pooled_sum(xp.where(there, members, xp.zeros_like(members)), rule, xp) * share
        back = lambda d: _scans.pooled_sum_vjp(d * share, rule, xp)  # noqa: E731
    else:
        lead = _arrays.broadcast_shapes(tuple(members.shape[:-1]), tuple(there.shape[:-1]))
        all_members, all_there = (xp.broadcast_to(a, (*lead, a.shape[-1])) for a in (members, there))
        y, saved = _scans.standing_in(all_members, all_there, xp)
        back = lambda d: _scans.standing_in_vjp(d, saved, xp)  # noqa: E731
    y = xp.where(empty, xp.zeros_like(y), y)

    def backward(d_pooled):
        d = out_of_order(d_pooled, queries, xp)
        d = back(xp.where(empty, xp.zeros_like(d), d))
        d = place(xp.where(there, d, xp.zeros_like(d)), block.keys, x.shape[-2], xp)
        return _arrays.unbroadcast(d, tuple(x.shape), xp)

    return in_order(y, queries, xp), backward


# -- views ----------------------------------------------------------------------------------------------------------


def view(x, of, xp, fill=0.0):
    """(..., n, C) -> (..., G, I, C); a part that does not exist is `fill`."""
    *lead, _, width = x.shape
    if of.shared:
        return x[..., None, of.start : of.start + of.size, :]
    need = of.groups * of.step if of.in_rows else of.size * of.stride
    part = x[..., of.start : min(of.start + need, x.shape[-2]), :]
    if need > part.shape[-2]:
        part = xp.concat([part, _full(part, need - part.shape[-2], fill, xp)], axis=-2)
    if of.in_rows:
        return xp.reshape(part, (*lead, of.groups, of.step, width))[..., of.first : of.first + of.size, :]
    part = xp.reshape(part, (*lead, of.size, of.stride, width))[..., of.first : of.first + of.groups, :]
    return swapped(part, xp)


def place(x, of, n, xp, fill=0.0):
    """(..., G, I, C) -> (..., n, C), each entry where `view` took it from, the others `fill`."""
    if not of.in_rows:
        x = swapped(x, xp)
    inner = of.size if of.shared else of.step if of.in_rows else of.stride
    behind = inner - of.first - x.shape[-2]
    pieces = [_full(x, of.first, fill, xp), x, _full(x, behind, fill, xp)]
    x = xp.concat([piece for piece in pieces if piece is not None], axis=-2)
    length = x.shape[-3] * x.shape[-2]
    x = xp.reshape(x, (*x.shape[:-3], length, x.shape[-1]))[..., : min(n - of.start, length), :]
    pieces = [_full(x, of.start, fill, xp), x, _full(x, n - of.start - x.shape[-2], fill, xp)]
    return xp.concat([piece for piece in pieces if piece is not None], axis=-2)


def spread(x, of, n, xp):
    """`place` of flags that may stand for whole groups."""
    return place(_wide(x, of, xp), of, n, xp, False)


def in_order(x, of, xp):
    """(..., G, I, C) -> (..., G I, C) as the entries of a view without gaps lie."""
    x = x if of.in_rows else swapped(x, xp)
    return xp.reshape(x, (*x.shape[:-3], x.shape[-3] * x.shape[-2], x.shape[-1]))


def out_of_order(x, of, xp):
    if of.in_rows:
        return xp.reshape(x, (*x.shape[:-2], of.groups, of.size, x.shape[-1]))
    return swapped(xp.reshape(x, (*x.shape[:-2], of.size, of.groups, x.shape[-1])), xp)


def swapped(x, xp):
    """Groups and places change their axes."""
    return xp.permute_dims(x, (*range(x.ndim - 3), x.ndim - 2, x.ndim - 3, x.ndim - 1))


def present(x, visible, of, xp):
    """Which entries of a view of x exist and are visible, (..., G, I, 1)."""
    n = x.shape[-2]
    there = xp.ones((n, 1), dtype=xp.bool, device=_arrays.device(x)) if visible is None else visible[..., None]
    return view(there, of, xp, False)


def rule_of(block, like, xp):
    """Who meets whom inside a block, (G or 1, I or 1, J)."""
    device = _arrays.device(like)
    j = xp.arange(block.keys.size, device=device)[None, None, :]
    if block.rule in (_scans.GROUPS_UPTO, _scans.GROUPS_NOT):
        g = xp.arange(block.queries.groups, device=device)[:, None, None]
        return j <= g if block.rule == _scans.GROUPS_UPTO else j != g
    i = xp.arange(block.queries.size, device=device)[None, :, None] + block.shift
    if block.rule == _scans.UPTO:
        return j <= i
    if block.rule == _scans.FROM:
        return j >= i
    return j != i if block.rule == _scans.NOT else j >= 0


def leading(q, sources):
    """The leading axes of the result."""
    leads = [tuple(q.shape[:-2])]
    for k, v, visible, bias in sources:
        leads += [tuple(k.shape[:-2]), tuple(v.shape[:-2])]
        leads += [tuple(x.shape[:-1]) for x in (visible, bias) if x is not None]
    return _arrays.broadcast_shapes(*leads)


def split_bad(x, xp):
    """x with zeros where it is not finite, and where that was."""
    bad = ~xp.isfinite(x)
    return xp.where(bad, xp.zeros_like(x), x), bad


def _wide(x, of, xp):
    """Flags or counts of whole groups, for each entry."""
    return xp.broadcast_to(x, (*x.shape[:-3], of.groups, of.size, x.shape[-1]))


def _full(x, n, fill, xp):
    """n more tokens behind x; None for none."""
    if n <= 0:
        return None
    return xp.full((*x.shape[:-2], n, x.shape[-1]), fill, dtype=x.dtype, device=_arrays.device(x))


def _plus(total, part, xp):
    """The part's broadcast axes are summed to those of the total."""
    return total + _arrays.unbroadcast(part, tuple(total.shape), xp)


def _sum(x, xp):
    return xp.sum(x, axis=-1, keepdims=True, dtype=x.dtype)
