"""Efficient attentions on plain arrays: forward, hand-derived backward, exact streaming states.

A mechanism is a small frozen value that is called on arrays; see `CosFormer`, `Linear`, `Softmax`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from linattn import regions
from linattn.backends.numba.threads import threads
from linattn.engines.features import FeatureMap
from linattn.mechanisms.attention import State
from linattn.mechanisms.combiner import Combiner, combiner
from linattn.mechanisms.cosformer import CosFormer, cosformer
from linattn.mechanisms.linear import Linear, linear_attention
from linattn.mechanisms.lln import LLN, LLNDiag, lln, lln_diag
from linattn.mechanisms.performer import Performer, performer
from linattn.mechanisms.softmax import Softmax, softmax_attention
from linattn.plans.plan import Plan
from linattn.projections import draw_projection
from linattn.states import load_state, save_state

if TYPE_CHECKING:
    from linattn import instruments

__version__ = "0.1.0.dev0"

__all__ = [
    "Combiner",
    "CosFormer",
    "FeatureMap",
    "LLN",
    "LLNDiag",
    "Linear",
    "Performer",
    "Plan",
    "Softmax",
    "State",
    "combiner",
    "cosformer",
    "draw_projection",
    "instruments",
    "linear_attention",
    "lln",
    "lln_diag",
    "load_state",
    "performer",
    "regions",
    "save_state",
    "softmax_attention",
    "threads",
]


def __getattr__(name: str) -> Any:
    """`la.instruments` when it is first used: measuring is not on every program's way."""
    if name == "instruments":
        return import_module("linattn.instruments")
    raise AttributeError(f"module 'linattn' has no attribute {name!r}")
