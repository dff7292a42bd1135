"""How hard a head is for positive random features, and the changes of variables that make it easier.

With x = sqrt(scale) q and y = sqrt(scale) k, what decides is phi = E|x + y|^2 over independent x and y. Softmax does
not change under x -> A x, y -> A^-T (y - c), so A and c are free to make phi small:

    none      A = 1,                                         c = 0
    centre    A = 1,                                         c = my + mx
    scale     A = diag(a), a_l = (Sy_ll / Sx_ll)^(1/4),      c = my + a^2 mx      phi = 2 sum_l sqrt(Sx_ll Sy_ll)
    full      B = Sx^-1/2 (Sx^1/2 Sy Sx^1/2)^1/2 Sx^-1/2,
              A = B^1/2,                                     c = my + B mx        phi = 2 tr (Sx^1/2 Sy Sx^1/2)^1/2

(mx, Sx mean and covariance of x, my, Sy of y.) Everything here is NumPy in float64, for data that are looked at once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from linattn import _arrays, _checks, _moments
from linattn._arrays import Array

Floats = NDArray[np.float64]

FITTED = ("oprf", "sderf")  # features that need the second moment of x' + y'
RULES = ("scale", "full", "centre", "none")
RIDGE = 1e-9  # of the mean variance, on the diagonals: a channel that never varies


class Clouds(NamedTuple):
    """First and second moments of x and y, one each head."""

    mx: Floats  # (..., D)
    sx: Floats  # (..., D, D)
    my: Floats
    sy: Floats


class Constants(NamedTuple):
    """x' = A x, y' = A^-T (y - c), and E[(x' + y')(x' + y')^T]."""

    a: Floats | None
    c: Floats | None
    second: Floats

    @property
    def phi(self) -> Any:
        return np.trace(self.second, axis1=-2, axis2=-1)[()]


def clouds(q: Array, k: Array, scale: float, key_mask: Array | None) -> Clouds:
    """Moments over the visible tokens, and over the first of two or more leading axes (the batch)."""
    mask = None if key_mask is None else np.asarray(_arrays.to_numpy(key_mask))
    x, y = (np.sqrt(scale) * np.asarray(_arrays.to_numpy(z), dtype=np.float64) for z in (q, k))
    key_lead = y.shape[:-2] if mask is None else np.broadcast_shapes(y.shape[:-2], mask.shape[:-1])
    of_x = _moments_of(x, mask if x.shape[-2] == y.shape[-2] else None, key_lead)
    of_y = _moments_of(y, mask, None)
    return Clouds(*of_x, *of_y)


def _moments_of(x: Floats, mask: Any, shared_by: tuple[int, ...] | None) -> tuple[Floats, Floats]:
    x, visible = _moments.joined(x, mask, np)
    axes = tuple(axis for axis in _moments.pooled_axes(x.shape[:-2], "head", shared_by) if axis != -1)
    known = np.ones_like(x[..., :1]) if visible is None else visible[..., :1].astype(float)
    count = np.maximum(np.sum(known, axis=axes, keepdims=True), 1)
    mean = np.sum(np.where(known > 0, x, 0), axis=axes, keepdims=True) / count
    centred = np.where(known > 0, x - mean, 0)
    pooled = tuple(axis for axis in axes if axis != -2)
    squares = np.sum(np.swapaxes(centred, -1, -2) @ centred, axis=pooled, keepdims=True) / count
    return _squeezed(mean[..., 0, :], 1), _squeezed(squares, 2)


def _squeezed(x: Floats, inner: int) -> Floats:
    while x.ndim > inner and x.shape[0] == 1:
        x = x[0]
    return x


def fitted(of: Clouds, rule: str) -> Constants:
    """The constants of a rule for such data."""
    dim = of.mx.shape[-1]
    sx, sy = (s + RIDGE * np.trace(s, axis1=-2, axis2=-1)[..., None, None] / dim * np.eye(dim) for s in (of.sx, of.sy))
    if rule == "none":
        return with_second(of, None, None)
    if rule == "centre":
        return with_second(of, None, of.my + of.mx)
    if rule == "scale":
        a = (np.diagonal(sy, axis1=-2, axis2=-1) / np.diagonal(sx, axis1=-2, axis2=-1)) ** 0.25
        return with_second(of, a[..., None] * np.eye(dim), of.my + a**2 * of.mx)
    root = _power(sx, 0.5)
    inverse = _power(sx, -0.5)
    b = inverse @ _power(root @ sy @ root, 0.5) @ inverse
    return with_second(of, _power(b, 0.5), of.my + (b @ of.mx[..., None])[..., 0])


def with_second(of: Clouds, a: Floats | None, c: Floats | None) -> Constants:
    """A and c (None: 1 and 0) with the second moment that they leave.

    E[(x' + y')(x' + y')^T] = A Sx A^T + A^-T Sy A^-1 + m m^T,   m = A mx + A^-T (my - c)
    """
    a_t = np.eye(of.mx.shape[-1]) if a is None else np.swapaxes(a, -1, -2)
    inverse = np.linalg.inv(np.swapaxes(a_t, -1, -2))  # A^-1
    my = of.my if c is None else of.my - c
    m = of.mx[..., None, :] @ a_t + my[..., None, :] @ inverse
    second = np.swapaxes(a_t, -1, -2) @ of.sx @ a_t + np.swapaxes(inverse, -1, -2) @ of.sy @ inverse
    return Constants(a, c, second + np.swapaxes(m, -1, -2) @ m)


def _power(s: Floats, p: float) -> Floats:
    """Of a symmetric, positive matrix."""
    values, vectors = np.linalg.eigh((s + np.swapaxes(s, -1, -2)) / 2)
    return (vectors * np.maximum(values, np.finfo(float).tiny)[..., None, :] ** p) @ np.swapaxes(vectors, -1, -2)


# -- as a mechanism's parameter ---------------------------------------------------------------------------------------


def checked(given: Any, features: Any) -> tuple[Any, ...]:
    """(A, c), or for features fitted to data (A, c, second), as arrays; A and c may be None."""
    if not isinstance(given, (tuple, list)) or len(given) not in (2, 3):
        raise TypeError(f"`calibration` must be (A, c) or (A, c, second), got {type(given).__name__}.")
    a, c, second = (*given, None)[:3]
    if (second is not None) != (features in FITTED):
        with_or_without = "with" if features in FITTED else "without"
        raise ValueError(f"`calibration` must be {with_or_without} a third entry for features={features!r}.")
    a = None if a is None else _checks.real_array("calibration: A", a, 2)
    c = None if c is None else _checks.real_array("calibration: c", c, 1)
    if a is not None:
        _checks.square("calibration: A", a)
        if not np.all(np.linalg.cond(a) < 1 / np.finfo(float).eps):
            raise ValueError("`calibration: A` must have an inverse, got a singular matrix.")
    if second is None:
        return a, c
    second = _checks.real_array("calibration: second", second, 0 if features == "oprf" else 2)
    if features == "sderf":
        _checks.square("calibration: second", second)
    values = np.linalg.eigvalsh(second) if features == "sderf" else second
    if np.min(values) < -RIDGE * np.max(abs(values)):
        raise ValueError(f"`calibration: second` must be non-negative, got {np.min(values):.6g}.")
    return a, c, second


# -- as the features want them ----------------------------------------------------------------------------------------


def from_the_right(a: Floats) -> tuple[Floats, Floats]:
    """A^T and A^-1, to be multiplied from the right; a diagonal A gives rows (..., 1, D)."""
    diagonal = np.diagonal(a, axis1=-2, axis2=-1)[..., None, :]
    if np.count_nonzero(a) == np.count_nonzero(diagonal):
        return diagonal.copy(), np.asarray(1 / diagonal)
    return np.ascontiguousarray(np.swapaxes(a, -1, -2)), np.asarray(np.linalg.inv(a), dtype=np.float64)


def sharpening(second: Floats, features: str, dim: int) -> tuple[Floats, Floats]:
    """a (..., 1, D) and the basis Q (..., D, D) of FAVOR++ ("oprf", isotropic) and FAVOR# ("sderf").

    For each eigenvalue lambda of `second`, the a that minimises the second moment of the estimate,
        (1 - 4 a) (1 - 8 a)^(-1/2) exp((2 (1 - 4 a) / (1 - 8 a) - 1) lambda),
        16 a = 1 - 2 lambda - s,   s = sqrt(4 lambda^2 + 12 lambda + 1)
    and 1 - s = -(4 lambda^2 + 12 lambda) / (1 + s), which does not cancel.
    """
    if features == "oprf":
        values, basis = np.repeat(second[..., None], dim, axis=-1), np.eye(dim)
    else:
        values, basis = np.linalg.eigh(second)
        values = np.maximum(values, 0.0)
    inner = 4 * values**2 + 12 * values
    a = -(2 * values + inner / (1 + np.sqrt(inner + 1))) / 16
    return a[..., None, :], basis
