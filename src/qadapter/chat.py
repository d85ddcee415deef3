"""A conversation in a terminal: messages, commands, and answers as they are made."""

from __future__ import annotations

from collections.abc import Iterator

from qadapter.errors import ConfigError, DataError
from qadapter.policy import Policy
from qadapter.strength import Strength, each, parse, told


class Chat:
    """A conversation with a policy, with commands: /strength S, /base, /reset."""

    def __init__(
        self, policy: Policy, *, strength: Strength = 1.0, max_new_tokens: int = 256
    ) -> None:
        self.policy = policy
        self.strength = strength
        self.max_new_tokens = max_new_tokens
        self.messages: list[dict[str, str]] = []

    def send(self, line: str) -> Iterator[str]:
        """Yield the answer to a message, or a command's reply, piece by piece.

        Raises:
            DataError: the conversation fills the context, or the command is not understood.
        """
        command, _, rest = line.partition(" ")
        if command == "/reset":
            self.messages = []
            yield "forgotten"
        elif command == "/strength":
            self.strength = self._asked(rest)
            yield f"strength {told(self.strength)}"
        elif command == "/base":
            yield from self._base()
        elif command.startswith("/"):
            raise DataError(f"{command}: not a command; use /strength S, /base or /reset.")
        else:
            yield from self._reply(line)

    def _asked(self, text: str) -> Strength:
        try:
            strength = parse(text)
            each(strength, self.policy.names)
        except ConfigError as error:
            raise DataError(f"/strength: {error}") from error
        except ValueError:
            raise DataError(
                f"/strength: {text!r} is not a number from 0; try /strength 0.5."
            ) from None
        return strength

    def _base(self) -> Iterator[str]:
        asked = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not asked:
            raise DataError("/base: nothing was asked yet; send a message first.")
        yield from self.stream(self.messages[: asked[-1] + 1], strength=0.0)

    def _reply(self, line: str) -> Iterator[str]:
        conversation = [*self.messages, {"role": "user", "content": line}]
        pieces = []
        for piece in self.stream(conversation, strength=self.strength):
            pieces.append(piece)
            yield piece
        # Kept only when answered, so that a refused message does not stay in the talk.
        answer = {"role": "assistant", "content": "".join(pieces).strip()}
        self.messages = [*conversation, answer]

    def stream(self, messages: list[dict[str, str]], *, strength: Strength) -> Iterator[str]:
        """Yield the greedy answer to a conversation as text, while it is made."""
        from threading import Thread

        from transformers import TextIteratorStreamer

        streamer = TextIteratorStreamer(
            self.policy.tokenizer, skip_prompt=True, skip_special_tokens=True
        )
        failed: list[BaseException] = []

        def work() -> None:
            try:
                self.policy.answer(
                    [messages],
                    strength=strength,
                    max_new_tokens=self.max_new_tokens,
                    streamer=streamer,
                )
            except BaseException as error:  # handed to the reader below
                failed.append(error)
                streamer.end()

        thread = Thread(target=work, daemon=True)
        thread.start()
        yield from streamer
        thread.join()
        if failed:
            raise failed[0]
