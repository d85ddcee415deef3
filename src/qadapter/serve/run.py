"""`qadapter serve`: a socket, a policy, an engine, and a server that ends in good order."""

from __future__ import annotations

import logging
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from qadapter.errors import ConfigError
from qadapter.policy import Policy
from qadapter.serve.app import create_app
from qadapter.serve.asking import Desk, Limits
from qadapter.serve.engine import Engine
from qadapter.serve.gate import JsonLines
from qadapter.serve.shelf import Shelf
from qadapter.strength import Strength

PATIENCE = 10
"""Seconds that a client has to send or read what it began, once the engine has finished."""

_log = logging.getLogger(__name__)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket bound there, before anything slow is done.

    Raises:
        ConfigError: the port is taken, or the address is not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise ConfigError(
            f"{host}:{port}: cannot be listened on ({error.strerror or error}); "
            "choose another --port or --host."
        ) from error
    return bound


class _Server(uvicorn.Server):
    """Ends when the engine has: on a signal it takes no more requests and finishes those it has."""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self._engine = engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Close the engine; at a second signal, leave without waiting for it."""
        if self._engine.closed:
            self.should_exit = self.force_exit = True
        self._engine.close(wait=False)

    async def on_tick(self, counter: int) -> bool:
        """Return whether to leave."""
        return await super().on_tick(counter) or self._engine.idle


def run(
    policy: Policy,
    bound: socket.socket,
    *,
    strength: Strength,
    limits: Limits,
    max_batch: int,
    max_queue: int,
    api_key: str | None,
    shelf: Shelf | None = None,
) -> None:
    """Serve until a signal; then finish the answers that were begun, and return.

    Log lines go to stderr, a JSON object each.

    Args:
        bound: what `listen` returned; it is closed at the end.
        strength: of requests that name none.
        api_key, shelf: as in `create_app`.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    engine = Engine(policy, max_batch=max_batch, max_queue=max_queue)
    desk = Desk(engine, strength=strength, limits=limits)
    app = create_app(desk, api_key=api_key, shelf=shelf)
    host, port = bound.getsockname()[:2]
    listening = {"host": host, "port": port, "model": next(iter(desk.models))}
    _log.info("listening", extra={"fields": listening})
    server(app, engine).run([bound])
    _log.info("closed")


def server(app: FastAPI, engine: Engine, *, patience: int = PATIENCE) -> uvicorn.Server:
    """Return the server of an application, not yet running.

    Args:
        patience: seconds that connections may stay open after the engine has finished.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=patience,
    )
    return _Server(config, engine)
