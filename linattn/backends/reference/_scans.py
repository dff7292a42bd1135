"""Tallies and pools along an axis, by the rule of a block: who is among those that a query, or a region, meets.

Arrays are (..., groups, tokens, channels). A running maximum doubles its reach, log2(n) steps of whole arrays; each
step says which of two candidates it kept, and those choices are all that its VJP needs.
"""

from __future__ import annotations

import math

from linattn import _arrays

ALL, UPTO, FROM, NOT, GROUPS_UPTO, GROUPS_NOT = "all", "upto", "from", "not", "groups upto", "groups not"


# -- tallies --------------------------------------------------------------------------------------------------------


def tally(flags, block, xp):
    """How many of the keys that a query meets have their flag set: (..., G, J, C) -> (..., G or 1, I or 1, C)."""
    rule, shift = block.rule, block.shift
    if rule in (GROUPS_UPTO, GROUPS_NOT):
        n, bound = block.queries.groups, 0
        counts = _tally(flags[..., 0, :, :], UPTO if rule == GROUPS_UPTO else NOT, bound, n, xp)
        return counts[..., None, :]
    return _tally(flags, rule, shift, block.queries.size, xp)


def tally_back(flags, block, xp):
    """How many of the queries that meet a key have their flag set: (..., G, I, C) -> (..., G or 1, J or 1, C)."""
    rule, shift = block.rule, block.shift
    if rule in (GROUPS_UPTO, GROUPS_NOT):
        flags = xp.any(flags, axis=-2)  # of a group: (..., G, C)
        counts = _tally(flags, FROM if rule == GROUPS_UPTO else NOT, 0, block.keys.size, xp)
        return counts[..., None, :, :]
    counts = _tally(flags, {UPTO: FROM, FROM: UPTO}.get(rule, rule), -shift, block.keys.size, xp)
    return _sum(counts, -3, xp) if block.keys.shared else counts


def _tally(flags, rule, shift, n, xp):
    """Sums of flags (..., J, C) over the j that i meets, for i < n."""
    ints = xp.astype(flags, xp.int32)
    total = _sum(ints, -2, xp)
    if rule == ALL:
        return total
    size, i = flags.shape[-2], xp.arange(n, device=_arrays.device(flags))
    edge = xp.zeros_like(total)
    if rule == NOT:
        return total - xp.take(xp.concat([edge, ints, edge], axis=-2), _between(i + shift + 1, size + 1, xp), axis=-2)
    before = xp.concat([edge, xp.cumulative_sum(ints, axis=-2, dtype=xp.int32)], axis=-2)  # before[j]: of those < j
    if rule == UPTO:
        return xp.take(before, _between(i + shift + 1, size, xp), axis=-2)
    return total - xp.take(before, _between(i + shift, size, xp), axis=-2)


def _between(i, most, xp):
    """i, kept from 0 to `most`."""
    i = xp.where(i < 0, xp.zeros_like(i), i)
    return xp.where(i > most, xp.full_like(i, most), i)


def _sum(x, axis, xp):
    return xp.sum(x, axis=axis, keepdims=True, dtype=x.dtype)


# -- running choices ------------------------------------------------------------------------------------------------
# A chooser says where the own candidate is kept against the one from the left.


def larger(own, left, xp):
    """Ties go to the left; NaN beats numbers."""
    return (own > left) | (_is_nan(own) & ~_is_nan(left))


def larger_or_equal(own, left, xp):
    return ~larger(left, own, xp)


def _is_nan(x):
    return x != x


def run(x, choose, xp):
    """y[i] = the chosen one of x[0 .. i], and the choices that led to it."""
    choices, reach = [], 1
    while reach < x.shape[-2]:
        own, left = x[..., reach:, :], x[..., :-reach, :]
        keep = choose(own, left, xp)
        x = xp.concat([x[..., :reach, :], xp.where(keep, own, left)], axis=-2)
        choices.append(keep)
        reach *= 2
    return x, choices


def run_vjp(d, choices, xp):
    """d_x of `run`: last step first, each cotangent to the candidate that was kept."""
    for level, keep in reversed(list(enumerate(choices))):
        reach = 1 << level
        moved, zero = d[..., reach:, :], xp.zeros_like(d[..., reach:, :])
        own = xp.concat([d[..., :reach, :], xp.where(keep, moved, zero)], axis=-2)
        left = xp.concat([xp.where(keep, zero, moved), xp.zeros_like(d[..., :reach, :])], axis=-2)
        d = own + left
    return d


