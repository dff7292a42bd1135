"""Other people's attentions on the audit's inputs: each in a process of its own, judged by its own formula.

    error    of float32, in u A|v| and normwise, against the peer's own formula in float64, whatever that adds or drops
    P1       rows before token t that change when the keys and values from t on change
    P2       rows before the last token that a NaN in the last value ruins
    P4       the largest difference between a prefix alone and the same rows of the whole
    P8       the largest distance from 1 where all values are 1

A peer that is not installed says so, one that raises says what it says. Nothing here is imported by the library, and
nothing here decides whether an audit fails.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from linattn.audit import families
from linattn.audit.measure import relative_error, weighted_error

__all__ = ["PEERS", "Peer", "ask", "ask_all"]

Array = NDArray[Any]
TOKENS, CUT, CHANNELS = 128, 64, 16  # two chunks of 64: some take nothing else
FAMILIES = ("gaussian", "norms 1e2", "all in (-20, -8)", "constant", "v + 1e4")
SECONDS = 120
SEED = 7


@dataclass(frozen=True)
class Peer:
    """One function of another library: how to call it on one head, and the weights it means, in float64."""

    name: str
    package: str  # whose version is told
    module: str
    causal: bool
    call: Callable[[Array, Array, Array], Array]
    weights: Callable[[Array, Array], Array]  # (q, k) -> (N, N), already masked


class Row(NamedTuple):
    """One line about a peer; `what` is a family or a property."""

    peer: str
    version: str
    causal: bool
    what: str
    werr: float | None
    relative: float | None
    said: str


# ------------------------------------------------------------------------------------------------ formulas


def seen(a: Array, causal: bool) -> Array:
    return np.tril(a) if causal else a


def soft(x: Array, axis: int) -> Array:
    a = np.exp(x - x.max(axis=axis, keepdims=True))
    return a / a.sum(axis=axis, keepdims=True)


def softmax_weights(causal: bool) -> Callable[[Array, Array], Array]:
    def weights(q: Array, k: Array) -> Array:
        s = q @ k.T / q.shape[1] ** 0.5
        return soft(np.where(np.tri(*s.shape) > 0, s, -np.inf) if causal else s, 1)

    return weights


def elu1(x: Array) -> Array:
    return np.where(x > 0, 1 + x, np.exp(np.minimum(x, 0)))


def ratio_weights(
    features: Callable[[Array, Array], tuple[Array, Array]], causal: bool, added: float = 0.0, beside_keys: float = 0.0
) -> Callable[[Array, Array], Array]:
    """phi_q . phi_k over its sum and `added`, or with `beside_keys` added to each sum of keys."""

    def weights(q: Array, k: Array) -> Array:
        phi_q, phi_k = features(q, k)
        a = seen(phi_q @ phi_k.T, causal)
        den = a.sum(axis=1, keepdims=True) + beside_keys * phi_q.sum(axis=1, keepdims=True)
        return a / (den + added)

    return weights


def random_features(q: Array, k: Array) -> tuple[Array, Array]:
    """performer-pytorch: one maximum over all keys, 1e-4 added to each feature."""
    w = projection()

    def features(x: Array, axis: tuple[int, ...]) -> Array:
        x = x * x.shape[1] ** -0.25
        logs = x @ w.T
        top = logs.max(axis=axis, keepdims=True)
        return (np.exp(logs - (x**2).sum(axis=1, keepdims=True) / 2 - top) + 1e-4) * len(w) ** -0.5

    return features(q, (1,)), features(k, (0, 1))


def projection() -> Array:
    return np.random.default_rng(SEED).normal(size=(64, CHANNELS)).astype("float32").astype(float)


def softmaxed_features(causal: bool) -> Callable[[Array, Array], tuple[Array, Array]]:
    """linear-attention-transformer: q over its channels, k over the tokens or, causal, exp."""

    def features(q: Array, k: Array) -> tuple[Array, Array]:
        return soft(q, 1) * q.shape[1] ** -0.5, np.exp(k) if causal else soft(k, 0)

    return features


def bucketed(q: Array, k: Array) -> Array:
    """linear-attention-transformer, causal: only buckets of 64 that are over are seen, the sum is at least 1e-3."""
    phi_q, phi_k = softmaxed_features(True)(q, k)
    bucket = np.arange(len(q)) // CUT
    a = np.where(bucket[:, None] > bucket[None, :], phi_q @ phi_k.T, 0)
    return a / np.maximum(a.sum(axis=1, keepdims=True), 1e-3)


# --------------------------------------------------------------------------------------------------- calls


def torch_call(function: Callable[..., Any], tokens_first: bool = False) -> Callable[[Array, Array, Array], Array]:
    """`function` on tensors (1, 1, N, D), or (1, N, 1, D)."""

    def call(q: Array, k: Array, v: Array) -> Array:
        import torch

        axes = (0, 2) if tokens_first else (0, 1)
        out = function(*(torch.tensor(np.expand_dims(x, axes)) for x in (q, k, v)))
        return np.asarray(out[0, :, 0] if tokens_first else out[0, 0])

    return call


def torch_sdpa(causal: bool) -> Callable[..., Any]:
    def function(q: Any, k: Any, v: Any) -> Any:
        import torch

        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return function


def torch_pairs(causal: bool) -> Callable[..., Any]:
    """The elu + 1 formula in torch, all pairs at once: what one writes down without a library."""

    def function(q: Any, k: Any, v: Any) -> Any:
        import torch

        a = (torch.nn.functional.elu(q) + 1) @ (torch.nn.functional.elu(k) + 1).transpose(-1, -2)
        a = a.tril() if causal else a
        return (a / a.sum(-1, keepdim=True)) @ v

    return function


def performer_pytorch(causal: bool) -> Callable[..., Any]:
    def function(q: Any, k: Any, v: Any) -> Any:
        import torch
        from performer_pytorch.performer_pytorch import (
            causal_linear_attention_noncuda,
            linear_attention,
            softmax_kernel,
        )

        w = torch.tensor(projection(), dtype=q.dtype)
        phi_q, phi_k = (softmax_kernel(x, projection_matrix=w, is_query=x is q) for x in (q, k))
        return (causal_linear_attention_noncuda if causal else linear_attention)(phi_q, phi_k, v)

    return function


def attention_transformer(causal: bool) -> Callable[..., Any]:
    def function(q: Any, k: Any, v: Any) -> Any:
        from linear_attention_transformer.linear_attention_transformer import causal_linear_attn, linear_attn

        return causal_linear_attn(q, k, v, bucket_size=CUT) if causal else linear_attn(q, k, v)

    return function


def fla_naive(which: str) -> Callable[..., Any]:
    def function(q: Any, k: Any, v: Any) -> Any:
        import torch
        from fla.ops.linear_attn import naive

        phi_q, phi_k = (torch.nn.functional.elu(x) + 1 for x in (q, k))
        out = getattr(naive, which)(phi_q, phi_k, v, normalize=True)
        return out[0] if isinstance(out, tuple) else out

    return function


def jax_attention(causal: bool) -> Callable[[Array, Array, Array], Array]:
    def call(q: Array, k: Array, v: Array) -> Array:
        import jax

        out = jax.nn.dot_product_attention(*(x[None, :, None] for x in (q, k, v)), is_causal=causal)
        return np.asarray(out)[0, :, 0]

    return call


def fla_weights(q: Array, k: Array) -> Array:
    """1e-10 beside the sum of features that carry D^(-1/2)."""
    scale = q.shape[1] ** -0.5
    return ratio_weights(lambda q, k: (elu1(q) * scale, elu1(k)), True, 1e-10)(q, k)


def elu1_pairs(q: Array, k: Array) -> tuple[Array, Array]:
    return elu1(q), elu1(k)


PEERS = [
    *(
        peer
        for causal in (False, True)
        for peer in (
            Peer("torch SDPA", "torch", "torch", causal, torch_call(torch_sdpa(causal)), softmax_weights(causal)),
            Peer("jax.nn attention", "jax", "jax", causal, jax_attention(causal), softmax_weights(causal)),
            Peer("torch, elu+1 pairs", "torch", "torch", causal, torch_call(torch_pairs(causal)),
                 ratio_weights(elu1_pairs, causal)),
            Peer("performer-pytorch", "performer-pytorch", "performer_pytorch", causal,
                 torch_call(performer_pytorch(causal)),
                 ratio_weights(random_features, causal, beside_keys=1e-6 if causal else 0.0)),
            Peer("linear-attention-transformer", "linear-attention-transformer", "linear_attention_transformer", causal,
                 torch_call(attention_transformer(causal)),
                 bucketed if causal else lambda q, k: np.matmul(*softmax_pair(q, k))),
        )
    ),
    *(
        Peer(f"fla {which}", "fla-core", "fla", True, torch_call(fla_naive(which), True), fla_weights)
        for which in ("naive_recurrent_linear_attn", "naive_chunk_linear_attn")
    ),
]  # fmt: skip


def softmax_pair(q: Array, k: Array) -> tuple[Array, Array]:
    phi_q, phi_k = softmaxed_features(False)(q, k)
    return phi_q, phi_k.T


# ------------------------------------------------------------------------------------------------ measuring


def examine(peer: Peer) -> list[Row]:
    """Errors on the families, then the properties."""
    head = (peer.name, metadata.version(peer.package), peer.causal)
    rows = []
    for family in FAMILIES:
        rng = np.random.default_rng(SEED)
        inputs = families.draw(family, rng, TOKENS, TOKENS, CHANNELS, CHANNELS, "float32")
        if inputs is None:
            continue
        q, k, v = inputs[:3]
        with np.errstate(all="ignore"):
            weights = peer.weights(q.astype(float), k.astype(float))
            out, want, absolute = peer.call(q, k, v), weights @ v, abs(weights) @ abs(v)
            bad = int(np.sum(~np.isfinite(out).all(axis=1)))
            said = f"{bad} of {TOKENS} rows are not finite" if bad else ""
            werr, relative = weighted_error(out, want, absolute, "float32"), relative_error(out, want)
        rows.append(Row(*head, family, known(werr), known(relative), said))
    return rows + properties(peer, head)


def known(x: float) -> float | None:
    return float(f"{x:.3g}") if np.isfinite(x) else None


def properties(peer: Peer, head: tuple[str, str, bool]) -> list[Row]:
    """P1, P2, P4 for causal ones, P8 for all."""
    rng = np.random.default_rng(SEED)
    q, k, v = (rng.normal(size=(TOKENS, CHANNELS)).astype("float32") for _ in range(3))
    rows = []

    def add(what: str, said: str, relative: float | None = None) -> None:
        rows.append(Row(*head, what, None, relative, said))

    if peer.causal:
        out = peer.call(q, k, v)
        k2, v2 = k.copy(), v.copy()
        k2[CUT:] *= 3
        v2[CUT:] += 1
        moved = peer.call(q, k2, v2)
        changed = int(np.sum((moved[:CUT] != out[:CUT]).any(axis=1)))
        add("P1", f"{changed} of {CUT} earlier rows change", known(relative_error(moved[:CUT], out[:CUT])))
        v2 = v.copy()
        v2[-1] = np.nan
        ruined = int(np.sum(~np.isfinite(peer.call(q, k, v2)[:-1]).all(axis=1)))
        add("P2", f"{ruined} of {TOKENS - 1} earlier rows are not finite")
        part = peer.call(q[:CUT], k[:CUT], v[:CUT])
        add("P4", "a prefix alone against the whole", known(relative_error(part, out[:CUT])))
    ones = peer.call(q, k, np.ones_like(v))
    add("P8", f"1 becomes {float(ones.min()):.3g} to {float(ones.max()):.3g}", known(float(np.max(abs(ones - 1)))))
    return rows


def ask(peer: Peer) -> list[Row]:
    """What a process of its own finds of a peer; one row that says why where there is nothing to find."""
    nothing = Row(peer.name, "", peer.causal, "", None, None, "")
    if find_spec(peer.module) is None:
        return [nothing._replace(said="not installed")]
    command = [sys.executable, "-W", "ignore", "-m", "linattn.audit.peers", str(PEERS.index(peer))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return [nothing._replace(said=f"took more than {SECONDS} s")]
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        return [nothing._replace(said=f"raises {lines[-1]}"[:200])]
    return [Row(*row) for row in json.loads(done.stdout.splitlines()[-1])]


def ask_all(step: Callable[[str], None]) -> list[Row]:
    """All peers, one after the other."""
    rows = []
    for peer in PEERS:
        step(f"{peer.name}{', causal' if peer.causal else ''}")
        rows += ask(peer)
    return rows


if __name__ == "__main__":
    print(json.dumps(examine(PEERS[int(sys.argv[1])])))
