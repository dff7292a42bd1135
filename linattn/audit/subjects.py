"""What is audited: a row for each mechanism. A new mechanism is a row here, a formula in `quadratic` and a rule in
`rigorous`; a test fails while one is missing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import linattn as la

__all__ = ["SUBJECTS", "Subject"]


@dataclass(frozen=True)
class Subject:
    """Which engine runs a mechanism, and the values of it that are audited for sequences of at most n tokens."""

    engine: str
    values: Callable[[int], list[Any]]


SUBJECTS: dict[str, Subject] = {
    "Linear": Subject("linear", lambda n: [la.Linear(), la.Linear("relu"), la.Linear("relu", normalize=False)]),
    "CosFormer": Subject("linear", lambda n: [la.CosFormer(max(n, 1))]),
    "Softmax": Subject("softmax", lambda n: [la.Softmax()]),
}
