"""Who meets whom, as data: blocks of queries against keys for dense loops, lists of edges for all else.

    entry(g, i) = start + first + g step + i stride        an entry of a view: place i of group g

A block lets the queries of a view meet the keys of another, group by group, where its rule holds:

    all    every i and j of a group               groups upto    j <= g, the same keys for all groups
    upto   j <= i + shift                         groups not     j != g, likewise
    from   j >= i + shift
    not    j != i + shift

Entries beyond the end of an axis do not exist; whoever runs a block leaves them out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

ALL, UPTO, FROM, NOT, GROUPS_UPTO, GROUPS_NOT = "all", "upto", "from", "not", "groups upto", "groups not"


class View(NamedTuple):
    """`groups` groups of `size` entries of an axis. `stride` is 1 (groups lie in rows) or `step` is (in columns)."""

    groups: int
    size: int
    step: int
    stride: int = 1
    first: int = 0
    start: int = 0

    @property
    def in_rows(self) -> bool:
        return self.stride == 1

    @property
    def shared(self) -> bool:
        """Whether all groups are the same entries."""
        return self.step == 0

    def entries(self) -> Ints:
        """(groups, size)"""
        g, i = np.arange(self.groups)[:, None], np.arange(self.size)
        return self.start + self.first + g * self.step + i * self.stride


def rows(groups: int, size: int, step: int | None = None, first: int = 0, start: int = 0) -> View:
    """Group g is `size` entries from g step on, `first` behind."""
    return View(groups, size, size if step is None else step, 1, first, start)


def columns(groups: int, size: int, width: int, first: int = 0, start: int = 0) -> View:
    """Group g is column first + g of a grid of that width, `size` rows from its top."""
    if width == 1:
        return View(groups, size, size, 1, first, start)
    return View(groups, size, 1, width, first, start)


def shared(groups: int, size: int, start: int = 0) -> View:
    """The same entries for every group."""
    return View(groups, size, 0, 1, 0, start)


class Block(NamedTuple):
    """Queries against the keys of one source, group by group."""

    queries: View
    keys: View
    rule: str
    shift: int = 0
    source: int = 0

    def seen(self) -> NDArray[np.bool_]:
        """The rule, (groups or 1, queries or 1, keys)."""
        g, i, j = (
            np.arange(self.queries.groups)[:, None, None],
            np.arange(self.queries.size)[:, None],
            np.arange(self.keys.size),
        )
        if self.rule == UPTO:
            return (j <= i + self.shift)[None]
        if self.rule == FROM:
            return (j >= i + self.shift)[None]
        if self.rule == NOT:
            return (j != i + self.shift)[None]
        if self.rule == GROUPS_UPTO:
            return j <= g
        if self.rule == GROUPS_NOT:
            return j != g
        return np.ones((1, 1, self.keys.size), np.bool_)

    def edges(self, n_queries: int, n_keys: int) -> tuple[Ints, Ints]:
        """The pairs (query, key) that exist."""
        t, s = self.queries.entries()[:, :, None], self.keys.entries()[:, None, :]
        met = self.seen() & (t < n_queries) & (s < n_keys)
        t, s = (np.broadcast_to(x, met.shape)[met] for x in (t, s))
        return t, s


class Edges(NamedTuple):
    """Row t of a list of lists is ``indices[indptr[t] : indptr[t + 1]]``."""

    indptr: Ints
    indices: Ints

    @property
    def lengths(self) -> Ints:
        return np.diff(self.indptr)

    @property
    def owners(self) -> Ints:
        """The row of each entry."""
        return np.repeat(np.arange(self.indptr.size - 1), self.lengths)

    def row(self, t: int) -> Ints:
        return self.indices[self.indptr[t] : self.indptr[t + 1]]

    def kept(self, keep: NDArray[np.bool_]) -> Edges:
        """The entries where `keep` is true."""
        return listed(self.owners[keep], self.indices[keep], self.indptr.size - 1)

    def transposed(self, n_columns: int) -> tuple[Edges, Ints]:
        """Row s lists the rows that list s, and where each of these entries stands here."""
        order = np.argsort(self.indices, kind="stable")
        return listed(self.indices[order], self.owners[order], n_columns), order


def listed(owners: Ints, indices: Ints, n_rows: int) -> Edges:
    """Edges (owner, index), sorted by owner; the order within a row is kept."""
    order = np.argsort(owners, kind="stable")
    indptr = np.zeros(n_rows + 1, np.int64)
    np.cumsum(np.bincount(owners, minlength=n_rows), out=indptr[1:])
    return Edges(indptr, np.ascontiguousarray(indices[order], np.int64))


class Part(NamedTuple):
    """Some rows of like length, filled up to one width: their numbers, where their entries stand in the list, which of
    these are real, and what they list."""

    rows: Ints
    entries: Ints
    real: NDArray[np.bool_]
    keys: Ints

    def some(self, which: slice) -> Part:
        return Part(self.rows[which], self.entries[which], self.real[which], self.keys[which])


class Rows:
    """The rows of a list by their length, each filled up to a power of two: at most twice the entries.

    Attributes
    ----------
    edges : Edges
    order : array of int
        Puts the rows, in the order in which the parts have them, into that of the list.
    places : array of int
        Where each edge stands among the entries of all parts, one behind the other.
    """

    def __init__(self, edges: Edges) -> None:
        self.edges = edges

    @cached_property
    def _buckets(self) -> list[Part]:
        edges, lengths = self.edges, self.edges.lengths
        if edges.indices.size == 0:
            return []
        widths = np.where(lengths > 0, 1 << np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64), 1)
        buckets = []
        for width in np.unique(widths):
            rows_of = np.flatnonzero(widths == width)
            place = np.arange(width)
            real = place < lengths[rows_of, None]
            entries = np.where(real, edges.indptr[rows_of, None] + place, 0)
            buckets.append(Part(rows_of, entries, real, edges.indices[entries]))
        return buckets

    def parts(self, most: int) -> Iterator[Part]:
        """Parts of at most `most` entries, or of one row."""
        for bucket in self._buckets:
            n_rows, n_entries = bucket.entries.shape
            at_once = max(1, most // n_entries)
            for first in range(0, n_rows, at_once):
                yield bucket.some(slice(first, first + at_once))

    @cached_property
    def order(self) -> Ints:
        return np.argsort(np.concatenate([bucket.rows for bucket in self._buckets]))

    @cached_property
    def places(self) -> Ints:
        places, first = np.zeros(max(1, self.edges.indices.size), np.int64), 0
        for bucket in self._buckets:
            at = first + np.arange(bucket.entries.size).reshape(bucket.entries.shape)
            places[bucket.entries[bucket.real]] = at[bucket.real]
            first += bucket.entries.size
        return places


class Mixing:
    """Queries over the keys of one or more sources: blocks, where there are any, and always the edges.

    Attributes
    ----------
    n_queries : int
    n_keys : tuple of int
        Of each source.
    blocks : tuple of Block, or None
    edges : Edges
        A row for each query; a source's keys are numbered after those of the source before.
    rep : array of int, or None
        A key that stands for all that a query meets.
    """

    def __init__(
        self,
        n_queries: int,
        n_keys: tuple[int, ...],
        blocks: tuple[Block, ...] | None,
        edges: Callable[[], Edges] | None = None,
        rep: Callable[[], Ints | None] | None = None,
    ) -> None:
        self.n_queries, self.n_keys, self.blocks = n_queries, n_keys, blocks
        self._edges, self._rep = edges, rep

    @cached_property
    def edges(self) -> Edges:
        if self._edges is not None:
            return self._edges()
        owners, indices = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for block in self.blocks or ():
            t, s = block.edges(self.n_queries, self.n_keys[block.source])
            owners.append(t)
            indices.append(s + sum(self.n_keys[: block.source]))
        return listed(np.concatenate(owners), np.concatenate(indices), self.n_queries)

    @cached_property
    def rep(self) -> Ints | None:
        return None if self._rep is None else self._rep()

    @cached_property
    def rows(self) -> Rows:
        """The edges, query by query."""
        return Rows(self.edges)

    @cached_property
    def turned(self) -> tuple[Rows, Ints]:
        """The edges key by key, each with its query, and where each of them stands in `edges`."""
        edges, order = self.edges.transposed(sum(self.n_keys))
        return Rows(edges), order
