"""Run the programs whose pictures take too long for a docs build: what they print and draw goes to docs/figures.

python scripts/figures.py [PROGRAM ...]
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "figures"
SHOWN = "combiner_copy", "performer_norms"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:] or SHOWN:
        program = ROOT / "examples" / f"{name}.py"
        command = [sys.executable, str(program), "--out", str(FOLDER / f"{name}.png")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        (FOLDER / f"{name}.txt").write_text(done.stdout, encoding="utf-8")
        print(f"{name}: {len(done.stdout.splitlines())} lines")


if __name__ == "__main__":
    main()
