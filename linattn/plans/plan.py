"""Plans: which keys a query meets by itself and which through a region, as data.

A plan holds three lists of edges: (t, s), query t meets key s directly; (r, s), token s is a member of region r;
(t, r), query t reaches the members of region r through the region's one abstraction. Coverage, masks, pair counts and
what the backends run all come from them.

The named patterns are written as blocks (patterns.py). Dense backends run them as they stand; enumerating them gives
the edges.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np

from linattn import _checks
from linattn.plans.mixing import Edges, Ints, Mixing, listed
from linattn.plans.patterns import BUILDERS, Builder

SIZES = {
    "fixed": "span",
    "logsparse": None,
    "axial_vertical": "width",
    "axial_horizontal": "width",
    "axial_rowmajor": "width",
    "mixture": "width",
}
"""The named patterns, and the parameter that sets their size."""
PATTERNS = tuple(SIZES)
PLANS_KEPT = 64
COVERED_AT_ONCE = 1 << 22  # pairs expanded at a time when coverage is counted


class Pairs(NamedTuple):
    """How many pairs a plan computes; a forward multiplies and adds their sum times (D + E)."""

    direct: int
    users: int
    local: int


class Plan:
    """Which keys each query meets directly, and which through the abstraction of a region.

    Parameters
    ----------
    n : int
        Number of tokens.
    direct : sequence of sequences of int
        ``direct[t]``: the keys that query t meets by themselves.
    members : sequence of sequences of int
        ``members[r]``: the tokens of region r.
    users : sequence of sequences of int
        ``users[t]``: the regions through which query t reaches the members.
    rep : sequence of int, optional
        ``rep[r]``: the member whose query and key stand for region r. By default they are pooled over the members.

    Raises
    ------
    ValueError, TypeError
        If an entry is not an integer in range or comes twice in a row, or a representative is no member.

    Notes
    -----
    A query's direct keys and the members of its regions must be disjoint, and together all keys, or all keys s <= t:
    then a row of weights is a distribution over what is visible. `coverage` counts it; a mechanism refuses others.

    Examples
    --------
    >>> import linattn as la
    >>> plan = la.Plan(3, direct=[[0], [0, 1], [2]], members=[[0, 1]], users=[[], [], [0]])
    >>> plan.coverage()
    array([[1, 0, 0],
           [1, 1, 0],
           [1, 1, 1]])
    >>> la.Plan.pattern("fixed", 6, size=2, causal=True).pairs()
    Pairs(direct=9, users=6, local=4)
    """

    n: int
    n_regions: int
    main: Mixing  # queries over tokens and regions; made at once: a compiler does not trace through a cached property
    local: Mixing  # regions over their members
    _key: tuple[Any, ...]

    def __init__(
        self,
        n: int,
        direct: Sequence[Sequence[int]],
        members: Sequence[Sequence[int]],
        users: Sequence[Sequence[int]],
        rep: Sequence[int] | None = None,
    ) -> None:
        _checks.natural("n", n, least=0)
        for name, rows in (("direct", direct), ("members", members), ("users", users)):
            _checked_rows(name, rows)
        lists = {
            "direct": (direct, n, n, "n"),
            "members": (members, None, n, "n"),
            "users": (users, n, len(members), "the number of regions"),
        }
        edges = {name: _checked_edges(name, *given) for name, given in lists.items()}
        self._hold(n, **edges, rep=None if rep is None else _checked_rep(rep, edges["members"]))

    def _hold(self, n: int, direct: Edges, members: Edges, users: Edges, rep: Ints | None) -> None:
        self.n, self.n_regions = int(n), members.indptr.size - 1
        self.__dict__.update(direct=direct, members=members, users=users, rep=rep)
        arrays = (*direct, *members, *users, *(() if rep is None else (rep,)))
        self._key = (self.n, rep is None, *(x.tobytes() for x in arrays))
        self.main = Mixing(self.n, (self.n, self.n_regions), None, lambda: _side_by_side(direct, users, self.n))
        self.local = Mixing(self.n_regions, (self.n,), None, lambda: members, lambda: rep)

    @staticmethod
    def pattern(name: str, n: int, *, size: int | None = None, causal: bool = False) -> Plan:
        """The plan of a named pattern over n tokens.

        Parameters
        ----------
        name : str
            "fixed", "logsparse", "axial_vertical", "axial_horizontal", "axial_rowmajor" or "joint".
        size : int, optional
            Span of "fixed", width of the grids; by default a power of two near sqrt(n). "logsparse" has none.
        causal : bool
            Keys s <= t only; "joint" has no other form.
        """
        _checks.choice("name", name, BUILDERS)
        _checks.natural("n", n, least=0)
        _checks.flag("causal", causal)
        if name == "logsparse" and size is not None:
            raise ValueError(f"`size` must be None for 'logsparse', which has no spans, got {size!r}.")
        if name == "joint" and not causal:
            raise ValueError("`causal` must be True for 'joint', which has no other form, got False.")
        if size is not None:
            _checks.natural("size", size)
        elif name != "logsparse":
            size = default_size(int(n))
        if size is not None:
            size = max(1, min(int(size), int(n)))  # a longer row is the only one, however long
        return _pattern(name, int(n), size, bool(causal))

    # -- the lists ------------------------------------------------------------------------------------------------

    @cached_property
    def direct(self) -> Edges:
        raise NotImplementedError

    @cached_property
    def members(self) -> Edges:
        raise NotImplementedError

    @cached_property
    def users(self) -> Edges:
        raise NotImplementedError

    @cached_property
    def rep(self) -> Ints | None:
        raise NotImplementedError

    @property
    def has_rep(self) -> bool:
        return self.rep is not None

    @cached_property
    def has_empty(self) -> bool:
        """Whether a region may have no member."""
        return bool(np.any(self.members.lengths == 0))

    # -- what follows from them -----------------------------------------------------------------------------------

    def pairs(self) -> Pairs:
        """The pairs that one forward computes."""
        return Pairs(self.direct.indices.size, self.users.indices.size, self.members.indices.size)

    def coverage(self) -> Ints:
        """How often query t reaches key s, directly and through regions: (n, n)."""
        count = np.zeros((self.n, self.n), np.int64)
        for t, s in self._reached():
            np.add.at(count, (t, s), 1)
        return count

    @cached_property
    def span(self) -> str | None:
        """What each query reaches exactly once: "past" (the keys s <= t), "all", or None if it is neither."""
        return None if self.fault("past") and self.fault("all") else "all" if self.fault("past") else "past"

    def fault(self, span: str) -> tuple[int, int, int] | None:
        """The first query and key whose count is not that of "past" or "all", and the count; None if all are."""
        first = 0
        for t, s in self._reached():
            last = first + self._at_once
            count = np.zeros((min(last, self.n) - first, self.n), np.int64)
            np.add.at(count, (t - first, s), 1)
            want = np.ones_like(count) if span == "all" else np.tri(*count.shape, first, dtype=np.int64)
            wrong = np.argwhere(count != want)
            if wrong.size:
                t0, s0 = (int(x) for x in wrong[0])
                return first + t0, s0, int(count[t0, s0])
            first = last
        return None

    @property
    def _at_once(self) -> int:
        return max(1, COVERED_AT_ONCE // max(self.n, 1))

    def _reached(self) -> Iterator[tuple[Ints, Ints]]:
        """Pairs (t, s), as often as t reaches s, for `_at_once` queries at a time."""
        lengths = self.members.lengths
        for first in range(0, self.n, self._at_once):
            last = min(first + self._at_once, self.n)
            (a, b), (c, d) = (e.indptr[[first, last]] for e in (self.direct, self.users))
            t_direct = np.repeat(np.arange(first, last), self.direct.lengths[first:last])
            regions = self.users.indices[c:d]
            of_users = np.repeat(np.arange(first, last), self.users.lengths[first:last])
            of_pairs = lengths[regions]
            # the members of each used region, one behind the other
            ends = np.cumsum(of_pairs)
            offset = np.arange(ends[-1] if ends.size else 0) - np.repeat(ends - of_pairs, of_pairs)
            s_regions = self.members.indices[np.repeat(self.members.indptr[regions], of_pairs) + offset]
            yield (
                np.concatenate([t_direct, np.repeat(of_users, of_pairs)]),
                np.concatenate([self.direct.indices[a:b], s_regions]),
            )

    def restrict(self, key_mask: Any) -> Plan:
        """The plan when some keys are hidden: they leave every list, and regions without members lose their users.

        Parameters
        ----------
        key_mask : array of bool
            (n,), True = visible. A representative that is hidden hands over to the last visible member before it, or
            else to the first visible one.
        """
        mask = np.asarray(key_mask)
        if mask.dtype != np.bool_:
            raise TypeError(f"`key_mask` must be an array of bool (True = visible), got dtype {mask.dtype}.")
        if mask.shape != (self.n,):
            raise ValueError(f"`key_mask` must have shape (n = {self.n},), got {mask.shape}.")
        members = self.members.kept(mask[self.members.indices])
        users = self.users.kept((members.lengths > 0)[self.users.indices])
        plan = object.__new__(Plan)
        rep = None if self.rep is None else _standing_in(self.rep, members)
        plan._hold(self.n, self.direct.kept(mask[self.direct.indices]), members, users, rep)
        return plan

    # -- a value ----------------------------------------------------------------------------------------------------

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and type(self) is type(other) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __reduce__(self) -> tuple[Any, ...]:
        lists = ([edges.row(t).tolist() for t in range(edges.indptr.size - 1)] for edges in self._lists())
        return Plan, (self.n, *lists, None if self.rep is None else self.rep.tolist())

    def _lists(self) -> tuple[Edges, Edges, Edges]:
        return self.direct, self.members, self.users

    def __repr__(self) -> str:
        n, *lists, rep = self.__reduce__()[1]
        given = (f"{name}={x!r}" for name, x in zip(("direct", "members", "users"), lists, strict=True))
        return f"Plan({n}, {', '.join(given)}{'' if rep is None else f', rep={rep!r}'})"


class PatternPlan(Plan):
    """A plan made of blocks; its lists are enumerated when they are asked for."""

    def __init__(self, name: str, n: int, size: int | None, causal: bool) -> None:
        self.n, self._key = n, (name, n, size, causal)
        build = Builder(n)
        if n > 0:
            BUILDERS[name](build, n, size, causal)
        self.n_regions = build.n_regions
        self._direct, self._users, self._members = (tuple(x) for x in (build.direct, build.users, build.members))
        self._represented = build.represented
        self.main = Mixing(n, (n, self.n_regions), self._direct + self._users)
        self.local = Mixing(self.n_regions, (n,), self._members, None, lambda: self.rep)

    @property
    def has_rep(self) -> bool:
        return self._represented

    @property
    def has_empty(self) -> bool:
        _, n, size, causal = self._key
        return not causal and size is not None and n % size != 0

    @cached_property
    def direct(self) -> Edges:
        return Mixing(self.n, (self.n,), self._direct).edges

    @cached_property
    def members(self) -> Edges:
        return self.local.edges

    @cached_property
    def users(self) -> Edges:
        edges = Mixing(self.n, (0, self.n_regions), self._users).edges
        return edges.kept((self.members.lengths > 0)[edges.indices])

    @cached_property
    def rep(self) -> Ints | None:
        return _standing_in(np.arange(self.n_regions), self.members) if self._represented else None

    @property
    def span(self) -> str:  # by construction, tested
        return "past" if self._key[-1] else "all"

    def __reduce__(self) -> tuple[Any, ...]:
        return _pattern, self._key

    def __repr__(self) -> str:
        name, n, size, causal = self._key
        options = ("" if size is None else f", size={size}") + (", causal=True" if causal else "")
        return f"Plan.pattern({name!r}, {n}{options})"


@lru_cache(PLANS_KEPT)
def _pattern(name: str, n: int, size: int | None, causal: bool) -> PatternPlan:
    return PatternPlan(name, n, size, causal)


def default_size(n_tokens: int) -> int:
    """A power of two near sqrt(N)."""
    return 1 << (((n_tokens - 1).bit_length() + 1) // 2)


# -- parts ----------------------------------------------------------------------------------------------------------


def _side_by_side(left: Edges, right: Edges, offset: int) -> Edges:
    """Row t: that of `left`, then that of `right`, whose numbers start at `offset`."""
    owners = np.concatenate([left.owners, right.owners])
    return listed(owners, np.concatenate([left.indices, right.indices + offset]), left.indptr.size - 1)


def _standing_in(rep: Ints, members: Edges) -> Ints:
    """Each region's last member that is not behind its representative, else its first; what is empty keeps its own."""
    stand = rep.copy()
    owners, indices = members.owners, members.indices
    np.copyto(stand, np.iinfo(np.int64).max, where=members.lengths > 0)
    np.minimum.at(stand, owners, indices)
    before = indices <= rep[owners]
    np.maximum.at(stand, owners[before], indices[before])
    return stand


