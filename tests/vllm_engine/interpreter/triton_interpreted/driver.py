"""The driver: it says that there is a device."""

from __future__ import annotations

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class Driver(DriverBase):
    """Of a CPU, for which nothing is compiled or launched."""

    @staticmethod
    def is_active() -> bool:
        """Return that it is there."""
        return True

    def get_current_target(self) -> GPUTarget:
        """Return what is compiled for, if anything were."""
        return GPUTarget("cpu", 0, 1)

    def get_active_torch_device(self) -> torch.device:
        """Return where tensors lie."""
        return torch.device("cpu")


Driver.__abstractmethods__ = frozenset()
