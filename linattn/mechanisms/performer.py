"""Performer (FAVOR+): softmax attention estimated with random features, and the kernels that grew out of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import Any

import numpy as np

from linattn import _arrays, _calibration, _checks, projections
from linattn._arrays import Array
from linattn.engines import kernels
from linattn.engines.features import FeatureMap
from linattn.mechanisms.attention import Call
from linattn.mechanisms.random_feature_attention import POSITIVE, Constants, RandomFeatureAttention

N_FEATURES, SEED = 256, 0
PAIRED = ("hyperbolic", "trig")  # two features for each row of the projection
SHOWN = 64  # numbers of an array that a repr prints


@dataclass(frozen=True, repr=False, eq=False)
class Performer(RandomFeatureAttention):
    """Performer attention: softmax's kernel estimated without bias by R positive random features.

        out[t] = sum_s A[t, s] v[s] / sum_s A[t, s]           A[t, s] = sum_r exp(lq[t, r] + lk[s, r])
        lq = W x,   lk = W y - |y|^2 / 2,   x = sqrt(scale) q,   y = sqrt(scale) k
        E_W[A] = R exp(x.y + |x|^2 / 2), and what depends on the query alone cancels in the ratio

    Parameters
    ----------
    n_features : int
        R, by default 256; for "hyperbolic" and "trig" twice the rows of the projection, so even.
    seed : int
        Of the projection, by default 0. It is drawn once and for all: another seed is another value.
    features : str or FeatureMap
        - "positive": the above (SM+)
        - "hyperbolic": with [W; -W], less variance for the same R
        - "oprf", "sderf": FAVOR++ and FAVOR#, fitted to data by `calibrate`
        - "trig": cosines and sines; unbiased, but denominators may vanish: a baseline, a call warns
        - "relu", "elu1", "exp", "sigmoid", "abs", "square": another kernel, f(W x) . f(W y), not softmax's; "gelu",
          "tanh", "cos" are signed, a call warns; or a `FeatureMap` of your own, elementwise
    projection : array (..., R', D), optional
        W itself, in place of `n_features` and `seed`; its leading axes broadcast with the heads.
    kind, norms : str
        How W is drawn, see `draw_projection`. norms="sqrt" has a small bias and less variance.
    scale : float, optional
        Of the logits; by default D**-0.5.
    calibration : (A, c) or (A, c, second), optional
        x -> A x, y -> A^-T (y - c), which leaves softmax as it is and shrinks the variance; A (..., D, D), c (..., D),
        either may be None. `second` is what "oprf" (a number, E|x + y|^2 / D) and "sderf" (a matrix (..., D, D)) are
        fitted to. `calibrate` makes them from data.
    eps : float, optional
        Added to each feature: 0 for those of softmax, whose mean is 1, and 1e-3 for another kernel.

    Raises
    ------
    ValueError, TypeError
        If a parameter is none of these, `seed` and `projection` come together, or the projection does not fit.

    Notes
    -----
    Shapes: q (..., N, D), k (..., M, D), v (..., M, E), one dtype -> out (..., N, E).
    Will it work? `instruments.performer_report` tells before you train: the relative variance of an estimated weight is
    (e^phi - 1) / R with phi = E|x + y|^2. Where phi > ln(1 + R) the mean of v is a better estimate.
    Logarithms are made in float64. No stabiliser, no maximum over keys: a prefix never depends on what follows.
    Held constant in the VJP: the projection and the calibration; for the projection's cotangent see `projection_vjp`.
    Cost: O(N R (D + E)) time, state R (E + 2) numbers; backward keeps q, k, v.
    Source: Choromanski et al., "Rethinking Attention with Performers", ICLR 2021, arXiv:2009.14794; "oprf":
    Likhosherstov et al., NeurIPS 2022, arXiv:2205.15317; "sderf": the same, arXiv:2302.00787. Calibration is ours.

    Examples
    --------
    >>> import numpy as np
    >>> import linattn as la
    >>> q, k, v = np.random.default_rng(0).normal(size=(3, 2, 5, 4))
    >>> la.Performer(64, seed=1)(q, k, v, causal=True).shape
    (2, 5, 4)
    >>> la.Performer.accurate(q, k, n_features=64)(q, k, v).shape
    (2, 5, 4)
    """

    n_features: int | None = None
    _: KW_ONLY
    seed: int | None = None
    features: str | FeatureMap = "positive"
    projection: Any = None
    kind: str = "orthogonal"
    norms: str = "chi"
    scale: float | None = None
    calibration: Any = None
    eps: float | None = None

    def __post_init__(self) -> None:
        kernels.check(self.features, (*POSITIVE, "trig"))
        projections.check_kind(self.kind, self.norms)
        if self.projection is None:
            for name, default in (("n_features", N_FEATURES), ("seed", SEED)):
                self._set(name, default if getattr(self, name) is None else getattr(self, name))
            _checks.natural("n_features", self.n_features)
            _checks.natural("seed", self.seed, least=0)
            if self._rows * self._per_row != self.n_features:
                raise ValueError(f"`n_features` must be even for features={self.features!r}, got {self.n_features}.")
        else:
            if self.seed is not None:
                raise ValueError(f"`projection` and `seed` exclude each other, got seed={self.seed!r}.")
            w = _checks.real_array("projection", self.projection, 2)
            n_features = w.shape[-2] * self._per_row
            if self.n_features not in (None, n_features):
                raise ValueError(
                    f"`n_features` must be left out with `projection`, or {n_features}, got {self.n_features}."
                )
            self._set("projection", w)
            self._set("n_features", n_features)
        if self.scale is not None:
            _checks.positive_real("scale", self.scale)
        if self.eps is not None:
            if self.features == "trig":
                raise ValueError(f'`eps` must be left out for features="trig", got {self.eps!r}.')
            _checks.not_negative("eps", self.eps)
        if self.calibration is not None:
            if not self._of_softmax:
                raise ValueError(f"`calibration` leaves softmax as it is, not features={self.features!r}.")
            self._set("calibration", _calibration.checked(self.calibration, self.features))
        self._set("_kept", {})

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def _per_row(self) -> int:
        return 2 if self.features in PAIRED else 1

    @property
    def _rows(self) -> int:
        return (self.n_features or 0) // self._per_row

    @property
    def _of_softmax(self) -> bool:
        return self.features in (*POSITIVE, "trig")

    # -- a value ------------------------------------------------------------------------------------------------------

    def __eq__(self, other: object) -> bool:
        return self is other or (type(self) is type(other) and self._key() == other._key())

    def __hash__(self) -> int:
        if "hash" not in self._kept:
            self._kept["hash"] = hash(self._key())
        return self._kept["hash"]

    def _key(self) -> tuple[Any, ...]:
        return tuple(_hashable(getattr(self, x.name)) for x in fields(self))

    def __getstate__(self) -> dict[str, Any]:
        return {x.name: getattr(self, x.name) for x in fields(self)}

    def __setstate__(self, parameters: dict[str, Any]) -> None:
        for name, value in parameters.items():
            self._set(name, _frozen(value))
        self._set("_kept", {})

    def __repr__(self) -> str:
        given = []
        for x in fields(self):
            value = getattr(self, x.name)
            if value is None or (isinstance(value, str) and value == x.default):
                continue
            if x.name == "n_features":
                if self.projection is None:
                    given.append(repr(value))
            else:
                given.append(f"{x.name}={_shown(value)}")
        return f"{type(self).__name__}({', '.join(given)})"

    def matrix(self, dim: int) -> np.ndarray:
        """The projection W (..., R', dim) of this value, float64, read-only: drawn or given.

        Raises
        ------
        ValueError
            If the given one has another number of columns.
        """
        if self.projection is None:
            return projections.drawn(self._rows, dim, self.seed or 0, self.kind, self.norms)
        if self.projection.shape[-1] != dim:
            raise ValueError(
                f"`projection` must have as many columns as q and k have channels, D = {dim}, "
                f"got shape {self.projection.shape}."
            )
        return self.projection

    # -- fitting to data ----------------------------------------------------------------------------------------------

    def calibrate(self, q: Array, k: Array, *, rule: str = "scale", key_mask: Array | None = None) -> Performer:
        """This value with the change of variables that suits q and k, for good: never anything of a call's own data.

        Parameters
        ----------
        q, k : array
            (..., N, D), (..., M, D): representative data. Every head gets its own constants; of two or more leading
            axes the first is the batch.
        rule : {"scale", "full", "centre", "none"}
            "centre" moves the keys so that the means of x and y oppose each other; "scale" also shares the spread of
            each channel evenly between them, "full" that of every direction. "none" fits only what "oprf" and "sderf"
            need.
        key_mask : array of bool, optional
            (..., M), True = visible.

        Returns
        -------
        Performer

        Raises
        ------
        ValueError
            If q or k has no variance or no visible token, or the features do not estimate softmax.
        """
        _checks.queries_keys(q, k)
        lead = _checks.leading(q=tuple(q.shape[:-2]), k=tuple(k.shape[:-2]))
        _checks.choice("rule", rule, _calibration.RULES)
        if key_mask is not None:
            _checks.key_mask(key_mask, k, lead)
        for name, x in (("q", q), ("k", k)):
            _checks.readable(name, x)
        if not self._of_softmax:
            raise ValueError(f"`{self!r}` cannot be calibrated: its kernel is not softmax's.")
        with _arrays.quiet(q):
            clouds = _calibration.clouds(_arrays.plain(q), _arrays.plain(k), self._scale(q), key_mask)
        for name, spread in (("q", clouds.sx), ("k", clouds.sy)):
            if not (spread.size and np.all(np.trace(spread, axis1=-2, axis2=-1) > 0)):
                raise ValueError(f"`{name}` must vary over its visible tokens in every head to be calibrated to.")
        found = _calibration.fitted(clouds, rule)
        calibration: Any = (found.a, found.c)
        if self.features == "oprf":
            calibration += (np.asarray(found.phi) / max(q.shape[-1], 1),)
        elif self.features == "sderf":
            calibration += (found.second,)
        return replace(self, **self._draw(), calibration=None if all(x is None for x in calibration) else calibration)

    @classmethod
    def accurate(
        cls, q: Array, k: Array, n_features: int = N_FEATURES, seed: int = SEED, *, key_mask: Array | None = None
    ) -> Performer:
        """The most accurate value we know for data like q and k: hyperbolic, equal norms, calibrated by "scale"."""
        attend = cls(n_features, seed=seed, features="hyperbolic", norms="sqrt")
        return attend.calibrate(q, k, rule="scale", key_mask=key_mask)

    def _draw(self) -> dict[str, Any]:
        """What `replace` must leave out."""
        return {} if self.projection is None else {"n_features": None}

    # -- calls --------------------------------------------------------------------------------------------------------

    def _checked(
        self, q: Array, k: Array, v: Array, causal: bool, key_mask: Any, positions: Any, backend: Any, xp: Any
    ) -> tuple[Call, tuple[int, ...]]:
        call, lead = super()._checked(q, k, v, causal, key_mask, positions, backend, xp)
        own = {"projection": () if self.projection is None else self.matrix(q.shape[-1]).shape[:-2]}
        inner_axes = (2, 1, 0 if self.features == "oprf" else 2)
        for name, x, inner in zip(("A", "c", "second"), self.calibration or (), inner_axes, strict=False):
            if x is None:
                continue
            if inner and x.shape[-1] != q.shape[-1]:
                raise ValueError(
                    f"`calibration: {name}` must fit q and k with D = {q.shape[-1]} channels, got shape {x.shape}."
                )
            own[f"calibration: {name}"] = x.shape[: x.ndim - inner]
        return call, _checks.own_axes(lead, **own)

    def _refuse(self, call: Call, streaming: bool) -> None:
        if self.features in _calibration.FITTED and self.calibration is None:
            raise ValueError(f"`{self!r}` has features fitted to data: use the value that `.calibrate(q, k)` gives.")

    def _prepared(self, dim: int) -> Constants:
        """The constants of the features, kept: drawing and turning them is no work for every token."""
        if dim in self._kept:
            return self._kept[dim]
        w, b = self.matrix(dim), None
        a, c, second = (*(self.calibration or ()), None, None, None)[:3]
        if self.features == "hyperbolic":
            w = np.concatenate([w, -w], axis=-2)
        elif self.features in _calibration.FITTED:
            # W' = W diag(sqrt(1 - 4 a)) Q^T,  b_r = sum_l a_l w_rl^2
            best, basis = _calibration.sharpening(second, self.features, dim)
            b = np.sum(best * w * w, axis=-1)[..., None, :]
            w = (w * np.sqrt(1 - 4 * best)) @ np.swapaxes(basis, -1, -2)
        a_t, inverse = (None, None) if a is None else _calibration.from_the_right(a)
        found = Constants(w, b, a_t, inverse, None if c is None else c[..., None, :])
        self._kept[dim] = found
        return found

    def projection_vjp(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        causal: bool = False,
        key_mask: Array | None = None,
        cu_seqlens: Any = None,
        backend: str | None = None,
        out: Array | None = None,
    ) -> tuple[Array, Callable[[Array], tuple[Array, Array, Array, Array]]]:
        """`vjp` with the cotangent of the projection: `backward(d_out) -> d_q, d_k, d_v, d_projection`.

        d_projection has the shape of `matrix(D)`, in float64 where the library has it. `vjp` leaves it out, for it
        costs two products more. For learned norms, W = diag(n) U: d_n_r = sum_l d_projection_rl U_rl.
        """
        learning = _Learning(**{x.name: getattr(self, x.name) for x in fields(self)})
        y, backward_of_vjp = learning._run(q, k, v, causal, key_mask, cu_seqlens, None, backend, out)
        xp = _arrays.namespace(q)

        def backward(d_out: Array) -> tuple[Array, Array, Array, Array]:
            learning._found.clear()
            d_q, d_k, d_v = backward_of_vjp(d_out)
            total = [sum(parts[1:], start=parts[0]) for parts in zip(*learning._found, strict=True)]
            with _arrays.quiet(q):
                return d_q, d_k, d_v, self._to_projection(total, q, xp)

        return y, backward

    def _to_projection(self, d_constants: list[Array], like: Array, xp: Any) -> Array:
        """From W' and b of `_prepared` back to W."""
        w = self.matrix(like.shape[-1])
        if not d_constants:  # not a single token
            return xp.zeros_like(_arrays.constant(w, like, xp))
        d_w = d_constants[0]
        if self.features == "hyperbolic":
            return d_w[..., : w.shape[-2], :] - d_w[..., w.shape[-2] :, :]
        if self.features not in _calibration.FITTED:
            return d_w
        best, basis = _calibration.sharpening(self.calibration[2], self.features, w.shape[-1])
        a, basis, wide_w = (_arrays.constant(x, like, xp) for x in (best, basis, w))
        d_w = xp.matmul(d_w, basis) * xp.sqrt(1 - 4 * a) + 2 * d_constants[1][..., 0, :, None] * a * wide_w
        return _arrays.unbroadcast(d_w, tuple(w.shape), xp)


class _Learning(Performer):
    """A Performer whose backward goes on to its projection and lays the cotangents down in `_found`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("_found", [])

    def _wants_projection(self) -> bool:
        return True

    def _backward(
        self, d_out: Array, d_arrays: Any, saved: Any, call: Call, out: Any
    ) -> tuple[Array, Array, Array, Any]:
        d_q, d_k, d_v, d_before, d_constants = self._backward_all(d_out, d_arrays, saved, call, out)
        self._found.append(d_constants)
        return d_q, d_k, d_v, d_before


def _frozen(value: Any) -> Any:
    """Arrays that nobody writes to."""
    if isinstance(value, tuple):
        return tuple(_frozen(x) for x in value)
    if isinstance(value, np.ndarray):
        value.flags.writeable = False
    return value


def _hashable(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_hashable(x) for x in value)
    return (value.shape, value.tobytes()) if isinstance(value, np.ndarray) else value


def _shown(value: Any) -> str:
    """Code for a small array, a fingerprint for a large one."""
    if isinstance(value, tuple):
        return f"({', '.join(_shown(x) for x in value)})"
    if not isinstance(value, np.ndarray):
        return repr(value)
    if value.size <= SHOWN:
        return repr(value.tolist())
    import hashlib  # this long a path is rare, and `import linattn` is to be short

    return f"<{value.shape} {hashlib.sha256(value.tobytes()).hexdigest()[:8]}>"


def performer(
    q: Array,
    k: Array,
    v: Array,
    *,
    n_features: int | None = None,
    seed: int | None = None,
    features: str | FeatureMap = "positive",
    projection: Any = None,
    kind: str = "orthogonal",
    norms: str = "chi",
    scale: float | None = None,
    calibration: Any = None,
    eps: float | None = None,
    causal: bool = False,
    key_mask: Array | None = None,
    cu_seqlens: Any = None,
    backend: str | None = None,
    out: Array | None = None,
) -> Array:
    """`Performer(n_features, seed=..., ...)(q, k, v, ...)` in one call; see `Performer` and `Performer.__call__`.

    Examples
    --------
    >>> import numpy as np
    >>> import linattn as la
    >>> q, k, v = np.random.default_rng(0).normal(size=(3, 2, 5, 4))
    >>> la.performer(q, k, v, n_features=32, causal=True).shape
    (2, 5, 4)
    """
    attend = Performer(
        n_features, seed=seed, features=features, projection=projection, kind=kind, norms=norms, scale=scale,
        calibration=calibration, eps=eps,
    )  # fmt: skip
    return attend(q, k, v, causal=causal, key_mask=key_mask, cu_seqlens=cu_seqlens, backend=backend, out=out)