def _checked_rows(name: str, rows: Any) -> None:
    if not isinstance(rows, (Sequence, np.ndarray)) or isinstance(rows, str):
        raise TypeError(f"`{name}` must be a sequence of sequences of integers, got {type(rows).__name__}.")
    for i, row in enumerate(rows):
        if not isinstance(row, (Sequence, np.ndarray)) or isinstance(row, str):
            raise TypeError(f"`{name}` must hold rows of integers, got {row!r} in row {i}.")


def _checked_edges(name: str, lists: Any, n_rows: int | None, n_columns: int, limit: str) -> Edges:
    given = [np.sort(np.asarray(row)) for row in lists]
    if n_rows is not None and len(given) != n_rows:
        raise ValueError(f"`{name}` must have n = {n_rows} rows, got {len(given)}.")
    for i, row in enumerate(given):
        if row.ndim != 1 or (row.size and row.dtype.kind not in "iu"):
            raise TypeError(f"`{name}` must hold rows of integers, got {lists[i]!r} in row {i}.")
        if row.size and not (row.min() >= 0 and row.max() < n_columns):
            raise ValueError(f"`{name}` must hold integers from 0 to below {limit} = {n_columns}, got {lists[i]!r}.")
        if np.unique(row).size != row.size:
            raise ValueError(f"`{name}` must not hold a number twice in a row, got {lists[i]!r} in row {i}.")
    indptr = np.zeros(len(given) + 1, np.int64)
    np.cumsum([row.size for row in given], out=indptr[1:])
    return Edges(indptr, np.concatenate([np.zeros(0, np.int64), *given]).astype(np.int64))


def _checked_rep(rep: Any, members: Edges) -> Ints:
    rep = np.asarray(rep)
    n_regions = members.indptr.size - 1
    if rep.size and rep.dtype.kind not in "iu":
        raise TypeError(f"`rep` must hold integers, got dtype {rep.dtype}.")
    if rep.shape != (n_regions,):
        raise ValueError(f"`rep` must hold one member a region, {n_regions} in all, got shape {rep.shape}.")
    for r in range(n_regions):
        if rep[r] not in members.row(r):
            raise ValueError(f"`rep` must name a member of each region, got {rep[r]} for region {r}.")
    return rep.astype(np.int64)
