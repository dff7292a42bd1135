"""How the gallery's pictures look: one set of rules for all, so that the programs themselves stay short."""

from __future__ import annotations

from typing import Any

COLOURS = ("#1b1b1b", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f4fc9", "#8c6d31")


def dress(gallery_conf: dict[str, Any], name: str) -> None:
    """Called by sphinx-gallery before every program."""
    import matplotlib
    from cycler import cycler

    matplotlib.rcParams.update(
        {
            "axes.grid": False,
            "axes.prop_cycle": cycler(color=COLOURS),
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlesize": 10,
            "figure.constrained_layout.use": True,
            "figure.dpi": 110,
            "font.size": 9,
            "legend.fontsize": 8,
            "legend.frameon": False,
            "lines.linewidth": 1.8,
            "lines.markersize": 4,
            "savefig.facecolor": "white",
        }
    )
