"""Groups of ranks: processes over MPI, and threads that stand for them."""

from __future__ import annotations

import sys
import threading
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from typing import Any

import numpy as np

from linattn import _arrays, _checks

WAIT = 60.0  # seconds after which threads that do not meet give up
GATHERED = 1 << 26  # bytes of all ranks' states up to which gathering them is the default
SCANS = ("gather", "exscan")
Merge = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Communicator(ABC):
    """What the verbs need of a group of ranks: `rank`, `size` and `_allgather` are enough.

    Attributes
    ----------
    rank, size : int
    scan : {"gather", "exscan"} or None
        How states meet: each rank gets all of them and merges those before it, in their order; or a scan, in which no
        rank holds more than one. None: gathered up to 64 MiB, scanned beyond.
    device_buffers : bool
        Whether arrays of a device cross as they are, without a copy on the host.
    bytes_sent, bytes_received : int
        What this rank has handed to the group so far, and what it was handed.
    """

    rank: int
    size: int
    scan: str | None = None
    device_buffers: bool = False
    bytes_sent: int = 0
    bytes_received: int = 0

    def gathers(self, n_bytes: int) -> bool:
        """Whether states of that size are gathered; the same on every rank."""
        return self.size * n_bytes <= GATHERED if self.scan is None else self.scan == "gather"

    def allgather(self, x: np.ndarray) -> np.ndarray:
        """The arrays of all ranks, (size, ...); shape and dtype are the same on each."""
        self._count(x.nbytes, (self.size - 1) * x.nbytes)
        return self._allgather(np.ascontiguousarray(x))

    def exscan(self, x: np.ndarray, merge: Merge, *, reverse: bool = False) -> np.ndarray | None:
        """The bytes (n,) of the ranks before this one, merged in the order of ranks; None on the first.

        With `reverse` those of the ranks behind it, and None on the last. `merge(earlier, later)` is associative, but
        need not commute.
        """
        self._count(x.nbytes, x.nbytes)
        return self._exscan(np.ascontiguousarray(x), merge, reverse)

    def bcast(self, x: np.ndarray, root: int) -> np.ndarray:
        """The array of rank `root`; shape and dtype are the same on each."""
        self._count(x.nbytes if self.rank == root else 0, 0 if self.rank == root else x.nbytes)
        return self._bcast(np.ascontiguousarray(x), root)

    @abstractmethod
    def _allgather(self, x: np.ndarray) -> np.ndarray: ...

    def _exscan(self, x: np.ndarray, merge: Merge, reverse: bool) -> np.ndarray | None:
        rows = self._allgather(x)
        seen = list(rows[self.rank + 1 :] if reverse else rows[: self.rank])
        return reduce(merge, seen) if seen else None

    def _bcast(self, x: np.ndarray, root: int) -> np.ndarray:
        return self._allgather(x)[root]

    def allgather_device(self, x: Any, xp: Any) -> Any:
        """As `allgather`, for an array that stays on its device; where `device_buffers` is set."""
        raise TypeError(f"{type(self).__name__} cannot hand on arrays of a device, got {_arrays.library(x)}.")

    def _count(self, sent: int, received: int) -> None:
        self.bytes_sent += sent
        self.bytes_received += received


