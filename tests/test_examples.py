"""Every program in examples/ with a picture runs in its small size, prints finite numbers, and draws if it can."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = [p for p in sorted((ROOT / "examples").glob("*.py")) if "--small" in p.read_text(encoding="utf-8")]


def run(program, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    done = subprocess.run(
        [sys.executable, str(program), *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_are_programs():
    assert {"performer_norms", "combiner_copy"} <= {p.stem for p in PROGRAMS}


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.stem)
def test_program(program, tmp_path):
    picture = tmp_path / "picture.png"
    printed = run(program, "--small", *(["--out", str(picture)] if find_spec("matplotlib") else []))
    numbers = [float(x) for x in re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[+-]\d+)?(?![\w.])", printed)]
    assert len(numbers) > 10
    assert not re.search(r"\b(nan|inf)\b", printed)
    if find_spec("matplotlib"):
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.stat().st_size > 5000
    assert program.name in (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
