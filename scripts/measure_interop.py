"""Measure what the pages of other frameworks say: times and bytes, written to docs/measured.

    python scripts/measure_interop.py [operator] [training] [ranks]
    python scripts/measure_interop.py models          # half an hour of training, in runs/ or where LINATTN_RUNS says

Each program runs in a process of its own with one thread, the ones that are compared one after the other in turn; the
best of their rounds counts. Needs torch, and for `ranks` mpi4py and mpiexec.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "LINATTN_NUM_THREADS")
for variable in THREADS:
    os.environ.setdefault(variable, "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import numpy as np  # after the number of threads is set

import linattn as la

FOLDER = ROOT / "docs" / "measured"
CALLS, ROUNDS = 200, 15
SMALL = (2, 8, 16)  # heads, tokens, channels: what is left is the way to the kernel
LENGTH, WIDTH, HEADS, LAYERS, STEPS, TRAINING_ROUNDS = 4096, 128, 4, 3, 3, 1
TRAINED = ("sdpa", "softmax", "elu1", "relu", "cosformer", "performer", "lln", "lln_diag")
TOKENS = 131072
RANKED = [la.Linear("elu1"), la.CosFormer(TOKENS), la.LLN(alpha=1.0, beta=1.0)]
RANK_SHAPE = (2, 64)  # heads, channels
RANK_ROUNDS = 4


def best(run: Callable[[], Any], calls: int, rounds: int, clock: Callable[[], float] = time.process_time) -> float:
    """Seconds a call; of the processor, so that neighbours on the machine count little."""
    run()
    found = float("inf")
    for _ in range(rounds):
        start = clock()
        for _ in range(calls):
            run()
        found = min(found, (clock() - start) / calls)
    return found


def table(title: str, head: list[str], rows: list[list[str]]) -> str:
    lines = [f".. list-table:: {title}", "   :header-rows: 1", ""]
    for row in [head, *rows]:
        lines += [f"   {'* -' if i == 0 else '  -'} {cell}" for i, cell in enumerate(row)]
    return "\n".join(lines) + "\n"


def write(name: str, text: str) -> None:
    (FOLDER / f"{name}.rst").write_text(
        f".. Written by scripts/measure_interop.py; not by hand.\n\n{text}", encoding="utf-8"
    )
    print(text)


def child(what: str, argument: str, before: tuple[str, ...] = ()) -> dict[str, Any]:
    done = subprocess.run(
        [*before, sys.executable, __file__, f"--{what}", argument], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


# -- the operator ------------------------------------------------------------------------------------------------


def operator() -> None:
    import torch

    from linattn.interop.torch import attention

    rows = []
    for attend in (la.Linear("elu1"), la.CosFormer(64), la.Softmax(), la.Performer(16), la.LLN(alpha=0.8, beta=0.6)):
        arrays = np.random.default_rng(0).normal(size=(3, *SMALL)).astype("float32")
        tensors = [torch.from_numpy(x) for x in arrays]
        leaves = [x.clone().requires_grad_() for x in tensors]
        runs = {
            "plain": lambda a=attend, x=arrays: a(*x, causal=True),
            "operator": lambda a=attend, x=tensors: attention(*x, a, causal=True),
            "with grad": lambda a=attend, x=leaves: attention(*x, a, causal=True),
        }
        us = dict.fromkeys(runs, float("inf"))
        for _ in range(ROUNDS):  # in turn, so that a busy moment meets all alike
            for name, run in runs.items():
                us[name] = min(us[name], 1e6 * best(run, CALLS, 1))
        extra = [f"{us[name] - us['plain']:.0f}" for name in ("operator", "with grad")]
        rows.append([f"``{attend!r}``", f"{us['plain']:.0f}", *extra])
    title = (
        f"Microseconds of processor time of a plain call on {SMALL[1]} tokens, and what the torch operator adds: "
        "without and with a gradient to come. One thread, on a machine with other work."
    )
    write("operator", table(title, ["mechanism", "plain call", "operator adds", "with grad"], rows))


# -- a training step ---------------------------------------------------------------------------------------------


def train_child(name: str) -> None:
    import torch
    from char_lm import Characters, cross_entropy
    from training import Model

    torch.set_num_threads(1)
    data = Characters((ROOT / "examples" / "data" / "paradise_lost.txt").read_text(encoding="utf-8"))
    torch.manual_seed(0)
    model = Model(name, len(data.alphabet), LENGTH, WIDTH, HEADS, LAYERS)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    x, y = data.batch(0, 1, LENGTH)

    def step(n: int = LENGTH) -> None:
        optimizer.zero_grad()
        cross_entropy(model(x[:, :n]), y[:, :n]).backward()
        optimizer.step()

    step(LENGTH // 64)  # libraries are loaded, kernels compiled, the optimizer's moments made
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = best(step, 1, STEPS)
    print(json.dumps({"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - loaded}))


def training() -> None:
    found: dict[str, dict[str, float]] = {}
    for _ in range(TRAINING_ROUNDS):
        for name in TRAINED:
            came = child("train", name)
            kept = found.setdefault(name, came)
            kept["seconds"] = min(kept["seconds"], came["seconds"])
            kept["peak"] = max(kept["peak"], came["peak"])
    sdpa = found["sdpa"]
    rows = [
        [
            f"``{name}``", f"{1000 * x['seconds']:.0f}", f"{sdpa['seconds'] / x['seconds']:.1f}",
            f"{x['peak'] / 1024:.0f}",
        ]
        for name, x in found.items()
    ]  # fmt: skip
    title = (
        f"A training step of the character model on {LENGTH} characters ({LAYERS} layers of {HEADS} heads, width "
        f"{WIDTH}, float32, one thread): processor time; ``sdpa`` is torch's own attention."
    )
    write(
        "training", table(title, ["mechanism", "milliseconds", "times faster than sdpa", "memory of a step, MiB"], rows)
    )


# -- ranks ---------------------------------------------------------------------------------------------------------


def rank_child(which: str) -> None:
    from mpi4py import MPI

    from linattn import distributed

    class Clocked(distributed.MPIComm):
        waited = 0.0

        def _allgather(self, x: np.ndarray) -> np.ndarray:
            start = time.process_time()  # MPI waits by asking again and again
            rows = super()._allgather(x)
            self.waited += time.process_time() - start
            return rows

    attend, comm = RANKED[int(which)], Clocked()
    heads, channels = RANK_SHAPE
    n = TOKENS // comm.size
    q, k, v, d_out = np.random.default_rng(comm.rank).normal(size=(4, heads, n, channels)).astype("float32")

    def run() -> None:
        _, backward = distributed.vjp(q, k, v, attend, comm, causal=True)
        backward(d_out)

    run()
    sent, held, found = comm.bytes_sent, comm.bytes_received, {"wall": float("inf"), "work": float("inf")}
    for _ in range(RANK_ROUNDS):
        comm.waited, start, wall = 0.0, time.process_time(), time.perf_counter()
        run()
        work = time.process_time() - start - comm.waited
        found["work"] = min(found["work"], MPI.COMM_WORLD.allreduce(work, MPI.MAX))
        found["wall"] = min(found["wall"], time.perf_counter() - wall)
    if comm.rank == 0:
        print(json.dumps({**found, "bytes": sent, "held": held}))


def ranks() -> None:
    mpiexec = Path(sysconfig.get_path("scripts")) / "mpiexec"
    start = str(mpiexec) if mpiexec.exists() else "mpiexec"
    rows = []
    for i, attend in enumerate(RANKED):
        one, two = (child("rank", str(i), (start, "-n", str(size))) for size in (1, 2))
        seconds = [f"{x[what]:.2f}" for what in ("wall", "work") for x in (one, two)]
        ratios = [f"{one[what] / two[what]:.2f}" for what in ("wall", "work")]
        rows.append([f"``{attend!r}``", *seconds[:2], ratios[0], *seconds[2:], ratios[1], f"{two['bytes'] / 1024:.0f}"])
    title = (
        f"Forward and backward over {TOKENS} tokens ({RANK_SHAPE[0]} heads, {RANK_SHAPE[1]} channels, causal, float32, "
        "one thread a rank) on one machine of two cores: seconds by the clock, processor seconds of the busiest rank "
        "without its waiting, and kibibytes that a rank sends. The machine had other work."
    )
    head = ["mechanism", "1 rank", "2 ranks", "ratio", "work of 1", "busiest of 2", "ratio", "sent"]
    write("ranks", table(title, head, rows))


# -- trained models --------------------------------------------------------------------------------------------------

CHARACTERS = {"steps": 300, "length": 256, "batch": 16, "width": 128, "heads": 4, "layers": 3}
TASKS = {"lengths": (32, 64), "steps": 300, "batch": 32, "width": 64, "heads": 4, "layers": 2}
KEPT = 10  # steps from one kept row of a history to the next


def flags(size: dict[str, Any]) -> list[str]:
    found = []
    for name, value in size.items():
        found += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return found


def models() -> None:
    """Tables and a picture from the examples' own results; a run that is there goes on where it stands."""
    import char_lm
    import long_range

    runs = Path(os.environ.get("LINATTN_RUNS", ROOT / "runs"))
    characters, tasks = runs / "char", runs / "long"
    char_lm.main(["--out", str(characters), "--no-plot", *flags(CHARACTERS)])
    if not (tasks / "results.json").exists():
        long_range.main(["--out", str(tasks), *flags(TASKS)])
    found = json.loads((characters / "results.json").read_text(encoding="utf-8"))
    unigram = found.pop("unigram")
    char_lm.plot(found, unigram, FOLDER / "char_lm.png")
    kept = {name: {"bits": x["bits"], "history": x["history"][KEPT - 1 :: KEPT]} for name, x in found.items()}
    record = {"size": CHARACTERS, "unigram": unigram, **kept}
    (FOLDER / "char_lm.json").write_text(json.dumps(record), encoding="utf-8")
    size = CHARACTERS
    title = (
        f"Bits a character on the held-out end of the poem after {size['steps']} steps of {size['batch']} pieces of "
        f"{size['length']} characters: {size['layers']} layers of {size['heads']} heads, width {size['width']}, one "
        f"run each from the same weights. A model of single characters has {unigram:.2f}."
    )
    write("char_lm", table(title, ["mechanism", "bits"], [[f"``{n}``", f"{x['bits']:.2f}"] for n, x in found.items()]))
    record = json.loads((tasks / "results.json").read_text(encoding="utf-8"))
    (FOLDER / "long_range.json").write_text(json.dumps(record), encoding="utf-8")
    size, rows = record["size"], record["results"]
    columns = list(dict.fromkeys((row["task"], row["length"]) for row in rows))
    share = {(row["mechanism"], row["task"], row["length"]): row["accuracy"] for row in rows}
    lines = [
        [f"``{name}``", *(f"{share[name, *column]:.2f}" for column in columns)]
        for name in dict.fromkeys(row["mechanism"] for row in rows)
    ]
    title = (
        f"Accuracy on 256 unseen sequences after {size['steps']} steps of {size['batch']} sequences ({size['layers']} "
        f"layers of {size['heads']} heads, width {size['width']}), one run each; guessing has 0.10."
    )
    write("long_range", table(title, ["mechanism", *(f"{task}, {n} tokens" for task, n in columns)], lines))


if __name__ == "__main__":
    children = {"--train": train_child, "--rank": rank_child}
    if sys.argv[1:] and sys.argv[1] in children:
        children[sys.argv[1]](sys.argv[2])
    else:
        for what in sys.argv[1:] or ("operator", "training", "ranks"):
            {"operator": operator, "training": training, "ranks": ranks, "models": models}[what]()
