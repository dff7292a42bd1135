"""The CUDA kernels on the host: the same text, built by g++ against sim/host.hpp, behind the interface of a device.

NumPy arrays take the place of CuPy's, so that the whole room runs: plan, launches, kernels.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from linattn.backends.cupy import plan, specs

HERE = Path(__file__).resolve().parent / "sim"
FLAGS = ("-O1", "-std=c++17", "-w", "-fno-strict-aliasing", "-ffp-contract=off", "-shared", "-fPIC")
SCHEDULES = (0, 1, 2, 5)
UNIT = """
extern "C" int sim_sizes() {{ return sizeof(la::Params); }}
extern "C" int sim_run(const la::Params* p, unsigned grid, unsigned block, size_t shared, unsigned schedule) {{
  return sim::launch(grid, block, shared, schedule, [=] {{ {name}(*p); }});
}}
extern "C" unsigned long long sim_conflicts() {{ return sim::conflicts; }}
"""


@cache
def folder() -> Path:
    """Built kernels, kept for the next run under the hash of their text."""
    kept = Path(os.environ.get("LINATTN_SIMULATOR_CACHE", Path(tempfile.gettempdir()) / f"linattn-sim-{os.getuid()}"))
    kept.mkdir(parents=True, exist_ok=True)
    return kept


def unit(instance: specs.Instance, source: str) -> str:
    macros = "".join(f"#define LA_{name} {value}\n" for name, value in instance.macros)
    header = (HERE / "host.hpp").read_text(encoding="utf-8")
    return f"{header}\n{macros}#define LA_NAME {instance.name}\n{source}\n{UNIT.format(name=instance.name)}"


def build(instance: specs.Instance, source: str | None = None) -> ctypes.CDLL:
    """The library of an instance; `source` takes the place of its own text."""
    text = unit(instance, instance.source if source is None else source)
    target = folder() / (hashlib.sha256("".join((text, *FLAGS)).encode()).hexdigest()[:24] + ".so")
    if not target.exists():
        if shutil.which("g++") is None:
            pytest.skip("g++ is not installed")
        made = target.with_suffix(f".{os.getpid()}")
        subprocess.run(["g++", "-x", "c++", *FLAGS, "-", "-o", str(made)], input=text, text=True, check=True)
        made.replace(target)
    return ctypes.CDLL(str(target))


class Simulator:
    """As launch.Device, on the host."""

    def __init__(
        self, *, card: plan.Card | None = None, schedule: int = 0, sources: dict[str, str] | None = None, slack: int = 0
    ):
        self.card = card or plan.Card(1, 232448, (9, 0))
        self.schedule = schedule
        self.sources = sources or {}  # in place of kernel files
        self.slack = slack  # bytes of shared memory beyond those of the plan
        self.launched: list[plan.Launch] = []
        self.conflicts = 0
        self.libraries: dict[specs.Instance, ctypes.CDLL] = {}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def check(self, **arrays):
        return None

    @staticmethod
    def pointer(x: np.ndarray) -> int:
        return x.ctypes.data

    def library(self, instance: specs.Instance) -> ctypes.CDLL:
        if instance not in self.libraries:
            found = self.libraries[instance] = build(instance, self.sources.get(instance.file))
            found.sim_conflicts.restype = ctypes.c_ulonglong
            assert found.sim_sizes() == plan.PARAMS.itemsize
        return self.libraries[instance]

    def run(self, launch: plan.Launch) -> None:
        library = self.library(launch.instance)
        self.launched.append(launch)
        code = library.sim_run(
            ctypes.c_void_p(launch.params.ctypes.data), ctypes.c_uint(launch.grid),
            ctypes.c_uint(launch.instance.threads), ctypes.c_size_t(launch.shared + self.slack),
            ctypes.c_uint(self.schedule),
        )  # fmt: skip
        assert code == 0, f"{launch.instance.name} failed"
        self.conflicts += library.sim_conflicts()
