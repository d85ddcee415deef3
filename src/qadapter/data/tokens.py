"""Pairs in tokens, through the tokenizer's own chat template, cut at an exact token prefix."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar, cast, overload

from qadapter.data.pairs import Message, Pair, Text
from qadapter.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WINDOW = 256
"""Tokens of a row of general text."""

_Row = TypeVar("_Row")
Dropped = Literal["too long", "prompt too long", "identical after truncation"]


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """A pair in tokens; responses include their end-of-turn token unless they were cut."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    chosen_terminal: bool
    rejected_terminal: bool
    source: str

    @property
    def tokens(self) -> int:
        """Tokens of the prompt and both responses."""
        return len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)


class Sources(Sequence[str]):
    """Places in one file, `file:line`, as numbers: millions of them take 8 bytes each."""

    def __init__(self) -> None:
        self._file, self._lines = "", array("q")

    def append(self, source: str) -> None:
        """Add a place in the same file."""
        self._file = source.rstrip("0123456789")
        self._lines.append(int(source[len(self._file) :]))

    @classmethod
    def of(cls, told: tuple[str, Sequence[int]]) -> Sources:
        """Return those that `told` tells of."""
        found = cls()
        found._file, lines = told
        found._lines.extend(lines)
        return found

    def told(self) -> tuple[str, list[int]]:
        """Return them in a form for JSON."""
        return self._file, self._lines.tolist()

    def __len__(self) -> int:
        return len(self._lines)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        """Return a place, or a list of them."""
        if isinstance(index, slice):
            return [f"{self._file}{line}" for line in self._lines[index]]
        return f"{self._file}{self._lines[index]}"


def _one_bos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    bos = tokenizer.bos_token_id
    return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids


def _templated(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, **options: bool
) -> list[int] | str:
    if not tokenizer.chat_template:
        raise ModelError(
            "the tokenizer has no chat template; use one that has, or give plain text pairs."
        )
    from jinja2 import TemplateError

    try:
        return cast(
            "list[int] | str",
            tokenizer.apply_chat_template(messages, return_dict=False, **options),
        )
    except (TemplateError, TypeError) as error:  # its own refusal, or text added to what is none
        raise DataError(
            f"the chat template refuses these messages ({error}); give turns that it takes."
        ) from error


def _chat_ids(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, *, add_generation_prompt: bool
) -> list[int]:
    ids = _templated(messages, tokenizer, add_generation_prompt=add_generation_prompt)
    return _one_bos(cast(list[int], ids), tokenizer)


