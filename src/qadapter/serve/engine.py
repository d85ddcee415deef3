"""Continuous batching: one thread owns the model, requests join and leave between tokens.

Requests for the same adapters are one batch; what is asked of one adapter runs no other's branch.
Adapters come and go between tokens, too.
"""

from __future__ import annotations

import logging
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Condition, Thread
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    PreTrainedConfig,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from qadapter.model import Adapter
from qadapter.policy import Policy
from qadapter.serve.answer import Answer, Likely, Piece, Token
from qadapter.serve.batch import Batch
from qadapter.serve.vocabulary import Vocabulary
from qadapter.strength import each

GREEDY_BELOW = 1e-5
"""Temperatures under it take the likeliest token."""

_PREFILL = 2048
"""Prompt tokens, padding included, that are read at once; who is being answered waits for them."""

_log = logging.getLogger(__name__)


class EngineBusy(Exception):
    """The queue has no room for these requests."""


class EngineFull(Exception):
    """As many adapters are loaded as may be."""


class EngineClosed(Exception):
    """The engine takes no more requests."""


@dataclass(frozen=True)
class Request:
    """What one answer is to be."""

    prompt: Sequence[int]
    """Its tokens; with `max_tokens` they fit the engine's context."""
    emit: Callable[[Piece], object]
    """Called with each piece, from the engine's thread; must return at once."""
    max_tokens: int
    strength: float | Sequence[float] = 1.0
    """s of all adapters, or of each."""
    adapters: tuple[Adapter, ...] = ()
    """Those that are asked, in the policy's order; default all that it had at first."""
    temperature: float = 0.0
    """Below 1e-5 is greedy."""
    top_p: float = 1.0
    seed: int | None = None
    """None draws one."""
    stop: Sequence[str] = ()
    logprobs: bool = False
    top_logprobs: int = 0
    compare: bool = False
    """Tell the base's log-prob of each token, too."""


@dataclass(eq=False)
class Ticket:
    """A request that was taken."""

    request: Request
    answer: Answer
    generator: torch.Generator
    warpers: LogitsProcessorList
    adapters: tuple[Adapter, ...]
    strengths: tuple[float, ...]
    """s of each of these adapters."""
    cancelled: bool = False
    read: bool = False
    """Whether its prompt left the queue."""

    def cancel(self) -> None:
        """Let it leave the queue at once or the batch with the next token; it emits no more."""
        self.cancelled = True


@dataclass
class _Group:
    """Rows that are decoded together."""

    tickets: list[Ticket]
    batch: Batch


def _short(config: PreTrainedConfig) -> int:
    """Return the tokens up to which no row changes how the others' positions are turned.

    Long rope (Phi-3) turns all rows of a batch otherwise as soon as one is longer than the context
    that the model was first trained with.
    """
    found = getattr(config, "rope_parameters", None) or {}
    kinds = [found] if "rope_type" in found else [*found.values()]  # one, or one a kind of layer
    return min(
        (
            kind["original_max_position_embeddings"]
            for kind in kinds
            if kind["rope_type"] == "longrope"
        ),
        default=sys.maxsize,
    )


