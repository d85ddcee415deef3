"""A judge fitted on preference pairs; the owner of scikit-learn."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from qadapter.data import Pair, Text, prompt_key
from qadapter.errors import DataError, UserError
from qadapter.judge.verdicts import Judge, NoVoteError, Validation, WinRate, plain, words

_LENGTH_SCALE = 10.0
"""Makes the penalty on the length's weight small: what length explains is put down to length."""
_PENALTIES = (0.1, 1.0, 10.0, 100.0)
"""Inverse strengths of the ridge penalty, of which cross-validation takes one."""


class BradleyTerryJudge(Judge):
    """A Bradley–Terry model on features of text.

    The probability that one answer beats another is σ(w·(f(answer) − f(other))), so a logistic
    regression without intercept on differences of features, fitted with a ridge penalty chosen by
    cross-validation over prompts. Features: TF-IDF of words and pairs of words, and of runs of 3
    and 4 characters; the words that answer and prompt share, as a share of either; the logarithm
    of the number of words. The last is fitted with the rest, so that the others need not stand
    for it, and is left out of votes unless `length_controlled` is False (as in length-controlled
    AlpacaEval, arXiv:2404.04475). Length that shows in the words themselves is not taken out.

    It may not vote until `validate` has shown it better than chance. Fit it on pairs that no
    compared method trains on: else it prefers whoever remembers them.
    """

    def __init__(self, *, length_controlled: bool = True) -> None:
        super().__init__("Bradley–Terry" + (", length-controlled" if length_controlled else ""))
        self.length_controlled = length_controlled
        self._features: _Features | None = None
        self._weights: Any = None
        self._seen: frozenset[str] = frozenset()

    def fit(self, pairs: Sequence[Pair], seed: int = 0) -> None:
        """Learn from pairs; the same pairs and seed give the same judge.

        Args:
            pairs: preference pairs that no compared method trains on.
            seed: of the split into folds that chooses the penalty.

        Raises:
            DataError: the pairs have fewer than two prompts.
        """
        import numpy as np
        import scipy.sparse
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import GridSearchCV, GroupKFold

        prompts = [prompt_key(pair) for pair in pairs]
        if len(set(prompts)) < 2:
            raise DataError(f"{self.name}: pairs of two prompts at least are needed; give more.")
        chosen, rejected = ([plain(p.chosen) for p in pairs], [plain(p.rejected) for p in pairs])
        self._features = _Features([*chosen, *rejected])
        self._seen, self.validation = frozenset(prompts), None
        difference = self._difference([pair.prompt for pair in pairs], chosen, rejected)
        # A term that no pair has keeps the weight 0; left out, the search is many times faster.
        used = np.unique(difference.indices)
        rows = difference[:, used]
        # Each pair both ways round: the regression wants two classes, and neither is favoured.
        search = GridSearchCV(
            LogisticRegression(fit_intercept=False, max_iter=1000),
            {"C": _PENALTIES},
            scoring="neg_log_loss",
            cv=GroupKFold(min(3, len(self._seen)), shuffle=True, random_state=seed),
        )
        labels = [1] * len(pairs) + [0] * len(pairs)
        search.fit(scipy.sparse.vstack([rows, -rows]), labels, groups=prompts * 2)
        self._weights = np.zeros(difference.shape[1])
        self._weights[used] = search.best_estimator_.coef_[0]

    def votes(
        self, prompts: Sequence[Text], answers: Sequence[str], others: Sequence[str]
    ) -> list[float | None]:
        """Return for each prompt the probability that the answer is better than the other.

        Raises:
            UserError: it was not fitted.
        """
        weights = self._voting_weights()
        scores = self._difference(prompts, answers, others) @ weights
        # σ(x) without overflow.
        return [0.5 + 0.5 * math.tanh(score / 2) for score in scores]

    def rewards(self, prompts: Sequence[Text], answers: Sequence[str]) -> list[float]:
        """Return w·f(answer), the reward that the model was fitted to; length counts as it votes.

        Raises:
            UserError: it was not fitted.
        """
        weights = self._voting_weights()
        assert self._features is not None
        scores = self._features([plain(prompt) for prompt in prompts], answers) @ weights
        return [float(score) for score in scores]

    def _voting_weights(self) -> Any:
        if self._weights is None:
            raise UserError(f"{self.name}: was not fitted; fit it on preference pairs first.")
        weights = self._weights.copy()
        if self.length_controlled:
            weights[-1] = 0.0  # the length is the last feature
        return weights

    def validate(self, held_out: Sequence[Pair]) -> Validation:
        """Return, and keep, how well it tells chosen from rejected as it votes.

        Raises:
            DataError: a pair's prompt is one that it was fitted on.
            UserError: there are no pairs.
        """
        for pair in held_out:
            if prompt_key(pair) in self._seen:
                raise DataError(
                    f"{pair.source}: the judge was fitted on this prompt; "
                    "validate it on prompts that it has not seen."
                )
        return super().validate(held_out)

    def win_rate(
        self, prompts: Sequence[Text], answers: Sequence[str], base_answers: Sequence[str]
    ) -> WinRate:
        """Return how far it prefers the answers to the base's: its votes, prompt by prompt.

        Raises:
            NoVoteError: it is not shown to be better than chance.
            UserError: it was not validated.
        """
        if self.validation is None:
            raise UserError(f"{self.name}: may not vote before it is validated on held-out pairs.")
        low, high = self.validation.accuracy_ci
        if low <= 0.5:
            raise NoVoteError(
                f"{self.name}: may not vote, since its accuracy on held-out pairs, "
                f"{self.validation.accuracy:.1%} (95% CI {low:.1%}–{high:.1%}), may be chance; "
                "fit it on more pairs or choose another judge."
            )
        return super().win_rate(prompts, answers, base_answers)

    def _difference(
        self, prompts: Sequence[Text], answers: Sequence[str], others: Sequence[str]
    ) -> Any:
        """Return f(answer) − f(other), sparse `[n, features]`."""
        assert self._features is not None
        asked = [plain(prompt) for prompt in prompts]
        return self._features(asked, answers) - self._features(asked, others)


class _Features:
    """Texts to numbers: a sparse row an answer, its length in the last column.

    Args:
        texts: where the frequencies of terms are counted.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
        from sklearn.pipeline import make_pipeline

        def tfidf(**options: Any) -> Any:
            # Hashed, so that no text is without terms to fit on and nothing is left out as rare.
            terms = HashingVectorizer(n_features=2**17, alternate_sign=False, norm=None, **options)
            return make_pipeline(terms, TfidfTransformer(sublinear_tf=True)).fit(texts)

        self._terms = (
            tfidf(ngram_range=(1, 2), token_pattern=r"\w+|[^\w\s]"),
            tfidf(ngram_range=(3, 4), analyzer="char_wb"),
        )

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> Any:
        import scipy.sparse

        dense = [
            (*_shared(prompt, answer), _LENGTH_SCALE * math.log1p(words(answer)))
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        terms = [vectorise.transform(answers) for vectorise in self._terms]
        return scipy.sparse.hstack([*terms, scipy.sparse.csr_matrix(dense)], format="csr")


def _shared(prompt: str, answer: str) -> tuple[float, float]:
    """Return the share of the answer's words that the prompt has, and the other way round."""
    asked, said = (set(re.findall(r"\w+", text.lower())) for text in (prompt, answer))
    shared = len(asked & said)
    return shared / max(1, len(said)), shared / max(1, len(asked))
