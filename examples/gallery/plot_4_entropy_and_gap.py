"""
Entropy and spectral gap
========================

How sharp an attention is, and how fast it mixes. The entropy of a row is the number of bits that a query leaves open;
the spectral gap, 1 - abs(lambda_2), is how fast repeated attention forgets where it began. Linear Log-Normal
attention chooses its two scales so that the logarithms of its weights have softmax's variance.
"""

from __future__ import annotations

import math
from importlib.resources import files

import numpy as np
from matplotlib import pyplot as plt

import linattn as la

N_TOKENS, DIM, SEEDS = 384, 64, 2
SIGMAS = np.array([0.5, 0.65, 0.8, 1.0, 1.2, 1.5, 2.0])
ATTENDS = {
    "softmax": la.Softmax(),
    "LLN, the paper's line": la.LLN(),
    "LLN, exact": la.LLN(calibration="exact"),
    "LLN, alpha = beta = 1": la.LLN(alpha=1.0, beta=1.0),
    "elu + 1": la.Linear("elu1"),
}

# %%
# Gaussian queries and keys of deviation sigma: softmax's logits have the variance V = sigma^4, and its temperature is
# 1 / sigma^2. In the log-normal model the entropy is log2 N - V / (2 ln 2), and abs(lambda_2) = sqrt((e^V - 1) / N).

temperature = 1 / SIGMAS**2
variance = SIGMAS**4
model = math.log2(N_TOKENS) - variance / (2 * math.log(2)), 1 - np.sqrt(np.expm1(variance) / N_TOKENS)
found = {}
for name, attend in ATTENDS.items():
    readings = []
    for sigma in SIGMAS:
        draws = (sigma * np.random.default_rng(seed).normal(size=(2, N_TOKENS, DIM)) for seed in range(SEEDS))
        each = [attend.weights(q, k) for q, k in draws]
        readings.append(np.mean([(la.instruments.entropy(a), la.instruments.spectral_gap(a)) for a in each], axis=0))
    found[name] = np.array(readings)

figure, axes = plt.subplots(1, 2, figsize=(11, 4))
for axis, title, column in zip(axes, ("entropy of the rows, bits", "spectral gap"), (0, 1), strict=True):
    for name, rows in found.items():
        axis.semilogx(temperature, rows[:, column], marker="o", label=name)
    valid = model[column] > 0
    axis.semilogx(temperature[valid], model[column][valid], color="grey", linestyle=":", label="log-normal model")
    axis.minorticks_off()
    axis.set_xticks([0.25, 0.5, 1, 2, 4], ["0.25", "0.5", "1", "2", "4"])
    axis.set(xlabel="temperature of softmax, 1 / sigma^2", title=title)
axes[0].legend()
plt.show()

for column, title in enumerate(("entropy, bits", "spectral gap")):
    print(f"{title:24}" + "".join(f"{x:8.2f}" for x in temperature))
    for name, rows in found.items():
        print(f"  {name:22}" + "".join(f"{x:8.2f}" for x in rows[:, column]))

# %%
# Both calibrations follow softmax where it is soft and are sharper where it is sharp: the variance is matched, not
# the law, and LLN's law is skewed. At a temperature of 1 that is 0.7 bits, at 1/4 it is 1.5. The gap follows the
# entropy. Without calibration, alpha = beta = 1, the sharpness follows late, and elu + 1 does not follow at all:
# nearly uniform attention, whatever it is asked.
#
# On real heads
# -------------
#
# Twelve heads of a transformer, each a line from softmax's entropy to another mechanism's. A mechanism that did what
# softmax does would lie on the diagonal.

with np.load(files("linattn") / "data" / "minilm_qkv.npz") as arrays:
    layers = [[arrays[f"{x}{layer}"].astype("float64") for x in "qk"] for layer in (0, 2, 5)]

figure, axis = plt.subplots(figsize=(6.4, 5))
exact = np.concatenate([la.instruments.entropy(la.Softmax().weights(q, k)) for q, k in layers])
for name, make in {
    "elu + 1": lambda q, k: la.Linear("elu1"),
    "cosFormer": lambda q, k: la.CosFormer(length=384),
    "LLN, the paper's line": lambda q, k: la.LLN(),
    "LLN, exact, a head": lambda q, k: la.LLN(scope="head", calibration="exact"),
    "Performer, calibrated": lambda q, k: la.Performer.accurate(q, k, n_features=256),
}.items():
    bits = np.concatenate([la.instruments.entropy(make(q, k).weights(q, k)) for q, k in layers])
    axis.plot(exact, bits, "o", label=name, markersize=6)
    print(f"{name:24}" + "".join(f"{x:6.2f}" for x in bits))
axis.axline((0, 0), slope=1, color="grey", linestyle=":")
axis.set(xlabel="entropy of softmax's rows, bits", ylabel="entropy of the mechanism's rows, bits")
axis.legend(loc="lower right")
plt.show()

# %%
# elu + 1 and cosFormer (top) are flat whatever softmax does. The paper's line, fitted to a whole layer, is up to 3.5
# bits too sharp on the soft heads of layer 0, whose sharp head decides; calibrated a head, LLN is within about a bit
# of softmax everywhere, and a calibrated Performer within two. That says nothing of *where* they are sharp: see
# :doc:`the maps <plot_1_weight_maps>`.
