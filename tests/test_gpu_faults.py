"""A fault planted in a kernel is noticed: a barrier, a mask, an index. All of them: `python tests/kernel_faults.py`."""

from __future__ import annotations

import pytest
from kernel_faults import FAULTS, verdict


@pytest.mark.parametrize("file", ["exact", "scan", "sweep"])
def test_without_a_fault_all_is_right(file):
    assert verdict(file) == ""


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault.quick], ids=lambda fault: fault.name)
def test_a_fault_is_noticed(fault):
    assert verdict(fault.name) != ""
