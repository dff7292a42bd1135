"""The project's own tools do what they say: counts are compared, pages load nothing, a new mechanism begins red."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def script(monkeypatch):
    """A script of this project by its name, as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module


def run(*words, cwd=ROOT, **changes):
    environment = {**os.environ, "PYTHONPATH": str(cwd), **changes}
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


# -------------------------------------------------------------------------------------------------- counts


def test_a_count_that_rises_by_a_twentieth_is_a_fault(script):
    counts = script("compare_counts")
    base = {"a": 1_000_000, "b": 2_000_000, "gone": 5}
    lines, faults = counts.compare({"a": 1_050_000, "b": 1_800_000, "new": 7}, base)
    assert faults == []
    assert [line.split()[1] for line in lines] == ["+5.00%", "-10.00%", "gone", "new"]
    assert "fewer" in lines[1]
    assert counts.compare({**base, "a": 1_050_001}, base)[1] == ["a: 1,050,001 instructions a call, 1,000,000 before."]


def test_a_slope_has_no_beginning_in_it(script):
    assert script("compare_counts").slope({1: 1_000 + 7, 3: 3_000 + 7}) == 1_000


def test_counts_of_other_versions_are_not_compared(script, monkeypatch, capsys):
    counts = script("compare_counts")
    monkeypatch.setattr(counts, "versions", lambda: {"numpy": "2"})
    assert counts.stored() is None
    assert "cannot be compared with numpy 2 (" in capsys.readouterr().out
    monkeypatch.setattr(counts, "versions", dict)
    assert min(counts.stored().values()) > 0


def test_a_machine_that_cannot_count_says_so(script, monkeypatch, capsys):
    counts = script("compare_counts")
    monkeypatch.setattr(counts.shutil, "which", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["compare_counts.py"])
    assert counts.main() == 0
    assert capsys.readouterr().out == "SKIPPED, no instructions were counted: valgrind is not installed.\n"


def test_the_counted_calls_run_and_count_nothing_by_themselves(script):
    """The messages to valgrind are nothing to a processor."""
    names = set(script("counted").jobs())
    data = json.loads((ROOT / "asv_bench" / "counts.json").read_text(encoding="utf-8"))
    assert names == set(data["counts"])
    if sys.platform == "linux" and os.uname().machine == "x86_64":
        assert script("counted").Counter().send(0x1001) == 0


@pytest.mark.slow
def test_planted_regressions_are_noticed():
    done = run("scripts/compare_counts.py", "--planted")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SKIPPED" in done.stdout or ("instructions a call" in done.stdout and "limits broken" in done.stdout)


# ------------------------------------------------------------------------------------------------ benchmarks


def test_pages_load_nothing_from_elsewhere(script):
    publish = script("publish_benchmarks")
    page = """<link rel="stylesheet" href="https://x.org/a/bootstrap.min.css" integrity="sha256-a=" crossorigin="b">
<script src="https://x.org/jquery.flot.min.js" integrity="sha512-b==" referrerpolicy="no" onerror="fail()"></script>
<script src="asv.js"></script> <a href="https://x.org/about">asv</a>"""
    assert (
        publish.localised(page)
        == """<link rel="stylesheet" href="vendor/bootstrap.min.css">
<script src="vendor/jquery.flot.min.js" onerror="fail()"></script>
<script src="asv.js"></script> <a href="https://x.org/about">asv</a>"""
    )
    with pytest.raises(ValueError, match=r"loads https://x\.org/other\.js, which is in no package"):
        publish.localised('<script src="https://x.org/other.js"></script>')


# --------------------------------------------------------------------------------------------- a new mechanism


def test_a_new_mechanism_has_all_its_pieces_and_is_red(script, tmp_path):
    """It imports, the tests of its completeness see every piece but the measured table, and its results are missing."""
    for name in ("linattn", "tests", "scripts", "asv_bench"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("docs/mechanisms", "docs/api"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("pyproject.toml", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    written = script("new").write("NewAttention", tmp_path)
    assert {"linattn/mechanisms/new_attention.py", "docs/mechanisms/new_attention.rst", "CHANGELOG.md"} <= set(written)
    with pytest.raises(ValueError, match=r"`NAME` must be new, got 'NewAttention'"):
        script("new").write("NewAttention", tmp_path)
    whole = run("-m", "pytest", "-q", "tests/test_architecture.py", "-k", "NewAttention", cwd=tmp_path)
    assert re.match(r"6 passed", whole.stdout.splitlines()[-1]), whole.stdout
    red = run("-m", "pytest", "-q", "tests/test_forward.py", "tests/test_gradients.py", "-k",
              "NewAttention and reference and 11x11x5x4 and float64", cwd=tmp_path)  # fmt: skip
    assert red.returncode == 1, red.stdout
    assert "passed" not in red.stdout.splitlines()[-1]
    errors = re.findall(r"^E +NotImplementedError: (.*)$", red.stdout, flags=re.MULTILINE)
    assert errors
    assert all("`NewAttention` is not written yet: " in error for error in errors)


@pytest.mark.parametrize("name", ["nystrom", "2D", "Softmax"])
def test_a_name_that_cannot_be_is_refused(script, name, tmp_path):
    with pytest.raises(ValueError, match=r"`NAME` must be"):
        script("new").write(name, ROOT if name == "Softmax" else tmp_path)


# --------------------------------------------------------------------------------------------------- releases


def test_release_notes_are_those_of_the_version(script, tmp_path):
    release = script("release")
    changelog = "# Changelog\n\n## 0.2.0\n\n- new\n\n### Numerics\n\nnone\n\n## 0.1.0\n\n- old\n"
    assert release.notes(changelog, "0.2.0.dev3").startswith("0.2.0\n\n- new")
    assert "old" not in release.notes(changelog, "0.2.0")
    with pytest.raises(ValueError, match=r"one heading for 0\.3\.0, got 0"):
        release.notes(changelog, "0.3.0")
    with pytest.raises(ValueError, match=r"a heading Numerics for 0\.1\.0"):
        release.notes(changelog, "0.1.0")
    for name in ("a-1.0-py3-none-any.whl", "a-1.0.tar.gz"):
        (tmp_path / name).touch()
    assert [file.name for file in release.files(tmp_path, "1.0")] == ["a-1.0-py3-none-any.whl", "a-1.0.tar.gz"]
    with pytest.raises(ValueError, match=r"must be of version 1\.1"):
        release.files(tmp_path, "1.1")


def test_the_changelog_has_notes_for_this_version(script):
    import linattn as la

    assert "### Added" in script("release").notes((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), la.__version__)
