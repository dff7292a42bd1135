"""Work shared out over processes: what a case gives does not depend on who computed it, nor on how many there are.

Processes are forked, so that they have the parent's modules and the processor's flags (somebody may flush subnormals).
Where there is no fork, and with one process, the work is done here.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn

__all__ = ["cores", "shared_out"]

Job = Callable[[int], Any]
Result = tuple[int, Any]


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def shared_out(job: Job, groups: Sequence[Sequence[int]], processes: int) -> Iterator[Result]:
    """`i, job(i)` for each i, in the order in which they are done.

    A group is done by one process from its first to its last i; the next group goes to whoever is free.

    Raises
    ------
    RuntimeError
        If a process ends before its work is done; whatever `job` raises comes as it is.
    """
    processes = min(processes, len(groups))
    if processes < 2 or "fork" not in multiprocessing.get_all_start_methods():
        yield from ((i, job(i)) for group in groups for i in group)
        return
    context = multiprocessing.get_context("fork")
    taken, left = context.Value("i", 0), sum(map(len, groups))
    running: list[Any] = []
    pipes: list[Any] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a child uses no thread of its parent's
        for _ in range(processes):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=serve, args=(job, groups, taken, theirs), daemon=True)
            process.start()
            theirs.close()  # so that its end is heard here when the child is gone
            running.append(process)
            pipes.append(ours)
    try:
        while left:
            ready: list[Any] = wait(pipes)
            for pipe in ready:
                try:
                    i, result = pipe.recv()
                except EOFError:
                    pipes.remove(pipe)
                    if not pipes:
                        raise RuntimeError(f"The processes ended with {left} results missing.") from None
                    continue
                if isinstance(result, BaseException):
                    raise result
                left -= 1
                yield i, result
    finally:
        for process in running:
            process.terminate()
            process.join()


def serve(job: Job, groups: Sequence[Sequence[int]], taken: Any, pipe: Connection) -> NoReturn:
    """In a child: group after group until none is left. Never comes back."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches the parent as well, which says what there is to say
    status = 0
    try:
        while True:
            with taken.get_lock():
                mine, taken.value = taken.value, taken.value + 1
            if mine >= len(groups):
                break
            for i in groups[mine]:
                pipe.send((i, job(i)))
    except BaseException as error:
        pipe.send((-1, error))
        status = 1
    finally:
        pipe.close()
        os._exit(status)
