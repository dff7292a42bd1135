"""Run every program in examples/ at full size: what it prints and draws goes to docs/figures, where the pages show it.

python scripts/figures.py [PROGRAM ...]
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "figures"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    asked = sys.argv[1:]
    for program in sorted((ROOT / "examples").glob("*.py")):
        name = program.stem
        if asked and name not in asked:
            continue
        command = [sys.executable, str(program), "--out", str(FOLDER / f"{name}.png")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        (FOLDER / f"{name}.txt").write_text(done.stdout, encoding="utf-8")
        print(f"{name}: {len(done.stdout.splitlines())} lines")


if __name__ == "__main__":
    main()
