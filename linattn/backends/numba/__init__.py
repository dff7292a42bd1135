"""Compiled CPU kernels, for NumPy arrays.

Requirements: numba, imported when this room is first used. Kernels are serial, release the interpreter lock,
allocate nothing, and work on one head of k and v at a time in a fixed order, so that a head's bits depend neither
on its neighbours nor on threads. All compiler flags: _jit.py. All vector code: _vector.py. Register tiles: _tiles.py.
"""

from __future__ import annotations
