"""What fresh memory costs a training loop, and how `out=` saves it.

A result of a few megabytes comes from the operating system page by page, and each page is cleared when it is first
written: for long sequences that takes longer than the attention. A loop that hands its last results back pays once.

    python examples/reused_results.py [--small] [--out FILE.png]
"""

from __future__ import annotations

import argparse
import time

import numpy as np

import linattn as la

HEADS, CHANNELS = 8, 64


def fresh_loop(attend, q, k, v, n_steps):
    """Every step makes out, d_q, d_k and d_v anew."""
    for _ in range(n_steps):
        out, backward = attend.vjp(q, k, v, causal=True)
        grads = backward(out)  # of |out|^2 / 2
    return out, *grads


def reusing_loop(attend, q, k, v, n_steps):
    """The same, into arrays that are kept."""
    out, grads = np.empty_like(v), tuple(np.empty_like(x) for x in (q, k, v))
    for _ in range(n_steps):
        _, backward = attend.vjp(q, k, v, causal=True, out=out)
        backward(out, out=grads)
    return out, *grads


def measure(lengths, n_steps, n_rounds):
    """Medians of the times of a step in milliseconds: {loop: [one per length]}; the results are the same bits."""
    attend, loops = la.Linear("elu1"), {"fresh results": fresh_loop, "reused results": reusing_loop}
    found = {name: [] for name in loops}
    for n_tokens in lengths:
        q, k, v = np.random.default_rng(0).normal(size=(3, HEADS, n_tokens, CHANNELS)).astype("float32")
        times, results = {name: [] for name in loops}, {}
        for _ in range(n_rounds):
            for name, loop in loops.items():
                start = time.perf_counter()
                results[name] = loop(attend, q, k, v, n_steps)
                times[name].append((time.perf_counter() - start) / n_steps * 1e3)
        same = all(np.array_equal(a, b) for a, b in zip(*results.values(), strict=True))
        if not same:
            raise SystemExit("the loops disagree")
        for name, some in times.items():
            found[name].append(float(np.median(some)))
    return found


def show(found, lengths):
    print(f"milliseconds a step (forward and backward), {HEADS} heads, {CHANNELS} channels, float32, causal")
    print(f"{'tokens':16}" + "".join(f"{n:>9d}" for n in lengths))
    for name, row in found.items():
        print(f"{name:16}" + "".join(f"{x:9.3g}" for x in row))
    ratio = [a / b for a, b in zip(*found.values(), strict=True)]
    print(f"{'ratio':16}" + "".join(f"{x:9.3g}" for x in ratio))


def draw(found, lengths, path):
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, row in found.items():
        axis.loglog(lengths, row, marker="o", label=name)
    axis.set(xlabel="tokens", ylabel="milliseconds a step")
    axis.legend()
    axis.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="short sequences, few rounds")
    parser.add_argument("--out", metavar="FILE.png", help="draw the figure")
    arguments = parser.parse_args()
    lengths = (256, 512, 1024) if arguments.small else (512, 2048, 8192, 32768)
    found = measure(lengths, n_steps=3, n_rounds=3 if arguments.small else 7)
    show(found, lengths)
    if arguments.out:
        draw(found, lengths, arguments.out)


if __name__ == "__main__":
    main()
