"""The HTTP application: OpenAI's endpoints before one `Desk`."""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException

from qadapter.serve import schema
from qadapter.serve.answer import Piece
from qadapter.serve.asking import Asked, ClientLeft, Desk, Refused, closing
from qadapter.serve.gate import Gate, Metrics, refusal
from qadapter.serve.replies import ChatReply, Reply, TextReply
from qadapter.serve.shelf import Shelf

_ERRORS = {
    400: "The request cannot be answered as it stands.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    429: "The queue is full.",
    500: "The server failed.",
    503: "The server is shutting down.",
}
_LOADING = (400, 401, 404, 408, 413, 500, 503)
_REF = "#/components/schemas/{model}"
_RETRY = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}


def _responses(
    *codes: int, chunk: type[BaseModel] | None = None
) -> dict[int | str, dict[str, Any]]:
    """Return what a path may answer besides its model: errors, and events that hold chunks."""
    found: dict[int | str, dict[str, Any]] = {
        code: {
            "model": schema.Error,
            "description": _ERRORS[code],
            **({"headers": _RETRY} if code in (429, 503) else {}),
        }
        for code in codes
    }
    if chunk is not None:
        names = (chunk.__name__, schema.Error.__name__)
        held = {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": {"anyOf": [{"$ref": _REF.format(model=name)} for name in names]},
        }
        data = {"anyOf": [held, {"type": "string", "const": "[DONE]"}]}
        event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
        found[200] = {"content": {"text/event-stream": {"itemSchema": event}}}
    return found


def _plain(part: str | int) -> str:
    """Return a part of a place in a body; what is no text cannot be sent back as it came."""
    return str(part).encode("utf-8", "replace").decode()


