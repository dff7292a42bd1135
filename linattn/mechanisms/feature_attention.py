"""What mechanisms made of a feature map and the linear engine share: the inner verbs of `Attention`."""

from __future__ import annotations

from typing import Any, ClassVar

from linattn import _arrays, _checks
from linattn._arrays import Array
from linattn.engines import features, linear
from linattn.engines.features import FeatureMap
from linattn.mechanisms.attention import Attention, Call, State, room


class FeatureAttention(Attention):
    """A feature map times the linear engine. `_turns` gives the pair weight, by default 1."""

    feature_map: str | FeatureMap
    normalize: bool
    eps: Any
    n_sums: ClassVar[int] = 1  # numbers in a token's turn, and sums in a state

    def _check_parameters(self) -> None:
        features.check(self.feature_map)
        _checks.flag("normalize", self.normalize)
        _checks.eps(self.eps)

    def _turns(self, call: Call, n_queries: int, n_keys: int, like: Array) -> tuple[Array, Array] | None:
        return None

    def _options(self, q_tokens: int, k: Array, call: Call) -> linear.Options:
        return linear.Options(
            feature_map=features.find(self.feature_map),
            span="past" if call.causal else "all",
            turns=self._turns(call, q_tokens, k.shape[-2], k),
            key_mask=call.key_mask,
            normalize=self.normalize,
            eps=self.eps,
        )

    def _forward(self, q: Array, k: Array, v: Array, arrays: Any, call: Call, out: Any) -> tuple[Array, Any, Any]:
        options = self._options(q.shape[-2], k, call)
        where = room(call, q, "linear")
        y, after, saved = linear.forward(q, k, v, arrays, options, room=where, out=out, xp=call.xp)
        return y, after, (saved, options, where)

    def _backward(
        self, d_out: Array, d_arrays: Any, saved: Any, call: Call, out: Any
    ) -> tuple[Array, Array, Array, Any]:
        saved, options, where = saved
        d_state = None if d_arrays is None else d_arrays.sums + d_arrays.rest
        d_q, d_k, d_v, d_sums = linear.backward(d_out, d_state, saved, options, room=where, out=out, xp=call.xp)
        return d_q, d_k, d_v, linear.LinearState(d_sums, call.xp.zeros_like(d_sums))

    def _weights(self, q: Array, k: Array, call: Call) -> Array:
        return linear.weights(q, k, self._options(q.shape[-2], k, call), call.xp)

    def _state_shape(self, k: Array, v: Array, call: Call) -> tuple[int, ...]:
        leads = [] if call.key_mask is None else [tuple(call.key_mask.shape[:-1])]
        feature_map = features.find(self.feature_map)
        return linear.state_shape(k, v, feature_map, self.n_sums, self.normalize, leads, call.xp)

    def _empty(self, k: Array, v: Array, call: Call) -> linear.LinearState:
        return linear.empty_state(self._state_shape(k, v, call), k, call.xp)

    def _refuse_state(self, state: State, k: Array, v: Array, call: Call) -> None:
        dtype = "float64" if _arrays.dtype_name(k) == "float64" else "float32"
        fits = (self._state_shape(k, v, call), dtype, _arrays.library(k))
        _checks.state_arrays("state", state.arrays._asdict(), {"sums": fits, "rest": fits})

    def _merge(self, earlier: linear.LinearState, later: linear.LinearState, xp: Any) -> linear.LinearState:
        return linear.merge(earlier, later)
