"""
Time and memory against length
==============================

Where linear attention overtakes exact softmax, and what both keep in memory. Times are those of :doc:`the comparison
with peers </benchmarks>`, read from ``docs/measured/peers.json``: nothing is timed while these pages are built.
Memory is counted in bytes, which repeats, and was written by ``python scripts/measure_docs.py memory``.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt

MEASURED = next(folder for up in (Path.cwd(), *Path.cwd().parents) if (folder := up / "docs" / "measured").is_dir())
peers = json.loads((MEASURED / "peers.json").read_text(encoding="utf-8"))

# %%
# Causal, float32, one core. Both axes are logarithmic: a straight line of slope 1 doubles with the length, of slope 2
# quadruples. Filled: ours; hollow: the fastest other library that computes the same.


def times(computes, job, ours):
    """{tokens: seconds}, of ours or of the fastest of the others."""
    found = {}
    for line in peers["lengths"]:
        mine = line["name"] == "linattn"
        if line["computes"] == computes and job in line and (mine if ours else not line["name"].startswith("linattn")):
            found[line["tokens"]] = min(line[job], found.get(line["tokens"], np.inf))
    return found


figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
for axis, job, title in zip(axes, ("forward", "both"), ("forward", "forward and backward"), strict=True):
    for colour, computes in zip(("#1b1b1b", "#0072b2", "#d55e00"), ("softmax", "linear", "cosformer"), strict=True):
        for ours, face in ((True, colour), (False, "white")):
            points = times(computes, job, ours)
            label = f"{computes}, {'linattn' if ours else 'fastest other'}"
            milliseconds = [1e3 * x for x in points.values()]
            axis.loglog(list(points), milliseconds, "o-" if ours else "o--", color=colour, mfc=face, label=label)
    softmax, linear = times("softmax", job, True), times("linear", job, True)
    both = sorted(set(softmax) & set(linear))
    gap = np.log([softmax[n] / linear[n] for n in both])
    slope, level = np.polyfit(np.log(both), gap, 1)
    crossing = np.exp(-level / slope)
    print(f"{title}: softmax over linear " + ", ".join(f"{np.exp(g):.1f} at {n} tokens" for n, g in zip(both, gap)))
    print(f"  equal at about {crossing:.0f} tokens, by a straight line")
    axis.axvline(crossing, color="grey", linestyle=":")
    axis.text(1.05 * crossing, 2, f"equal at about {round(crossing, -1):.0f}", color="#5a5a5a", fontsize=8)
    axis.minorticks_off()
    ticks = [256, 512, 2048, 8192]
    axis.set_xticks(ticks, [str(n) for n in ticks])
    axis.set(title=title, xlabel="tokens")
axes[0].set_ylabel("milliseconds")
axes[1].legend(loc="lower right", fontsize=7)
plt.show()

# %%
# At 512 tokens, the shortest length that was measured, the linear mechanisms are ahead already; the dotted line is
# where the straight lines would meet below it: a reading, not a measurement, and elsewhere on another machine. Below
# it softmax costs no more than its cheaper relatives, and there is no reason to give it up.
#
# Memory
# ------
#
# Left, what a causal forward and backward take beyond q, k, v and the results, a head, by length, and what a softmax
# that stores its weights would take. Right, what a stream has to carry on from a prefix: a state of one size, or a
# cache that grows.

table = json.loads((MEASURED / "measured.json").read_text(encoding="utf-8"))["memory"]
rows = [dict(zip(table["heads"], row, strict=True)) for row in table["rows"]]
names = list(dict.fromkeys(row["mechanism"] for row in rows))
tokens = sorted({row["tokens"] for row in rows})

figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
for name in names:
    of = [row for row in rows if row["mechanism"] == name]
    for axis, column in zip(axes, ("call", "state"), strict=True):
        axis.loglog(tokens, [row[column] for row in of], "o-", label=name)
axes[0].loglog(tokens, [4 * n * n / 1024 for n in tokens], color="grey", linestyle=":", label="weights, stored once")
for axis, title in zip(axes, ("a call, beyond its results", "the state of a stream"), strict=True):
    axis.set_xticks(tokens, [str(n) for n in tokens])
    axis.minorticks_off()
    axis.set(title=title, xlabel="tokens", ylabel="KiB a head")
axes[0].legend(fontsize=7)
plt.show()

print(f"{'':28}" + "".join(f"{n:>12}" for n in tokens))
for column in ("call", "state"):
    for name in names:
        kib = [row[column] for row in rows if row["mechanism"] == name]
        print(f"{column + ': ' + name:28}" + "".join(f"{x:>12.0f}" for x in kib))

# %%
# Nothing here stores an N x N matrix, softmax included: its time is quadratic, its memory is not. The linear engine
# keeps one number a token. The log-linear engine is not that thrifty: it works on logarithms in float64, Performer on
# 256 of them a token, in pieces, so that its memory levels off. What softmax cannot have is a state of one size: with
# 64 channels its cache is larger than a linear state from 65 tokens on, and at 8192 tokens 126 times as large.

# sphinx_gallery_thumbnail_number = 1
