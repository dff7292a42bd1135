"""What mechanisms made of a feature map and the linear engine share: the inner verbs of `Attention`."""

from __future__ import annotations

from typing import Any

from linattn import _checks
from linattn._arrays import Array
from linattn.engines import features, linear
from linattn.engines.features import FeatureMap
from linattn.mechanisms.attention import Attention, Call, room


class FeatureAttention(Attention):
    """A feature map times the linear engine. `_turns` gives the pair weight, by default 1."""

    feature_map: str | FeatureMap
    normalize: bool
    eps: Any

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

    def _empty(self, k: Array, v: Array, call: Call) -> linear.LinearState:
        shape = linear.state_shape(k, v, self._options(0, k, call), call.xp)
        return linear.empty_state(shape, k, call.xp)

    def _merge(self, earlier: linear.LinearState, later: linear.LinearState, xp: Any) -> linear.LinearState:
        return linear.merge(earlier, later)
