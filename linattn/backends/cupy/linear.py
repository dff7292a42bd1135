"""The linear engine on an NVIDIA GPU. Definition: backends/reference/linear.py; kernels: cu/; launches: product.py.

    forward     [num, den] = P(phi_q, phi_k, [v, 1])          out = num / c
    backward    G = [g, d_den]      g = d_out / c             d_den = -c' (g . P(phi_q, phi_k, vc)) / c + ...
                d_phi_q = P (G, [vc, 1], phi_k)               vc = v - mean: centred, which changes only the rounding
                d_phi_k = P'([vc, 1], G, phi_q)               P': tokens from last to first
                d_v     = P'(phi_k, phi_q, g)

d_den is an extra column of the contraction, never of the values. Maps, masks, centring, division and the derivative of
the map are done where a kernel loads and stores. What no kernel serves runs in the reference room on the same arrays.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from linattn import _arrays
from linattn.backends.reference import linear as reference

from . import _maps, plan
from .plan import CENTRED, CHAIN, DELTA, DIVIDE, DIVIDED, MAKE, MAPS, ONES, PLAIN, READ, VECTOR
from .product import Product, Slot, empty, real_of, run, served, tiles_of

FEATURE_MAPS = frozenset(MAPS)
SAMPLE = 256  # tokens whose mean centres the values: any number would do, one near them rounds least


def device_of(x: Any) -> Any:
    """Where the kernels for `x` run."""
    from . import launch

    return launch.device_of(x)


def forward(q, k, v, state, *, feature_map, span, turns, key_mask, normalize, eps, out, xp):
    """out (..., N, E), den (..., N) or None, and the state after all keys. Arguments: engines/linear.py."""
    device, options = device_of(q), {"span": span, "turns": turns, "key_mask": key_mask, "eps": eps}
    with device:
        device.check(k=k, v=v, state=state[0], key_mask=key_mask, out=out)
        lead = _lead(q, k, v, turns, key_mask)
        if not served(device, q, k, v, lead, state):
            return _maps.forward(
                q, k, v, state, feature_map=feature_map, normalize=normalize, out=out, xp=xp, **options
            )
        dtype, shape = _arrays.dtype_name(q), (*lead, q.shape[-2], v.shape[-1])
        real, phi = real_of(dtype), MAPS[feature_map]
        result = xp.empty(shape, dtype=q.dtype) if out is None else out
        den = empty(shape[:-1], real, xp) if normalize else None
        after = tuple(empty(state[0].shape, real, xp) for _ in state)
        product = Product(
            lead, dtype, span,
            Slot(q, phi, MAKE if normalize and eps == "safe" else 0), Slot(k, phi), Slot(v), result,
            n_sums=state[0].shape[-3], normalize=normalize, epilogue=DIVIDE if normalize else PLAIN, rule=_rule(eps),
            turns=turns, mask=key_mask, mask_keys=True, den=den, start=state, final=after,
        )  # fmt: skip
        run(product, device, xp)
        return result, den, after


def backward(
    d_out, d_state, q, k, v, state, den, *, feature_map, span, turns, key_mask, normalize, eps, out, xp
):  # fmt: skip
    """Cotangents of q, k, v and of the incoming state. The lines of `forward`, last line first."""
    device, options = device_of(q), {"span": span, "turns": turns, "key_mask": key_mask, "eps": eps}
    with device:
        device.check(d_out=d_out, d_state=d_state, k=k, v=v, state=state[0], key_mask=key_mask)
        lead = _lead(q, k, v, turns, key_mask)
        if not served(device, q, k, v, lead, state):
            return _maps.backward(
                d_out, d_state, q, k, v, state, den,
                feature_map=feature_map, normalize=normalize, out=out, xp=xp, **options,
            )  # fmt: skip
        dtype, phi, n_sums = _arrays.dtype_name(q), MAPS[feature_map], state[0].shape[-3]
        real, real_type, safe = real_of(dtype), state[0].dtype, normalize and eps == "safe"
        N = q.shape[-2]
        turn_q, turn_k = turns or (None, None)
        lead_kv = tuple(state[0].shape[:-3])
        # a cotangent over a large divisor leaves the range of float16
        tensor = dtype == "bfloat16"
        given = {"n_sums": n_sums, "rule": _rule(eps), "mask": key_mask, "den": den, "tensor": tensor}
        to_queries = {**given, "turns": turns, "mask_keys": True}
        to_keys = {**given, "turns": turns and (turn_k, turn_q), "mask_rows": True, "reverse": True}
        grads = [
            _result(o, x, (*some, *x.shape[-2:]), real, xp)
            for o, x, some in zip(out or (None, None, None), (q, k, v), (lead, lead, lead), strict=True)
        ]

        before = reference._value(state, xp)
        after = xp.zeros_like(before) if d_state is None else _arrays.cast(d_state, before.dtype, xp)
        scale = mean = wide = None
        g, values, features = Slot(d_out), Slot(v), Slot(q, phi)
        g1, v1 = g, values
        if normalize:
            mean = _mean(v, key_mask, real_type, xp)
            wide = _arrays.cast(mean, before.dtype, xp)[..., None, :, :]
            before = xp.concat([before[..., :-1] - before[..., -1:] * wide, before[..., -1:]], axis=-1)
            after = xp.concat([after[..., :-1], after[..., -1:] + _sum(after[..., :-1] * wide, xp)], axis=-1)
            scale = empty((*lead, N), real, xp) if safe else None
            g, values, features = Slot(d_out, DIVIDED), Slot(v, CENTRED), Slot(q, phi, READ if safe else 0)
            g1, v1 = g._replace(extra=VECTOR), values._replace(extra=ONES)
        before, after = _pair(before, real_type, xp), _pair(after, real_type, xp)
        given = {"mean": mean, "scale": scale}

        sums = None
        if normalize:  # d_den[t] = -c' (g . num) / c + (g . mean) (1 - c' den / c): in `extra`
            a = Slot(q, phi, MAKE if safe else 0)
            delta = Product(
                lead, dtype, span, a, Slot(k, phi), values, None,
                normalize=True, epilogue=DELTA, other=d_out, start=before, **to_queries, **given,
            )  # fmt: skip
            given["extra"] = empty((tiles_of(delta, device), *lead, N), real, xp)
            sums = run(replace(delta, extra=given["extra"]), device, xp)
        # d_phi_q = P(G, [vc, 1], phi_k)
        d_q = Product(
            lead, dtype, span, g1, v1, Slot(k, phi), grads[0],
            epilogue=CHAIN, other=q, out_map=phi, scaled_rows=safe, start=before, transposed=True,
            **to_queries, **given,
        )  # fmt: skip
        run(d_q, device, xp, sums)
        # d_phi_k = P'([vc, 1], G, phi_q), and what reaches the state
        reached = empty((*lead, *state[0].shape[-3:]), real, xp)
        d_k = Product(
            lead, dtype, span, v1, g1, features, grads[1],
            epilogue=CHAIN, other=k, out_map=phi, start=after, start_once=True, final=(reached, None), transposed=True,
            **to_keys, **given,
        )  # fmt: skip
        sums = run(d_k, device, xp)
        # d_v = P'(phi_k, phi_q, g)
        d_v = Product(
            lead, dtype, span, Slot(k, phi), features, g, grads[2],
            start=after, start_once=True, **to_keys, **given,
        )  # fmt: skip
        run(d_v, device, xp, sums)

        d_before = _arrays.unbroadcast(reached, (*lead_kv, *state[0].shape[-3:]), xp)
        if normalize:
            lost = _sum(d_before[..., :-1] * _arrays.cast(wide, real_type, xp), xp)
            d_before = xp.concat([d_before[..., :-1], d_before[..., -1:] - lost], axis=-1)
        finished = (
            _finished(d_x, x, o, xp) for d_x, x, o in zip(grads, (q, k, v), out or (None, None, None), strict=True)
        )
        return *finished, d_before


def _lead(q, k, v, turns, key_mask):
    leads = [tuple(x.shape[:-2]) for x in (q, k, v, *(turns or ()))]
    return _arrays.broadcast_shapes(*leads, *([] if key_mask is None else [tuple(key_mask.shape[:-1])]))


def _rule(eps):
    return (plan.RULES["safe"], 0.0) if eps == "safe" else (plan.RULES[eps[0]], eps[1])


def _mean(v, key_mask, real, xp):
    """(..., 1, E): mean over some visible, finite values."""
    step = max(1, v.shape[-2] // SAMPLE)
    some = _arrays.cast(v[..., ::step, :], real, xp)
    mask = None if key_mask is None else key_mask[..., ::step]
    return reference.visible_mean(reference.visible(some, mask, xp), mask, xp)


def _pair(x, dtype, xp):
    """A number in the dtype of running totals as sums and rest in that of the state."""
    sums = _arrays.cast(x, dtype, xp)
    return sums, _arrays.cast(x - _arrays.cast(sums, x.dtype, xp), dtype, xp)


def _sum(x, xp):
    return xp.sum(x, axis=-1, keepdims=True, dtype=x.dtype)


def _result(out, x, shape, real, xp):
    """Where a cotangent goes: where it belongs, or, if it is still to be summed over heads, its parts."""
    if tuple(x.shape) != shape:
        return empty(shape, real, xp)
    return xp.empty(shape, dtype=x.dtype) if out is None else out


def _finished(d_x, x, out, xp):
    """Summed over the axes that x does not have, and narrowed once."""
    if tuple(d_x.shape) == tuple(x.shape):
        return d_x
    total = _arrays.unbroadcast(d_x, tuple(x.shape), xp)
    return _arrays.fill(out, _arrays.cast(total, x.dtype, xp))
