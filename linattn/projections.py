"""Performer's random matrices: rows whose directions cover the sphere, from a seed and nothing else.

A matrix is made block by block, each block from a generator of its own, so that a larger matrix extends a smaller
one. All in float64 on the host; nothing here depends on data, and nothing is ever drawn again behind the caller.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from linattn import _checks

__all__ = ["KINDS", "NORMS", "draw_projection"]

Floats = NDArray[np.float64]

KINDS = ("orthogonal", "iid", "simplex", "hadamard")
NORMS = ("chi", "sqrt")
VERSION = 1  # enters every seed: counted up when a matrix of the same arguments would change
BLOCKS_AT_ONCE = 1024
HADAMARD_ROUNDS = 3
CACHED = 32  # matrices kept for values that are called again and again


def draw_projection(n_features: int, dim: int, *, seed: int, kind: str = "orthogonal", norms: str = "chi") -> Floats:
    """The random matrix W (n_features, dim) of Performer's features, float64.

    Parameters
    ----------
    n_features, dim : int
        Rows and columns.
    seed : int
        Not negative. The same arguments give the same matrix to 1e-13 everywhere, and bit for bit with one NumPy and
        LAPACK: store what must be reproduced exactly. The first rows do not depend on `n_features`.
    kind : {"orthogonal", "iid", "simplex", "hadamard"}
        Within each block of `dim` rows:

        - "orthogonal": orthogonal rows, their directions uniform on the orthogonal group
        - "iid": independent Gaussian rows
        - "simplex": the corners of a regular simplex in a uniform position, cosine -1 / (dim - 1) between any two
        - "hadamard": H D3 H D2 H D1 with random signs D: blocks and directions of the next power of two, cut to `dim`
          columns; only near to uniform, so only with norms="sqrt"
    norms : {"chi", "sqrt"}
        "chi": lengths drawn like those of Gaussian vectors, independent of the directions, so that every row is
        N(0, I); with "sqrt" all have the length sqrt(dim).

    Returns
    -------
    array
        (n_features, dim), float64, yours to change.

    Raises
    ------
    TypeError, ValueError
        If an argument is none of these.

    Notes
    -----
    Orthogonal: Q of Q R = G, G Gaussian, with the signs of R's diagonal moved into the columns of Q. Householder QR
    leaves the signs to the implementation, and its bare Q is not uniform: the mean of W[0, 0] at dim = 16 is -0.59 of
    its spread instead of 0.
    Sources: Choromanski et al., arXiv:2009.14794, section 2.4; Reid et al., ICML 2023, arXiv:2301.13856 (simplex).

    Examples
    --------
    >>> import numpy as np
    >>> import linattn as la
    >>> w = la.draw_projection(6, 4, seed=0)
    >>> w.shape, bool(np.allclose(w[:4] @ w[:4].T, np.diag(np.sum(w[:4] ** 2, axis=1))))
    ((6, 4), True)
    """
    _checks.natural("n_features", n_features)
    _checks.natural("dim", dim)
    _checks.natural("seed", seed, least=0)
    check_kind(kind, norms)
    return drawn(int(n_features), int(dim), int(seed), kind, norms).copy()


def check_kind(kind: Any, norms: Any) -> None:
    """`kind` and `norms`, each and together."""
    _checks.choice("kind", kind, KINDS)
    _checks.choice("norms", norms, NORMS)
    if kind == "hadamard" and norms != "sqrt":
        raise ValueError(f'`kind="hadamard"` has rows of one length only, it needs norms="sqrt", got {norms!r}.')


@lru_cache(maxsize=CACHED)
def drawn(n_features: int, dim: int, seed: int, kind: str, norms: str) -> Floats:
    """`draw_projection` without its checks: read-only, kept for the next call; dim may be 0."""
    w = np.zeros((n_features, dim))
    width = block_width(kind, dim)
    make = {"orthogonal": _orthogonal, "iid": _iid, "simplex": _simplex, "hadamard": _hadamard}[kind]
    per_group = BLOCKS_AT_ONCE * width
    for first in range(0, n_features if dim else 0, per_group):
        last = min(first + per_group, n_features)
        blocks = range(first // width, -(-last // width))
        rows = make([np.random.default_rng([VERSION, seed, block]) for block in blocks], width, norms)
        w[first:last] = rows.reshape(-1, width)[: last - first, :dim]
    w.flags.writeable = False
    return w


def block_width(kind: str, dim: int) -> int:
    """Rows of a block, and columns before the cut to `dim`."""
    return 1 << max(dim - 1, 0).bit_length() if kind == "hadamard" else max(dim, 1)


# -- blocks (n, width, width) ---------------------------------------------------------------------------------------


def _iid(generators: list[np.random.Generator], dim: int, norms: str) -> Floats:
    g = _gaussians(generators, dim)
    return g if norms == "chi" else g * (np.sqrt(dim) / _lengths(g))


def _orthogonal(generators: list[np.random.Generator], dim: int, norms: str) -> Floats:
    rows = np.swapaxes(_uniform_orthogonal(generators, dim), -1, -2)
    return rows * _norms(generators, dim, norms)


def _simplex(generators: list[np.random.Generator], dim: int, norms: str) -> Floats:
    corners = np.eye(dim)
    if dim > 1:
        corners = corners - 1 / dim  # row l: e_l - 1/dim, all ones over dim; |.|^2 = 1 - 1/dim
        corners = corners / np.sqrt(1 - 1 / dim)
    rows = corners @ np.swapaxes(_uniform_orthogonal(generators, dim), -1, -2)
    return rows * _norms(generators, dim, norms)


def _hadamard(generators: list[np.random.Generator], width: int, norms: str) -> Floats:
    h = np.ones((1, 1))
    while len(h) < width:
        h = np.block([[h, h], [h, -h]])
    h = h / np.sqrt(width)
    rows = np.eye(width)
    for signs in np.moveaxis(_signs(generators, width), 1, 0):  # D1, D2, D3
        rows = h @ (signs[:, :, None] * rows)
    return rows * np.sqrt(width)


def _uniform_orthogonal(generators: list[np.random.Generator], dim: int) -> Floats:
    """Q (n, dim, dim) of Q R = G with a positive diagonal of R: Gram-Schmidt of the columns of G, which is unique."""
    q, r = np.linalg.qr(_gaussians(generators, dim))
    signs = np.where(np.diagonal(r, axis1=-2, axis2=-1) < 0, -1.0, 1.0)
    return q * signs[:, None, :]


def _norms(generators: list[np.random.Generator], dim: int, norms: str) -> Floats:
    """Lengths of the rows, (n, dim, 1), from Gaussians of their own: independent of the directions."""
    return _lengths(_gaussians(generators, dim)) if norms == "chi" else np.full((1, dim, 1), np.sqrt(dim))


def _gaussians(generators: list[np.random.Generator], dim: int) -> Floats:
    return np.stack([rng.standard_normal((dim, dim)) for rng in generators])


def _signs(generators: list[np.random.Generator], width: int) -> Floats:
    draws = [rng.integers(0, 2, size=(HADAMARD_ROUNDS, width)) for rng in generators]
    return np.where(np.stack(draws) == 0, -1.0, 1.0)


def _lengths(rows: Floats) -> Floats:
    return np.asarray(np.sqrt(np.sum(rows * rows, axis=-1, keepdims=True)), dtype=np.float64)