def _flip(x, xp):
    return xp.flip(x, axis=-2)


def _later(x, fill, xp):
    """x[i - 1], `fill` at 0."""
    return xp.concat([xp.full_like(x[..., :1, :], fill), x[..., :-1, :]], axis=-2)


def _earlier(x, fill, xp):
    return _flip(_later(_flip(x, xp), fill, xp), xp)


# -- maxima ---------------------------------------------------------------------------------------------------------


def pooled_max(x, rule, xp):
    """Of each region the maximum over its members, and what the VJP needs; -inf where there are none."""
    if rule == ALL:
        size = x.shape[-2]
        index = xp.argmax(x, axis=-2, keepdims=True)
        place = xp.reshape(xp.arange(size, device=_arrays.device(x)), (size, 1))
        return xp.max(x, axis=-2, keepdims=True), index == place
    if rule == UPTO:
        return run(x, larger, xp)
    if rule == FROM:
        y, choices = run(_flip(x, xp), larger_or_equal, xp)
        return _flip(y, xp), choices
    before, of_before = run(x, larger, xp)
    behind, of_behind = run(_flip(x, xp), larger_or_equal, xp)
    before, behind = _later(before, -math.inf, xp), _flip(_later(behind, -math.inf, xp), xp)
    take_behind = larger(behind, before, xp)
    return xp.where(take_behind, behind, before), (of_before, of_behind, take_behind)


def pooled_max_vjp(d, saved, rule, xp):
    """Each cotangent goes to the winner, of equal ones to the lowest index."""
    if rule == ALL:
        return xp.where(saved, d, xp.zeros_like(d))
    if rule == UPTO:
        return run_vjp(d, saved, xp)
    if rule == FROM:
        return _flip(run_vjp(_flip(d, xp), saved, xp), xp)
    of_before, of_behind, take_behind = saved
    zero = xp.zeros_like(d)
    d_before, d_behind = xp.where(take_behind, zero, d), xp.where(take_behind, d, zero)
    d_before = run_vjp(_earlier(d_before, 0, xp), of_before, xp)
    d_behind = run_vjp(_earlier(_flip(d_behind, xp), 0, xp), of_behind, xp)
    return d_before + _flip(d_behind, xp)


# -- sums -----------------------------------------------------------------------------------------------------------


def pooled_sum(x, rule, xp):
    """Of each region the sum over its members: nothing is subtracted."""
    if rule == ALL:
        return _sum(x, -2, xp)
    if rule == UPTO:
        return xp.cumulative_sum(x, axis=-2)
    if rule == FROM:
        return _flip(xp.cumulative_sum(_flip(x, xp), axis=-2), xp)
    before, behind = xp.cumulative_sum(x, axis=-2), xp.cumulative_sum(_flip(x, xp), axis=-2)
    return _later(before, 0, xp) + _flip(_later(behind, 0, xp), xp)


def pooled_sum_vjp(d, rule, xp):
    """The same sum with the order turned round; ALL broadcasts."""
    return d if rule == ALL else pooled_sum(d, {UPTO: FROM, FROM: UPTO}.get(rule, rule), xp)


# -- representatives ------------------------------------------------------------------------------------------------


def standing_in(x, present, xp):
    """Of each place its own entry, if hidden the last present one before it, if there is none the first behind."""
    (before, of_before), (behind, of_behind) = (
        _run_present(x, present, xp),
        _run_present(_flip(x, xp), _flip(present, xp), xp),
    )
    known = xp.cumulative_sum(xp.astype(present, xp.int32), axis=-2, dtype=xp.int32) > 0
    return xp.where(known, before, _flip(behind, xp)), (of_before, of_behind, known)


def standing_in_vjp(d, saved, xp):
    of_before, of_behind, known = saved
    zero = xp.zeros_like(d)
    d_before, d_behind = xp.where(known, d, zero), xp.where(known, zero, d)
    return run_vjp(d_before, of_before, xp) + _flip(run_vjp(_flip(d_behind, xp), of_behind, xp), xp)


def _run_present(x, present, xp):
    """The last present entry up to each place."""
    choices, reach = [], 1
    while reach < x.shape[-2]:
        keep = present[..., reach:, :]
        x = xp.concat([x[..., :reach, :], xp.where(keep, x[..., reach:, :], x[..., :-reach, :])], axis=-2)
        present = xp.concat([present[..., :reach, :], keep | present[..., :-reach, :]], axis=-2)
        choices.append(keep)
        reach *= 2
    return x, choices
