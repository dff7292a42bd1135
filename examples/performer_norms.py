"""How the error of random-feature attention grows with the size of queries and keys, and what tells it beforehand.

phi = E|x + y|^2, x and y the scaled queries and keys, decides: a weight's estimate has the relative variance
(e^phi - 1) / R. Beyond phi = ln(1 + R) no unbiased estimate is worth having. The error is |out - softmax| over
|softmax - mean of v|: at 1 the layer is as good as one that returns the mean of v, whatever it cost.

    python examples/performer_norms.py [--small] [--out FILE.png]
"""

from __future__ import annotations

import argparse
import warnings

import numpy as np

import linattn as la

DIM, N_FEATURES, OFFSET = 32, 256, 0.3


def values(q, k, seed):
    """What is compared, by name; the last two are fitted to the data once."""
    accurate = la.Performer(N_FEATURES, seed=seed, features="hyperbolic", norms="sqrt")
    return {
        "positive": la.Performer(N_FEATURES, seed=seed),
        "hyperbolic": la.Performer(N_FEATURES, seed=seed, features="hyperbolic"),
        "hyperbolic, equal norms": accurate,
        "  and centred": accurate.calibrate(q, k, rule="centre"),
        "  and scaled (accurate)": accurate.calibrate(q, k, rule="scale"),
    }


def measure(n_tokens, sigmas, n_seeds):
    """{name: medians of the error over `sigmas`}, phi without and with calibration."""
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, n_tokens, DIM)) * np.exp(0.3 * rng.normal(size=(2, 1, DIM)))
    k = k + OFFSET * rng.normal(size=DIM)  # real keys have large means
    v = rng.normal(size=(n_tokens, DIM))
    found, phi = {}, []
    for sigma in sigmas:
        errors = {}
        for seed in range(n_seeds):
            for name, attend in values(sigma * q, sigma * k, seed).items():
                report = la.instruments.performer_report(attend, sigma * q, sigma * k, v)
                errors.setdefault(name, []).append(report.skill_error)
        phi.append((report.phi_none, report.phi_scale))
        for name, each in errors.items():
            found.setdefault(name, []).append(np.median(each))
    return found, np.array(phi)


def show(found, phi, sigmas):
    print(f"{N_FEATURES} features: the limit of phi is ln(1 + R) = {np.log1p(N_FEATURES):.3g}")
    print(f"{'size of q and k':26}" + "".join(f"{s:>9.2g}" for s in sigmas))
    for name, row in (("phi", phi[:, 0]), ("phi, calibrated", phi[:, 1])):
        print(f"{name:26}" + "".join(f"{x:9.3g}" for x in row))
    print("error over that of the mean of v")
    for name, row in found.items():
        print(f"{name:26}" + "".join(f"{x:9.3g}" for x in row))


def draw(found, phi, path):
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, row in found.items():
        axis.loglog(phi[:, 0], row, marker="o", label=name.strip())
    axis.axhline(1, color="black", linestyle=":", label="mean of v")
    axis.axvline(np.log1p(N_FEATURES), color="grey", linestyle="--", label="phi = ln(1 + R)")
    axis.set(xlabel="phi of the uncalibrated data", ylabel="error over that of the mean of v")
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="few tokens and seeds")
    parser.add_argument("--out", metavar="FILE.png", help="draw the figure")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)  # the report warns where phi is too large: shown below
    n_tokens, n_seeds = (128, 1) if arguments.small else (1024, 5)
    sigmas = (0.3, 1.0) if arguments.small else (0.2, 0.3, 0.45, 0.6, 0.8, 1.0, 1.3)
    found, phi = measure(n_tokens, sigmas, n_seeds)
    show(found, phi, sigmas)
    if arguments.out:
        draw(found, phi, arguments.out)


if __name__ == "__main__":
    main()
