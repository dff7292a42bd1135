"""Faults planted in the CUDA kernels, one at a time: the simulated checks must notice each.

`python tests/kernel_faults.py` plants all of them, `python tests/kernel_faults.py NAME` one; the suite plants those
marked `quick`. A fault runs in a process of its own, for some crash and some never end.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import NamedTuple

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import ml_dtypes
import numpy as np
from simulator import Simulator

from linattn import _arrays
from linattn.backends.cupy import linear as room
from linattn.backends.cupy import plan, specs
from linattn.backends.reference import linear as reference

XP = _arrays.namespace(np.ones(1))
SECONDS = 120
TOKENS = 150
OUT = {"float32": 1e-6, "bfloat16": 4e-3}
GRADIENT = {"float32": 2e-6, "bfloat16": 4 * 2**-9}


class Fault(NamedTuple):
    """A text of a kernel file and what takes its place."""

    name: str
    file: str
    text: str
    instead: str
    quick: bool = True


def without(file: str, comment: str, quick: bool = True) -> Fault:
    """No barrier at the line with this comment."""
    return Fault(f"{file}: no barrier, {comment}", file, f"__syncthreads();  // {comment}", "", quick)


FAULTS = (
    without("exact", "the operands are there"),
    without("exact", "the scores are there", quick=False),
    without("exact", "the denominators are there; scores and state have been read", quick=False),
    without("exact", "the product's rows are there"),
    without("exact", "everyone is done with this chunk"),
    Fault("exact: a divergent barrier", "exact", "__syncthreads();  // everyone is done with this chunk",
          "if (tid != 77) __syncthreads();", quick=False),
    Fault("exact: the mask excludes the diagonal", "exact", "if (s <= ty + j * SIDE)", "if (s < ty + j * SIDE)"),
    Fault("exact: masked keys count", "exact", "(!mask || mask[t * p.mask.token])", "true"),
    Fault("exact: rows past the end count", "exact",
          "const bool there = t < last && (", "const bool there = t < last + 8 && ("),
    Fault("exact: rows past the end are written", "exact", "row < C && chunk + row < last;", "row < C;", quick=False),
    Fault("exact: every head starts from the shared cotangent", "exact", "!p.start_once || ", "true || "),
    Fault("exact: cosines alone in the state", "exact", "turned ? turn_b[2 * s + i] : Real(1);",
          "turned ? turn_b[2 * s] : Real(1);"),
    Fault("exact: the denominator of another row", "exact", "p.epilogue == DIVIDE ? den[row] : *at",
          "p.epilogue == DIVIDE ? den[row ^ 1] : *at", quick=False),
    Fault("exact: a row's power of two is not undone", "exact", "if (p.scaled_rows) y *=", "if (false) y *=",
          quick=False),
    Fault("exact: the state's rest is ignored", "exact", "const Real whole = s + low;", "const Real whole = s;",
          quick=False),
    Fault("scan: a segment starts from its own sum too", "scan",
          "if (p.mode != TOTAL) work[j * p.work.segment] = sum + rest;",
          "if (p.mode != TOTAL) work[j * p.work.segment] = sum + rest + own;"),
    Fault("sweep: no wait for copies", "sweep", "wait_for_copies<1>();", ""),
    Fault("sweep: a wait for one copy less", "sweep", "wait_for_copies<1>();", "wait_for_copies<2>();", quick=False),
    without("sweep", "this chunk and its table are there", quick=False),
    without("sweep", "operands and state are ready"),
    without("sweep", "everyone is done with this stage"),
    Fault("sweep: the mask excludes the diagonal", "sweep", "w[u][e] = s <= t ?", "w[u][e] = s < t ?"),
    Fault("sweep: rows past the end and masked ones are phi(0)", "sweep",
          "const bool there = r < n_rows && (!valid || valid[r] != 0.f);", "const bool there = true;"),
    Fault("sweep: lanes of the keys' fragment exchanged", "sweep",
          "r * 16 + lane / 8 % 2 * 8);", "r * 16 + lane / 16 * 8);",
          quick=False),
    Fault("sweep: lanes of the state's fragment exchanged", "sweep",
          "(warp * ROW_TILES + m) * 16 + lane / 8 % 2 * 8);",
          "(warp * ROW_TILES + m) * 16 + lane / 16 * 8);"),
    Fault("sweep: ones are twos", "sweep", "pair_of<T>(1.f, 1.f);", "pair_of<T>(2.f, 2.f);", quick=False),
    Fault("sweep: rows past the end are written", "sweep",
          "if (row0 + r + i < last) *(", "if (row0 + r + i < last + 8) *(",
          quick=False),
    Fault("sweep: the denominator of another row", "sweep", "const float den = acc[TILES - 1][2 * e];",
          "const float den = acc[TILES - 1][0];", quick=False),
    Fault("sweep: the state is not taken up", "sweep", "if (start && (x < X || ONES_)) value", "if (false) value"),
    Fault("sweep: rows written with one pitch, read with another", "sweep", "PITCH = R + 8,", "PITCH = R + 16,"),
    Fault("sweep: zero times NaN", "sweep", "f[0] & ~bad[0], f[1] & ~bad[1]", "f[0], f[1]", quick=False),
    Fault("sweep: what sees NaN stays finite", "sweep", "if (which >> e & 1)", "if (false)", quick=False),
    Fault("sweep: the next chunk's numbers too early", "sweep", "keep(tables + (chunk + 1) % 2 * TABLE, next);",
          "keep(tables + chunk % 2 * TABLE, next);"),
)  # fmt: skip


def check(file: str, sources: dict[str, str]) -> None:
    """Raise AssertionError unless the kernels in `sources` are right: forward, and the exact kernel's backward."""
    if file == "sweep":
        check_call("bfloat16", 64, (2,), sources, turned=False, segments=False, backward=False)
        return
    check_call("float32", 13, (2, 3), sources, turned=True, segments=file == "scan", backward=True)
    check_call("float32", 13, (2,), sources, turned=False, segments=False, backward=False)


