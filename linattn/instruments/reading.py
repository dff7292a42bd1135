"""How a weight matrix is read and checked, and how numbers per row become one."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from linattn import _arrays, _checks
from linattn._arrays import Array

Floats = NDArray[np.float64]

SAMPLE_SEED = 0
TOLERANCE = {"float64": 1e-9}
TOLERANCE_SHORT = 1e-4


class Estimate(NamedTuple):
    """What a sample of rows says about all of them."""

    value: Any
    error: Any  # one standard deviation of `value`


class Rows(NamedTuple):
    """A checked matrix."""

    a: Floats  # (..., N, M), dead rows zero
    visible: NDArray[np.bool_]  # broadcasts with a
    n: NDArray[np.int_]  # n_t, broadcasts with (..., N)
    live: NDArray[np.bool_]  # (..., N)


# -- reading a matrix ----------------------------------------------------------------------------------------


def read(weights: Array, causal: bool, key_mask: Array | None, renormalize: bool, name: str = "weights") -> Rows:
    a, tolerance = matrix(name, weights)
    n_queries, n_keys = a.shape[-2:]
    visible = np.ones((1, n_keys), dtype=bool)
    if _checks.flag("causal", causal):
        _checks.causal_lengths(n_queries, n_keys)
        visible = np.tri(n_queries, n_keys, dtype=bool)
    if key_mask is not None:
        visible = visible & mask_of(key_mask, a)[..., None, :]
    hidden = np.where(visible, 0.0, a)
    if np.any(hidden):
        at = worst(abs(hidden))
        raise ValueError(f"`{name}` must be 0 where nothing is visible, got {a[at]:.6g} at {at}.")
    if not np.all(a >= 0):  # NaN fails
        at = worst(np.where(np.isnan(a), np.inf, -a))
        raise ValueError(f"`{name}` must be non-negative, got {a[at]:.6g} at {at}: see `negative_mass`.")
    total = np.sum(a, axis=-1)
    n = np.broadcast_to(np.sum(visible, axis=-1), total.shape)
    live = (total > 0) & (n > 0)
    if _checks.flag("renormalize", renormalize):
        if not np.all(np.isfinite(total)):
            raise ValueError(f"`{name}` must be finite, got a row that sums to {np.max(total)}.")
        a = a / np.where(live, total, 1.0)[..., None]
    else:
        off = np.where(live, abs(total - 1), 0.0)
        if not np.all(off <= tolerance):
            at = worst(off)
            raise ValueError(
                f"`{name}` must have rows that sum to 1 within {tolerance:g} (or `renormalize=True`), "
                f"got {total[at]:.12g} in row {at}."
            )
    return Rows(a, visible, n, live)


def matrix(name: str, x: Array) -> tuple[Floats, float]:
    """`x` (..., N, M) in float64 and the tolerance that its dtype deserves."""
    _checks.array(name, x)
    _checks.floating(name, x)
    _checks.axes(**{name: x})
    tolerance = TOLERANCE.get(_arrays.dtype_name(x), TOLERANCE_SHORT)
    return np.asarray(_arrays.to_numpy(x), dtype=np.float64), tolerance


def mask_of(key_mask: Array, a: Floats) -> NDArray[np.bool_]:
    mask = _arrays.to_numpy(key_mask)
    _checks.key_mask(mask, np.swapaxes(a, -1, -2), a.shape[:-2])  # its tokens are the columns of a
    return np.asarray(mask)


def worst(size: Floats) -> tuple[int, ...]:
    """Index of the largest entry; a NaN counts as larger than anything."""
    flat = int(np.argmax(np.where(np.isnan(size), np.inf, size)))
    return tuple(int(i) for i in np.unravel_index(flat, size.shape))


# -- from rows to numbers ------------------------------------------------------------------------------------


def mean_of_rows(values: Floats, live: NDArray[np.bool_]) -> Any:
    """Mean over the live rows; NaN where there are none."""
    count = np.sum(live, axis=-1)
    total = np.sum(np.where(live, values, 0.0), axis=-1)
    mean = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return mean[()]


def number(values: Floats, live: NDArray[np.bool_], rows: int | None, per_row: bool) -> Any:
    """The mean of a number per row, the numbers themselves, or an estimate from a sample."""
    values = np.where(live, values, np.nan)
    if _checks.flag("per_row", per_row):
        if rows is not None:
            raise ValueError(f"`rows` and `per_row=True` exclude each other, got rows={rows}.")
        return values
    if rows is None:
        return mean_of_rows(values, live)
    n_rows = values.shape[-1]
    _checks.natural("rows", rows, least=2)
    if rows > n_rows:
        raise ValueError(f"`rows` must be at most the number of rows {n_rows}, got {rows}.")
    some = np.sort(np.random.default_rng(SAMPLE_SEED).choice(n_rows, size=rows, replace=False))
    sample, alive = values[..., some], live[..., some]
    mean, count = mean_of_rows(sample, alive), np.sum(alive, axis=-1)
    squares = np.sum(np.where(alive, sample - np.asarray(mean)[..., None], 0.0) ** 2, axis=-1)
    variance = np.where(count > 1, squares / np.maximum(count - 1, 1), np.nan)
    unseen = 1 - rows / n_rows  # a sample of all rows has no error
    error = np.sqrt(unseen * variance / np.maximum(count, 1))
    return Estimate(mean, error[()])


def x_log2_y(x: Floats, y: Floats) -> Floats:
    """x log2 y with 0 log2 0 = 0."""
    with np.errstate(divide="ignore"):
        return np.where(x > 0, x * np.log2(np.where(x > 0, y, 1.0)), 0.0)


def entropies(a: Floats) -> Floats:
    """H_t = -sum_s A log2 A, in bits."""
    h: Floats = -np.sum(x_log2_y(a, a), axis=-1)
    return abs(h)  # -0.0 where one key has it all


def variance_of(x: Floats, where: NDArray[np.bool_], axes: tuple[int, ...]) -> Floats:
    count = np.maximum(np.sum(where, axis=axes, keepdims=True), 1)
    mean = np.sum(np.where(where, x, 0.0), axis=axes, keepdims=True) / count
    squares: Floats = np.sum(np.where(where, x - mean, 0.0) ** 2 / count, axis=axes)
    return squares


class NegativeMass(NamedTuple):
    """How far weights are from a distribution."""

    mass: Any  # mean over t of sum_s |A| - |sum_s A|: 0 where all entries of a row have one sign
    smallest_sum: Any
    largest_sum: Any


def negative_mass(weights: Array) -> NegativeMass:
    """For signed or unnormalised weights, which the others refuse: what cancels, and the range of row sums."""
    a, _ = matrix("weights", weights)
    total = np.sum(a, axis=-1)
    mass = np.mean(np.sum(abs(a), axis=-1) - abs(total), axis=-1)
    return NegativeMass(mass[()], np.min(total, axis=-1)[()], np.max(total, axis=-1)[()])
