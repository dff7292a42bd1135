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

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from linattn import _arrays, _checks
from linattn._arrays import Array

__all__ = [
    "Comparison",
    "Estimate",
    "Support",
    "block_mass",
    "compare",
    "concentration",
    "dead_rows",
    "entropy",
    "log_variance",
    "mass_within",
    "mean_distance",
    "relative_entropy",
    "selectivity",
    "sink",
    "spectral_gap",
    "spectral_gap_features",
    "support",
]

Floats = NDArray[np.float64]

SAMPLE_SEED = 0
TOLERANCE = {"float64": 1e-9}
TOLERANCE_SHORT = 1e-4


class Estimate(NamedTuple):
    """What a sample of rows says about all of them."""

    value: Any
    error: Any  # one standard deviation of `value`


class Support(NamedTuple):
    """How many keys a row is spread over, three ways: inverse_max <= inverse_square <= exp_entropy <= n_t."""

    exp_entropy: Any  # 2^H
    inverse_square: Any  # 1 / sum_s A^2
    inverse_max: Any  # 1 / max_s A


class Comparison(NamedTuple):
    """How far two weight matrices are apart: mean over the rows, and the largest row.

    For scale: `tv_uniform` is the distance of uniform weights; returning zeros has an `output_error` of 1.
    """

    tv: Any  # sum_s |A - B| / 2
    tv_max: Any
    kl: Any  # sum_s A log2(A / B), infinite where B is 0 and A is not
    kl_max: Any
    js: Any  # (KL(A, C) + KL(B, C)) / 2, C = (A + B) / 2, in bits
    js_max: Any
    hellinger2: Any  # 1 - sum_s sqrt(A B)
    hellinger2_max: Any
    tv_uniform: Any
    output_error: Any  # |A v - B v| / |B v|; None without `v`
    dead: Any  # rows left out because one of the two is dead


class _Rows(NamedTuple):
    """A checked matrix."""

    a: Floats  # (..., N, M), dead rows zero
    visible: NDArray[np.bool_]  # broadcasts with a
    n: NDArray[np.int_]  # n_t, broadcasts with (..., N)
    live: NDArray[np.bool_]  # (..., N)


# -- reading a matrix ----------------------------------------------------------------------------------------


def _read(weights: Array, causal: bool, key_mask: Array | None, renormalize: bool, name: str = "weights") -> _Rows:
    a, tolerance = _matrix(name, weights)
    n_queries, n_keys = a.shape[-2:]
    visible = np.ones((1, n_keys), dtype=bool)
    if _checks.flag("causal", causal):
        _checks.causal_lengths(n_queries, n_keys)
        visible = np.tri(n_queries, n_keys, dtype=bool)
    if key_mask is not None:
        visible = visible & _mask(key_mask, a)[..., None, :]
    hidden = np.where(visible, 0.0, a)
    if np.any(hidden):
        at = _worst(abs(hidden))
        raise ValueError(f"`{name}` must be 0 where nothing is visible, got {a[at]:.6g} at {at}.")
    if not np.all(a >= 0):  # NaN fails
        at = _worst(np.where(np.isnan(a), np.inf, -a))
        raise ValueError(f"`{name}` must be non-negative, got {a[at]:.6g} at {at}: see `negative` parts first.")
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
            at = _worst(off)
            raise ValueError(
                f"`{name}` must have rows that sum to 1 within {tolerance:g} (or `renormalize=True`), "
                f"got {total[at]:.12g} in row {at}."
            )
    return _Rows(a, visible, n, live)


def _matrix(name: str, x: Array) -> tuple[Floats, float]:
    """`x` (..., N, M) in float64 and the tolerance that its dtype deserves."""
    _checks.array(name, x)
    _checks.floating(name, x)
    _checks.axes(**{name: x})
    tolerance = TOLERANCE.get(_arrays.dtype_name(x), TOLERANCE_SHORT)
    return np.asarray(_arrays.to_numpy(x), dtype=np.float64), tolerance


def _mask(key_mask: Array, a: Floats) -> NDArray[np.bool_]:
    mask = _arrays.to_numpy(key_mask)
    _checks.key_mask(mask, np.swapaxes(a, -1, -2), a.shape[:-2])  # its tokens are the columns of a
    return np.asarray(mask)


def _worst(size: Floats) -> tuple[int, ...]:
    """Index of the largest entry; a NaN counts as larger than anything."""
    flat = int(np.argmax(np.where(np.isnan(size), np.inf, size)))
    return tuple(int(i) for i in np.unravel_index(flat, size.shape))


# -- from rows to numbers ------------------------------------------------------------------------------------


