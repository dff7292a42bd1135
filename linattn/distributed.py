"""Sequences longer than one machine: each process holds its tokens, and what crosses between them is a state a head.

    U_r = the state of rank r's keys        S_r = U_0 + ... + U_(r-1)        forward: the local pass on S_r
    X_r = the cotangent that rank r's queries send to S_r                    backward: X_(r+1) + ... reach rank r's keys

U and X have R (E + 1) numbers a head, whatever the length. Without causality every rank's queries see the sum of
all U, and every rank's keys the sum of all X. Ranks are in the order of the tokens; a rank may hold none.

The sums of the log-linear engine are in units of 2^gauge, a gauge for each feature. U + U' is at the larger gauge, and
the cotangent X of sums at the gauge G is 2^(g - G) X for the sums at the gauge g that went into them.

Gradients of normalised attention do not change if all values are shifted by one vector. In float32 the backward shifts
them by their weighted mean, which every rank knows from the states, and the states with them, or makes the states again
where a room kept no compensation: nothing cancels where values are far from zero.
"""

from __future__ import annotations

import math
import threading
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any, NamedTuple

import numpy as np

from linattn import _arrays, _checks
from linattn._arrays import Array
from linattn.backends.reference import loglinear as reference
from linattn.backends.reference._gauges import Powers
from linattn.engines.linear import LinearState
from linattn.engines.loglinear import LogLinearState
from linattn.mechanisms.attention import Attention, Call
from linattn.mechanisms.feature_attention import FeatureAttention
from linattn.mechanisms.log_feature_attention import LogFeatureAttention

TEXT = 512  # bytes of a sentence that ranks tell each other
WAIT = 60.0  # seconds after which threads that do not meet give up


# -- communicators ------------------------------------------------------------------------------------------------


class Communicator(ABC):
    """What the verbs need of a group of ranks.

    Attributes
    ----------
    rank, size : int
    bytes_sent : int
        What this rank has handed to all others so far.
    """

    rank: int
    size: int
    bytes_sent: int = 0

    def allgather(self, x: np.ndarray) -> np.ndarray:
        """The arrays of all ranks, (size, ...); shape and dtype are the same on each."""
        self.bytes_sent += x.nbytes
        return self._allgather(np.ascontiguousarray(x))

    @abstractmethod
    def _allgather(self, x: np.ndarray) -> np.ndarray: ...


