"""What is audited: values of each mechanism, and the engine that runs a value.

A new mechanism is a row of SUBJECTS, its engine in `engine_of`, a formula in `quadratic` and a rule in `rigorous`; a
new engine is a row of ENGINES, a depth in `bounds` and an oracle in `truth`. A test fails while one is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

import linattn as la

__all__ = [
    "ENGINES",
    "SUBJECTS",
    "Calibrated",
    "engine_of",
    "is_signed",
    "is_variant",
    "may_be_causal",
    "n_rows",
    "of_channels",
]

ENGINES: dict[str, tuple[str, ...]] = {  # and the rooms' files that it runs
    "linear": ("linear",),
    "loglinear": ("loglinear",),
    "softmax": ("softmax",),
    "blocks": ("loglinear", "softmax"),
    "combiner": ("combiner",),
}


@dataclass(frozen=True)
class Calibrated:
    """A value whose constants are fitted to data: drawn once, unlike all that it is then judged on."""

    attend: Any

    def __repr__(self) -> str:
        return f"{self.attend!r}.calibrate(q, k)"


@cache
def of_channels(attend: Any, n_channels: int) -> Any:
    """The value itself, for heads of that many channels."""
    if not isinstance(attend, Calibrated):
        return attend
    rng = np.random.default_rng(n_channels)
    spread = np.linspace(0.5, 2, n_channels)  # channels differ, and the keys are off the origin
    q, k = spread * rng.normal(size=(64, n_channels)), rng.normal(size=(64, n_channels)) / spread + 0.5
    return attend.attend.calibrate(q, k)


# The values of each mechanism for sequences of at most n tokens.
SUBJECTS: dict[str, Callable[[int], list[Any]]] = {
    "Linear": lambda n: [la.Linear(), la.Linear("relu"), la.Linear("relu", normalize=False), la.Linear("exp")],
    "CosFormer": lambda n: [la.CosFormer(max(n, 1))],
    "Softmax": lambda n: [la.Softmax()],
    "Performer": lambda n: [
        la.Performer(8),
        la.Performer(8, features="hyperbolic"),
        la.Performer(8, features="relu", eps=0.1),
        la.Performer(8, features="trig"),
        Calibrated(la.Performer(8)),
    ],
    "LLN": lambda n: [la.LLN(alpha=1.5, beta=1.25), la.LLN(), Calibrated(la.LLN(calibration="exact"))],
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


def is_signed(attend: Any) -> bool:
    """Whether features may be negative: nothing is claimed, and long sums say nothing."""
    return getattr(attend, "features", None) == "trig"


def is_variant(attend: Any) -> bool:
    """Whether another value goes the same way, or nothing is claimed: a few families are enough for a quick audit."""
    return is_signed(attend) or (isinstance(attend, Calibrated) and isinstance(attend.attend, la.LLN))


def may_be_causal(attend: Any) -> bool:
    """Whether there are causal calls and streams; scales matched to a call's own moments would look ahead."""
    return getattr(attend, "alpha", 0) is not None


def n_rows(attend: Any, n_channels: int) -> int:
    """Rows of a state: n_sums R."""
    n_features: int = getattr(attend, "n_features", n_channels)
    return n_features * int(getattr(attend, "n_sums", 1))