def _mean(values: Floats, live: NDArray[np.bool_]) -> Any:
    """Mean over the live rows; NaN where there are none."""
    count = np.sum(live, axis=-1)
    total = np.sum(np.where(live, values, 0.0), axis=-1)
    mean = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return mean[()]


def _result(values: Floats, live: NDArray[np.bool_], rows: int | None, per_row: bool) -> Any:
    """The mean of a number per row, the numbers themselves, or an estimate from a sample."""
    values = np.where(live, values, np.nan)
    if _checks.flag("per_row", per_row):
        if rows is not None:
            raise ValueError(f"`rows` and `per_row=True` exclude each other, got rows={rows}.")
        return values
    if rows is None:
        return _mean(values, live)
    n_rows = values.shape[-1]
    _checks.natural("rows", rows, least=2)
    if rows > n_rows:
        raise ValueError(f"`rows` must be at most the number of rows {n_rows}, got {rows}.")
    some = np.sort(np.random.default_rng(SAMPLE_SEED).choice(n_rows, size=rows, replace=False))
    sample, alive = values[..., some], live[..., some]
    mean, count = _mean(sample, alive), np.sum(alive, axis=-1)
    squares = np.sum(np.where(alive, sample - np.asarray(mean)[..., None], 0.0) ** 2, axis=-1)
    variance = np.where(count > 1, squares / np.maximum(count - 1, 1), np.nan)
    unseen = 1 - rows / n_rows  # a sample of all rows has no error
    error = np.sqrt(unseen * variance / np.maximum(count, 1))
    return Estimate(mean, error[()])


def _x_log2_y(x: Floats, y: Floats) -> Floats:
    """x log2 y with 0 log2 0 = 0."""
    with np.errstate(divide="ignore"):
        return np.where(x > 0, x * np.log2(np.where(x > 0, y, 1.0)), 0.0)


def _entropies(a: Floats) -> Floats:
    """H_t = -sum_s A log2 A, in bits."""
    h: Floats = -np.sum(_x_log2_y(a, a), axis=-1)
    return abs(h)  # -0.0 where one key has it all


# -- instruments of one matrix -------------------------------------------------------------------------------


def dead_rows(weights: Array, *, causal: bool = False, key_mask: Array | None = None) -> Any:
    """Number of rows that see nothing or sum to 0."""
    a = _read(weights, causal, key_mask, renormalize=False)
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
    a = _read(weights, causal, key_mask, renormalize)
    return _result(_entropies(a.a), a.live, rows, per_row)


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
    a = _read(weights, causal, key_mask, renormalize)
    measured = a.live & (a.n >= 2)
    return _result(_entropies(a.a) / np.log2(np.maximum(a.n, 2)), measured, rows, per_row)


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
    a = _read(weights, causal, key_mask, renormalize)
    squares, largest = np.sum(a.a**2, axis=-1), np.max(a.a, axis=-1, initial=0.0)
    numbers = (
        np.exp2(_entropies(a.a)),
        1 / np.where(a.live, squares, 1.0),
        1 / np.where(a.live, largest, 1.0),
    )
    return Support(*(_result(x, a.live, rows, per_row) for x in numbers))


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
    a = _read(weights, causal, key_mask, renormalize)
    return _result(a.n * np.sum(a.a**2, axis=-1) - 1, a.live, rows, per_row)


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
    a = _read(weights, causal, key_mask, renormalize)
    positive = a.a > 0
    logs = np.where(positive, np.log(np.where(positive, a.a, 1.0) * np.maximum(a.n, 1)[..., None]), 0.0)
    if scope == "row":
        return _result(_variance(logs, positive, (-1,)), a.live, rows, per_row)
    if rows is not None or per_row:
        raise ValueError(f'`scope="global"` is one number for a matrix, got rows={rows}, per_row={per_row}.')
    return np.where(np.any(a.live, axis=-1), _variance(logs, positive, (-2, -1)), np.nan)[()]


def _variance(x: Floats, where: NDArray[np.bool_], axes: tuple[int, ...]) -> Floats:
    count = np.maximum(np.sum(where, axis=axes, keepdims=True), 1)
    mean = np.sum(np.where(where, x, 0.0), axis=axes, keepdims=True) / count
    squares: Floats = np.sum(np.where(where, x - mean, 0.0) ** 2 / count, axis=axes)
    return squares


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
    a = _read(weights, causal, key_mask, renormalize)
    offset = _offsets(a.a)
    if not _checks.flag("signed", signed):
        offset = abs(offset)
    return _result(np.sum(a.a * offset, axis=-1), a.live, rows, per_row)


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
    a = _read(weights, causal, key_mask, renormalize)
    return _result(np.sum(a.a * (abs(_offsets(a.a)) <= w), axis=-1), a.live, rows, per_row)


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
    a = _read(weights, causal, key_mask, renormalize)
    t, s = np.arange(a.a.shape[-2]) // b, np.arange(a.a.shape[-1]) // b
    return _result(np.sum(a.a * (t[:, None] == s), axis=-1), a.live, rows, per_row)


