"""What the training examples share: a small causal transformer, one loop, checkpoints to go on from."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional

import linattn as la
from linattn.interop.torch import Attention


class TorchSoftmax(Attention):
    """The same projections with torch's own softmax attention: the yardstick for time."""

    def forward(self, query: Tensor, *_: Any, is_causal: bool = False, **__: Any) -> tuple[Tensor, None]:
        q, k, v = (x.flatten(1, 2) for x in self._heads(query, query, query))
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        return self.out_proj(out.transpose(1, 2).flatten(-2)), None


MECHANISMS: dict[str, Callable[[int], Any]] = {
    "sdpa": lambda length: None,
    "softmax": lambda length: la.Softmax(),
    "elu1": lambda length: la.Linear("elu1"),
    "relu": lambda length: la.Linear("relu"),
    "cosformer": lambda length: la.CosFormer(length),
    "performer": lambda length: la.Performer(64, seed=0),
    "lln": lambda length: la.LLN(alpha=1.0, beta=1.0),
    "lln_diag": lambda length: la.LLNDiag(alpha=1.0, beta=1.0, block=32),
}


class Model(nn.Module):
    """Tokens to logits of the next one; every mechanism starts from the same weights."""

    def __init__(self, mechanism: str, n_tokens: int, length: int, width: int, n_heads: int, n_layers: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(n_tokens, width), nn.Embedding(length, width)
        value = MECHANISMS[mechanism](length)
        layers = []
        for _ in range(n_layers):
            layer = nn.TransformerEncoderLayer(
                width, n_heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
            )
            kind, mixer = (TorchSoftmax, la.Softmax()) if value is None else (Attention, value)
            own = kind(width, n_heads, mechanism=mixer)
            own.load_state_dict(layer.self_attn.state_dict())
            layer.self_attn = own
            layers.append(layer)
        self.layers, self.norm, self.logits = nn.ModuleList(layers), nn.LayerNorm(width), nn.Linear(width, n_tokens)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        y = self.tokens(x) + self.places.weight[:n]
        mask = y.new_zeros(1, 1).expand(n, n)  # what is_causal says is enough; nothing of size n x n is made
        for layer in self.layers:
            y = layer(y, src_mask=mask, is_causal=True)
        return self.logits(self.norm(y))


def train(
    model: Model,
    batch: Callable[[int], tuple[Tensor, Tensor]],
    loss_of: Callable[[Tensor, Tensor], Tensor],
    *,
    steps: int,
    rate: float,
    name: str,
    checkpoint: Path | None = None,
    every: int = 50,
) -> list[dict[str, float]]:
    """[{step, seconds, loss}, ...]; goes on from `checkpoint` if there is one, as if it had not been stopped.

    `batch(step)` must depend on `step` alone. Seconds count training, not the time in between.
    """
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    history: list[dict[str, float]] = []
    if checkpoint is not None and checkpoint.exists():
        kept = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        history = kept["history"]
    first = int(history[-1]["step"]) if history else 0
    before = history[-1]["seconds"] if history else 0.0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    start = time.perf_counter()
    with Progress(*columns) as bar:
        task = bar.add_task(name, total=steps, completed=first)
        for step in range(first, steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / 20)
            x, y = batch(step)
            optimizer.zero_grad()
            loss = loss_of(model(x), y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            seconds = before + time.perf_counter() - start
            history.append({"step": step + 1, "seconds": seconds, "loss": loss.item()})
            if checkpoint is not None and ((step + 1) % every == 0 or step + 1 == steps):
                save(checkpoint, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "history": history})
            bar.update(task, advance=1, description=f"{name} loss {loss.item():.3f}")
    return history


def save(file: Path, content: dict[str, Any]) -> None:
    """Whole or not at all."""
    partial = file.with_suffix(".partial")
    torch.save(content, partial)
    os.replace(partial, file)