class MPIComm(Communicator):
    """An intracommunicator of mpi4py; by default `MPI.COMM_WORLD`.

    Raises
    ------
    ImportError
        Without mpi4py.
    TypeError
        If `comm` is not an intracommunicator.
    """

    def __init__(self, comm: Any = None) -> None:
        try:
            from mpi4py import MPI
        except ImportError as error:
            raise ImportError(f"`MPIComm` needs mpi4py ({error}): pip install linattn[mpi].") from None
        comm = MPI.COMM_WORLD if comm is None else comm
        if not isinstance(comm, MPI.Intracomm):
            raise TypeError(f"`comm` must be an intracommunicator of mpi4py, got {type(comm).__name__}.")
        self.comm, self.rank, self.size = comm, comm.Get_rank(), comm.Get_size()

    def _allgather(self, x: np.ndarray) -> np.ndarray:
        rows = np.zeros((self.size, *x.shape), x.dtype)
        self.comm.Allgather(x.view(np.uint8), rows.view(np.uint8))
        return rows

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Inside, an exception is printed and ends the whole job: no rank waits for one that is gone."""
        try:
            yield
        except BaseException:
            traceback.print_exc()
            self.comm.Abort(1)
            raise


class LocalComm(Communicator):
    """A rank that is a thread of this process: for tests, and to try a program out. See `run_local`."""

    def __init__(self, rank: int, size: int, slots: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, size
        self._slots, self._barrier = slots, barrier

    def _allgather(self, x: np.ndarray) -> np.ndarray:
        self._slots[self.rank] = x
        self._barrier.wait()
        rows = np.stack(self._slots)
        self._barrier.wait()
        return rows


def run_local(size: int, function: Callable[[LocalComm], Any]) -> list[Any]:
    """`function(comm)` in `size` threads, a rank each; their results in the order of ranks.

    The first exception of a rank is raised here; the others do not wait for it.

    Examples
    --------
    >>> import numpy as np
    >>> from linattn.distributed import run_local
    >>> run_local(3, lambda comm: comm.allgather(np.array([comm.rank])).sum())
    [np.int64(3), np.int64(3), np.int64(3)]
    """
    _checks.natural("size", size)
    slots, barrier = [None] * size, threading.Barrier(size, timeout=WAIT)
    results: list[Any] = [None] * size
    failures: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            results[rank] = function(LocalComm(rank, size, slots, barrier))
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        real = [error for error in failures if not isinstance(error, threading.BrokenBarrierError)]
        raise (real or failures)[0]
    return results


# -- the verbs ----------------------------------------------------------------------------------------------------


def attention(
    q: Array,
    k: Array,
    v: Array,
    mechanism: Attention,
    comm: Communicator,
    *,
    causal: bool = False,
    key_mask: Array | None = None,
    backend: str | None = None,
) -> Array:
    """This rank's rows of `mechanism` over the tokens of all ranks; called by every rank.

    Parameters
    ----------
    q, k, v : array
        This rank's tokens, (..., N_r, D), (..., M_r, D), (..., M_r, E), in the order of ranks; N_r and M_r may differ
        from rank to rank and be 0, all other axes may not.
    mechanism : Linear, CosFormer, Performer or LLN
        A value of the linear or the log-linear engine; equal on all ranks.
    comm : Communicator
        `MPIComm` or a `LocalComm`.
    causal, key_mask, backend
        See `Linear.__call__`; `key_mask` is this rank's, (..., M_r).

    Returns
    -------
    array
        (..., N_r, E).

    Raises
    ------
    TypeError, ValueError
        On every rank, if the arguments of one are refused or the ranks' heads, channels, dtypes or options disagree.
    RuntimeError
        On the other ranks, if one fails on the way.

    Examples
    --------
    >>> import numpy as np
    >>> import linattn as la
    >>> from linattn import distributed
    >>> q, k, v = np.random.default_rng(0).normal(size=(3, 2, 12, 4))
    >>> attend = la.CosFormer(length=64)
    >>> def rank(comm):
    ...     own = slice(5 * comm.rank, 5 * comm.rank + 5)   # 5, 5 and 2 tokens
    ...     return distributed.attention(q[:, own], k[:, own], v[:, own], attend, comm, causal=True)
    >>> whole = np.concatenate(distributed.run_local(3, rank), axis=-2)
    >>> bool(np.allclose(whole, attend(q, k, v, causal=True), rtol=1e-13, atol=1e-13))
    True
    """
    return vjp(q, k, v, mechanism, comm, causal=causal, key_mask=key_mask, backend=backend)[0]


def vjp(
    q: Array,
    k: Array,
    v: Array,
    mechanism: Attention,
    comm: Communicator,
    *,
    causal: bool = False,
    key_mask: Array | None = None,
    backend: str | None = None,
) -> tuple[Array, Callable[[Array], tuple[Array, Array, Array]]]:
    """`attention` and its `backward(d_out) -> d_q, d_k, d_v`, each this rank's; every rank calls both.

    Takes the arguments of `attention`.
    """
    if not isinstance(comm, Communicator):
        raise TypeError(f"`comm` must be an MPIComm or a LocalComm, got {type(comm).__name__}.")
    shard, (first_q, first_k) = _begin(comm, q, k, v, mechanism, causal, key_mask, backend)
    q, k, v, attend, call, xp = shard.q, shard.k, shard.v, shard.attend, shard.call, shard.call.xp
    keys_call = call._replace(causal=False, first_position=first_k)
    rows_mask = call.key_mask if causal or call.key_mask is None else call.key_mask[..., :0]
    rows_call = call._replace(first_position=first_q, key_mask=rows_mask)
    own_k = k if causal else k[..., :0, :]
    no_rows = q[..., :0, :]
    # causal: nobody comes after the last rank, so nobody wants its state, nor sends anything to its keys
    heard = not causal or comm.rank < comm.size - 1
    kept: dict[str, Any] = {}

    def of_rows(values: Array) -> Array:
        return values if causal else values[..., :0, :]

    def own_state(values: Array) -> Any:
        if isinstance(attend, FeatureAttention):
            attend._options(q.shape[-2], own_k, rows_call)  # refuses positions beyond the length before ranks part
        if not heard:
            return shard.empty
        # U = sum over this rank's keys: a pass without queries
        _, state, kept["keys"] = attend._forward(no_rows, k, values, None, keys_call, None)
        return state

    def seen(states: Sequence[Any], rank: int) -> Any:
        return _fold(attend, states[:rank] if causal else states, shard.empty, xp)

    with _arrays.quiet(q):
        states = _exchange(comm, lambda: own_state(v), shard.empty, xp)
        out, _, kept["rows"] = attend._forward(q, own_k, of_rows(v), seen(states, comm.rank), rows_call, None)
        shift = _shift(attend, _fold(attend, states, shard.empty, xp), v, xp)
    out_shape = (*shard.lead, q.shape[-2], v.shape[-1])

    def backward(d_out: Array) -> tuple[Array, Array, Array]:
        grads: dict[str, Any] = {}
        now, saved = states, kept["rows"]
        if shift is not None:
            near = v - shift
            if all(map(_is_compensated, states)):
                now = [_centred(state, shift, xp) for state in states]
                if heard:
                    kept["keys"] = _with_values(attend, kept["keys"], near, shard.empty, keys_call)
            else:
                now = _exchange(comm, lambda: own_state(near), shard.empty, xp)
            saved = _with_values(attend, saved, of_rows(near), seen(now, comm.rank), rows_call)

        def own_cotangent() -> Any:
            _checks.cotangent("d_out", d_out, "out", out_shape, q)
            *grads["rows"], d_before = attend._backward(_arrays.plain(d_out), None, saved, rows_call, None)
            return d_before

        with _arrays.quiet(q):
            cotangents = _exchange(comm, own_cotangent, shard.empty, xp)
            d_q, *direct = grads["rows"]
            if not heard:
                return d_q, *direct
            later = range(comm.size - 1, comm.rank, -1) if causal else range(comm.size)
            after = _reaching(now[comm.rank], [(cotangents[r], seen(now, r)) for r in later], xp)
            nothing = xp.zeros((*shard.lead, 0, v.shape[-1]), dtype=q.dtype, device=_arrays.device(q))
            # what later queries send to these keys, through the state that they left
            _, d_k, d_v, _ = attend._backward(nothing, after, kept["keys"], keys_call, None)
        return (d_q, direct[0] + d_k, direct[1] + d_v) if causal else (d_q, d_k, d_v)

    return out, backward


# -- what crosses ---------------------------------------------------------------------------------------------------


class _Shard(NamedTuple):
    q: Array
    k: Array
    v: Array
    attend: Any
    call: Call
    lead: tuple[int, ...]
    empty: Any


def _begin(
    comm: Communicator, q: Any, k: Any, v: Any, mechanism: Any, causal: Any, key_mask: Any, backend: Any
) -> tuple[_Shard, tuple[int, int]]:
    """Each rank's checks, told to all: either every rank goes on or every rank raises."""
    shard: Any = None
    failure, words, counts = None, "", (0, 0)
    try:
        shard = _checked(q, k, v, mechanism, causal, key_mask, backend)
        counts = (shard.q.shape[-2], shard.k.shape[-2])
        words = (
            f"{mechanism!r}, causal={shard.call.causal}, {_arrays.dtype_name(shard.q)}, heads {shard.lead}, "
            f"state {tuple(shard.empty.sums.shape)}, D {shard.q.shape[-1]}, E {shard.v.shape[-1]}"
        )
    except Exception as error:
        failure = error
    message = _text(f"!{type(failure).__name__}: {failure}" if failure else words)
    told = comm.allgather(np.concatenate([message, np.array(counts, np.int64).view(np.uint8)]))
    if failure is not None:
        raise failure
    said = [_words(row[:TEXT]) for row in told]
    for rank, sentence in enumerate(said):
        if sentence.startswith("!"):
            raise ValueError(f"rank {rank} was refused, so no rank goes on: {sentence[1:]}")
    if len(set(said)) > 1:
        other = next(rank for rank, sentence in enumerate(said) if sentence != said[0])
        raise ValueError(
            f"Shards must agree in all but their tokens, got rank 0: {said[0]}; rank {other}: {said[other]}."
        )
    tokens = np.ascontiguousarray(told[:, TEXT:]).view(np.int64)  # (size, 2)
    first_q, first_k = (int(x) for x in tokens[: comm.rank].sum(axis=0))
    return shard, (first_q, first_k)