def _offsets(a: Floats) -> NDArray[np.int_]:
    """t - s."""
    return np.arange(a.shape[-2])[:, None] - np.arange(a.shape[-1])


def selectivity(
    weights: Array, *, causal: bool = False, key_mask: Array | None = None, renormalize: bool = False
) -> Any:
    """H(mean row) - mean H_t, in bits: what the query tells about the key.

    0 if all rows agree, at most log2 M; equal to the mean over t of KL(A_t, mean row).
    """
    a = _read(weights, causal, key_mask, renormalize)
    count = np.maximum(np.sum(a.live, axis=-1), 1)
    mean_row = np.sum(np.where(a.live[..., None], a.a, 0.0), axis=-2) / count[..., None]
    return (_entropies(mean_row) - _mean(_entropies(a.a), a.live))[()]


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
    a = _read(weights, causal, key_mask, renormalize)
    if s >= a.a.shape[-1]:
        raise ValueError(f"`s` must be one of the {a.a.shape[-1]} keys, got {s}.")
    return _result(a.a[..., s], a.live, rows, per_row)


# -- spectral gap --------------------------------------------------------------------------------------------


def spectral_gap(weights: Array, *, causal: bool = False, key_mask: Array | None = None) -> Any:
    """1 - |lambda_2|: of the eigenvalues of the square A the one nearest 1 is removed, once.

    lambda_2 is the one of largest modulus among the rest. Gap 1: all rows agree; 0: a part of the tokens
    never hears of the others. Hidden tokens are left out as queries too.

    Raises
    ------
    ValueError
        For N != M, dead rows, and causal weights: these are triangular, their eigenvalues the diagonal, and
        the gap would say 1 - max_{t > 0} A[t, t] and nothing about mixing.
    """
    if _checks.flag("causal", causal):
        raise ValueError(
            "`spectral_gap` must not be causal: the eigenvalues of a triangular matrix are its diagonal, "
            "got causal=True."
        )
    a = _read(weights, causal, key_mask, renormalize=False)
    _check_square(*a.a.shape[-2:])
    square, live = a.a, a.live
    if key_mask is not None:
        seen = _mask(key_mask, a.a)
        square = np.where(seen[..., :, None], square, 0.0)  # a hidden token adds an eigenvalue 0 and nothing else
        live = live | ~seen
    _check_live(live)
    return _gap(np.linalg.eigvals(square).astype(np.complex128))


def spectral_gap_features(phi_q: Array, phi_k: Array) -> Any:
    """`spectral_gap` of A = diag(1/den) phi_q phi_k^T from its features: the eigenvalues of an R x R matrix.

    A = f phi_k^T with f = phi_q / den has the non-zero eigenvalues of phi_k^T f.

    Parameters
    ----------
    phi_q, phi_k : arrays (..., N, R)
        Non-negative features.
    """
    features = {}
    for name, x in (("phi_q", phi_q), ("phi_k", phi_k)):
        features[name], _ = _matrix(name, x)
        if not np.all((features[name] >= 0) & (features[name] < np.inf)):
            bad = features[name]
            at = _worst(np.where(np.isfinite(bad), -bad, np.inf))
            raise ValueError(f"`{name}` must be non-negative and finite, got {bad[at]:.6g} at {at}.")
    _checks.queries_keys(*features.values())
    phi_q, phi_k = features.values()
    n_queries, n_keys = phi_q.shape[-2], phi_k.shape[-2]
    _check_square(n_queries, n_keys)
    den = phi_q @ np.sum(phi_k, axis=-2)[..., None]
    _check_live(den[..., 0] > 0)
    small = np.swapaxes(phi_k, -1, -2) @ (phi_q / den)
    values = np.linalg.eigvals(small).astype(np.complex128)
    if n_queries > 1 and values.shape[-1] == 1:
        values = np.concatenate([values, np.zeros_like(values)], axis=-1)  # the other eigenvalues of A
    return _gap(values)


def _check_square(n_queries: int, n_keys: int) -> None:
    if n_queries != n_keys or n_keys == 0:
        raise ValueError(f"`spectral_gap` needs N == M >= 1, got N = {n_queries} queries and M = {n_keys} keys.")


