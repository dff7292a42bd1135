"""What queries and keys alone say: deviations, and softmax's log-variance without a weight matrix."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from linattn import _arrays, _checks, _moments
from linattn._arrays import Array
from linattn.instruments.reading import Floats


class Sigma(NamedTuple):
    """Standard deviations."""

    q: Any
    k: Any


def sigma(q: Array, k: Array, scope: str = "tensor", ddof: int = 1, key_mask: Array | None = None) -> Sigma:
    """Standard deviations of all numbers of q and of k, mean removed: what LLN matches its scales to.

    Parameters
    ----------
    q, k : arrays (..., N, D), (..., M, D)
    scope : {"tensor", "head", "sample"}
        One number for the array, one a head (over the first of two or more leading axes), or one for each leading
        index.
    ddof : int
        Taken off the count.
    key_mask : bool array (..., M), optional
        True = visible. Positions are left out of q as well if N == M.
    """
    _checks.choice("scope", scope, _moments.SCOPES)
    _checks.natural("ddof", ddof, least=0)
    q, k, mask = _read(q, k, key_mask)
    of_q = mask if q.shape[-2] == k.shape[-2] else None
    found = (_moments.moments(x, scope, np, key_mask=seen, ddof=ddof).sigma for x, seen in ((q, of_q), (k, mask)))
    return Sigma(*(_squeezed(x) for x in found))


def log_variance_qk(q: Array, k: Array, scale: float | None = None, key_mask: Array | None = None) -> Any:
    """Row log-variance of softmax(scale q k^T) over full rows, exactly and for any data; `scale` is by default D^-1/2.

    mean_t Var_s(scale q_t . k_s) = scale^2 trace( mean_t[q_t q_t^T] Cov_s(k) )           O((N + M) D^2)
    """
    q, k, mask = _read(q, k, key_mask)
    if scale is None:
        scale = max(q.shape[-1], 1) ** -0.5
    _checks.positive_real("scale", scale)
    k, visible = _moments.joined(k, mask, np)
    seen = np.ones_like(k[..., :1]) if visible is None else visible[..., :1].astype(np.float64)
    count = np.maximum(np.sum(seen, axis=-2, keepdims=True), 1)
    centred = np.where(seen > 0, k - np.sum(np.where(seen > 0, k, 0), axis=-2, keepdims=True) / count, 0)
    covariance = np.swapaxes(centred, -1, -2) @ centred / count
    second = np.swapaxes(q, -1, -2) @ q / max(q.shape[-2], 1)
    return (scale**2 * np.sum(second * covariance, axis=(-2, -1)))[()]


def temperature_qk(
    q: Array,
    k: Array,
    *,
    alpha: float | None = None,
    beta: float | None = None,
    scope: str = "tensor",
    key_mask: Array | None = None,
) -> Any:
    """1 / (sigma_q sigma_k), softmax's temperature, or with alpha and beta LLN's own.

    LLN's is (alpha^2 sigma_q^2 + beta^2 sigma_k^2)^(-1/2), and not on softmax's scale: to compare, see `temperature`.
    """
    s = sigma(q, k, scope, key_mask=key_mask)
    if alpha is None and beta is None:
        return 1 / (s.q * s.k)
    if alpha is None or beta is None:
        raise ValueError(f"`alpha` and `beta` must be given together, got alpha={alpha!r} and beta={beta!r}.")
    return (alpha**2 * s.q**2 + beta**2 * s.k**2) ** -0.5


def _read(q: Array, k: Array, key_mask: Array | None) -> tuple[Floats, Floats, Any]:
    _checks.queries_keys(q, k)
    lead = _checks.leading(q=tuple(q.shape[:-2]), k=tuple(k.shape[:-2]))
    if key_mask is not None:
        _checks.key_mask(key_mask, k, lead)
    mask = None if key_mask is None else np.asarray(_arrays.to_numpy(key_mask))
    wide_q, wide_k = (np.asarray(_arrays.to_numpy(x), dtype=np.float64) for x in (q, k))
    return wide_q, wide_k, mask


def _squeezed(x: Floats) -> Any:
    """(..., 1, 1) without the axes that were pooled in front."""
    x = x[..., 0, 0]
    while x.ndim and x.shape[0] == 1:
        x = x[0]
    return x[()]
