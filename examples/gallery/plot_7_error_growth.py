"""
Error to a million tokens
=========================

A linear attention is a sum over all earlier tokens, and sums of floats lose digits. How many, after a million tokens?
Measured by ``python scripts/measure_docs.py growth`` and read from ``docs/measured/measured.json``: float32, causal,
the largest error of the last 16 rows in units of ``u A abs(v)``, u half a unit in the last place of 1.
"""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib import pyplot as plt

MEASURED = next(folder for up in (Path.cwd(), *Path.cwd().parents) if (folder := up / "docs" / "measured").is_dir())
table = json.loads((MEASURED / "measured.json").read_text(encoding="utf-8"))["growth"]
rows = [dict(zip(table["heads"], row, strict=True)) for row in table["rows"]]
families = list(dict.fromkeys(row["keys and values"] for row in rows))
names = list(dict.fromkeys(row["mechanism"] for row in rows))

figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True)
for axis, family in zip(axes, families, strict=True):
    print(family)
    for name in names:
        own = [row for row in rows if (row["keys and values"], row["mechanism"]) == (family, name)]
        points = [(row["tokens"], row["error"]) for row in own]
        plain = name.startswith("plain")
        style = {"color": "grey", "linestyle": "--"} if plain else {}
        axis.loglog(*zip(*points, strict=True), marker="o", label=name, **style)
        print(f"  {name:34}" + "".join(f"{error:12.3g}" for _, error in points))
    axis.set(title=f"{family} keys and values", xlabel="tokens")
    axis.grid(axis="y", color="#e0e0e0", linewidth=0.6)
axes[0].set_ylabel("largest error, in units of u A |v|")
axes[0].legend(loc="upper left")
plt.show()

# %%
# The plain running sum, the loop one writes first, adds each token to a float32 state. On repeated keys and values,
# the easiest input there seems to be, all its roundings go one way and the error grows with the number of tokens.
# Ours do not grow: sums are carried with what rounding took from them (:doc:`/decisions/0007-accumulation`), so that
# only a chunk of tokens is ever summed in float32 alone. The bound that holds this is proved in
# :doc:`/engines/bounds`, and no line of it has the number of tokens in it.
