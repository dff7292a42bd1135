"""Numbers read off a weight matrix: what an attention does.

The matrices A are (..., N, M), rows t = queries, columns s = keys, as `attend.weights(q, k)` gives them, from
any array library. Everything is computed in float64 over the last two axes: one number for each leading
index, or with `per_row=True` one for each row. n_t is the number of keys that query t sees, by `causal` and
`key_mask`, never by the zeros of A. Rows that see nothing or sum to 0 are *dead*: they are left out (NaN with
`per_row=True`), and `dead_rows` counts them.

Options shared by the instruments of a single matrix
----------------------------------------------------
causal : bool
    Query t sees the keys s <= t.
key_mask : bool array (..., M), optional
    True = visible.
rows : int, optional
    Read a sample of so many rows, always the same, and return `Estimate(value, error)`.
per_row : bool
    One number for each row instead of their mean.
renormalize : bool
    Divide each row by its sum first.

A must be non-negative with live rows that sum to 1, within 1e-9 (1e-4 for dtypes shorter than float64), and
zero where nothing is visible; otherwise a `ValueError` names the worst row or entry.
"""

from __future__ import annotations

from linattn.instruments.inputs import Sigma, log_variance_qk, sigma, temperature_qk
from linattn.instruments.lognormal import LogNormalFit, lognormal_fit, temperature
from linattn.instruments.mechanism import PerformerReport, Report, performer_report, report
from linattn.instruments.pair import Comparison, compare
from linattn.instruments.reading import Estimate, NegativeMass, negative_mass
from linattn.instruments.spectrum import Rank, rank, spectral_gap, spectral_gap_features, spectral_gap_operator
from linattn.instruments.weights import (
    Support,
    block_mass,
    concentration,
    dead_rows,
    entropy,
    log_variance,
    mass_within,
    mean_distance,
    relative_entropy,
    selectivity,
    sink,
    support,
)

__all__ = [
    "Comparison",
    "Estimate",
    "LogNormalFit",
    "NegativeMass",
    "PerformerReport",
    "Rank",
    "Report",
    "Sigma",
    "Support",
    "block_mass",
    "compare",
    "concentration",
    "dead_rows",
    "entropy",
    "log_variance",
    "log_variance_qk",
    "lognormal_fit",
    "mass_within",
    "mean_distance",
    "negative_mass",
    "performer_report",
    "rank",
    "relative_entropy",
    "report",
    "selectivity",
    "sigma",
    "sink",
    "spectral_gap",
    "spectral_gap_features",
    "spectral_gap_operator",
    "support",
    "temperature",
    "temperature_qk",
]
