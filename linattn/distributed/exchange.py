"""How states cross: packed as bytes or on their device, gathered or scanned, and no rank left waiting.

A rank that could not make its state says so in the same breath, and every rank raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import numpy as np

from linattn import _arrays
from linattn.distributed.communicators import Communicator
from linattn.distributed.states import is_compensated

TEXT = 512  # bytes of a sentence that ranks tell each other


class Around(NamedTuple):
    """What a rank hears of all states.

    `seen` is the merge of those before it (or behind it), `total` of all; `compensated`: whether every rank's state
    kept what its sums rounded away.
    """

    seen: Any
    total: Any
    compensated: bool


def exchange(
    comm: Communicator, make: Callable[[], Any], merge: Callable[[Any, Any], Any], empty: Any, xp: Any,
    *, reverse: bool = False,
) -> Around:  # fmt: skip
    """`make` this rank's state, tell it, and hear of the others'; `empty` is the state of no tokens."""
    failure, state = None, empty
    try:
        state = make()
    except Exception as error:
        failure = error
    n_bytes = sum(x.size * x.dtype.itemsize for x in map(_arrays.to_numpy, empty))
    on_device = comm.device_buffers and not isinstance(empty.sums, np.ndarray)
    if on_device or not comm.gathers(n_bytes):
        flags = comm.allgather(np.array([failure is not None, failure is not None or is_compensated(state)]))
        if flags[:, 0].any():
            _raise(failure, comm.allgather(text_of(failure)))
        compensated = bool(flags[:, 1].all())
        if not on_device:
            return _scanned(comm, state, merge, empty, xp, reverse, compensated)
        rows = [comm.allgather_device(x, xp) for x in state]
        states = [type(empty)(*(x[rank, ...] for x in rows)) for rank in range(comm.size)]
    else:
        told = comm.allgather(np.concatenate([text_of(failure), packed(state)]))
        _raise(failure, told[:, :TEXT])
        states = [unpacked(row[TEXT:], empty, xp) for row in told]
        compensated = all(map(is_compensated, states))
    seen = states[comm.rank + 1 :] if reverse else states[: comm.rank]
    return Around(_fold(merge, seen, empty), _fold(merge, states, empty), compensated)


def _scanned(
    comm: Communicator, state: Any, merge: Callable[[Any, Any], Any], empty: Any, xp: Any, reverse: bool,
    compensated: bool,
) -> Around:  # fmt: skip
    """By the engine's own merge on packed states; the rank that has seen all others tells the total."""

    def merged(earlier: np.ndarray, later: np.ndarray) -> np.ndarray:
        return packed(merge(unpacked(earlier, empty, xp), unpacked(later, empty, xp)))

    own = packed(state)
    found = comm.exscan(own, merged, reverse=reverse)
    total = own if found is None else merged(own, found) if reverse else merged(found, own)
    total = comm.bcast(total, 0 if reverse else comm.size - 1)
    return Around(empty if found is None else unpacked(found, empty, xp), unpacked(total, empty, xp), compensated)


def _fold(merge: Callable[[Any, Any], Any], states: Sequence[Any], empty: Any) -> Any:
    """One after the other in their order, as a single process would meet them."""
    return reduce(merge, states) if states else empty


def packed(state: Any) -> np.ndarray:
    """The arrays of a state as bytes on the host."""
    arrays = [np.ascontiguousarray(_arrays.to_numpy(x)) for x in state]
    return np.concatenate([x.reshape(-1).view(np.uint8) for x in arrays])


def unpacked(row: np.ndarray, like: Any, xp: Any) -> Any:
    """The state again, in the library and on the device of `like`."""
    found, start = [], 0
    for x in like:
        on_host = isinstance(x, np.ndarray)
        dtype = x.dtype if on_host else _arrays.to_numpy(x).dtype
        stop = start + x.size * dtype.itemsize if on_host else start + _arrays.to_numpy(x).nbytes
        part = np.array(row[start:stop]).view(dtype).reshape(tuple(x.shape))  # a copy: aligned, and its own
        found.append(part if on_host else xp.asarray(part, device=_arrays.device(x)))
        start = stop
    return type(like)(*found)


def _raise(failure: Exception | None, told: np.ndarray) -> None:
    if failure is not None:
        raise failure
    for rank, row in enumerate(told):
        if sentence := words(row):
            raise RuntimeError(f"rank {rank} failed, so no rank goes on: {sentence}")


def text_of(failure: Exception | None) -> np.ndarray:
    return text(f"{type(failure).__name__}: {failure}" if failure else "")


def text(sentence: str) -> np.ndarray:
    """As TEXT bytes; a longer sentence is cut."""
    return np.frombuffer(sentence.encode()[:TEXT].ljust(TEXT, b"\0"), np.uint8)


def words(row: np.ndarray) -> str:
    return row.tobytes().rstrip(b"\0").decode(errors="replace")
