"""Compile the CUDA kernels for cards that are not there, and hold registers, spills and loops to their budgets.

NVRTC makes machine code without a driver or a card. For each instance and architecture the table in
tests/data/kernel_budgets.json has the registers of a thread, the bytes it spills, and, for one architecture, the
instructions of its longest loop. A rise is an error: more spills, more registers where that costs a resident block,
or 5 % more instructions. `--write` takes the table anew. Needs the wheels nvidia-cuda-nvrtc and nvidia-cuda-nvdisasm.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from linattn.backends.cupy import specs

TABLE = Path(__file__).resolve().parent.parent / "tests" / "data" / "kernel_budgets.json"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
LOOPS = "sm_90"  # whose loops are counted
CUPY_OPTIONS = ("-ftz=true", "--device-as-default-execution-space")  # what RawModule appends
MORE_INSTRUCTIONS = 1.05
REGISTERS = 65536  # of a multiprocessor
REPRESENTATIVES = (  # for a run that has seconds, not minutes: each file, both directions, both widths
    "la_exact_double_32_32", "la_exact_bf16_64_32", "la_scan_float",
    "la_sweep_bf16_64_1_1_0_SWEEP_3", "la_sweep_bf16_64_1_0_1_SWEEP_3", "la_sweep_bf16_64_1_0_1_SUMS_4",
    "la_sweep_f16_128_1_1_0_SWEEP_2",
)  # fmt: skip


@cache
def wheel_file(pattern: str) -> Path:
    """A file of NVIDIA's wheels."""
    found = importlib.util.find_spec("nvidia")
    for folder in found.submodule_search_locations if found else ():
        for file in sorted(Path(folder).glob(f"**/{pattern}")):
            return file
    raise SystemExit(f"{pattern} is not installed: pip install nvidia-cuda-nvrtc nvidia-cuda-nvdisasm")


@cache
def nvrtc() -> ctypes.CDLL:
    ctypes.CDLL(str(wheel_file("libnvrtc-builtins.so.*")))  # found by its name once it is loaded
    return ctypes.CDLL(str(wheel_file("libnvrtc.so.*")))


def compiled(instance: specs.Instance, architecture: str) -> tuple[bytes, str]:
    """(cubin, log) of an instance."""
    library, program = nvrtc(), ctypes.c_void_p()
    library.nvrtcCreateProgram(ctypes.byref(program), instance.source.encode(), b"kernel.cu", 0, None, None)
    options = (*instance.options, f"-arch={architecture}", "--ptxas-options=-v", *CUPY_OPTIONS)
    given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    failed = library.nvrtcCompileProgram(program, len(options), given)

    def text(what: str) -> bytes:
        size = ctypes.c_size_t()
        getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        to = ctypes.create_string_buffer(size.value)
        getattr(library, f"nvrtcGet{what}")(program, to)
        return to.raw

    log = text("ProgramLog").rstrip(b"\0").decode()
    if failed:
        raise SystemExit(f"{instance.name} does not compile for {architecture}:\n{log}")
    cubin = text("CUBIN")
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin, log


def usage(log: str) -> tuple[int, int]:
    """(registers, bytes spilled) from the assembler's lines."""
    registers = re.search(r"Used (\d+) registers", log)
    spilled = re.findall(r"(\d+) bytes spill stores", log)
    if registers is None or not spilled:
        raise SystemExit(f"the assembler does not say what a kernel takes:\n{log}")
    return int(registers[1]), max(map(int, spilled))


def longest_loop(cubin: bytes) -> int:
    """Instructions between a backward branch and where it goes, at most."""
    tool = shutil.which("nvdisasm") or str(wheel_file("bin/nvdisasm"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    labels: dict[str, int] = {}
    longest, count = 0, 0
    for line in listing.splitlines():
        if label := re.match(r"^(\.L_x_\d+):", line):
            labels[label[1]] = count
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            count += 1
            target = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", instruction[1])
            if target and target[1] in labels:
                longest = max(longest, count - labels[target[1]])
    return longest


def measured(instance: specs.Instance, architecture: str) -> dict[str, int]:
    cubin, log = compiled(instance, architecture)
    registers, spilled = usage(log)
    row = {"registers": registers, "spilled": spilled}
    return row | ({"loop": longest_loop(cubin)} if architecture == LOOPS else {})


def blocks(registers: int, threads: int) -> int:
    """Blocks that the registers of a multiprocessor serve."""
    return REGISTERS // (max(8, -(-registers // 8) * 8) * threads)


def faults(name: str, architecture: str, got: dict[str, int], budget: dict[str, int] | None, threads: int) -> list[str]:
    """What has risen."""
    where = f"{name} on {architecture}"
    if budget is None:
        return [f"{where} has no budget"]
    found = []
    if got["spilled"] > budget["spilled"]:
        found.append(f"{where} spills {got['spilled']} bytes, budget {budget['spilled']}")
    if blocks(got["registers"], threads) < blocks(budget["registers"], threads):
        found.append(f"{where} takes {got['registers']} registers, budget {budget['registers']}: a resident block less")
    if "loop" in got and got["loop"] > MORE_INSTRUCTIONS * budget["loop"]:
        found.append(f"{where} has {got['loop']} instructions in its longest loop, budget {budget['loop']}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="instances whose name has one of these in it; all by default")
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES)
    parser.add_argument("--representative", action="store_true", help="a few instances of each kind, in seconds")
    parser.add_argument("--write", action="store_true", help="take the table anew")
    given = parser.parse_args()
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    wanted = [
        instance for instance in specs.INSTANCES
        if (not given.names or any(name in instance.name for name in given.names))
        and (not given.representative or instance.name in REPRESENTATIVES)
    ]  # fmt: skip
    risen = []
    for instance in wanted:
        for architecture in given.arch:
            got = measured(instance, architecture)
            print(f"{instance.name:36} {architecture:7}", *(f"{key} {x}" for key, x in got.items()), flush=True)
            risen += faults(
                instance.name, architecture, got, table.get(instance.name, {}).get(architecture), instance.threads
            )
            if given.write:
                table.setdefault(instance.name, {})[architecture] = got
    if given.write:
        known = {instance.name for instance in specs.INSTANCES}
        TABLE.write_text(
            json.dumps({name: row for name, row in sorted(table.items()) if name in known}, indent=1) + "\n"
        )
        return 0
    print(*risen, sep="\n")
    return bool(risen)


if __name__ == "__main__":
    sys.exit(main())
