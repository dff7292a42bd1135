"""The audit's tables, and their text: Markdown, reStructuredText.

A sampled maximum is a lower bound of the true one and carries ">=". What balls found is an upper bound for the inputs
at hand and carries "<=". "-" is where the bound is not claimed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from linattn.audit.peers import Row
from linattn.audit.survey import Figure

__all__ = ["Table", "as_markdown", "as_rst", "tables"]

SAMPLED, PROVED, NOTHING = ">= ", "<= ", "-"
NARROW = ("float16", "bfloat16")
COTANGENTS = ("d_q", "d_k", "d_v")


class Table(NamedTuple):
    """A title, a sentence that says what the numbers are, headings, and rows of text."""

    title: str
    caption: str
    heads: list[str]
    rows: list[list[str]]


def worst(figures: Iterable[Figure], metric: str) -> float | None:
    """The largest, None if there is none."""
    known = [x for x in (getattr(figure, metric) for figure in figures) if x is not None]
    return max(known, key=lambda x: (x != x, x), default=None)


def said(x: float | None, mark: str = SAMPLED) -> str:
    return NOTHING if x is None else f"{mark}{x:.2g}" if x < 100 else f"{mark}{x:.3g}"


def distinct(figures: Iterable[Figure], of: Callable[[Figure], str]) -> list[str]:
    return list(dict.fromkeys(map(of, figures)))


def tables(figures: list[Figure], peers: Sequence[Row] = (), *, whole: bool = True) -> list[Table]:
    """All tables that these figures fill; or a summary, without those of single families."""
    filled = [make(figures) for make in (summary, enclosures, narrow, long)]
    if whole:
        filled += [*families(figures), unclaimed(figures)]
    else:
        filled = [table._replace(title=f"{table.title}, full audit") for table in filled]
    return [table for table in [*filled, others(peers)] if table.rows]


def summary(figures: list[Figure]) -> Table:
    """The largest T of each value, direction, dtype and backend."""
    wide = [f for f in figures if f.kind != "balls" and f.dtype not in NARROW]
    columns = [(dtype, backend) for dtype in ("float64", "float32") for backend in distinct(wide, lambda f: f.backend)]
    rows = []
    for name in distinct(wide, lambda f: f.mechanism):
        for title, passes in (("out", ("out",)), ("d_q, d_k, d_v", COTANGENTS)):
            mine = [f for f in wide if f.mechanism == name and f.passes in passes]
            cells = [said(worst((f for f in mine if (f.dtype, f.backend) == c), "ratio")) for c in columns]
            if mine:
                rows.append([name, title, *cells])
    return Table(
        "Ratio to the bound",
        "T, the error over (D + 2 e/u) u A|v| or, for cotangents, over the same number of u S: the largest over all "
        "families, sizes, lengths, causal and not. The proof gives 2; the audit fails at 1.",
        ["mechanism", "result", *(f"{dtype}, {backend}" for dtype, backend in columns)],
        rows,
    )


def enclosures(figures: list[Figure]) -> Table:
    """What balls found."""
    mine = [f for f in figures if f.oracle == "balls"]
    rows = []
    for name in distinct(mine, lambda f: f.mechanism):
        for dtype in distinct(mine, lambda f: f.dtype):
            here = [f for f in mine if (f.mechanism, f.dtype) == (name, dtype)]
            cells = [said(worst((f for f in here if f.passes == x), "werr"), PROVED) for x in ("out", *COTANGENTS)]
            rows.append([name, dtype, *cells, said(worst(here, "ratio"), PROVED)])
    return Table(
        "Proved by enclosure",
        "The distance of each result from a ball of 200 bits that contains the truth, in u A|v| for out and in u S for "
        "the cotangents: no sampled oracle, no rounding of ours, over a few tokens of seven families.",
        ["mechanism", "dtype", "out", *COTANGENTS, "T"],
        rows,
    )


def narrow(figures: list[Figure]) -> Table:
    """16-bit formats: one rounding."""
    mine = [f for f in figures if f.dtype in NARROW]
    rows = []
    for name in distinct(mine, lambda f: f.mechanism):
        for dtype in distinct(mine, lambda f: f.dtype):
            here = [f for f in mine if (f.mechanism, f.dtype) == (name, dtype)]
            out, back = ([f for f in here if (f.passes == "out") == which] for which in (True, False))
            cells = [worst(out, "ulpmax"), worst(out, "ratio"), worst(back, "ratio")]
            rows.append([name, dtype, *map(said, cells)])
    return Table(
        "16 bits",
        "Sums are in float32 and rounded once: half a unit in the last place (ulp). T is the error over that rounding "
        "and one unit of the float32 bound together.",
        ["mechanism", "dtype", "out, ulp", "T, out", "T, d_q, d_k, d_v"],
        rows,
    )


def long(figures: list[Figure]) -> Table:
    """Error against length."""
    mine = [f for f in figures if f.kind == "long"]
    rows = [
        [f.mechanism, f.backend, f.dtype, f.family, str(f.n), said(f.ratio), said(f.werr), said(f.nrel), f.oracle]
        for f in sorted(mine, key=lambda f: (f.mechanism.partition("(")[0], f.n, f.family, f.dtype))
    ]
    return Table(
        "Long sequences",
        "Causal, forward. Constant keys and values are the worst case, in which every rounding goes the same way.",
        ["mechanism", "backend", "dtype", "family", "tokens", "T", "werr, u A|v|", "relative", "oracle"],
        rows,
    )


def families(figures: list[Figure]) -> list[Table]:
    """A table for each value: its families."""
    mine = [f for f in figures if f.kind == "families" and f.dtype not in NARROW]
    made = []
    for name in distinct(mine, lambda f: f.mechanism):
        rows = []
        for family in distinct(mine, lambda f: f.family):
            cells = []
            for dtype in ("float64", "float32"):
                here = [f for f in mine if (f.mechanism, f.family, f.dtype) == (name, family, dtype)]
                out, back = ([f for f in here if (f.passes == "out") == which] for which in (True, False))
                cells += [said(worst(out, "ratio")), said(worst(out, "werr")), said(worst(out, "nrel")),
                          said(worst(back, "ratio"))]  # fmt: skip
            rows.append([family, *cells])
        metrics = ("T", "werr", "relative", "T of cotangents")
        heads = [f"{dtype}: {x}" for dtype in ("float64", "float32") for x in metrics]
        caption = "The worst of both backends, causal and not."
        made.append(Table(name, caption, ["family", *heads], rows))
    return made


def unclaimed(figures: list[Figure]) -> Table:
    """Where the bound says nothing."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for f in figures:
        if f.note:
            what = "some entries" if f.ratio is not None else "all entries"
            rows.setdefault((f.mechanism, f.family, f.dtype, what, f.note), []).append(f.passes)
    return Table(
        "Not claimed",
        "Inputs on which something leaves the range of the format, or is too large for a bound of first order.",
        ["mechanism", "family", "dtype", "of", "why", "results"],
        [[*row, ", ".join(dict.fromkeys(passes))] for row, passes in rows.items()],
    )


