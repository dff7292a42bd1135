"""From a plan to the GPU: the only file that imports CuPy.

A launch goes to the device of the arrays, in CuPy's current stream there, and nothing waits for it. Kernels are
compiled when first used, once a device; CuPy keeps them on disk.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

from . import specs
from .plan import Card, Launch

OLDEST = (8, 0)  # compute capability: bf16 and asynchronous copies
OLDEST_DRIVER = 12000
PLAIN_SHARED = 48 * 1024  # bytes of shared memory that need no opt-in


def cupy() -> Any:
    """CuPy, or an ImportError that says why there is none."""
    try:
        return import_module("cupy")
    except (ImportError, RuntimeError, OSError) as error:
        raise ImportError(f"CuPy cannot be imported: {error}") from error


def why_not() -> str | None:
    """Why no kernel can be launched here, in one sentence; None if one can."""
    try:
        runtime = cupy().cuda.runtime
    except ImportError as error:
        return str(error)
    try:
        driver = runtime.driverGetVersion()
        count = runtime.getDeviceCount() if driver else 0
    except RuntimeError as error:  # CUDARuntimeError is one
        return f"no NVIDIA driver answers: {error}"
    if not driver:
        return "there is no NVIDIA driver"
    if driver < OLDEST_DRIVER:
        return f"the NVIDIA driver is for CUDA {driver // 1000}, 12 or later is needed"
    return None if count else "there is no NVIDIA GPU"


class Device:
    """One GPU: its limits, and kernels on it."""

    def __init__(self, number: int) -> None:
        self.cupy = cupy()
        self.number = number
        get = self.cupy.cuda.Device(number).attributes
        self.card = Card(
            get["MultiProcessorCount"],
            get["MaxSharedMemoryPerBlockOptin"],
            (get["ComputeCapabilityMajor"], get["ComputeCapabilityMinor"]),
        )
        self.kernels: dict[specs.Instance, Any] = {}
        if self.card.capability < OLDEST:
            raise RuntimeError(
                f"`backend='cupy'` needs compute capability {OLDEST[0]}.{OLDEST[1]} or later, "
                f"got {self.card.capability[0]}.{self.card.capability[1]} of device {number}."
            )

    def __enter__(self) -> Device:
        self.active = self.cupy.cuda.Device(self.number)
        self.active.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.active.__exit__(*error)

    @staticmethod
    def pointer(x: Any) -> int:
        return int(x.data.ptr)

    def kernel(self, instance: specs.Instance) -> Any:
        """The compiled kernel; the first call compiles it or loads it from CuPy's cache."""
        found = self.kernels.get(instance)
        if found is None:
            module = self.cupy.RawModule(code=instance.source, options=instance.options)
            found = self.kernels[instance] = module.get_function(instance.name)
        return found

    def run(self, launch: Launch) -> None:
        """In the current stream, without waiting."""
        kernel = self.kernel(launch.instance)
        if launch.shared > max(PLAIN_SHARED, kernel.max_dynamic_shared_size_bytes):
            kernel.max_dynamic_shared_size_bytes = self.card.shared
        kernel((launch.grid,), (launch.instance.threads,), (launch.params,), shared_mem=launch.shared)


@cache
def device(number: int) -> Device:
    return Device(number)


def device_of(x: Any) -> Device:
    """The device where `x` lies."""
    return device(int(x.device.id))


def precompile(number: int | None = None) -> int:
    """Compile all kernels for a device, the current one by default, into CuPy's cache on disk; how many there are."""
    where = device(cupy().cuda.runtime.getDevice() if number is None else number)
    with where:
        for instance in specs.INSTANCES:
            where.kernel(instance)
    return len(specs.INSTANCES)
