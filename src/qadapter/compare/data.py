"""The splits of a comparison, and what robustness does to its training pairs."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from qadapter.compare.config import CompareConfig
from qadapter.data import Pair, Text, prompt_key, read_pairs
from qadapter.errors import DataError
from qadapter.files import write_jsonl

SPLITS = ("train", "validation", "judge", "test")
_SEED = 20240703
"""Of the shuffle of prompts; the same for every method, seed and machine."""


@dataclass(frozen=True)
class Splits:
    """Pairs by use; no prompt is in two of them."""

    train: list[Pair]
    validation: list[Pair]
    judge: list[Pair]
    """All pairs of the training file that are left, for a judge to learn from."""
    test: list[Pair]


def split(config: CompareConfig) -> Splits:
    """Read and split the pairs by prompt.

    Raises:
        DataError: a file cannot be read, holds too few pairs, or shares a prompt with the other.
    """
    test = list(islice(read_pairs(config.test), config.test_pairs))
    pairs = list(read_pairs(config.train))
    held_out = {prompt_key(p) for p in test}
    if shared := [p.source for p in pairs if prompt_key(p) in held_out]:
        raise DataError(f"{shared[0]}: its prompt is in {config.test} too; drop it from one.")
    keys = sorted({prompt_key(p) for p in pairs})
    random.Random(_SEED).shuffle(keys)
    rank = {key: i for i, key in enumerate(keys)}
    pairs.sort(key=lambda p: rank[prompt_key(p)])
    parts: list[list[Pair]] = []
    for wanted in (config.validation_pairs, config.pairs):
        # A prompt's pairs stay together, so a part may pass its number by a few.
        end = wanted
        while 0 < end < len(pairs) and prompt_key(pairs[end]) == prompt_key(pairs[end - 1]):
            end += 1
        parts.append(pairs[:end])
        pairs = pairs[end:]
    validation, train = parts
    if len(train) < config.pairs:
        need = config.pairs + config.validation_pairs
        raise DataError(
            f"{config.train}: holds fewer than the {need} pairs that `pairs` and "
            "`validation_pairs` ask for; lower them."
        )
    return Splits(train, validation, pairs, test)


def prompts_of(pairs: Iterable[Pair]) -> list[Text]:
    """Return the pairs' prompts, each once: one answer judged four times is no four answers."""
    return list({prompt_key(p): p.prompt for p in pairs}.values())


def varied(pairs: Sequence[Pair], name: str, value: float) -> list[Pair]:
    """Return training pairs with a share flipped or made irrelevant, or fewer of them.

    Irrelevant pairs keep their prompt and get two responses that were given to other prompts.

    Raises:
        DataError: the name is none of these, or the number does not fit the pairs.
    """
    rng = random.Random(_SEED)
    if name == "pairs":
        if not 1 <= value <= len(pairs):
            raise DataError(f"vary: pairs={value:g} must lie between 1 and {len(pairs)}.")
        return list(pairs[: int(value)])
    if name not in ("flipped", "irrelevant") or not 0 <= value <= 1:
        raise DataError(f"vary: {name}={value:g} is no share of flipped or irrelevant pairs.")
    hit = set(rng.sample(range(len(pairs)), round(value * len(pairs))))
    if name == "flipped":
        return [
            replace(p, chosen=p.rejected, rejected=p.chosen) if i in hit else p
            for i, p in enumerate(pairs)
        ]
    out = list(pairs)
    for i in hit:
        one, two = rng.sample([j for j in range(len(pairs)) if j != i], 2)
        out[i] = replace(pairs[i], chosen=pairs[one].chosen, rejected=pairs[two].chosen)
    return [p for p in out if p.chosen != p.rejected]


DATA_VARIATIONS = ("flipped", "irrelevant", "pairs")


def write_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    """Write pairs as JSON Lines that `read_pairs` reads back."""
    rows = ({"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in pairs)
    write_jsonl(path, rows)
