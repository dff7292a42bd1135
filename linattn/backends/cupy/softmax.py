"""The softmax engine on CuPy arrays: the reference room's array operations, for no kernel would pay yet."""

from __future__ import annotations

from linattn.backends.reference.softmax import backward, forward

__all__ = ["backward", "forward"]
