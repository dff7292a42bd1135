"""The patterns of Combiner as blocks: groups of queries against groups of keys, with a rule inside.

A grid is row-major, (row, column) = divmod(t, width); a ragged last row is a full one whose missing tokens do not
exist. In the code w is the width or span and n_rows the rows of the grid. Causal regions lie in the rows before the
last, which are whole; the numbers of a family's regions start at `at`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from linattn.plans.mixing import ALL, FROM, GROUPS_NOT, GROUPS_UPTO, NOT, UPTO, Block, columns, rows, shared

REGIONS = 1  # the source of keys that are regions; 0: tokens


class Builder:
    """The blocks of a plan in the making."""

    def __init__(self, n: int) -> None:
        self.n, self.n_regions, self.represented = n, 0, False
        self.direct: list[Block] = []
        self.users: list[Block] = []
        self.members: list[Block] = []

    def meet(self, queries: Any, keys: Any, rule: str) -> None:
        """Queries meet keys directly."""
        self.direct.append(Block(queries, keys, rule))

    def family(self, n_regions: int, members: Callable[[int], Block], users: Callable[[int], Block]) -> None:
        """Regions of one kind: `members(at)` has regions as queries, `users(at)` as keys."""
        self.members.append(members(self.n_regions))
        self.users.append(users(self.n_regions)._replace(source=REGIONS))
        self.n_regions += n_regions


def fixed(build: Builder, n: int, w: int, causal: bool) -> None:
    """Own span; every other span is a region."""
    spans = -(-n // w)
    build.meet(rows(spans, w), rows(spans, w), UPTO if causal else ALL)
    if spans == 1:
        return
    if causal:
        m = spans - 1
        build.family(
            m,
            lambda at: Block(rows(m, 1, start=at), rows(m, w), ALL),
            lambda at: Block(rows(m, w, start=w), shared(m, m, start=at), GROUPS_UPTO),
        )
    else:
        build.family(
            spans,
            lambda at: Block(rows(spans, 1, start=at), rows(spans, w), ALL),
            lambda at: Block(rows(spans, w), shared(spans, spans, start=at), GROUPS_NOT),
        )


def logsparse(build: Builder, n: int, size: None, causal: bool) -> None:
    """Itself and its sibling t ^ 1; at level l >= 1 the sibling of the block of 2^l tokens around t."""
    build.meet(rows(n, 1), rows(n, 1), ALL)
    halves = (0,) if causal else (0, 1)  # of a pair, the one that is met: past ones only if causal
    pairs = n // 2
    for half in halves if pairs else ():
        build.meet(rows(pairs, 1, step=2, first=1 - half), rows(pairs, 1, step=2, first=half), ALL)
    for level in range(1, (n - 1).bit_length()):
        length = 1 << level
        pairs = -(-(n - length) // (2 * length))
        for half in halves:
            halves_of_pairs(build, pairs, length, half)


def halves_of_pairs(build: Builder, pairs: int, length: int, half: int) -> None:
    """One half of each pair of blocks is a region, met by the other half."""
    build.family(
        pairs,
        lambda at: Block(rows(pairs, 1, start=at), rows(pairs, length, step=2 * length, first=half * length), ALL),
        lambda at: Block(
            rows(pairs, length, step=2 * length, first=(1 - half) * length), rows(pairs, 1, start=at), ALL
        ),
    )


def own_row(build: Builder, n: int, w: int, causal: bool) -> int:
    """Own row; gives the number of rows."""
    n_rows = -(-n // w)
    build.meet(rows(n_rows, w), rows(n_rows, w), UPTO if causal else ALL)
    return n_rows


def own_column(build: Builder, n_rows: int, w: int, causal: bool) -> None:
    """Own column without oneself."""
    if n_rows > 1 and causal:
        build.meet(columns(w, n_rows - 1, w, start=w), columns(w, n_rows - 1, w), UPTO)
    elif n_rows > 1:
        build.meet(columns(w, n_rows, w), columns(w, n_rows, w), NOT)


def vertical_regions(build: Builder, n_rows: int, w: int, causal: bool) -> None:
    """For each row, per column: its rows before (bidirectional: its other rows); used by the row's other columns."""
    m = n_rows - 1
    if n_rows == 1 or w == 1:
        return
    if causal:
        build.family(
            m * w,
            lambda at: Block(columns(w, m, w, start=at), columns(w, m, w), UPTO),
            lambda at: Block(rows(m, w, start=w), rows(m, w, start=at), NOT),
        )
    else:
        build.family(
            n_rows * w,
            lambda at: Block(columns(w, n_rows, w, start=at), columns(w, n_rows, w), NOT),
            lambda at: Block(rows(n_rows, w), rows(n_rows, w, start=at), NOT),
        )


def row_regions(build: Builder, n_rows: int, w: int, causal: bool, rule: str) -> None:
    """For each row, per column c: the row by that rule; used by column c of later (bidirectional: other) rows."""
    m = n_rows - 1 if causal else n_rows
    if n_rows == 1:
        return
    users = w if causal else 0
    build.family(
        m * w,
        lambda at: Block(rows(m, w, start=at), rows(m, w), rule),
        lambda at: Block(columns(w, m, w, start=users), columns(w, m, w, start=at), UPTO if causal else NOT),
    )


def axial_vertical(build: Builder, n: int, w: int, causal: bool) -> None:
    n_rows = own_row(build, n, w, causal)
    own_column(build, n_rows, w, causal)
    vertical_regions(build, n_rows, w, causal)


def axial_horizontal(build: Builder, n: int, w: int, causal: bool) -> None:
    n_rows = own_row(build, n, w, causal)
    own_column(build, n_rows, w, causal)
    if w > 1:
        row_regions(build, n_rows, w, causal, NOT)


def axial_rowmajor(build: Builder, n: int, w: int, causal: bool) -> None:
    n_rows = own_row(build, n, w, causal)
    row_regions(build, n_rows, w, causal, ALL)
    build.represented = True


def joint(build: Builder, n: int, w: int, causal: bool) -> None:
    """Own row, own column, vertical regions, and of each earlier row the parts left and right of the own column."""
    n_rows = own_row(build, n, w, causal)
    own_column(build, n_rows, w, causal)
    vertical_regions(build, n_rows, w, causal)
    m, c = n_rows - 1, w - 1
    if n_rows == 1 or w == 1:
        return
    build.family(
        m * c,  # region (row, c) is left of column c + 1
        lambda at: Block(rows(m, c, start=at), rows(m, c, step=w), UPTO),
        lambda at: Block(columns(c, m, w, first=1, start=w), columns(c, m, c, start=at), UPTO),
    )
    build.family(
        m * c,  # region (row, c) is right of column c
        lambda at: Block(rows(m, c, start=at), rows(m, c, step=w, first=1), FROM),
        lambda at: Block(columns(c, m, w, start=w), columns(c, m, c, start=at), UPTO),
    )


BUILDERS: dict[str, Callable[[Builder, int, Any, bool], None]] = {
    "fixed": fixed,
    "logsparse": logsparse,
    "axial_vertical": axial_vertical,
    "axial_horizontal": axial_horizontal,
    "axial_rowmajor": axial_rowmajor,
    "joint": joint,
}
