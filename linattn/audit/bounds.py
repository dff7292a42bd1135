"""The proved error bound of each engine, in code. Its derivation: docs/engines/bounds.

Features are non-negative, `eps` is "safe", u is the unit roundoff of the arithmetic, A the weights:

    |got - out| <= 2 (D + 2 e / u) u A|v|        to first order in u

D      `depth`: roundings that a term passes from its factors to its place in a sum, however the sum is cut
e      `feature_error`: relative error of a feature, which for exp(l) is the absolute error of l; under softmax 2 e is
       that of a score

No condition number enters: the denominator adds terms of one sign. Without a denominator it is half of this. The audit
prints T = error / ((D + 2 e / u) u A|v|): the proof gives 2, and the audit fails at 1.
"""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

from numpy.typing import NDArray

__all__ = ["CALIBRATED", "chunk_of", "depth", "feature_error", "gauge_bits", "matched_error", "projection_depth",
           "score_error"]  # fmt: skip

FEATURE_ERROR = {"identity": 0.0, "relu": 0.0, "elu1": 2.0, "exp": 2.0}  # in u
EXPONENTIAL = ("elu1", "exp")  # may underflow where they are not zero
COSINE_ERROR = 3.0  # in u: two tables, two products, one addition of terms of one sign
EXP_ERROR = 2.0  # in u: relative error of a library's exp
LOG_ERROR = EXP_ERROR + 1.0  # in u: e^l by a power of two and the exp of what is left, itself rounded once
LOG_LIMIT = 2.0**27 * math.log(2)  # a logarithm of this size has no digit left that its exponential needs: NaN
MADE = 2.0**-53  # the unit roundoff of logarithms and projections: they are made in float64 for every dtype


TILES = {  # the module that says how a room cuts its sums; numba cuts them all alike
    "numba": "numba._tiles",
    "reference": "reference.linear",
    "reference, loglinear": "reference._gauges",
}


def tiles(backend: str, engine: str = "linear") -> Any:
    return import_module("linattn.backends." + TILES.get(f"{backend}, {engine}", TILES[backend]))


def chunk_of(backend: str, engine: str = "linear") -> int:
    """C: tokens that the room sums in the dtype of its arithmetic before they are carried over to a state."""
    engine = "loglinear" if engine == "blocks" else engine
    return int(tiles(backend, engine).SETTLE if backend == "numba" else tiles(backend, engine).CHUNK)


def linear_depth(backend: str, dtype: str, *, n_keys: int, n_features: int, engine: str = "linear") -> float:
    """Chunks of C, a state of R rows: C + R + 4, and N / C more where the state itself is summed in the dtype."""
    chunk = min(chunk_of(backend, engine), max(n_keys, 1))
    if backend == "numba":  # the state keeps what its rounding took; pairs of T tokens are added one by one
        return float(chunk + n_features + tiles(backend).TILE.tokens + 2)
    if dtype == "float64":
        return chunk + n_features + 4 + -(-n_keys // chunk)
    return chunk + n_features + 4  # a float64 state: N / C of its roundings are less than one of ours


def softmax_depth(backend: str, dtype: str, *, n_keys: int, n_features: int) -> float:
    """M keys one after the other; in tiles each tile may rescale what came before."""
    rescalings = -(-n_keys // tiles(backend).CHUNK) if backend == "numba" else 0
    return n_keys + 3 + 2 * rescalings


def loglinear_depth(backend: str, dtype: str, *, n_keys: int, n_features: int) -> float:
    """As the linear engine, with chunks of its own: gauges are powers of two and round nothing.

    The reference forms a chunk's triangle from squares whose sides double: a square of side w adds w rounded terms and
    reaches the result after log2(C / w) additions, fewer than C for every w.
    """
    return linear_depth(backend, dtype, n_keys=n_keys, n_features=n_features, engine="loglinear")


def blocks_depth(backend: str, dtype: str, *, n_keys: int, n_features: int) -> float:
    """The deeper of both parts, two products and their sum."""
    sizes = {"n_keys": n_keys, "n_features": n_features}
    return 3 + max(depth(backend, dtype, **sizes) for depth in (loglinear_depth, softmax_depth))


def combiner_depth(backend: str, dtype: str, *, n_keys: int, n_features: int) -> float:
    """A softmax inside a region, and one over keys and regions: one after the other."""
    return 2 * (n_keys + 3)


DEPTHS = {
    "linear": linear_depth,
    "loglinear": loglinear_depth,
    "softmax": softmax_depth,
    "blocks": blocks_depth,
    "combiner": combiner_depth,
}


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


def gauge_bits(dtype: str) -> int:
    """By how many bits a key may exceed its gauge: products vanish so much above the smallest normal number."""
    bits: int = import_module("linattn.backends.numba._logs").BITS[8 if dtype == "float64" else 4]
    return bits


def projection_depth(n_channels: int) -> float:
    """Roundings of a row of W times sqrt(scale) x: D products and their sum; the root, and its product with x."""
    return n_channels + 2


CALIBRATED = 3  # roundings more where x' = A x and y' = A^-1 (y - c): a difference, a reciprocal, a product


def matched_error(n_queries: int, n_keys: int) -> float:
    """Relative error of LLN's matched scales over that of their arithmetic; counts are of numbers, not of tokens.

    sigma^2 is a sum of n squares of differences, n + 3 roundings; chi = (sigma_q^2 sigma_k^2 - b) / a with b < 0 loses
    nothing; alpha = sqrt(chi / 2) / sigma_q takes half of both and half of its own again.
    """
    return 1.5 * (n_queries + n_keys + 6) + 6
