"""Write .ci/constraints.txt: the files that CI's tools and optional libraries come from, each by its hash.

    python scripts/pin.py

What the requirements of `.ci/run` resolve to for this interpreter and platform, and all that they need. `.ci/run`
installs these files where interpreter and platform are the same. torch alone is pinned by its version: which of its
builds a machine gets depends on where it looks.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WANTED = (".[dev,jax]", "torch==2.13.0")
TARGET = ROOT / ".ci" / "constraints.txt"


def where() -> str:
    """Interpreter and platform, as in the file's first line."""
    return f"CPython {sys.version_info.major}.{sys.version_info.minor} {sysconfig.get_platform()}"


def resolved() -> list[tuple[str, str, str]]:
    """Name, version without a local label, and SHA-256 of each file that pip would install into nothing."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    said = subprocess.run([*command, *WANTED], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = []
    for item in json.loads(said)["install"]:
        name = re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower()
        if name not in ("linattn", "torch"):
            hashes = item["download_info"]["archive_info"]["hashes"]
            found.append((name, item["metadata"]["version"].partition("+")[0], hashes["sha256"]))
    return sorted(found)


def main() -> int:
    if sys.argv[1:] == ["--where"]:
        print(where())
        return 0
    lines = [f"# {where()}: written by scripts/pin.py; not by hand."]
    lines += [f"{name}=={version} --hash=sha256:{digest}" for name, version, digest in resolved()]
    TARGET.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines) - 1} files pinned for {where()}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
