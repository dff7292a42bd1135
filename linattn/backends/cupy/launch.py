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
        driver, wanted = runtime.driverGetVersion(), runtime.runtimeGetVersion()
        if driver == 0:
            return "there is no NVIDIA driver"
        if driver // 1000 < wanted // 1000:
            had, needed = driver // 1000, wanted // 1000
            return f"the NVIDIA driver is for CUDA {had}, this CuPy for CUDA {needed}: update the driver"
        return None if runtime.getDeviceCount() else "there is no NVIDIA GPU"
    except RuntimeError as error:  # CUDARuntimeError is one
        return f"the NVIDIA driver does not answer: {error}"


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
        self.raised: set[specs.Instance] = set()  # kernels that may have more shared memory than plainly
        self.active: list[Any] = []

    def __enter__(self) -> Device:
        device = self.cupy.cuda.Device(self.number)
        device.__enter__()
        self.active.append(device)
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.active.pop().__exit__(kind, error, trace)
        if isinstance(error, MemoryError):
            raise MemoryError(f"Device {self.number} has not enough memory for this call: {error}") from error

    def check(self, **arrays: Any) -> None:
        """All arrays lie on this device: a kernel would read anything else as if it did."""
        for name, x in arrays.items():
            if x is not None and int(x.device.id) != self.number:
                raise ValueError(
                    f"`{name}` must be on device {self.number}, where q is, got device {int(x.device.id)}."
                )

    @staticmethod
    def pointer(x: Any) -> int:
        return int(x.data.ptr)

    def kernel(self, instance: specs.Instance) -> Any:
        """The compiled kernel; the first call compiles it or loads it from CuPy's cache."""
        found = self.kernels.get(instance)
        if found is None:
            try:
                module = self.cupy.RawModule(code=instance.source, options=instance.options)
                found = self.kernels[instance] = module.get_function(instance.name)
            except (RuntimeError, OSError) as error:
                said = str(error).partition("\n")[0]
                raise RuntimeError(
                    f"`backend='cupy'`: the kernel {instance.name} cannot be compiled: {said}"
                ) from error
        return found

    def run(self, launch: Launch) -> None:
        """In the current stream, without waiting."""
        kernel = self.kernel(launch.instance)
        if launch.shared > PLAIN_SHARED and launch.instance not in self.raised:
            kernel.max_dynamic_shared_size_bytes = self.card.shared
            self.raised.add(launch.instance)
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
