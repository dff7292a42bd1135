"""A copy at a distance: one layer must name at the end a marked symbol seen long before.

N tokens are random symbols; one of them, far outside the last span, is marked, and the last token has to say which
symbol it was. The layer (embedding -> q, k, v, attention, read-out) is trained by Adam with the library's backwards.
Attention inside spans never meets the marked token, however long it learns; Combiner has the same spans and one summary
of each of the others.

    python examples/combiner_copy.py [--small] [--out FILE.png]
"""

from __future__ import annotations

import argparse

import numpy as np

import linattn as la

SYMBOLS, CHANNELS, BATCH = 8, 16, 32
RATE = 0.01


class Spans:
    """Exact softmax inside spans: what Combiner's queries meet directly, and nothing else."""

    def __init__(self, span):
        self.span = span

    def vjp(self, q, k, v, causal):
        n = q.shape[-2]
        return la.Softmax().vjp(q, k, v, causal=causal, cu_seqlens=[*range(0, n, self.span), n])


def attentions(span):
    return {
        "softmax": la.Softmax(),
        "softmax in spans": Spans(span),
        "Combiner, fixed": la.Combiner("fixed", span=span),
        "Combiner, logsparse": la.Combiner("logsparse"),
        "Combiner, axial_rowmajor": la.Combiner("axial_rowmajor", width=span),
    }


def draw(rng, n_tokens, span, count=BATCH, distance=None):
    """Tokens (count, n) as rows of the embedding, marked ones in its second half; which symbol, and how far back."""
    tokens = rng.integers(0, SYMBOLS, (count, n_tokens))
    far = rng.integers(span, n_tokens, count) if distance is None else np.full(count, distance)
    symbol = rng.integers(0, SYMBOLS, count)
    tokens[np.arange(count), n_tokens - 1 - far] = SYMBOLS + symbol
    return tokens, symbol


def forward(attend, weights, tokens):
    """Scores of the last token's symbols (count, SYMBOLS), and backward(d_scores) -> the gradients of the weights."""
    x = weights["embedding"][tokens]
    q, k, v = (x @ weights[name] for name in "qkv")
    out, attend_back = attend.vjp(q, k, v, causal=True)
    last = out[:, -1]

    def backward(d_scores):
        d_out = np.zeros_like(out)
        d_out[:, -1] = d_scores @ weights["read"].T
        d_qkv = attend_back(d_out)
        grads = {name: np.einsum("bnc,bnd->cd", x, d) for name, d in zip("qkv", d_qkv, strict=True)}
        d_x = sum(d @ weights[name].T for name, d in zip("qkv", d_qkv, strict=True))
        grads["embedding"] = np.zeros_like(weights["embedding"])
        np.add.at(grads["embedding"], tokens, d_x)
        grads["read"] = last.T @ d_scores
        return grads

    return last @ weights["read"], backward


def train(attend, n_tokens, span, n_steps, seed=0):
    """The weights after n_steps of Adam on the cross entropy."""
    rng = np.random.default_rng(seed)
    shapes = {
        "embedding": (2 * SYMBOLS, CHANNELS),
        "read": (CHANNELS, SYMBOLS),
        **dict.fromkeys("qkv", (CHANNELS, CHANNELS)),
    }
    weights = {name: rng.normal(size=shape) / shape[0] ** 0.5 for name, shape in shapes.items()}
    mean, square = ({name: np.zeros_like(w) for name, w in weights.items()} for _ in range(2))
    for step in range(1, n_steps + 1):
        tokens, symbol = draw(rng, n_tokens, span)
        scores, backward = forward(attend, weights, tokens)
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        p /= p.sum(axis=-1, keepdims=True)
        p[np.arange(BATCH), symbol] -= 1  # d loss / d scores
        for name, d in backward(p / BATCH).items():
            mean[name] += 0.1 * (d - mean[name])
            square[name] += 0.01 * (d * d - square[name])
            slow = mean[name] / (1 - 0.9**step), np.sqrt(square[name] / (1 - 0.99**step)) + 1e-12
            weights[name] -= RATE * slow[0] / slow[1]
    return weights


def accuracy(attend, weights, n_tokens, span, distance, count):
    """Share of symbols named right when the marked one is so far back."""
    tokens, symbol = draw(np.random.default_rng(1), n_tokens, span, count, distance)
    return float(np.mean(np.argmax(forward(attend, weights, tokens)[0], axis=-1) == symbol))


def draw_picture(found, distances, path):
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, row in found.items():
        axis.plot(distances, row, marker="o", label=name, linestyle="--" if name.startswith("softmax") else "-")
    axis.axhline(1 / SYMBOLS, color="black", linestyle=":", label="guessing")
    axis.set(xlabel="distance, tokens", ylabel="share named right", ylim=(0, 1.05))
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="few tokens and steps")
    parser.add_argument("--out", metavar="FILE.png", help="draw the figure")
    arguments = parser.parse_args()
    n_tokens, span, n_steps, count = (48, 6, 60, 64) if arguments.small else (96, 8, 400, 512)
    distances = [span, n_tokens // 4, n_tokens // 2, n_tokens - 1]
    print(f"share named right, {n_tokens} tokens, spans of {span}; guessing gives {1 / SYMBOLS}")
    print(f"  {'distance':26}" + "".join(f"{d:8}" for d in distances))
    found = {}
    for name, attend in attentions(span).items():
        weights = train(attend, n_tokens, span, n_steps)
        found[name] = [accuracy(attend, weights, n_tokens, span, d, count) for d in distances]
        print(f"  {name:26}" + "".join(f"{x:8.2f}" for x in found[name]))
    if arguments.out:
        draw_picture(found, distances, arguments.out)


if __name__ == "__main__":
    main()
