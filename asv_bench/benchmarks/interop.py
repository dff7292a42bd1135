"""What a framework's operator costs beside the plain call: tensors so small that the kernel hardly counts."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np

import linattn as la

SHAPE = (2, 4, 16)


class TorchOperator:
    """Read `time_operator` less `time_plain`."""

    params = [la.Linear("elu1"), la.CosFormer(64), la.Softmax()]
    param_names = ["attend"]

    def setup(self, attend):
        if find_spec("torch") is None:
            raise NotImplementedError("no torch")
        import torch

        from linattn.interop.torch import attention

        self.arrays = np.random.default_rng(0).normal(size=(3, *SHAPE)).astype("float32")
        self.tensors = [torch.from_numpy(x) for x in self.arrays]
        self.leaves = [x.clone().requires_grad_() for x in self.tensors]
        self.operator = attention
        for run in (self.time_plain, self.time_operator, self.time_operator_with_grad):
            run(attend)  # compile before the clock starts

    def time_plain(self, attend):
        attend(*self.arrays, causal=True)

    def time_operator(self, attend):
        self.operator(*self.tensors, attend, causal=True)

    def time_operator_with_grad(self, attend):
        self.operator(*self.leaves, attend, causal=True)
