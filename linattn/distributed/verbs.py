"""Attention over the tokens of all ranks, and its backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from linattn import _arrays, _checks
from linattn._arrays import Array
from linattn.distributed.communicators import Communicator
from linattn.distributed.exchange import TEXT, exchange, text, words
from linattn.distributed.passes import Passes
from linattn.distributed.states import as_state, centred, cotangent_of, shift_of
from linattn.mechanisms.attention import Attention, Call
from linattn.mechanisms.feature_attention import FeatureAttention
from linattn.mechanisms.log_feature_attention import LogFeatureAttention


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
    shard, first = _begin(comm, q, k, v, mechanism, causal, key_mask, backend)
    q, v, attend, xp = shard.q, shard.v, shard.attend, shard.call.xp
    passes = Passes(attend, q, shard.k, v, shard.call, first, shard.empty)
    # causal: nobody comes after the last rank, so nobody wants its state, nor sends anything to its keys; and nobody
    # comes before the first, so nobody wants what its queries send
    heard, asked = (not causal or comm.rank < comm.size - 1), (not causal or comm.rank > 0)
    around = partial(
        exchange, comm, merge=lambda earlier, later: attend._merge(earlier, later, xp), empty=shard.empty, xp=xp
    )

    def own_state(values: Array) -> Any:
        passes.prepare()  # refuses positions beyond the length before ranks part
        return passes.keys(values) if heard else shard.empty

    with _arrays.quiet(q):
        states = around(lambda: own_state(v))
        before = states.seen if causal else states.total
        out = passes.rows(v, before)
        shift = shift_of(attend, states.total, v, xp)
    out_shape = (*shard.lead, q.shape[-2], v.shape[-1])

    def backward(d_out: Array) -> tuple[Array, Array, Array]:
        now, start, values = passes, before, v
        with _arrays.quiet(q):
            if shift is not None and (heard or asked):
                values = v - shift
                if states.compensated:
                    start = centred(before, shift, xp)
                else:
                    again = around(lambda: own_state(values))
                    start = again.seen if causal else again.total
                now = passes.moved(values, start, shift if states.compensated else None)

            def own_cotangent() -> Any:
                _checks.cotangent("d_out", d_out, "out", out_shape, q)
                reached = now.to_rows(_arrays.plain(d_out), asked)
                return as_state(reached, start, xp) if asked else shard.empty

            around_back = around(own_cotangent, reverse=causal)
            after = around_back.seen if causal else around_back.total
            return now.to_keys(cotangent_of(now.own, after, xp) if heard else None)

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
    failure, summary, counts = None, "", (0, 0)
    try:
        shard = _checked(q, k, v, mechanism, causal, key_mask, backend)
        counts = (shard.q.shape[-2], shard.k.shape[-2])
        summary = (
            f"{mechanism!r}, causal={shard.call.causal}, {_arrays.dtype_name(shard.q)}, heads {shard.lead}, "
            f"state {tuple(shard.empty.sums.shape)}, D {shard.q.shape[-1]}, E {shard.v.shape[-1]}"
        )
    except Exception as error:
        failure = error
    message = text(f"!{type(failure).__name__}: {failure}" if failure else summary)
    told = comm.allgather(np.concatenate([message, np.array(counts, np.int64).view(np.uint8)]))
    if failure is not None:
        raise failure
    said = [words(row[:TEXT]) for row in told]
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
