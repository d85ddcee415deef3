"""What makes a result: machine, libraries and code, so that a report tells where cells differ."""

from __future__ import annotations

import os
import platform
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

import qadapter
from qadapter import hub
from qadapter.config import bf16_supported
from qadapter.errors import needs
from qadapter.files import code_digest

Origin = dict[str, dict[str, str]]
_LIBRARIES = ("torch", "transformers", "peft", "trl", "datasets", "lm_eval", "optuna")
_PACKAGES = ("qadapter", *_LIBRARIES, "scikit-learn", "matplotlib", "jinja2")


@cache
def origin() -> Origin:
    """Return `machine`, and `versions` of libraries and, by digest, of this package's own code.

    Raises:
        ConfigError: a library is not installed.
    """
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    machine = {
        "cpus": str(os.cpu_count()),
        "processor": hub.processor(),
        "device": str(here),
        "training": "bfloat16" if bf16_supported() else "float32",
        "python": platform.python_version(),
        "system": platform.platform(),
    }
    code = code_digest(Path(qadapter.__file__).parent)[:16]
    with needs("compare", "compare"):
        versions = {name: version(name) for name in _PACKAGES}
    return {"machine": machine, "versions": versions | {"code": code}}
