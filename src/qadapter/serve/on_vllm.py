"""`qadapter serve --engine vllm`: vLLM's own server, started on an export and ended with us."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from qadapter.errors import ConfigError, UserError

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


def is_export(directory: str | Path) -> bool:
    """Return whether a directory is what `qadapter export --format policy` writes."""
    try:
        config = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == "qadapter"


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


def run(words: Sequence[str], *, api_key: str | None) -> None:
    """Run vLLM's server until it ends; SIGTERM and Ctrl-C end it in its own good order.

    Args:
        words: what `command` returned.
        api_key: reaches vLLM in its environment, where other users cannot see it.

    Raises:
        UserError: it ended by itself, with an error.
    """
    environment = os.environ | ({} if api_key is None else {"VLLM_API_KEY": api_key})
    asked: list[int] = []
    # A session of its own: a terminal's Ctrl-C comes through us, once.
    process = subprocess.Popen(words, env=environment, start_new_session=True)

    def end(number: int, _: object) -> None:
        asked.append(number)
        process.send_signal(signal.SIGTERM if len(asked) == 1 else signal.SIGKILL)

    before = {n: signal.signal(n, end) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code and not asked:
        raise UserError(f"--engine vllm: vLLM ended with {code}; what it said is above.")
