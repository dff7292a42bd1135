"""Print the lowest versions that pyproject.toml allows, one requirement a line, for pip.

    python scripts/floors.py test jax > floors.txt

Dependencies always; extras as named.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def floors(extras: list[str]) -> list[str]:
    """["numpy==2.2.6", ...] for the dependencies and the extras."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    wanted = project["dependencies"] + [line for extra in extras for line in optional[extra]]
    unbounded = [line for line in wanted if not re.fullmatch(r"[\w.-]+>=[\w.]+", line)]
    if unbounded:
        raise SystemExit(f"every requirement must read name>=version, got {', '.join(unbounded)}")
    return [line.replace(">=", "==") for line in wanted]


if __name__ == "__main__":
    print("\n".join(floors(sys.argv[1:])))
