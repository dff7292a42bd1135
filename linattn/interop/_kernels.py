"""What a framework's operator calls: the engines on NumPy views, with plain arguments and nothing to trace.

The room is the compiled one, or the reference where that cannot be loaded. Packed sequences are walked here, since
their edges are numbers that a tracer must not need: each segment is a call of its own, as in the plain verbs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from linattn import _arrays, _checks, backends
from linattn._arrays import Array
from linattn.engines import linear, softmax
from linattn.engines.features import MAPS
from linattn.mechanisms.attention import Call
from linattn.mechanisms.cosformer import CosFormer

Edges = list[tuple[int, int]]


class LinearOptions(NamedTuple):
    """The linear engine's, as strings and numbers; `eps_rule` "safe", "clamp" or "add"."""

    feature_map: str
    causal: bool
    normalize: bool
    eps_rule: str
    eps: float

    @classmethod
    def of(cls, mechanism: Any, causal: bool, feature_map: str) -> LinearOptions:
        rule, x = ("safe", 0.0) if mechanism.eps == "safe" else mechanism.eps
        return cls(feature_map, causal, mechanism.normalize, rule, float(x))

    def engine(self, turns: Any, key_mask: Array | None) -> linear.Options:
        return linear.Options(
            feature_map=MAPS[self.feature_map],
            span="past" if self.causal else "all",
            turns=turns,
            key_mask=key_mask,
            normalize=self.normalize,
            eps="safe" if self.eps_rule == "safe" else (self.eps_rule, self.eps),
        )


class SoftmaxOptions(NamedTuple):
    """The softmax engine's; `offset`: how many keys came before the first query."""

    scale: float
    causal: bool
    offset: int

    def engine(self, key_mask: Array | None) -> softmax.Options:
        return softmax.Options(self.scale, "past" if self.causal else "all", self.offset, key_mask)


def edges(cu_seqlens: Array | None, n_queries: int, n_keys: int) -> Edges | None:
    """Where the packed sequences lie that hold any token; None: all is one sequence."""
    if cu_seqlens is None:
        return None
    return [(a, b) for a, b in _checks.segments(cu_seqlens, n_queries, n_keys) if a < b]


# -- the linear engine ------------------------------------------------------------------------------------------


def linear_forward(
    q: Array, k: Array, v: Array, state: Any, turns: Any, key_mask: Array | None, cu_seqlens: Array | None,
    options: LinearOptions,
) -> tuple[Array, Array | None, Any]:  # fmt: skip
    """out, den (None without a denominator) and the state after all keys (None for packed sequences)."""
    room = backends.resolve(None, q, "linear")
    parts = edges(cu_seqlens, q.shape[-2], k.shape[-2])
    with _arrays.quiet(q):
        if parts is None:
            engine = options.engine(turns, key_mask)
            given = None if state is None else linear.LinearState(*state)
            out, after, saved = linear.forward(q, k, v, given, engine, room=room, out=None, xp=np)
            return out, saved.den, after
        outs, dens = [], []
        for a, b in parts:
            engine = options.engine(_cut(turns, a, b), _masked(key_mask, a, b))
            own_q, own_k, own_v = _rows(a, b, q, k, v)
            y, _, saved = linear.forward(own_q, own_k, own_v, None, engine, room=room, out=None, xp=np)
            outs.append(y)
            dens.append(saved.den)
    lead = _lead(q, k, v, turns, key_mask)
    out = _joined(outs, (*lead, 0, v.shape[-1]), q.dtype, -2)
    den = _joined(dens, (*lead, 0), _accumulator(q), -1) if options.normalize else None
    return out, den, None


def linear_backward(
    d_out: Array, d_state: Array | None, q: Array, k: Array, v: Array, den: Array | None,
    state: Any, turns: Any, key_mask: Array | None, cu_seqlens: Array | None, options: LinearOptions,
) -> tuple[Array, Array, Array, Array | None]:  # fmt: skip
    """d_q, d_k, d_v and the cotangent of the incoming state's value."""
    room = backends.resolve(None, q, "linear")
    parts = edges(cu_seqlens, q.shape[-2], k.shape[-2])
    d_state = None if d_state is None else np.ascontiguousarray(d_state)  # a framework's may be one number, stretched
    with _arrays.quiet(q):
        if parts is None:
            engine = options.engine(turns, key_mask)
            saved = linear.Saved(q, k, v, _state(state, q, k, v, turns, key_mask, options), den)
            return linear.backward(d_out, d_state, saved, engine, room=room, out=None, xp=np)
        grads = []
        for a, b in parts:
            own_turns, own_mask = _cut(turns, a, b), _masked(key_mask, a, b)
            own_q, own_k, own_v = _rows(a, b, q, k, v)
            own_den = None if den is None else np.ascontiguousarray(den[..., a:b])
            start = _state(None, own_q, own_k, own_v, own_turns, own_mask, options)
            saved = linear.Saved(own_q, own_k, own_v, start, own_den)
            engine = options.engine(own_turns, own_mask)
            grads.append(linear.backward(d_out[..., a:b, :], None, saved, engine, room=room, out=None, xp=np)[:3])
    return *_joined_like((q, k, v), grads), None


def _state(state: Any, q: Array, k: Array, v: Array, turns: Any, key_mask: Any, options: LinearOptions) -> Any:
    """The state that forward began with; made again where there was none: all zeros."""
    if state is not None:
        return linear.LinearState(*state)
    leads = [] if key_mask is None else [key_mask.shape[:-1]]
    leads += [] if turns is None else [turns[1].shape[:-2]]
    n_sums = 1 if turns is None else turns[1].shape[-1]
    shape = linear.state_shape(k, v, MAPS[options.feature_map], n_sums, options.normalize, leads, np)
    return linear.empty_state(shape, q, np)


