"""What ranks do to states: cotangents as states, values shifted, what a forward kept made anew.

The sums of the log-linear engine are in units of 2^gauge, a gauge for each feature. U + U' is at the larger gauge. The
cotangent X of sums at the gauge G is that of the sums at the gauge g that went into them times 2^(g - G), so 2^-G X is
free of units: as a state of gauge -G it merges as states do.

Gradients of normalised attention do not change if all values are shifted by one vector. In float32 the backward shifts
them by their weighted mean, which every rank knows from the states, and the states with them, or makes the states again
where a room kept no compensation: less cancels where values are far from zero.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from linattn import _arrays
from linattn._arrays import Array
from linattn.backends.reference import loglinear as reference
from linattn.backends.reference._gauges import NONE, Powers
from linattn.engines.linear import LinearState
from linattn.engines.loglinear import LogLinearState
from linattn.mechanisms.attention import Call
from linattn.mechanisms.feature_attention import FeatureAttention

# -- cotangents -----------------------------------------------------------------------------------------------------


def as_state(cotangent: Any, of: Any, xp: Any) -> Any:
    """The cotangent of the state `of`, free of units: 2^-G X at the gauge -G."""
    if not isinstance(of, LogLinearState):
        return cotangent
    unseen = of.gauge == NONE  # nothing reaches such a feature
    sums, rest = (xp.where(unseen[..., None], xp.zeros_like(x), x) for x in (cotangent.sums, cotangent.rest))
    return LogLinearState(sums, rest, xp.where(unseen, of.gauge, -of.gauge))


def cotangent_of(own: Any, later: Any, xp: Any) -> Any:
    """The cotangent of `own`, at its gauge g, from such states of those that it went into: 2^(g - G) X."""
    if not isinstance(own, LogLinearState):
        return later
    unseen = (own.gauge == NONE) | (later.gauge == NONE)
    exponent = xp.where(unseen, xp.full_like(own.gauge, NONE), own.gauge + later.gauge)  # g - G <= 0
    shift = Powers(own.sums, xp)(exponent, own.sums.dtype)[..., None]
    return own._replace(sums=later.sums * shift, rest=later.rest * shift)


# -- values far from zero ---------------------------------------------------------------------------------------------


def shift_of(attend: Any, total: Any, v: Array, xp: Any) -> Array | None:
    """The values' mean (..., 1, E), weighted by the features' sums: one vector for a head, the same on every rank."""
    if _arrays.dtype_name(v) != "float32":
        return None  # the values are narrower than their sums, or rounding is no matter
    if isinstance(attend, FeatureAttention) and not (attend.normalize and attend.eps == "safe"):
        return None  # the gradient knows where zero is
    if isinstance(total, LogLinearState):
        powers, top = Powers(total.sums, xp), xp.max(total.gauge, axis=-1, keepdims=True)
        sums = total.sums * powers(total.gauge - top, total.sums.dtype)[..., None]
    else:
        sums = total.sums[..., 0, :, :]
    sums = xp.sum(sums, axis=-2, keepdims=True, dtype=sums.dtype)  # (..., 1, E + 1)
    weight = sums[..., -1:]
    mean = sums[..., :-1] / xp.where(weight == 0, xp.ones_like(weight), weight)
    mean = xp.where(xp.isfinite(mean), mean, xp.zeros_like(mean))
    shape = (*v.shape[:-2], 1, v.shape[-1])  # values that several heads of keys share are shifted by one vector
    heads = math.prod(mean.shape) / max(math.prod(shape), 1)
    return _arrays.unbroadcast(mean, shape, xp) / max(heads, 1.0)


def is_compensated(state: Any) -> bool:
    """Whether `rest` holds what the sums rounded away, or there is nothing to hold."""
    rest, sums = (_arrays.to_numpy(x) for x in (state.rest, state.sums))
    return bool(np.any(rest != 0) or not np.any(sums != 0))


def centred(state: Any, shift: Array, xp: Any) -> Any:
    """The state of the values less `shift` (..., 1, E): S_num - z shift^T, in the dtype of running totals."""
    total = reference.value(state, xp)
    by = (
        shift if isinstance(state, LogLinearState) else shift[..., None, :, :]
    )  # (..., n, R, E + 1) of the linear engine
    lost = total[..., -1:] * _arrays.cast(by, total.dtype, xp)
    sums, rest = reference.rounded(xp.concat([total[..., :-1] - lost, total[..., -1:]], axis=-1), state.sums, xp)
    return state._replace(sums=sums, rest=rest)


def with_values(attend: Any, saved: Any, values: Array, state: Any, call: Call) -> Any:
    """What a forward saved, for these values and this state: no other number that it keeps depends on them."""
    if isinstance(state, LinearState) and isinstance(attend, FeatureAttention):
        return saved[0]._replace(v=values, state=state), *saved[1:]
    q, k = saved[:2]
    return attend._saved(q, k, values, state, call)
