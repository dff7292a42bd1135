"""That a built wheel has the kernels' sources: `python scripts/wheel_contents.py WHEEL`."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

CU = Path("linattn", "backends", "cupy", "cu")


def main(wheel: str) -> int:
    here = {str(CU / file.name) for file in (Path(__file__).resolve().parent.parent / CU).iterdir()}
    missing = sorted(here - set(zipfile.ZipFile(wheel).namelist()))
    print(*(f"{wheel} lacks {name}" for name in missing), sep="\n", end="")
    return bool(missing or not here)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
