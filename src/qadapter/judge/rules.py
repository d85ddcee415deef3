"""Judges for preferences that are rules."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import partial

from qadapter.data import Text
from qadapter.errors import ConfigError
from qadapter.judge.verdicts import Judge, words
from qadapter.stats import half_ties


class RuleJudge(Judge):
    """A preference that is a rule: the answer that keeps it better wins, equals tie.

    Args:
        rule: `shorter` or `longer` (in words), `json` (the whole answer is valid JSON),
            `one_sentence`, `max_words:N`, `min_words:N`, `contains:PHRASE` or `lacks:PHRASE`
            (in upper or lower case).

    Raises:
        ConfigError: it is none of these.
    """

    def __init__(self, rule: str) -> None:
        super().__init__(rule)
        self._kept = _rule(rule)

    def votes(
        self, prompts: Sequence[Text], answers: Sequence[str], others: Sequence[str]
    ) -> list[float | None]:
        """Return 1 where the answer keeps the rule better than the other, 0.5 where equally."""
        asked = zip(prompts, answers, others, strict=True)
        return [half_ties(self._kept(a), self._kept(b)) for _, a, b in asked]


def _is_json(text: str) -> float:
    def refuse(constant: str) -> float:
        raise ValueError(f"{constant} is Python's, not JSON's")

    try:
        json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return 0.0
    return 1.0


def _is_one_sentence(text: str) -> float:
    """Return 1 for one line in which no sentence ends before the last; `Dr. No` counts as two."""
    text = text.strip()
    return float(bool(text) and not re.search(r"\n|[.!?…][\"'”’)\]]*\s|[。！？].", text))


_PLAIN: dict[str, Callable[[str], float]] = {
    "shorter": lambda text: -words(text),
    "longer": words,
    "json": _is_json,
    "one_sentence": _is_one_sentence,
}
_COUNTED: dict[str, Callable[[int, str], float]] = {
    "max_words": lambda n, text: float(words(text) <= n),
    "min_words": lambda n, text: float(words(text) >= n),
}
_PHRASED: dict[str, Callable[[str, str], float]] = {
    "contains": lambda phrase, text: float(phrase in text.casefold()),
    "lacks": lambda phrase, text: float(phrase not in text.casefold()),
}


def _rule(text: str) -> Callable[[str], float]:
    """Return what measures how well a text keeps the rule."""
    name, colon, argument = text.partition(":")
    if name in _PLAIN and not colon:
        return _PLAIN[name]
    if name in _COUNTED and re.fullmatch("[1-9][0-9]{0,8}", argument):
        return partial(_COUNTED[name], int(argument))
    if name in _PHRASED and argument.strip():
        return partial(_PHRASED[name], argument.casefold())
    known = [*_PLAIN, *(f"{n}:40" for n in _COUNTED), *(f"{n}:some words" for n in _PHRASED)]
    raise ConfigError(f"{text!r}: not a rule; give one like these: {', '.join(known)}.")