def _checked(q: Any, k: Any, v: Any, mechanism: Any, causal: Any, key_mask: Any, backend: Any) -> _Shard:
    if not isinstance(mechanism, (FeatureAttention, LogFeatureAttention)):
        if isinstance(mechanism, Attention):
            raise ValueError(
                f"`{mechanism!r}` cannot run on many processes: its state grows or has no scan over ranks."
            )
        raise TypeError(f"`mechanism` must be a value like linattn.Linear(), got {mechanism!r}.")
    xp = _checks.queries_keys_values(q, k, v)
    q, k, v = _arrays.plain(q), _arrays.plain(k), _arrays.plain(v)
    call, lead = mechanism._checked(q, k, v, causal, key_mask, None, backend, xp)
    mechanism._refuse(call, streaming=True)
    return _Shard(q, k, v, mechanism, call, lead, mechanism._empty(k[..., :0, :], v[..., :0, :], call))


def _exchange(comm: Communicator, make: Callable[[], Any], like: Any, xp: Any) -> Sequence[Any]:
    """The states of all ranks; a rank that could not make its own says so to all."""
    failure, state = None, like
    try:
        state = make()
    except Exception as error:
        failure = error
    arrays = [np.ascontiguousarray(_arrays.to_numpy(x)) for x in state]
    text = _text(f"{type(failure).__name__}: {failure}" if failure else "")
    told = comm.allgather(np.concatenate([text, *(x.reshape(-1).view(np.uint8) for x in arrays)]))
    if failure is not None:
        raise failure
    for rank, row in enumerate(told):
        if sentence := _words(row[:TEXT]):
            raise RuntimeError(f"rank {rank} failed, so no rank goes on: {sentence}")
    edges = np.cumsum([TEXT, *(x.nbytes for x in arrays)])
    parts = [
        np.ascontiguousarray(told[:, a:b]).view(x.dtype).reshape(comm.size, *x.shape)
        for x, a, b in zip(arrays, edges, edges[1:], strict=False)
    ]
    if not isinstance(like.sums, np.ndarray):
        device = _arrays.device(like.sums)
        return [type(like)(*(xp.asarray(x.copy(), device=device) for x in row)) for row in zip(*parts, strict=True)]
    return [type(like)(*row) for row in zip(*parts, strict=True)]


