"""What README and CONTRIBUTING say is true: their commands are CI's, their code runs, their steps work."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ROOT / "docs" / "measured"


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name, language):
    """The code blocks of a Markdown file."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text(name), flags=re.DOTALL | re.MULTILINE)


def test_readmes_commands_are_those_of_ci():
    commands = [line for block in blocks("README.md", "bash") for line in block.splitlines()]
    assert commands == ["pip install -e . && python -m linattn compare", 'pip install -e ".[test]" && pytest']
    script = text(".ci/run")
    for part in ("pip install -q -e .\n", "python -m linattn compare\n", 'pip install -q -e ".[test]"\n', " pytest\n"):
        assert part in script


def test_readmes_code_runs():
    (code,) = blocks("README.md", "python")
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["out"].shape == (8, 1000, 64)
    assert abs(names["out"][:, 900:] - names["second"]).max() < 1e-13


def test_links_lead_somewhere():
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"):
        links = [link for link in re.findall(r"\]\(([^)]+)\)", text(name)) if "://" not in link]
        assert [link for link in links if not (ROOT / link).exists()] == []


STEP = re.compile(
    r"^In `([^`]+)`, (before|after) `([^`\n]+)`:\n\n```python\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE
)


def apply(steps, folder):
    """Do what the guide says, in a copy."""
    for file, where, line, code in steps:
        path = folder / file
        content = path.read_text(encoding="utf-8")
        (at,) = re.finditer(rf"^{re.escape(line)}.*\n", content, flags=re.MULTILINE)
        cut = at.start() if where == "before" else at.end()
        gap = "\n\n" if where == "before" else ""
        path.write_text(content[:cut] + code + gap + content[cut:], encoding="utf-8")


def test_a_feature_map_in_six_steps(tmp_path):
    guide = text("CONTRIBUTING.md")
    steps = STEP.findall(guide)
    assert len(steps) == 6
    assert guide.count("```python\n") == len(steps)
    for name in ("linattn", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("test_docs.py"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    apply(steps, tmp_path)
    tests = ["tests/test_forward.py", "tests/test_gradients.py"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "softplus and (float64 or not float32)", *tests],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed
    assert int(passed[1]) >= 50


def tables():
    return sorted(json.loads((MEASURED / "measured.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", tables())
def test_measured_tables_are_shown(name):
    """Each is written, by the command, and included on some page."""
    page = (MEASURED / f"{name}.rst").read_text(encoding="utf-8")
    assert page.startswith(f".. Written by scripts/measure_docs.py {name}; not by hand.")
    pages = [file.read_text(encoding="utf-8") for file in (ROOT / "docs").rglob("*.rst")]
    assert any(f"measured/{name}.rst" in page for page in pages)


DOCUMENTED = (
    "linattn",
    "linattn.instruments",
    "linattn.regions",
    "linattn.interop.torch",
    "linattn.interop.jax",
    "linattn.distributed",
    "linattn.audit.quadratic",
    "linattn.audit.measure",
)


def public(module):
    """`__all__` of a module, read and not imported: torch or JAX need not be there."""
    path = ROOT.joinpath(*module.split("."))
    tree = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8"))
    (names,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
    )
    return {f"{module}.{name}" for name in names}


def referenced(page):
    """Full names of all that a page of the API shows."""
    found, module = set(), ""
    for kind, name, options in re.findall(
        r"^ *\.\. (currentmodule|auto\w+):: (\S+)\n((?: +:.*\n)*)", page, flags=re.MULTILINE
    ):
        if kind in ("currentmodule", "automodule"):
            module = name
        if kind == "automodule":
            found.add(name)
            members = re.search(r":members:(.*)", options)
            listed = [x.strip() for x in members[1].split(",") if x.strip()] if members else []
            found |= {f"{name}.{x}" for x in listed} or public(name)
        elif kind != "currentmodule":
            found |= {name, f"{module}.{name}"}
    return found


@pytest.mark.parametrize("module", DOCUMENTED)
def test_every_public_name_is_documented(module):
    assert len(public(module)) > 0
    assert public(module) - referenced(text("docs/api/index.rst")) == set()


def test_a_distance_that_moved_is_found():
    """Closeness to softmax is compared both ways, within a hundredth."""
    spec = importlib.util.spec_from_file_location("measure_docs", ROOT / "scripts" / "measure_docs.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    table = json.loads((MEASURED / "measured.json").read_text(encoding="utf-8"))["closeness"]
    assert script.moved(table, table) == []
    for factor in (0.98, 1.02, float("nan")):
        rows = [list(row) for row in table["rows"]]
        rows[3][2] *= factor
        (fault,) = script.moved(table, {**table, "rows": rows})
        assert fault.startswith(f"{rows[3][0]} {rows[3][1]}, layer 0: ")


def test_a_missing_name_is_found():
    assert "linattn.gone" not in referenced(text("docs/api/index.rst"))
    page = text("docs/api/index.rst").replace(".. autofunction:: cosformer\n", "")
    assert public("linattn") - referenced(page) == {"linattn.cosformer"}


def test_pages_include_tables_that_exist():
    for file in (ROOT / "docs").rglob("*.rst"):
        for name in re.findall(r"include:: (\S+)", file.read_text(encoding="utf-8")):
            assert (file.parent / name).resolve().exists(), f"{file.name}: {name}"


def test_every_promise_has_its_tests():
    """The page names tests that exist, and at least one for each line."""
    page = text("docs/promises.rst")
    named = re.findall(r"``(test_\w+\.py)::(test_\w+)``", page)
    sources = {file.name: file.read_text(encoding="utf-8") for file in (ROOT / "tests").glob("test_*.py")}
    assert [f"{file}::{name}" for file, name in named if f"\ndef {name}(" not in sources.get(file, "")] == []
    lines = re.findall(r"^   \* - (.*)\n     - (.*)$", page, flags=re.MULTILINE)
    assert len(lines) > 40
    assert [what for what, held_by in lines if held_by != "held by" and "::test_" not in held_by] == []


def test_ci_installs_known_files():
    """Each requirement of CI's environment is pinned to one file by its hash, at or above its floor."""
    project = tomllib.loads(text("pyproject.toml"))["project"]
    extras = project["optional-dependencies"]
    wanted = [
        *project["dependencies"],
        *(line for extra in ("test", "docs", "bench", "dev", "jax") for line in extras[extra]),
    ]
    first, *lines = text(".ci/constraints.txt").splitlines()
    assert re.fullmatch(r"# CPython 3\.\d+ [\w-]+: written by scripts/pin\.py; not by hand\.", first)
    pinned = dict(re.fullmatch(r"([\w-]+)==(\S+) --hash=sha256:[0-9a-f]{64}", line).groups() for line in lines)
    for line in wanted:
        name, floor = re.fullmatch(r"([\w-]+)(?:\[[\w,]+\])?(?:>=([\d.]+))?", line).groups()
        name = name.replace("_", "-").lower()
        if name != "linattn":
            assert numbers(pinned[name]) >= numbers(floor or "0"), line
    assert "--require-hashes -r .ci/constraints.txt" in text(".ci/run")


def numbers(version):
    return [int(part) for part in re.findall(r"\d+", version)]
