"""Peak memory of one call, in a process of its own: `python -m asv_bench.peers.memory COMPUTES NAME TOKENS JOB`.

The peak of the resident set is set back before the call (Linux) and read after it; what was resident before is taken
off. The first call, which compiles, is a short one. Prints bytes.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

HEADS, CHANNELS = 8, 64
JOBS = ("forward", "both")


def resident(field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def peak_of_call(computes: str, name: str, n_tokens: int, job: str) -> int:
    """Bytes beyond the arguments, results included."""
    from .contenders import contenders
    from .timing import draw

    def jobs(n):
        (one,) = [c for c in contenders(n_tokens, computes) if c.name == name]
        return one.make(*draw(HEADS, n, CHANNELS))

    if name.startswith("linattn"):  # any length has the same kernels; the others compile for a length
        jobs(128)[JOBS.index(job)]()
    run = jobs(n_tokens)[JOBS.index(job)]
    if not name.startswith("linattn"):
        run()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident
    before = resident("VmRSS")
    result = run()
    peak = resident("VmHWM")
    del result
    return max(0, peak - before)


def measured(computes: str, name: str, n_tokens: int, job: str) -> int | None:
    """The same in a process of its own; None where it cannot be measured."""
    program = [sys.executable, "-m", "asv_bench.peers.memory", computes, name, str(n_tokens), job]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300)
    return int(done.stdout.split()[-1]) if done.returncode == 0 else None


if __name__ == "__main__":
    print(peak_of_call(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]))
