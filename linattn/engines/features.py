"""Elementwise feature maps phi, each beside its VJP.

Requirements on a map: `phi(x, xp)` takes (..., T, D) to (..., T, R) row by row, `vjp(d_phi, x, xp)` takes the
cotangent back to (..., T, D); both use only the array API standard, keep the dtype, accept T = 0, and let NaN pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from linattn import _checks
from linattn._arrays import Array


@dataclass(frozen=True)
class FeatureMap:
    """A feature map of linear attention and its VJP.

    Parameters
    ----------
    name : str
        How the map is called in tables and in `repr`.
    phi : callable
        `phi(x, xp)`: x (..., T, D) -> features (..., T, R), in the dtype of x; xp is the array namespace.
        Attention weights are promised to be a distribution only if the features are non-negative.
    vjp : callable
        `vjp(d_phi, x, xp)`: the cotangent of phi(x), (..., T, R) -> the cotangent of x, (..., T, D).

    Raises
    ------
    TypeError
        If `name` is not a string or one of the functions cannot be called.

    Notes
    -----
    Two maps are equal if their name and functions are. A value that uses a map is hashable and, if the functions
    live in a module, picklable. 16-bit inputs reach the map in float32.

    Examples
    --------
    >>> import linattn as la
    >>> square = la.FeatureMap(
    ...     "square",
    ...     phi=lambda x, xp: x * x,
    ...     vjp=lambda d_phi, x, xp: 2.0 * x * d_phi,
    ... )
    >>> la.Linear(square)
    Linear(FeatureMap('square'))
    """

    name: str
    phi: Callable[[Array, Any], Array]
    vjp: Callable[[Array, Array, Any], Array]

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"`name` must be a string, got {self.name!r}.")
        for which in ("phi", "vjp"):
            if not callable(getattr(self, which)):
                raise TypeError(f"`{which}` must be a function, got {getattr(self, which)!r}.")

    def __repr__(self) -> str:
        return f"FeatureMap({self.name!r})"


def _identity(x: Array, xp: Any) -> Array:
    return x


def _identity_vjp(d_phi: Array, x: Array, xp: Any) -> Array:
    return d_phi


def _relu(x: Array, xp: Any) -> Array:
    return xp.where(x <= 0, xp.zeros_like(x), x)  # x > 0 would swallow NaN


def _relu_vjp(d_phi: Array, x: Array, xp: Any) -> Array:
    return xp.where(x <= 0, xp.zeros_like(x), d_phi)  # relu'(0) = 0; a NaN in x lets d_phi pass


def _elu1(x: Array, xp: Any) -> Array:
    """elu(x) + 1 without its cancellation: exp(x) for x <= 0, 1 + x above."""
    below = xp.exp(xp.where(x > 0, xp.zeros_like(x), x))  # the branch not taken stays finite
    return xp.where(x > 0, 1 + x, below)


def _elu1_vjp(d_phi: Array, x: Array, xp: Any) -> Array:
    slope = xp.exp(xp.where(x > 0, xp.zeros_like(x), x))  # 1 for x > 0
    return d_phi * slope


def _exp(x: Array, xp: Any) -> Array:
    return xp.exp(x)


def _exp_vjp(d_phi: Array, x: Array, xp: Any) -> Array:
    return d_phi * xp.exp(x)


MAPS = {
    "identity": FeatureMap("identity", _identity, _identity_vjp),
    "relu": FeatureMap("relu", _relu, _relu_vjp),
    "elu1": FeatureMap("elu1", _elu1, _elu1_vjp),
    "exp": FeatureMap("exp", _exp, _exp_vjp),
}


def check(feature_map: str | FeatureMap) -> None:
    """The `feature_map` of a mechanism: a name of `MAPS` or a map of the user's own."""
    if isinstance(feature_map, FeatureMap):
        return
    if not isinstance(feature_map, str):
        raise TypeError(f"`feature_map` must be a name or a FeatureMap, got {feature_map!r}.")
    _checks.choice("feature_map", feature_map, tuple(MAPS))


def find(feature_map: str | FeatureMap) -> FeatureMap:
    return feature_map if isinstance(feature_map, FeatureMap) else MAPS[feature_map]
