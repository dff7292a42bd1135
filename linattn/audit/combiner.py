"""Combiner by its definition (Ren et al., arXiv:2107.05768): all N x N weights, from a plan of zeros and ones.

    rho_r   = max over s in region r of q_s             kappa_r = max over s in region r of k_s
    Pi[r,s] = softmax over s in region r of scale rho_r . k_s
    P[t,.]  = one softmax over [scale q_t . k_s, s met directly ; scale q_t . kappa_r + b_r, r used by t]
    A       = P_direct + P_regions Pi

NumPy alone, and nothing of linattn: the plans are written here a second time, pair by pair. Maxima compare real
parts and take the lowest index, so an imaginary step moves through the entry that was chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["DensePlan", "combiner", "dense_plan", "plans_of"]

Array = NDArray[Any]
Mask = NDArray[np.bool_]


class DensePlan(NamedTuple):
    """Who meets whom: direct (N, N), members (R, N), users (N, R); rep (R,) where a member stands for its region."""

    direct: Mask
    members: Mask
    users: Mask
    rep: NDArray[np.int_] | None = None


def combiner(
    q: Array,
    k: Array,
    pairs: Any,
    *,
    pattern: Any = "fixed",
    span: int | None = None,
    width: int | None = None,
    pool: str = "max",
    size_bias: bool = False,
    row_key: str = "self",
    mix: str = "average",
    scale: float | None = None,
) -> Array:
    """A (..., n, N) of the queries `pairs.t`; q holds all of them, since regions pool queries."""
    if q.shape[-2] != k.shape[-2]:
        raise ValueError(f"Combiner needs as many queries as keys, got {q.shape[-2]} and {k.shape[-2]}.")
    if scale is None:
        scale = q.shape[-1] ** -0.5 if q.shape[-1] else 1.0
    plans = plans_of(pattern, q.shape[-2], span or width, pairs.causal, mix)
    weights = [weights_of(q, k, plan, pairs, pool, size_bias, row_key, scale) for plan in plans]
    return np.sum(weights, axis=0) / len(weights)


def weights_of(
    q: Array, k: Array, plan: DensePlan, pairs: Any, pool: str, size_bias: bool, row_key: str, scale: float
) -> Array:
    """A of one plan; what is not visible is never looked at, so that it spoils nothing."""
    n, t = q.shape[-2], pairs.t
    mask = np.ones(n, bool) if pairs.key_mask is None else np.asarray(pairs.key_mask)
    local, kappa, size = [], [], []
    regions = np.flatnonzero(plan.members.any(axis=-1))
    for r in regions.tolist():
        s = np.flatnonzero(plan.members[r])
        own, q_r, k_r = mask[..., s], q[..., s, :], k[..., s, :]
        if plan.rep is not None:
            rho, kappa_r = (taken(x, standing_in(plan.rep[r], own, s)) for x in (q_r, k_r))
        else:
            rho, kappa_r = (pooled(x, own, pool) for x in (q_r, k_r))
        pi = masked_softmax(scale * (k_r @ rho[..., None])[..., 0], own)
        if row_key == "wsum":
            kappa_r = (pi[..., None, :] @ k_r)[..., 0, :]
        local.append((s, pi))
        kappa.append(kappa_r)
        size.append(own.sum(axis=-1))

    scores, seen = scale * (q[..., t, :] @ np.swapaxes(k, -1, -2)), plan.direct[t] & mask[..., None, :]
    if not local:
        return masked_softmax(scores, seen)
    sizes = np.stack(size, axis=-1)
    used = plan.users[np.ix_(t, regions)] & (sizes > 0)[..., None, :]
    bias = np.log(np.where(sizes > 0, sizes, 1)) if size_bias else np.zeros(sizes.shape)
    far = scale * (q[..., t, :] @ np.swapaxes(stacked(kappa), -1, -2)) + bias[..., None, :]
    lead = np.broadcast_shapes(scores.shape[:-2], far.shape[:-2], seen.shape[:-2])
    both, allowed = (
        np.concatenate([np.broadcast_to(x, (*lead, *x.shape[-2:])) for x in pair], axis=-1)
        for pair in ((scores, far), (seen, used))
    )
    p = masked_softmax(both, allowed)
    weights = p[..., :n].copy()
    for r, (s, pi) in enumerate(local):
        weights[..., s] += np.where(used[..., r, None], p[..., n + r, None] * pi[..., None, :], 0)
    return weights


def masked_softmax(scores: Array, seen: Mask) -> Array:
    """Over the last axis, where seen; rows that see nothing are 0."""
    top = np.max(np.where(seen, scores.real, -np.inf), axis=-1, keepdims=True, initial=-np.inf)
    top = np.where(np.isneginf(top), 0, top)
    e = np.where(seen, np.exp(np.where(seen, scores - top, 0)), 0)
    total = np.sum(e, axis=-1, keepdims=True)
    return np.where(total == 0, 0, e / np.where(total == 0, 1, total))


def pooled(x: Array, own: Mask, pool: str) -> Array:
    """Max (of the lowest index) or mean per channel over the tokens `own` (..., N); 0 where there are none."""
    inside = own[..., None]
    if pool == "mean":
        total = np.sum(np.where(inside, x, 0), axis=-2)
        return total / np.maximum(own.sum(axis=-1), 1)[..., None]
    index = np.argmax(np.where(inside, x.real, -np.inf), axis=-2)[..., None, :]
    lead = np.broadcast_shapes(index.shape[:-2], x.shape[:-2])
    x, index = (np.broadcast_to(a, (*lead, *a.shape[-2:])) for a in (x, index))
    return np.where(np.any(own, axis=-1, keepdims=True), np.take_along_axis(x, index, axis=-2)[..., 0, :], 0)


def standing_in(rep: int, own: Mask, s: NDArray[np.int_]) -> Array:
    """Of the tokens s, where `own`: the place of the last that is not behind `rep`, else of the first: (...)."""
    before = own & (s <= rep)
    place = np.arange(s.size)
    return np.where(before.any(axis=-1), np.max(np.where(before, place, 0), axis=-1), np.argmax(own, axis=-1))


def taken(x: Array, index: Array) -> Array:
    """x (..., N, D) at index (...)."""
    lead = np.broadcast_shapes(x.shape[:-2], index.shape)
    x = np.broadcast_to(x, (*lead, *x.shape[-2:]))
    return np.take_along_axis(x, np.broadcast_to(index, lead)[..., None, None], axis=-2)[..., 0, :]


def stacked(parts: list[Array]) -> Array:
    """(..., R, n) from R arrays (..., n)."""
    shape = np.broadcast_shapes(*(x.shape for x in parts))
    return np.stack([np.broadcast_to(x, shape) for x in parts], axis=-2)


# ------------------------------------------------------------------------------------------------------- plans


def plans_of(pattern: Any, n: int, size: int | None, causal: bool, mix: str) -> list[DensePlan]:
    """The plans whose softmaxes a pattern averages: one, but for the mixture of two."""
    if not isinstance(pattern, str):  # a plan of the user's
        return [dense_of_lists(pattern)]
    if pattern != "mixture":
        return [dense_plan(pattern, n, size, causal)]
    names = ("joint",) if mix == "joint" else ("axial_vertical", "axial_horizontal")
    return [dense_plan(name, n, size, causal) for name in names]


def dense_of_lists(plan: Any) -> DensePlan:
    def dense(edges: Any, n_columns: int) -> Mask:
        met = np.zeros((len(edges.indptr) - 1, n_columns), bool)
        for row, (first, last) in enumerate(zip(edges.indptr[:-1], edges.indptr[1:], strict=True)):
            met[row, edges.indices[first:last]] = True
        return met

    n_regions = len(plan.members.indptr) - 1
    return DensePlan(dense(plan.direct, plan.n), dense(plan.members, plan.n), dense(plan.users, n_regions), plan.rep)


def dense_plan(pattern: str, n: int, size: int | None, causal: bool) -> DensePlan:
    """The plan of a pattern; `size` is its span or width, by default a power of two near sqrt(N)."""
    w = min(size or 1 << (((n - 1).bit_length() + 1) // 2), max(n, 1))
    t, s = np.arange(n)[:, None], np.arange(n)[None, :]
    past = (s <= t) if causal else np.ones((n, n), bool)
    if pattern == "logsparse":
        direct = (s == t) | (s == t ^ 1)
        found = list(dyadic_regions(n, causal))
    else:
        direct = t // w == s // w
        if pattern in ("axial_vertical", "axial_horizontal", "joint"):
            direct = direct | (t % w == s % w)
        found = [region for kind in KINDS[pattern] for region in grid_regions(kind, n, w, causal)]
    regions = [(members, users, rep) for members, users, rep in found if users.any()]
    rep = np.array([rep for _, _, rep in regions], int) if pattern == "axial_rowmajor" else None
    members = np.array([members for members, _, _ in regions], bool).reshape(len(regions), n)
    users = np.array([users for _, users, _ in regions], bool).reshape(len(regions), n).T
    return DensePlan(direct & past, members, users, rep)


KINDS = {
    "fixed": ("span",),
    "axial_vertical": ("column",),
    "axial_horizontal": ("row without column",),
    "axial_rowmajor": ("row",),
    "joint": ("column", "left of column", "right of column"),
}


def dyadic_regions(n: int, causal: bool) -> Iterator[tuple[Mask, Mask, int]]:
    """Aligned blocks of 2^l, l >= 1, each met by its sibling; causal: by a sibling that comes later."""
    t = np.arange(n)
    for level in range(1, max(1, (n - 1).bit_length())):
        for block in range((n - 1 >> level) + 1):
            if not causal or block % 2 == 0:
                yield t >> level == block, t >> level == block ^ 1, -1


def grid_regions(kind: str, n: int, w: int, causal: bool) -> Iterator[tuple[Mask, Mask, int]]:
    """(members, users, representative) of each region of one kind."""
    t = np.arange(n)
    row, column = t // w, t % w
    for r in range(-(-n // w)):
        after = row > r if causal else row != r
        if kind == "span":
            yield row == r, after, -1
            continue
        for c in range(w):
            if kind == "column":  # of column c the rows before r, for the other columns of row r
                above = row < r if causal else row != r
                yield (column == c) & above, (row == r) & (column != c), -1
            if kind == "row without column":
                yield (row == r) & (column != c), after & (column == c), -1
            if kind == "left of column":
                yield (row == r) & (column < c), after & (column == c), -1
            if kind == "right of column":
                yield (row == r) & (column > c), after & (column == c), -1
            if kind == "row":  # its token in column c stands for it
                yield row == r, after & (column == c), r * w + c
