"""How the error of random-feature attention falls with the number of features.

The setting of figure 4 of "Rethinking Attention with Performers": 4096 tokens, 16 channels, Gaussian queries and keys.
The paper does not say how large these are, and everything depends on it, so there are two sizes. What counts is the
mean squared error of the output against exact softmax attention, beside that of a layer that always returns the mean
of v.

    python examples/performer_error.py [--small] [--out FILE.png]
"""

from __future__ import annotations

import argparse
import warnings

import numpy as np

import linattn as la

DIM, SIGMAS = 16, (0.5, 1.0)
ESTIMATORS = {  # rows of the projection -> a value
    "trigonometric, orthogonal": lambda rows, seed: la.Performer(2 * rows, seed=seed, features="trig"),
    "positive, iid": lambda rows, seed: la.Performer(rows, seed=seed, kind="iid"),
    "positive, orthogonal": lambda rows, seed: la.Performer(rows, seed=seed),
    "positive, equal norms": lambda rows, seed: la.Performer(rows, seed=seed, norms="sqrt"),
    "hyperbolic, equal norms": lambda rows, seed: la.Performer(
        2 * rows, seed=seed, features="hyperbolic", norms="sqrt"
    ),
}


def errors(n_tokens, rows, n_seeds):
    """{(sigma, estimator): mean squared errors over `rows`} and {sigma: that of the mean of v}."""
    found, baseline = {}, {}
    for sigma in SIGMAS:
        rng = np.random.default_rng(0)
        q, k = sigma * rng.normal(size=(2, n_tokens, DIM))
        v = rng.normal(size=(n_tokens, DIM))
        want = la.softmax_attention(q, k, v)
        baseline[sigma] = np.mean((v.mean(axis=0) - want) ** 2)
        for name, make in ESTIMATORS.items():
            found[sigma, name] = [
                np.mean([np.mean((make(m, seed)(q, k, v) - want) ** 2) for seed in range(n_seeds)]) for m in rows
            ]
    return found, baseline


def show(found, baseline, rows):
    for sigma in SIGMAS:
        print(f"sigma = {sigma:g}: the mean of v has {baseline[sigma]:.2g}")
        print(f"  {'rows of the projection':28}" + "".join(f"{m:>10}" for m in rows))
        for name in ESTIMATORS:
            print(f"  {name:28}" + "".join(f"{x:10.2g}" for x in found[sigma, name]))


def draw(found, baseline, rows, path):
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(SIGMAS), figsize=(10, 4), layout="constrained")
    for axis, sigma in zip(axes, SIGMAS, strict=True):
        for name in ESTIMATORS:
            axis.loglog(rows, found[sigma, name], marker="o", label=name)
        axis.axhline(baseline[sigma], color="black", linestyle=":", label="mean of v")
        axis.minorticks_off()
        axis.set_xticks(rows, [str(m) for m in rows])
        axis.set(title=f"sigma = {sigma:g}", xlabel="rows of the projection", ylabel="mean squared error")
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="few tokens and seeds")
    parser.add_argument("--out", metavar="FILE.png", help="draw the figure")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", RuntimeWarning)  # trigonometric features are signed: that is the point here
    n_tokens, rows, n_seeds = (256, (16, 64), 2) if arguments.small else (4096, (16, 32, 64, 128, 256), 5)
    found, baseline = errors(n_tokens, rows, n_seeds)
    show(found, baseline, rows)
    if arguments.out:
        draw(found, baseline, rows, arguments.out)


if __name__ == "__main__":
    main()