class MPIComm(Communicator):
    """An intracommunicator of mpi4py; by default `MPI.COMM_WORLD`.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm, optional
    scan : {"gather", "exscan"}, optional
        See `Communicator`.
    device_buffers : bool
        Hand arrays that are not NumPy's to MPI as they are. For CuPy that needs a CUDA-aware MPI.

    Raises
    ------
    ImportError
        Without mpi4py.
    TypeError
        If `comm` is not an intracommunicator.
    ValueError
        If `scan` is none of the two.
    """

    def __init__(self, comm: Any = None, *, scan: str | None = None, device_buffers: bool = False) -> None:
        try:
            from mpi4py import MPI
        except ImportError as error:
            raise ImportError(f"`MPIComm` needs mpi4py ({error}): pip install linattn[mpi].") from None
        comm = MPI.COMM_WORLD if comm is None else comm
        if not isinstance(comm, MPI.Intracomm):
            raise TypeError(f"`comm` must be an intracommunicator of mpi4py, got {type(comm).__name__}.")
        if scan is not None and scan not in SCANS:
            raise ValueError(f"`scan` must be one of {', '.join(SCANS)}, got {scan!r}.")
        _checks.flag("device_buffers", device_buffers)
        self.comm, self.rank, self.size = comm, comm.Get_rank(), comm.Get_size()
        self.scan, self.device_buffers = scan, device_buffers
        self._backwards: Any = None

    def _allgather(self, x: np.ndarray) -> np.ndarray:
        rows = np.zeros((self.size, *x.shape), x.dtype)
        self.comm.Allgather(x.view(np.uint8), rows.view(np.uint8))
        return rows

    def _bcast(self, x: np.ndarray, root: int) -> np.ndarray:
        found = x.copy()
        self.comm.Bcast(found.view(np.uint8), root)
        return found

    def _exscan(self, x: np.ndarray, merge: Merge, reverse: bool) -> np.ndarray | None:
        """MPI's own, with `merge` as an operation that does not commute on one element of all bytes."""
        from mpi4py import MPI

        failures: list[BaseException] = []

        def operation(lower: Any, upper: Any, _: Any) -> None:  # upper = lower . upper
            a, b = (np.frombuffer(side, np.uint8) for side in (lower, upper))
            try:
                np.frombuffer(upper, np.uint8)[...] = merge(b, a) if reverse else merge(a, b)
            except BaseException as error:  # MPI's own code cannot carry it
                failures.append(error)

        comm, found = self._reversed() if reverse else self.comm, np.zeros_like(x)
        whole = MPI.BYTE.Create_contiguous(x.nbytes).Commit()  # one element: MPI must not cut a state
        op = MPI.Op.Create(operation, commute=False)
        try:
            comm.Exscan([x, 1, whole], [found, 1, whole], op)
        finally:
            op.Free()
            whole.Free()
        if failures:
            raise failures[0]
        first = self.size - 1 if reverse else 0
        return None if self.rank == first else found

    def _reversed(self) -> Any:
        """The same ranks from last to first, made once."""
        if self._backwards is None:
            self._backwards = self.comm.Split(0, self.size - 1 - self.rank)
        return self._backwards

    def allgather_device(self, x: Any, xp: Any) -> Any:
        """`x` (...) as (size, ...) by the buffers that the library itself shows."""
        self._count(x.nbytes, (self.size - 1) * x.nbytes)
        rows = xp.zeros((self.size, *x.shape), dtype=x.dtype, device=_arrays.device(x))
        x = xp.asarray(x, copy=True)  # contiguous, and its own
        _wait(x)
        self.comm.Allgather(x, rows)
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


def _wait(x: Any) -> None:
    """Until the device has made `x`: MPI knows nothing of streams."""
    if type(x).__module__.partition(".")[0] == "cupy":
        sys.modules["cupy"].cuda.get_current_stream().synchronize()


class LocalComm(Communicator):
    """A rank that is a thread of this process: for tests, and to try a program out. See `run_local`."""

    def __init__(
        self, rank: int, size: int, slots: list[Any], barrier: threading.Barrier, scan: str | None = None
    ) -> None:
        self.rank, self.size, self.scan = rank, size, scan
        self._slots, self._barrier = slots, barrier

    def _allgather(self, x: np.ndarray) -> np.ndarray:
        self._slots[self.rank] = x
        self._barrier.wait()
        rows = np.stack(self._slots)
        self._barrier.wait()
        return rows


def run_local(size: int, function: Callable[[LocalComm], Any], *, scan: str | None = None) -> list[Any]:
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
            results[rank] = function(LocalComm(rank, size, slots, barrier, scan))
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
