"""What goes wrong with a GPU is said in one sentence, and the process goes on. CuPy and the driver are played."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from linattn import backends
from linattn.backends.cupy import launch, plan, specs


class Refused(RuntimeError):
    """As CUDARuntimeError."""


class OutOfMemory(MemoryError):
    """As CuPy's."""


def played(monkeypatch, *, driver=13000, runtime=13000, count=1, shared=232448, fails=None):
    """A CuPy of that driver, with cards that compile nothing."""

    def asked(value):
        def answer(*_):
            if isinstance(value, Exception):
                raise value
            return value

        return answer

    class Device:
        def __init__(self, number):
            self.id, self.attributes = number, {
                "MultiProcessorCount": 4, "MaxSharedMemoryPerBlockOptin": shared,
                "ComputeCapabilityMajor": 9, "ComputeCapabilityMinor": 0,
            }  # fmt: skip

        def __enter__(self):
            ran.append(("enter", self.id))

        def __exit__(self, *_):
            ran.append(("exit", self.id))

    class Kernel:
        max_dynamic_shared_size_bytes = 48 * 1024

        def __call__(self, grid, block, args, shared_mem):
            ran.append((grid, block, shared_mem, self.max_dynamic_shared_size_bytes))

    def module(code, options):
        if fails:
            raise fails
        ran.append(("compiled", options))
        return SimpleNamespace(get_function=lambda name: Kernel())

    ran = []
    cupy = ModuleType("cupy")
    calls = {"driverGetVersion": driver, "runtimeGetVersion": runtime, "getDeviceCount": count, "getDevice": 0}
    cupy.cuda = SimpleNamespace(
        runtime=SimpleNamespace(**{name: asked(value) for name, value in calls.items()}), Device=Device
    )
    cupy.RawModule = module
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    launch.device.cache_clear()
    return ran


@pytest.fixture(autouse=True)
def forgotten():
    yield
    launch.device.cache_clear()
    backends.load.cache_clear()


@pytest.mark.parametrize(
    "driver, said",
    [
        ({"driver": 0}, "there is no NVIDIA driver"),
        ({"driver": 12080}, "the NVIDIA driver is for CUDA 12, this CuPy for CUDA 13: update the driver"),
        ({"count": 0}, "there is no NVIDIA GPU"),
        ({"driver": Refused("cudaErrorUnknown")}, "the NVIDIA driver does not answer: cudaErrorUnknown"),
    ],
)
def test_why_no_kernel_can_run(monkeypatch, driver, said):
    played(monkeypatch, **driver)
    backends.load.cache_clear()
    assert launch.why_not() == said
    assert backends.load("cupy", "linear") == said


def test_without_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    backends.load.cache_clear()
    assert backends.load("cupy", "linear").startswith("CuPy cannot be imported:")


def test_with_a_card_the_room_is_there(monkeypatch):
    played(monkeypatch)
    backends.load.cache_clear()
    assert backends.load("cupy", "linear").__name__ == "linattn.backends.cupy.linear"
    assert backends.load("cupy", "softmax").__name__ == "linattn.backends.cupy.softmax"


def test_arrays_on_two_devices(monkeypatch):
    played(monkeypatch)
    there = SimpleNamespace(device=SimpleNamespace(id=1))
    with pytest.raises(ValueError, match=r"^`v` must be on device 0, where q is, got device 1\.$"):
        launch.device(0).check(k=SimpleNamespace(device=SimpleNamespace(id=0)), v=there)


def test_not_enough_memory(monkeypatch):
    ran = played(monkeypatch)
    with pytest.raises(MemoryError, match=r"^Device 1 has not enough memory for this call: 8 bytes$"), launch.device(1):
        raise OutOfMemory("8 bytes")
    assert ran[-2:] == [("enter", 1), ("exit", 1)]  # the device that was current is so again


def test_a_kernel_that_does_not_compile(monkeypatch):
    played(monkeypatch, fails=Refused("libnvrtc.so is missing\nand more"))
    with pytest.raises(
        RuntimeError, match=r"^`backend='cupy'`: the kernel la_scan_float cannot be compiled: lib\S+ is missing$"
    ):
        launch.device(0).kernel(specs.scan("float32"))


def test_a_launch(monkeypatch):
    """Grid, block and shared memory arrive; a kernel is compiled once; the opt-in is raised once, when it is needed."""
    ran = played(monkeypatch)
    device, params = launch.device(0), np.zeros((), plan.PARAMS)
    instance = specs.exact("float32", 64, 32)
    for shared in (1024, 90000, 90000):
        device.run(plan.Launch(instance, 7, shared, params))
    assert ran[0][0] == "compiled"
    assert ran[1:] == [((7,), (256,), 1024, 48 * 1024), *[((7,), (256,), 90000, 232448)] * 2]


def test_precompile_goes_through_the_list(monkeypatch):
    ran = played(monkeypatch)
    assert launch.precompile() == len(specs.INSTANCES)
    assert sum(what[0] == "compiled" for what in ran) == len(specs.INSTANCES)


def test_pointer_and_device_of_an_array(monkeypatch):
    played(monkeypatch)
    x = SimpleNamespace(device=SimpleNamespace(id=1), data=SimpleNamespace(ptr=4096))
    assert launch.device_of(x) is launch.device(1)
    assert launch.Device.pointer(x) == 4096

    assert launch.device(1).card == plan.Card(4, 232448, (9, 0))
