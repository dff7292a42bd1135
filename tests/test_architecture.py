"""The rooms keep their contracts: who imports whom, one signature for all backends, nothing loaded before its use."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import linattn as la
from linattn.audit import quadratic
from linattn.mechanisms.attention import Attention

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "linattn"
MECHANISMS = [getattr(la, name) for name in la.__all__ if inspect.isclass(getattr(la, name))]
MECHANISMS = [kind for kind in MECHANISMS if issubclass(kind, Attention)]
OPTIONS = ["causal", "key_mask", "cu_seqlens", "positions", "backend", "out"]
LATE = ["numba", "llvmlite", "cupy", "torch", "jax", "mpi4py", "matplotlib", "rich", "ml_dtypes", "scipy"]
IMPORT_SECONDS = 0.15


def python(code):
    """What `code` prints in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False, env=environment
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


# --------------------------------------------------------------------------------------------- imports


def test_a_room_knows_the_rooms_below_it():
    from importlinter.cli import lint_imports

    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == 0


def test_import_loads_only_numpy_and_the_array_api_helpers():
    loaded = python("import sys, linattn; print(*sorted({name.partition('.')[0] for name in sys.modules}))")
    assert "numpy" in loaded
    assert [name for name in LATE if name in loaded] == []


def test_import_is_quick():
    code = "import numpy, time; start = time.process_time(); import linattn; print(time.process_time() - start)"
    python(code)  # bytecode is written once; processor time, since others may use the machine
    assert min(float(python(code)[0]) for _ in range(7)) < IMPORT_SECONDS


def test_version_is_that_of_the_metadata():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert la.__version__ == project["version"]


# -------------------------------------------------------------------------------------------- backends


def rooms():
    """(backend, engine) of every room but the reference."""
    engines = {file.stem for file in (PACKAGE / "backends" / "reference").glob("[!_]*.py")}
    files = [file for file in sorted((PACKAGE / "backends").glob("*/*.py")) if file.stem in engines]
    return [(file.parent.name, file.stem) for file in files if file.parent.name != "reference"]


def contract(verb):
    """Names and kinds of the parameters; those with a default are the room's own tuning."""
    parameters = inspect.signature(verb).parameters.values()
    return [(p.name, p.kind) for p in parameters if p.default is inspect.Parameter.empty]


@pytest.mark.parametrize("backend, engine", rooms())
def test_signatures_are_the_references(backend, engine):
    room = importlib.import_module(f"linattn.backends.{backend}.{engine}")
    reference = importlib.import_module(f"linattn.backends.reference.{engine}")
    for verb in ("forward", "backward"):
        assert contract(getattr(room, verb)) == contract(getattr(reference, verb))


def test_there_is_a_compiled_linear_engine():
    assert ("numba", "linear") in rooms()


def test_compiled_functions_have_names_of_their_own():
    """The compiler's cache goes by names and does not know options: two variants under one name share a binary."""
    from numba.core.dispatcher import Dispatcher

    package = importlib.import_module("linattn.backends.numba")
    kernels = {}
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        for value in vars(importlib.import_module(found.name)).values():
            if isinstance(value, Dispatcher):
                function = value.py_func
                kernels.setdefault(function.__qualname__, set()).add((function.__module__, id(function)))
    assert kernels
    assert {name: who for name, who in kernels.items() if len(who) > 1} == {}


# -------------------------------------------------------------------------------------- array-API rooms


def array_api_files():
    return [*sorted((PACKAGE / "engines").glob("*.py")), *sorted((PACKAGE / "backends" / "reference").glob("*.py"))]


@pytest.mark.parametrize("file", array_api_files(), ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_array_api_rooms_use_the_standard(file):
    faults = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        modules += [name.name for name in node.names] if isinstance(node, ast.Import) else []
        faults += [f"imports {name}" for name in modules if name.partition(".")[0] in ("numpy", "scipy", *LATE)]
        if isinstance(node, ast.Attribute) and node.attr in ("einsum", "mT", "at"):
            faults.append(f"uses .{node.attr} in line {node.lineno}")
    assert faults == []


# ------------------------------------------------------------------------------------------ mechanisms


def test_there_are_mechanisms():
    assert {kind.__name__ for kind in MECHANISMS} >= {"Linear", "CosFormer", "Softmax"}


@pytest.mark.parametrize("kind", MECHANISMS, ids=lambda kind: kind.__name__)
class TestMechanismIsWhole:
    """A formula, cases, a benchmark and a page: whatever is missing turns this red."""

    def test_formula(self, kind):
        assert kind.__name__ in quadratic.FORMULAS

    def test_case(self, kind):
        cases = importlib.import_module("cases")
        assert any(isinstance(case.attend, kind) for case in cases.CASES)

    def test_benchmark(self, kind):
        sys.path.insert(0, str(ROOT / "asv_bench"))
        try:
            benchmarks = importlib.import_module("benchmarks.attention")
        finally:
            sys.path.pop(0)
        assert any(type(attend) is kind for attend in benchmarks.ATTENDS)

    def test_page(self, kind):
        module = kind.__module__.rpartition(".")[2]
        page = (ROOT / "docs" / "mechanisms" / f"{module}.rst").read_text(encoding="utf-8")
        heads = ("Formula", "As features", "Gradient", "What to know", "Measured", "Differs from", "Source")
        assert [head for head in heads if f"\n{head}" not in page] == []
        assert f"measured/{module}.rst" in page
        listed = (ROOT / "docs" / "mechanisms" / "index.rst").read_text(encoding="utf-8")
        assert f":doc:`{module}`" in listed
        assert f"\n   {module}\n" in listed

    def test_options_are_keyword_only_and_in_one_order(self, kind):
        own = list(inspect.signature(kind).parameters)
        for verb in (kind.__call__, kind.vjp, kind.weights, kind.step, kind.step_vjp, function_of(kind)):
            parameters = inspect.signature(verb).parameters
            options = [name for name in parameters if name in OPTIONS]
            assert options == [name for name in OPTIONS if name in options]
            assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in options)
            assert not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        assert [name for name in inspect.signature(function_of(kind)).parameters if name in own] == own

    def test_repr_is_the_code_that_makes_it(self, kind):
        value = kind()
        assert eval(repr(value), vars(la)) == value
        assert hash(value) == hash(kind())


def function_of(kind):
    """The one-call function beside a mechanism."""
    module = importlib.import_module(kind.__module__)
    functions = [f for name, f in vars(module).items() if inspect.isfunction(f) and name in la.__all__]
    found = [f for f in functions if f"`{kind.__name__}(" in f.__doc__.partition("in one call")[0]]
    assert len(found) == 1
    return found[0]
