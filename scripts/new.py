"""All the pieces of a new mechanism, in their places: `python scripts/new.py NAME`, a class's name such as `Nystrom`.

    linattn/mechanisms/<name>.py      the value and its function; the inner verbs are to be written
    linattn/__init__.py, states.py    the shop window, and what a saved state may be of
    linattn/audit/quadratic.py        the formula that judges it
    linattn/audit/rigorous.py         the same formula in balls; subjects.py: its row
    tests/cases.py                    a case, which every property test takes up
    docs/mechanisms/<name>.rst        its page; docs/mechanisms/index.rst and docs/api/index.rst: their lines
    scripts/measure_docs.py           the table of its errors
    asv_bench/benchmarks/attention.py its row
    CHANGELOG.md                      its line

What is to be written raises NotImplementedError and says what it is; until then the mechanism's tests are red:

    nox -s tests -- -k NAME
"""

from __future__ import annotations

import argparse
import keyword
import re
import subprocess
import sys
from pathlib import Path

MECHANISM = '''"""NAME attention: in one sentence, what it does with tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from linattn._arrays import Array
from linattn.mechanisms.attention import Attention, Call, State

TO_WRITE = "`NAME` is not written yet: {}."


@dataclass(frozen=True, repr=False)
class NAME(Attention):
    """NAME attention: in one sentence, what the paper's author would say of it.

        out[t] = sum_s A[t, s] v[s]                                                        (paper, eq. n)
        A[t, s] = ...

    Notes
    -----
    Shapes: q (..., N, D), k (..., M, D), v (..., M, E), one dtype -> out (..., N, E).
    Subgradient: ... Held constant in the VJP: ...
    Cost: O(...) time, state ... numbers; backward keeps ...
    Source: authors, "title", venue and year, arXiv:...
    """

    def _forward(self, q: Array, k: Array, v: Array, arrays: Any, call: Call, out: Any) -> tuple[Array, Any, Any]:
        raise NotImplementedError(TO_WRITE.format("out, the arrays of the state after it, and what backward needs"))

    def _backward(
        self, d_out: Array, d_arrays: Any, saved: Any, call: Call, out: Any
    ) -> tuple[Array, Array, Array, Any]:
        raise NotImplementedError(TO_WRITE.format("d_q, d_k, d_v and the cotangents of the state before"))

    def _weights(self, q: Array, k: Array, call: Call) -> Array:
        raise NotImplementedError(TO_WRITE.format("A, all N x M of it"))

    def _empty(self, k: Array, v: Array, call: Call) -> Any:
        raise NotImplementedError(TO_WRITE.format("the arrays of the state before the first token"))

    def _refuse_state(self, state: State, k: Array, v: Array, call: Call) -> None:
        raise NotImplementedError(TO_WRITE.format("the check that a state fits k and v"))

    def _merge(self, earlier: Any, later: Any, xp: Any) -> Any:
        raise NotImplementedError(TO_WRITE.format("the state of two parts, or a sentence that says why there is none"))


def FUNCTION(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    key_mask: Array | None = None,
    cu_seqlens: Any = None,
    backend: str | None = None,
    out: Array | None = None,
) -> Array:
    """`NAME()(q, k, v, ...)` in one call; see `NAME` and `NAME.__call__`."""
    attend = NAME()
    return attend(q, k, v, causal=causal, key_mask=key_mask, cu_seqlens=cu_seqlens, backend=backend, out=out)
'''

FORMULA = '''def FUNCTION(q: Array, k: Array, pairs: Pairs) -> Array:
    """NAME (authors, arXiv:...): A[t, s] = ..."""
    raise NotImplementedError("The formula of `NAME` is not written yet: its weights A, (..., n, M).")


'''

RULE = '''def FUNCTION(x: Row, keys: list[Row], at: Places) -> Row:
    """A[t, s] = ..."""
    raise NotImplementedError("The rule of `NAME` is not written yet: a row of its weights, in balls.")


'''

PAGE = """NAME
====

In one sentence, what it does.

>>> import numpy as np
>>> import linattn as la
>>> q, k, v = np.random.default_rng(0).normal(size=(3, 4, 100, 16))
>>> la.NAME()(q, k, v, causal=True).shape
(4, 100, 16)

Formula
-------

In the paper's notation, then in our names.

As features
-----------

Whether it is a dot product of features, and of which.

Gradient
--------

Line by line: forward ..., so backward ...

What to know
------------

* Kinks, rows without weight, masks, streams.

Measured
--------

.. include:: ../measured/FUNCTION.rst

Differs from the authors' code
------------------------------

Where, and why.

Source
------

Authors: *title*, venue and year, arXiv:...
"""

