"""The verbs that every mechanism shares: checks on the way down, one shape for the way back up.

A mechanism is a frozen value. It says what it is by five inner verbs, each beside its meaning below, and gets the
public ones from here: `__call__`, `vjp`, `weights`, `init_state`, `step`, `step_vjp`, `merge`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import numpy as np

from linattn import _arrays, _checks, backends
from linattn._arrays import Array


class Call(NamedTuple):
    """One call's options, checked."""

    xp: Any
    backend: str | None = None
    causal: bool = False
    key_mask: Array | None = None
    positions: tuple[Array, Array] | None = None
    first_position: int = 0


@dataclass(frozen=True, eq=False)
class State:
    """What a stream has seen so far: made by `init_state`, advanced by `step`, never changed in place.

    Attributes
    ----------
    attend : Attention
        The value that made the state; no other can go on with it.
    arrays : NamedTuple
        The engine's arrays by name: `LinearState(sums, rest)`, `SoftmaxState(k, v, visible)`, ...
    start, position : int
        Position of the first token of the state and of the next one.
    """

    attend: Attention
    arrays: Any
    start: int = 0
    position: int = 0

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in self.arrays._asdict().items() if x is not None)
        return f"State of {self.attend!r}, tokens {self.start} to {self.position}: {shapes}"


