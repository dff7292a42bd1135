"""Performer (FAVOR+) and its successors by their definitions, and two peers' own forms of it. NumPy alone.

    A[t, s] = sum_r exp(lq[t, r] + lk[s, r]) over the visible s, divided by its sum over s
    x = sqrt(scale) q,  y = sqrt(scale) k,  x' = A x,  y' = A^-T (y - c),  scale = D^(-1/2)

Arguments, the projection included, may be complex: every comparison looks at the real part.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from linattn.audit.loglinear import exponentials, log_weights

__all__ = [
    "FUNCTIONS",
    "general_features",
    "google_jax",
    "log_features",
    "performer",
    "performer_features",
    "performer_pytorch",
]

Array = NDArray[Any]

LOG_FEATURES = ("positive", "hyperbolic", "oprf", "sderf")


def performer(
    q: Array,
    k: Array,
    pairs: Any,
    *,
    projection: Array | Callable[[int], Array],
    features: Any = "positive",
    scale: float | None = None,
    calibration: Any = None,
    eps: float | None = None,
    **_: Any,
) -> Array:
    """Performer (Choromanski et al., arXiv:2009.14794); `projection`: (..., R', D), or a function of D."""
    options = {"projection": projection, "scale": scale, "calibration": calibration, "eps": eps, "features": features}
    if features in LOG_FEATURES:
        lq, lk = log_features(q, k, **options)
        return log_weights(lq, lk, pairs.visible)
    phi_q, phi_k = general_features(q, k, **options)
    a = np.where(pairs.visible, phi_q @ np.swapaxes(phi_k, -1, -2), 0)
    den = np.sum(a, axis=-1, keepdims=True)
    return np.where(den == 0, 0, a / np.where(den == 0, 1, den))


# ---------------------------------------------------------------------------------------------- positive features


def log_features(
    q: Array,
    k: Array,
    *,
    projection: Any,
    features: str = "positive",
    scale: float | None = None,
    calibration: Any = None,
    eps: float | None = None,
) -> tuple[Array, Array]:
    """lq = W' x' + b, lk = W' y' + b - |y'|^2 / 2.

    hyperbolic      W' = [W; -W], b = 0
    oprf, sderf     W' = W diag(sqrt(1 - 4 a)) Q^T, b_r = sum_l a_l w_rl^2, from the second moment Q diag(lambda) Q^T of
                    x' + y'; oprf: one number lambda
    """
    x, y, w, spread = operands(q, k, projection, scale, calibration)
    b: Any = 0.0
    if features == "hyperbolic":
        w = np.concatenate([w, -w], axis=-2)
    elif features in ("oprf", "sderf"):
        spread = np.asarray(spread)
        if features == "oprf":
            values = np.broadcast_to(spread[..., None], (*spread.shape, w.shape[-1]))
            basis = np.eye(w.shape[-1])
        else:
            values, basis = np.linalg.eigh(spread)
        a = best_a(values)[..., None, :]
        b = np.sum(a * w * w, axis=-1)[..., None, :]
        w = (w * np.sqrt(1 - 4 * a)) @ np.swapaxes(basis, -1, -2)
    lq = x @ np.swapaxes(w, -1, -2) + b
    lk = y @ np.swapaxes(w, -1, -2) + b - np.sum(y * y, axis=-1, keepdims=True) / 2
    if eps:
        top = np.where(lk.real > math.log(eps), lk, math.log(eps))
        lk = top + np.log(np.exp(lk - top) + np.exp(math.log(eps) - top))
    return lq, lk


def best_a(values: Array) -> Array:
    """a that minimises the second moment (1 - 4a) (1 - 8a)^(-1/2) exp((2 (1 - 4a) / (1 - 8a) - 1) lambda)."""
    inner = 4 * values**2 + 12 * values
    return -(2 * values + inner / (1 + np.sqrt(inner + 1))) / 16  # = (1 - 2 lambda - sqrt(inner + 1)) / 16


def operands(q: Array, k: Array, projection: Any, scale: Any, calibration: Any) -> tuple[Array, Array, Array, Any]:
    """x', y', W and the spread of x' + y'."""
    dim = q.shape[-1]
    number = q.real.dtype.type  # longdouble stays what it is
    root = np.sqrt(number(scale)) if scale is not None else np.sqrt(np.sqrt(1 / number(max(dim, 1))))
    w = projection(dim) if callable(projection) else np.asarray(projection)
    x, y = root * q, root * k
    a, c, spread = (*(calibration or ()), None, None, None)[:3]
    if c is not None:
        y = y - np.asarray(c)[..., None, :]
    if a is not None:
        a = np.asarray(a)
        x, y = x @ np.swapaxes(a, -1, -2), y @ inverse(a, number)
    return x, y, w, spread


def inverse(a: Array, number: Any) -> Array:
    """A^-1 in float64, and with one step of Newton's in a longer format."""
    x = np.linalg.inv(a)
    if number is np.float64:
        return x
    x = x.astype(number)
    return x @ (2 * np.eye(a.shape[-1], dtype=number) - a @ x)


# -------------------------------------------------------------------------------- generalised and trigonometric


def performer_features(q: Array, k: Array, *, features: Any = "positive", **parameters: Any) -> tuple[Array, Array]:
    """Phi with A[t, s] = Phi_q[t] . Phi_k[s] over its sum; a gauge a feature and a factor a query cancel."""
    known = {x: parameters.get(x) for x in ("projection", "scale", "calibration", "eps")}
    if features in LOG_FEATURES:
        return exponentials(*log_features(q, k, features=features, **known))
    return general_features(q, k, features=features, **known)


def gelu(u: Array) -> Array:
    return u / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))


FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "relu": lambda u: np.where(u.real <= 0, 0, u),
    "elu1": lambda u: np.where(u.real > 0, 1 + u, np.exp(np.where(u.real > 0, 0, u))),
    "exp": np.exp,
    "sigmoid": lambda u: 1 / (1 + np.exp(-u)),
    "abs": lambda u: np.where(u.real < 0, -u, np.where(u.real > 0, u, 0)),
    "square": lambda u: u * u,
    "gelu": gelu,
    "tanh": np.tanh,
    "cos": np.cos,
}


def general_features(
    q: Array, k: Array, *, projection: Any, features: Any, scale: Any, calibration: Any, eps: float | None
) -> tuple[Array, Array]:
    """f(W x) + eps on both sides; "trig": [cos, sin](W x) and e^(|y|^2 / 2) [cos, sin](W y)."""
    x, y, w, _ = operands(q, k, projection, scale, calibration)
    u_q, u_k = x @ np.swapaxes(w, -1, -2), y @ np.swapaxes(w, -1, -2)
    if features == "trig":
        phi_q, phi_k = (np.concatenate([np.cos(u), np.sin(u)], axis=-1) for u in (u_q, u_k))
        return phi_q, np.exp(np.sum(y * y, axis=-1, keepdims=True) / 2) * phi_k
    eps = 1e-3 if eps is None else eps
    f = FUNCTIONS[features] if isinstance(features, str) else lambda u: features.phi(u, np)
    return f(u_q) + eps, f(u_k) + eps


# ------------------------------------------------------------------------------------------------ peers' forms
# Plain exponentials, maxima subtracted, eps added to every feature, as these two programs do it; scale D^(-1/2)


def plain_features(q: Array, k: Array, projection: Array, eps: float) -> tuple[Array, Array]:
    """R^(-1/2) (exp(W x - |x|^2/2 - ax) + eps): ax = max_r W x, ay = max over r and all tokens of W y."""
    root, rows = q.shape[-1] ** -0.25, projection.shape[-2] ** -0.5
    x, y, w_t = root * q, root * k, np.swapaxes(projection, -1, -2)
    u_q, u_k = x @ w_t, y @ w_t
    ax = np.max(u_q.real, axis=-1, keepdims=True)
    ay = np.max(u_k.real, axis=(-1, -2), keepdims=True)
    phi_q = rows * (np.exp(u_q - np.sum(x * x, axis=-1, keepdims=True) / 2 - ax) + eps)
    return phi_q, rows * (np.exp(u_k - np.sum(y * y, axis=-1, keepdims=True) / 2 - ay) + eps)


def performer_pytorch(q: Array, k: Array, pairs: Any, *, projection: Array, eps: float = 1e-4) -> Array:
    """Version 1.1.4 of that package: denominators as they are, in the causal case 1e-6 sum_r phi_q on top.

    Its maxima are constants to its backward. It masks values, and not keys: no mask here.
    """
    phi_q, phi_k = plain_features(q, k, projection, eps)
    a = np.where(pairs.visible, phi_q @ np.swapaxes(phi_k, -1, -2), 0)
    den = np.sum(a, axis=-1, keepdims=True)
    if not np.all(pairs.visible):
        den = den + 1e-6 * np.sum(phi_q, axis=-1, keepdims=True)
    return a / den


def google_jax(q: Array, k: Array, pairs: Any, *, projection: Array, eps: float = 1e-6) -> Array:
    """google-research's JAX code: 2e-6 is added to denominators of at most 1e-6 in size.

    Its maxima are differentiated there, here they are constants: for values only.
    """
    phi_q, phi_k = plain_features(q, k, projection, eps)
    a = np.where(pairs.visible, phi_q @ np.swapaxes(phi_k, -1, -2), 0)
    den = np.sum(a, axis=-1, keepdims=True)
    return a / np.where(abs(den) <= 1e-6, den + 2e-6, den)
