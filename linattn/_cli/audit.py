"""`python -m linattn audit`: every mechanism against its error bound, over inputs chosen to break it."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from linattn import _checks, backends
from linattn._cli import Refused
from linattn._cli.info import THREAD_VARIABLES, numpy_build, processor, versions
from linattn.audit import peers, subjects, survey, tables, verdict, workers
from linattn.audit.survey import Figure

if TYPE_CHECKING:
    from rich.console import Console

Step = Callable[[str], None]
WIDTH = 110
MOST_PROCESSES = 4


@dataclass
class Report:
    """What one audit found."""

    figures: list[Figure]
    header: dict[str, Any]
    faults: list[str]
    notes: list[str]
    peers: list[peers.Row] = field(default_factory=list)

    @property
    def footer(self) -> str:
        """One line: on what all this was measured."""
        known = self.header["versions"]
        names = [name for name in ("linattn", "numpy", "numba") if name in known]
        shown = ", ".join(f"{name} {known[name]}" for name in names)
        return (
            f"{shown}, Python {known['python']}; {self.header['processor']}, {self.header['BLAS']}, "
            f"{self.header['mode']} audit of {sum(f.cases for f in self.figures)} results"
        )

    def tables(self) -> list[tables.Table]:
        """Of a full audit a summary: its tables of families are those of a quick one with more seeds."""
        return tables.tables(self.figures, self.peers, whole=self.header["mode"] == "quick")

    def as_data(self) -> dict[str, Any]:
        rows = [list(row) for row in self.peers]
        return {**verdict.as_data(self.figures, self.header), "faults": self.faults, "peers": rows}


# ------------------------------------------------------------------------------------------------- choosing


def mechanisms(asked: list[str] | None) -> list[str]:
    """The names asked for, in any case of letters; by default all."""
    try:
        return survey.audited(asked)
    except KeyError as error:
        known = ", ".join(subjects.SUBJECTS)
        raise Refused(f"`--mechanism` must be one of {known}, got {error.args[0]!r}.") from None


def check_backend(backend: str | None, names: list[str]) -> list[str]:
    """Refuses a backend that cannot be audited here; notes what it leaves out."""
    if backend is None:
        return []
    try:
        _checks.backend_name(backend)
    except ValueError as error:
        raise Refused(str(error).replace("`backend`", "`--backend`")) from None
    if backend not in survey.BACKENDS:
        raise Refused(f"`--backend` must be one of {', '.join(survey.BACKENDS)} for an audit, got {backend!r}.")
    notes = []
    values = [subjects.of_channels(attend, 2) for name in names for attend in subjects.SUBJECTS[name](1)]
    for file in dict.fromkeys(file for attend in values for file in subjects.ENGINES[subjects.engine_of(attend)]):
        reason = backends.load(backend, file)
        if isinstance(reason, str):
            if not reason.startswith("no "):
                raise Refused(f"`--backend {backend}` cannot be loaded: {reason}.")
            notes.append(f"{backend} has {reason}: left out.")
    return notes


def committed(path: str | None) -> list[Figure]:
    """The figures of an earlier audit."""
    if path is None:
        return []
    try:
        return verdict.figures_from(json.loads(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        reason = error.strerror or error
        raise Refused(f"`--against` must name a file that can be read, got {path!r} ({reason}).") from None
    except ValueError as error:  # not JSON, or not ours
        raise Refused(f"`--against` must name the JSON of an audit, got {path!r} ({error}).") from None


# ------------------------------------------------------------------------------------------------- running


def count_steps(names: list[str], full: bool, others: bool) -> int:
    """How many steps `audit` will count."""
    return sum(1 for _ in survey.cases(names, full)) + (len(peers.PEERS) if others else 0)


def processes() -> int:
    """How many by default: memory and what they have in common make more of them no faster."""
    return min(workers.cores(), MOST_PROCESSES)


def audit(
    names: list[str], backend: str | None, full: bool, before: list[Figure], notes: list[str], others: bool,
    processes: int, step: Step,
) -> Report:  # fmt: skip
    """Measure, and judge; of other libraries nothing is judged."""
    start = time.perf_counter()
    figures = survey.survey(names, backend=backend, full=full, processes=processes, step=step)
    theirs = peers.ask_all(step) if others else []
    missing = survey.missing_oracles()
    notes = notes + [f"{name}: {why}; what this oracle judges is left out." for name, why in missing.items()]
    header = {
        "mode": "full" if full else "quick",
        "seconds": round(time.perf_counter() - start, 1),
        "processes": processes,
        "versions": versions(),
        "processor": processor(),
        "BLAS": numpy_build()["BLAS"],
        "vector units": numpy_build()["vector units"],
        "threads": {name: os.environ.get(name, "not set") for name in THREAD_VARIABLES},
        "subnormals": "flushed" if flushed() else "kept",
        "commit": commit(),
        "missing oracles": missing,
    }
    found = verdict.faults(figures) + verdict.grown(figures, before)
    return Report(verdict.published(figures), header, found, notes, theirs)


def flushed() -> bool:
    """Whether this process computes with subnormal numbers as if they were 0."""
    return bool(np.float32(2.0**-130) * np.float32(0.5) == 0)


def commit() -> str:
    """The revision of the source, where there is one to be asked."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return "not known"
    try:
        command = ["git", "rev-parse", "--short=12", "HEAD"]
        said = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "not known"
    return said.stdout.strip()


# ------------------------------------------------------------------------------------------------- showing


def as_json(report: Report) -> str:
    """One line a figure, so that a change of one shows as one."""
    data = report.as_data()
    rows = ",\n".join(json.dumps(row, allow_nan=False) for row in data.pop("rows"))
    head = json.dumps(data, indent=1, allow_nan=False).removesuffix("\n}")
    return f'{head},\n "rows": [\n{rows}\n]}}\n'


def text(report: Report, path: Path) -> str:
    """The tables as text: reStructuredText for .rst, else Markdown."""
    render = tables.as_rst if path.suffix == ".rst" else tables.as_markdown
    return render(report.tables(), report.footer)


def show(report: Report, console: Console) -> None:
    """Print the summary, and what is wrong."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    shown = ("Ratio to the bound", "Proved by enclosure", "Other libraries")
    for table in report.tables():
        if table.title.partition(",")[0] not in shown:
            continue
        drawn = Table(title=table.title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
        for head in table.heads:
            drawn.add_column(head, no_wrap=head in ("mechanism", "result"))
        for row in table.rows:
            drawn.add_row(*map(Text, row))
        console.print(drawn)
        console.print(Text(table.caption, style="dim"))
        console.print()
    for line in [*report.notes, report.footer]:
        console.print(Text(line, style="dim"))
    for fault in report.faults:
        console.print(Text(fault, style="bold red"))
    verdict_line = f"{len(report.faults)} limits broken." if report.faults else "Every figure is within its limits."
    console.print(Text(verdict_line, style="bold"))
