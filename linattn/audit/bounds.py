"""The proved error bound of each engine, in code. Its derivation: docs/engines/bounds.

Features are non-negative, `eps` is "safe", u is the unit roundoff of the arithmetic, A the weights:

    |got - out| <= 2 (D + 2 e / u) u A|v|        to first order in u

D      `depth`: roundings that a term passes from its factors to its place in a sum, however the sum is cut
e      `feature_error`: relative error of a feature; under softmax 2 e is the absolute error of a score

No condition number enters: the denominator adds terms of one sign. Without a denominator it is half of this. The audit
prints T = error / ((D + 2 e / u) u A|v|): the proof gives 2, and the audit fails at 1.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from numpy.typing import NDArray

__all__ = ["chunk_of", "depth", "feature_error", "score_error"]

FEATURE_ERROR = {"identity": 0.0, "relu": 0.0, "elu1": 2.0, "exp": 2.0}  # in u
EXPONENTIAL = ("elu1", "exp")  # may underflow where they are not zero
COSINE_ERROR = 3.0  # in u: two tables, two products, one addition of terms of one sign
EXP_ERROR = 2.0  # in u: relative error of a library's exp


def tiles(backend: str) -> Any:
    """The module that says how a room cuts its sums."""
    return import_module("linattn.backends." + {"reference": "reference.linear", "numba": "numba._tiles"}[backend])


def chunk_of(backend: str) -> int:
    """C: tokens that the room sums in the dtype of its arithmetic before they are carried over to a state."""
    return int(tiles(backend).SETTLE if backend == "numba" else tiles(backend).CHUNK)


def linear_depth(backend: str, dtype: str, *, n_keys: int, n_features: int) -> float:
    """Chunks of C, a state of R rows: C + R + 4, and N / C more where the state itself is summed in the dtype."""
    chunk = min(chunk_of(backend), max(n_keys, 1))
    if backend == "numba":  # the state keeps what its rounding took; pairs of T tokens are added one by one
        return float(chunk + n_features + tiles(backend).TILE.tokens + 2)
    if dtype == "float64":
        return chunk + n_features + 4 + -(-n_keys // chunk)
    return chunk + n_features + 4  # a float64 state: N / C of its roundings are less than one of ours


def softmax_depth(backend: str, dtype: str, *, n_keys: int, n_features: int) -> float:
    """M keys one after the other; in tiles each tile may rescale what came before."""
    rescalings = -(-n_keys // tiles(backend).CHUNK) if backend == "numba" else 0
    return n_keys + 3 + 2 * rescalings


DEPTHS = {"linear": linear_depth, "softmax": softmax_depth}


def depth(engine: str, backend: str, dtype: str, *, n_keys: int, n_features: int) -> float:
    """D of one call; `n_features` counts the rows of a state, n_sums R."""
    return DEPTHS[engine](backend, dtype, n_keys=n_keys, n_features=n_features)


def feature_error(feature_map: str, turned: bool) -> float:
    """e / u of features made by an elementwise map, and turned by an angle if `turned`."""
    return FEATURE_ERROR[feature_map] + (COSINE_ERROR if turned else 0.0)


def score_error(sizes: NDArray[Any], shifted: NDArray[Any], n_channels: int) -> NDArray[Any]:
    """2 e / u under softmax, pair by pair: the absolute error of the exponent s - top, and exp's own.

    sizes = scale |q| . |k| (..., n, M): D products, their sum and the scale, each rounded; shifted = |s - top|.
    The error of the row's maximum is common to all its pairs and cancels.
    """
    return (n_channels + 2) * sizes + shifted + EXP_ERROR
