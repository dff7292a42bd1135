"""Kernels of random features beside softmax's own: elementwise maps f of W x, and the trigonometric features.

Each beside its VJP, in the array API; requirements as in `features`.
"""

from __future__ import annotations

import math
from typing import Any

from linattn import _checks
from linattn._arrays import Array
from linattn.engines.features import MAPS, FeatureMap

GELU = math.sqrt(2 / math.pi), 0.044715  # the tanh form, that of the authors' code


def _sigmoid(x: Array, xp: Any) -> Array:
    return (1 + xp.tanh(x / 2)) / 2


def _sigmoid_vjp(d_phi: Array, x: Array, xp: Any) -> Array:
    return d_phi * (1 - xp.tanh(x / 2) ** 2) / 4


def _abs(x: Array, xp: Any) -> Array:
    return xp.abs(x)


def _abs_vjp(d_phi: Array, x: Array, xp: Any) -> Array:
    return d_phi * xp.sign(x)  # abs'(0) = 0


def _square(x: Array, xp: Any) -> Array:
    return x * x


def _square_vjp(d_phi: Array, x: Array, xp: Any) -> Array:
    return d_phi * 2 * x


def _gelu(x: Array, xp: Any) -> Array:
    a, b = GELU
    return x / 2 * (1 + xp.tanh(a * (x + b * x**3)))


def _gelu_vjp(d_phi: Array, x: Array, xp: Any) -> Array:
    a, b = GELU
    t = xp.tanh(a * (x + b * x**3))
    return d_phi * ((1 + t) / 2 + x / 2 * (1 - t * t) * a * (1 + 3 * b * x * x))


def _tanh(x: Array, xp: Any) -> Array:
    return xp.tanh(x)


def _tanh_vjp(d_phi: Array, x: Array, xp: Any) -> Array:
    return d_phi * (1 - xp.tanh(x) ** 2)


def _cos(x: Array, xp: Any) -> Array:
    return xp.cos(x)


def _cos_vjp(d_phi: Array, x: Array, xp: Any) -> Array:
    return -d_phi * xp.sin(x)


IDENTITY = MAPS["identity"]
KERNELS = {name: MAPS[name] for name in ("relu", "elu1", "exp")} | {
    "sigmoid": FeatureMap("sigmoid", _sigmoid, _sigmoid_vjp),
    "abs": FeatureMap("abs", _abs, _abs_vjp),
    "square": FeatureMap("square", _square, _square_vjp),
    "gelu": FeatureMap("gelu", _gelu, _gelu_vjp),
    "tanh": FeatureMap("tanh", _tanh, _tanh_vjp),
    "cos": FeatureMap("cos", _cos, _cos_vjp),
}
SIGNED = ("trig", "gelu", "tanh", "cos")  # denominators may vanish


def check(features: Any, others: tuple[str, ...]) -> None:
    """A name of `others` or `KERNELS`, or a map of the user's own."""
    if not isinstance(features, (str, FeatureMap)):
        raise TypeError(f"`features` must be a name or a FeatureMap, got {features!r}.")
    if isinstance(features, str):
        _checks.choice("features", features, (*others, *KERNELS))


def find(features: str | FeatureMap) -> FeatureMap:
    return features if isinstance(features, FeatureMap) else KERNELS[features]


def trig(u: Array, x: Array, side: str, xp: Any) -> Array:
    """[cos u, sin u], u = W x, for keys times e^(|x|^2 / 2): phi_q . phi_k has the mean R' e^(x.y - |x_q|^2 / 2)."""
    phi = xp.concat([xp.cos(u), xp.sin(u)], axis=-1)
    return phi if side == "q" else _growth(x, xp) * phi


def trig_vjp(d_phi: Array, u: Array, x: Array, side: str, xp: Any) -> tuple[Array, Array]:
    """d_u = growth (cos u d_sin - sin u d_cos), and d_x = x sum_r phi d_phi from the growth; 0 for queries."""
    rows = u.shape[-1]
    growth = _growth(x, xp) if side == "k" else xp.ones_like(x[..., :1])
    d_cos, d_sin = d_phi[..., :rows], d_phi[..., rows:]
    d_u = growth * (xp.cos(u) * d_sin - xp.sin(u) * d_cos)
    if side == "q":
        return d_u, xp.zeros_like(x)
    return d_u, x * xp.sum(trig(u, x, side, xp) * d_phi, axis=-1, keepdims=True, dtype=d_phi.dtype)


def _growth(y: Array, xp: Any) -> Array:
    return xp.exp(xp.sum(y * y, axis=-1, keepdims=True, dtype=y.dtype) / 2)
