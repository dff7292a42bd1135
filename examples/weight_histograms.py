"""The logarithms of attention weights beside the normal law.

Each row of ln A is centred and divided by its own deviation. For Gaussian inputs softmax's are normal; LLN has their
variance, not their law: it is skewed. Softmax's are nearly normal on a real transformer's heads too, but the sharpness
of the heads of one layer spans up to three orders of magnitude.

    python examples/weight_histograms.py [--small] [--out FILE.png]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import linattn as la

REAL = Path(la.__file__).parent / "data" / "minilm_qkv.npz"
ATTENDS = {
    "softmax": la.Softmax(),
    "LLN": la.LLN(scope="sample"),
    "LLN, exact": la.LLN(calibration="exact", scope="sample"),
}
BINS = np.linspace(-4, 4, 81)


def data(n_tokens, layers):
    """{name: (q, k)}: Gaussian at sigma = 1, and layers of the transformer that ships with the package."""
    found = {"Gaussian, 64 channels": tuple(np.random.default_rng(0).normal(size=(2, 1, n_tokens, 64)))}
    with np.load(REAL) as file:
        for layer in layers:
            found[f"layer {layer}"] = tuple(file[f"{x}{layer}"][:, :n_tokens].astype("float64") for x in "qk")
    return found


def standardised(weights):
    """ln A of all rows, each centred and divided by its deviation."""
    logs = np.log(weights)
    logs = logs - logs.mean(axis=-1, keepdims=True)
    return (logs / logs.std(axis=-1, keepdims=True)).ravel()


def show(inputs):
    print(f"{'':24}{'':12}{'log-variance':>20}{'skewness':>10}{'kurtosis':>10}{'Kolmogorov':>11}")
    for name, (q, k) in inputs.items():
        for which, attend in ATTENDS.items():
            a = attend.weights(q, k)
            spread = np.sort(la.instruments.log_variance(a))
            fit = la.instruments.lognormal_fit(a)
            low, high = spread[0], spread[-1]
            span = f"{low:.2f}" if low == high else f"{low:.2f} .. {high:.2f}"
            moments = (np.mean(x) for x in fit[:3])
            print(f"{name:24}{which:12}{span:>20}" + "".join(f"{x:10.3f}" for x in moments))


def draw(inputs, path):
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(inputs), figsize=(4 * len(inputs), 3.6), layout="constrained")
    for axis, (name, (q, k)) in zip(np.atleast_1d(axes), inputs.items(), strict=True):
        for which, attend in ATTENDS.items():
            axis.hist(standardised(attend.weights(q, k)), BINS, density=True, histtype="step", label=which)
        axis.plot(BINS, np.exp(-(BINS**2) / 2) / np.sqrt(2 * np.pi), color="black", linestyle=":", label="normal")
        axis.set(title=name, xlabel="standardised ln A")
    np.atleast_1d(axes)[0].legend(fontsize="small")
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="few tokens, one layer")
    parser.add_argument("--out", metavar="FILE.png", help="draw the figure")
    arguments = parser.parse_args()
    inputs = data(64, (5,)) if arguments.small else data(384, (0, 2, 5))
    show(inputs)
    if arguments.out:
        draw(inputs, arguments.out)


if __name__ == "__main__":
    main()
