"""Instruments of one weight matrix: how wide, how sharp, how local."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from linattn import _checks
from linattn._arrays import Array
from linattn.instruments.reading import Floats, entropies, mean_of_rows, number, read, variance_of


class Support(NamedTuple):
    """How many keys a row is spread over, three ways: inverse_max <= inverse_square <= exp_entropy <= n_t."""

    exp_entropy: Any  # 2^H
    inverse_square: Any  # 1 / sum_s A^2
    inverse_max: Any  # 1 / max_s A


# -- instruments of one matrix -------------------------------------------------------------------------------


def dead_rows(weights: Array, *, causal: bool = False, key_mask: Array | None = None) -> Any:
    """Number of rows that see nothing or sum to 0."""
    a = read(weights, causal, key_mask, renormalize=False)
    return np.sum(~a.live, axis=-1)[()]


def entropy(
    weights: Array,
    *,
    causal: bool = False,
    key_mask: Array | None = None,
    rows: int | None = None,
    per_row: bool = False,
    renormalize: bool = False,
) -> Any:
    """Mean of H_t = -sum_s A[t, s] log2 A[t, s], in bits: 0 (one key) .. log2 n_t (all alike).

    Examples
    --------
    >>> import numpy as np
    >>> from linattn import instruments
    >>> float(instruments.entropy(np.full((8, 8), 1 / 8)))
    3.0
    """
    a = read(weights, causal, key_mask, renormalize)
    return number(entropies(a.a), a.live, rows, per_row)


def relative_entropy(
    weights: Array,
    *,
    causal: bool = False,
    key_mask: Array | None = None,
    rows: int | None = None,
    per_row: bool = False,
    renormalize: bool = False,
) -> Any:
    """Mean of H_t / log2 n_t over the rows with n_t >= 2: 0 .. 1 however many keys a row sees."""
    a = read(weights, causal, key_mask, renormalize)
    measured = a.live & (a.n >= 2)
    return number(entropies(a.a) / np.log2(np.maximum(a.n, 2)), measured, rows, per_row)


def support(
    weights: Array,
    *,
    causal: bool = False,
    key_mask: Array | None = None,
    rows: int | None = None,
    per_row: bool = False,
    renormalize: bool = False,
) -> Support:
    """Means of the effective numbers of keys 2^H_t, 1 / sum_s A^2 and 1 / max_s A: each 1 .. n_t."""
    a = read(weights, causal, key_mask, renormalize)
    squares, largest = np.sum(a.a**2, axis=-1), np.max(a.a, axis=-1, initial=0.0)
    numbers = (
        np.exp2(entropies(a.a)),
        1 / np.where(a.live, squares, 1.0),
        1 / np.where(a.live, largest, 1.0),
    )
    return Support(*(number(x, a.live, rows, per_row) for x in numbers))


def concentration(
    weights: Array,
    *,
    causal: bool = False,
    key_mask: Array | None = None,
    rows: int | None = None,
    per_row: bool = False,
    renormalize: bool = False,
) -> Any:
    """Mean of n_t sum_s A^2 - 1: 0 (uniform) .. n_t - 1 (one key). With full rows M^2 Var(A) of all entries."""
    a = read(weights, causal, key_mask, renormalize)
    return number(a.n * np.sum(a.a**2, axis=-1) - 1, a.live, rows, per_row)


def log_variance(
    weights: Array,
    *,
    scope: str = "row",
    causal: bool = False,
    key_mask: Array | None = None,
    rows: int | None = None,
    per_row: bool = False,
    renormalize: bool = False,
) -> Any:
    """Population variance of l = ln(n_t A[t, s]) over the entries with A > 0.

    Parameters
    ----------
    scope : {"row", "global"}
        Mean over t of Var_s(l), or the variance of all l of a matrix, which takes in the spread of the
        normalisers and has no `rows` and no `per_row`.
    """
    _checks.choice("scope", scope, ("row", "global"))
    a = read(weights, causal, key_mask, renormalize)
    positive = a.a > 0
    logs = np.where(positive, np.log(np.where(positive, a.a, 1.0) * np.maximum(a.n, 1)[..., None]), 0.0)
    if scope == "row":
        return number(variance_of(logs, positive, (-1,)), a.live, rows, per_row)
    if rows is not None or per_row:
        raise ValueError(f'`scope="global"` is one number for a matrix, got rows={rows}, per_row={per_row}.')
    return np.where(np.any(a.live, axis=-1), variance_of(logs, positive, (-2, -1)), np.nan)[()]


def mean_distance(
    weights: Array,
    *,
    signed: bool = False,
    causal: bool = False,
    key_mask: Array | None = None,
    rows: int | None = None,
    per_row: bool = False,
    renormalize: bool = False,
) -> Any:
    """Mean over t of sum_s A[t, s] |t - s|, or of t - s with `signed=True` (positive looks back).

    Uniform weights have (N^2 - 1) / (3 N), causal ones (N - 1) / 4. Positions are token order.
    """
    a = read(weights, causal, key_mask, renormalize)
    offset = _offsets(a.a)
    if not _checks.flag("signed", signed):
        offset = abs(offset)
    return number(np.sum(a.a * offset, axis=-1), a.live, rows, per_row)


def mass_within(
    weights: Array,
    w: int,
    *,
    causal: bool = False,
    key_mask: Array | None = None,
    rows: int | None = None,
    per_row: bool = False,
    renormalize: bool = False,
) -> Any:
    """Mean over t of the weight on keys with |t - s| <= w.

    Uniform weights have ((2 w + 1) N - w (w + 1)) / N^2,
    causal ones (w + 1) / N (1 + sum over n = w+2 .. N of 1/n).
    """
    _checks.natural("w", w, least=0)
    a = read(weights, causal, key_mask, renormalize)
    return number(np.sum(a.a * (abs(_offsets(a.a)) <= w), axis=-1), a.live, rows, per_row)


def block_mass(
    weights: Array,
    b: int,
    *,
    causal: bool = False,
    key_mask: Array | None = None,
    rows: int | None = None,
    per_row: bool = False,
    renormalize: bool = False,
) -> Any:
    """Mean over t of the weight in the aligned block of b tokens that holds t; b / N for uniform weights."""
    _checks.natural("b", b)
    a = read(weights, causal, key_mask, renormalize)
    t, s = np.arange(a.a.shape[-2]) // b, np.arange(a.a.shape[-1]) // b
    return number(np.sum(a.a * (t[:, None] == s), axis=-1), a.live, rows, per_row)


def _offsets(a: Floats) -> NDArray[np.int_]:
    """t - s."""
    return np.arange(a.shape[-2])[:, None] - np.arange(a.shape[-1])


def selectivity(
    weights: Array, *, causal: bool = False, key_mask: Array | None = None, renormalize: bool = False
) -> Any:
    """H(mean row) - mean H_t, in bits: what the query tells about the key.

    0 if all rows agree, at most log2 M; equal to the mean over t of KL(A_t, mean row).
    """
    a = read(weights, causal, key_mask, renormalize)
    count = np.maximum(np.sum(a.live, axis=-1), 1)
    mean_row = np.sum(np.where(a.live[..., None], a.a, 0.0), axis=-2) / count[..., None]
    return (entropies(mean_row) - mean_of_rows(entropies(a.a), a.live))[()]


def sink(
    weights: Array,
    s: int = 0,
    *,
    causal: bool = False,
    key_mask: Array | None = None,
    rows: int | None = None,
    per_row: bool = False,
    renormalize: bool = False,
) -> Any:
    """Mean weight on key s."""
    _checks.natural("s", s, least=0)
    a = read(weights, causal, key_mask, renormalize)
    if s >= a.a.shape[-1]:
        raise ValueError(f"`s` must be one of the {a.a.shape[-1]} keys, got {s}.")
    return number(a.a[..., s], a.live, rows, per_row)