def render_prompt(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text whose tokens `tokenize_prompt` returns of a conversation.

    Raises:
        DataError, ModelError: as there.
    """
    text = _templated(messages, tokenizer, add_generation_prompt=True, tokenize=False)
    return cast(str, text)


def tokenize_prompt(prompt: Text, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens after which the response begins, exactly as training sees them.

    Raises:
        DataError: the chat template refuses the conversation.
        ModelError: a conversation meets a tokenizer without a chat template.
    """
    if isinstance(prompt, str):
        return _one_bos(cast(list[int], tokenizer(prompt)["input_ids"]), tokenizer)
    return _chat_ids(prompt, tokenizer, add_generation_prompt=True)


def text_windows(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    window: int = WINDOW,
    max_tokens: int | None = None,
) -> list[list[int]]:
    """Return the tokens of texts, joined by newlines, in rows of `window`, the last shorter.

    Of more than `max_tokens` as many rows as hold these are taken, evenly spread over the texts:
    the first would be of few documents, and windows of one document are alike.

    Raises:
        DataError: the texts hold fewer than two tokens.
    """
    joined = cast(list[int], tokenizer("\n".join(texts), verbose=False)["input_ids"])
    # The first token of a row is not predicted, so none begins with the last.
    starts = range(0, len(joined) - 1, window)
    if not starts:
        raise DataError("text: fewer than two tokens; give a longer text.")
    taken = starts if max_tokens is None else spread(starts, -(-max_tokens // window))
    return [joined[i : i + window] for i in taken]


def spread(rows: Sequence[_Row], count: int) -> list[_Row]:
    """Return so many rows, or all if there are fewer, evenly spread over them."""
    n = min(len(rows), max(1, count))
    return [rows[i * len(rows) // n] for i in range(n)]


def _response_ids(
    pair: Pair,
    response: Text,
    prompt_ids: list[int],
    tokenizer: PreTrainedTokenizerBase,
    end_ids: frozenset[int],
) -> list[int]:
    if isinstance(response, str):
        ids = cast(list[int], tokenizer(response, add_special_tokens=False)["input_ids"])
        return [*ids, _eos(tokenizer, end_ids)]
    messages = [*cast(list[Message], pair.prompt), *response]
    ids = _chat_ids(messages, tokenizer, add_generation_prompt=False)
    if ids[: len(prompt_ids)] != prompt_ids:
        raise ModelError(
            f"{pair.source}: the chat template's rendered prompt is not a prefix of the rendered "
            "conversation, so the response cannot be told from it; use another template."
        )
    rest = ids[len(prompt_ids) :]
    # Templates close a turn with more than its end token (ChatML: a newline), which nobody acts.
    ends = [i for i, token in enumerate(rest) if token in end_ids]
    return rest[: ends[-1] + 1] if ends else [*rest, _eos(tokenizer, end_ids)]


def _eos(tokenizer: PreTrainedTokenizerBase, end_ids: frozenset[int]) -> int:
    """Return the token that ends a response whose template does not; generation must stop at it."""
    eos = cast(int | None, tokenizer.eos_token_id)
    if eos is None or eos not in end_ids:
        raise ModelError(
            f"the tokenizer's eos token ({tokenizer.eos_token!r}) does not end a turn; "
            "set an eos_token at which generation stops."
        )
    return eos


def whole_ids(
    pair: Pair, tokenizer: PreTrainedTokenizerBase, end_ids: frozenset[int]
) -> tuple[list[int], list[int], list[int]]:
    """Return prompt, chosen and rejected in tokens, whole.

    Raises:
        DataError, ModelError: as `tokenize_pair`.
    """
    name = "prompt"
    try:
        prompt = tokenize_prompt(pair.prompt, tokenizer)
        name = "chosen"
        chosen = _response_ids(pair, pair.chosen, prompt, tokenizer, end_ids)
        name = "rejected"
        rejected = _response_ids(pair, pair.rejected, prompt, tokenizer, end_ids)
    except DataError as error:
        raise DataError(f"{pair.source}: {name!r}: {error}") from error
    return prompt, chosen, rejected


def drop_reason(
    ids: tuple[list[int], list[int], list[int]], *, max_length: int, truncate: bool
) -> Dropped | None:
    """Return why training leaves the pair out, or None."""
    prompt, chosen, rejected = ids
    room = max_length - len(prompt)
    if room <= 0:
        return "prompt too long"
    if max(len(chosen), len(rejected)) > room and not truncate:
        return "too long"
    return "identical after truncation" if chosen[:room] == rejected[:room] else None


def tokenize_pair(
    pair: Pair,
    tokenizer: PreTrainedTokenizerBase,
    *,
    end_ids: frozenset[int],
    max_length: int,
    truncate: bool = False,
) -> TokenizedPair | Dropped:
    """Return the pair in tokens, or the reason for leaving it out.

    Text responses are tokenised apart from their prompt, as at generation; conversations by the
    chat template, whose rendered prompt must be an exact token prefix.

    Args:
        end_ids: tokens that end a turn.
        max_length: tokens of prompt and longer response together.
        truncate: keep long responses, cut and not terminal, instead of dropping the pair.

    Raises:
        DataError: the template refuses the pair's messages.
        ModelError: there is no template, its prompt is not a prefix of the conversation, or a
            response needs an eos token and the tokenizer's is not in `end_ids`.
    """
    ids = prompt, chosen, rejected = whole_ids(pair, tokenizer, end_ids)
    if reason := drop_reason(ids, max_length=max_length, truncate=truncate):
        return reason
    room = max_length - len(prompt)
    return TokenizedPair(
        prompt_ids=prompt,
        chosen_ids=chosen[:room],
        rejected_ids=rejected[:room],
        chosen_terminal=len(chosen) <= room,
        rejected_terminal=len(rejected) <= room,
        source=pair.source,
    )


def kept_pairs(
    pairs: Iterable[Pair],
    tokenizer: PreTrainedTokenizerBase,
    dropped: dict[str, Sources],
    *,
    end_ids: frozenset[int],
    max_length: int,
    truncate: bool = False,
) -> Iterator[tuple[Pair, TokenizedPair]]:
    """Yield the pairs with their tokens; `dropped` is given the sources of those left out.

    Raises:
        DataError: nothing is left, or as `tokenize_pair`.
        ModelError: as `tokenize_pair`.
    """
    empty = True
    for pair in pairs:
        result = tokenize_pair(
            pair, tokenizer, end_ids=end_ids, max_length=max_length, truncate=truncate
        )
        if isinstance(result, TokenizedPair):
            empty = False
            yield pair, result
        else:
            dropped.setdefault(result, Sources()).append(pair.source)
    if empty:
        raise DataError(_none_left(dropped, truncate=truncate))


def _none_left(dropped: Mapping[str, Sources], *, truncate: bool) -> str:
    """Return why, where that begins, and what would help."""
    if not dropped:
        return "no pair is left (no pairs given); give some."
    reasons = ", ".join(f"{len(v)} {k}" for k, v in dropped.items())
    mend = "raise max_length"
    if "too long" in dropped:
        mend += " or set truncate"
    elif dropped.keys() == {"identical after truncation"}:
        mend = f"give responses that differ{' or raise max_length' if truncate else ''}"
    first = next(iter(dropped.values()))[0]
    return f"{first}: no pair is left ({reasons}), of which this is the first; {mend}."


def tokenize_pairs(
    pairs: Iterable[Pair],
    tokenizer: PreTrainedTokenizerBase,
    *,
    end_ids: frozenset[int],
    max_length: int,
    truncate: bool = False,
) -> tuple[list[TokenizedPair], dict[str, Sources]]:
    """Return the pairs in tokens, and the sources of those left out, by reason.

    Raises:
        DataError: nothing is left, or as `tokenize_pair`.
        ModelError: as `tokenize_pair`.
    """
    dropped: dict[str, Sources] = {}
    kept = kept_pairs(
        pairs, tokenizer, dropped, end_ids=end_ids, max_length=max_length, truncate=truncate
    )
    return [tokens for _, tokens in kept], dropped
