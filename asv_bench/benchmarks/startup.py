"""What a first call costs: loading the package, compiling a kernel."""

from __future__ import annotations

import os
import subprocess
import sys

FIRST_CALL = """
import time
import numpy as np
import linattn as la

q, k, v = np.ones((3, 1, 8, 4), "float32")
start = time.perf_counter()
la.Linear("elu1").vjp(q, k, v, causal=True)[1](q)
print(time.perf_counter() - start)
"""


class Startup:
    """A fresh process."""

    timeout = 300

    def timeraw_import(self):
        return "import linattn"

    def timeraw_import_numpy(self):
        """What of the import is NumPy's own."""
        return "import numpy"

    def track_compile_time(self):
        """Forward and backward of the first call, nothing cached."""
        environment = {**os.environ, "LINATTN_NUMBA_CACHE": "0"}
        run = subprocess.run(
            [sys.executable, "-c", FIRST_CALL], env=environment, capture_output=True, text=True, check=True
        )
        return float(run.stdout)

    track_compile_time.unit = "seconds"
