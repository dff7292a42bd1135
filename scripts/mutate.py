"""The drill: named faults of one line, each put into a copy of the real code, each of which a named test must find.

    python scripts/mutate.py                 all of them; some minutes
    python scripts/mutate.py --sample        those that CI tries; under three minutes
    python scripts/mutate.py NAME ...        some
    python scripts/mutate.py --list

The faults stand in faults.toml. One survives if its tests stay green, or do not run; then the tests are too weak, and
the exit status is 1. What was red with a fault must be green without one. A fault whose line is gone is an error: the
list follows the code.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
import tomllib
import traceback
from pathlib import Path
from typing import NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("linattn", "tests", "pyproject.toml", "docs/measured", "scripts", "README.md", ".ci")
LOADED = ("pytest", "numpy", "numpy.ma", "numba", "ml_dtypes", "array_api_strict", "array_api_compat.numpy",
          "array_api_extra", "mpmath", "threadpoolctl")  # fmt: skip
SECONDS, TICK = 240, 0.05  # a fault may make tests hang: that is found as well
LOG = "log.txt"
RED, GREEN, CRASHED = 1, 0, 3  # pytest: some failed, all passed; anything else is neither


class Fault(NamedTuple):
    """One line made wrong: `old` stands once in `file`; `test` is a pytest node, `select` its -k."""

    name: str
    file: str
    old: str
    new: str
    test: str
    select: str = ""
    sampled: bool = False


FAULTS = [Fault(**fault) for fault in tomllib.loads((ROOT / "scripts" / "faults.toml").read_text("utf-8"))["fault"]]


def copy(to: Path) -> None:
    """What the tests need. Compiled kernels come along: a changed source of theirs has others."""
    for name in COPIED:
        source, target = ROOT / name, to / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.pyc"))
        elif source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)


def load() -> None:
    """All that tests import but the library itself: loaded once, and forked for each fault."""
    one = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    os.environ.update(one, CI="true", COLUMNS="1000", PYTHONDONTWRITEBYTECODE="1")
    os.environ.pop("NUMBA_CACHE_DIR", None)
    sys.dont_write_bytecode = True
    for name in LOADED:
        importlib.import_module(name)


class Run(NamedTuple):
    """A child that tests a copy, with a fault or without."""

    child: int
    folder: Path
    start: float
    fault: Fault | None = None
    before: str = ""  # what stood where the fault is

    def ended(self) -> tuple[int, list[str]] | None:
        """The exit status and what pytest said, None while it goes on; a run that hangs is red."""
        done, status = os.waitpid(self.child, os.WNOHANG)
        if done:
            said = (self.folder / LOG).read_text(encoding="utf-8").strip().splitlines()
            return os.waitstatus_to_exitcode(status), said or [""]
        if time.perf_counter() - self.start < SECONDS:
            return None
        os.killpg(self.child, signal.SIGKILL)
        os.waitpid(self.child, 0)
        return RED, [f"took more than {SECONDS} s"]


def begun(folder: Path, what: list[str], fault: Fault | None = None, before: str = "") -> Run:
    child = os.fork()
    if child == 0:
        run_here(folder, ["-x", "-q", "--no-header", "--tb=no", "-rf", *what])
    return Run(child, folder, time.perf_counter(), fault, before)


def run_here(folder: Path, what: list[str]) -> NoReturn:
    """In the child: pytest on the copy, all output to a file. Ends the process."""
    status = CRASHED
    try:
        os.setpgid(0, 0)
        with (folder / LOG).open("wb") as stream:
            for number in (1, 2):
                os.dup2(stream.fileno(), number)
        os.chdir(folder)
        os.environ["PYTHONPATH"] = str(folder)
        sys.path.insert(0, str(folder))
        status = int(importlib.import_module("pytest").main(what))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def spoil(folder: Path, fault: Fault) -> str:
    """Put the fault in; gives the text that was there."""
    file = folder / fault.file
    text = file.read_text(encoding="utf-8")
    if text.count(fault.old) != 1:
        raise SystemExit(f"{fault.name}: its line stands {text.count(fault.old)} times in {fault.file}.")
    file.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
    return text


def drill(faults: list[Fault]) -> int:
    """Try them, two at a time; the number of survivors."""
    load()
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        free = [Path(name) / str(i) for i in range(min(2, os.cpu_count() or 1, len(faults)))]
        for folder in free:
            copy(folder)
        waiting, running, found, survivors = list(faults), [], [], 0
        while waiting or running:
            while waiting and free:
                fault, folder = waiting.pop(0), free.pop()
                tests = [*fault.test.split(), *(["-k", fault.select] if fault.select else [])]
                running.append(begun(folder, tests, fault, spoil(folder, fault)))
            time.sleep(TICK)
            for run in list(running):
                end = run.ended()
                if end is None or run.fault is None:
                    continue
                running.remove(run)
                (run.folder / run.fault.file).write_text(run.before, encoding="utf-8")
                free.append(run.folder)
                status, lines = end
                verdict = {RED: "found", GREEN: "SURVIVED"}.get(status, f"NOT RUN ({status})")
                print(
                    f"{verdict:9} {time.perf_counter() - run.start:5.1f} s  {run.fault.name}: {lines[-1]}", flush=True
                )
                found += [line[len("FAILED ") :].split(" - ")[0] for line in lines if line.startswith("FAILED ")]
                survivors += status != RED
        # what was red with a fault must be green without one
        whole, end = begun(free[0], list(dict.fromkeys(found))), None
        while end is None:
            time.sleep(TICK)
            end = whole.ended()
        print(f"without a fault: {end[1][-1]}", flush=True)
        if found and end[0] != GREEN:
            raise SystemExit("Without any fault the tests must be green; nothing is shown.")
        return survivors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="faults by name; by default all")
    parser.add_argument("--sample", action="store_true", help="those that CI tries")
    parser.add_argument("--list", action="store_true", help="print the names")
    options = parser.parse_args()
    unknown = set(options.names) - {fault.name for fault in FAULTS}
    if unknown:
        parser.error(f"no such fault: {', '.join(sorted(unknown))}")
    faults = [f for f in FAULTS if (f.name in options.names or not options.names) and (f.sampled or not options.sample)]
    if options.list:
        print("\n".join(f"{fault.name}  ({fault.file})" for fault in faults))
        return 0
    survivors = drill(faults)
    print(
        f"{len(faults) - survivors} of {len(faults)} faults found." + (f" {survivors} SURVIVED." if survivors else "")
    )
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
