"""
One layer, eight attentions
===========================

The same queries and keys, taken from a small sentence transformer that reads *Paradise Lost*, and what each mechanism
makes of them. A dot is the weight of a key (across) for a query (down), in powers of two: at the middle of the scale
a key counts as much as if all counted the same.
"""

from __future__ import annotations

from importlib.resources import files

import numpy as np
from matplotlib import pyplot as plt

import linattn as la

with np.load(files("linattn") / "data" / "minilm_qkv.npz") as arrays:
    q, k = (arrays[f"{x}2"].astype("float64") for x in "qk")  # layer 2: 4 heads, 384 tokens, 32 channels
n_tokens = q.shape[-2]

attends = {
    "softmax": la.Softmax(),
    "elu + 1": la.Linear("elu1"),
    "relu": la.Linear("relu"),
    "cosFormer": la.CosFormer(length=n_tokens),
    "Performer, calibrated": la.Performer.accurate(q, k, n_features=256),
    "LLN, fitted": la.LLN(scope="head", calibration="exact"),
    "LLNDiag, fitted": la.LLNDiag(scope="head", calibration="exact"),
    "Combiner": la.Combiner("fixed", span=16),
}
maps = {name: attend.weights(q, k) for name, attend in attends.items()}

# %%
# Two heads: one looks along diagonals, the other at a few keys, whoever asks.

SHOWN = 160  # of 384 tokens, so that a token is a dot
HEADS = (1, 2)
figure, axes = plt.subplots(len(HEADS), len(maps), figsize=(13, 3.6))
for line, head in enumerate(HEADS):
    for axis, (name, a) in zip(axes[line], maps.items(), strict=True):
        octaves = np.log2(np.maximum(n_tokens * a[head, :SHOWN, :SHOWN], 2.0**-9))
        axis.imshow(octaves, cmap="magma", vmin=-4, vmax=4, interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        if line == 0:
            axis.set_title(name)
plt.show()

# %%
# **What one sees.** elu + 1 is nearly flat: its features are about 1 for every token, so every key gets about the
# same. relu and cosFormer keep the shape of softmax's pattern and lose its contrast. Performer's estimate has
# softmax's contrast and the noise of 256 random features. LLN is as sharp as softmax, by construction, but each of
# its features is sharp on its own: grids, not diagonals. LLNDiag adds softmax within blocks, and Combiner is softmax
# within its spans, with one summary for each span far away.
#
# The entropy of the rows says the same in a number; a row that treats all 384 keys alike has 8.58 bits. The distance
# is the mean over rows of half the sum of absolute differences from softmax: the share of a row's weight that lies on
# other keys.

print(f"{'':24}{'entropy, bits':>32}{'weight elsewhere':>36}")
print(f"{'head':24}" + 2 * "".join(f"{head:8}" for head in range(len(q))))
for name, a in maps.items():
    bits = la.instruments.entropy(a)
    elsewhere = np.mean(np.sum(abs(a - maps["softmax"]), axis=-1), axis=-1) / 2
    print(f"{name:24}" + "".join(f"{x:8.2f}" for x in (*bits, *elsewhere)))

# %%
# On the sharp heads, 0 and 3, only those that *have* softmax inside blocks put more than half of the weight where
# softmax does. The others are attentions of their own: a network is trained with them. Put in the place of softmax
# afterwards, they are worth what :doc:`the table on choosing </choose>` says.
#
# The first of the two heads in full, all 384 tokens.

figure, axes = plt.subplots(1, 3, figsize=(11, 3.9))
for axis, name in zip(axes, ("softmax", "LLNDiag, fitted", "Combiner"), strict=True):
    octaves = np.log2(np.maximum(n_tokens * maps[name][1], 2.0**-9))
    drawn = axis.imshow(octaves, cmap="magma", vmin=-4, vmax=4, interpolation="nearest")
    axis.set(title=name, xlabel="key", ylabel="query" if axis is axes[0] else "")
bar = figure.colorbar(drawn, ax=axes, ticks=[-4, -2, 0, 2, 4], shrink=0.8, label="weight, as a multiple of uniform")
bar.ax.set_yticklabels(["1/16", "1/4", "1", "4", "16"])
plt.show()

# sphinx_gallery_thumbnail_number = 1
