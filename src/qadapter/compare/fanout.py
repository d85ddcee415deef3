"""Where cells run: one after another here, or side by side on a Ray cluster.

What a cell finds depends on its spec alone, so both ways end in the same comparison.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from qadapter.compare import cells
from qadapter.errors import ConfigError, needs

_A = TypeVar("_A")
_B = TypeVar("_B")

# Threads that wait for cells. A method's thread waits for those of its seeds, so there must be more
# than there are methods.
_WAITING = 128


class _EndedError(Exception):
    """Ends a thread that would ask for a cell of a comparison that has ended."""


@dataclass(frozen=True)
class Fanout:
    """How a comparison gets its cells run."""

    launch: Callable[[Path], int]
    """Runs the cell of a directory to its end and returns its exit code."""
    pool: ThreadPoolExecutor | None = None
    """Threads that wait for cells; None waits for one after another."""

    def map(self, function: Callable[[_A], _B], values: Iterable[_A]) -> list[_B]:
        """Return a function's results in the order of its arguments."""
        return list(self.pool.map(function, values) if self.pool else map(function, values))


@contextmanager
def fanout(address: str | None) -> Iterator[Fanout]:
    """Yield the way to run cells: here where `address` is None, else on that Ray cluster.

    A cell takes one of the cluster's GPUs, or one of its CPUs where it has none.

    Args:
        address: as `ray.init` takes it: `auto`, `HOST:PORT`, `ray://…`, or `local` for a cluster of
            this machine that ends with the block.

    Raises:
        ConfigError: Ray is not installed or the cluster is not reached.
    """
    if address is None:
        yield Fanout(cells.launch)
        return
    ray = _connected(address)
    pool, turn, ended = ThreadPoolExecutor(_WAITING), Lock(), False
    asked: list[Any] = []
    try:
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(_launch_there)
        here = os.getcwd()

        def launch(directory: Path) -> int:
            with turn:
                if ended:
                    raise _EndedError
                task = remote.remote(str(directory), here)
                asked.append(task)
            return _done(ray, task)

        yield Fanout(launch, pool)
    except BaseException:
        # Each method's thread would go on with its next cell, and be waited for.
        with turn:
            ended = True
        for task in asked:
            with suppress(ray.exceptions.RayError, ValueError):
                ray.cancel(task, force=True)
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        ray.shutdown()


def _connected(address: str) -> Any:
    with needs("ray", "--ray"):
        import ray
    local: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    try:
        if colon:  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
    except (OSError, ValueError, RuntimeError) as error:
        said = str(error).splitlines()[0]
        raise ConfigError(f"--ray {address}: cannot be reached ({said}); check it.") from error
    return ray


def _launch_there(directory: str, here: str) -> int:
    """Run a cell on the machine that Ray chose; `UNSEEN` where that does not see its directory."""
    if not (Path(directory) / "spec.json").is_file():
        return cells.UNSEEN
    return cells.launch(Path(directory), cwd=here)


def _done(ray: Any, task: Any) -> int:
    """Wait for a task; what Ray itself could not do is the cell's failure."""
    try:
        return int(ray.get(task))
    except ray.exceptions.RayError as error:
        raise cells.CellFailed(f"Ray: {str(error).strip().splitlines()[-1]}") from error
