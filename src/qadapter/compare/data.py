"""The splits of a comparison, and what robustness does to its training pairs."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from operator import itemgetter
from pathlib import Path

from qadapter.compare.config import CompareConfig
from qadapter.data import Pair, Text, prompt_key, read_pairs
from qadapter.errors import DataError
from qadapter.files import write_jsonl

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

    @property
    def pool(self) -> list[Pair]:
        """What can be trained on where nothing is judged: `train`, then the judge's by turns."""
        return [*self.train, *in_turn(_by_prompt(self.judge).values())]


def split(config: CompareConfig) -> Splits:
    """Read and split the pairs by prompt, each part spread over as many prompts as can be.

    Pairs of one prompt are alike: 60 of 15 prompts tell less than 60 of 60. Prompts of the training
    file are shuffled, and validation and training get the first of them, with as few pairs of each
    as leave half of the prompts to the judge; where none do, with all. What is held out beside the
    test file is taken from the judge's prompts by the same rule.

    Raises:
        DataError: a file cannot be read, holds too few pairs or prompts, or shares a prompt with
            the other.
    """
    held_out = _by_prompt(read_pairs(config.test))
    if len(held_out) < 2:
        raise DataError(f"{config.test}: has one prompt, which shows no spread; give more prompts.")
    by_prompt = _by_prompt(read_pairs(config.train))
    if shared := [pairs[0].source for key, pairs in by_prompt.items() if key in held_out]:
        raise DataError(
            f"{shared[0]}: its prompt is in {config.test} too, as are {len(shared)} of the "
            f"{len(by_prompt)} prompts; drop them from one."
        )
    keys = sorted(by_prompt)
    random.Random(_SEED).shuffle(keys)
    prompts = [by_prompt[key] for key in keys]

    def parts(most: int) -> tuple[list[Pair], list[Pair], list[list[Pair]]]:
        validation, rest = _take(prompts, config.validation_pairs, most)
        train, rest = _take(rest, config.pairs, most)
        return validation, train, rest

    most = _sparing(prompts, lambda most: parts(most)[2])
    validation, train, rest = parts(most)
    # After these, so that whoever tests on more pairs trains on the same.
    left, count = rest, config.held_out_pairs
    most = _sparing(left, lambda most: _take(left, count, most)[1])
    more, rest = _take(left, count, most)
    asked = ("pairs", "validation_pairs", *["held_out_pairs"] * bool(config.held_out_pairs))
    names = ", ".join(f"`{name}`" for name in asked)
    need = sum(getattr(config, name) for name in asked)
    if len(train) + len(validation) + len(more) < need:
        raise DataError(
            f"{config.train}: holds fewer than the {need} pairs that {names} ask for; lower one."
        )
    if "bradley-terry" in config.judges and not rest:
        raise DataError(
            f"{config.train}: no pairs are left for the judge bradley-terry to learn from; lower "
            f"{names}, or name other `judges`."
        )
    test = in_turn(held_out.values())[: config.test_pairs] + more
    return Splits(train, validation, list(chain.from_iterable(rest)), test)


def _by_prompt(pairs: Iterable[Pair]) -> dict[str, list[Pair]]:
    found: defaultdict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        found[prompt_key(pair)].append(pair)
    return found


def _sparing(prompts: Sequence[list[Pair]], left: Callable[[int], Sequence[list[Pair]]]) -> int:
    """Return the fewest pairs of a prompt that leave half of the prompts; all, if none do."""
    longest = max(map(len, prompts), default=1)
    return 1 + bisect_left(
        range(1, longest), True, key=lambda most: 2 * len(left(most)) >= len(prompts)
    )


def _take(prompts: list[list[Pair]], wanted: int, most: int) -> tuple[list[Pair], list[list[Pair]]]:
    """Return pairs of the first prompts, at most so many of each, and the prompts left."""
    if not wanted:
        return [], prompts
    held = list(accumulate(min(most, len(pairs)) for pairs in prompts))
    end = bisect_left(held, wanted) + 1
    return in_turn(pairs[:most] for pairs in prompts[:end])[:wanted], prompts[end:]


def in_turn(prompts: Iterable[Sequence[Pair]]) -> list[Pair]:
    """Return the pairs of several prompts: the first of each prompt, then the second of each, …"""
    turns = ((turn, pair) for pairs in prompts for turn, pair in enumerate(pairs))
    return [pair for _, pair in sorted(turns, key=itemgetter(0))]


def prompts_of(pairs: Iterable[Pair]) -> list[Text]:
    """Return the pairs' prompts, each once: one answer judged four times is no four answers."""
    return list({prompt_key(p): p.prompt for p in pairs}.values())


def part_of(texts: Sequence[str], part: str) -> list[str]:
    """Return the half of the general text that settings are chosen on, or that is reported.

    Raises:
        DataError: there are fewer than two texts.
    """
    if len(texts) < 2:
        raise DataError("text: holds one line, and half of it is to choose settings on; give more.")
    half = len(texts) // 2
    return list(texts[half:] if part == "search" else texts[:half])


def varied(pairs: Sequence[Pair], name: str, value: float) -> list[Pair]:
    """Return training pairs with a share flipped or made irrelevant, or the first so many.

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
    keys, out = [prompt_key(pair) for pair in pairs], list(pairs)
    for i in hit:
        strange = [pair for pair, key in zip(pairs, keys, strict=True) if key != keys[i]]
        if len(strange) < 2:
            raise DataError(
                "vary: irrelevant takes responses from two pairs of other prompts; give more pairs."
            )
        one, two = rng.sample(strange, 2)
        out[i] = replace(pairs[i], chosen=one.chosen, rejected=two.chosen)
    return [p for p in out if p.chosen != p.rejected]


DATA_VARIATIONS = ("flipped", "irrelevant", "pairs")


def write_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    """Write pairs as JSON Lines that `read_pairs` reads back."""
    rows = ({"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in pairs)
    write_jsonl(path, rows)
