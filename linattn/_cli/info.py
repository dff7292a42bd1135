"""`python -m linattn info`: what is installed, which backends run and why one does not, and on what machine."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np

import linattn
from linattn import _checks, backends
from linattn._cli.compare import ENGINES

if TYPE_CHECKING:
    from rich.console import Console

REQUIRED = ("numpy", "numba", "array-api-compat", "array-api-extra", "rich")
OPTIONAL = ("scipy", "matplotlib", "torch", "jax", "cupy-cuda13x", "cupy-cuda12x", "mpi4py", "ml_dtypes")
THREAD_VARIABLES = (
    "LINATTN_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMBA_NUM_THREADS",
)


def versions() -> dict[str, str]:
    """Of Python, of this package and of what it can use; what is not installed is left out."""
    own = {"python": platform.python_version(), "linattn": linattn.__version__}
    return own | versions_of(*REQUIRED, *OPTIONAL)


def versions_of(*names: str) -> dict[str, str]:
    """Those of packages by name that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def rooms() -> list[tuple[str, str, str]]:
    """(backend, engines it has, why others are missing)."""
    found = []
    for room in _checks.BACKENDS:
        engines = sorted({engine for those in ENGINES.values() for engine in those})
        loaded = {engine: backends.load(room, engine) for engine in engines}
        there = [engine for engine, module in loaded.items() if not isinstance(module, str)]
        reasons = dict.fromkeys(reason for reason in loaded.values() if isinstance(reason, str))
        found.append((room, ", ".join(there) or "none", "; ".join(reasons)))
    return found


def numpy_build() -> dict[str, Any]:
    """NumPy's own account of the vector units it found and of its BLAS."""
    config: Any = np.show_config(mode="dicts")
    simd, blas = config.get("SIMD Extensions", {}), config.get("Build Dependencies", {}).get("blas", {})
    return {
        "vector units": ", ".join([*simd.get("baseline", []), *simd.get("found", [])]) or "not known",
        "BLAS": f"{blas.get('name', 'not known')} {blas.get('version', '')}".strip(),
    }


def processor() -> str:
    """The processor's name, as far as the system tells."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cores() -> str:
    """How many this process may use, and how many there are."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{usable} usable of {os.cpu_count()}"


def threads() -> dict[str, str]:
    """The variables that limit threads, and what the BLAS really uses where threadpoolctl can tell."""
    found = {name: os.environ.get(name, "not set") for name in THREAD_VARIABLES}
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return found
    for pool in threadpool_info():
        found[f"{pool['internal_api']} threads now"] = str(pool["num_threads"])
    return found


def facts() -> dict[str, dict[str, str]]:
    """{heading: {name: what}}."""
    missing = {name: "not installed" for name in OPTIONAL if name not in versions()}
    numba_room = backends.load("numba", "linear")
    kernels = {}
    if not isinstance(numba_room, str):
        from linattn.backends import numba

        kernels = numba.describe()
    return {
        "Versions": {**versions(), **missing},
        "Backends": {room: there + (f" ({reasons})" if reasons else "") for room, there, reasons in rooms()},
        "Processor": {"name": processor(), "machine": platform.machine(), "cores": cores(), **numpy_build()},
        "Threads": threads(),
        "Compiled kernels": {"LINATTN_NUMBA_CACHE": os.environ.get("LINATTN_NUMBA_CACHE", "not set"), **kernels},
    }


def show(console: Console) -> None:
    """Print it, a table a heading."""
    from rich.table import Table
    from rich.text import Text

    for heading, lines in facts().items():
        table = Table(title=heading, title_justify="left", show_header=False, box=None, pad_edge=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, what in lines.items():
            table.add_row(Text(name), Text(what))
        console.print(table)
        console.print()
