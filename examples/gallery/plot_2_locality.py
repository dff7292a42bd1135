"""
How far cosFormer looks
=======================

cosFormer multiplies every weight by cos(pi (t - s) / (2 length)). The paper sets ``length`` to that of the sequence;
here it is a parameter of its own. What does it do?
"""

from __future__ import annotations

from importlib.resources import files

import numpy as np
from matplotlib import pyplot as plt

import linattn as la

N_TOKENS = 384
LENGTHS = (384, 512, 1024, 4096)

# %%
# With equal scores the window alone is left: the weights of the last row of a causal call.

same = np.ones((N_TOKENS, 1))
back = N_TOKENS - 1 - np.arange(N_TOKENS)

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
for length in LENGTHS:
    row = la.CosFormer(length=length).weights(same, same, causal=True)[-1]
    left.plot(back, N_TOKENS * row, label=f"length = {length}")
left.axhline(1, color="grey", linestyle=":", label="relu: no window")
left.set(xlabel="tokens back", ylabel="weight, as a multiple of uniform", title="equal scores, the last row")
left.legend()

ratios = np.geomspace(1, 16, 33)
mean = []
for ratio in ratios:
    row = la.CosFormer(length=round(ratio * N_TOKENS)).weights(same, same, causal=True)[-1]
    mean.append(row @ back / N_TOKENS)
right.semilogx(ratios, mean)
right.axhline(0.5, color="grey", linestyle=":", label="no window: half")
right.axhline(1 - 2 / np.pi, color="#d55e00", linestyle="--", label="1 - 2 / pi")
right.minorticks_off()
right.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
right.set(xlabel="length / tokens", ylabel="mean distance / tokens", title="how far the last row looks back")
right.legend()
plt.show()

# %%
# Even at its narrowest, ``length`` equal to the number of tokens, the last row looks back 36 % of the sequence on
# average, where no window at all gives 50 %. At four times the number of tokens the window is gone. And it cannot be
# narrower: a ``length`` below the number of tokens would make weights negative, and is an error.
#
# On real queries and keys, all heads of three layers: the mean distance between a query and what it looks at.

with np.load(files("linattn") / "data" / "minilm_qkv.npz") as arrays:
    layers = {layer: [arrays[f"{x}{layer}"].astype("float64") for x in "qk"] for layer in (0, 2, 5)}

attends = {"softmax": la.Softmax(), "relu": la.Linear("relu")}
attends |= {f"cosFormer {length}": la.CosFormer(length=length) for length in reversed(LENGTHS)}

figure, axis = plt.subplots(figsize=(11, 3.4))
labels = [f"layer {layer}\nhead {head}" for layer in layers for head in range(4)]
for i, (name, attend) in enumerate(attends.items()):
    far = np.concatenate([la.instruments.mean_distance(attend.weights(q, k)) for q, k in layers.values()])
    colour = "black" if i == 0 else plt.get_cmap("viridis")((i - 1) / (len(attends) - 2))
    mark = {0: {"marker": "D", "markersize": 8}, 1: {"markersize": 11, "mfc": "none"}}.get(i, {"markersize": 6})
    axis.plot(far, **{"marker": "o", "linestyle": "", "color": colour, "label": name} | mark)
    print(f"{name:16}" + "".join(f"{x:7.0f}" for x in far))
axis.set_xticks(range(len(labels)), labels, fontsize=7)
axis.set(ylabel="mean |t - s|, tokens", ylim=(0, None))
axis.legend(ncols=3)
plt.show()

# %%
# The window takes about a sixth off relu's distance, on every head alike, and makes none of them local. Softmax's
# heads of layer 2 look 33 to 114 tokens far because of what their queries and keys are; relu features lose most of
# that, and no ``length`` brings it back. A cosine over the whole sequence is a mild preference, not a sliding window.

# sphinx_gallery_thumbnail_number = 1
