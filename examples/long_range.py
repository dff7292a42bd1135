"""Two generated tasks over growing length: recall a value by its key, evaluate nested list operations.

    pip install -e ".[torch]"
    python examples/long_range.py --lengths 64 128 256 --out runs/long

Each mechanism trains from the same weights on the same batches; accuracy is on sequences it has not seen.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import torch
from torch import Tensor
from torch.nn import functional
from training import MECHANISMS, Model, train

DIGITS = 10
OPERATIONS: dict[str, Callable[[list[int]], int]] = {
    "MIN": min,
    "MAX": max,
    "MED": lambda xs: sorted(xs)[len(xs) // 2],
    "SUM": lambda xs: sum(xs) % DIGITS,
}
NAMES = list(OPERATIONS)
OPEN = DIGITS  # DIGITS + i opens the i-th operation
CLOSE, ASK, PAD = (OPEN + len(NAMES) + i for i in range(3))
N_KEYS = 8  # of the recall task
KEY = PAD + 1
N_TOKENS = KEY + N_KEYS


def recall(random: Random, length: int) -> tuple[list[int], int]:
    """key value key value ... ASK key -> the value that the key had last."""
    pairs = [(random.randrange(N_KEYS), random.randrange(DIGITS)) for _ in range((length - 2) // 2)]
    key, _ = random.choice(pairs)
    return [x for k, v in pairs for x in (k + KEY, v)] + [ASK, key + KEY], dict(pairs)[key]


def listops(random: Random, length: int) -> tuple[list[int], int]:
    """[MAX 4 [SUM 2 9] 1 ...] ASK -> its value, 0 .. 9."""

    def expression(room: int, depth: int) -> tuple[list[int], int]:
        if depth == 0 or room < 4:
            digit = random.randrange(DIGITS)
            return [digit], digit
        which = random.randrange(len(NAMES))
        tokens, values = [OPEN + which], []
        room -= 2
        while room > 0 and (len(values) < 2 or (room > 3 and random.random() < 0.9)):
            part, value = expression(random.randint(1, room), depth - 1)
            tokens, values, room = tokens + part, [*values, value], room - len(part)
        return [*tokens, CLOSE], OPERATIONS[NAMES[which]](values)

    tokens, value = expression(length - 1, 4)
    return [*tokens, ASK], value


TASKS = {"recall": recall, "listops": listops}


def batch(task: str, size: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """(size, length) of tokens, the question at the end, and (size,) of answers."""
    random = Random(f"{task} {length} {seed}")
    rows, answers = zip(*(TASKS[task](random, length) for _ in range(size)), strict=True)
    padded = [[PAD] * (length - len(row)) + row for row in rows]
    return torch.tensor(padded), torch.tensor(answers)


def loss_of(logits: Tensor, answers: Tensor) -> Tensor:
    return functional.cross_entropy(logits[:, -1], answers)


def accuracy(model: Model, task: str, length: int, size: int = 256) -> float:
    x, answers = batch(task, size, length, seed=-1)
    model.eval()
    with torch.no_grad():
        right = model(x)[:, -1].argmax(dim=-1) == answers
    return right.float().mean().item()


def main(arguments: Sequence[str] | None = None) -> dict[tuple[str, str, int], float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--mechanisms", nargs="+", default=["softmax", "elu1", "relu", "cosformer"], choices=list(MECHANISMS)
    )
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 64, 128])
    for name, default in (("steps", 800), ("batch", 32), ("width", 64), ("heads", 4), ("layers", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, help="folder for results.json")
    given = parser.parse_args(arguments)
    table = {}
    for task in given.tasks:
        for name in given.mechanisms:
            for length in given.lengths:
                torch.manual_seed(0)
                model = Model(name, N_TOKENS, length, given.width, given.heads, given.layers)
                train(
                    model, lambda step, t=task, n=length: batch(t, given.batch, n, step), loss_of,
                    steps=given.steps, rate=2e-3, name=f"{task} {name} {length}",
                )  # fmt: skip
                table[task, name, length] = accuracy(model, task, length)
    for task in given.tasks:
        print(f"{task}, accuracy after {given.steps} steps (guessing: {1 / DIGITS:.2f}); length: {given.lengths}")
        for name in given.mechanisms:
            print(f"  {name:10} " + "  ".join(f"{table[task, name, n]:.3f}" for n in given.lengths))
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        size = {name: getattr(given, name) for name in ("steps", "batch", "width", "heads", "layers")}
        rows = [{"task": t, "mechanism": name, "length": n, "accuracy": x} for (t, name, n), x in table.items()]
        (given.out / "results.json").write_text(json.dumps({"size": size, "results": rows}), encoding="utf-8")
    return table


if __name__ == "__main__":
    main()
