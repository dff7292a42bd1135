"""What a mechanism does with given queries, keys and values: all that applies; and whether Performer can work."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from linattn import _arrays, _calibration, _checks, _moments
from linattn._arrays import Array
from linattn.backends import REFERENCE
from linattn.engines import softmax
from linattn.instruments import lognormal, pair, reading, spectrum
from linattn.instruments import weights as of_weights
from linattn.instruments.reading import Floats


class PerformerReport(NamedTuple):
    """Whether random features can estimate softmax here; a number for each head."""

    phi: Any  # E|x + y|^2 as the value has it, its calibration included
    phi_none: Any  # without calibration, and after each rule
    phi_centre: Any
    phi_scale: Any
    phi_full: Any
    limit: float  # ln(1 + R): beyond, the mean of v is a better estimate
    relative_variance: Any  # of a weight's estimate at |x + y|^2 = phi, for independent rows
    skill_error: Any  # |out - softmax| / |softmax - mean(v)|: below 1, better than the mean of v


def performer_report(mech: Any, q: Array, k: Array, v: Array, *, key_mask: Array | None = None) -> PerformerReport:
    """Tells before training whether a `Performer` can work on such data.

    Parameters
    ----------
    mech : Performer
        With features that estimate softmax.
    q, k, v : arrays
        Representative data.
    key_mask : bool array (..., M), optional
        True = visible.

    Warns
    -----
    UserWarning
        If phi > ln(1 + R) in some head: the relative variance (e^phi - 1) / R of an estimated weight is above 1.

    Examples
    --------
    >>> import numpy as np
    >>> import linattn as la
    >>> q, k, v = 0.2 * np.random.default_rng(0).normal(size=(3, 100, 16))
    >>> report = la.instruments.performer_report(la.Performer(256), q, k, v)
    >>> bool(report.phi < 1 and report.skill_error < 1)
    True
    """
    if not hasattr(mech, "calibrate") or not hasattr(mech, "n_features"):
        raise TypeError(f"`mech` must be a Performer, got {mech!r}.")
    if mech.features not in _VARIANCES:
        raise ValueError(f"`mech` must estimate softmax, got features={mech.features!r}.")
    _checks.queries_keys_values(q, k, v)
    scale = float(mech.scale) if mech.scale is not None else max(q.shape[-1], 1) ** -0.5
    clouds = _calibration.clouds(q, k, scale, key_mask)
    none, centre, by_scale, full = (
        _calibration.fitted(clouds, rule).phi for rule in ("none", "centre", "scale", "full")
    )
    a, c, *_ = mech.calibration or (None, None)
    phi = _calibration.with_second(clouds, a, c).phi
    limit = math.log1p(mech.n_features)
    above = int(np.sum(phi > limit))
    if above:
        warnings.warn(
            f"phi = E|x + y|^2 is above ln(1 + R) = {limit:.3g} in {above} of {np.size(phi)} heads (up to "
            f"{np.max(phi):.3g}): there the mean of v is better than any unbiased estimate; see `Performer.accurate`.",
            UserWarning,
            stacklevel=2,
        )
    variance = _VARIANCES[mech.features](np.asarray(phi)) / mech.n_features
    skill = _skill_error(mech, q, k, v, scale, key_mask)
    return PerformerReport(phi, none, centre, by_scale, full, limit, variance[()], skill)


_VARIANCES: dict[Any, Callable[[Floats], Any]] = {
    "positive": np.expm1,
    "hyperbolic": lambda phi: np.expm1(phi) * -np.expm1(-phi),
    "oprf": np.expm1,  # an upper bound for these two
    "sderf": np.expm1,
}
"""R times the relative variance at |x + y|^2 = phi."""


def _skill_error(mech: Any, q: Array, k: Array, v: Array, scale: float, key_mask: Array | None) -> Any:
    xp = _arrays.namespace(q)
    options = softmax.Options(scale, "all", 0, key_mask)
    with _arrays.quiet(q):
        exact, _ = softmax.forward(q, k, v, options, room=REFERENCE["softmax"], out=None, xp=xp)
    got, want = (np.asarray(_arrays.to_numpy(x), np.float64) for x in (mech(q, k, v, key_mask=key_mask), exact))
    values, visible = _moments.joined(
        np.asarray(_arrays.to_numpy(v), np.float64), None if key_mask is None else _arrays.to_numpy(key_mask), np
    )
    seen = np.ones_like(values) if visible is None else visible
    mean = np.sum(np.where(seen, values, 0), -2, keepdims=True) / np.maximum(np.sum(seen, -2, keepdims=True), 1)
    return (np.linalg.norm(got - want, axis=(-2, -1)) / np.linalg.norm(want - mean, axis=(-2, -1)))[()]


class Report(NamedTuple):
    """Every instrument's number, and why the others have none."""

    numbers: dict[str, Any]
    refused: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{name:18} {_line(value)}" for name, value in self.numbers.items()]
        return "\n".join([*lines, *(f"{name:18} none: {why}" for name, why in self.refused.items())])


