"""The logarithms of the weights: how near they are to a normal law, and the temperature they stand for."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from linattn._arrays import Array
from linattn.instruments.reading import Estimate, Floats, Rows, read, variance_of
from linattn.instruments.weights import log_variance

MOST_ZEROS = 0.05  # beyond, what is left is not the matrix's law


class LogNormalFit(NamedTuple):
    """Moments of ln A[t, s], each row centred and divided by its own deviation; the normal law has 0 throughout."""

    skewness: Any
    kurtosis: Any  # excess
    kolmogorov: Any  # largest distance between the distribution functions; entries of a row share q[t]: no p-value
    residual: Any  # mean + variance / 2 of ln(n_t A) over all entries: 0 for a log-normal of mean 1
    zeros: Any  # fraction of visible entries that are 0, left out


def lognormal_fit(
    weights: Array, *, causal: bool = False, key_mask: Array | None = None, renormalize: bool = False
) -> LogNormalFit:
    """How near the logarithms of the weights are to a normal law, row by row.

    Raises
    ------
    ValueError
        If more than 5 % of the visible weights are 0.
    """
    a = read(weights, causal, key_mask, renormalize)
    lead, visible = a.a.shape[:-2], np.broadcast_to(a.visible, a.a.shape)
    each = [_fit(Rows(a.a[i], visible[i], a.n[i], a.live[i])) for i in np.ndindex(*lead)]
    found = np.array(each, dtype=np.float64)
    return LogNormalFit(*np.moveaxis(found.reshape(*lead, len(LogNormalFit._fields)), -1, 0))


def _fit(a: Rows) -> tuple[float, float, float, float, float]:
    seen = a.visible & a.live[:, None]
    positive = seen & (a.a > 0)
    zeros = 1 - int(np.sum(positive)) / max(int(np.sum(seen)), 1)
    if zeros > MOST_ZEROS:
        raise ValueError(
            f"`lognormal_fit` needs weights that are not 0, at most {MOST_ZEROS:.0%} of the visible ones may be, "
            f"got {zeros:.1%}."
        )
    logs = np.where(positive, np.log(np.where(positive, a.a, 1.0) * np.maximum(a.n, 1)[:, None]), 0.0)
    count = np.maximum(np.sum(positive, axis=-1, keepdims=True), 1)
    mean = np.sum(logs, axis=-1, keepdims=True) / count
    deviation = np.sqrt(variance_of(logs, positive, (-1,)))[:, None]
    varies = positive & (deviation > 1e-12 * np.max(abs(logs), initial=1.0))
    z = ((logs - mean) / np.where(deviation > 0, deviation, 1.0))[varies]
    everything = logs[positive]
    residual = np.mean(everything) + np.var(everything) / 2 if everything.size else np.nan
    if z.size == 0:
        return np.nan, np.nan, np.nan, float(residual), float(zeros)
    return float(np.mean(z**3)), float(np.mean(z**4) - 3), _kolmogorov(z), float(residual), float(zeros)


def _kolmogorov(z: Floats) -> float:
    """sup |F_n - Phi|."""
    z, n = np.sort(z), z.size
    phi = np.array([math.erfc(-x) for x in (z / math.sqrt(2)).tolist()]) / 2
    return float(max(np.max(np.arange(1, n + 1) / n - phi), np.max(phi - np.arange(n) / n)))


def temperature(
    weights: Array,
    *,
    causal: bool = False,
    key_mask: Array | None = None,
    rows: int | None = None,
    per_row: bool = False,
    renormalize: bool = False,
) -> Any:
    """1 / sqrt(row log-variance): one scale for every mechanism, infinite for uniform weights.

    For softmax of Gaussian q and k it is 1 / (sigma_q sigma_k); see `temperature_qk`.
    """
    found = log_variance(weights, causal=causal, key_mask=key_mask, rows=rows, per_row=per_row, renormalize=renormalize)
    with np.errstate(divide="ignore"):
        if isinstance(found, Estimate):
            tau = 1 / np.sqrt(found.value)
            return Estimate(tau, found.error * tau**3 / 2)  # d v^(-1/2) = -v^(-3/2) / 2 dv
        return (1 / np.sqrt(found))[()]