class Attention:
    """Base of all mechanisms: the public verbs.

    The inner verbs of a mechanism, all on checked arrays:

    - `_forward(q, k, v, arrays, call, out) -> out, arrays, saved`: `arrays` is the engine's state or None
    - `_backward(d_out, d_arrays, saved, call, out) -> d_q, d_k, d_v, d_arrays`
    - `_saved(q, k, v, arrays, call) -> saved`, for those who kept the arguments alone
    - `_weights(q, k, call) -> (..., N, M)`
    - `_empty(k, v, call) -> arrays` and `_merge(earlier, later, xp) -> arrays`
    - `_refuse(call, streaming)`: raises for what the mechanism cannot do
    """

    _fits_by_shape: ClassVar[bool] = True

    def __repr__(self) -> str:
        """The code that makes this value: what is not the default."""
        given = []
        for field in fields(self):  # type: ignore[arg-type]  # every mechanism is a dataclass
            value = getattr(self, field.name)
            if value != field.default:
                given.append(f"{field.name}={value!r}" if field.kw_only else repr(value))
        return f"{type(self).__name__}({', '.join(given)})"

    # -- whole sequences ------------------------------------------------------------------------------------------

    def __call__(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        causal: bool = False,
        key_mask: Array | None = None,
        cu_seqlens: Any = None,
        backend: str | None = None,
        out: Array | None = None,
    ) -> Array:
        """Attention of the queries over the keys and values.

        Parameters
        ----------
        q, k, v : array
            (..., N, D), (..., M, D), (..., M, E): one library, one dtype (float64, float32, float16, bfloat16), leading
            axes broadcast as in NumPy. Never written to.
        causal : bool
            Query t sees the keys s <= t; needs N == M.
        key_mask : array of bool, optional
            (..., M), True = visible. A key that is not visible is as good as absent.
        cu_seqlens : sequence of int, optional
            0, ..., N, rising: token edges of sequences packed along the token axis, which do not see each other.
        backend : {"reference", "numba", "cupy"}, optional
            Who runs the loop. By default the fastest that takes these arrays.
        out : array, optional
            (..., N, E) of the dtype of q, writeable, apart from the inputs: filled and returned.

        Returns
        -------
        array
            (..., N, E), library, device and dtype of the inputs.

        Raises
        ------
        TypeError
            For what is not an array, mixed libraries or dtypes, a dtype that is not floating.
        ValueError
            For shapes that do not fit, and for what this mechanism cannot do.
        """
        return self._run(q, k, v, causal, key_mask, cu_seqlens, None, backend, out)[0]

    def vjp(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        causal: bool = False,
        key_mask: Array | None = None,
        cu_seqlens: Any = None,
        backend: str | None = None,
        out: Array | None = None,
    ) -> tuple[Array, Callable[..., tuple[Array, Array, Array]]]:
        """The attention and the function that takes a cotangent of it back to q, k and v.

        Takes the arguments of a call and gives `out, backward`. `backward(d_out, *, out=None)` returns
        (d_q, d_k, d_v) with the shapes and dtype of q, k, v; `out=(d_q, d_k, d_v)` are filled if given. It keeps q, k
        and v (do not change them in between) and at most two numbers a token, and can be called again.
        """
        return self._run(q, k, v, causal, key_mask, cu_seqlens, None, backend, out)

    def weights(
        self,
        q: Array,
        k: Array,
        *,
        causal: bool = False,
        key_mask: Array | None = None,
        cu_seqlens: Any = None,
    ) -> Array:
        """The weight matrix (..., N, M) that the mechanism means: out = weights @ v. O(N M) time and memory."""
        return self._run_weights(q, k, causal, key_mask, cu_seqlens, None)

    def _run(
        self, q: Any, k: Any, v: Any,
        causal: bool, key_mask: Any, cu_seqlens: Any, positions: Any, backend: Any, out: Any,
    ) -> tuple[Array, Callable[..., tuple[Array, Array, Array]]]:  # fmt: skip
        xp = _checks.queries_keys_values(q, k, v)
        q, k, v = _arrays.plain(q), _arrays.plain(k), _arrays.plain(v)
        call, lead = self._checked(q, k, v, causal, key_mask, positions, backend, xp)
        shape = (*lead, q.shape[-2], v.shape[-1])
        if out is not None:
            _checks.result("out", out, shape, q, q, k, v, *_given(call))
        if cu_seqlens is not None:
            segments = _checks.segments(cu_seqlens, q.shape[-2], k.shape[-2])
            return self._packed(q, k, v, segments, call, out, shape)
        self._refuse(call, streaming=False)
        with _arrays.quiet(q):
            y, _, saved = self._forward(q, k, v, None, call, out)

        def backward(d_out: Array, *, out: Any = None) -> tuple[Array, Array, Array]:
            _checks.cotangent("d_out", d_out, "out", shape, q)
            _check_results(out, (q, k, v), d_out, *_given(call))
            with _arrays.quiet(q):
                return self._backward(_arrays.plain(d_out), None, saved, call, out)[:3]

        return y, backward

    def _packed(
        self, q: Array, k: Array, v: Array,
        segments: list[tuple[int, int]], call: Call, out: Any, shape: tuple[int, ...],
    ) -> tuple[Array, Callable[..., tuple[Array, Array, Array]]]:  # fmt: skip
        """Each segment is a call of its own: state, positions and chunk grid start again."""
        xp = call.xp
        segments = [(first, last) for first, last in segments if first < last]
        calls = [_segment(call, first, last) for first, last in segments]
        for own in calls:
            self._refuse(own, streaming=False)
        parts, kept = [], []
        with _arrays.quiet(q):
            for (a, b), own in zip(segments, calls, strict=True):
                room = None if out is None else out[..., a:b, :]
                y, _, saved = self._forward(q[..., a:b, :], k[..., a:b, :], v[..., a:b, :], None, own, room)
                parts.append(y)
                kept.append(saved)
        whole = out if out is not None else _joined(parts, shape, q, xp)

        def backward(d_out: Array, *, out: Any = None) -> tuple[Array, Array, Array]:
            _checks.cotangent("d_out", d_out, "out", shape, q)
            _check_results(out, (q, k, v), d_out, *_given(call))
            d_out = _arrays.plain(d_out)
            with _arrays.quiet(q):
                grads = [
                    self._backward(d_out[..., a:b, :], None, saved, own, None)[:3]
                    for (a, b), own, saved in zip(segments, calls, kept, strict=True)
                ]
            whole = (_joined([g[i] for g in grads], tuple(x.shape), x, xp) for i, x in enumerate((q, k, v)))
            return tuple(_arrays.fill(o, x) for o, x in zip(out or (None, None, None), whole, strict=True))

        return whole, backward

    def _run_weights(self, q: Any, k: Any, causal: bool, key_mask: Any, cu_seqlens: Any, positions: Any) -> Array:
        xp = _checks.queries_keys(q, k)
        q, k = _arrays.plain(q), _arrays.plain(k)
        call, lead = self._checked(q, k, k, causal, key_mask, positions, None, xp)
        if cu_seqlens is None:
            self._refuse(call, streaming=False)
            with _arrays.quiet(q):
                return xp.broadcast_to(self._weights(q, k, call), (*lead, q.shape[-2], k.shape[-2]))
        n_tokens, rows = k.shape[-2], []
        for a, b in _checks.segments(cu_seqlens, q.shape[-2], n_tokens):
            if a == b:
                continue
            own = _segment(call, a, b)
            self._refuse(own, streaming=False)
            with _arrays.quiet(q):
                block = xp.broadcast_to(self._weights(q[..., a:b, :], k[..., a:b, :], own), (*lead, b - a, b - a))
            before, after = (
                xp.zeros((*lead, b - a, width), dtype=q.dtype, device=_arrays.device(q)) for width in (a, n_tokens - b)
            )
            rows.append(xp.concat([before, block, after], axis=-1))
        return _joined(rows, (*lead, n_tokens, n_tokens), q, xp)

    def _checked(
        self, q: Array, k: Array, v: Array, causal: bool, key_mask: Any, positions: Any, backend: Any, xp: Any
    ) -> tuple[Call, tuple[int, ...]]:
        """The options, and the leading shape of the result."""
        causal = _checks.flag("causal", causal)
        lead = _checks.leading(q=tuple(q.shape[:-2]), k=tuple(k.shape[:-2]), v=tuple(v.shape[:-2]))
        if causal:
            _checks.causal_lengths(q.shape[-2], k.shape[-2])
        if key_mask is not None:
            lead = _checks.key_mask(key_mask, k, lead)
        if positions is not None:
            positions, lead = _checks.positions(positions, q, k, lead)
        _checks.backend_name(backend)
        return Call(xp, backend, causal, key_mask, positions), lead

    # -- streams ----------------------------------------------------------------------------------------------------

    def init_state(self, k: Array, v: Array, *, position: int = 0) -> State:
        """The state before the first token, for keys and values shaped like these (any number of tokens, also 0).

        Parameters
        ----------
        k, v : array
            (..., M, D), (..., M, E); only shapes, dtype and device are used.
        position : int
            Position of the first token to come: not 0 where a later part of a stream starts on its own, to be merged.
        """
        xp = _checks.keys_values(k, v)
        _checks.natural("position", position, least=0)
        _checks.leading(k=tuple(k.shape[:-2]), v=tuple(v.shape[:-2]))
        call = Call(xp, causal=True, first_position=position)
        self._refuse(call, streaming=True)
        return State(self, self._empty(k[..., :0, :], v[..., :0, :], call), position, position)

    def step(
        self,
        q: Array,
        k: Array,
        v: Array,
        state: State,
        *,
        key_mask: Array | None = None,
        backend: str | None = None,
    ) -> tuple[Array, State]:
        """Attention of n >= 0 new tokens over themselves (causally) and all tokens of `state`.

        Returns
        -------
        out : array
            (..., n, E).
        state : State
            The state with the new tokens in it; the old one stays usable.
        """
        return self._run_step(q, k, v, state, key_mask, backend)[:2]

    def step_vjp(
        self,
        q: Array,
        k: Array,
        v: Array,
        state: State,
        *,
        key_mask: Array | None = None,
        backend: str | None = None,
    ) -> tuple[Array, State, Callable[..., tuple[Array, Array, Array, State]]]:
        """`step` and its `backward(d_out, d_state=None) -> d_q, d_k, d_v, d_state`.

        `d_state` is a state whose arrays are cotangents: that of the outgoing state in, that of the incoming one out.
        The cotangent of a linear state's value is in `sums`; what is in `rest` counts as well.
        """
        return self._run_step(q, k, v, state, key_mask, backend)

    def _run_step(
        self, q: Any, k: Any, v: Any, state: Any, key_mask: Any, backend: Any
    ) -> tuple[Array, State, Callable[..., tuple[Array, Array, Array, State]]]:
        _checks.state_of(self, state, State)
        known = key_mask is None and self._fits_by_shape
        seen = _likes_of_step(self, q, k, v, state.arrays, backend) if known else None
        checked = None if seen is None else _good_steps.get(seen)
        if checked is not None:  # decoding asks the same of every token
            call, lead = Call(_arrays.namespace(q), backend, True, None, None, state.position), checked
        else:
            xp = _checks.queries_keys_values(q, k, v)
            q, k, v = _arrays.plain(q), _arrays.plain(k), _arrays.plain(v)
            call, lead = self._checked(q, k, v, True, key_mask, None, backend, xp)
            call = call._replace(first_position=state.position)
            self._refuse(call, streaming=True)
            self._refuse_state(state, k, v, call)
            if seen is not None:
                _remember_step(seen, lead)
        self._refuse_last(state.position + k.shape[-2] - 1)
        shape = (*lead, q.shape[-2], v.shape[-1])
        with _arrays.quiet(q):
            y, arrays, saved = self._forward(q, k, v, state.arrays, call, None)
        after = State(self, arrays, state.start, state.position + q.shape[-2])

        def backward(d_out: Array, d_state: State | None = None) -> tuple[Array, Array, Array, State]:
            _checks.cotangent("d_out", d_out, "out", shape, q)
            if d_state is not None:
                _checks.state_of(self, d_state, State)
                _check_state(d_state.arrays, arrays, "d_state")
            with _arrays.quiet(q):
                d_q, d_k, d_v, d_before = self._backward(
                    _arrays.plain(d_out), None if d_state is None else d_state.arrays, saved, call, None
                )
            return d_q, d_k, d_v, State(self, d_before, state.start, state.position)

        return y, after, backward

    def _refuse_state(self, state: State, k: Array, v: Array, call: Call) -> None:
        """Raises for a state whose arrays do not fit; `_fits_by_shape`: shapes, dtypes and libraries decide."""
        with _arrays.quiet(k):
            want = self._empty(k[..., :0, :], v[..., :0, :], call)
        _check_state(state.arrays, want, "state")

    def merge(self, earlier: State, later: State) -> State:
        """The state of one stream from the states of its two parts.

        Raises
        ------
        ValueError
            If the states come from another value, do not fit each other, or, where positions count, `later` was not
            begun at the position at which `earlier` ends.
        """
        _checks.state_of(self, earlier, State)
        _checks.state_of(self, later, State)
        _checks.same_library(earlier.arrays[0], later.arrays[0])
        self._refuse_merge(earlier, later)
        xp = _arrays.namespace(earlier.arrays[0])
        with _arrays.quiet(earlier.arrays[0]):
            arrays = self._merge(earlier.arrays, later.arrays, xp)
        return State(self, arrays, earlier.start, earlier.position + later.position - later.start)

    def _refuse_merge(self, earlier: State, later: State) -> None:
        _check_state(later.arrays, earlier.arrays, "later")

    # -- what a mechanism says ----------------------------------------------------------------------------------------

    def _refuse(self, call: Call, streaming: bool) -> None:
        """Raises for calls that the mechanism does not offer; by default it offers all."""

    def _refuse_last(self, position: int) -> None:
        """Raises if a stream cannot reach this position; by default there is no end."""

    def _forward(self, q: Array, k: Array, v: Array, arrays: Any, call: Call, out: Any) -> tuple[Array, Any, Any]:
        raise NotImplementedError

    def _backward(
        self, d_out: Array, d_arrays: Any, saved: Any, call: Call, out: Any
    ) -> tuple[Array, Array, Array, Any]:
        raise NotImplementedError

    def _saved(self, q: Array, k: Array, v: Array, arrays: Any, call: Call) -> Any:
        """What `_forward` saves, made again from its arguments alone; by default by a forward."""
        return self._forward(q, k, v, arrays, call, None)[2]

    def _weights(self, q: Array, k: Array, call: Call) -> Array:
        raise NotImplementedError

    def _empty(self, k: Array, v: Array, call: Call) -> Any:
        raise NotImplementedError

    def _merge(self, earlier: Any, later: Any, xp: Any) -> Any:
        raise NotImplementedError


