"""From pieces of answers to OpenAI's replies, whole and in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qadapter.serve import schema
from qadapter.serve.answer import Likely, Piece, Token


def _finish(piece: Piece) -> schema.Finish | None:
    return piece.finish if piece.finish in ("stop", "length") else None


def _joined(pieces: Sequence[Piece]) -> Piece:
    """Return one piece of all."""
    tokens = tuple(token for piece in pieces for token in piece.tokens)
    text = "".join(piece.text for piece in pieces)
    return Piece(text, tokens, pieces[-1].finish, pieces[-1].generated)


def _by_text(top: Sequence[Likely]) -> dict[str, float]:
    """Return log-probs by text, the highest first; of tokens that read alike, the likeliest's."""
    found: dict[str, float] = {}
    for one in top:
        found.setdefault(one.text, one.logprob)
    return found


@dataclass(frozen=True)
class ChatReply:
    """Replies to one `ChatRequest`."""

    head: dict[str, Any]
    """Its id, time and model."""
    logprobs: bool

    def whole(
        self, answers: Sequence[Sequence[Piece]], usage: schema.Usage
    ) -> schema.ChatCompletion:
        """Return all answers; each one's pieces end with their last."""
        choices = [
            schema.ChatChoice(
                index=i,
                message=schema.AnswerMessage(content=whole.text),
                logprobs=self._logprobs(whole.tokens),
                finish_reason=_finish(whole) or "stop",
            )
            for i, whole in enumerate(map(_joined, answers))
        ]
        return schema.ChatCompletion(**self.head, choices=choices, usage=usage)

    def chunk(self, index: int, piece: Piece, *, first: bool) -> schema.ChatChunk:
        """Return one piece of an answer, which is its `first` or not."""
        choice = schema.ChatChunkChoice(
            index=index,
            delta=schema.Delta(role="assistant" if first else None, content=piece.text),
            logprobs=self._logprobs(piece.tokens),
            finish_reason=_finish(piece),
        )
        return schema.ChatChunk(**self.head, choices=[choice])

    def counted(self, usage: schema.Usage) -> schema.ChatChunk:
        """Return the chunk that counts the tokens."""
        return schema.ChatChunk(**self.head, choices=[], usage=usage)

    def _logprobs(self, tokens: Sequence[Token]) -> schema.ChatLogprobs | None:
        if not self.logprobs:
            return None
        return schema.ChatLogprobs(
            content=[
                schema.ChatLogprob(
                    token=token.text,
                    logprob=token.logprob or 0.0,
                    bytes=list(token.bytes),
                    top_logprobs=[
                        schema.TopLogprob(token=t.text, logprob=t.logprob, bytes=list(t.bytes))
                        for t in token.top
                    ],
                )
                for token in tokens
            ]
        )


@dataclass(frozen=True)
class TextReply:
    """Replies to one `CompletionRequest`."""

    head: dict[str, Any]
    logprobs: bool

    def whole(self, answers: Sequence[Sequence[Piece]], usage: schema.Usage) -> schema.Completion:
        """Return all answers; each one's pieces end with their last."""
        choices = [self._choice(i, _joined(pieces)) for i, pieces in enumerate(answers)]
        return schema.Completion(**self.head, choices=choices, usage=usage)

    def chunk(self, index: int, piece: Piece, *, first: bool) -> schema.Completion:
        """Return one piece of an answer; the first is like the others."""
        return schema.Completion(**self.head, choices=[self._choice(index, piece)])

    def counted(self, usage: schema.Usage) -> schema.Completion:
        """Return the chunk that counts the tokens."""
        return schema.Completion(**self.head, choices=[], usage=usage)

    def _choice(self, index: int, piece: Piece) -> schema.CompletionChoice:
        logprobs = None
        if self.logprobs:
            logprobs = schema.CompletionLogprobs(
                tokens=[token.text for token in piece.tokens],
                token_logprobs=[token.logprob or 0.0 for token in piece.tokens],
                top_logprobs=[_by_text(token.top) for token in piece.tokens],
                text_offset=[token.offset for token in piece.tokens],
            )
        return schema.CompletionChoice(
            index=index, text=piece.text, logprobs=logprobs, finish_reason=_finish(piece)
        )


Reply = ChatReply | TextReply
