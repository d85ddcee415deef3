"""Adapters that come and go while a server runs, from one directory that its owner allowed."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path

from qadapter.errors import ConfigError, UserError
from qadapter.model.adapter import FILES
from qadapter.serve.asking import Desk, Refused, Served, closing
from qadapter.serve.engine import EngineClosed, EngineFull


class Shelf:
    """A directory from under which clients may have adapters loaded.

    Raises:
        ConfigError: there is no such directory.
    """

    def __init__(self, root: str | Path) -> None:
        if not Path(root).is_dir():
            raise ConfigError(f"--adapter-dir: {root} is no directory; name one that is there.")
        self.root = Path(root).resolve()
        self._coming: set[str] = set()

    def find(self, path: str) -> Path:
        """Return the directory of an adapter, whole or from the root on.

        What lies outside looks as if it were not there, wherever dots and symbolic links lead.

        Raises:
            Refused: there is none inside.
        """
        try:
            place = (self.root / path).resolve(strict=True)
            files = [(place / name).resolve(strict=True) for name in FILES]
        except (OSError, RuntimeError, ValueError):  # not there, a ring of links, a zero byte
            files = []
        inside = [file.is_relative_to(self.root) and file.is_file() for file in files]
        if not (inside and all(inside) and place.is_relative_to(self.root)):
            raise Refused(
                f"there is no adapter {path!r} in the directory that was allowed",
                param="lora_path",
                code="adapter_not_found",
                status=404,
            )
        return place

    async def load(self, desk: Desk, name: str, path: str) -> Served:
        """Serve the adapter of a directory under a name, from when it is loaded.

        Raises:
            Refused: the name is taken, there are too many, or the adapter cannot be used.
        """
        if name in desk.served or name in self._coming:
            raise Refused(f"another adapter is named {name!r}", param="lora_name")
        place = self.find(path)
        self._coming.add(name)
        try:
            adapter = await asyncio.wrap_future(desk.engine.load(name, place))
        except EngineClosed:
            raise closing() from None
        except EngineFull:
            raise Refused(
                f"{desk.engine.max_adapters} adapters are loaded; unload one first, or wait until "
                "the answers of those that left are complete",
                param="lora_name",
            ) from None
        except UserError as problem:
            # Where it lies, or its base, is nobody's business.
            told = _without_places(str(problem).replace(str(place), path))
            raise Refused(told, param="lora_path", code="adapter_unusable") from problem
        finally:
            self._coming.discard(name)
        served = desk.served[name] = Served(adapter, 1.0, int(time.time()))
        return served

    def unload(self, desk: Desk, name: str) -> None:
        """Serve an adapter no longer; what was taken is answered before it goes.

        Raises:
            Refused: there is none of that name, or the server was started with it.
        """
        if name not in desk.served:
            raise Refused(
                f"there is no adapter {name!r}",
                param="lora_name",
                code="adapter_not_found",
                status=404,
            )
        if name in desk.first:
            raise Refused(f"the server was started with {name!r}, which stays", param="lora_name")
        desk.engine.unload(desk.served.pop(name).adapter)


def _without_places(told: str) -> str:
    """Return a message with only the last parts of absolute paths, quoted ones with spaces."""
    return re.sub(r"(?<=')/[^']*/|(?<![\w.'/])/\S*/", "", told)
