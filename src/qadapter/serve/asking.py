"""From what is asked over HTTP to the engine's requests, and their pieces back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from jinja2 import TemplateError

from qadapter.data import tokenize_prompt
from qadapter.errors import UserError
from qadapter.serve import schema
from qadapter.serve.answer import Piece
from qadapter.serve.engine import Engine, EngineBusy, EngineClosed, Request, Ticket

_KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class Refused(Exception):
    """A request that gets an error in the place of an answer."""

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400
    ) -> None:
        super().__init__(message)
        self.status = status
        kind = _KINDS.get(status, "invalid_request_error")
        self.body = schema.error(message, kind, param=param, code=code)


class ClientLeft(Exception):
    """Nobody waits for the answer any more."""


@dataclass(frozen=True)
class Limits:
    """What a client may ask for."""

    max_context: int = 4096
    """Tokens of prompt and answer together; the model's own context is a limit, too."""
    max_tokens: int = 1024
    """Tokens of an answer."""
    max_body: int = 2**20
    """Bytes of a request."""


@dataclass
class Asked:
    """A request's answers while they are made."""

    tickets: Sequence[Ticket]
    queue: asyncio.Queue[tuple[int, Piece]]
    prompt_tokens: int
    strength: float
    began: float = field(default_factory=time.monotonic)
    first: float | None = None
    """Seconds from asking to the first piece."""
    token_seconds: list[float] = field(default_factory=list)
    """Of each answer that is complete: the mean after its first piece."""

    @property
    def usage(self) -> schema.Usage:
        """Tokens so far."""
        made = sum(ticket.answer.generated for ticket in self.tickets)
        return schema.Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=made,
            total_tokens=self.prompt_tokens + made,
        )

    async def pieces(self, left: Callable[[], Any]) -> AsyncGenerator[tuple[int, Piece]]:
        """Yield each piece with its answer's number, as they come, until all are complete.

        Args:
            left: a coroutine function that returns when the client has left.

        Raises:
            ClientLeft: it did; the answers are given up.
            Refused: the engine failed.
        """

        async def watch() -> None:
            await left()
            self.queue.put_nowait((0, Piece(finish="cancelled")))

        watcher = asyncio.ensure_future(watch())
        starts: dict[int, float] = {}
        complete = 0
        try:
            while complete < len(self.tickets):
                index, piece = await self.queue.get()
                if piece.finish == "cancelled":
                    raise ClientLeft
                if piece.finish == "error":
                    raise Refused("the answer failed", code="engine_failed", status=500)
                now = time.monotonic()
                self.first = self.first or now - self.began
                start = starts.setdefault(index, now)
                if piece.finish is not None:
                    complete += 1
                    if piece.generated > 1:
                        self.token_seconds.append((now - start) / (piece.generated - 1))
                yield index, piece
        finally:
            watcher.cancel()
            for ticket in self.tickets:
                ticket.cancel()


class Desk:
    """Takes requests for the one policy that an engine has.

    Args:
        name: under which it is served.
        strength: of requests that name none.
    """

    def __init__(self, engine: Engine, *, name: str, strength: float, limits: Limits) -> None:
        self.engine, self.name, self.strength, self.limits = engine, name, strength, limits
        self.created = int(time.time())
        self.context = min(engine.policy.context, limits.max_context)

    def chat_prompt(self, messages: Sequence[schema.Message]) -> list[int]:
        """Return a conversation's tokens.

        Raises:
            Refused: the chat template does not take it.
        """
        plain = [{"role": m.role, "content": _text(m.content)} for m in messages]
        try:
            return tokenize_prompt(plain, self.engine.policy.tokenizer)
        except (UserError, TemplateError) as problem:  # a template has its own idea of turns
            raise Refused(str(problem), param="messages") from problem

    def text_prompts(
        self, prompt: str | list[str] | list[int] | list[list[int]]
    ) -> list[list[int]]:
        """Return the tokens of each text that is to go on.

        Raises:
            Refused: a text has none, or a token is not in the vocabulary.
        """
        one = isinstance(prompt, str) or isinstance(prompt[0], int)
        tokenizer = self.engine.policy.tokenizer
        rows = [
            tokenize_prompt(row, tokenizer) if isinstance(row, str) else cast("list[int]", row)
            for row in ([prompt] if one else prompt)
        ]
        size = self.engine.policy.model.get_input_embeddings().weight.shape[0]
        for row in rows:
            if not row:
                raise Refused("a prompt has no tokens; give a longer one", param="prompt")
            if max(row) >= size:
                raise Refused(f"the vocabulary has {size} tokens", param="prompt")
        return rows

    def ask(
        self,
        body: schema.ChatRequest | schema.CompletionRequest,
        prompts: Sequence[list[int]],
        *,
        max_tokens: int | None,
        top_logprobs: int | None,
    ) -> Asked:
        """Hand a request's answers, `n` to each prompt, to the engine.

        Args:
            max_tokens: of each answer; None is as many as allowed.
            top_logprobs: how many beside each token's log-prob; None wants no log-probs.

        Raises:
            Refused: it cannot be answered, or not now.
        """
        if body.stream_options is not None and not body.stream:
            raise Refused("only a stream has options; set stream", param="stream_options")
        most = self.engine.max_batch + self.engine.max_queue
        if len(prompts) * body.n > most:
            raise Refused(f"more than {most} answers were asked for", param="n")
        queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def into(index: int) -> Callable[[Piece], object]:
            return lambda piece: loop.call_soon_threadsafe(queue.put_nowait, (index, piece))

        strength = self._strength(body.strength)
        stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        requests = [
            Request(
                prompt,
                into(row * body.n + i),
                max_tokens=self._room(len(prompt), max_tokens),
                strength=strength,
                temperature=body.temperature,
                top_p=body.top_p,
                seed=None if body.seed is None else body.seed + i,
                stop=stop,
                logprobs=top_logprobs is not None,
                top_logprobs=top_logprobs or 0,
            )
            for row, prompt in enumerate(prompts)
            for i in range(body.n)
        ]
        try:
            tickets = self.engine.submit(requests)
        except EngineBusy:
            raise Refused("the queue is full; try again", code="busy", status=429) from None
        except EngineClosed:
            raise closing() from None
        return Asked(tickets, queue, sum(map(len, prompts)), strength)

    def check_model(self, name: str | None) -> None:
        """Raise Refused if there is no model of that name."""
        if name not in (None, self.name):
            raise Refused(
                f"there is no model {name!r}; {self.name!r} is served",
                param="model",
                code="model_not_found",
                status=404,
            )

    def _strength(self, asked: float | list[float] | None) -> float:
        if asked is None:
            return self.strength
        if isinstance(asked, list):
            if len(asked) != 1:
                raise Refused(
                    f"{len(asked)} strengths were given and one adapter is loaded", param="strength"
                )
            return asked[0]
        return asked

    def _room(self, prompt: int, asked: int | None) -> int:
        """Return how many tokens may follow so many of a prompt."""
        if asked is not None and asked > self.limits.max_tokens:
            raise Refused(
                f"{asked} tokens are more than the {self.limits.max_tokens} an answer may have",
                param="max_tokens",
            )
        if prompt + (asked or 1) > self.context:
            raise Refused(
                f"{prompt} tokens of the prompt and {asked or 1} of the answer do not fit the "
                f"context of {self.context}",
                code="context_length_exceeded",
            )
        return asked or min(self.context - prompt, self.limits.max_tokens)


def _text(content: str | list[schema.TextPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def closing() -> Refused:
    """Return the refusal of a server that shuts down."""
    return Refused("the server is shutting down; try another, or later", code="closed", status=503)