def report(
    mech: Any, q: Array, k: Array, v: Array | None = None, *, causal: bool = False, key_mask: Array | None = None
) -> Report:
    """Every instrument that applies to `mech.weights(q, k, causal=..., key_mask=...)`; of the others the reason.

    Examples
    --------
    >>> import numpy as np
    >>> import linattn as la
    >>> q, k, v = np.random.default_rng(0).normal(size=(3, 64, 16))
    >>> found = la.instruments.report(la.LLN(alpha=1.0, beta=1.0), q, k, v, causal=True)
    >>> round(float(found.numbers["relative_entropy"]), 1), "causal" in found.refused["spectral_gap"]
    (1.0, True)
    """
    a = mech.weights(q, k, causal=causal, key_mask=key_mask)
    seen: dict[str, Any] = {"causal": causal, "key_mask": key_mask}
    scale = max(q.shape[-1], 1) ** -0.5
    measures: dict[str, Callable[[], Any]] = {
        name: lambda measure=measure: measure(a, **seen)  # type: ignore[misc]
        for name, measure in (
            ("entropy", of_weights.entropy),
            ("relative_entropy", of_weights.relative_entropy),
            ("support", of_weights.support),
            ("concentration", of_weights.concentration),
            ("log_variance", of_weights.log_variance),
            ("temperature", lognormal.temperature),
            ("lognormal_fit", lognormal.lognormal_fit),
            ("selectivity", of_weights.selectivity),
            ("rank", spectrum.rank),
            ("mean_distance", of_weights.mean_distance),
            ("sink", of_weights.sink),
        )
    }
    measures["spectral_gap"] = lambda: _gap(mech, a, seen)
    measures["to_softmax"] = lambda: pair.compare(a, _softmax(q, k, scale, seen), v=v, **seen)
    if v is not None and hasattr(mech, "n_features"):
        measures["performer_report"] = lambda: _performer(mech, q, k, v, seen)
    numbers, refused = {}, {}
    for name, measure in measures.items():
        try:
            numbers[name] = measure()
        except ValueError as error:
            refused[name] = str(error)
    if refused and not numbers.keys() - {"performer_report"}:
        numbers["negative_mass"] = reading.negative_mass(a)
    return Report(numbers, refused)


def _gap(mech: Any, a: Array, seen: dict[str, Any]) -> Any:
    if hasattr(mech, "block"):
        raise ValueError("Each block of the diagonal has an eigenvalue 1 of its own: measure the LLN part.")
    return spectrum.spectral_gap(a, **seen)


def _performer(mech: Any, q: Array, k: Array, v: Array, seen: dict[str, Any]) -> PerformerReport:
    if seen["causal"]:
        raise ValueError("The report is on full rows, got causal=True.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the numbers are in the report
        return performer_report(mech, q, k, v, key_mask=seen["key_mask"])


def _softmax(q: Array, k: Array, scale: float, seen: dict[str, Any]) -> Array:
    options = softmax.Options(scale, "past" if seen["causal"] else "all", 0, seen["key_mask"])
    with _arrays.quiet(q):
        return softmax.weights(q, k, options, _arrays.namespace(q))


def _line(value: Any) -> str:
    """Means over the leading axes."""
    if hasattr(value, "_asdict"):
        return ", ".join(f"{name} {_line(x)}" for name, x in value._asdict().items() if x is not None)
    return f"{np.mean(value):.4g}"
