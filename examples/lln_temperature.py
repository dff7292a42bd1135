"""Entropy and spectral gap of LLN and softmax attention against temperature.

Gaussian queries and keys of deviation sigma: softmax's logits have the variance V = sigma^4, and the temperature is
1 / sigma^2. LLN chooses alpha and beta so that the logarithms of its weights have the same variance. In the log-normal
model the entropy is log2 N - V / (2 ln 2) and |lambda_2| = sqrt((e^V - 1) / N).

    python examples/lln_temperature.py [--small] [--out FILE.png]
"""

from __future__ import annotations

import argparse
import math

import numpy as np

import linattn as la

DIM = 64
ATTENDS = {
    "softmax": la.Softmax(),
    "LLN, the paper's line": la.LLN(),
    "LLN, exact": la.LLN(calibration="exact"),
    "LLN, alpha = beta = 1": la.LLN(alpha=1.0, beta=1.0),
    "LLN + Diag": la.LLNDiag(),
}


def measure(n_tokens, sigmas, n_seeds):
    """{name: means of (entropy, gap, log-variance) over seeds, one row for each sigma}."""
    found = {}
    for name, attend in ATTENDS.items():
        rows = []
        for sigma in sigmas:
            each = []
            for seed in range(n_seeds):
                q, k = sigma * np.random.default_rng(seed).normal(size=(2, n_tokens, DIM))
                a = attend.weights(q, k)
                numbers = la.instruments.entropy(a), la.instruments.spectral_gap(a), la.instruments.log_variance(a)
                each.append(numbers)
            rows.append(np.mean(each, axis=0))
        found[name] = np.array(rows)
    return found


def model(n_tokens, sigmas):
    """Entropy and gap of the log-normal model; it holds for V well below 2 ln N."""
    v = np.array(sigmas) ** 4
    entropy = math.log2(n_tokens) - v / (2 * math.log(2))
    return entropy, 1 - np.sqrt(np.expm1(v) / n_tokens)


def show(found, n_tokens, sigmas):
    entropy, gap = model(n_tokens, sigmas)
    for title, column, theory in (
        ("entropy of the rows, bits", 0, entropy),
        ("spectral gap (that of LLN + Diag is the blocks')", 1, gap),
        ("log-variance of the rows", 2, np.array(sigmas) ** 4),
    ):
        print(f"{title}, {n_tokens} tokens")
        print(f"  {'temperature':24}" + "".join(f"{1 / s**2:9.3g}" for s in sigmas))
        print(f"  {'log-normal model':24}" + "".join(f"{x:9.3f}" if x > 0 else f"{'-':>9}" for x in theory))
        for name, rows in found.items():
            print(f"  {name:24}" + "".join(f"{x:9.3f}" for x in rows[:, column]))


def draw(found, n_tokens, sigmas, path):
    from matplotlib import pyplot as plt

    temperature = 1 / np.array(sigmas) ** 2
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, title, column, theory in zip(
        axes, ("entropy, bits", "spectral gap"), (0, 1), model(n_tokens, sigmas), strict=True
    ):
        for name, rows in found.items():
            axis.semilogx(temperature, rows[:, column], marker="o", label=name)
        valid = theory > 0
        axis.semilogx(temperature[valid], theory[valid], color="black", linestyle=":", label="log-normal model")
        axis.minorticks_off()
        axis.set_xticks([0.25, 0.5, 1, 2, 4], ["0.25", "0.5", "1", "2", "4"])
        axis.set(xlabel="temperature of softmax, 1 / sigma^2", title=title)
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="few tokens and seeds")
    parser.add_argument("--out", metavar="FILE.png", help="draw the figure")
    arguments = parser.parse_args()
    n_tokens, n_seeds = (96, 1) if arguments.small else (512, 5)
    sigmas = (0.5, 1.0) if arguments.small else (0.5, 0.65, 0.8, 1.0, 1.2, 1.5, 2.0)
    found = measure(n_tokens, sigmas, n_seeds)
    show(found, n_tokens, sigmas)
    if arguments.out:
        draw(found, n_tokens, sigmas, arguments.out)


if __name__ == "__main__":
    main()
