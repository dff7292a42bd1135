"""Combiner's patterns: what a query meets by itself and through regions, and the weights that come of it.

For each pattern the table counts the pairs that a forward computes, beside those of exact softmax, and says how close
its weights come to softmax's on Gaussian data. The picture shows for every query (rows) and key (columns) how it is met
and the weights of a head.

    python examples/combiner_patterns.py [--small] [--out FILE.png]
"""

from __future__ import annotations

import argparse

import numpy as np

import linattn as la

PATTERNS = ("fixed", "logsparse", "axial_vertical", "axial_horizontal", "axial_rowmajor")
CHANNELS = 16


def support(plan):
    """(n, n): 1 where a key is met directly; else 2 + the place of its region among the query's."""
    n = plan.n
    met = np.zeros((n, n), int)
    for t in range(n):
        met[t, plan.direct.row(t)] = 1
        for i, r in enumerate(plan.users.row(t)):
            met[t, plan.members.row(r)] = 2 + i
    return met


def attend_of(pattern, size):
    name = {"fixed": "span", "logsparse": None}.get(pattern, "width")
    return la.Combiner(pattern, **({name: size} if name else {}))


def show(n_tokens, size, dim):
    q, k = np.random.default_rng(0).normal(size=(2, n_tokens, dim))
    exact = la.Softmax().weights(q, k, causal=True)
    pairs = n_tokens * (n_tokens + 1) // 2
    print(f"{n_tokens} tokens, causal, rows and spans of {size}; exact softmax has {pairs} pairs")
    print(
        f"  {'pattern':20}{'direct':>9}{'users':>9}{'local':>9}{'of softmax':>12}{'far mass':>10}{'L1 to softmax':>15}"
    )
    for pattern in PATTERNS:
        attend = attend_of(pattern, size)
        (plan,) = attend.plans(n_tokens, causal=True)
        weights, direct = attend.weights(q, k, causal=True), support(plan) == 1
        last = slice(n_tokens // 2, None)
        far = np.mean(np.sum(np.where(direct, 0, weights), axis=-1)[last])
        apart = np.mean(np.sum(abs(weights - exact), axis=-1)[last])
        counts = plan.pairs()
        print(
            f"  {pattern:20}"
            + "".join(f"{x:9}" for x in counts)
            + f"{sum(counts) / pairs:12.2f}{far:10.2f}{apart:15.2f}"
        )


def draw(n_tokens, size, path):
    from matplotlib import pyplot as plt

    q, k = np.random.default_rng(0).normal(size=(2, n_tokens, CHANNELS))
    figure, axes = plt.subplots(3, len(PATTERNS), figsize=(13, 8), layout="constrained")
    for column, pattern in zip(axes.T, PATTERNS, strict=True):
        attend = attend_of(pattern, size)
        for axis, causal in zip(column, (True, False), strict=False):
            (plan,) = attend.plans(n_tokens, causal=causal)
            met = support(plan)
            shade = np.where(met == 0, np.nan, np.where(met == 1, 0, 1 + (met - 2) % 7)).astype(float)
            axis.imshow(shade, cmap="Set2", vmin=0, vmax=7, interpolation="nearest")
        column[2].imshow(np.sqrt(attend.weights(q, k, causal=True)), cmap="magma", interpolation="nearest")
        column[0].set_title(pattern)
        for axis in column:
            axis.set(xticks=[], yticks=[])
    for axis, text in zip(
        axes[:, 0], ("causal support", "bidirectional support", "weights, square roots"), strict=True
    ):
        axis.set_ylabel(text)
    figure.savefig(path, dpi=90)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="few tokens")
    parser.add_argument("--out", metavar="FILE.png", help="draw the figure")
    arguments = parser.parse_args()
    for n_tokens, size in ((64, 8),) if arguments.small else ((64, 8), (1024, 32)):
        show(n_tokens, size, CHANNELS)
    if arguments.out:
        draw(64, 8, arguments.out)


if __name__ == "__main__":
    main()