def _fold(attend: Any, states: Sequence[Any], empty: Any, xp: Any) -> Any:
    """One after the other in their order, as a single process would meet them."""
    return reduce(lambda earlier, later: attend._merge(earlier, later, xp), states) if states else empty


def _reaching(own: Any, cotangents: list[tuple[Any, Any]], xp: Any) -> Any:
    """The cotangent of `own`, at its gauge, from pairs of a cotangent and the state that it is of: they add."""
    total = xp.zeros_like(own.sums)
    rest = xp.zeros_like(own.sums)
    for cotangent, of in cotangents:
        parts = [cotangent.sums, cotangent.rest]
        if isinstance(own, LogLinearState):
            powers = Powers(own.sums, xp)
            shift = powers(own.gauge - of.gauge, own.sums.dtype)[..., None]  # 2^(g - G)
            parts = [x * shift for x in parts]
        new = total + parts[0]
        seen = new - total
        rest = rest + parts[1] + ((total - (new - seen)) + (parts[0] - seen))  # exact: two-sum
        total = new
    return own._replace(sums=total, rest=rest)


def _is_compensated(state: Any) -> bool:
    """Whether `rest` holds what the sums rounded away, or there is nothing to hold: read off a state all ranks know."""
    rest, sums = (_arrays.to_numpy(x) for x in (state.rest, state.sums))
    return bool(np.any(rest != 0) or not np.any(sums != 0))


def _centred(state: Any, shift: Array, xp: Any) -> Any:
    """The state of the values less `shift` (..., 1, E): S_num - z shift^T, in the dtype of running totals."""
    total = reference.value(state, xp)
    by = (
        shift if isinstance(state, LogLinearState) else shift[..., None, :, :]
    )  # (..., n, R, E + 1) of the linear engine
    lost = total[..., -1:] * _arrays.cast(by, total.dtype, xp)
    sums, rest = reference.rounded(xp.concat([total[..., :-1] - lost, total[..., -1:]], axis=-1), state.sums, xp)
    return state._replace(sums=sums, rest=rest)


def _with_values(attend: Any, saved: Any, values: Array, state: Any, call: Call) -> Any:
    """What a forward saved, for these values and this state: no other number that it keeps depends on them."""
    if isinstance(state, LinearState) and isinstance(attend, FeatureAttention):
        return saved[0]._replace(v=values, state=state), *saved[1:]
    q, k = saved[:2]
    return attend._saved(q, k, values, state, call)


def _text(sentence: str) -> np.ndarray:
    """As TEXT bytes; a longer sentence is cut."""
    return np.frombuffer(sentence.encode()[:TEXT].ljust(TEXT, b"\0"), np.uint8)


def _words(row: np.ndarray) -> str:
    return row.tobytes().rstrip(b"\0").decode(errors="replace")


# -- values far from zero ---------------------------------------------------------------------------------------------


def _shift(attend: Any, total: Any, v: Array, xp: Any) -> Array | None:
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


__all__ = ["Communicator", "LocalComm", "MPIComm", "attention", "run_local", "vjp"]
