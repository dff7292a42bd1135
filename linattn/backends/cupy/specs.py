"""The kernels there are: one list, which compile checks, tests, budgets and `precompile` go through.

An instance is a file of cu/ with values for its macros. Its source is one string, headers pasted in: CuPy's cache of
compiled kernels goes by the text, not by files that the text includes. No CUDA and no CuPy is needed here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files

HEADERS = {"exact": ("numbers", "params"), "scan": ("numbers", "params"), "sweep": ("numbers", "params", "tiles")}
STORED = {"float64": "double", "float32": "float", "float16": "la::f16", "bfloat16": "la::bf16"}
THREADS = {"exact": 256, "scan": 256, "sweep": 128}
STANDARD = "-std=c++17"


@cache
def text(name: str) -> str:
    """A file of cu/."""
    return (files(__package__) / "cu" / name).read_text(encoding="utf-8")


@cache
def source(file: str) -> str:
    """The whole text of a kernel file."""
    return "\n".join([*(text(f"{header}.cuh") for header in HEADERS[file]), text(f"{file}.cu")])


@dataclass(frozen=True)
class Instance:
    """A kernel file with its macros."""

    file: str
    macros: tuple[tuple[str, str | int], ...]

    @cached_property
    def name(self) -> str:
        """The kernel's name in the machine code."""
        values = (str(value).removeprefix("la::") for _, value in self.macros)
        return "_".join(["la", self.file, *values])

    @cached_property
    def options(self) -> tuple[str, ...]:
        """Options for the compiler."""
        return (STANDARD, *(f"-DLA_{key}={value}" for key, value in self.macros), f"-DLA_NAME={self.name}")

    @property
    def source(self) -> str:
        return source(self.file)

    @property
    def threads(self) -> int:
        return THREADS[self.file]


# -- the exact kernel: chunk of tokens x tile of columns, the larger first; the smaller for cards with little memory

EXACT_SIZES = {"float64": ((32, 32), (32, 16))} | dict.fromkeys(
    ("float32", "float16", "bfloat16"), ((64, 32), (32, 16))
)


@cache
def exact(dtype: str, chunk: int, tile: int) -> Instance:
    return Instance("exact", (("STORED", STORED[dtype]), ("CHUNK", chunk), ("TILE", tile)))


@cache
def scan(dtype: str) -> Instance:
    """Of states in `dtype`, an accumulation dtype."""
    return Instance("scan", (("STORED", STORED[dtype]),))


INSTANCES: tuple[Instance, ...] = (
    *(exact(dtype, *size) for dtype, sizes in EXACT_SIZES.items() for size in sizes),
    *(scan(dtype) for dtype in ("float64", "float32")),
)
