"""The local passes of one rank, and what they keep for one another.

    keys      the state of this rank's keys alone
    rows      out, on the state of what came before
    to_rows   d_q, and what these queries send to that state
    to_keys   d_k and d_v, with what later queries sent to the state that these keys left

Where a room offers the backward in halves (backends/numba/linear_halves.py), `to_rows` is the first and `to_keys` the
second. Elsewhere `to_rows` is a whole backward, and `to_keys` adds a backward of the keys alone.
"""

from __future__ import annotations

from copy import copy
from types import ModuleType
from typing import Any

import numpy as np

from linattn import _arrays, backends
from linattn._arrays import Array
from linattn.distributed.states import centred, with_values
from linattn.engines import linear, log_features, loglinear
from linattn.engines.features import MAPS
from linattn.engines.linear import LinearState
from linattn.engines.loglinear import LogLinearState
from linattn.mechanisms.attention import Call, room
from linattn.mechanisms.feature_attention import FeatureAttention


class Passes:
    """Of one rank's tokens. Without causality the rows see no key of their own: all come with the state."""

    def __init__(
        self, attend: Any, q: Array, k: Array, v: Array, call: Call, first: tuple[int, int], empty: Any
    ) -> None:
        self.attend, self.q, self.k, self.v, self.empty, self.xp = attend, q, k, v, empty, call.xp
        self.causal = call.causal
        self.no_rows = q[..., :0, :]
        rows_mask = call.key_mask if self.causal or call.key_mask is None else call.key_mask[..., :0]
        self.rows_call = call._replace(first_position=first[0], key_mask=rows_mask)
        self.keys_call = call._replace(first_position=first[1], causal=False)
        self.options: Any = None
        self.own: Any = None  # the state of these keys
        self.kept_keys: Any = None
        self.kept_rows: Any = None
        self.left: Any = None  # by `to_rows` for `to_keys`

    def _of_rows(self, x: Array) -> Array:
        return x if self.causal else x[..., :0, :]

    def prepare(self) -> None:
        """The linear engine's options, the tables of positions among them: made once for all passes."""
        by_engine = isinstance(self.attend, FeatureAttention) and isinstance(self.empty, LinearState)
        if self.options is not None or not by_engine:
            return
        rows = self.attend._options(self.q.shape[-2], self._of_rows(self.k), self.rows_call)
        if self.causal:
            turns = None if rows.turns is None else (rows.turns[0][..., :0, :], rows.turns[1])
            keys = rows._replace(span="all", turns=turns)
        else:
            keys = self.attend._options(0, self.k, self.keys_call)
        self.options = keys, rows, room(self.rows_call, self.q, "linear")

    def _run(self, q: Array, k: Array, v: Array, state: Any, options: Any, call: Call) -> tuple[Array, Any, Any]:
        if self.options is None:
            return self.attend._forward(q, k, v, state, call, None)
        where = self.options[2]
        out, after, saved = linear.forward(q, k, v, state, options, room=where, out=None, xp=self.xp)
        return out, after, (saved, options, where)

    # -- forward ----------------------------------------------------------------------------------------------------

    def keys(self, values: Array) -> Any:
        options = self.options and self.options[0]
        _, self.own, self.kept_keys = self._run(self.no_rows, self.k, values, None, options, self.keys_call)
        return self.own

    def rows(self, values: Array, before: Any) -> Array:
        k, v, options = self._of_rows(self.k), self._of_rows(values), self.options and self.options[1]
        out, _, self.kept_rows = self._run(self.q, k, v, before, options, self.rows_call)
        return out

    def moved(self, values: Array, before: Any, shift: Array | None) -> Passes:
        """The same passes with other values. `shift`: how far, where the state of the keys moves along with them."""
        found = copy(self)
        rows = self._of_rows(values)
        found.v, found.kept_rows = values, with_values(self.attend, self.kept_rows, rows, before, self.rows_call)
        if shift is not None and self.own is not None:
            found.own = centred(self.own, shift, self.xp)
            found.kept_keys = with_values(self.attend, self.kept_keys, values, self.empty, self.keys_call)
        return found

    # -- backward ---------------------------------------------------------------------------------------------------

    def to_rows(self, d_out: Array, asked: bool) -> Any:
        """What reaches the incoming state, None if nobody has `asked`; d_q is kept."""
        halves = self._halves(d_out)
        if halves is None:
            *grads, reached = self.attend._backward(d_out, None, self.kept_rows, self.rows_call, None)
            self.left = None, tuple(grads)
            return reached
        (q, k, v, state, den), options, _ = self.kept_rows
        d_q, h, sums = halves.to_queries(d_out, q, k, v, tuple(state), den, **_by_name(options), reach=asked)
        self.left = halves, (d_out, d_q, h)
        return LinearState(sums, self.xp.zeros_like(sums)) if asked else None

    def to_keys(self, after: Any) -> tuple[Array, Array, Array]:
        """d_q, d_k, d_v; `after` is the cotangent of the state that these keys left, None if nothing comes back."""
        halves, kept = self.left
        if halves is not None:
            d_out, d_q, h = kept
            (q, k, v, state, den), options, _ = self.kept_rows
            d_state = None if after is None else after.sums + after.rest
            return d_q, *halves.to_keys(d_out, d_state, q, k, v, tuple(state), den, h, **_by_name(options))
        if after is None:
            return kept
        d_q, d_k, d_v = kept
        of_keys = self._through_pieces(after)
        if of_keys is None:
            shape = (*tuple(self.empty.sums.shape[: -3 if isinstance(self.empty, LinearState) else -2]), 0)
            nothing = self.xp.zeros((*shape, self.v.shape[-1]), dtype=self.q.dtype, device=_arrays.device(self.q))
            of_keys = self.attend._backward(nothing, after, self.kept_keys, self.keys_call, None)[1:3]
        return d_q, *(map(_sum, (d_k, d_v), of_keys) if self.causal else of_keys)

    def _halves(self, d_out: Array) -> ModuleType | None:
        """The room's module of the backward in halves, if it has one that takes this call."""
        if not self.causal or self.options is None:
            return None
        _, options, where = self.options
        own = options.feature_map
        if own.name not in where.FEATURE_MAPS or MAPS.get(own.name) is not own:
            return None
        found = backends.load(where.__name__.split(".")[-2], "linear_halves")
        q, k, v = self.kept_rows[0][:3]
        return found if isinstance(found, ModuleType) and found.serves(d_out, q, k, v, **_by_name(options)) else None

    def _through_pieces(self, after: Any) -> tuple[Array, Array] | None:
        """d_k and d_v of a long shard by the log-linear engine, piece by piece: no query here reads the keys' state."""
        if not isinstance(after, LogLinearState):
            return None
        _, k, v, _, constants, where = self.kept_keys
        xp, call, features = self.xp, self.keys_call, self.attend._log_features(constants, self.keys_call)
        plan = log_features.pieces(features, 0, k, False)[:-1]  # the last is of the queries
        if len(plan) < 2:
            return None
        nothing = self.xp.zeros_like(after.sums)
        outgoing = LogLinearState(nothing, nothing, self.own.gauge)  # of all keys: what `after` is in units of
        parts = []
        for piece in plan:
            of_k, of_v = k[..., piece.keys, :], v[..., piece.keys, :]
            lk = features.log_k(of_k)
            mask = None if call.key_mask is None else call.key_mask[..., piece.keys]
            none = xp.zeros((*tuple(nothing.shape[:-2]), 0, v.shape[-1]), dtype=v.dtype, device=_arrays.device(v))
            _, d_lk, d_v, _ = loglinear.backward(
                none, None, after.sums + after.rest, lk[..., :0, :], lk, of_v, outgoing,
                loglinear.Options("all", mask), room=where, xp=xp,
            )  # fmt: skip
            d_k, of_constants = features.log_k_vjp(d_lk, of_k)
            if of_constants:
                return None  # they are of all rows together
            grads = ((d_k, of_k), (d_v, of_v))
            parts.append([_arrays.cast(_arrays.unbroadcast(d, tuple(x.shape), xp), x.dtype, xp) for d, x in grads])
        return tuple(xp.concat([part[i] for part in parts], axis=-2) for i in (0, 1))


def _by_name(options: linear.Options) -> dict[str, Any]:
    return {**options._asdict(), "feature_map": options.feature_map.name}


def _sum(x: Array, y: Array) -> Array:
    """x + y, in the place of x where it can be: both are results that nobody else holds."""
    if isinstance(x, np.ndarray) and x.dtype == y.dtype:
        x += y
        return x
    return x + y
