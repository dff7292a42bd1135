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


# -- the sweep: 16-bit numbers, contraction of 64 or 128, tiles of 64 columns

SWEEP_CHUNK = SWEEP_TILE = 64
SWEEP_WIDTHS = (64, 128)
MODES = ("SWEEP", "SUMS", "APPLY")
EXTRAS = ("ones", "extra", "bare")  # a column of ones beside c; an extra column of the contraction; neither
SWEEPS = {"bfloat16": EXTRAS, "float16": ("ones", "bare")}  # cotangents over a divisor leave the range of float16


@cache
def sweep(dtype: str, width: int, n_sums: int, extra: str, mode: str) -> Instance:
    blocks = {(64, 1): 3, (128, 1): 2, (64, 2): 2, (128, 2): 1}[width, n_sums]  # a multiprocessor: bounds registers
    return Instance(
        "sweep",
        (
            ("STORED", STORED[dtype]), ("WIDTH", width), ("SUMS", n_sums), ("ONES", int(extra == "ones")),
            ("EXTRA", int(extra == "extra")), ("MODE", f"la::{mode}"), ("BLOCKS", blocks + (mode == "SUMS")),
        ),
    )  # fmt: skip


INSTANCES: tuple[Instance, ...] = (
    *(exact(dtype, *size) for dtype, sizes in EXACT_SIZES.items() for size in sizes),
    *(scan(dtype) for dtype in ("float64", "float32")),
    *(
        sweep(dtype, width, n_sums, extra, mode)
        for dtype, extras in SWEEPS.items()
        for width in SWEEP_WIDTHS
        for n_sums in (1, 2)
        for extra in extras
        for mode in MODES
    ),
)
