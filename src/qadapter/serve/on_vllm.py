"""`qadapter serve --engine vllm`: vLLM's own server, started on an export and ended with us."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qadapter.errors import ConfigError, UserError
from qadapter.strength import Strength
from qadapter.vllm_plugin import FAMILIES

# What `vllm serve` runs; the program of that name is not in every build of vLLM.
_SERVER = "vllm.entrypoints.openai.api_server"


def check_installed() -> None:
    """Raise before an export is made for nothing.

    Raises:
        ConfigError: vLLM is not beside us.
    """
    if find_spec("vllm") is None:
        raise ConfigError(
            "--engine vllm: vLLM is not installed here; install qadapter into the environment that "
            "has it, or leave --engine out."
        )


def check_family(model_type: str) -> None:
    """Raise before vLLM does, and before an export is made for nothing.

    Raises:
        ConfigError: the plugin does not know bases of this kind.
    """
    if model_type not in FAMILIES:
        raise ConfigError(
            f"--engine vllm: the plugin knows {', '.join(FAMILIES)} and not {model_type}; leave "
            "--engine out."
        )


def dtype_of(export: str | Path, strength: Strength | None) -> str:
    """Return the dtype of an export's weights, as vLLM spells it.

    vLLM's own choice for weights in float32 is a half precision.

    Raises:
        ConfigError: the export is of a family that the plugin does not know, is damaged, or has
            another number of adapters than the strength.
    """
    from qadapter.standalone.config import QAdapterPolicyConfig

    try:
        config = QAdapterPolicyConfig.from_pretrained(export)
        if strength is not None:
            config.update({"strength": strength})
            config.check()
    except (OSError, ValueError, KeyError, TypeError) as error:
        said = str(error).partition("\n")[0]
        raise ConfigError(f"{export}: {said}; export the policy anew, or mend that.") from error
    check_family(config.text_config.model_type)
    return "auto" if config.dtype is None else str(config.dtype).removeprefix("torch.")


def command(
    export: str | Path,
    *,
    name: str,
    host: str,
    port: int,
    strength: float | Sequence[float] | None,
    dtype: str,
    max_batch: int,
    max_context: int | None = None,
    more: str = "",
) -> list[str]:
    """Return the command line of vLLM's server.

    Args:
        export: directory of format `policy`.
        name: of the policy, to clients.
        strength: of all requests (METHOD §5); None is the export's own.
        more: further flags of vLLM, as a shell would read them.

    Raises:
        ConfigError: `more` is not readable.
    """
    try:
        added = shlex.split(more)
    except ValueError as error:
        raise ConfigError(f"--vllm-args: cannot be read ({error}); quote it as a shell.") from error
    words = [sys.executable, "-m", _SERVER, "--model", str(export), "--served-model-name", name]
    words += ["--host", host, "--port", str(port), "--dtype", dtype]
    words += ["--max-num-seqs", str(max_batch)]
    if strength is not None:
        words += ["--hf-overrides", json.dumps({"strength": strength})]
    words += [] if max_context is None else ["--max-model-len", str(max_context)]
    return [*words, *added]


@contextmanager
def handled(handler: Callable[[int, Any], object]) -> Iterator[None]:
    """Have these signals come to a function: SIGTERM, Ctrl-C, and SIGHUP where it is not ignored.

    A terminal that closes sends SIGHUP; under nohup nobody wants to hear of it.
    """
    numbers = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, found in before.items():
            signal.signal(number, found)


def leave(number: int, _: object) -> None:
    """Leave with the exit code of a signal, and so by way of what is to be tidied up."""
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


def run(words: Sequence[str], *, api_key: str | None) -> None:
    """Run vLLM's server until it ends; a signal ends it in its own good order, a second at once.

    None of its processes is left.

    Args:
        words: what `command` returned.
        api_key: reaches vLLM in its environment, where other users cannot see it.

    Raises:
        UserError: it ended by itself, with an error.
    """
    environment = os.environ | ({} if api_key is None else {"VLLM_API_KEY": api_key})
    asked: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def pass_on() -> None:
        if process is None or not asked:
            return
        if len(asked) == 1:
            process.send_signal(signal.SIGTERM)
        else:
            _kill_all(process.pid)

    def end(number: int, _: object) -> None:
        asked.append(number)
        pass_on()

    with handled(end):
        # A session of its own: a terminal's Ctrl-C comes through us, once.
        process = subprocess.Popen(words, env=environment, start_new_session=True)
        pass_on()  # what came before there was anybody to tell
        try:
            code = process.wait()
        finally:
            _kill_all(process.pid)
    if code and not asked:
        raise UserError(f"--engine vllm: vLLM ended with {code}; what it said is above.")


def _kill_all(session: int) -> None:
    """End all processes of the server that are still there; it may have left some of its own."""
    with suppress(ProcessLookupError):
        os.killpg(session, signal.SIGKILL)
