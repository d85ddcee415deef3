"""Preference pairs, prompts and texts from files, every problem named by file and line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from qadapter.data.rows import read_rows
from qadapter.errors import DataError
from qadapter.files import read_jsonl, read_lines

Message = dict[str, Any]
Text = str | list[Message]

_ROLES = ["system", "developer", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt with a chosen and a rejected response, all text or all messages."""

    prompt: Text
    """Text, or the messages before the response."""
    chosen: Text
    """Text, or exactly one assistant message."""
    rejected: Text
    """Text, or exactly one assistant message."""
    source: str
    """Where it came from, `file:line`."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be a pair, and why."""

    source: str
    problem: str


def _problem(value: object, name: str, *, chat: bool) -> str | None:
    """Return what is wrong with a field's type, or None."""
    if isinstance(value, str) and not chat:
        return _not_text(value, name)
    if not (chat and isinstance(value, list)):
        wanted = "a list of messages, like 'chosen'" if chat else "text"
        return f"{name!r} is {type(value).__name__}, not {wanted}; fix it."
    for message in value:
        if not isinstance(message, dict):
            return f"{name!r} has a {type(message).__name__} for a message; fix it."
        if message.get("role") not in _ROLES:
            known = ", ".join(_ROLES)
            return f"{name!r} has a message with role {message.get('role')!r}; use one of {known}."
        content = message.get("content")
        if content is None and message.get("tool_calls"):
            continue  # a call says nothing itself; the template writes it
        if not isinstance(content, str):
            return f"{name!r} has a message without text in 'content'; fix it."
        if problem := _not_text(content, name):
            return problem
    return None


def _not_text(text: str, name: str) -> str | None:
    """Return what is wrong with a string that JSON can write and no tokenizer takes, or None."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        return f"{name!r} has half a character ({half} at {error.start + 1}); fix it."
    return None


def _split(row: dict[str, Any]) -> tuple[Text, Text, Text]:
    """Return prompt, chosen and rejected; an implicit prompt is the responses' shared start."""
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    # A text prompt beside conversations is TRL's redundant column: the prompt is implicit.
    if prompt is not None and not (isinstance(prompt, str) and isinstance(chosen, list)):
        return prompt, chosen, rejected
    if isinstance(chosen, list):
        shared = 0
        while chosen[shared : shared + 1] == rejected[shared : shared + 1] and shared < len(chosen):
            shared += 1
        return chosen[:shared], chosen[shared:], rejected[shared:]
    if chosen[:1] != rejected[:1] or not chosen:  # TRL's helper expects a shared start
        return "", chosen, rejected
    from trl.data_utils import extract_prompt

    parts = extract_prompt({"chosen": chosen, "rejected": rejected})
    return parts["prompt"], parts["chosen"], parts["rejected"]


def _pair(source: str, row: object) -> Pair | BadRow:
    """Return the row as a pair, or what is wrong with it."""
    if not isinstance(row, dict):
        return BadRow(source, f"a {type(row).__name__}, not an object with fields; fix it.")
    if None in row:
        return BadRow(source, "more fields than the header; quote fields that hold commas.")
    row = {k: v for k, v in row.items() if v is not None}
    for name in ("chosen", "rejected"):
        if name not in row:
            has = ", ".join(sorted(map(str, row))) or "nothing"
            return BadRow(source, f"{name!r} is missing (the row has {has}); add it.")
    chat = isinstance(row["chosen"], list)
    for name in ("chosen", "rejected"):
        if problem := _problem(row[name], name, chat=chat):
            return BadRow(source, problem)
    if row["chosen"] == row["rejected"]:
        return BadRow(source, "'rejected' equals 'chosen'; drop the line or fix it.")
    # Only a text prompt may be redundant; anything else beside the other shape is a mistake.
    if not chat and isinstance(row.get("prompt"), list):
        return BadRow(
            source, "'prompt' is a list and 'chosen' is text; make both text or both messages."
        )
    prompt, chosen, rejected = _split(row)
    if problem := _problem(prompt, "prompt", chat=chat):
        return BadRow(source, problem)
    if not prompt:
        return BadRow(
            source, "no prompt: 'prompt' is empty or the responses share no start; add it."
        )
    if chat:
        for name, response in (("chosen", chosen), ("rejected", rejected)):
            if len(response) != 1 or cast(Message, response[0])["role"] != "assistant":
                return BadRow(
                    source, f"{name!r} must be one assistant message after the prompt; fix it."
                )
    return Pair(prompt, chosen, rejected, source)


def audit_rows(path: str) -> Iterator[Pair | BadRow]:
    """Yield every row as a pair or as what is wrong with it.

    Raises:
        DataError: the file itself is missing, unreadable, of unknown format, or empty.
    """
    empty = True
    for source, row in read_rows(path):
        empty = False
        yield _pair(source, row)
    if empty:
        raise DataError(f"{path}: holds no rows; give a file with preference pairs.")


def read_pairs(path: str) -> Iterator[Pair]:
    """Yield the pairs of a file in any preference shape that TRL reads.

    Args:
        path: .jsonl, .json, .csv, .parquet, a directory saved by `datasets`, or a Hub name
            (`owner/name`, `owner/name:split`).

    Raises:
        DataError: as `audit_rows`, or a row is not a pair; the message names file and line.
    """
    for row in audit_rows(path):
        if isinstance(row, BadRow):
            raise DataError(f"{row.source}: {row.problem}")
        yield row


def read_prompts(path: str) -> list[Text]:
    """Return the prompts of a .txt file (one a line) or a .jsonl file (field `prompt`).

    Raises:
        DataError: the file is missing or empty, or a row has no prompt.
    """
    if _is_jsonl(path):
        prompts = [_prompt(f"{path}:{n}", row) for n, row in read_jsonl(path)]
    else:
        prompts = [_as_user(line.strip()) for _, line in read_lines(path)]
    if not prompts:
        raise DataError(f"{path}: holds no prompts; give one a line.")
    return prompts


def _is_jsonl(path: str) -> bool:
    """Return whether the file is JSON Lines, else plain lines; other data formats are refused."""
    suffix = Path(path).suffix.lower()
    if suffix in (".json", ".csv", ".tsv", ".parquet"):
        raise DataError(f"{path}: unknown format; give .txt or .jsonl.")
    return suffix == ".jsonl"


def _as_user(text: str) -> Text:
    return [{"role": "user", "content": text}]


def _prompt(source: str, row: object) -> Text:
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if isinstance(prompt, str) and prompt:
        return _as_user(prompt)
    if isinstance(prompt, list) and prompt:
        if problem := _problem(prompt, "prompt", chat=True):
            raise DataError(f"{source}: {problem}")
        return prompt
    raise DataError(f"{source}: 'prompt' is missing or empty; add it.")


def read_texts(path: str) -> list[str]:
    """Return the non-blank lines of a .txt file or the field `text` of a .jsonl file.

    Raises:
        DataError: the file is missing or empty, or a row has no text.
    """
    if not _is_jsonl(path):
        texts = [line.rstrip("\r\n") for _, line in read_lines(path)]
    else:
        texts = []
        for number, row in read_jsonl(path):
            text = row.get("text") if isinstance(row, dict) else None
            if not isinstance(text, str):
                raise DataError(f"{path}:{number}: 'text' is missing; add it.")
            texts.append(text)
    if not texts:
        raise DataError(f"{path}: holds no text; give some.")
    return texts
