"""Eigenvalues and ranks of weights: how tokens mix if the attention is applied again and again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from linattn import _checks
from linattn._arrays import Array
from linattn.instruments.reading import TOLERANCE_SHORT, Floats, mask_of, matrix, read, worst

START_SEED = 0
ARNOLDI_CHECK = 4  # steps between looks at the eigenvalues

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
    a = read(weights, causal, key_mask, renormalize=False)
    _check_square(*a.a.shape[-2:])
    square, live = a.a, a.live
    if key_mask is not None:
        seen = mask_of(key_mask, a.a)
        square = np.where(seen[..., :, None], square, 0.0)  # a hidden token adds an eigenvalue 0 and nothing else
        live = live | ~seen
    _check_live(live)
    return _gap(np.linalg.eigvals(square).astype(np.complex128))


def spectral_gap_features(phi_q: Array, phi_k: Array, *, logarithms: bool = False) -> Any:
    """`spectral_gap` of A = diag(1/den) phi_q phi_k^T from its features: the eigenvalues of an R x R matrix.

    A = f phi_k^T with f = phi_q / den has the non-zero eigenvalues of phi_k^T f.

    Parameters
    ----------
    phi_q, phi_k : arrays (..., N, R)
        Non-negative features.
    logarithms : bool
        They are given by their logarithms, of any size: for `LLN`, alpha q and beta k.

    Examples
    --------
    >>> import numpy as np
    >>> import linattn as la
    >>> q, k = np.random.default_rng(0).normal(size=(2, 300, 16))
    >>> gap = la.instruments.spectral_gap_features(2 * q, 2 * k, logarithms=True)
    >>> bool(np.isclose(gap, la.instruments.spectral_gap(la.LLN(alpha=2.0, beta=2.0).weights(q, k))))
    True
    """
    by_logs = _checks.flag("logarithms", logarithms)
    lowest, rule = (-np.inf, "below infinity") if by_logs else (0.0, "non-negative and finite")
    features = {}
    for name, x in (("phi_q", phi_q), ("phi_k", phi_k)):
        features[name], _ = matrix(name, x)
        bad = ~((features[name] >= lowest) & (features[name] < np.inf))
        if np.any(bad):
            score = np.where(np.isfinite(features[name]), -features[name], np.inf)
            at = worst(np.where(bad, score, -np.inf))
            raise ValueError(f"`{name}` must be {rule}, got {features[name][at]:.6g} at {at}.")
    _checks.queries_keys(*features.values())
    phi_q, phi_k = _from_logarithms(*features.values()) if by_logs else features.values()
    n_queries, n_keys = phi_q.shape[-2], phi_k.shape[-2]
    _check_square(n_queries, n_keys)
    den = phi_q @ np.sum(phi_k, axis=-2)[..., None]
    _check_live(den[..., 0] > 0)
    small = np.swapaxes(phi_k, -1, -2) @ (phi_q / den)
    values = np.linalg.eigvals(small).astype(np.complex128)
    if n_queries > 1 and values.shape[-1] == 1:
        values = np.concatenate([values, np.zeros_like(values)], axis=-1)  # the other eigenvalues of A
    return _gap(values)


def _from_logarithms(lq: Floats, lk: Floats) -> tuple[Floats, Floats]:
    """Features within 0 .. 1 of the same A: columns of lk give their maxima to lq, rows of lq lose theirs."""
    top = np.max(lk, axis=-2, keepdims=True, initial=-np.inf)
    alive = np.isfinite(top)
    top = np.where(alive, top, 0.0)
    lq = np.where(alive, lq + top, -np.inf)
    most = np.max(lq, axis=-1, keepdims=True, initial=-np.inf)
    return np.exp(lq - np.where(np.isfinite(most), most, 0.0)), np.exp(lk - top)


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


def spectral_gap_operator(apply: Callable[[Floats], Any], n: int, *, tolerance: float = 1e-9) -> float:
    """`spectral_gap` of an operator that is only applied: `apply(x)` gives A x for x (n, 1), float64.

    Any mechanism is one, with x in the place of v: no weight matrix is formed. Arnoldi's iteration with full
    orthogonalisation, as many steps as the tolerance on lambda_2 needs, at most n.

    Examples
    --------
    >>> import numpy as np
    >>> import linattn as la
    >>> q, k = np.random.default_rng(0).normal(size=(2, 50, 8))
    >>> attend = la.Performer(32)
    >>> gap = la.instruments.spectral_gap_operator(lambda x: attend(q, k, x), 50)
    >>> bool(np.isclose(gap, la.instruments.spectral_gap(attend.weights(q, k)), atol=1e-8))
    True
    """
    _checks.natural("n", n)
    ones = np.ones((n, 1))
    off = float(np.max(abs(np.asarray(apply(ones), dtype=np.float64).reshape(n) - 1)))
    if not off <= TOLERANCE_SHORT:  # NaN fails
        raise ValueError(f"`apply` must have rows that sum to 1, got A 1 - 1 up to {off:.3g}.")
    # Against the eigenvector 1, which is known: what is left has all other eigenvalues, a second 1 as well.
    basis = np.zeros((n, n + 1))
    small = np.zeros((n + 1, n))
    start = np.random.default_rng(START_SEED).standard_normal(n)
    start -= np.mean(start)
    if n == 1:
        return 1.0
    basis[:, 0] = start / np.linalg.norm(start)
    for j in range(n - 1):
        x = np.asarray(apply(basis[:, j : j + 1]), dtype=np.float64).reshape(n)
        size = float(np.linalg.norm(x))
        for _ in range(2):  # twice is enough for orthogonality to rounding
            x = x - np.mean(x)
            part = basis[:, : j + 1].T @ x
            small[: j + 1, j] += part
            x = x - basis[:, : j + 1] @ part
        rest = float(np.linalg.norm(x))
        closed = rest <= 1e-14 * max(size, 1.0) or j == n - 2
        if closed or j % ARNOLDI_CHECK == ARNOLDI_CHECK - 1:
            values, vectors = np.linalg.eig(small[: j + 1, : j + 1])
            at = int(np.argmax(abs(values)))
            if closed or rest * abs(vectors[-1, at]) <= tolerance:  # the residual of that pair
                break
        small[j + 1, j] = rest
        basis[:, j + 1] = x / rest
    return float(1 - abs(values[at]))


class Rank(NamedTuple):
    """Of one matrix."""

    numerical: Any  # singular values above rounding
    stable: Any  # |A|_F^2 / |A|_2^2


def rank(weights: Array, *, causal: bool = False, key_mask: Array | None = None, renormalize: bool = False) -> Rank:
    """Numerical and stable rank of the weights: linear attention has at most R, LLN at most D."""
    a = read(weights, causal, key_mask, renormalize)
    singular = np.linalg.svd(np.where(a.live[..., None], a.a, 0.0), compute_uv=False)
    largest = np.max(singular, axis=-1, initial=0.0)
    n_queries, n_keys = a.a.shape[-2:]
    rounding = max(n_queries, n_keys) * float(np.finfo(np.float64).eps) * np.asarray(largest)
    numerical = np.sum(singular > rounding[..., None], axis=-1)
    stable = np.sum(singular**2, axis=-1) / np.where(largest > 0, largest, 1.0) ** 2
    return Rank(numerical[()], stable[()])
