"""The command line: `python -m linattn compare`, `audit` and `info`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from linattn._cli import Refused

PLOT_FORMATS = (".png", ".pdf", ".svg")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise Refused(f"{message[:1].upper()}{message[1:].rstrip('.')}.")


def build_parser() -> Parser:
    parser = Parser(prog="python -m linattn", description="Efficient attentions on arrays.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)

    compare = commands.add_parser(
        "compare",
        help="run every mechanism on the same queries, keys and values, beside exact softmax",
        description="Run every mechanism, forward and backward, on the same queries, keys and values, and show what "
        "each costs, how far it is from exact softmax and how accurate it is.",
    )
    compare.add_argument(
        "file",
        nargs="?",
        metavar="FILE.npz",
        help="with q, k, v (..., tokens, channels), or q0 k0 v0, q1 ... for several layers; "
        "by default the real ones of a small transformer that ship with the package",
    )
    compare.add_argument("--causal", action="store_true", help="each query sees the keys up to its own position")
    compare.add_argument(
        "--mechanism", nargs="+", action="extend", metavar="NAME", help="only these, beside exact softmax"
    )
    compare.add_argument("--backend", metavar="B", help="who runs the loop: reference, numba or cupy")
    compare.add_argument("--layer", type=_layer, metavar="L", help="which layer of the file; by default the first")
    compare.add_argument(
        "--plot", metavar="OUT.png", help="draw the weights side by side, and time against length (png, pdf or svg)"
    )
    compare.add_argument("--json", metavar="OUT", help="write all numbers, and the versions, to this file")

    audit = commands.add_parser(
        "audit",
        help="measure every mechanism against its proved error bound, over inputs chosen to break it",
        description="Measure every mechanism, forward and backward, against its proved error bound and against "
        "rigorous enclosures. Exit status: 0 within the bounds, 1 outside, 2 if it cannot run.",
    )
    audit.add_argument("--mechanism", nargs="+", action="extend", metavar="NAME", help="only these")
    audit.add_argument("--backend", metavar="B", help="only this one: reference or numba")
    how_much = audit.add_mutually_exclusive_group()
    how_much.add_argument("--quick", action="store_true", help="a minute or two, the default")
    how_much.add_argument(
        "--full", action="store_true", help="more seeds, all of 16 bits, a million tokens: ten minutes"
    )
    audit.add_argument("--json", metavar="F", help="write all figures, and what they were measured on, to this file")
    audit.add_argument("--md", metavar="F", help="write the tables: Markdown, or reStructuredText if it ends in .rst")
    audit.add_argument("--against", metavar="FILE", help="fail if a figure of this earlier --json has grown")
    audit.add_argument("--jobs", type=_jobs, metavar="N", help="processes at a time; by default one a core, up to 4")
    audit.add_argument("--peers", action="store_true", help="measure other libraries that are installed, too")

    commands.add_parser("info", help="versions, backends and why one is missing, processor, threads, kernel cache")
    return parser


def _layer(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be a layer's number, got {text!r}")
    return int(text)


def _jobs(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number of processes, got {text!r}")
    return int(text)


def writable(option: str, path: str | None) -> Path | None:
    """The path of a result, if it can be written: known before anything is computed."""
    if path is None:
        return None
    target = Path(path)
    if not target.parent.is_dir():
        raise Refused(f"`{option}` must name a file in a folder that exists, got {path!r}.")
    if target.is_dir() or not os.access(target if target.exists() else target.parent, os.W_OK):
        raise Refused(f"`{option}` must name a file that can be written, got {path!r}.")
    return target


def check_plot(path: str | None) -> Path | None:
    target = writable("--plot", path)
    if target is None:
        return None
    if target.suffix.lower() not in PLOT_FORMATS:
        raise Refused(f"`--plot` must end in {', '.join(PLOT_FORMATS)}, got {path!r}.")
    if find_spec("matplotlib") is None:
        raise Refused("`--plot` needs matplotlib, which is not installed: pip install linattn[plot].")
    return target


def compare(arguments: argparse.Namespace) -> None:
    """All checks first, then the measurement, then the results."""
    from rich.console import Console

    plot_file, json_file = check_plot(arguments.plot), writable("--json", arguments.json)

    from linattn._cli import plot, table
    from linattn._cli.compare import choose, count_steps
    from linattn._cli.compare import compare as measure
    from linattn._cli.inputs import load

    inputs = load(arguments.file, arguments.layer, arguments.causal)
    rows, softmax, notes = choose(arguments.mechanism, arguments.backend, inputs)
    lengths: Any = None
    with progress_bar() as bar:
        task = bar.add_task("", total=count_steps(rows, inputs))

        def step(what: str, n: int) -> None:
            bar.update(task, description=what, advance=n)

        result = measure(rows, softmax, inputs, arguments.causal, notes, step)
        if plot_file is not None:
            bar.update(task, total=bar.tasks[0].completed + plot.count_steps(rows), advance=0)
            lengths = plot.time_against_length(rows, inputs, arguments.causal, step)
    if json_file is not None:
        write(json_file, json.dumps(table.as_data(result, lengths), indent=1, allow_nan=False) + "\n")
    if plot_file is not None:
        plot.draw(result, lengths, plot_file)
    console = Console()
    table.show(result, console if console.is_terminal else Console(width=max(console.width, table.WIDTH)))


def audit(arguments: argparse.Namespace) -> int:
    """All checks first; 1 if a limit is broken."""
    from rich.console import Console

    json_file, text_file = writable("--json", arguments.json), writable("--md", arguments.md)

    from linattn._cli import audit as job

    names = job.mechanisms(arguments.mechanism)
    notes, before = job.check_backend(arguments.backend, names), job.committed(arguments.against)
    with progress_bar() as bar:
        task = bar.add_task("", total=job.count_steps(names, arguments.full, arguments.peers))

        def step(what: str) -> None:
            bar.update(task, description=what, advance=1)

        processes = arguments.jobs or job.processes()
        report = job.audit(names, arguments.backend, arguments.full, before, notes, arguments.peers, processes, step)
    if json_file is not None:
        write(json_file, job.as_json(report))
    if text_file is not None:
        write(text_file, job.text(report, text_file))
    console = Console()
    job.show(report, console if console.is_terminal else Console(width=max(console.width, job.WIDTH)))
    return 1 if report.faults else 0


def progress_bar() -> Any:
    """On stderr, gone when done; silent where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    percent, what = TextColumn("{task.percentage:>3.0f} %"), TextColumn("{task.description}", markup=False)
    columns = (BarColumn(), percent, TimeElapsedColumn(), what)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise Refused(f"{path} cannot be written: {error.strerror or error}.") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it is done, 2 if it cannot be done, with one sentence on stderr that says why.

    An audit that finds a limit broken gives 1.
    """
    parser = build_parser()
    try:
        arguments = parser.parse_args(argv)
        if arguments.command == "compare":
            compare(arguments)
        elif arguments.command == "audit":
            return audit(arguments)
        elif arguments.command == "info":
            from rich.console import Console

            from linattn._cli import info

            info.show(Console())
        else:
            raise Refused("A command must be given, `compare`, `audit` or `info`, got none: see --help.")
    except Refused as refused:
        print(refused, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
