"""What every judge does: vote on pairs of answers, be validated, sum up."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qadapter.data import Pair, Text, prompt_key, text_key
from qadapter.errors import UserError
from qadapter.stats import half_ties, share_interval


class NoVoteError(UserError):
    """A judge gives no verdict: it is not shown to be better than chance, or none can be read."""


@dataclass(frozen=True)
class Validation:
    """How well a judge tells chosen from rejected on pairs it has not seen."""

    pairs: int
    """Pairs with a verdict."""
    prompts: int
    """Distinct prompts that they have."""
    unread: int
    """Pairs left out because the judge gave no readable verdict."""
    accuracy: float
    """Share of pairs whose chosen response it prefers; a tie counts half."""
    accuracy_ci: tuple[float, float]
    """95% interval of the accuracy, prompts resampled with all their pairs (`share_interval`)."""
    length_baseline: float
    """Accuracy of preferring the longer response, in words; a tie counts half."""


@dataclass(frozen=True)
class WinRate:
    """How far a judge prefers the answers to the base's."""

    value: float
    """Mean of the votes: 1 for the answer, 0 for the base's, 0.5 a tie. Of a judge that gives
    probabilities it is their mean, as in AlpacaEval, and not the share of answers it prefers."""
    low: float
    """Lower end of its 95% interval, prompts resampled with all their answers."""
    high: float
    """Upper end."""
    n: int
    """Answers with a verdict."""
    ties: int
    """Votes of exactly 0.5."""
    unread: int
    """Answers left out because the judge gave no readable verdict."""
    judge: str
    """Its name."""
    judge_accuracy: float | None
    """On held-out pairs; None for a judge that was not validated."""
    length_delta: float
    """Mean words of the answers less those of the base's, over all prompts."""
    items: tuple[float | None, ...]
    """The vote on each prompt; None where it is unread."""

    def summary(self) -> dict[str, Any]:
        """Return the figures without the votes."""
        fields = asdict(self)
        del fields["items"]
        return fields


class Judge(ABC):
    """Prefers one of two answers.

    Args:
        name: what its verdicts are signed with.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.validation: Validation | None = None
        """What `validate` found."""

    @abstractmethod
    def votes(
        self, prompts: Sequence[Text], answers: Sequence[str], others: Sequence[str]
    ) -> list[float | None]:
        """Return for each prompt the probability that the answer is better than the other.

        A judge without probabilities gives 1, 0, or 0.5 for a tie; None is no verdict.
        """

    def validate(self, held_out: Sequence[Pair]) -> Validation:
        """Return, and keep, how well it tells chosen from rejected as it votes.

        Raises:
            NoVoteError: there is no pair with a verdict.
        """
        chosen = [plain(pair.chosen) for pair in held_out]
        rejected = [plain(pair.rejected) for pair in held_out]
        votes = self.votes([pair.prompt for pair in held_out], chosen, rejected)
        read = [(vote, i) for i, vote in enumerate(votes) if vote is not None]
        self._check_any(len(read), len(votes))
        right = [half_ties(vote, 0.5) for vote, _ in read]
        prompts = [prompt_key(held_out[i]) for _, i in read]
        longer = sum(half_ties(words(chosen[i]), words(rejected[i])) for _, i in read)
        self.validation = Validation(
            pairs=len(read),
            prompts=len(set(prompts)),
            unread=len(votes) - len(read),
            accuracy=sum(right) / len(read),
            accuracy_ci=share_interval(right, prompts),
            length_baseline=longer / len(read),
        )
        return self.validation

    def win_rate(
        self, prompts: Sequence[Text], answers: Sequence[str], base_answers: Sequence[str]
    ) -> WinRate:
        """Return how far it prefers the answers to the base's: its votes, prompt by prompt.

        Raises:
            NoVoteError: there is no prompt with a verdict.
        """
        votes = self.votes(prompts, answers, base_answers)
        read = [vote for vote in votes if vote is not None]
        self._check_any(len(read), len(votes))
        asked = [text_key(p) for p, vote in zip(prompts, votes, strict=True) if vote is not None]
        low, high = share_interval(read, asked)
        longer = [words(a) - words(b) for a, b in zip(answers, base_answers, strict=True)]
        return WinRate(
            value=math.fsum(read) / len(read),
            low=low,
            high=high,
            n=len(read),
            ties=read.count(0.5),
            unread=len(votes) - len(read),
            judge=self.name,
            judge_accuracy=self.validation.accuracy if self.validation else None,
            length_delta=sum(longer) / len(longer),
            items=tuple(votes),
        )

    def _check_any(self, read: int, n: int) -> None:
        if not read:
            raise NoVoteError(
                f"{self.name}: no readable verdict on any of {n} pairs of answers; "
                "look at what it says, or choose another judge."
            )


def plain(text: Text) -> str:
    """Return a text, or the contents of its messages one after the other."""
    return text if isinstance(text, str) else "\n".join(m["content"] or "" for m in text)


def words(text: str) -> int:
    """Return how many words a text has, as blanks separate them."""
    return len(text.split())
