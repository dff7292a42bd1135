"""The plan of a GPU call: pure Python, without CUDA; bytes moved, segments, which kernel serves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from simulator import Simulator

from linattn import _arrays
from linattn.backends.cupy import linear as room
from linattn.backends.cupy import plan, specs

XP = _arrays.namespace(np.ones(1))
H200 = plan.Card(132, 232448, (9, 0))
SMALL = plan.Card(84, 101376, (8, 6))  # 99 KB of shared memory a block
ROOT = Path(__file__).resolve().parent.parent


class Recorder(Simulator):
    """A device on which nothing runs."""

    def run(self, launch):
        self.launched.append(launch)


def recorded(monkeypatch, card, n, *, heads=16, d=64, normalize=True, feature_map="elu1", dtype=ml_dtypes.bfloat16):
    """The launches of forward and of backward."""
    device = Recorder(card=card)
    monkeypatch.setattr(room, "device_of", lambda x: device)
    q = np.zeros((heads, n, d), dtype)
    state = tuple(np.zeros((heads, 1, d, d + normalize), "float32") for _ in range(2))
    options = {"feature_map": feature_map, "span": "past", "turns": None, "key_mask": None, "eps": "safe"}
    options |= {"normalize": normalize, "out": None, "xp": XP}
    _, den, _ = room.forward(q, q, q, state, **options)
    forward, device.launched = device.launched, []
    room.backward(q, None, q, q, q, state, den, **options)
    return forward, device.launched


def passes(launches, n, heads, d):
    """Bytes of tensors and states moved, in tensors of q's size."""
    moved = 0
    for launch in launches:
        p, mode = launch.params, int(launch.params["mode"])
        if launch.instance.file == "scan":
            segments = int(p["segments"]) + (mode == plan.SWEEP) * (int(p["segments"]) + 1)  # read, and written
            moved += 4 * segments * heads * int(p["width"]) * int(p["columns"])
            continue
        tokens = min(int(p["segments"]) * int(p["segment"]), n)
        reads = (mode != plan.SUMS) + 2 * (mode != plan.APPLY)
        if mode != plan.SUMS:
            chained = p["epilogue"] == plan.CHAIN and p["out_map"] != plan.MAPS["identity"]
            reads += int(p["out"]["data"] != 0) + int(chained or p["epilogue"] == plan.DELTA)
        moved += 2 * reads * heads * tokens * d
        moved += 4 * int(p["segments"]) * heads * int(p["width"]) * int(p["columns"]) * (mode == plan.SUMS)
    return moved / (2 * heads * n * d)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("n, heads, forward_most, backward_most", [(4096, 512, 4.0, 18.0), (65536, 16, 6.5, 23.0)])
def test_tensor_passes(monkeypatch, n, heads, forward_most, backward_most, normalize):
    """4 passes forward when heads fill the chip, 6.5 else; 23 backward."""
    monkeypatch.setattr(np, "empty", np.zeros)  # pages nobody touches cost nothing
    forward, backward = recorded(monkeypatch, H200, n, heads=heads, normalize=normalize)
    assert {launch.instance.file for launch in (*forward, *backward)} <= {"sweep", "scan"}
    assert passes(forward, n, heads, 64) <= forward_most
    assert passes(backward, n, heads, 64) <= backward_most


def test_segments_fill_the_card():
    """As few as fill it, of at least 512 tokens, a multiple of the chunk; from shapes alone."""
    assert plan.segments(16, 65536, 64, H200) == (25, 2624)
    assert plan.segments(198, 65536, 64, H200) == (1, 65536)
    assert plan.segments(16, 700, 64, H200) == (1, 704)
    for blocks in (1, 7, 50, 197):
        for tokens in (512, 1000, 4097, 131072):
            number, length = plan.segments(blocks, tokens, 64, H200)
            assert length % 64 == 0
            assert (number - 1) * length < tokens <= number * length
            assert number == 1 or length >= plan.SHORTEST


def test_a_card_with_little_shared_memory_gets_the_exact_kernel(monkeypatch):
    for card, file in ((H200, "sweep"), (SMALL, "exact")):
        forward, _ = recorded(monkeypatch, card, 256, d=128)
        assert forward[0].instance.file == file
        assert all(launch.shared <= card.shared for launch in forward)


def test_an_old_card_gets_the_reference(monkeypatch):
    assert recorded(monkeypatch, plan.Card(80, 98304, (7, 0)), 256) == ([], [])


@pytest.mark.parametrize(
    "change",
    [
        lambda q: np.zeros((16, 64, 256), q.dtype).swapaxes(1, 2),  # columns are not contiguous
        lambda q: np.zeros((16, 256, 65), q.dtype)[..., :64],  # rows begin off 16 bytes
        lambda q: np.zeros((16, 257, 64), q.dtype).reshape(-1)[1 : 1 + 16 * 256 * 64].reshape(16, 256, 64),
    ],
)
def test_what_the_tensor_core_cannot_load_goes_the_exact_way(monkeypatch, change):
    device = Recorder(card=H200)
    monkeypatch.setattr(room, "device_of", lambda x: device)
    q = np.zeros((16, 256, 64), ml_dtypes.bfloat16)
    state = tuple(np.zeros((16, 1, 64, 65), "float32") for _ in range(2))
    options = {"feature_map": "relu", "span": "past", "turns": None, "key_mask": None, "eps": "safe"}
    room.forward(q, change(q), q, state, **options, normalize=True, out=None, xp=XP)
    assert device.launched[0].instance.file == "exact"


def test_the_plan_is_the_same_every_time(monkeypatch):
    """Nothing of it is measured."""
    first, second = (recorded(monkeypatch, H200, 5000, heads=3)[0] for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert one[:3] == other[:3]


def test_every_instance_has_a_budget():
    table = json.loads((ROOT / "tests" / "data" / "kernel_budgets.json").read_text(encoding="utf-8"))
    assert set(table) == {instance.name for instance in specs.INSTANCES}
    for row in table.values():
        assert set(row) == {"sm_80", "sm_90", "sm_100"}


def test_every_planned_instance_is_listed():
    """Whatever a plan may choose stands in the list that is compiled."""
    known = set(specs.INSTANCES)
    for dtype in specs.STORED:
        for width in (16, 64, 128):
            for n_sums in (1, 2):
                for normalize in (False, True):
                    for tokens in (1, 1000):
                        sizes = plan.Sizes(1, tokens, tokens, width, 64, n_sums, normalize)
                        found = [plan.exact_kernel(dtype, sizes, H200), plan.sweep_kernel(dtype, sizes, False, H200)]
                        wider = plan.Sizes(1, tokens, tokens, width + 1, 64, n_sums, False)
                        found.append(plan.sweep_kernel(dtype, wider, True, H200))
                        assert {i for kernel in found if kernel for i, _ in kernel.modes} <= known


def test_plan_and_specs_need_no_cuda():
    code = (
        "import sys, linattn.backends.cupy.linear, linattn.backends.cupy.product\n"
        "sys.exit(any(name.partition('.')[0] in ('cupy', 'torch', 'cuda') for name in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ})


def test_sources_are_package_data():
    for file, headers in specs.HEADERS.items():
        assert specs.text(f"{file}.cu")
        for header in headers:
            assert specs.text(f"{header}.cuh") in specs.source(file)
