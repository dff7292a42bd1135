"""What no kernel serves, by the reference room on the same arrays; it wants features where the kernels map themselves.

Definition of the maps: engines/features.py.
"""

from __future__ import annotations

from linattn import _arrays
from linattn.backends.reference import linear as reference


def phi(name, x, xp):
    """The features of x, in the accumulation dtype."""
    x = _arrays.cast(x, _arrays.accumulator(x, xp), xp)
    if name == "relu":
        return xp.where(x <= 0, xp.zeros_like(x), x)
    if name == "elu1":
        return xp.where(x > 0, 1 + x, xp.exp(xp.where(x > 0, xp.zeros_like(x), x)))
    return xp.exp(x) if name == "exp" else x


def vjp(name, d_phi, x, xp):
    """The cotangent of x from that of its features."""
    x = _arrays.cast(x, d_phi.dtype, xp)
    if name == "relu":
        return xp.where(x <= 0, xp.zeros_like(x), d_phi)
    if name == "elu1":
        return d_phi * xp.exp(xp.where(x > 0, xp.zeros_like(x), x))
    return d_phi * xp.exp(x) if name == "exp" else d_phi


def forward(q, k, v, state, *, feature_map, out, xp, **options):
    """As linear.forward."""
    wide_v = _arrays.cast(v, _arrays.accumulator(v, xp), xp)
    result, den, after = reference.forward(
        phi(feature_map, q, xp), phi(feature_map, k, xp), wide_v, state,
        feature_map="identity", out=None, xp=xp, **options,
    )  # fmt: skip
    return _arrays.fill(out, _arrays.cast(result, q.dtype, xp)), den, after


def backward(d_out, d_state, q, k, v, state, den, *, feature_map, out, xp, **options):
    """As linear.backward."""
    phi_q, phi_k = phi(feature_map, q, xp), phi(feature_map, k, xp)
    wide_v = _arrays.cast(v, phi_q.dtype, xp)
    d_phi_q, d_phi_k, d_v, d_before = reference.backward(
        d_out, d_state, phi_q, phi_k, wide_v, state, den, feature_map="identity", out=None, xp=xp, **options
    )
    d_k = vjp(feature_map, d_phi_k, k, xp)
    if options["key_mask"] is not None:
        d_k = xp.where(_seen(options["key_mask"], k, xp), d_k, xp.zeros_like(d_k))
    grads = (vjp(feature_map, d_phi_q, q, xp), d_k, d_v)
    finished = (
        _arrays.fill(o, _arrays.cast(d_x, x.dtype, xp))
        for o, d_x, x in zip(out or (None, None, None), grads, (q, k, v), strict=True)
    )
    return *finished, d_before


def _seen(key_mask, k, xp):
    """Which keys some head sees, (*lead_k, M, 1)."""
    shape = tuple(k.shape[:-1])
    heads = xp.broadcast_to(
        _arrays.cast(key_mask, _arrays.accumulator(k, xp), xp),
        _arrays.broadcast_shapes(shape, tuple(key_mask.shape)),
    )
    return (_arrays.unbroadcast(heads, shape, xp) > 0)[..., None]
