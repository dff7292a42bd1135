"""
Four traps
==========

What surprises those who use these mechanisms for the first time, a picture each. None is an error of the code: the
formulas say so.
"""

from __future__ import annotations

import numpy as np
from matplotlib import pyplot as plt

import linattn as la

rng = np.random.default_rng(0)

# %%
# Small queries and keys make elu + 1 uniform
# -------------------------------------------
#
# A common factor on q and k is softmax's temperature. elu(x) + 1 is about 1 for small x, so all keys get the same
# weight, and large factors do not make it sharp either. relu does not see the factor at all: it cancels.

N_TOKENS, DIM = 256, 32
q, k = rng.normal(size=(2, N_TOKENS, DIM))
factors = np.geomspace(0.05, 8, 25)
figure, axis = plt.subplots(figsize=(7, 3.6))
for name, attend in {
    "softmax": la.Softmax(),
    "elu + 1": la.Linear("elu1"),
    "relu": la.Linear("relu"),
    "exp": la.Linear("exp"),
}.items():
    bits = [la.instruments.entropy(attend.weights(c * q, c * k)) for c in factors]
    axis.semilogx(factors, bits, label=name)
axis.axhline(np.log2(N_TOKENS), color="grey", linestyle=":", label="uniform")
axis.set(xlabel="q and k multiplied by", ylabel="entropy of the rows, bits", title="sharpness against scale")
axis.legend()
plt.show()

# %%
# The first rows of a causal relu are often zero
# ----------------------------------------------
#
# A row is zero when no key that it sees shares a positive channel with the query. With few channels that is common at
# first; each token that follows makes it rarer, until only queries without any positive channel are left: one in 2^D,
# for ever. Where it happens softmax would have given a mean of the values seen; here the row is 0 and passes no
# gradient.

DRAWS = 2000
figure, axis = plt.subplots(figsize=(7, 3.6))
for dim in (4, 8, 16, 32):
    q, k, v = rng.normal(size=(3, DRAWS, 12, dim))
    out = la.CosFormer(length=4096)(q, k, v, causal=True)
    share = np.mean(np.all(out == 0, axis=-1), axis=0)
    axis.semilogy(np.arange(1, 13), np.maximum(share, 1e-4), "o-", label=f"{dim} channels")
    print(f"{dim:3} channels: " + "".join(f"{x:8.3f}" for x in share))
axis.set(xlabel="token", ylabel="share of rows that are zero", ylim=(4e-4, 1), title="relu features, Gaussian inputs")
axis.legend()
plt.show()

# %%
# LLN's own line never becomes uniform
# ------------------------------------
#
# LLN chooses alpha and beta so that its weights are as sharp as softmax's. The authors' line for that was fitted at
# moderate temperatures and does not pass through the origin. So for small queries and keys the variance of ln A has a
# floor, and alpha, which also multiplies the gradient, grows without bound. By quadrature (``calibration="exact"``)
# attention becomes uniform as softmax does.

sigmas = np.geomspace(0.1, 1.5, 13)
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
q, k = rng.normal(size=(2, N_TOKENS, 64))
for name, calibration in {"the paper's line": "paper", "exact": "exact"}.items():
    values = [la.LLN(calibration=calibration).calibrate(s * q, s * k) for s in sigmas]
    spread = [la.instruments.log_variance(a.weights(s * q, s * k)) for a, s in zip(values, sigmas, strict=True)]
    left.loglog(sigmas, [float(np.ravel(a.alpha)[0]) for a in values], "o-", label=name)
    right.loglog(sigmas, spread, "o-", label=name)
right.loglog(sigmas, sigmas**4, color="grey", linestyle=":", label="softmax: sigma^4")
left.set(xlabel="deviation of q and k", ylabel="alpha", title="the scale it chooses")
right.set(xlabel="deviation of q and k", ylabel="variance of ln A", title="how sharp it is")
left.legend()
right.legend()
plt.show()

# %%
# A pooled maximum is larger than its members
# -------------------------------------------
#
# Combiner meets a far region by one key, by default the maximum of its members, channel by channel. Such a key is
# longer than any of theirs, so its score has a larger spread: regions win or lose by it, and not by what they hold. A
# mean with the region's size is modest, as a region's share should be.

SPAN = 16
q, k = rng.normal(size=(2, 1024, DIM))
plan = la.Plan.pattern("fixed", 1024, size=SPAN, causal=True)
keys = {
    "single keys": k,
    "regions, maximum": la.regions.pool(k, plan, pool="max"),
    "regions, mean, + log size": la.regions.pool(k, plan, pool="mean"),
}
figure, axis = plt.subplots(figsize=(7, 3.6))
bins = np.linspace(-8, 8, 97)
for name, kappa in keys.items():
    logits = (q @ kappa.T).ravel() / np.sqrt(DIM) + (np.log(SPAN) if "size" in name else 0)
    axis.hist(logits, bins, density=True, histtype="step", linewidth=1.6, label=name)
    print(f"{name:28} mean {logits.mean():6.2f}, deviation {logits.std():5.2f}")
axis.set(xlabel="score before the softmax", title=f"Gaussian queries and keys, spans of {SPAN}")
axis.legend()
plt.show()

# sphinx_gallery_thumbnail_number = 1
