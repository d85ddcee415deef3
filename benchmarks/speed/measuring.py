"""What every case needs: its memory, and the machine's name."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path
from typing import Any

import torch
from measured import versions

from qadapter import hub
from qadapter.config import bf16_supported
from qadapter.estimate import peak_memory


class Memory:
    """Peak memory of this process, and how much of it came after this object was made.

    Linux forgets the peak so far when asked to; elsewhere the part that came after is understated.
    """

    def __init__(self) -> None:
        self._loading = peak_memory()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._before = peak_memory()

    def figures(self) -> dict[str, float]:
        """Return `peak_gib` of the whole process and `extra_gib` above what was there before."""
        now = peak_memory()
        return {"peak_gib": max(now, self._loading), "extra_gib": now - self._before}


def own_dtype() -> torch.dtype:
    """Return what training and serving choose on this machine."""
    return torch.bfloat16 if bf16_supported() else torch.float32


def name_of(dtype: torch.dtype) -> str:
    """Return a dtype's name without its module."""
    return str(dtype).removeprefix("torch.")


def machine() -> dict[str, Any]:
    """Return the processor, whether it has bf16, cores, load, and the libraries' versions."""
    return {
        "cpu": hub.processor(),
        "bf16": bf16_supported(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": versions(),
    }
