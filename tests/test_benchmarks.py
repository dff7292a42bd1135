"""The benchmark against peers times only what is right: its contenders agree with the definition, and it can tell."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from asv_bench.peers import contenders, limits, report, timing  # noqa: E402

TOKENS, CHANNELS = 128, 64  # fewer channels leave relu rows without weight, which peers divide by


@pytest.mark.parametrize("computes", ["linear", "cosformer", "softmax"])
def test_every_contender_agrees(computes):
    *args, d_out = timing.draw(2, TOKENS, CHANNELS)
    first, names = [], []
    for one in contenders.contenders(TOKENS, computes):
        forward, both = one.make(*args, d_out)
        grads = [np.array(x) for x in both()]
        first = first or grads
        assert timing.disagreement(forward(), grads, computes, TOKENS, args, first) == ""
        names.append(one.name)
    assert names[:2] == ["linattn", "linattn, out="]


def test_a_wrong_contender_is_told():
    *args, d_out = timing.draw(2, TOKENS, CHANNELS)
    right = contenders.ours(contenders.la.Linear("relu"), reuse=False)
    wrong = contenders.ours(contenders.la.Linear("elu1"), reuse=False)
    out, grads = right(*args, d_out)[0](), [np.array(x) for x in right(*args, d_out)[1]()]
    told = timing.disagreement(wrong(*args, d_out)[0](), [], "linear", TOKENS, args, grads)
    assert told.startswith("out is off")
    bad = [grads[0], grads[1] * np.float32(1.01), grads[2]]
    assert timing.disagreement(out, bad, "linear", TOKENS, args, grads).startswith("d_k is off")
    out[0, 3, 1] = np.nan
    assert timing.disagreement(out, grads, "linear", TOKENS, args, grads).startswith("out is off")


def test_rounds_rotate_and_medians_are_taken():
    order, now = [], iter(range(10**6))
    jobs = {name: (lambda name=name: order.append(name)) for name in "abc"}
    found = timing.medians(jobs, 0, clock=lambda: next(now), least=3)
    assert found == dict.fromkeys("abc", 1)
    assert sorted(order) == sorted("abc" * 3)
    assert {order[0], order[3], order[6]} == set("abc")


def test_the_peak_counts_its_operations():
    job, flops = limits.peak_job(count=100)
    job()
    lanes = limits.TILE.lanes(4)
    assert flops == 2 * 100 * limits.TIMES * limits.CHAINS * lanes


def test_the_report_has_every_figure():
    row = {"computes": "linear", "tokens": 512, "name": "linattn", "fault": "", "forward": 0.25, "both": 0.5}
    bad = {"computes": "linear", "tokens": 512, "name": "peer", "fault": "out is off by 1e-2"}
    page = report.report_as_rst(
        {
            "lengths": [row, {**row, "name": "other", "forward": 0.75}, bad],
            "memory": [{"name": "linattn", "job": job, "over one input": 1.25} for job in ("forward", "both")],
            "step": {"linattn": 61.4},
            "step profile": {"compiled kernel": 17.4},
            "peak": {"linear, cache, forward": 0.615},
            "costs": {"compensated": 1.304, "fresh pages": 377.4, "pages in use": 20.9},
            "threads": {"8 heads": 1.875},
            "long": {"ours": 1.5, "softmax at 8192": 2.5, "ratio": 427.0},
            "missing": ["fast-transformers (No module)"],
            "versions": {"numpy": "2.4"},
            "machine": "x",
        }
    )
    for figure in (
        "750 (3.00)",
        "not timed: out is off by 1e-2",
        "1.25",
        "61",
        "17",
        "62%",
        "1.30 times what plain",
        "377 ns into fresh",
        "1.88",
        "427 times",
        "numpy 2.4",
    ):
        assert figure in page


def test_the_command_explains_itself():
    done = subprocess.run(
        [sys.executable, "-m", "asv_bench.peers", "--help"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert "--seconds" in done.stdout
