"""How long a text may be at most that fits so many tokens, told before it is read into any."""

from __future__ import annotations

import json
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase

_COMPOSED = 4
"""Characters that NFC may make one of."""

_KEPT = {"NFC", "Prepend", "Replace"}
"""Normalizers of which no other than NFC leaves fewer characters than it found."""

_CUT = {"ByteLevel", "Digits", "Metaspace", "Punctuation", "Split"}
"""Pre-tokenizers that drop none, unless told so."""


class TextBound:
    """A bound on the characters of what a tokenizer makes so many tokens of.

    A token is at most as many characters as the longest of the vocabulary. Where the tokenizer may
    drop spaces, these are not counted; where it may drop more, or make one token of any number of
    unknown characters, nothing is refused.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        made: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {}
        self._longest = max(map(len, tokenizer.get_vocab()), default=0)
        self._known = bool(made) and _whole(made)
        if any(step["type"] == "NFC" for step in _steps(made.get("normalizer"))):
            self._longest *= _COMPOSED
        self._spaces = not any(t["lstrip"] or t["rstrip"] for t in made.get("added_tokens", ()))

    def exceeds(self, text: str, tokens: int) -> bool:
        """Return whether a text is certain to have more tokens than that."""
        most = self._longest * tokens
        if not self._known or len(text) <= most:
            return False
        return self._spaces or sum(map(len, text.split())) > most


def _whole(made: dict[str, Any]) -> bool:
    """Return whether a tokenizer keeps every character it is given, bytes for unknown ones."""
    normalizers, cutters = _steps(made["normalizer"]), _steps(made["pre_tokenizer"])
    if not all(step["type"] in _KEPT and _as_long(step) for step in normalizers):
        return False
    if not all(step["type"] in _CUT and step.get("behavior") != "Removed" for step in cutters):
        return False
    if made["model"].get("byte_fallback"):
        return all(f"<0x{byte:02X}>" in made["model"]["vocab"] for byte in range(256))
    return any(step["type"] == "ByteLevel" for step in cutters) and (
        {*ByteLevel.alphabet()} <= made["model"]["vocab"].keys()
    )


def _steps(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return a normalizer's or pre-tokenizer's parts."""
    if step is None:
        return []
    parts = step.get("normalizers") or step.get("pretokenizers")
    return [step] if parts is None else [inner for part in parts for inner in _steps(part)]


def _as_long(step: dict[str, Any]) -> bool:
    """Return whether a normalizer puts at least as much in the place of what it replaces."""
    if step["type"] != "Replace":
        return True
    found = step["pattern"].get("String")
    return found is not None and len(found) <= len(step["content"])
