"""What mechanisms made of log-features and the log-linear engine share: the inner verbs of `Attention`.

Row by row, a mechanism says the logarithms of its features and their VJP; what they need of the whole call (a
projection, moments of the data) are its constants.
"""

from __future__ import annotations

from typing import Any

from linattn import _arrays, _checks
from linattn._arrays import Array
from linattn.engines import log_features, loglinear
from linattn.mechanisms.attention import Attention, Call, State, room


class LogFeatureAttention(Attention):
    """Log-features times the log-linear engine.

    A mechanism's own verbs; all but `_constants` and its VJP work row by row and accept zero tokens:

    - `_constants(q, k, call) -> tuple`: what the log-features need of the whole call; by default nothing
    - `_log_q(q, constants, call) -> lq (..., N, R)` and `_log_k(k, constants, call) -> lk (..., M, R)`, in the widest
      dtype of the library; -inf is a feature that is 0. The key mask is the engine's
    - `_log_q_vjp(d_lq, q, constants, call) -> d_q, d_constants`, `_log_k_vjp` likewise; d_constants: () or a tuple
      of cotangents from these rows, which are added up
    - `_constants_vjp(d_constants, q, k, constants, call) -> None or (d_q, d_k)`: what comes through the constants
    """

    def _constants(self, q: Array, k: Array, call: Call) -> tuple[Any, ...]:
        return ()

    def _log_q(self, q: Array, constants: tuple[Any, ...], call: Call) -> Array:
        raise NotImplementedError

    def _log_k(self, k: Array, constants: tuple[Any, ...], call: Call) -> Array:
        raise NotImplementedError

    def _log_q_vjp(
        self, d_lq: Array, q: Array, constants: tuple[Any, ...], call: Call
    ) -> tuple[Array, tuple[Any, ...]]:
        raise NotImplementedError

    def _log_k_vjp(
        self, d_lk: Array, k: Array, constants: tuple[Any, ...], call: Call
    ) -> tuple[Array, tuple[Any, ...]]:
        raise NotImplementedError

    def _constants_vjp(
        self, d_constants: tuple[Any, ...], q: Array, k: Array, constants: tuple[Any, ...], call: Call
    ) -> tuple[Array, Array] | None:
        return None

    # -- the verbs of `Attention` -----------------------------------------------------------------------------------

    def _forward(self, q: Array, k: Array, v: Array, arrays: Any, call: Call, out: Any) -> tuple[Array, Any, Any]:
        saved = q, k, v, arrays, constants, where = LogFeatureAttention._saved(self, q, k, v, arrays, call)
        features = self._log_features(constants, call)
        y, after = log_features.forward(features, q, k, v, arrays, _options(call), room=where, out=out, xp=call.xp)
        return y, after, saved

    def _saved(self, q: Array, k: Array, v: Array, arrays: Any, call: Call) -> Any:
        return q, shown(k, call), v, arrays, self._constants(q, k, call), room(call, q, "loglinear")

    def _backward(
        self, d_out: Array, d_arrays: Any, saved: Any, call: Call, out: Any
    ) -> tuple[Array, Array, Array, Any]:
        return self._backward_all(d_out, d_arrays, saved, call, out)[:4]

    def _backward_all(
        self, d_out: Array, d_arrays: Any, saved: Any, call: Call, out: Any
    ) -> tuple[Array, Array, Array, Any, tuple[Any, ...]]:
        """d_q, d_k, d_v, d_arrays and the cotangents of the constants; of what `_forward` saved."""
        q, k, v, arrays, constants, where = saved
        xp = call.xp
        d_state = None if d_arrays is None else d_arrays.sums + d_arrays.rest
        features = self._log_features(constants, call)
        d_q, d_k, d_v, d_sums, d_constants = log_features.backward(
            features, d_out, d_state, q, k, v, arrays, _options(call), room=where, xp=xp
        )
        through = self._constants_vjp(d_constants, q, k, constants, call)
        if through is not None:
            d_q, d_k = d_q + through[0], d_k + through[1]
        grads = (
            _arrays.fill(o, _arrays.cast(_arrays.unbroadcast(d_x, tuple(x.shape), xp), x.dtype, xp))
            for o, d_x, x in zip(out or (None, None, None), (d_q, d_k, d_v), (q, k, v), strict=True)
        )
        return *grads, _cotangent(d_sums, xp), d_constants

    def _log_features(self, constants: tuple[Any, ...], call: Call) -> log_features.LogFeatures:
        return log_features.LogFeatures(
            lambda q: self._log_q(q, constants, call),
            lambda k: self._log_k(k, constants, call),
            lambda d_lq, q: self._log_q_vjp(d_lq, q, constants, call),
            lambda d_lk, k: self._log_k_vjp(d_lk, k, constants, call),
        )

    def _weights(self, q: Array, k: Array, call: Call) -> Array:
        constants = self._constants(q, k, call)
        lq, lk = self._log_q(q, constants, call), self._log_k(k, constants, call)
        a = loglinear.weights(lq, lk, _options(call), call.xp)
        return _arrays.cast(a, q.dtype, call.xp)

    def _log_shape(self, k: Array, call: Call) -> tuple[int, ...]:
        """The shape of the logarithms of keys like these, but for the number of tokens."""
        none = k[..., :0, :]
        return tuple(self._log_k(none, self._constants(none, none, call), call).shape)

    def _log_state_shape(self, k: Array, v: Array, call: Call) -> tuple[int, ...]:
        return loglinear.state_shape(self._log_shape(k, call), tuple(v.shape), call.key_mask)

    def _empty(self, k: Array, v: Array, call: Call) -> loglinear.LogLinearState:
        return loglinear.empty_state(self._log_state_shape(k, v, call), v, call.xp)

    def _refuse_state(self, state: State, k: Array, v: Array, call: Call) -> None:
        if not isinstance(state.arrays, loglinear.LogLinearState):
            super()._refuse_state(state, k, v, call)
        shape, library = self._log_state_shape(k, v, call), _arrays.library(k)
        sums = (shape, "float64" if _arrays.dtype_name(k) == "float64" else "float32", library)
        fits = {"sums": sums, "rest": sums, "gauge": (shape[:-1], "int32", library)}
        _checks.state_arrays("state", state.arrays._asdict(), fits)

    def _merge(
        self, earlier: loglinear.LogLinearState, later: loglinear.LogLinearState, xp: Any
    ) -> loglinear.LogLinearState:
        return loglinear.merge(earlier, later, xp)


def shown(k: Array, call: Call) -> Array:
    """k with zeros where nobody sees it: whatever is there is not in the VJP of the features either, 0 * NaN is NaN."""
    mask, xp = call.key_mask, call.xp
    if mask is None:
        return k
    whole = xp.broadcast_to(mask, (*_arrays.broadcast_shapes(tuple(mask.shape[:-1]), tuple(k.shape[:-2])), k.shape[-2]))
    seen = _arrays.unbroadcast(_arrays.cast(whole, xp.int32, xp), tuple(k.shape[:-1]), xp) > 0
    return xp.where(seen[..., None], k, xp.zeros_like(k))


def _options(call: Call) -> loglinear.Options:
    return loglinear.Options("past" if call.causal else "all", call.key_mask)


def _cotangent(d_sums: Array, xp: Any) -> loglinear.LogLinearState:
    """As a state: gauges are units, not variables, their cotangent is 0."""
    gauge = xp.zeros(tuple(d_sums.shape[:-1]), dtype=xp.int32, device=_arrays.device(d_sums))
    return loglinear.LogLinearState(d_sums, xp.zeros_like(d_sums), gauge)
