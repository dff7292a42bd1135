"""
Are weights log-normal?
=======================

Linear Log-Normal attention is named after a law: for Gaussian queries and keys the logarithms of softmax's weights
are normal. Each row of ln A is centred here and divided by its own deviation, and drawn beside the normal law.
"""

from __future__ import annotations

from importlib.resources import files

import numpy as np
from matplotlib import pyplot as plt

import linattn as la

N_TOKENS = 384
ATTENDS = {
    "softmax": la.Softmax(),
    "LLN": la.LLN(scope="sample"),
    "LLN, exact": la.LLN(calibration="exact", scope="sample"),
}
BINS = np.linspace(-4, 4, 81)

inputs = {"Gaussian, 64 channels": tuple(np.random.default_rng(0).normal(size=(2, 1, N_TOKENS, 64)))}
with np.load(files("linattn") / "data" / "minilm_qkv.npz") as arrays:
    for layer in (0, 2, 5):
        inputs[f"layer {layer}"] = tuple(arrays[f"{x}{layer}"].astype("float64") for x in "qk")

figure, axes = plt.subplots(1, len(inputs), figsize=(13, 3.2), sharey=True)
print(f"{'':24}{'':12}{'log-variance':>20}{'skewness':>10}{'kurtosis':>10}")
for axis, (name, (q, k)) in zip(axes, inputs.items(), strict=True):
    for which, attend in ATTENDS.items():
        a = attend.weights(q, k)
        logs = np.log(a) - np.mean(np.log(a), axis=-1, keepdims=True)
        axis.hist((logs / logs.std(axis=-1, keepdims=True)).ravel(), BINS, density=True, histtype="step", label=which)
        spread = np.sort(la.instruments.log_variance(a))
        fit = la.instruments.lognormal_fit(a)
        span = f"{spread[0]:.2f}" + (f" .. {spread[-1]:.2f}" if len(spread) > 1 else "")
        print(f"{name:24}{which:12}{span:>20}{np.mean(fit.skewness):10.2f}{np.mean(fit.kurtosis):10.2f}")
    axis.plot(BINS, np.exp(-(BINS**2) / 2) / np.sqrt(2 * np.pi), color="grey", linestyle=":", label="normal")
    axis.set(title=name, xlabel="standardised ln A")
axes[0].legend(loc="upper left")
plt.show()

# %%
# Softmax's are normal on Gaussian data and nearly so on a transformer's heads. LLN has their variance, not their law:
# a sum of exponentials is skewed. And one variance for a whole layer is a fiction: that of the heads of layer 0
# differs a thousandfold, which is why the scales are better fitted a head (``scope="head"``).
