"""The law of ln S, S = exp(sqrt(chi) z_1) + ... + exp(sqrt(chi) z_D) with independent normal z, by quadrature.

LLN chooses chi so that the variance V(chi, D) of ln S is that of the logits it stands for.

With E exponential and T = E / S, P(ln T > c) = phi(c)^D, where phi(c) = E_z exp(-exp(c + sqrt(chi) z)), and ln E is
independent of ln S; so the cumulants of ln S are those of ln E, known, less or plus those of ln T:

    density of ln T      D phi^(D-1) E_z[e^w exp(-e^w)],   w = c + sqrt(chi) z
    mean = -gamma - E ln T        variance = Var ln T - pi^2 / 6        third = -2 zeta(3) - kappa_3(ln T)

One grid of step h carries c and sqrt(chi) z alike, so that each mean over z is a convolution. The trapezoid rule
converges exponentially here; h = min(sqrt(chi) / 15, 0.3) leaves 1e-12.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

EULER = 0.5772156649015329
ZETA3 = 1.2020569031595942
SPREAD = 10.0  # |z| beyond has a probability of 1e-23
STEPS_PER_DEVIATION, COARSEST = 15, 0.3
SMALLEST = 2e-4  # chi below: the series, where the difference of the two variances would cost digits
LARGEST_OCTAVE = 8  # chi beyond 4^9: the line through the last octave, 1e-5 off at most
LONG = 4096  # a kernel that is convolved by Fourier transforms
DEGREE = 15  # of the polynomial for a factor of 4 in chi
NEWTON_STEPS = 8


class Law(NamedTuple):
    """Cumulants of ln S."""

    mean: float
    variance: float
    third: float


def law(chi: float, dim: int) -> Law:
    """Mean, variance and third cumulant of ln S by quadrature; chi > 0."""
    s = math.sqrt(chi)
    h = min(s / STEPS_PER_DEVIATION, COARSEST)
    reach = math.ceil(SPREAD * s / h)
    z = np.arange(-reach, reach + 1) * (h / s)
    weights = np.exp(-(z**2) / 2)
    weights /= np.sum(weights)
    lowest, highest = -40 - SPREAD * s - math.log(dim), 5 + SPREAD * s
    c = lowest + h * np.arange(math.ceil((highest - lowest) / h))
    w = lowest + h * np.arange(-reach, len(c) + reach)
    with np.errstate(all="ignore"):  # exp(-e^w) is 0 for large w
        e = np.exp(np.minimum(w, 700.0))
        below = np.clip(_convolved(-np.expm1(-e), weights), 0.0, 1.0)  # 1 - phi
        density = _convolved(e * np.exp(-e), weights)
        if dim > 1:
            density = density * np.exp((dim - 1) * np.log1p(-below))
    density /= np.sum(density)
    mean = float(density @ c)
    variance, third = (float(density @ (c - mean) ** power) for power in (2, 3))
    return Law(-EULER - mean, variance - math.pi**2 / 6, -2 * ZETA3 - third)


def _convolved(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The valid part of the convolution; `weights` is symmetric."""
    if len(weights) < LONG:
        return np.convolve(x, weights, mode="valid")
    n = len(x) + len(weights) - 1
    whole = np.fft.irfft(np.fft.rfft(x, n) * np.fft.rfft(weights, n), n)
    return whole[len(weights) - 1 : len(x)]


def variance(chi: float, dim: int) -> float:
    """V(chi, D) = Var ln S."""
    if chi >= SMALLEST:
        return law(chi, dim).variance
    return chi / dim + chi**2 * (dim - 1) / (2 * dim**2)  # + O(chi^3 / dim)


def matched(target: float, dim: int) -> tuple[float, float]:
    """The chi with V(chi, D) = target, and V'(chi) there; `target` positive and finite."""
    small = 2 * dim * target / (1 + math.sqrt(1 + 2 * (dim - 1) * target))  # root of the series
    if small < SMALLEST:
        return small, 1 / dim + small * (dim - 1) / dim**2
    if target > _end(dim, LARGEST_OCTAVE + 1):
        low, high = 4.0**LARGEST_OCTAVE, 4.0 ** (LARGEST_OCTAVE + 1)
        slope = (_end(dim, LARGEST_OCTAVE + 1) - _end(dim, LARGEST_OCTAVE)) / (high - low)
        return high + (target - _end(dim, LARGEST_OCTAVE + 1)) / slope, slope
    octave = math.floor(math.log(small, 4))
    while target > _end(dim, octave + 1):
        octave += 1
    while target < _end(dim, octave):
        octave -= 1
    polynomial = _log_variance(dim, octave)
    derivative = polynomial.deriv()
    log_chi, log_target = (octave + 0.5) * math.log(4), math.log(target)
    for _ in range(NEWTON_STEPS):  # ln V against ln chi is nearly a line
        log_chi -= float((polynomial(log_chi) - log_target) / derivative(log_chi))
    chi = math.exp(log_chi)
    return chi, float(derivative(log_chi)) * target / chi


@lru_cache(maxsize=4096)
def _end(dim: int, octave: int) -> float:
    """V at chi = 4^octave."""
    return variance(4.0**octave, dim)


@lru_cache(maxsize=1024)
def _log_variance(dim: int, octave: int) -> np.polynomial.Chebyshev:
    """ln V as a polynomial of ln chi for chi in 4^octave .. 4^(octave + 1)."""
    log4 = math.log(4)

    def at(log_chi: np.ndarray) -> np.ndarray:
        return np.array([math.log(variance(math.exp(x), dim)) for x in log_chi])

    return np.polynomial.Chebyshev.interpolate(at, DEGREE, domain=[octave * log4, (octave + 1) * log4])
