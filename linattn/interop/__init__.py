"""Other frameworks: `linattn.interop.torch` and `linattn.interop.jax`, each loaded by those who ask for it."""

from __future__ import annotations
