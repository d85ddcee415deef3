"""What every request passes: its size, the key, whether the server is open; log and metrics."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
import traceback
import uuid
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qadapter.serve.asking import Asked, Refused, closing
from qadapter.serve.engine import Engine

_HEADERS = {
    401: {"WWW-Authenticate": "Bearer"},
    408: {"Connection": "close"},
    429: {"Retry-After": "1"},
    503: {"Retry-After": "1"},
}
_OPEN = frozenset({"/health"})
"""Paths that need no key."""

_TO_THE_END = frozenset({"/health", "/metrics"})
"""Paths that answer while the server shuts down."""

BODY_SECONDS = 60.0
"""For which a client may send one body."""

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)

_log = logging.getLogger(__name__)


class Metrics:
    """Prometheus metrics of one server, in a registry of their own."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        named: dict[str, Any] = {"registry": self.registry, "namespace": "qadapter"}
        self.requests = Counter(
            "requests", "HTTP requests by path and outcome", ["path", "outcome"], **named
        )
        self.tokens = Counter("tokens", "Tokens read and generated", ["kind"], **named)
        self.request_seconds = Histogram(
            "request_seconds", "Whole requests", ["path"], buckets=_SECONDS, **named
        )
        self.first_token_seconds = Histogram(
            "first_token_seconds", "From request to first text", buckets=_SECONDS, **named
        )
        self.token_seconds = Histogram(
            "token_seconds", "A token after the first, mean of an answer", buckets=_SECONDS, **named
        )
        for name, text, value in (
            ("waiting", "Answers that wait for a place", lambda: engine.waiting),
            ("running", "Answers that are being made", lambda: engine.running),
        ):
            Gauge(name, text, **named).set_function(value)

    def count(self, asked: Asked) -> dict[str, Any]:
        """Count a request that was answered, or given up; return what the log tells of it."""
        usage, strengths = asked.usage, asked.chosen.strengths
        self.tokens.labels("prompt").inc(asked.read_tokens)
        self.tokens.labels("completion").inc(usage.completion_tokens)
        told: dict[str, Any] = {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "answers": len(asked.tickets),
            "model": asked.chosen.model,
            "strength": strengths[0] if len(strengths) == 1 else list(strengths),
        }
        if asked.first is not None:
            self.first_token_seconds.observe(asked.first)
            told["first_token_seconds"] = round(asked.first, 4)
        for seconds in asked.token_seconds:
            self.token_seconds.observe(seconds)
        return told


def refusal(refused: Refused) -> JSONResponse:
    """Return a refusal as a response."""
    return JSONResponse(refused.body, refused.status, _HEADERS.get(refused.status))


def _outcome(status: int) -> str:
    if status < 400:
        return "ok"
    return {401: "unauthorized", 408: "too_slow", 413: "too_large", 429: "busy", 503: "closed"}.get(
        status, "invalid" if status < 500 else "failed"
    )


class Gate:
    """ASGI middleware around the whole server.

    Args:
        paths: those that are counted apart.
        closed: whether no more requests are taken.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        paths: frozenset[str],
        closed: Callable[[], bool],
        api_key: str | None,
        max_body: int,
    ) -> None:
        self.app = app
        self.metrics = metrics
        self.paths = paths
        self.closed = closed
        self.api_key = api_key
        self.max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, request_id, status = time.monotonic(), uuid.uuid4().hex, 500
        told: dict[str, Any] = {}
        scope.setdefault("state", {}).update(told=told, request_id=request_id)

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            refused = self._refusal(scope)
            body = b""
            if refused is None:
                try:
                    body = await self._body(receive)
                except Refused as problem:
                    refused = refusal(problem)
            await (refused or self.app)(scope, self._again(body, receive), answer)
        finally:
            seconds = time.monotonic() - began
            path = self._counted(scope["path"])
            outcome = told.pop("outcome", None) or _outcome(status)
            self.metrics.requests.labels(path, outcome).inc()
            self.metrics.request_seconds.labels(path).observe(seconds)
            _log.info(
                "request",
                extra={
                    "fields": {
                        "id": request_id,
                        "method": scope["method"],
                        "path": path,
                        "status": status,
                        "outcome": outcome,
                        "seconds": round(seconds, 4),
                        **told,
                    }
                },
            )

    def _counted(self, path: str) -> str:
        """Return what a path is counted as: itself, or one that ends in a parameter, or other."""
        if path in self.paths:
            return path
        heads = ((name, name.partition("{")[0]) for name in self.paths if "{" in name)
        return next((name for name, head in heads if path.startswith(head)), "other")

    def _refusal(self, scope: Scope) -> ASGIApp | None:
        """Return the response to a request that is not let in, from what its head says."""
        headers = dict(scope["headers"])
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        key = None if scope["path"] in _OPEN or self.api_key is None else self.api_key.encode()
        if key is not None and not (
            scheme.lower() == b"bearer" and hmac.compare_digest(given, key)
        ):
            return refusal(
                Refused(
                    "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                    code="invalid_api_key",
                    status=401,
                )
            )
        if self.closed() and scope["path"] not in _TO_THE_END:
            return refusal(closing())
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_body:
            return refusal(self._too_large())
        return None

    def _too_large(self) -> Refused:
        return Refused(
            f"the body has more than {self.max_body} bytes; shorten it",
            code="request_too_large",
            status=413,
        )

    async def _body(self, receive: Receive) -> bytes:
        """Return the whole body.

        Raises:
            Refused: it is too large, or takes too long.
        """
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] != "http.request":  # gone before it was sent
                        return bytes(body)
                    body += message.get("body", b"")
                    if len(body) > self.max_body:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise Refused(
                f"the body did not come within {BODY_SECONDS:.0f} seconds; send it again",
                code="request_timeout",
                status=408,
            ) from None

    @staticmethod
    def _again(body: bytes, receive: Receive) -> Receive:
        """Return a `receive` that hands out the body that was read, then what comes."""
        first = True

        async def replay() -> Message:
            nonlocal first
            if first:
                first = False
                return {"type": "http.request", "body": body, "more_body": False}
            return await receive()

        return replay


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, event and what belongs to it; no text of users."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            kind, _, trace = record.exc_info
            # Where it happened and not what it said, which may be a user's text.
            line["error"] = kind.__name__ if kind else None
            line["traceback"] = "".join(traceback.format_tb(trace))
        return json.dumps(line, ensure_ascii=False)
