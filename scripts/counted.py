"""What `compare_counts.py` runs under valgrind: calls of the library, whose instructions are counted one job at a time.

    python scripts/counted.py              all jobs, two numbers of calls each
    python scripts/counted.py --warm       compile what they need, count nothing

valgrind is told from here what to count, by the sequence of instructions that it takes for a message (valgrind.h) and
that a processor takes for nothing. What is done before, imports, kernels from their cache, a few calls, does not count.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

import linattn as la

FEW, MANY = 1, 2  # calls: their difference has no beginning and no end in it
WARM = 3  # calls before: whatever is made at a first one is made
HEADS, TOKENS, CHANNELS = 1, 128, 64

# mov rax, rdi; xor edx, edx; rol rdi, 3; rol rdi, 13; rol rdi, 61; rol rdi, 51; xchg rbx, rbx; mov rax, rdx; ret
MESSAGE = bytes.fromhex("4889f8 31d2 48c1c703 48c1c70d 48c1c73d 48c1c733 4887db 4889d0 c3")
UNDER_VALGRIND = 0x1001
ZERO, DUMP_AS, START, STOP = (0x43540001 + i for i in (0, 2, 3, 4))  # "CT" and the numbers of callgrind.h


class Counter:
    """valgrind's, by messages."""

    def __init__(self) -> None:
        self.page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        self.page.write(MESSAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.page))
        self.function = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_void_p)(address)

    def send(self, number: int, text: bytes = b"") -> int:
        place = ctypes.create_string_buffer(text)
        words = (ctypes.c_uint64 * 6)(number, ctypes.addressof(place))
        return int(self.function(ctypes.addressof(words)))

    def count(self, name: str, job: Callable[[], Any], n: int) -> None:
        """The instructions of n calls, under `name`."""
        self.send(START)
        self.send(ZERO)
        for _ in range(n):
            job()
        self.send(DUMP_AS, name.encode())
        self.send(STOP)


def jobs() -> dict[str, Callable[[], Any]]:
    """Few, and of every engine: whole sequences both ways, a decoded token, the room without a compiler."""
    q, k, v, g = np.random.default_rng(0).normal(size=(4, HEADS, TOKENS, CHANNELS)).astype("float32")
    found: dict[str, Callable[[], Any]] = {}
    for attend, backend in (
        (la.Linear(), "numba"),
        (la.Performer(64), "numba"),
        (la.Softmax(), "numba"),
        (la.Combiner(span=16), "numba"),
        (la.Linear(), "reference"),
    ):

        def forward(attend: Any = attend, backend: str = backend) -> Any:
            return attend(q, k, v, causal=True, backend=backend)

        backward = attend.vjp(q, k, v, causal=True, backend=backend)[1]
        found[f"{attend!r}, {backend}: forward"] = forward
        found[f"{attend!r}, {backend}: backward"] = lambda backward=backward: backward(g)
    attend = la.Linear()
    state = attend.init_state(k, v)
    one = [x[:, :1] for x in (q, k, v)]
    found["Linear(), numba: one token"] = lambda: attend.step(*one, state, backend="numba")
    return found


def main() -> int:
    todo = jobs()
    for job in todo.values():
        for _ in range(WARM):
            job()
    if sys.argv[1:] == ["--warm"]:
        return 0
    counter = Counter()
    if not counter.send(UNDER_VALGRIND):
        print("This counts under valgrind alone: see compare_counts.py.", file=sys.stderr)
        return 2
    gc.collect()
    gc.disable()
    for name, job in todo.items():
        for n in (FEW, MANY):
            counter.count(f"{n} {name}", job, n)
    return 0


if __name__ == "__main__":
    sys.exit(main())
