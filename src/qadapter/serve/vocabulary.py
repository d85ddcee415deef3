"""What each token stands for: the bytes that a tokenizer's decoder makes of it, and their text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

_BYTE = re.compile("<0x([0-9A-F]{2})>")
"""A byte that has a token of its own, beside tokens that are text."""
_SPACE = "\u2581"
"""A space in tokens that are text."""


@cache
def _byte_level() -> dict[str, int]:
    """Return the byte for which each character stands in a byte-level vocabulary."""
    # Bytes that are printable as Latin-1 stand for themselves, the others for what follows it.
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


def _steps(decoder: dict[str, Any] | None) -> Iterator[str]:
    """Yield the kinds of a decoder's steps."""
    if decoder is not None:
        yield str(decoder["type"])
        for part in decoder.get("decoders", ()):
            yield from _steps(part)


class Vocabulary:
    """A tokenizer's tokens, one at a time; `decode` is the tokenizer's own, of many."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self.special = frozenset(i for i, token in added.items() if token.special)
        """Those that are not text, and that `decode` leaves out."""
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        kinds = set(_steps(None if decoder is None else json.loads(decoder.__getstate__())))
        self._byte_level = "ByteLevel" in kinds
        self._falls_back = "ByteFallback" in kinds
        self._text = self._falls_back or bool(kinds & {"Metaspace", "Replace"})
        self._known: dict[int, bytes] = {}

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens beside each other, special ones left out."""
        return cast(str, self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def is_byte(self, token: int) -> bool:
        """Return whether it is a byte whose text depends on the bytes beside it."""
        return self._falls_back and _BYTE.fullmatch(self._name(token)) is not None

    def raw(self, token: int) -> bytes:
        """Return what it adds to a text: its leading space, too, or a part of a character."""
        if token not in self._known:
            self._known[token] = self._read(token)
        return self._known[token]

    def text(self, token: int) -> str:
        """Return its bytes as text, or as OpenAI writes those that are none: `bytes:\\xe2\\x82`."""
        found = self.raw(token)
        try:
            return found.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)

    def _name(self, token: int) -> str:
        # None of an id that the head has and the tokenizer has not.
        return cast("str | None", self._tokenizer.convert_ids_to_tokens(token)) or ""

    def _read(self, token: int) -> bytes:
        name = self._name(token)
        if token in self.special:
            return name.encode()
        if self._byte_level:
            known = _byte_level()
            # An added token is written as it is; as in decoding, one strange character tells.
            plain = all(character in known for character in name)
            return bytes(map(known.__getitem__, name)) if plain else name.encode()
        if self.is_byte(token):
            return bytes([int(name[3:5], 16)])
        if self._text:
            return name.replace(_SPACE, " ").encode()
        return str(self._tokenizer.decode([token])).encode()
