"""
Combiner's patterns
===================

Combiner is softmax over a query's near keys and one summary for each region of far ones. Which keys are near, and
what the regions are, is the pattern: a plan, which is data. Here is every pattern for 64 tokens. Dark is met
directly; every other shade in a row is one region, met through its summary; white is not seen.
"""

from __future__ import annotations

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap

import linattn as la

SIZE, DIM = 8, 16
N_TOKENS = SIZE * SIZE
PATTERNS = {
    "fixed": la.Combiner("fixed", span=SIZE),
    "logsparse": la.Combiner("logsparse"),
    "axial_vertical": la.Combiner("axial_vertical", width=SIZE),
    "axial_horizontal": la.Combiner("axial_horizontal", width=SIZE),
    "axial_rowmajor": la.Combiner("axial_rowmajor", width=SIZE),
}


def support(plan):
    """(n, n): 0 not seen, 1 met directly, else 2 + the place of the key's region among the query's."""
    met = np.zeros((plan.n, plan.n), int)
    for t in range(plan.n):
        met[t, plan.direct.row(t)] = 1
        for i, r in enumerate(plan.users.row(t)):
            met[t, plan.members.row(r)] = 2 + i
    return met


q, k = np.random.default_rng(0).normal(size=(2, N_TOKENS, DIM))
shades = ListedColormap(["white", "#1b1b1b", *plt.get_cmap("Set3").colors[:8]])
figure, axes = plt.subplots(3, len(PATTERNS), figsize=(12, 7.4))
for column, (name, attend) in zip(axes.T, PATTERNS.items(), strict=True):
    for axis, causal in zip(column, (True, False), strict=False):
        (plan,) = attend.plans(N_TOKENS, causal=causal)
        met = support(plan)
        axis.imshow(np.where(met < 2, met, 2 + (met - 2) % 8), cmap=shades, vmin=0, vmax=9, interpolation="nearest")
    column[2].imshow(np.sqrt(attend.weights(q, k, causal=True)), cmap="magma", interpolation="nearest")
    column[0].set_title(name)
    for axis in column:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(True)
for axis, text in zip(axes[:, 0], ("causal", "both directions", "weights, square roots"), strict=True):
    axis.set_ylabel(text)
plt.show()

# %%
# Every visible key is met exactly once: that is what makes each row a distribution over all of them. What it costs is
# the number of pairs, here at 1024 tokens, causal, beside those of softmax. ``far`` is the weight that goes through
# regions in the second half of the rows, for Gaussian queries and keys; ``L1`` is the sum of absolute differences
# from softmax's row (2 is the most there can be), for pooled maxima, the paper's choice, and for means with the
# regions' sizes.

MORE, WIDE = 1024, 32
q, k = np.random.default_rng(0).normal(size=(2, MORE, DIM))
exact = la.Softmax().weights(q, k, causal=True)
late = slice(MORE // 2, None)
print(f"{'pattern':20}{'direct':>9}{'users':>9}{'local':>9}{'of softmax':>12}{'far':>8}{'L1, max':>9}{'L1, mean':>10}")
for name in PATTERNS:
    size = {"fixed": {"span": WIDE}, "logsparse": {}}.get(name, {"width": WIDE})
    attend, soft = la.Combiner(name, **size), la.Combiner(name, **size, pool="mean", size_bias=True)
    (plan,) = attend.plans(MORE, causal=True)
    weights, direct, pairs = attend.weights(q, k, causal=True), support(plan) == 1, plan.pairs()
    far = np.mean(np.sum(np.where(direct, 0, weights), axis=-1)[late])
    apart = [np.mean(np.sum(abs(a - exact), axis=-1)[late]) for a in (weights, soft.weights(q, k, causal=True))]
    share = sum(pairs) / (MORE * (MORE + 1) / 2)
    print(f"{name:20}" + "".join(f"{x:9}" for x in pairs) + f"{share:12.2f}{far:8.2f}{apart[0]:9.2f}{apart[1]:10.2f}")

# %%
# Between 2 and 15 % of softmax's pairs. On data without structure none of the patterns is near softmax, since a
# region gives all its users one opinion of its members; but means with the regions' sizes halve the distance of
# maxima, for nothing. ``axial_rowmajor`` pools nothing, its regions have a token that stands for them, so for it only
# the sizes change.