SOFTMAX = "from linattn.mechanisms.softmax import"

# file, a line that stands there once, what comes before it
BEFORE = (
    ("docs/mechanisms/index.rst", "   * - :doc:`softmax`\n",
     ("   * - :doc:`FUNCTION`\n     - its weights before they are normalised\n"
     "     - :doc:`linear <../engines/linear>`\n")),
    ("linattn/__init__.py", SOFTMAX, "from linattn.mechanisms.FUNCTION import NAME, FUNCTION\n"),
    ("linattn/__init__.py", '    "Plan",\n', '    "NAME",\n'),
    ("linattn/__init__.py", '    "regions",\n', '    "FUNCTION",\n'),
    ("linattn/states.py", SOFTMAX, "from linattn.mechanisms.FUNCTION import NAME\n"),
    ("linattn/audit/quadratic.py", "FORMULAS: dict[str, Formula] = {\n", FORMULA),
    ("linattn/audit/rigorous.py", "RULES: dict[str, Callable[..., Row]] = {\n", RULE),
)  # fmt: skip
# and what comes after it
AFTER = (
    ("linattn/states.py", "for cls in (Combiner, CosFormer,", " NAME,"),
    ("linattn/audit/quadratic.py", "FORMULAS: dict[str, Formula] = {\n", '    "NAME": Formula(FUNCTION),\n'),
    ("linattn/audit/rigorous.py", "RULES: dict[str, Callable[..., Row]] = {\n", '    "NAME": FUNCTION,\n'),
    ("linattn/audit/subjects.py", "SUBJECTS: dict[str, Callable[[int], list[Any]]] = {\n",
     '    "NAME": lambda n: [la.NAME()],\n'),
    ("tests/cases.py", "\nVALUES = [\n", "    la.NAME(),\n"),
    ("asv_bench/benchmarks/attention.py", "\nATTENDS = [\n", "    la.NAME(),\n"),
    ("scripts/measure_docs.py", "\nATTENDS = {\n", '    "FUNCTION": [la.NAME()],\n'),
    ("docs/mechanisms/index.rst", "   combiner\n   softmax\n", "   FUNCTION\n"),
    ("docs/api/index.rst", ".. autoclass:: Softmax\n", "\n.. autoclass:: NAME\n"),
    ("docs/api/index.rst", ".. autofunction:: softmax_attention\n", "\n.. autofunction:: FUNCTION\n"),
    ("CHANGELOG.md", "### Added\n\n", "- `NAME`: in one sentence.\n"),
)  # fmt: skip


def snake(name: str) -> str:
    """`AgentAttention` is agent_attention."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def write(name: str, root: Path) -> list[str]:
    """All pieces; the files, as they stand under `root`. Nothing is written if one has no place."""
    function = snake(name)
    if not name.isidentifier() or not name[0].isupper() or keyword.iskeyword(function):
        raise ValueError(f"`NAME` must be the name of a class, such as Nystrom, got {name!r}.")

    def named(text: str) -> str:
        return text.replace("NAME", name).replace("FUNCTION", function)

    texts = {f"linattn/mechanisms/{function}.py": named(MECHANISM), f"docs/mechanisms/{function}.rst": named(PAGE)}
    page = texts[f"docs/mechanisms/{function}.rst"]
    texts[f"docs/mechanisms/{function}.rst"] = page.replace("====", "=" * len(name), 1)
    for file in texts:
        if (root / file).exists():
            raise ValueError(f"`NAME` must be new, got {name!r}: {file} is there.")
    for file, line, code, is_before in (*((*row, True) for row in BEFORE), *((*row, False) for row in AFTER)):
        text = texts.get(file) or (root / file).read_text(encoding="utf-8")
        if text.count(line) != 1:
            raise ValueError(f"The line to put {name} at stands {text.count(line)} times in {file}: {line.strip()}")
        texts[file] = text.replace(line, named(code) + line if is_before else line + named(code))
    for file, text in texts.items():
        (root / file).write_text(text, encoding="utf-8")
    return list(texts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", metavar="NAME", help="of the class, such as Nystrom")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent, help="another copy")
    options = parser.parse_args()
    try:
        files = write(options.name, options.root)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    python = [file for file in files if file.endswith(".py")]
    for tidy in (["check", "--fix", "--quiet", "--select", "I,RUF022"], ["format", "--quiet"]):
        subprocess.run([sys.executable, "-m", "ruff", *tidy, *python], cwd=options.root, check=True)
    print("Written:", *files, sep="\n  ")
    print(f"Red until they are filled in: nox -s tests -- -k {options.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