def create_app(desk: Desk, *, api_key: str | None = None, shelf: Shelf | None = None) -> FastAPI:
    """Return the application.

    Args:
        shelf: where adapters may be loaded from while it runs; None lets nobody.
        api_key: what clients must send as bearer token; None lets everybody in.
    """
    # The pages that show the schema would fetch scripts from elsewhere.
    app = FastAPI(title="qadapter serve", docs_url=None, redoc_url=None)
    metrics = Metrics(desk.engine)

    @app.post(
        "/v1/chat/completions",
        response_model=schema.ChatCompletion,
        responses=_responses(*_ERRORS, chunk=schema.ChatChunk),
    )
    async def chat_completions(body: schema.ChatRequest, http: Request) -> Any:
        """Go on with a conversation."""
        desk.choose(body.model, body.strength)
        if body.top_logprobs and not body.logprobs:
            raise Refused("top_logprobs needs logprobs", param="top_logprobs")
        if None not in (body.max_tokens, body.max_completion_tokens):
            raise Refused("give max_tokens or max_completion_tokens, not both", param="max_tokens")
        asked = desk.ask(
            body,
            [await run_in_threadpool(desk.chat_prompt, body.messages)],
            max_tokens=body.max_completion_tokens or body.max_tokens,
            top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )
        return await reply(
            ChatReply(head("chatcmpl", asked, http), body.logprobs), body, asked, http
        )

    @app.post(
        "/v1/completions",
        response_model=schema.Completion,
        responses=_responses(*_ERRORS, chunk=schema.Completion),
    )
    async def completions(body: schema.CompletionRequest, http: Request) -> Any:
        """Go on with a text."""
        desk.choose(body.model, body.strength)
        prompts = await run_in_threadpool(desk.text_prompts, body.prompt)
        asked = desk.ask(body, prompts, max_tokens=body.max_tokens, top_logprobs=body.logprobs)
        wanted = body.logprobs is not None
        return await reply(TextReply(head("cmpl", asked, http), wanted), body, asked, http)

    @app.get("/v1/models", responses=_responses(401, 503))
    async def models() -> schema.Models:
        """List what is served."""
        return schema.Models(data=[described(*model) for model in desk.models.items()])

    @app.get("/v1/models/{model:path}", responses=_responses(401, 404, 503))
    async def model(model: str) -> schema.Model:
        """Describe one of what is served."""
        chosen = desk.choose(model).adapters
        return described(model, max(desk.served[adapter.name].created for adapter in chosen))

    if shelf is not None:

        @app.post("/v1/load_lora_adapter", responses=_responses(*_LOADING))
        async def load(body: schema.LoadRequest) -> schema.Model:
            """Serve one more adapter; requests are answered meanwhile."""
            served = await shelf.load(desk, body.lora_name, body.lora_path)
            return described(body.lora_name, served.created)

        @app.post("/v1/unload_lora_adapter", responses=_responses(*_LOADING))
        async def unload(body: schema.UnloadRequest) -> schema.Unloaded:
            """Serve an adapter no longer; answers that were begun with it are finished."""
            shelf.unload(desk, body.lora_name)
            return schema.Unloaded(id=body.lora_name)

    @app.get("/health", responses=_responses(503))
    async def health() -> schema.Health:
        """Tell whether requests are taken."""
        if desk.engine.closed:
            raise closing()
        return schema.Health()

    @app.get(
        "/metrics",
        response_class=PlainTextResponse,
        responses=_responses(401),
    )
    async def prometheus() -> Response:
        """Return Prometheus metrics."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    def described(name: str, created: int) -> schema.Model:
        return schema.Model(id=name, created=created, max_model_len=desk.context)

    def head(kind: str, asked: Asked, http: Request) -> dict[str, Any]:
        name = f"{kind}-{http.scope['state']['request_id']}"
        return {"id": name, "created": int(time.time()), "model": asked.chosen.model}

    async def reply(
        reply: Reply,
        body: schema.ChatRequest | schema.CompletionRequest,
        asked: Asked,
        http: Request,
    ) -> Any:
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            events = stream(reply, asked, http, usage=usage)
            # What stands between may keep no part of it back.
            headers = {"Cache-Control": "no-cache"}
            return StreamingResponse(events, headers=headers, media_type="text/event-stream")
        found: list[list[Piece]] = [[] for _ in asked.tickets]
        async with aclosing(pieces(asked, http)) as made:
            async for index, piece in made:
                found[index].append(piece)
        return reply.whole(found, asked.usage)

    async def stream(
        reply: Reply, asked: Asked, http: Request, *, usage: bool
    ) -> AsyncGenerator[str]:
        begun: set[int] = set()
        try:
            async with aclosing(pieces(asked, http)) as made:
                async for index, piece in made:
                    chunk = reply.chunk(index, piece, first=index not in begun)
                    begun.add(index)
                    yield f"data: {chunk.model_dump_json()}\n\n"
        except Refused as refused:
            yield f"data: {json.dumps(refused.body)}\n\n"
            return
        except ClientLeft:
            return
        if usage:
            yield f"data: {reply.counted(asked.usage).model_dump_json()}\n\n"
        yield "data: [DONE]\n\n"

    async def pieces(asked: Asked, http: Request) -> AsyncGenerator[tuple[int, Piece]]:
        """Yield an answer's pieces; count and log it, however it ends."""

        async def left() -> None:
            while (await http.receive())["type"] != "http.disconnect":
                pass

        outcome = "cancelled"  # which is what an exception thrown in here from outside means
        try:
            async with aclosing(asked.pieces(left)) as made:
                async for found in made:
                    yield found
            outcome = "ok"
        except Refused:
            outcome = "failed"
            raise
        finally:
            http.scope["state"]["told"] |= {"outcome": outcome, **metrics.count(asked)}

    @app.exception_handler(Refused)
    async def refused(_: Request, problem: Refused) -> Response:
        return refusal(problem)

    @app.exception_handler(ClientLeft)
    async def client_left(_: Request, __: ClientLeft) -> Response:
        return Response(status_code=499)  # which nobody reads

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, problem: RequestValidationError) -> Response:
        # Of what may be of several types, the one that is nearly right tells more.
        first = min(problem.errors(), key=lambda error: error["type"].endswith("_type"))
        if first["loc"] == ("body",):
            return refusal(Refused("send a JSON object, and Content-Type: application/json"))
        # In broken JSON the place is a number of characters.
        loc = () if first["type"] == "json_invalid" else first["loc"][1:]
        # Between the names of fields stand those of pydantic's own kinds, such as list[str].
        where = [part for part in map(_plain, loc) if not re.search(r"\W|^(str|float)$", part)]
        message = ": ".join([".".join(where), first["msg"]] if where else [first["msg"]])
        return refusal(Refused(message, param=where[0] if where else None))

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, problem: HTTPException) -> Response:
        body = Refused(str(problem.detail), status=problem.status_code).body
        return JSONResponse(body, problem.status_code, problem.headers)

    @app.exception_handler(Exception)
    async def failed(_: Request, __: Exception) -> Response:
        return refusal(Refused("the server failed", status=500))

    app.add_middleware(
        Gate,
        metrics=metrics,
        paths=frozenset(app.openapi()["paths"]),
        closed=lambda: desk.engine.closed,
        api_key=api_key,
        max_body=desk.limits.max_body,
    )
    _mend(app.openapi())
    return app


def _mend(document: dict[str, Any]) -> None:
    """Take out of FastAPI's document what we do not do, and put in what it does not know of."""
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)  # what is invalid gets a 400
    known = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        known.pop(name, None)
    _, chunks = models_json_schema([(schema.ChatChunk, "serialization")], ref_template=_REF)
    known |= chunks["$defs"]
