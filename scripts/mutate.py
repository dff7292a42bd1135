"""The drill: named faults of one line, each put into a copy of the real code, each of which a named test must find.

    python scripts/mutate.py                 all of them; a quarter of an hour
    python scripts/mutate.py --sample        those that CI tries; under three minutes
    python scripts/mutate.py NAME ...        some
    python scripts/mutate.py --list

The faults stand in faults.toml. One survives if its tests stay green, or do not run; then the tests are too weak, and
the exit status is 1. What was red with a fault must be green without one. A fault whose line is gone is an error: the
list follows the code.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("linattn", "tests", "pyproject.toml", "docs/measured", "scripts", "README.md", ".ci")
SECONDS = 240  # a fault may make tests hang: that is found as well
RED, GREEN = 1, 0  # pytest: some failed, all passed; anything else is neither


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
    """What the tests need, without what was compiled."""
    for name in COPIED:
        source, target = ROOT / name, to / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.nbi", "*.nbc"))
        elif source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)


def pytest(folder: Path, what: Iterable[str]) -> tuple[int, list[str]]:
    """The exit status, and what pytest says at its end; a run that hangs is red."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "--tb=no", "-rf", *what]
    one = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    changes = {**os.environ, **one, "PYTHONPATH": str(folder), "CI": "true", "COLUMNS": "1000"}
    changes.pop("NUMBA_CACHE_DIR", None)
    try:
        done = subprocess.run(
            command, cwd=folder, env=changes, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return RED, [f"took more than {SECONDS} s"]
    return done.returncode, (done.stdout + done.stderr).strip().splitlines() or [""]


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
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        folders = [Path(name) / str(i) for i in range(min(2, os.cpu_count() or 1, len(faults)))]
        for folder in folders:
            copy(folder)
        free, found = list(folders), []

        def tried(fault: Fault) -> bool:
            folder = free.pop()
            before = spoil(folder, fault)
            start = time.perf_counter()
            try:
                status, lines = pytest(folder, [*fault.test.split(), *(["-k", fault.select] if fault.select else [])])
            finally:
                (folder / fault.file).write_text(before, encoding="utf-8")
                free.append(folder)
            verdict = {RED: "found", GREEN: "SURVIVED"}.get(status, f"NOT RUN ({status})")
            print(f"{verdict:9} {time.perf_counter() - start:5.1f} s  {fault.name}: {lines[-1]}", flush=True)
            found.extend(line[len("FAILED ") :].split(" - ")[0] for line in lines if line.startswith("FAILED "))
            return status == RED

        with ThreadPoolExecutor(len(folders)) as pool:
            survivors = sum(not red for red in pool.map(tried, faults))
        # what was red with a fault must be green without one
        status, lines = pytest(folders[0], dict.fromkeys(found))
        print(f"without a fault: {lines[-1]}", flush=True)
        if found and status != GREEN:
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
