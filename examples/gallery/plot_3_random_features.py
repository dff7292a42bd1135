"""
What random features cost
=========================

Performer estimates softmax with R random features. How the error falls with R is known; how large it is depends on
the size of queries and keys, exponentially. The setting is that of figure 4 of "Rethinking Attention with
Performers", 16 channels and Gaussian inputs, with fewer tokens. The paper does not say how large the inputs are, so
there are two sizes.
"""

from __future__ import annotations

import warnings
from importlib.resources import files

import numpy as np
from matplotlib import pyplot as plt

import linattn as la

N_TOKENS, DIM, SEEDS = 512, 16, 4
ROWS = (16, 32, 64, 128, 256)  # of the projection
ESTIMATORS = {
    "trigonometric": lambda rows, seed: la.Performer(2 * rows, seed=seed, features="trig"),
    "positive, independent": lambda rows, seed: la.Performer(rows, seed=seed, kind="iid"),
    "positive, orthogonal": lambda rows, seed: la.Performer(rows, seed=seed),
    "positive, equal norms": lambda rows, seed: la.Performer(rows, seed=seed, norms="sqrt"),
    "hyperbolic, equal norms": lambda rows, seed: la.Performer(
        2 * rows, seed=seed, features="hyperbolic", norms="sqrt"
    ),
}
warnings.simplefilter("ignore", RuntimeWarning)  # trigonometric features are signed: that is the point here

figure, axes = plt.subplots(1, 2, figsize=(11, 4))
for axis, sigma in zip(axes, (0.5, 1.0), strict=True):
    rng = np.random.default_rng(0)
    q, k = sigma * rng.normal(size=(2, N_TOKENS, DIM))
    v = rng.normal(size=(N_TOKENS, DIM))
    want = la.softmax_attention(q, k, v)
    nothing = np.mean((v.mean(axis=0) - want) ** 2)
    print(f"sigma = {sigma:g}; the mean of v: {nothing:.2g}")
    for name, make in ESTIMATORS.items():
        errors = [np.mean([np.mean((make(m, s)(q, k, v) - want) ** 2) for s in range(SEEDS)]) for m in ROWS]
        axis.loglog(ROWS, errors, marker="o", label=name)
        print(f"  {name:26}" + "".join(f"{x:10.2g}" for x in errors))
    axis.axhline(nothing, color="black", linestyle=":", label="the mean of v")
    axis.set_ylim(top=50 * nothing)
    axis.minorticks_off()
    axis.set_xticks(ROWS, [str(m) for m in ROWS])
    axis.set(title=f"sigma = {sigma:g}", xlabel="rows of the projection", ylabel="mean squared error")
axes[0].legend()
plt.show()

# %%
# Everything above the dotted line is worse than a layer that returns the mean of v whatever it is asked. For small
# inputs trigonometric features are the best of the plain ones; for larger ones they leave the picture. The paper's
# positive features stay bounded there, and still need more than 256 rows to be worth having. What helps most costs no
# feature: with antithetic pairs of equal norms the error is several times smaller at the same number of features (a
# pair is two).
#
# On real heads
# -------------
#
# The same with 256 features on the twelve heads that ship with the package. The error is that of the output over that
# of the mean of v: at 1 the layer is worth nothing. phi = E|x + y|^2 is what tells beforehand
# (:doc:`/mechanisms/performer`); the dashed line is ln(1 + R), beyond which no unbiased estimate is worth having.

warnings.simplefilter("ignore", UserWarning)  # the report warns where phi is too large: drawn below
R = 256
figure, axis = plt.subplots(figsize=(8, 4))
found = {"positive": [], "hyperbolic, equal norms": [], "calibrated (accurate)": []}
with np.load(files("linattn") / "data" / "minilm_qkv.npz") as arrays:
    for layer in (0, 2, 5):
        q, k, v = (arrays[f"{x}{layer}"].astype("float64") for x in "qkv")
        values = (
            la.Performer(R),
            la.Performer(R, features="hyperbolic", norms="sqrt"),
            la.Performer.accurate(q, k, n_features=R),
        )
        for points, attend in zip(found.values(), values, strict=True):
            report = la.instruments.performer_report(attend, q, k, v)
            points += list(zip(report.phi_none, report.skill_error, strict=True))
for name, points in found.items():
    phi, error = zip(*sorted(points), strict=True)
    axis.loglog(phi, error, "o", label=name, markersize=7)
    print(f"{name:26}" + "".join(f"{x:8.2g}" for x in error))
axis.axhline(1, color="black", linestyle=":", label="the mean of v")
axis.axvline(np.log1p(R), color="grey", linestyle="--", label="phi = ln(1 + R)")
axis.minorticks_off()
axis.set_xticks([5, 10, 20, 50, 100], ["5", "10", "20", "50", "100"])
axis.set_yticks([0.25, 0.5, 1, 2], ["0.25", "0.5", "1", "2"])
axis.set(xlabel="phi of the head as it is", ylabel="error over that of the mean of v")
axis.legend()
plt.show()

# %%
# No head lies left of the dashed line: taken as they are, none of them is easy. Calibration brings eight of the
# twelve to between a quarter and three quarters of the mean's error, and the four sharpest remain out of reach of 256
# features.