@dataclass
class Engine:
    """Answers requests, many at a time; what an answer is does not depend on the others.

    Args:
        policy: its model is the engine's alone, as a model is one thread's at a time.
        max_batch: rows that are decoded at a time.
        max_queue: rows that may wait for a place.
        max_adapters: that are in memory, those included that left but are still asked for.
    """

    policy: Policy
    max_batch: int = 16
    max_queue: int = 64
    max_adapters: int = 16
    _waiting: deque[Ticket] = field(default_factory=deque)
    _groups: dict[tuple[Adapter, ...], _Group] = field(default_factory=dict)
    _joining: list[Ticket] = field(default_factory=list)
    _orders: deque[tuple[Callable[[], Any], Future[Any]]] = field(default_factory=deque)
    _leaving: list[Adapter] = field(default_factory=list)
    _changed: Condition = field(default_factory=Condition)
    _closed: bool = False

    def __post_init__(self) -> None:
        self._first = self.policy.model.adapters
        self._vocabulary = Vocabulary(self.policy.tokenizer)
        self.context = min(self.policy.context, _short(self.policy.model.config))
        """Tokens that prompt and answer may have together."""
        self._thread = Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests that wait for a place."""
        return sum(not ticket.cancelled for ticket in [*self._waiting])

    @property
    def running(self) -> int:
        """Requests that are being answered."""
        return sum(len(group.tickets) for group in [*self._groups.values()]) + len(self._joining)

    @property
    def closed(self) -> bool:
        """Whether no more requests are taken."""
        return self._closed

    def submit(self, requests: Sequence[Request]) -> list[Ticket]:
        """Take all of these requests, or none.

        Raises:
            EngineBusy: there is no room for them in the queue.
            EngineClosed: `close` was called.
        """
        tickets = [self._ticket(request) for request in requests]
        with self._changed:
            if self._closed:
                raise EngineClosed
            free = max(0, self.max_batch - self.running) + self.max_queue - self.waiting
            if len(tickets) > free:
                raise EngineBusy
            self._drop_cancelled()
            self._waiting.extend(tickets)
            self._changed.notify()
        return tickets

    def load(self, name: str, directory: str | Path) -> Future[Adapter]:
        """Add an adapter to the policy between two tokens.

        The future has it, or a UserError, or EngineFull.

        Raises:
            EngineClosed: `close` was called.
        """
        future: Future[Adapter] = Future()
        with self._changed:
            if self._closed:
                raise EngineClosed
            self._orders.append((partial(self._add, directory, name), future))
            self._changed.notify()
        return future

    def unload(self, adapter: Adapter) -> None:
        """Take an adapter away as soon as none of the requests that were taken asks for it."""
        with self._changed:
            self._leaving.append(adapter)
            self._changed.notify()

    def close(self, *, wait: bool = True) -> None:
        """Take no more requests; those taken are finished, and waited for if `wait`."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if wait:
            self._thread.join()

    @property
    def idle(self) -> bool:
        """Whether the engine is closed and has finished."""
        return not self._thread.is_alive()

    def _ticket(self, request: Request) -> Ticket:
        answer = Answer(
            self._vocabulary,
            request.stop,
            self.policy.end_ids,
            request.max_tokens,
            request.prompt,
        )
        generator = torch.Generator(self.policy.model.device)
        if request.seed is None:
            generator.seed()
        else:
            generator.manual_seed(request.seed)
        warpers = LogitsProcessorList()
        if request.temperature >= GREEDY_BELOW:
            warpers.append(TemperatureLogitsWarper(request.temperature))
            if request.top_p < 1:
                warpers.append(TopPLogitsWarper(request.top_p))
        adapters = request.adapters or self._first
        strengths = each(request.strength, [adapter.name for adapter in adapters])
        return Ticket(request, answer, generator, warpers, adapters, strengths)

    # ── the engine's own thread ─────────────────────────────────────────────────────────────────

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._busy or self._orders or self._leaving or self._closed):
                    self._changed.wait()
                if self._closed and not (self._busy or self._orders):
                    return
                self._take()
                orders, self._orders = self._orders, deque()
            self._let_go()
            for work, future in orders:
                self._carry_out(work, future)
            self._turn()

    @property
    def _busy(self) -> bool:
        return bool(self._waiting or self._groups)

    def _asked(self) -> Iterator[Ticket]:
        for group in self._groups.values():
            yield from group.tickets
        yield from self._joining

    def _add(self, directory: str | Path, name: str) -> Adapter:
        if len(self.policy.model.adapters) >= self.max_adapters:
            raise EngineFull
        return self.policy.add(directory, name)

    @staticmethod
    def _carry_out(work: Callable[[], Any], future: Future[Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(work())
        except Exception as error:  # told to who ordered it; the answers go on
            future.set_exception(error)

    def _let_go(self) -> None:
        """Take away the adapters that are to leave and that no request asks for any more."""
        if not self._leaving:
            return
        with self._changed:
            asked = {a for t in [*self._waiting, *self._asked()] for a in t.adapters}
            gone = [adapter for adapter in self._leaving if adapter not in asked]
            self._leaving = [adapter for adapter in self._leaving if adapter in asked]
        for adapter in gone:
            self.policy.model.remove(adapter)

    def _drop_cancelled(self) -> None:
        self._waiting = deque(ticket for ticket in self._waiting if not ticket.cancelled)

    def _take(self) -> None:
        """Let the requests join that have waited longest, as many as there are places for."""
        self._drop_cancelled()
        longest = 0
        while self._waiting and self.running < self.max_batch:
            longest = max(longest, len(self._waiting[0].request.prompt))
            if self._joining and longest * (len(self._joining) + 1) > _PREFILL:
                break
            ticket = self._waiting.popleft()
            ticket.read = True
            self._joining.append(ticket)

    def _turn(self) -> None:
        """Give each running request a token, then let the new ones join with their first."""
        for adapters, group in [*self._groups.items()]:
            self._keep(adapters, self._guarded(group.tickets, partial(self._step, group)))
        for adapters in dict.fromkeys(ticket.adapters for ticket in self._joining):
            joining = [ticket for ticket in self._joining if ticket.adapters == adapters]
            started = self._guarded(joining, partial(self._start, joining, adapters))
            there = self._groups.get(adapters)
            if there is not None and started is not None:
                both = [*there.tickets, *started.tickets]
                started = there = self._guarded(both, partial(self._join, there, started))
            self._joining = [ticket for ticket in self._joining if ticket.adapters != adapters]
            self._keep(adapters, started or there)

    def _guarded(
        self, tickets: Sequence[Ticket], work: Callable[[], _Group | None]
    ) -> _Group | None:
        """Return what comes of work for these requests; if it fails they do, and no others."""
        try:
            return work()
        except Exception:  # memory, or a fault of ours
            _log.exception("a step failed")
            for ticket in tickets:
                if not ticket.answer.finished:
                    self._emit(ticket, Piece(finish="error", generated=ticket.answer.generated))
            return None

    def _start(self, tickets: list[Ticket], adapters: tuple[Adapter, ...]) -> _Group | None:
        """Read prompts, and give each its first token."""
        prompts = [ticket.request.prompt for ticket in tickets]
        return self._step(_Group(tickets, Batch(self.policy.model, prompts, adapters)))

    @staticmethod
    def _join(there: _Group, started: _Group) -> _Group:
        there.batch.join(started.batch)
        return _Group([*there.tickets, *started.tickets], there.batch)

    def _keep(self, adapters: tuple[Adapter, ...], group: _Group | None) -> None:
        if group is None:
            self._groups.pop(adapters, None)
        else:
            self._groups[adapters] = group

    def _step(self, group: _Group) -> _Group | None:
        """Give each row a token; return the rows that go on, if any do."""
        tickets, batch = group.tickets, group.batch
        wanted = [i for i, ticket in enumerate(tickets) if ticket.request.compare]
        logits, base = batch.logits([t.strengths for t in tickets], base=wanted)
        greedy = logits.argmax(-1).tolist()
        drawn = [
            self._draw(ticket, row) if len(ticket.warpers) else best
            for ticket, row, best in zip(tickets, logits, greedy, strict=True)
        ]
        base_of = dict(zip(wanted, base, strict=True))
        for i, (ticket, token) in enumerate(zip(tickets, drawn, strict=True)):
            if ticket.cancelled:
                continue
            told = self._told(ticket.request, token, logits[i], base_of.get(i))
            piece = ticket.answer.add(told)
            if piece is not None:
                self._emit(ticket, piece)
        left = [i for i, t in enumerate(tickets) if not (t.cancelled or t.answer.finished)]
        if not left:
            return None
        batch.append(drawn)
        if len(left) < len(tickets):
            batch.keep(left)
        return _Group([tickets[i] for i in left], batch)

    @staticmethod
    def _draw(ticket: Ticket, logits: Tensor) -> int:
        # These two warpers look at the scores alone.
        scores = ticket.warpers(None, logits[None])
        drawn = torch.multinomial(scores.softmax(-1), 1, generator=ticket.generator)
        return int(drawn)

    def _told(self, request: Request, token: int, logits: Tensor, base: Tensor | None) -> Token:
        """Return a token with what the request wants to know of it."""
        text, known = self._vocabulary.text, self._vocabulary.raw
        if not (request.logprobs or request.compare):
            return Token(token, text(token))
        logps = logits.log_softmax(-1)
        values, ids = logps.topk(min(request.top_logprobs, len(logps)))
        top = tuple(
            Likely(text(i), known(i), value)
            for i, value in zip(ids.tolist(), values.tolist(), strict=True)
        )
        base_logprob = None if base is None else float(base.log_softmax(-1)[token])
        logprob = float(logps[token])
        return Token(token, text(token), 0, logprob, base_logprob, top, known(token))

    @staticmethod
    def _emit(ticket: Ticket, piece: Piece) -> None:
        try:
            ticket.request.emit(piece)
        except Exception:  # whoever asked is gone; the others are not to suffer
            _log.exception("an answer could not be handed over")
            ticket.cancel()
