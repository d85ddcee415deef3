"""One answer in the making: its tokens become text, until one of its ends is reached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from qadapter.serve.vocabulary import Vocabulary

Finish = Literal["stop", "length", "error", "cancelled"]


_CONTEXT = 8
"""Tokens of the prompt beside which the first ones of an answer are decoded."""


class Likely(NamedTuple):
    """A token that might have come."""

    text: str
    bytes: bytes
    logprob: float


@dataclass(frozen=True)
class Token:
    """A token of an answer, and what the policy made of it; log-probs in nats, before sampling."""

    id: int
    text: str
    """What it is alone, as `Vocabulary.text` writes it."""
    offset: int = 0
    """Characters of the answer before it."""
    logprob: float | None = None
    """log π_s, where it was asked for."""
    base_logprob: float | None = None
    """log π1, where it was asked for."""
    top: tuple[Likely, ...] = ()
    """The likeliest tokens."""
    bytes: bytes = b""
    """What it adds to the answer."""


@dataclass(frozen=True)
class Piece:
    """A part of an answer, as soon as it is certain."""

    text: str = ""
    tokens: tuple[Token, ...] = ()
    """Those that begin in it. Tokens that end an answer are in none."""
    finish: Finish | None = None
    """Set in the last piece: an end token or stop string, the length limit, or a failure."""
    generated: int = 0
    """Tokens so far, the end token and those that a stop string cut included."""


@dataclass
class Answer:
    """Turns tokens into pieces.

    A piece holds whole characters, and nothing that may yet turn out to begin a stop string.

    Args:
        stop: strings before which the answer ends.
        end_ids: tokens that end it.
        max_tokens: how many it may have.
        prompt: tokens before it; whether a first space is one depends on them.
    """

    vocabulary: Vocabulary
    stop: Sequence[str]
    end_ids: frozenset[int]
    max_tokens: int
    prompt: Sequence[int] = ()
    generated: int = 0
    finished: bool = False
    _ids: list[int] = field(default_factory=list)
    _from: int = 0
    """Where decoding starts, so that a token has the one before it beside it."""
    _done: int = 0
    """How many tokens are the prompt's, in `_text` or were handed on."""
    _text: str = ""
    """Decoded and held back."""
    _told: int = 0
    """Characters handed on."""
    _tokens: list[Token] = field(default_factory=list)
    """Held back with their text."""

    def __post_init__(self) -> None:
        seen = [i for i in self.prompt if i not in self.vocabulary.special]
        self._ids = seen[-_CONTEXT:]
        self._done = len(self._ids)

    def _read(self, *, last: bool) -> None:
        """Decode what has become whole."""
        if len(self._ids) == self._done:
            return
        before = self.vocabulary.decode(self._ids[self._from : self._done])
        text = self.vocabulary.decode(self._ids[self._from :])
        # A byte may yet make those before it a character, or none.
        open_ = text.endswith("\ufffd") or self.vocabulary.is_byte(self._ids[-1])
        if last or not open_:
            if not text.startswith(before):  # the prompt ends within a character, whole only now
                before = before.rstrip("\ufffd")
            if len(self._ids) - self._done > 1 and self._tokens[-1].id == self._ids[-1]:
                open_text = self.vocabulary.decode(self._ids[self._from : -1])
                if text.startswith(open_text):  # the last one only ended it, and begins behind it
                    added = max(0, len(open_text) - len(before))
                    offset = self._told + len(self._text) + added
                    self._tokens[-1] = replace(self._tokens[-1], offset=offset)
            self._text += text[len(before) :]
            self._from, self._done = self._done, len(self._ids)

    def add(self, token: Token) -> Piece | None:
        """Add a token; return what became certain, if anything did."""
        self.generated += 1
        ended = token.id in self.end_ids
        full = self.generated >= self.max_tokens
        if not ended:
            offset = self._told + len(self._text)
            self._tokens.append(replace(token, offset=offset))
            # Without the special ones, which decode to nothing and would hide what is before them.
            self._ids += [] if token.id in self.vocabulary.special else [token.id]
        self._read(last=ended or full)
        cuts = [i for s in self.stop if (i := self._text.find(s)) >= 0]
        if cuts:
            return self._hand_on(min(cuts), "stop")
        if ended or full:
            self._told += 1  # so that tokens without characters at the very end are handed on, too
            return self._hand_on(len(self._text), "stop" if ended else "length")
        piece = self._hand_on(len(self._text) - self._held(), None)
        return piece if piece.text else None

    def _held(self) -> int:
        """Return how many characters at the end may begin a stop string."""
        return max(
            (
                n
                for s in self.stop
                for n in range(1, min(len(s), len(self._text) + 1))
                if self._text.endswith(s[:n])
            ),
            default=0,
        )

    def _hand_on(self, characters: int, finish: Finish | None) -> Piece:
        text, self._text = self._text[:characters], self._text[characters:]
        self._told += characters
        self.finished = finish is not None
        n = sum(token.offset < self._told for token in self._tokens)
        tokens, self._tokens = tuple(self._tokens[:n]), self._tokens[n:]
        return Piece(text, tokens, finish, self.generated)
