"""Makes transformers' auto classes know exported policies once `qadapter` is imported.

`import qadapter` imports neither transformers nor torch. So the classes are registered when the
modules that hold transformers' registers are imported, or at once where they already were.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType

_REGISTERS = {
    "transformers.models.auto.configuration_auto": "qadapter.standalone.config",
    "transformers.models.auto.modeling_auto": "qadapter.standalone.model",
}
"""A module of transformers, and the one of ours that puts a class into its register."""


class _Loader(SourceFileLoader):
    """Runs the module, then imports the one of ours that registers with it."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        import_module(_REGISTERS[module.__name__])


class _Finder(MetaPathFinder):
    """Finds the two modules as Python does, and has `_Loader` run them."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _REGISTERS:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.origin is not None:
            spec.loader = _Loader(name, spec.origin)
        return spec


def register() -> None:
    """Register the classes now or when transformers' registers are imported; called once."""
    for theirs, ours in _REGISTERS.items():
        if theirs in sys.modules:
            import_module(ours)
    sys.meta_path.insert(0, _Finder())
