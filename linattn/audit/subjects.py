"""What is audited: values of each mechanism, and the engine that runs a value.

A new mechanism is a row of SUBJECTS, its engine in `engine_of`, a formula in `quadratic` and a rule in `rigorous`; a
new engine is a row of ENGINES, a depth in `bounds` and an oracle in `truth`. A test fails while one is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import linattn as la

__all__ = ["ENGINES", "SUBJECTS", "engine_of", "n_rows"]

ENGINES: dict[str, tuple[str, ...]] = {  # and the rooms' files that it runs
    "linear": ("linear",),
    "loglinear": ("loglinear",),
    "softmax": ("softmax",),
    "blocks": ("loglinear", "softmax"),
    "combiner": ("combiner",),
}

# The values of each mechanism for sequences of at most n tokens.
SUBJECTS: dict[str, Callable[[int], list[Any]]] = {
    "Linear": lambda n: [la.Linear(), la.Linear("relu"), la.Linear("relu", normalize=False), la.Linear("exp")],
    "CosFormer": lambda n: [la.CosFormer(max(n, 1))],
    "Softmax": lambda n: [la.Softmax()],
    "Performer": lambda n: [
        la.Performer(8),
        la.Performer(8, features="hyperbolic"),
        la.Performer(8, features="relu", eps=0.1),
    ],
    "LLN": lambda n: [la.LLN(alpha=1.5, beta=1.25)],
    "LLNDiag": lambda n: [la.LLNDiag(alpha=1.5, beta=1.25, block=16)],
    "Combiner": lambda n: [la.Combiner(span=4)],
}

LOG_FEATURES = ("positive", "hyperbolic")


def engine_of(attend: Any) -> str:
    """The engine that runs a value; a key of ENGINES."""
    if isinstance(attend, la.Softmax):
        return "softmax"
    if isinstance(attend, la.LLNDiag):
        return "blocks"
    if isinstance(attend, la.Combiner):
        return "combiner"
    by_logs = isinstance(attend, la.LLN) or getattr(attend, "feature_map", None) == "exp"
    return "loglinear" if by_logs or getattr(attend, "features", None) in LOG_FEATURES else "linear"


def n_rows(attend: Any, n_channels: int) -> int:
    """Rows of a state: n_sums R."""
    n_features: int = getattr(attend, "n_features", n_channels)
    return n_features * int(getattr(attend, "n_sums", 1))
