"""The processes of one run: who goes first, what they agree on, which of them tells an error."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

from qadapter.errors import UserError

Made = TypeVar("Made")

LAUNCHED = "QADAPTER_LAUNCHED"
"""Set in the environment of what `--launch` starts."""
_TOLD = "qadapter/told"
_PATIENCE = timedelta(seconds=20)
"""How long a failed process waits for the store in which it is noted who tells."""


def number() -> int:
    """Return this process's number, 0 where there is one alone."""
    return int(os.environ.get("RANK", "0"))


def local_number() -> int:
    """Return this process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def several() -> bool:
    """Return whether a launcher started more than one process."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def launched() -> bool:
    """Return whether a launcher started this process, be it alone."""
    return several() or LAUNCHED in os.environ


@contextmanager
def first_alone() -> Iterator[None]:
    """Run the block on each machine's first process alone, then on its others.

    Every process must come here.
    """
    import torch.distributed as dist

    if not (several() and dist.is_initialized()):
        yield
        return
    from accelerate import PartialState

    with PartialState().local_main_process_first():
        yield


def from_first(make: Callable[[], Made]) -> Made:
    """Return in every process what the first of all makes; every process must come here.

    Raises:
        UserError: what it raises, in every process, so that none waits for it.
    """
    import torch.distributed as dist

    if not (several() and dist.is_initialized()):
        return make()
    from accelerate.utils import broadcast_object_list

    made: list[Any] = [None, None]
    if number() == 0:
        try:
            made[0] = make()
        except UserError as error:
            made[1] = error
    value, failure = broadcast_object_list(made)
    if failure is not None:
        raise cast(UserError, failure)
    return cast(Made, value)


def all_agree(accelerator: Any, here: bool) -> bool:
    """Return whether it is so in every process; each must ask."""
    if accelerator.num_processes == 1:
        return here
    import torch

    return bool(accelerator.gather(torch.tensor([here], device=accelerator.device)).all())


def first_to_tell(*, unasked: bool) -> bool:
    """Return whether no other process of this run has told an error: one bad file is one sentence.

    Noted in the launcher's store, which outlives the process that told.

    Args:
        unasked: what to return where that store is not to be had.
    """
    if not several():
        return True
    from torch.distributed import TCPStore  # type: ignore[attr-defined,unused-ignore]

    host, port = os.environ.get("MASTER_ADDR", "localhost"), os.environ.get("MASTER_PORT")
    if port is None:
        return unasked
    try:
        store = TCPStore(host, int(port), is_master=False, timeout=_PATIENCE)
        return bool(store.add(_TOLD, 1) == 1)
    except (OSError, RuntimeError):  # it is gone with the process that held it
        return unasked