def others(peers: Sequence[Row]) -> Table:
    """What else there is, on the same inputs."""
    rows = []
    for row in peers:
        relative = NOTHING if row.relative is None else f"{row.relative:.2g}"
        werr = NOTHING if row.werr is None else f"{row.werr:.2g}" if row.werr < 100 else f"{row.werr:.3g}"
        rows.append([row.peer, row.version, "yes" if row.causal else "no", row.what, werr, relative, row.said])
    return Table(
        "Other libraries",
        "float32, 128 tokens, 16 channels, each judged by its own formula in float64. P1: the keys and values from "
        "token 64 on change; P2: the last value is NaN; P4: the first 64 tokens alone; P8: all values are 1.",
        ["library", "version", "causal", "inputs", "werr, u A|v|", "relative", "what happens"],
        rows,
    )


# ------------------------------------------------------------------------------------------------- as text


def as_markdown(made: list[Table], footer: str) -> str:
    parts = []
    for table in made:
        lines = [table.heads, ["---"] * len(table.heads), *table.rows]
        rows = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines)
        caption = table.caption.replace("|", "\\|")
        parts.append(f"## {table.title}\n\n{caption}\n\n{rows}\n")
    return "\n".join([*parts, f"{footer}\n"])


def as_rst(made: list[Table], footer: str) -> str:
    parts = []
    for table in made:
        title = f"``{table.title}``" if "(" in table.title else table.title
        lines = [title, "-" * len(title), "", literal(table.caption), ""]
        lines += [".. list-table::", "   :header-rows: 1", ""]
        for row in [table.heads, *table.rows]:
            lines += [f"   {'*' if i == 0 else ' '} - {literal(cell)}" for i, cell in enumerate(row)]
        parts.append("\n".join([*lines, ""]))
    return "\n".join([*parts, f"*{footer}*", ""])


def literal(cell: str) -> str:
    """Code as code, and bars as bars."""
    is_code = cell.endswith(")") and cell.partition("(")[0].isidentifier()
    return f"``{cell}``" if is_code else cell.replace("|", "\\|")
