"""What Performer computes: features of projected queries and keys, their VJPs, and the engine that mixes them.

    x' = A x,   y' = A^-T (y - c),   x = sqrt(scale) q,   y = sqrt(scale) k         (A = 1, c = 0 unless calibrated)

    softmax's kernel      lq = W' x' + b,   lk = W' y' + b - |y'|^2 / 2             the log-linear engine
    another kernel        phi = f(W x) + eps, or cosines and sines                  the linear engine

The mechanism gives `_prepared(D)`: W', b and the change of variables as NumPy arrays.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import numpy as np

from linattn import _arrays
from linattn._arrays import Array
from linattn.engines import kernels, linear
from linattn.engines.features import FeatureMap
from linattn.engines.linear import LinearState
from linattn.mechanisms.attention import Attention, Call, State, room
from linattn.mechanisms.log_feature_attention import LogFeatureAttention, shown

POSITIVE = ("positive", "hyperbolic", "oprf", "sderf")  # estimates of softmax by positive features
GENERAL_EPS = 1e-3


class Constants(NamedTuple):
    """What the features need, with the axes to meet (..., T, D). A^T and A^-1 are rows (..., 1, D) where diagonal."""

    w: Any  # W' (..., R', D)
    b: Any = None  # (..., 1, R')
    a_t: Any = None
    inverse: Any = None
    c: Any = None


class RandomFeatureAttention(LogFeatureAttention):
    """Random features times the engine that suits them."""

    features: str | FeatureMap
    scale: float | None
    eps: float | None
    _kept: dict[Any, Any]  # hash and constants of a value, made once
    _found: list[tuple[Array, ...]]  # where the backward goes on to W' and b: their cotangents, a packed sequence each

    def _prepared(self, dim: int) -> Constants:
        raise NotImplementedError

    def _wants_projection(self) -> bool:
        """Whether the backward goes on to W' and b."""
        return False

    def _scale(self, q: Array) -> float:
        return float(self.scale) if self.scale is not None else max(q.shape[-1], 1) ** -0.5

    def _constants(self, q: Array, k: Array, call: Call) -> Constants:
        prepared = self._prepared(q.shape[-1])
        return Constants(*(None if x is None else _arrays.constant(x, q, call.xp) for x in prepared))

    # -- the change of variables --------------------------------------------------------------------------------------

    def _moved(self, q: Array, side: str, constants: Constants, call: Call) -> Array:
        """x' = A x or y' = A^-T (y - c)."""
        xp = call.xp
        factor = _arrays.constant(np.full((1, 1), math.sqrt(self._scale(q))), q, xp)
        x = _arrays.row_major(factor * q)  # in the dtype of the factor, the widest
        if side == "k" and constants.c is not None:
            x = x - constants.c
        turn = constants.a_t if side == "q" else constants.inverse
        if turn is None:
            return x
        return x * turn if turn.shape[-2] == 1 else xp.matmul(x, turn)

    def _moved_vjp(self, d_x: Array, q: Array, side: str, constants: Constants, call: Call) -> Array:
        """d_q = sqrt(scale) A^T d_x',  d_k = sqrt(scale) A^-1 d_y'."""
        turn = constants.a_t if side == "q" else constants.inverse
        if turn is not None:
            d_x = d_x * turn if turn.shape[-2] == 1 else call.xp.matmul(d_x, call.xp.matrix_transpose(turn))
        return math.sqrt(self._scale(q)) * d_x

    def _projection_vjp(self, d_u: Array, x: Array, constants: Constants, call: Call) -> tuple[Array, ...]:
        """u = W' x' + b: d_W' = d_u^T x', d_b = sum_t d_u; () where they are constants."""
        if not self._wants_projection():
            return ()
        xp, w, b = call.xp, constants.w, constants.b
        d_w = _arrays.unbroadcast(xp.matmul(xp.matrix_transpose(d_u), x), tuple(w.shape), xp)
        if b is None:
            return (d_w,)
        d_b = xp.sum(d_u, axis=-2, keepdims=True, dtype=d_u.dtype)
        return d_w, _arrays.unbroadcast(d_b, tuple(b.shape), xp)

    # -- softmax's kernel: log-features -------------------------------------------------------------------------------

    def _log_q(self, q: Array, constants: Constants, call: Call) -> Array:  # type: ignore[override]
        return self._projected(self._moved(q, "q", constants, call), constants, call.xp)

    def _log_k(self, k: Array, constants: Constants, call: Call) -> Array:  # type: ignore[override]
        """With `eps`, lk = log(e^lk + eps)."""
        lk = self._bare_log_k(self._moved(k, "k", constants, call), constants, call.xp)
        return call.xp.logaddexp(lk, self._log_eps(lk, call.xp)) if self.eps else lk

    def _projected(self, x: Array, constants: Constants, xp: Any) -> Array:
        u = xp.matmul(x, xp.matrix_transpose(constants.w))
        return u if constants.b is None else u + constants.b

    def _bare_log_k(self, y: Array, constants: Constants, xp: Any) -> Array:
        """W' y' + b - |y'|^2 / 2; a norm that is not finite would drop the key silently, so it is NaN."""
        half = xp.sum(y * y, axis=-1, keepdims=True, dtype=y.dtype) / 2
        half = xp.where(xp.isfinite(half), half, xp.full_like(half, math.nan))
        u = self._projected(y, constants, xp)
        u -= half  # in the memory of u, of which there is much
        return u

    def _log_eps(self, like: Array, xp: Any) -> Array:
        return xp.full_like(like, math.log(self.eps or 1.0))

    def _log_q_vjp(  # type: ignore[override]
        self, d_lq: Array, q: Array, constants: Constants, call: Call
    ) -> tuple[Array, tuple[Any, ...]]:
        """lq = W' x' + b: d_x' = d_lq W'."""
        xp, w = call.xp, constants.w
        d_lq = _arrays.cast(d_lq, w.dtype, xp)
        d_q = self._moved_vjp(xp.matmul(d_lq, w), q, "q", constants, call)
        return d_q, self._projection_vjp(d_lq, self._moved(q, "q", constants, call), constants, call)

    def _log_k_vjp(  # type: ignore[override]
        self, d_lk: Array, k: Array, constants: Constants, call: Call
    ) -> tuple[Array, tuple[Any, ...]]:
        """lk = W' y' + b - |y'|^2 / 2: d_y' = d_lk W' - (sum_r d_lk) y'."""
        xp, w = call.xp, constants.w
        d_lk = _arrays.cast(d_lk, w.dtype, xp)
        y = self._moved(k, "k", constants, call)
        if self.eps:  # lk = logaddexp(lk0, log eps): d_lk0 = d_lk sigmoid(lk0 - log eps)
            lk = self._bare_log_k(y, constants, xp)
            d_lk = d_lk * xp.exp(lk - xp.logaddexp(lk, self._log_eps(lk, xp)))
        d_y = xp.matmul(d_lk, w) - xp.sum(d_lk, axis=-1, keepdims=True, dtype=d_lk.dtype) * y
        d_k = self._moved_vjp(d_y, k, "k", constants, call)
        return d_k, self._projection_vjp(d_lk, y, constants, call)

    # -- another kernel: plain features -------------------------------------------------------------------------------

    def _phi(self, q: Array, side: str, constants: Constants, call: Call) -> tuple[Array, Array, Array]:
        """The features of q or k in the accumulation dtype; u = W x' and x', from which they are made."""
        xp = call.xp
        x = self._moved(q, side, constants, call)
        u = xp.matmul(x, xp.matrix_transpose(constants.w))
        if self.features == "trig":
            phi = kernels.trig(u, x, side, xp)
        else:
            phi = kernels.find(self.features).phi(u, xp) + (GENERAL_EPS if self.eps is None else float(self.eps))
        return _arrays.cast(phi, _arrays.accumulator(q, xp), xp), u, x

    def _phi_vjp(
        self, d_phi: Array, q: Array, side: str, constants: Constants, call: Call
    ) -> tuple[Array, tuple[Array, ...]]:
        """phi = f(u) + eps, u = W x': d_u = d_phi f'(u), d_x' = d_u W."""
        xp, w = call.xp, constants.w
        d_phi = _arrays.cast(d_phi, w.dtype, xp)
        _, u, x = self._phi(q, side, constants, call)
        if self.features == "trig":
            d_u, d_x = kernels.trig_vjp(d_phi, u, x, side, xp)
            d_x = d_x + xp.matmul(d_u, w)
        else:
            d_u = kernels.find(self.features).vjp(d_phi, u, xp)
            d_x = xp.matmul(d_u, w)
        return self._moved_vjp(d_x, q, side, constants, call), self._projection_vjp(d_u, x, constants, call)

    def _features_of(self, q: Array, k: Array, constants: Constants, call: Call) -> tuple[Array, Array]:
        if self.features in kernels.SIGNED:
            warnings.warn(
                f"`{self!r}` has signed features: denominators may vanish, weights are no distribution.",
                RuntimeWarning,
                stacklevel=5,
            )
        return self._phi(q, "q", constants, call)[0], self._phi(k, "k", constants, call)[0]

    # -- the verbs of `Attention` -------------------------------------------------------------------------------------

    def _forward(self, q: Array, k: Array, v: Array, arrays: Any, call: Call, out: Any) -> tuple[Array, Any, Any]:
        if self.features in POSITIVE:
            return super()._forward(q, k, v, arrays, call, out)
        xp, constants, where = call.xp, self._constants(q, k, call), room(call, q, "linear")
        phi_q, phi_k = self._features_of(q, k, constants, call)
        wide_v = _arrays.cast(v, phi_q.dtype, xp)
        y, after, saved = linear.forward(phi_q, phi_k, wide_v, arrays, _options(call), room=where, out=None, xp=xp)
        y = _arrays.fill(out, _arrays.cast(y, v.dtype, xp))
        return y, after, (q, k, v, constants, saved, where)

    def _saved(self, q: Array, k: Array, v: Array, arrays: Any, call: Call) -> Any:
        if self.features in POSITIVE:
            return super()._saved(q, k, v, arrays, call)
        return self._forward(q, k, v, arrays, call, None)[2]

    def _backward_all(
        self, d_out: Array, d_arrays: Any, saved: Any, call: Call, out: Any
    ) -> tuple[Array, Array, Array, Any, tuple[Any, ...]]:
        if self.features in POSITIVE:
            return super()._backward_all(d_out, d_arrays, saved, call, out)
        q, k, v, constants, saved, where = saved
        xp = call.xp
        d_state = None if d_arrays is None else d_arrays.sums + d_arrays.rest
        g = _arrays.cast(d_out, saved.q.dtype, xp)
        d_phi_q, d_phi_k, d_v, d_sums = linear.backward(g, d_state, saved, _options(call), room=where, out=None, xp=xp)
        d_q, from_q = self._phi_vjp(d_phi_q, q, "q", constants, call)
        d_k, from_k = self._phi_vjp(d_phi_k, shown(k, call), "k", constants, call)
        d_constants = tuple(a + b for a, b in zip(from_q, from_k, strict=True))
        grads = (
            _arrays.fill(o, _arrays.cast(_arrays.unbroadcast(d_x, tuple(x.shape), xp), x.dtype, xp))
            for o, d_x, x in zip(out or (None, None, None), (d_q, d_k, d_v), (q, k, v), strict=True)
        )
        return *grads, LinearState(d_sums, xp.zeros_like(d_sums)), d_constants

    def _weights(self, q: Array, k: Array, call: Call) -> Array:
        if self.features in POSITIVE:
            return super()._weights(q, k, call)
        phi_q, phi_k = self._features_of(q, k, self._constants(q, k, call), call)
        return _arrays.cast(linear.weights(phi_q, phi_k, _options(call), call.xp), q.dtype, call.xp)

    def _empty(self, k: Array, v: Array, call: Call) -> Any:
        if self.features in POSITIVE:
            return super()._empty(k, v, call)
        phi_k = self._phi(k[..., :0, :], "k", self._constants(k, k, call), call)[0]
        leads = [] if call.key_mask is None else [tuple(call.key_mask.shape[:-1])]
        shape = linear.state_shape(phi_k, v, kernels.IDENTITY, 1, True, leads, call.xp)
        return linear.empty_state(shape, phi_k, call.xp)

    def _refuse_state(self, state: State, k: Array, v: Array, call: Call) -> None:
        if self.features in POSITIVE:
            super()._refuse_state(state, k, v, call)
        else:
            Attention._refuse_state(self, state, k, v, call)

    def _merge(self, earlier: Any, later: Any, xp: Any) -> Any:
        return super()._merge(earlier, later, xp) if self.features in POSITIVE else linear.merge(earlier, later)


def _options(call: Call) -> linear.Options:
    span = "past" if call.causal else "all"
    return linear.Options(kernels.IDENTITY, span, None, call.key_mask, normalize=True, eps="safe")
