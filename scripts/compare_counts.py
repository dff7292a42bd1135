"""Compare this tree with its base on the instructions of a few calls: a count repeats on machines whose times do not.

    python scripts/compare_counts.py                  beside asv_bench/counts.json; exit 1 if a count rose by 5 %
    python scripts/compare_counts.py --base main      beside another commit, counted here and now
    python scripts/compare_counts.py --write          the counts of this tree become the base
    python scripts/compare_counts.py --planted        slow a loop and lose a digit, in copies: both must be noticed

The calls stand in counted.py. They run under valgrind (callgrind), which knows AVX2 and not AVX-512, with kernels
compiled for a processor of that kind whatever the machine has; kernels are compiled before, outside of valgrind.

Counts of other versions of the interpreter or the array library cannot be compared: where those differ from the file's,
the base is counted here, from where this branch left main or, on main, from the commit before. Where there is no
valgrind, nothing to run its code or no such commit, it says so and that nothing was compared, with exit 0.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "scripts" / "counted.py"
FILE = ROOT / "asv_bench" / "counts.json"
AUDIT = ROOT / "docs" / "measured" / "audit.json"
MOST = 1.05  # of the base's count: more fails
FEWER = 0.95  # less is worth telling
SECONDS = 600
FEATURES = "sse3 ssse3 sse4.1 sse4.2 popcnt cx16 avx avx2 fma f16c bmi bmi2 lzcnt movbe"
SETTINGS = {
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": ",".join(f"+{name}" for name in FEATURES.split()),
    "OPENBLAS_CORETYPE": "Haswell",
    "PYTHONHASHSEED": "0",
    **dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "LINATTN_NUM_THREADS"), "1"),
}
TOKENS_OF_A_TILE = '"avx2": Tile("avx2", 32, 3, 2,'
PLANTED_LOOP = ("linattn/backends/numba/_tiles.py", TOKENS_OF_A_TILE, TOKENS_OF_A_TILE.replace("3, 2", "1, 2"))
PLANTED_DIGIT = (
    "linattn/_arrays.py",
    "return accumulator(x, xp)\n    return xp.float64",
    "return accumulator(x, xp)\n    return xp.float32",
)

Counts = dict[str, int]


class Nothing(Exception):
    """Why nothing can be counted, or compared, here."""


# ------------------------------------------------------------------------------------------------- counting


def why_not() -> str | None:
    """Why this machine cannot count; None if it can."""
    if shutil.which("valgrind") is None:
        return "valgrind is not installed"
    if platform.machine() not in ("x86_64", "AMD64") or sys.platform != "linux":
        return f"the messages to valgrind are written for x86-64 Linux, not for {platform.machine()} {sys.platform}"
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    missing = {"avx2", "fma", "f16c"} - set(flags.split())
    return f"this processor has no {', '.join(sorted(missing))}" if missing else None


def versions() -> dict[str, str]:
    """What a count depends on beside the tree."""
    found = {name: metadata.version(name) for name in ("numpy", "numba", "llvmlite", "array-api-compat")}
    said = subprocess.run(["valgrind", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    return {"python": platform.python_version(), **found, "valgrind": said.removeprefix("valgrind-")}


def count(tree: Path, folder: Path) -> Counts:
    """Instructions of one call of each job, with the package of `tree`; `folder` is for files."""
    environment = {**os.environ, **SETTINGS, "PYTHONPATH": str(tree), "NUMBA_CACHE_DIR": str(folder / "kernels")}
    environment.pop("LINATTN_NUMBA_CACHE", None)
    (folder / "kernels").mkdir(mode=0o700, exist_ok=True)
    made = folder / "counts"
    command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", "--smc-check=all-non-file", "-q",
               f"--callgrind-out-file={made}"]  # fmt: skip
    still = ["setarch", "-R"]  # the same addresses in every run, where that is allowed
    if shutil.which("setarch") is None or subprocess.run([*still, "true"], check=False, capture_output=True).returncode:
        still = []
    python = [sys.executable, "-P", str(PROGRAM)]
    for part in ([*python, "--warm"], [*still, *command, *python]):
        done = subprocess.run(part, env=environment, cwd=folder, capture_output=True, text=True, timeout=SECONDS,
                              check=False)  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{' '.join(part[-2:])} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    found: dict[str, dict[int, int]] = {}
    for dump in folder.glob("counts.*"):
        text = dump.read_text(encoding="utf-8")
        name = re.search(r"^desc: Trigger: Client Request: (\d+) (.*)$", text, re.MULTILINE)
        total = re.search(r"^totals: (\d+)", text, re.MULTILINE)
        if name and total:
            found.setdefault(name[2], {})[int(name[1])] = int(total[1])
    if not found:
        raise RuntimeError(f"valgrind wrote no counts:\n{done.stderr[-2000:]}")
    return {name: slope(totals) for name, totals in sorted(found.items())}


def slope(totals: dict[int, int]) -> int:
    """Instructions of one call, from totals of two numbers of calls."""
    (few, of_few), (many, of_many) = sorted(totals.items())
    return round((of_many - of_few) / (many - few))


# ------------------------------------------------------------------------------------------------ the base


def base_commit() -> str:
    """Where this branch left main; on main the commit before."""
    head = git("rev-parse", "HEAD")
    for main in ("origin/main", "main"):
        try:
            found = git("merge-base", main, "HEAD")
        except Nothing:
            continue
        if found != head:
            return found
    return git("rev-parse", "HEAD~1")


def git(*words: str) -> str:
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise Nothing(f"git {' '.join(words)} gives nothing ({error})") from None
    return done.stdout.strip()


def count_commit(commit: str, folder: Path) -> Counts:
    """The same calls with the package of another commit."""
    tree = folder / "tree"
    git("worktree", "add", "--detach", "--force", str(tree), commit)
    try:
        return count(tree, folder)
    finally:
        git("worktree", "remove", "--force", str(tree))


# ------------------------------------------------------------------------------------------------ comparing


def compare(now: Counts, base: Counts) -> tuple[list[str], list[str]]:
    """Lines of a table, and a sentence for each count that rose too far."""
    lines, faults = [], []
    for name in sorted({*now, *base}):
        if name not in base or name not in now:
            lines.append(f"{now.get(name, base.get(name, 0)):>14,}  {'new' if name in now else 'gone':>8}  {name}")
            continue
        ratio = now[name] / base[name]
        note = "  fewer: --write keeps it so" if ratio < FEWER else ""
        lines.append(f"{now[name]:>14,}  {100 * (ratio - 1):>+7.2f}%  {name}{note}")
        if not ratio <= MOST:
            faults.append(f"{name}: {now[name]:,} instructions a call, {base[name]:,} before.")
    return lines, faults


def planted(fault: tuple[str, str, str], folder: Path) -> Path:
    """A copy of the package with one line changed."""
    tree = folder / f"planted-{hashlib.sha256(fault[2].encode()).hexdigest()[:8]}"
    shutil.copytree(ROOT / "linattn", tree / "linattn", ignore=shutil.ignore_patterns("__pycache__"))
    file = tree / fault[0]
    text = file.read_text(encoding="utf-8")
    if text.count(fault[1]) != 1:
        raise RuntimeError(f"What is to be changed stands {text.count(fault[1])} times in {fault[0]}.")
    file.write_text(text.replace(fault[1], fault[2]), encoding="utf-8")
    return tree


def show_planted(base: Counts, folder: Path) -> int:
    """Both faults must be noticed; what is said of them is printed."""
    _, slower = compare(count(planted(PLANTED_LOOP, folder), folder), base)
    print("A loop that holds one token in registers, not three:", *(slower or ["NOT NOTICED."]), sep="\n  ")
    command = [sys.executable, "-m", "linattn", "audit", "--mechanism", "Linear", "--backend", "reference", "--against",
               str(AUDIT)]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(planted(PLANTED_DIGIT, folder))}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    said = done.stdout.strip().splitlines()[-1:] if done.returncode == 1 else ["NOT NOTICED.", done.stderr]
    print("A running state in float32, not in float64; the audit says:", *said, sep="\n  ")
    return 0 if slower and done.returncode == 1 else 1


def stored() -> Counts | None:
    """The file's counts, if they were made by the versions that are here."""
    data = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {"versions": {}, "counts": {}}
    here, there = versions(), data["versions"]
    moved = [f"{name} {here[name]} ({there.get(name, 'none')} there)" for name in here if here[name] != there.get(name)]
    if moved:
        print(f"{FILE.name} cannot be compared with {', '.join(moved)}.")
    return None if moved else data["counts"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", metavar="COMMIT", help="count this commit, and do not read the file")
    parser.add_argument("--write", action="store_true", help="write the file")
    parser.add_argument("--planted", action="store_true", help="show that a slower loop and a lost digit are noticed")
    options = parser.parse_args()
    reason = why_not()
    if reason is not None:
        print(f"SKIPPED, no instructions were counted: {reason}.")
        return 0
    with tempfile.TemporaryDirectory(prefix="counts-") as name:
        folder, other = Path(name) / "now", Path(name) / "base"
        folder.mkdir()
        other.mkdir()
        now = count(ROOT, folder)
        if options.write:
            FILE.write_text(json.dumps({"versions": versions(), "counts": now}, indent=1) + "\n", encoding="utf-8")
            print(f"{len(now)} counts written to {FILE.relative_to(ROOT)}.")
            return 0
        if options.planted:
            return show_planted(now, folder)
        base = None if options.base else stored()
        try:
            base = count_commit(options.base or base_commit(), other) if base is None else base
        except Nothing as error:
            print(f"SKIPPED, nothing to compare with: {error}.")
            return 0
    lines, faults = compare(now, base)
    print(f"{'instructions':>14}  {'change':>8}  of one call", *lines, sep="\n")
    for fault in faults:
        print(fault)
    print(f"{len(faults)} of {len(now)} rose by more than {100 * (MOST - 1):.0f} %." if faults else "None rose.")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