_good_steps: dict[tuple[Any, ...], tuple[int, ...]] = {}
GOOD_STEPS = 256  # of a softmax stream every token makes one


def _likes_of_step(attend: Attention, q: Any, k: Any, v: Any, arrays: Any, backend: Any) -> tuple[Any, ...] | None:
    """All that the checks of a step look at, if everything is NumPy's own and in native byte order; else None."""
    given = [q, k, v, *(x for x in arrays if x is not None)]
    plain = all(type(x) is np.ndarray and x.dtype.isnative for x in given)
    if not plain or not (backend is None or type(backend) is str):
        return None
    return attend, backend, type(arrays), *[(x.shape, x.dtype) for x in given]


def _remember_step(seen: tuple[Any, ...], lead: tuple[int, ...]) -> None:
    if len(_good_steps) >= GOOD_STEPS:
        _good_steps.clear()
    _good_steps[seen] = lead


def room(call: Call, like: Array, engine: str) -> Any:
    """The backend's module for this call."""
    return backends.resolve(call.backend, like, engine)


def _given(call: Call) -> list[Array]:
    """The arrays among the options: none of them may be written to."""
    given = [] if call.key_mask is None else [call.key_mask]
    return given + [p for p in call.positions or () if p is not None]


def _segment(call: Call, first: int, last: int) -> Call:
    mask = None if call.key_mask is None else call.key_mask[..., first:last]
    positions = None if call.positions is None else tuple(p[..., first:last] for p in call.positions)
    return call._replace(key_mask=mask, positions=positions)


