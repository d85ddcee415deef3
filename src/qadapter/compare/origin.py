"""What makes a result: machine, libraries and code, so that a report tells where cells differ."""

from __future__ import annotations

import hashlib
import os
import platform
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

import qadapter
from qadapter import hub

Origin = dict[str, dict[str, str]]
_PACKAGES = ("qadapter", "torch", "transformers", "peft", "trl", "datasets", "lm_eval", "optuna")


@cache
def origin() -> Origin:
    """Return `machine`, and `versions` of libraries and, by digest, of this package's own code."""
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    machine = {
        "cpus": str(os.cpu_count()),
        "processor": hub.processor(),
        "device": str(here),
        "python": platform.python_version(),
        "system": platform.platform(),
    }
    return {"machine": machine, "versions": {n: version(n) for n in _PACKAGES} | {"code": _code()}}


def _code() -> str:
    root = Path(qadapter.__file__).parent
    found = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        found.update(f"{path.relative_to(root)}|{path.stat().st_size}|".encode())
        found.update(path.read_bytes())
    return found.hexdigest()[:16]
