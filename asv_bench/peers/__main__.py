"""`python -m asv_bench.peers [--seconds S] [--out FOLDER]`: measure, print, and keep."""

from __future__ import annotations

import os

if __name__ == "__main__":  # before NumPy, torch and JAX start their threads
    for name in ("OPENBLAS", "OMP", "MKL", "LINATTN"):
        os.environ[f"{name}_NUM_THREADS"] = "1"
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np

import linattn as la
from asv_bench.peers import limits, memory, steps
from asv_bench.peers.contenders import contenders, missing
from asv_bench.peers.report import draw_lengths, report_as_rst
from asv_bench.peers.timing import disagreement, draw, medians
from linattn._cli import info

HEADS, CHANNELS = 8, 64
LENGTHS = {"linear": (512, 2048, 8192), "cosformer": (2048, 8192), "softmax": (512, 2048, 8192)}
LONG = 131072
BACKWARD = {"softmax": 2048}  # the longest sequence whose backward is timed: half a minute a round otherwise


def lengths(seconds: float) -> list[dict[str, Any]]:
    """Forward, and forward with backward, of every contender at every length; one thread, CPU time."""
    rows = []
    share = seconds / sum(map(len, LENGTHS.values()))
    peak, flops = limits.peak_job()
    copy, n_bytes = limits.copy_job()
    for computes, sizes in LENGTHS.items():
        for n_tokens in sizes:
            args = draw(HEADS, n_tokens, CHANNELS)
            jobs: dict[Any, Any] = {("limits", "peak"): peak, ("limits", "copy"): copy}
            timed = ("forward", "both") if n_tokens <= BACKWARD.get(computes, n_tokens) else ("forward",)
            first, wrong = None, {}
            for one in contenders(n_tokens, computes):
                pair = one.make(*args)
                grads = [np.array(x) for x in pair[1]()] if "both" in timed else []
                first = first or grads
                wrong[one.name] = disagreement(pair[0](), grads, computes, n_tokens, args[:3], first)
                if not wrong[one.name]:
                    jobs |= {(one.name, job): run for job, run in zip(timed, pair, strict=False)}
            found = medians(jobs, share, clock=time.process_time)
            rate = flops / found["limits", "peak"]
            for name, fault in wrong.items():
                row = {"computes": computes, "tokens": n_tokens, "name": name, "fault": fault}
                if not fault:
                    row |= {job: found[name, job] for job in timed}
                    row |= {"peak": rate, "copy": n_bytes / found["limits", "copy"]}
                rows.append(row)
            show(rows[-len(wrong) :])
    return rows


def flops_of(row: dict[str, Any], job: str) -> float:
    """The recurrence's operations: a token's 4 d^2 forward and 12 d^2 backward, cosFormer's twice."""
    each = {"linear": 1, "cosformer": 2}[row["computes"]] * CHANNELS**2
    return HEADS * row["tokens"] * each * (4 if job == "forward" else 16)


def show(rows: list[dict[str, Any]]) -> None:
    ours = rows[0]
    print(f"\n{ours['computes']}, {ours['tokens']} tokens, {HEADS} heads, {CHANNELS} channels: ns a token, and x ours")
    for row in rows:
        if row["fault"]:
            print(f"  {row['name']:22} not timed: {row['fault']}")
            continue
        jobs = [job for job in ("forward", "both") if job in row]
        cells = [f"{row[job] / HEADS / row['tokens'] * 1e9:9.0f} x{row[job] / ours[job]:6.2f}" for job in jobs]
        share = ""
        if row["computes"] != "softmax" and row["name"].startswith("linattn"):
            share = "   of the peak: " + ", ".join(
                f"{flops_of(row, job) / row[job] / row['peak']:.0%}" for job in ("forward", "both")
            )
        print(f"  {row['name']:22}{'  '.join(cells)}{share}", flush=True)


def in_cache(seconds: float) -> dict[str, float]:
    """Shares of one core's multiply-add peak: one head again and again, so from cache; and from memory. Medians."""
    peak, flops = limits.peak_job()
    jobs: dict[Any, Any] = {"peak": peak}
    work = {}
    d, r = CHANNELS, 256
    # operations a token; Performer's projections are in float64, whose operations count twice
    mechanisms = {
        "linear": (la.Linear("relu"), 4 * d * d, 12 * d * d),
        "cosFormer": (la.CosFormer(length=2**14), 8 * d * d, 24 * d * d),
        "LLN": (la.LLN(alpha=2.2, beta=2.2), 4 * d * d, 12 * d * d),
        "Performer, 256 features": (la.Performer(r), (4 + 8) * r * d, (12 + 16) * r * d),
    }
    for name, (attend, forward, backward) in mechanisms.items():
        for where, heads, n_tokens, times in (("cache", 1, 2048, 12), ("memory", 8, 8192, 1)):
            *args, d_out = draw(heads, n_tokens, d)
            out, grads = np.empty_like(args[2]), tuple(np.empty_like(x) for x in args)
            back = attend.vjp(*args, causal=True)[1]

            def once(a=attend, x=args, o=out):
                a(*x, causal=True, out=o)

            def back_once(b=back, g=d_out, o=grads):
                b(g, out=o)

            for job, run, each in (("forward", once, forward), ("backward", back_once, backward)):
                jobs[name, where, job] = lambda run=run, times=times: [run() for _ in range(times)]
                work[name, where, job] = times * heads * n_tokens * each
    found = medians(jobs, seconds, clock=time.process_time, least=5)
    rate = flops / found["peak"]
    return {", ".join(key): n / found[key] / rate for key, n in work.items()}


