"""LLN's scales from the moments of queries and keys, and back.

V(chi, D) = sigma_q^2 sigma_k^2      h = sqrt(chi / 2)      alpha = h / sigma_q      beta = h / sigma_k
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from linattn import _arrays, _lognormal, _moments
from linattn._arrays import Array
from linattn._moments import Moments

PAPER = (0.14855178144710912, -0.35487039130661086)  # V = a chi + b in the authors' code, whatever D is


class Fit(NamedTuple):
    """The scales and what they came from; a number for each scope."""

    alpha: Array
    beta: Array
    q: Moments
    k: Moments
    h: Array  # the deviation of alpha q, and of beta k
    slope: Array  # V'(chi)


def fit(q: Array, k: Array, key_mask: Array | None, *, calibration: Any, scope: str, who: str, xp: Any) -> Fit:
    """alpha and beta of a call. `who` says in an error whose they are.

    Raises
    ------
    ValueError
        If q or k has fewer than two numbers in a scope, or no variance; where values cannot be read they become NaN.
    """
    key_lead = tuple(k.shape[:-2])
    if key_mask is not None:
        key_lead = _arrays.broadcast_shapes(key_lead, tuple(key_mask.shape[:-1]))
    of_q = _moments.moments(q, scope, xp, key_mask=mask_of_queries(q, k, key_mask), shared_by=key_lead)
    of_k = _moments.moments(k, scope, xp, key_mask=key_mask)
    for name, m in (("q", of_q), ("k", of_k)):
        if _arrays.is_readable(m.sigma):
            _check(m, f"`{who}` reads alpha and beta off the data: `{name}` must", f'scope="{scope}"')
    chi, slope = _matched(calibration, (of_q.sigma * of_k.sigma) ** 2, q.shape[-1], xp)
    h = xp.sqrt(chi / 2)
    return Fit(h / of_q.sigma, h / of_k.sigma, of_q, of_k, h, slope)


def fit_vjp(
    d_alpha: Array, d_beta: Array, found: Fit, q: Array, k: Array, key_mask: Array | None, xp: Any
) -> tuple[Array, Array]:
    """d_q, d_k: what d_alpha and d_beta bring, through chi and the two deviations.

    With c = 1 / (2 h V'(chi)):
    d_sigma_q = d_alpha (c sigma_k^2 - h / sigma_q^2) + d_beta c sigma_q sigma_k,      d_sigma_k likewise
    d_q = d_sigma_q (q - mean) / ((n - 1) sigma_q) at visible positions
    """
    s_q, s_k, h = found.q.sigma, found.k.sigma, found.h
    c = 1 / (2 * h * found.slope)
    d_s_q = d_alpha * (c * s_k**2 - h / s_q**2) + d_beta * c * s_q * s_k
    d_s_k = d_beta * (c * s_q**2 - h / s_k**2) + d_alpha * c * s_q * s_k
    return (
        _sigma_vjp(d_s_q, found.q, q, mask_of_queries(q, k, key_mask), xp),
        _sigma_vjp(d_s_k, found.k, k, key_mask, xp),
    )


def mask_of_queries(q: Array, k: Array, key_mask: Array | None) -> Array | None:
    """A masked position is padding: of the queries as well where there are as many."""
    return key_mask if q.shape[-2] == k.shape[-2] else None


def _check(m: Moments, who_must: str, scope: str) -> None:
    sigma, count = _arrays.to_numpy(m.sigma), _arrays.to_numpy(m.count)
    least = 0 if count.size == 0 else int(np.min(count))
    if least < 2:
        raise ValueError(f"{who_must} have at least two visible numbers in each {scope}, got {least}.")
    if np.any(sigma == 0):
        raise ValueError(f"{who_must} vary, got a standard deviation of 0 in {scope}.")


def _matched(calibration: Any, target: Array, dim: int, xp: Any) -> tuple[Array, Array]:
    """chi with V(chi, D) = target, and V'(chi)."""
    if calibration != "exact":
        a, b = PAPER if calibration == "paper" else calibration
        chi = (target - b) / a
        if _arrays.is_readable(chi) and bool(xp.any(chi <= 0)):
            raise ValueError(
                f"`calibration={calibration!r}` must give chi = (V - b) / a > 0 for V = sigma_q^2 sigma_k^2, "
                f"got {float(xp.min(chi)):.6g}."
            )
        return chi, xp.full_like(chi, a)
    if not _arrays.is_readable(target):
        raise ValueError(
            '`calibration="exact"` must read the values of q and k, got traced arrays: freeze alpha and beta first, '
            "`.calibrate(q, k)`."
        )
    pairs = [_solved(float(x), dim) for x in np.ravel(_arrays.to_numpy(target))]
    chi, slope = (
        _arrays.constant(np.array(x).reshape(tuple(target.shape)), target, xp) for x in zip(*pairs, strict=True)
    )
    # the second term is 0: it is there for frameworks that differentiate by themselves
    return chi + (target - _arrays.detached(target)) / slope, slope


def _solved(target: float, dim: int) -> tuple[float, float]:
    if not math.isfinite(target):
        return math.nan, math.nan
    return _lognormal.matched(max(target, float(np.finfo(float).tiny)), dim)


def _sigma_vjp(d_sigma: Array, m: Moments, x: Array, key_mask: Array | None, xp: Any) -> Array:
    """sigma^2 = sum (x - mean)^2 / (n - 1); what goes through the mean cancels."""
    wide, visible = _moments.joined(x, key_mask, xp)
    d_sigma = _arrays.unbroadcast(d_sigma, tuple(m.sigma.shape), xp)
    d_x = d_sigma * (wide - m.mean) / ((m.count - 1) * m.sigma)
    if visible is not None:
        d_x = xp.where(visible, d_x, xp.zeros_like(d_x))
    return _arrays.unbroadcast(d_x, tuple(x.shape), xp)
