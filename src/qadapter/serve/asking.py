"""From what is asked over HTTP to the engine's requests, and their pieces back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

from jinja2 import TemplateError

from qadapter.data import render_prompt, tokenize_prompt
from qadapter.errors import UserError
from qadapter.model import Adapter
from qadapter.serve import schema
from qadapter.serve.answer import Piece
from qadapter.serve.bound import TextBound
from qadapter.serve.engine import Engine, EngineBusy, EngineClosed, Request, Ticket
from qadapter.strength import each

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


class Chosen(NamedTuple):
    """Adapters that a request asks for, and how strong each is to be."""

    adapters: tuple[Adapter, ...]
    strengths: tuple[float, ...]

    @property
    def model(self) -> str:
        """Their names as a model's."""
        return "+".join(adapter.name for adapter in self.adapters)


@dataclass(frozen=True)
class Served:
    """An adapter that clients may ask for."""

    adapter: Adapter
    strength: float
    """s where a request says nothing of it."""
    created: int
    """Seconds since 1970."""


@dataclass
class Asked:
    """A request's answers while they are made."""

    tickets: Sequence[Ticket]
    queue: asyncio.Queue[tuple[int, Piece]]
    prompt_tokens: int
    chosen: Chosen
    began: float = field(default_factory=time.monotonic)
    first: float | None = None
    """Seconds from asking to the first piece."""
    token_seconds: list[float] = field(default_factory=list)
    """Of each answer that is complete: the mean of the tokens after its first piece."""

    @property
    def read_tokens(self) -> int:
        """Tokens of the prompts that left the queue, each once."""
        read = [ticket.request.prompt for ticket in self.tickets if ticket.read]
        return sum({id(prompt): len(prompt) for prompt in read}.values())

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
        starts: dict[int, tuple[float, int]] = {}
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
                start, had = starts.setdefault(index, (now, piece.generated))
                if piece.finish is not None:
                    complete += 1
                    if piece.generated > had:
                        self.token_seconds.append((now - start) / (piece.generated - had))
                yield index, piece
        finally:
            watcher.cancel()
            for ticket in self.tickets:
                ticket.cancel()