def costs(seconds: float) -> dict[str, float]:
    """The sweep with a compensated state over the sweep with plain sums; nanoseconds to write 256 bytes of a result."""
    pages, n_bytes = limits.page_jobs()
    found = medians(limits.state_jobs() | pages, seconds, clock=time.process_time, least=20)
    row = {name: found[name] / n_bytes * 256 * 1e9 for name in pages}
    return {"compensated": found["compensated"] / found["plain"]} | row


def threads(seconds: float) -> dict[str, float]:
    """How many times faster two threads are than one; wall time, so it asks for a quiet machine."""
    ratios = {}
    for heads, n_tokens in ((8, 2048), (2, 4096), (1, 16384)):
        *args, d_out = draw(heads, n_tokens, CHANNELS)
        out, grads = np.empty_like(args[2]), tuple(np.empty_like(x) for x in args)
        attend = la.Linear("relu")

        def job(n, attend=attend, args=args, out=out, d_out=d_out, grads=grads):
            with la.threads(n):
                attend.vjp(*args, causal=True, out=out)[1](d_out, out=grads)

        jobs = {n: (lambda n=n, job=job: job(n)) for n in (1, 2)}
        found = medians(jobs, seconds / 3, clock=time.perf_counter)
        ratios[f"{heads} heads, {n_tokens} tokens"] = found[1] / found[2]
    return ratios


def long_sequence() -> dict[str, float]:
    """Ours at LONG tokens; exact softmax by torch at 8192, grown by the square of the length."""
    import torch

    q, k, v = draw(HEADS, LONG, CHANNELS, 3)
    attend, out = la.Linear("relu"), np.empty_like(v)
    short = [torch.from_numpy(x[None, :, :8192].copy()) for x in (q, k, v)]
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def theirs():
        with torch.no_grad():
            sdpa(*short, is_causal=True)

    attend(q[:, :64], k[:, :64], v[:, :64], causal=True)
    jobs = {"ours": lambda: attend(q, k, v, causal=True, out=out), "softmax": theirs}
    found = medians(jobs, 0, clock=time.process_time, least=3)
    grown = found["softmax"] * (LONG / 8192) ** 2
    return {"ours": found["ours"], "softmax at 8192": found["softmax"], "ratio": grown / found["ours"]}


def memory_table() -> list[dict[str, Any]]:
    rows = []
    names = [c.name for c in contenders(8192, "linear")]
    for name in names:
        for job in memory.JOBS:
            peak = memory.measured("linear", name, 8192, job)
            if peak is not None:
                size = 4 * HEADS * 8192 * CHANNELS
                rows.append({"name": name, "job": job, "bytes": peak, "over one input": peak / size})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m asv_bench.peers", description=__doc__)
    parser.add_argument("--seconds", type=float, default=120, help="for the timed rounds")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write peers.json, peers.rst and peers.png there")
    options = parser.parse_args()
    s = options.seconds
    try:
        import torch

        torch.set_num_threads(1)
    except ImportError:
        torch = None
    report: dict[str, Any] = {
        "machine": f"{platform.machine()}, {info.processor()}",
        "versions": info.versions() | info.versions_of("pytorch-fast-transformers", "performer-pytorch"),
        "lengths": lengths(0.7 * s),
        "step": steps.measure_steps(0.05 * s),
        "step profile": steps.step_profile(0.02 * s),
        "peak": in_cache(0.1 * s),
        "costs": costs(0.03 * s),
        "threads": threads(0.15 * s),
        "memory": memory_table(),
        "long": long_sequence() if torch else {},
        "missing": missing,
    }
    for name in ("step", "step profile", "peak", "costs", "threads", "long"):
        print(f"\n{name}: " + ", ".join(f"{key} {value:.3g}" for key, value in report[name].items()))
    print("\npeak memory at 8192 tokens, in sizes of one input:")
    for row in report["memory"]:
        print(f"  {row['name']:22}{row['job']:10}{row['over one input']:6.2f}")
    if missing:
        print("\nnot installed, left out: " + "; ".join(missing))
    if options.out:
        (options.out / "peers.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (options.out / "peers.rst").write_text(report_as_rst(report), encoding="utf-8")
        draw_lengths(report["lengths"], options.out / "peers.png")


if __name__ == "__main__":
    main()