def _joined(parts: list[Array], shape: tuple[int, ...], like: Array, xp: Any) -> Array:
    if parts:
        return xp.concat(parts, axis=-2)
    return xp.zeros(shape, dtype=like.dtype, device=_arrays.device(like))


def _check_results(out: Any, primals: tuple[Array, Array, Array], *inputs: Array) -> None:
    if out is None:
        return
    if not isinstance(out, tuple) or len(out) != 3:
        raise TypeError(f"`out` of a backward must be a tuple (d_q, d_k, d_v), got {type(out).__name__}.")
    for name, o, x in zip(("d_q", "d_k", "d_v"), out, primals, strict=True):
        _checks.result(f"out: {name}", o, tuple(x.shape), x, *primals, *inputs)
    for i, name in ((1, "d_k"), (2, "d_v")):
        if any(_arrays.share_memory(out[i], other) for other in out[:i]):
            raise ValueError(f"`out: {name}` must not overlap with another result, got one that shares memory.")


def _check_state(arrays: Any, like: Any, name: str) -> None:
    """Same fields, shapes, dtypes and library as `like`; what is None there may be anything."""
    if type(arrays) is not type(like):
        raise TypeError(f"`{name}` must hold a {type(like).__name__}, got {type(arrays).__name__}.")
    want = {
        field: (tuple(x.shape), _arrays.dtype_name(x), _arrays.library(x))
        for field, x in like._asdict().items()
        if x is not None and getattr(arrays, field) is not None
    }
    _checks.state_arrays(name, arrays._asdict(), want)