def check_call(dtype, d, lead, sources, *, turned, segments, backward):
    rng = np.random.default_rng(7)
    card = plan.Card(64 if segments else 1, 232448, (9, 0))
    plan.SHORTEST = 64 if segments else 512
    lead_kv = (*lead[:-1], 1) if len(lead) > 1 else lead
    stored = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32
    n, kept = TOKENS, 64
    q, k, v, g = (
        rng.normal(size=(*x, n, d)).astype(stored) for x in (lead, lead_kv, lead_kv, lead)
    )  # fmt: skip
    angle = np.linspace(0, np.pi / 2, n)
    turn = np.stack([np.cos(angle), np.sin(angle)], -1).astype("float32")
    sums = abs(rng.normal(size=(*lead_kv, 1 + turned, d, d + 1))).astype("float32")
    state = sums, (1e-3 * sums).astype("float32")
    mask = rng.random((*lead_kv, n)) > 0.3
    options = {"feature_map": "elu1", "span": "past", "turns": (turn, turn) if turned else None, "key_mask": mask}
    options |= {"normalize": True, "eps": "safe", "xp": XP}
    d_state = rng.normal(size=sums.shape).astype("float32")
    wide = [np.asarray(x).astype(float) for x in (q, k, v)]
    phi = [np.where(x > 0, 1 + x, np.exp(np.minimum(x, 0))) for x in wide[:2]]
    right = {**options, "feature_map": "identity", "out": None}
    right["turns"] = tuple(x.astype(float) for x in options["turns"]) if turned else None
    wide_state = tuple(x.astype(float) for x in state)
    want, want_den, want_after = reference.forward(*phi, wide[2], wide_state, **right)
    first = None
    for schedule in (0, 1, 3):
        device = Simulator(card=card, schedule=schedule, sources=sources, slack=1 << 16)
        room.device_of = lambda x, device=device: device
        padded = np.full((*lead, n + kept, d), 7, stored)
        out, den, after = room.forward(q, k, v, state, **options, out=padded[..., :n, :])
        assert np.all(padded[..., n:, :] == 7), "rows past the end are written"
        assert error(out, want) <= OUT[dtype], f"out is off by {error(out, want):.1e}"
        assert error(den, want_den) <= OUT[dtype], "den is off"
        assert error(np.add(*after), np.add(*want_after)) <= 2 * OUT[dtype], "the state is off"
        assert device.conflicts == 0, "rows of shared memory meet in a bank"
        results = [out, den, *after]
        if backward:
            grads = room.backward(g, d_state, q, k, v, state, den, **options, out=None)
            rights = reference.backward(
                g.astype(float), d_state.astype(float), *phi, wide[2], wide_state, want_den, **right
            )
            for got, x, wanted in zip(grads, (*wide[:2], None, None), rights, strict=True):
                wanted = wanted if x is None else wanted * np.exp(np.minimum(x, 0))
                assert error(got, wanted) <= GRADIENT[dtype], f"a gradient is off by {error(got, wanted):.1e}"
            results += grads
        first = first or results
        for x, y in zip(results, first, strict=True):
            assert x.tobytes() == y.tobytes(), "schedules differ"
    if dtype == "bfloat16":
        spoiled = v.copy()
        spoiled[0, 77, 5] = np.nan
        out, *_ = room.forward(q, k, spoiled, state, **{**options, "key_mask": None}, out=None)
        bad = ~np.isfinite(out[0].astype(float))
        assert bad[77:, 5].all(), "what sees NaN is finite"
        assert bad.sum() == n - 77, "NaN reaches what does not see it"


def error(got, want):
    got, want = np.asarray(got).astype(float), np.asarray(want).astype(float)
    size = np.linalg.norm(got - want) / np.linalg.norm(want)
    return size if np.isfinite(size) else np.inf


def planted(fault: Fault) -> dict[str, str]:
    """The fault's file with the fault in it."""
    source = specs.source(fault.file)
    assert source.count(fault.text) >= 1, f"{fault.name}: the text is gone"
    return {fault.file: source.replace(fault.text, fault.instead)}


def judge(name: str) -> None:
    """Print what is noticed of a fault, or of a kernel file as it is."""
    fault = next((fault for fault in FAULTS if fault.name == name), None)
    try:
        check(fault.file if fault else name, planted(fault) if fault else {})
    except AssertionError as noticed:
        print(str(noticed) or "an assertion")


def verdict(name: str) -> str:
    """ "" if nothing was noticed, else what; in a process of its own."""
    try:
        run = subprocess.run(
            [sys.executable, __file__, "--judge", name], capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return "it never ends"
    return f"it crashes ({run.returncode})" if run.returncode else run.stdout.strip()


def main() -> int:
    if sys.argv[1:2] == ["--judge"]:
        judge(sys.argv[2])
        return 0
    missed = 0
    for file in ("exact", "scan", "sweep"):
        said = verdict(file)
        missed += bool(said)
        print(f"{file + ': no fault':60} {said or 'right'}", flush=True)
    for fault in FAULTS:
        if all(name in fault.name for name in sys.argv[1:]):
            said = verdict(fault.name)
            missed += not said
            print(f"{fault.name:60} {said or 'NOT NOTICED'}", flush=True)
    return missed


if __name__ == "__main__":
    sys.exit(main())
