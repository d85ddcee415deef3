"""Several processes from one command, started by accelerate as one of its own files says."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qadapter import ranks
from qadapter.errors import ConfigError, TrainingError

_AGENT = "torch.distributed.elastic"


def launch(path: str, words: Sequence[str], *, processes: int | None = None) -> int:
    """Run `qadapter WORD...` in the processes that an accelerate file names; return the exit code.

    It is 0, or 2 where a process told a user's error. SIGTERM goes on to the processes, which end
    after the same step with a checkpoint; Ctrl-C ends them at once.

    Args:
        path: YAML as `accelerate config` writes it, such as those in `configs/`.
        processes: in all, instead of the file's `num_processes`.

    Raises:
        ConfigError: the file cannot be read, or accelerate does not take it.
        TrainingError: a process died of something else; its own output says of what.
        KeyboardInterrupt: it was Ctrl-C.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from accelerate.utils import patch_environment
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if not Path(path).is_file():
        raise ConfigError(f"--launch: {path} is no file; name one such as configs/ddp.yaml.")
    given = ["--config_file", path, "--main_process_port", "0"]
    if processes is not None:
        given += ["--num_processes", str(processes)]
    args = launch_command_parser().parse_args([*given, "--module", "qadapter.cli", *words])
    args.signals_to_handle = "SIGINT"  # SIGTERM is ours: see below
    logging.getLogger(_AGENT).setLevel(logging.CRITICAL)  # it repeats what the processes tell
    codes: set[int] = set()
    try:
        with _passing_on(), patch_environment(**{ranks.LAUNCHED: "1"}):
            launch_command(args)
    except SignalException as error:
        raise KeyboardInterrupt from error
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
    except subprocess.CalledProcessError as error:  # its text is the command, with a --hub_token
        codes = {error.returncode}
    except (ImportError, KeyError, OSError, TypeError, ValueError) as error:
        raise ConfigError(f"--launch: {path}: accelerate does not take it ({error}).") from error
    if codes and 2 not in codes:
        raise TrainingError(
            f"--launch: a process ended with exit code {max(codes, key=abs)}; what it said stands "
            "above, go on from the last checkpoint by --resume_from_checkpoint true."
        )
    return 2 if codes else 0


@contextmanager
def _passing_on() -> Iterator[None]:
    """Hand SIGTERM on to the processes; the launcher itself would give them thirty seconds."""
    import psutil

    def hand_on(*_: Any) -> None:
        for child in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):  # it ended meanwhile
                child.send_signal(signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, hand_on)
    try:
        yield
    finally:
        sys.stdout.flush()
        signal.signal(signal.SIGTERM, before)
