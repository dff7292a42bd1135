"""What figures must keep to, what they may have grown to, and the audit as data.

T > 1                                                 the bound is not held (the proof gives 2)
float64 beyond 1e-13, float32 beyond 5e-7, normwise   of out, on well-scaled families
d_q, d_k in float32 beyond 1e-6, normwise             for v + 1e4
200 u S                                               cotangents under balls
1.5 times a committed figure, and 2 u more            of werr, whose luck is below that; a figure that is gone
"""

from __future__ import annotations

from typing import Any

from linattn.audit.families import WELL_SCALED
from linattn.audit.survey import COLUMNS, Figure, key

__all__ = ["NORMWISE", "as_data", "faults", "figures_from", "grown", "published"]

MOST_RATIO = 1.0
NORMWISE = {"float64": 1e-13, "float32": 5e-7}
OFFSET_FAMILY, OFFSET_NORMWISE = "v + 1e4", 1e-6
ENCLOSED_UNITS = 200.0
GROWTH, LUCK = 1.5, 2.0
DIGITS = 3

VERSION = 1


def named(figure: Figure) -> str:
    causal = "causal" if figure.causal else "not causal"
    return (
        f"{figure.mechanism}, {figure.passes}, {figure.backend}, {figure.dtype}, {figure.kind}: {figure.family}, "
        f"{causal}, N = {figure.n}, seed {figure.seed}"
    )


def faults(figures: list[Figure]) -> list[str]:
    """One sentence for each limit that a figure breaks. NaN keeps to none."""
    found = []
    for figure in figures:
        what = named(figure)
        if figure.ratio is None:
            continue
        if not figure.ratio <= MOST_RATIO:
            found.append(f"{what}: T = {figure.ratio:.3g}, at most {MOST_RATIO:g}.")
        sampled = figure.kind == "families"  # of some tokens a few may cancel
        if sampled and figure.passes == "out" and figure.dtype in NORMWISE and figure.family in WELL_SCALED:
            limit = NORMWISE[figure.dtype]
            if not figure.nrel <= limit:
                found.append(f"{what}: relative error {figure.nrel:.3g}, at most {limit:g}.")
        centred = figure.passes in ("d_q", "d_k") and figure.dtype == "float32" and figure.family == OFFSET_FAMILY
        if sampled and centred and not figure.nrel <= OFFSET_NORMWISE:
            found.append(f"{what}: relative error {figure.nrel:.3g}, at most {OFFSET_NORMWISE:g}.")
        if figure.oracle == "balls" and figure.passes != "out" and not figure.werr <= ENCLOSED_UNITS:
            found.append(f"{what}: {figure.werr:.3g} u S from its enclosure, at most {ENCLOSED_UNITS:g}.")
    return found


def grown(figures: list[Figure], committed: list[Figure]) -> list[str]:
    """One sentence for each committed figure that has grown or is no longer measured.

    Only what this run could measure is asked for: the mechanisms and backends that it has figures of.
    """
    now = {key(figure): figure for figure in figures}
    audited = {(figure.mechanism, figure.backend) for figure in figures}
    found = []
    for before in committed:
        if (before.mechanism, before.backend) not in audited:
            continue
        if key(before) not in now:
            found.append(f"{named(before)}: no longer measured.")
            continue
        figure = now[key(before)]
        limit = None if before.ratio is None else GROWTH * before.werr + LUCK  # where nothing is claimed, nothing grows
        if limit is not None and not figure.werr <= limit:
            found.append(f"{named(figure)}: {figure.werr:.3g} u, was {before.werr:.3g}.")
        if figure.ratio is None and before.ratio is not None:
            found.append(f"{named(figure)}: no longer claimed ({figure.note}).")
    return found


# ------------------------------------------------------------------------------------------------- as data


def as_data(figures: list[Figure], header: dict[str, Any]) -> dict[str, Any]:
    """For JSON: numbers to three digits, what is not finite as null."""
    return {"version": VERSION, **header, "columns": list(COLUMNS), "rows": [list(f) for f in published(figures)]}


def published(figures: list[Figure]) -> list[Figure]:
    """The figures as they are written down, in JSON and in tables alike."""
    return [Figure(*(plain(x, figure.oracle == "balls") for x in figure)) for figure in figures]


def plain(x: Any, up: bool) -> Any:
    """Numbers to a few digits; what balls bound from above is rounded up."""
    if not isinstance(x, float):
        return x
    if x != x or abs(x) == float("inf"):
        return None
    short = float(f"{x:.{DIGITS}g}")
    return short if short >= x or not up else float(f"{x * (1 + 10.0 ** (1 - DIGITS)):.{DIGITS}g}")


def figures_from(data: Any) -> list[Figure]:
    """The figures of an audit's JSON. Raises ValueError for anything else."""
    try:
        if data["version"] != VERSION or data["columns"] != list(COLUMNS):
            raise ValueError(f"it has version {data['version']!r} and columns {data['columns']}")
        rows = [Figure(*row) for row in data["rows"]]
        if not all(isinstance(row.werr, int | float) for row in rows if row.ratio is not None):
            raise ValueError("a figure is not a number")
    except (KeyError, TypeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    return rows
