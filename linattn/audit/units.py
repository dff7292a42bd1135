"""What an error is measured by: the truth of a call, the sizes of its terms, and one unit of the bound.

The oracles of the engines, in truth.py, truth_scores.py, truth_logs.py and truth_regions.py, fill a `Truth`;
`Truth.unit` is what T divides an error by.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from linattn.audit.measure import smallest_normal, unit_roundoff

__all__ = [
    "EXTENDED_BITS",
    "FIRST_ORDER",
    "NOT_SMALL",
    "PASSES",
    "Arithmetic",
    "Truth",
    "centred",
    "derivative_of",
    "extended",
    "missing_extended",
    "pulled_back",
]

Array = NDArray[Any]
PASSES = ("out", "d_q", "d_k", "d_v")
EXTENDED_BITS = 63  # of the significand, at least: float64 cannot judge float64
STEP = 1e-30
FIRST_ORDER = 2.0**-5  # of an exponent's error: beyond it the bound, which neglects its square, is not claimed
NOT_SMALL = "an exponent's error is not small"


def missing_extended() -> str | None:
    """Why float64 results of this length have no judge here; None if they have."""
    bits = np.finfo(np.longdouble).nmant
    return None if bits >= EXTENDED_BITS else f"long double has {bits} bits here, {EXTENDED_BITS} are needed"


def extended(dtype: str) -> Any:
    """The dtype that judges results of `dtype`."""
    return np.longdouble if dtype == "float64" else np.float64


class Truth(NamedTuple):
    """A dict each, by pass: "out", "d_q", "d_k", "d_v"."""

    value: dict[str, Array]
    terms: dict[str, Array]  # A|v| and S, the sums of absolute terms
    errors: dict[str, Array]  # what errors of features, 2 e A|v|, or of scores, pair by pair, may do to them, over u
    underflow: dict[str, Array]  # what underflow may add, in smallest normal numbers
    unclaimed: str = ""  # why the bound is not claimed for these inputs; empty where it is
    unclaimed_backward: str = ""

    def rows(self, rows: slice) -> Truth:
        """These queries and keys alone."""
        value, terms, errors, underflow = (
            {name: x[rows] if x.ndim else x for name, x in part.items()}
            for part in (self.value, self.terms, self.errors, self.underflow)
        )
        return Truth(value, terms, errors, underflow, self.unclaimed, self.unclaimed_backward)

    def unit(self, name: str, arithmetic: Arithmetic, depth: float) -> Array:
        """What T divides an error by: (D + 2 e / u) u A|v|, half without a denominator, and the underflow."""
        share = 1.0 if arithmetic.normalize else 0.5
        with np.errstate(over="ignore", invalid="ignore"):
            sums = share * arithmetic.u * (depth * self.terms[name] + self.errors[name])
        return sums + arithmetic.tiny * self.underflow[name]


@dataclass(frozen=True)
class Arithmetic:
    """Whose error is judged: the dtype of the results, and with it that of the sums."""

    dtype: str
    normalize: bool = True
    through_states: bool = False

    @property
    def sums(self) -> str:
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def u(self) -> float:
        return unit_roundoff(self.sums)

    @property
    def tiny(self) -> float:
        return smallest_normal(self.sums)

    @property
    def most(self) -> float:
        return float(np.finfo(self.sums).max)


def centred(v: Array, visible: NDArray[np.bool_], arithmetic: Arithmetic) -> tuple[Array, Array]:
    """v - mu, and its size: |v - mu| and what the rounding of mu, a sum of M terms, may add to it.

    A state is a sum of the values as they are: what comes out of one has the size |v|.
    """
    seen = visible.any(axis=0)
    if not seen.any():
        return v, abs(v)
    vc = v - v[seen].mean(axis=0)
    size = abs(vc) + arithmetic.u * seen.sum() * abs(v[seen]).mean(axis=0)
    return vc, size + abs(v) if arithmetic.through_states else size


def pulled_back(
    features: Any, q: Array, k: Array, d_phi: tuple[Array, Array], size: tuple[Array, Array]
) -> list[tuple[Array, Array]]:
    """For q and k: d_x[:, d] = sum_r d_phi[:, r] dphi_r / dx_d by complex steps, and the same of sizes."""
    d_x = [(np.zeros_like(x), np.zeros(x.shape)) for x in (q, k)]
    for d, slopes in derivatives(features, q, k):
        for (value, terms), d_y, s, slope in zip(d_x, d_phi, size, slopes, strict=True):
            value[:, d] = (d_y * slope).sum(axis=1)
            terms[:, d] = (s * abs(slope)).sum(axis=1)
    return d_x


def derivative_of(features: Any, q: Array, k: Array, *d_phi: Array) -> list[Array]:
    """The values of `pulled_back` alone."""
    d_x = [np.zeros_like(x) for x in (q, k)]
    for d, slopes in derivatives(features, q, k):
        for value, d_y, slope in zip(d_x, d_phi, slopes, strict=True):
            value[:, d] = (d_y * slope).sum(axis=1)
    return d_x


def derivatives(features: Any, q: Array, k: Array) -> Iterator[tuple[int, tuple[Array, Array]]]:
    """For each channel: the derivatives of both sides' features along it."""
    for d in range(q.shape[1]):
        step = 1j * STEP * (np.arange(q.shape[1]) == d)
        of_q, of_k = features(q + step, k + step)
        yield d, (of_q.imag / STEP, of_k.imag / STEP)