class Desk:
    """Takes requests for the adapters of the policy that an engine has.

    Args:
        strength: of requests that name none: one number, or one for each adapter.
    """

    def __init__(
        self, engine: Engine, *, strength: float | Sequence[float], limits: Limits
    ) -> None:
        self.engine, self.limits = engine, limits
        self.context = min(engine.context, limits.max_context)
        self._bound = TextBound(engine.policy.tokenizer)
        now, adapters = int(time.time()), engine.policy.model.adapters
        strengths = each(strength, engine.policy.names)
        self.served = {
            adapter.name: Served(adapter, s, now)
            for adapter, s in zip(adapters, strengths, strict=True)
        }
        self.first = tuple(self.served)
        """Names of the adapters that stay, and that are asked where a request names none."""

    @property
    def models(self) -> dict[str, int]:
        """What is served, the default first, and since when."""
        whole = {"+".join(self.first): self.served[self.first[0]].created}
        return whole | {name: served.created for name, served in self.served.items()}

    def chat_prompt(self, messages: Sequence[schema.Message]) -> list[int]:
        """Return a conversation's tokens.

        Raises:
            Refused: the chat template does not take it, or it is too long by its characters.
        """
        tokenizer = self.engine.policy.tokenizer
        known = "developer" in str(tokenizer.chat_template)
        plain = [_turn(m, developer="developer" if known else "system") for m in messages]
        try:
            # A template may leave much of it out.
            if self._bound.exceeds("".join(m["content"] for m in plain), self.context):
                self._check_fits(render_prompt(plain, tokenizer))
            return tokenize_prompt(plain, tokenizer)
        except (UserError, TemplateError) as problem:  # a template has its own idea of turns
            raise Refused(str(problem), param="messages") from problem

    def text_prompts(
        self, prompt: str | list[str] | list[int] | list[list[int]]
    ) -> list[list[int]]:
        """Return the tokens of each text that is to go on.

        Raises:
            Refused: a text has none or is too long by its characters, or a token is not in the
                vocabulary.
        """
        one = isinstance(prompt, str) or isinstance(prompt[0], int)
        rows = [
            self._read(row) if isinstance(row, str) else cast("list[int]", row)
            for row in ([prompt] if one else prompt)
        ]
        size = self.engine.policy.model.get_input_embeddings().weight.shape[0]
        for row in rows:
            if not row:
                raise Refused("a prompt has no tokens; give a longer one", param="prompt")
            if max(row) >= size:
                raise Refused(f"the vocabulary has {size} tokens", param="prompt")
        return rows

    def _read(self, text: str) -> list[int]:
        self._check_fits(text)
        return tokenize_prompt(text, self.engine.policy.tokenizer)

    def _check_fits(self, text: str) -> None:
        """Refuse a text before reading it takes seconds."""
        if self._bound.exceeds(text, self.context):
            raise Refused(
                f"{len(text)} characters of the prompt do not fit the context of {self.context} "
                "tokens",
                code="context_length_exceeded",
            )

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

        chosen = self.choose(body.model, body.strength)
        stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        requests = [
            Request(
                prompt,
                into(row * body.n + i),
                max_tokens=self._room(len(prompt), max_tokens),
                adapters=chosen.adapters,
                strength=chosen.strengths,
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
        return Asked(tickets, queue, sum(map(len, prompts)), chosen)

    def choose(
        self, model: str | None, strength: float | list[float] | dict[str, float] | None = None
    ) -> Chosen:
        """Return the adapters that a model's name and a strength ask for.

        A model is an adapter's name, or several with `+` between them. Strengths by name may bring
        in more adapters than the model has, but say something of each of those.

        Raises:
            Refused: there is no such adapter, or numbers are missing.
        """
        names = self.first if model is None else self._names(model)
        if isinstance(strength, dict):
            if unknown := [name for name in strength if name not in self.served]:
                raise Refused(
                    f"there is no adapter {unknown[0]!r}; {self._known}", param="strength"
                )
            if model is not None and (silent := [n for n in names if n not in strength]):
                raise Refused(
                    f"strength says nothing of {silent[0]!r}, which the model has; give it a "
                    "number or leave the model out",
                    param="strength",
                )
            by_name = strength
        elif strength is None:
            by_name = {name: self.served[name].strength for name in names}
        elif isinstance(strength, list) and len(strength) != len(names):
            raise Refused(
                f"{len(strength)} strengths were given for {len(names)} adapters "
                f"({', '.join(names)})",
                param="strength",
            )
        else:
            by_name = dict(zip(names, each(strength, names), strict=True))
        # In one order, whoever asks: requests for the same adapters are decoded together.
        ordered = [name for name in self.served if name in by_name]
        return Chosen(
            tuple(self.served[name].adapter for name in ordered),
            tuple(by_name[name] for name in ordered),
        )

    def _names(self, model: str) -> tuple[str, ...]:
        names = (model,) if model in self.served else tuple(model.split("+"))
        if len(set(names)) != len(names) or not self.served.keys() >= set(names):
            raise Refused(
                f"there is no model {model!r}; {self._known}",
                param="model",
                code="model_not_found",
                status=404,
            )
        return names

    @property
    def _known(self) -> str:
        names = [repr(name) for name in self.models]
        return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} served"

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


def _turn(message: schema.Message, *, developer: str) -> dict[str, str]:
    """Return a message as a chat template takes it."""
    content = message.content or ""
    if not isinstance(content, str):
        content = "".join(part.text for part in content)
    role = developer if message.role == "developer" else message.role
    named = {} if message.name is None else {"name": message.name}
    return {"role": role, "content": content, **named}


def closing() -> Refused:
    """Return the refusal of a server that shuts down."""
    return Refused("the server is shutting down; try another, or later", code="closed", status=503)
