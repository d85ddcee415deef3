"""Q-Adapter: teach an aligned language model a new preference without losing what it knows."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qadapter.registration import register

if TYPE_CHECKING:
    from qadapter.config import QAdapterConfig, QConfig
    from qadapter.data import Pair, read_pairs
    from qadapter.errors import UserError
    from qadapter.model import QAdapterModel
    from qadapter.policy import Policy
    from qadapter.trainer import QAdapterTrainer

_HOMES = {
    "Pair": "data",
    "Policy": "policy",
    "QAdapterConfig": "config",
    "QAdapterModel": "model",
    "QAdapterTrainer": "trainer",
    "QConfig": "config",
    "UserError": "errors",
    "read_pairs": "data",
}

__all__ = [
    "Pair",
    "Policy",
    "QAdapterConfig",
    "QAdapterModel",
    "QAdapterTrainer",
    "QConfig",
    "UserError",
    "read_pairs",
]

# AutoModelForCausalLM then loads what `qadapter export` wrote.
register()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qadapter' has no attribute {name!r}")
    return getattr(import_module(f"qadapter.{_HOMES[name]}"), name)
