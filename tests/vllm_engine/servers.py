"""vLLM's server as `qadapter serve --engine vllm` starts it, and questions to it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

KEY = "s3cret"


@contextmanager
def serving(words: Sequence[str], tmp_path: Path, environment: Mapping[str, str]) -> Iterator[int]:
    """Yield the port of a server that runs for the block, and see how it ends.

    Its temporary files are in `tmp_path / "tmp"`, what it says in `tmp_path / "log"`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    temporary, log = tmp_path / "tmp", tmp_path / "log"
    temporary.mkdir()
    command = [sys.executable, "-m", "qadapter.cli", "serve", *words]
    command += ["--engine", "vllm", "--port", str(port)]
    # All that it can say, to be searched for the key.
    own = {"TMPDIR": str(temporary), "QADAPTER_API_KEY": KEY, "VLLM_LOGGING_LEVEL": "INFO"}
    with log.open("w") as file:
        server = subprocess.Popen(
            command, env=os.environ | own | environment, stdout=file, stderr=file
        )
    try:
        _wait_for(port, server, log)
        yield port
    finally:
        server.terminate()
        code = server.wait(120)
    assert code == 0, log.read_text()[-3000:]
    assert KEY not in log.read_text()
    assert not any(temporary.glob("qadapter-vllm*"))


def _wait_for(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 300
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])


def post(port: int, body: dict[str, Any], *, key: str = KEY) -> Any:
    """Return what the server says to a chat request.

    Raises:
        HTTPError: it refuses.
    """
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {key}"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)