# -- the softmax engine -----------------------------------------------------------------------------------------


def softmax_forward(
    q: Array, k: Array, v: Array, key_mask: Array | None, cu_seqlens: Array | None, options: SoftmaxOptions
) -> Array:
    room = backends.resolve(None, q, "softmax")
    parts = edges(cu_seqlens, q.shape[-2], k.shape[-2])
    with _arrays.quiet(q):
        if parts is None:
            return softmax.forward(q, k, v, options.engine(key_mask), room=room, out=None, xp=np)[0]
        outs = []
        for a, b in parts:
            own_q, own_k, own_v = _rows(a, b, q, k, v)
            engine = options.engine(_masked(key_mask, a, b))
            outs.append(softmax.forward(own_q, own_k, own_v, engine, room=room, out=None, xp=np)[0])
    return _joined(outs, (*_lead(q, k, v, None, key_mask), 0, v.shape[-1]), q.dtype, -2)


def softmax_backward(
    d_out: Array, q: Array, k: Array, v: Array, key_mask: Array | None, cu_seqlens: Array | None,
    options: SoftmaxOptions,
) -> tuple[Array, Array, Array]:  # fmt: skip
    room = backends.resolve(None, q, "softmax")
    parts = edges(cu_seqlens, q.shape[-2], k.shape[-2])
    with _arrays.quiet(q):
        if parts is None:
            saved = softmax.Saved(q, k, v)
            return softmax.backward(d_out, saved, options.engine(key_mask), room=room, out=None, xp=np)
        grads = [
            softmax.backward(
                d_out[..., a:b, :], softmax.Saved(*_rows(a, b, q, k, v)), options.engine(_masked(key_mask, a, b)),
                room=room, out=None, xp=np,
            )
            for a, b in parts
        ]  # fmt: skip
    return _joined_like((q, k, v), grads)


# -- any other mechanism ----------------------------------------------------------------------------------------


def mechanism_forward(
    attend: Any, q: Array, k: Array, v: Array, state: Any, key_mask: Array | None, cu_seqlens: Array | None,
    causal: bool, first: int,
) -> tuple[Array, Any]:  # fmt: skip
    """out, and the state after all keys if there was one before."""
    if cu_seqlens is not None:
        return attend(q, k, v, causal=causal, key_mask=key_mask, cu_seqlens=cu_seqlens), None
    call = Call(np, None, causal, key_mask, None, first)
    with _arrays.quiet(q):
        return attend._forward(q, k, v, state, call, None)[:2]


def mechanism_backward(
    attend: Any, d_out: Array, d_state: Any, q: Array, k: Array, v: Array, state: Any, key_mask: Array | None,
    cu_seqlens: Array | None, causal: bool, first: int,
) -> tuple[Array, Array, Array, Any]:  # fmt: skip
    """d_q, d_k, d_v and the cotangent of the incoming state; what forward saved is made again."""
    if cu_seqlens is not None:
        _, backward = attend.vjp(q, k, v, causal=causal, key_mask=key_mask, cu_seqlens=cu_seqlens)
        return *backward(d_out), None
    call = Call(np, None, causal, key_mask, None, first)
    with _arrays.quiet(q):
        return attend._backward(d_out, d_state, attend._saved(q, k, v, state, call), call, None)


# -- the pair weight --------------------------------------------------------------------------------------------


def turns(
    like: Array, n_queries: int, n_keys: int, first: int, length: int, align: str,
    positions: tuple[Array, Array] | None, cu_seqlens: Array | None,
) -> tuple[Array, Array]:  # fmt: skip
    """cosFormer's cosines and sines, (..., N, 2) and (..., M, 2), as the plain verbs make them; `length` 0: none."""
    attend = CosFormer(length or None, align=align)
    parts = edges(cu_seqlens, n_queries, n_keys)
    if parts is None:
        call = Call(np, positions=positions, first_position=first)
        return attend._turns(call, n_queries, n_keys, like)
    tables = []
    for a, b in parts:
        cut = None if positions is None else tuple(p[..., a:b] for p in positions)
        tables.append(attend._turns(Call(np, positions=cut), b - a, b - a, like))
    joined = [_joined([pair[i] for pair in tables], (0, 2), _accumulator(like), -2) for i in (0, 1)]
    return joined[0], joined[1]


# -- pieces -----------------------------------------------------------------------------------------------------


def _accumulator(x: Array) -> Any:
    return _arrays.accumulator(x, np)


def _lead(q: Array, k: Array, v: Array, turns: Any, key_mask: Array | None) -> tuple[int, ...]:
    shapes = [x.shape[:-2] for x in (q, k, v, *(turns or ()))]
    return _arrays.broadcast_shapes(*shapes, *([] if key_mask is None else [key_mask.shape[:-1]]))


def _rows(a: int, b: int, *arrays: Array) -> Any:
    return tuple(x[..., a:b, :] for x in arrays)


def _cut(turns: Any, a: int, b: int) -> Any:
    return None if turns is None else _rows(a, b, *turns)


def _masked(key_mask: Array | None, a: int, b: int) -> Array | None:
    return None if key_mask is None else key_mask[..., a:b]


def _joined(parts: list[Array], empty: tuple[int, ...], dtype: Any, axis: int) -> Array:
    return np.concatenate(parts, axis=axis) if parts else np.zeros(empty, dtype)


def _joined_like(arrays: tuple[Array, ...], grads: list[Any]) -> Any:
    return tuple(_joined([g[i] for g in grads], x.shape, x.dtype, -2) for i, x in enumerate(arrays))
