"""A server in a thread, for tests that talk to it over HTTP."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx2

from qadapter.policy import Policy
from qadapter.serve.app import create_app
from qadapter.serve.asking import Desk, Limits
from qadapter.serve.engine import Engine
from qadapter.serve.run import listen, server
from qadapter.serve.shelf import Shelf

MESSAGES = [{"role": "user", "content": "Say 3"}]
LIMITS = Limits(max_context=200, max_tokens=64, max_body=20_000)


class Running:
    """A server in a thread of this process."""

    def __init__(
        self,
        policy: Policy,
        *,
        api_key: str | None = None,
        strength: float | Sequence[float] = 1.0,
        shelf: Shelf | None = None,
        **engine: int,
    ) -> None:
        self.engine = Engine(policy, **engine)
        self.desk = Desk(self.engine, strength=strength, limits=LIMITS)
        bound = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        self.server = server(create_app(self.desk, api_key=api_key, shelf=shelf), self.engine)
        # A daemon: a test that fails before it stops this does not keep pytest from its end.
        self.thread = threading.Thread(target=self.server.run, args=([bound],), daemon=True)
        self.thread.start()
        until(lambda: self.server.started)
        # Idle connections are left well before the server closes them, which is after 5 seconds.
        limits = httpx2.Limits(keepalive_expiry=1)
        self.client = httpx2.Client(base_url=self.url, timeout=60, limits=limits)

    def chat(self, **body: Any) -> httpx2.Response:
        fields = {"messages": MESSAGES, "max_tokens": 12, "temperature": 0, **body}
        return self.client.post("/v1/chat/completions", json=fields)

    def stop(self) -> None:
        self.client.close()
        self.engine.close()
        self.thread.join(60)
        assert not self.thread.is_alive()


def until(true: Callable[[], bool], *, seconds: float = 60) -> None:
    """Wait until it is."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)
