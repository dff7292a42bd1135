"""Raw CUDA kernels, for CuPy arrays. Not yet run on a GPU: compiled for three architectures and simulated on the host.

Requirements: CuPy 14.2 or later with NVRTC, a driver, a card of compute capability 8.0 or later; imported when a kernel
is first launched. `specs` lists the kernels, `plan` cuts a product into launches (both without CUDA), `launch` alone
imports CuPy. What has no kernel runs in the reference room on the same arrays.
"""

from __future__ import annotations


def why_not() -> str | None:
    """Why this room cannot run here, or None."""
    from . import launch

    return launch.why_not()