def _check_live(live: NDArray[np.bool_]) -> None:
    if not np.all(live):
        at = tuple(int(i) for i in np.argwhere(~live)[0])
        raise ValueError(f"`spectral_gap` needs live rows, got row {at} with sum 0: restrict A to the live tokens.")


def _gap(values: NDArray[np.complex128]) -> Any:
    nearest = np.argmin(abs(values - 1), axis=-1)[..., None]
    rest = abs(values)
    np.put_along_axis(rest, nearest, 0.0, axis=-1)
    return (1 - np.max(rest, axis=-1))[()]


# -- two matrices --------------------------------------------------------------------------------------------


def compare(
    a: Array,
    b: Array,
    *,
    v: Array | None = None,
    causal: bool = False,
    key_mask: Array | None = None,
    renormalize: bool = False,
) -> Comparison:
    """How far the weights `a` are from the weights `b`, row by row.

    `compare(attend.weights(q, k), Softmax().weights(q, k))` is the distance to exact softmax.

    Parameters
    ----------
    a, b : arrays (..., N, M)
        Weight matrices; leading axes broadcast.
    v : array (..., M, E), optional
        Values, for the relative difference of the outputs.
    causal, key_mask, renormalize
        As for one matrix.

    Notes
    -----
    KL is infinite where b is 0 and a is not (ReLU features, sparse patterns): read JS. Closeness to softmax
    is no quality in itself; `tv_uniform` says how close weights that look at nothing would be.
    """
    first = _read(a, causal, key_mask, renormalize, "a")
    second = _read(b, causal, key_mask, renormalize, "b")
    if first.a.shape[-2:] != second.a.shape[-2:]:
        raise ValueError(f"`a` and `b` must have the same last two axes, got {first.a.shape} and {second.a.shape}.")
    _checks.leading(a=first.a.shape[:-2], b=second.a.shape[:-2])
    p, q = np.broadcast_arrays(first.a, second.a)
    live = first.live & second.live
    uniform = first.visible / np.maximum(first.n, 1)[..., None]
    middle = (p + q) / 2
    tv, tv_max = _mean_and_max(np.sum(abs(p - q), axis=-1) / 2, live)
    kl, kl_max = _mean_and_max(_kl(p, q), live)
    js, js_max = _mean_and_max((_kl(p, middle) + _kl(q, middle)) / 2, live)
    overlap = np.sum(np.sqrt(p) * np.sqrt(q), axis=-1)
    hellinger2, hellinger2_max = _mean_and_max(np.maximum(0.0, 1 - overlap), live)
    return Comparison(
        tv=tv,
        tv_max=tv_max,
        kl=kl,
        kl_max=kl_max,
        js=js,
        js_max=js_max,
        hellinger2=hellinger2,
        hellinger2_max=hellinger2_max,
        tv_uniform=_mean(np.sum(abs(uniform - q), axis=-1) / 2, live),
        output_error=None if v is None else _output_error(p, q, live, v),
        dead=np.sum(~live, axis=-1)[()],
    )


def _mean_and_max(values: Floats, live: NDArray[np.bool_]) -> tuple[Any, Any]:
    """Over the live rows."""
    largest = np.max(np.where(live, values, -np.inf), axis=-1, initial=-np.inf)
    return _mean(values, live), np.where(np.any(live, axis=-1), largest, np.nan)[()]


def _kl(p: Floats, q: Floats) -> Floats:
    """sum_s p log2(p / q), in bits."""
    kl: Floats = np.sum(_x_log2_y(p, p) - _x_log2_y(p, q), axis=-1)
    return np.maximum(0.0, kl)


def _output_error(p: Floats, q: Floats, live: NDArray[np.bool_], v: Array) -> Any:
    """|A v - B v| / |B v| over the live rows."""
    values, _ = _matrix("v", v)
    if values.shape[-2] != p.shape[-1]:
        raise ValueError(f"`v` must have as many tokens as there are keys, {p.shape[-1]}, got {values.shape}.")
    _checks.leading(weights=p.shape[:-2], v=values.shape[:-2])
    kept = live[..., None]
    got, want = np.where(kept, p @ values, 0.0), np.where(kept, q @ values, 0.0)
    error = np.sqrt(np.sum((got - want) ** 2, axis=(-2, -1)))
    size = np.sqrt(np.sum(want**2, axis=(-2, -1)))
    return np.where(size > 0, error / np.where(size > 0, size, 1.0), np.where(error > 0, np.inf, 0.0))[()]
