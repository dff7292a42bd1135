"""The program that checks a GPU: judgement on the simulator, a way out without a card; the same on a card."""

from __future__ import annotations

import numpy as np
import pytest
from simulator import Simulator

from linattn import _arrays
from linattn.backends.cupy import check, launch, linear, plan

XP = _arrays.namespace(np.ones(1))


@pytest.fixture
def simulated(monkeypatch):
    device = Simulator(card=plan.Card(1, 232448, (9, 0)))
    monkeypatch.setattr(linear, "device_of", lambda x: device)


CHEAP = tuple(variant for variant in check.VARIANTS if variant.dtype in ("float32", "float64")) + (
    check.Variant("bfloat16", 64, masked=True),
)


def test_right_kernels_pass(simulated):
    found = check.correct(XP, CHEAP, (1, 65))
    assert found["failures"] == []
    assert len(found["worst"]) == len(CHEAP)
    assert all(0 < x <= 1 for x in found["worst"].values())
    assert check.repeat(XP, CHEAP[1:], n=65) == {"moved": []}


def test_wrong_results_are_failures(simulated, monkeypatch):
    forward = linear.forward

    def wrong(*args, **options):
        out, den, after = forward(*args, **options)
        out[0, 0, -1] = np.nan
        return out, den, after

    monkeypatch.setattr(check.linear, "forward", wrong)
    assert len(check.correct(XP, CHEAP[:1], (9,))["failures"]) >= 1


def test_without_a_card_it_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(launch, "why_not", lambda: "there is no NVIDIA GPU")
    assert check.main(["--out", str(tmp_path / "results")]) == 1
    assert capsys.readouterr().err == "There is nothing to check: there is no NVIDIA GPU.\n"
    assert not (tmp_path / "results").exists()


@pytest.mark.gpu
def test_on_this_card():
    cupy = launch.cupy()
    xp = _arrays.namespace(cupy.ones(1))
    assert check.correct(xp)["failures"] == []
    assert check.repeat(xp) == {"moved": []}
