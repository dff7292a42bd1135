"""A pool of our own for the serial kernels of this room, and how many threads they may use.

`LINATTN_NUM_THREADS` or, where it is not set, the cores this process may run on. The pool starts at the first call
that is worth it, never at import; a forked child forgets it and builds its own. Any number of Python threads may call
at once. Which thread does which share of a call changes nothing but the time.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar, Token
from queue import SimpleQueue
from typing import Any

__all__ = ["number", "run", "threads"]

SWITCH = "LINATTN_NUM_THREADS"

_chosen: ContextVar[int | None] = ContextVar("linattn_threads", default=None)


class threads:
    """Let the compiled CPU kernels use at most `n` threads inside a `with` block.

    Parameters
    ----------
    n : int
        How many, at least 1. It holds for the thread or task that enters the block.

    Raises
    ------
    TypeError
        If `n` is not an integer.
    ValueError
        If `n` is less than 1.

    Notes
    -----
    Results have the same bits for every number of threads. The default is the environment variable
    `LINATTN_NUM_THREADS` or, without it, the number of cores this process may run on.

    Examples
    --------
    >>> import linattn as la
    >>> with la.threads(2):
    ...     pass
    """

    def __init__(self, n: int) -> None:
        if isinstance(n, bool) or not isinstance(n, int):
            raise TypeError(f"`n` must be an integer, got {n!r}.")
        if n < 1:
            raise ValueError(f"`n` must be at least 1, got {n}.")
        self.n = n
        self._tokens: list[Token[int | None]] = []

    def __enter__(self) -> threads:
        self._tokens.append(_chosen.set(self.n))
        return self

    def __exit__(self, *exc: object) -> None:
        _chosen.reset(self._tokens.pop())

    def __repr__(self) -> str:
        return f"threads({self.n})"


def number() -> int:
    """How many threads a call may use now."""
    chosen = _chosen.get()
    if chosen is not None:
        return chosen
    value = os.environ.get(SWITCH)
    if value is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not value.isascii() or not value.isdigit() or int(value) < 1:
        raise ValueError(f"`{SWITCH}` must be an integer of at least 1, got {value!r}.")
    return int(value)


class Pool:
    """Threads that wait for work. They are daemons: an interpreter that ends does not wait for them."""

    def __init__(self) -> None:
        self.work: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self.lock = threading.Lock()
        self.size = 0

    def grow(self, size: int) -> None:
        with self.lock:
            while self.size < size:
                self.size += 1
                threading.Thread(target=self.serve, name=f"linattn-{self.size}", daemon=True).start()

    def serve(self) -> None:
        while True:
            self.work.get()()


_pool: Pool | None = None


def _forget() -> None:
    """In a forked child: its parent's threads do not exist here."""
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def run(share: Callable[[Any], None], shares: list[Any], n_threads: int) -> None:
    """share(x) for every x of `shares`, by this thread and up to n_threads - 1 of the pool, each taking the next one.

    The first exception of any share is raised here when all have ended.
    """
    global _pool
    left = deque(shares)
    helpers = min(n_threads, len(shares)) - 1
    if helpers < 1:
        for x in shares:
            share(x)
        return
    if _pool is None:
        _pool = Pool()
    pool = _pool
    pool.grow(n_threads - 1)
    ended: SimpleQueue[BaseException | None] = SimpleQueue()

    def take() -> None:
        problem: BaseException | None = None
        try:
            while left:
                try:
                    x = left.popleft()
                except IndexError:  # another was quicker
                    break
                share(x)
        except BaseException as error:
            left.clear()
            problem = error
        ended.put(problem)

    for _ in range(helpers):
        pool.work.put(take)
    take()
    problems = [ended.get() for _ in range(helpers + 1)]
    for problem in problems:
        if problem is not None:
            raise problem
