"""A character model of Paradise Lost, with each mechanism under equal conditions.

    pip install -e ".[torch,plot]"
    python examples/char_lm.py --out runs/char

Same initial weights, same batches, same optimizer; bits per character on the poem's end, against steps and seconds. A
run that was stopped goes on where its last checkpoint stands.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from training import MECHANISMS, Model, train

TEXT = Path(__file__).parent / "data" / "paradise_lost.txt"
HELD_OUT = 0.1  # of the poem, its end


class Characters:
    """The poem as numbers, cut into what is learned and what is asked."""

    def __init__(self, text: str) -> None:
        self.alphabet = sorted(set(text))
        index = {c: i for i, c in enumerate(self.alphabet)}
        ids = torch.tensor([index[c] for c in text])
        cut = int(len(ids) * (1 - HELD_OUT))
        self.train, self.test = ids[:cut], ids[cut:]

    def batch(self, step: int, size: int, length: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        starts = torch.randint(len(self.train) - length - 1, (size,), generator=generator).tolist()
        rows = torch.stack([self.train[s : s + length + 1] for s in starts])
        return rows[:, :-1], rows[:, 1:]

    def unigram_bits(self) -> float:
        """Bits a character of the test part under the frequencies of the training part, each count one more."""
        counts = Counter(self.train.tolist())
        total = len(self.train) + len(self.alphabet)
        return -sum(math.log2((counts[c] + 1) / total) for c in self.test.tolist()) / len(self.test)


def cross_entropy(logits: Tensor, want: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), want.flatten())


def held_out_bits(model: Model, data: Characters, length: int, most: int = 16) -> float:
    """Bits per character on the first `most` pieces of the held-out part."""
    pieces = min(most, (len(data.test) - 1) // length)
    rows = torch.stack([data.test[i * length : (i + 1) * length + 1] for i in range(pieces)])
    model.eval()
    with torch.no_grad():
        bits = cross_entropy(model(rows[:, :-1]), rows[:, 1:]).item() / math.log(2)
    model.train()
    return bits


def plot(results: dict[str, dict], unigram: float, file: Path) -> None:
    """Bits per character in training, smoothed, against steps and against seconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, what in zip(axes, ("step", "seconds"), strict=True):
        for name, result in results.items():
            smooth, rows, level = [], result["history"], None
            for row in rows:
                bits = row["loss"] / math.log(2)
                level = bits if level is None else 0.9 * level + 0.1 * bits
                smooth.append(level)
            axis.plot([row[what] for row in rows], smooth, label=name)
        axis.axhline(unigram, color="gray", linestyle=":", label="unigram")
        axis.set_xlabel(what)
    axes[0].set_ylabel("bits per character")
    axes[1].legend()
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> dict[str, dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, results.json and plot.png")
    parser.add_argument("--mechanisms", nargs="+", default=list(MECHANISMS), choices=list(MECHANISMS))
    for name, default in (("steps", 600), ("length", 256), ("batch", 16), ("width", 128), ("heads", 4), ("layers", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--no-plot", action="store_true")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    data = Characters(TEXT.read_text(encoding="utf-8"))
    unigram = data.unigram_bits()
    results = {}
    for name in given.mechanisms:
        torch.manual_seed(0)
        model = Model(name, len(data.alphabet), given.length, given.width, given.heads, given.layers)
        history = train(
            model, lambda step: data.batch(step, given.batch, given.length), cross_entropy,
            steps=given.steps, rate=given.rate, name=name, checkpoint=given.out / f"{name}.pt",
        )  # fmt: skip
        results[name] = {"bits": held_out_bits(model, data, given.length), "history": history}
    print(f"{'':10}  bits a character  ms a step   (unigram model: {unigram:.3f})")
    for name, result in results.items():
        pace = 1000 * result["history"][-1]["seconds"] / given.steps
        print(f"{name:10}  {result['bits']:16.3f}  {pace:9.1f}")
    (given.out / "results.json").write_text(json.dumps({"unigram": unigram, **results}), encoding="utf-8")
    if not given.no_plot:
        plot(results, unigram, given.out / "plot.png")
    return {"unigram": {"bits": unigram}, **results}


if __name__ == "__main__":
    main()
