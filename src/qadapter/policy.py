"""The policy a user meets: a Q-adapter with its tokenizer; answers, scores, drift from the base."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from qadapter import hub
from qadapter.config import QConfig
from qadapter.data import (
    WINDOW,
    Pair,
    TokenizedPair,
    text_windows,
    tokenize_pairs,
    tokenize_prompt,
)
from qadapter.errors import ArtefactError, ConfigError, DataError
from qadapter.model import Adapter, QAdapterModel, Streams
from qadapter.objective import PairLoss, batch_streams, packable, pair_loss
from qadapter.packing import PairCollator, pack_pairs, pad_rows
from qadapter.stats import half_ties, numbered, share_interval
from qadapter.strength import Strength


@dataclass(frozen=True)
class Score:
    """How a policy judges held-out pairs, and how far it went from its base."""

    pairs: int
    """Pairs scored."""
    prompts: int
    """Distinct prompts that they have."""
    dropped: int
    """Pairs left out because they are too long."""
    accuracy: float
    """Share of pairs whose chosen response has the larger return R; a tie counts half."""
    accuracy_ci: tuple[float, float]
    """95% interval of the accuracy, prompts resampled with all their pairs (`share_interval`)."""
    length_baseline: float
    """Accuracy of preferring the longer response; a tie counts half."""
    margin: float
    """Mean of R_w − R_l, nats of reward."""
    kl: float
    """Mean KL(π1 ‖ π_s) per response token, nats."""
    strength: Strength
    """s, or s of each adapter."""
    chosen_rewards: tuple[float, ...]
    """R_w of each pair."""
    rejected_rewards: tuple[float, ...]
    """R_l of each pair."""

    def summary(self) -> dict[str, Any]:
        """Return the figures without the rewards of each pair."""
        fields = asdict(self)
        del fields["chosen_rewards"], fields["rejected_rewards"]
        return fields


@dataclass(frozen=True)
class Drift:
    """How far a policy went from its base on general text."""

    tokens: int
    """Predicted tokens."""
    kl: float
    """Mean KL(π1 ‖ π_s) per token, nats."""
    perplexity: float
    """Of the policy."""
    base_perplexity: float
    """Of the base."""


@dataclass(frozen=True)
class KLCurve:
    """KL(π1 ‖ π_s) on one text as a function of s: the model has run, the head runs at each call.

    In each state log π_s = (α0/α̃)·log π1 + s·Δ − const, where Δ(a) is the adapted logit less the
    base's (residual), or the adapted logit over α̃ (raw). So KL(π1 ‖ π_s) is, up to a constant,
    logsumexp_a[(α0/α̃)·log π1 + s·Δ] − s·E_π1[Δ]: convex in s. Where α0 = α̃ it is 0 at s = 0, its
    least value, so it falls nowhere on s ≥ 0. A mean over states keeps all this.
    """

    model: QAdapterModel
    streams: Streams
    """`[N, D]`, final hidden states where a token is predicted."""
    lengths: tuple[int, ...]
    """Predicted tokens of each row; their sum is N."""

    @property
    def tokens(self) -> int:
        """N, predicted tokens."""
        return sum(self.lengths)

    def by_row(self, strength: float) -> list[float]:
        """Return the mean KL per token of each row, nats."""
        ends = accumulate(self.lengths)
        rows = [slice(end - n, end) for n, end in zip(self.lengths, ends, strict=True)]
        with torch.no_grad():
            return [
                float(self.model.kl_from_base(self.streams.at(row), strength).double().mean())
                for row in rows
            ]

    def __call__(self, strength: float) -> float:
        """Return the mean KL per token, nats."""
        return self.mean(self.by_row(strength))

    def mean(self, by_row: Sequence[float]) -> float:
        """Return the mean over tokens of what `by_row` returned."""
        return math.fsum(map(operator.mul, by_row, self.lengths)) / self.tokens


class Policy:
    """A Q-adapter, or several on one base whose residuals add, with their tokenizer.

    Where a strength is asked for it is one number, or one for each of several adapters.

    Args:
        model: the adapters on their base.
        tokenizer: the base's own tokenizer.
    """

    def __init__(self, model: QAdapterModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.end_ids = hub.end_of_turn_ids(tokenizer, model.generation_config)
        self.context: int = hub.context_of(model.config) or sys.maxsize
        """Tokens that the base can look at."""
        self.check_base = True
        """Whether an adapter of another base, tokenizer or template is refused."""

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path | Mapping[str, str | Path],
        base: str | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
        check_base: bool = True,
        trust_remote_code: bool = False,
    ) -> Policy:
        """Load a saved Q-adapter, or several of one base, with base and tokenizer.

        Args:
            directory: the adapter's; or of several by name, in their order.
            base: another place of the same base; default the one the artefact names.
            check_base: refuse another base, tokenizer or template; load the base quantised as it
                was in training.
            trust_remote_code: let the base run the Python code that comes with it.

        Raises:
            ArtefactError, ModelError: as `QAdapterModel.from_pretrained`; or the tokenizer or its
                chat template is not the one the adapter was trained with.
            ConfigError: the residuals of several cannot be added.
        """
        if isinstance(directory, Mapping):
            (name, directory), *more = directory.items()
        else:
            name, more = Path(directory).resolve().name, []
        q_config = QConfig.load(directory)
        place = base or q_config.base_model
        tokenizer = hub.load_tokenizer(place, trust_remote_code=trust_remote_code)
        if check_base and q_config.tokenizer_hash not in ("", hub.tokenizer_hash(tokenizer)):
            raise ArtefactError(
                f"{directory}: was trained with another tokenizer or chat template than {place!r} "
                "has now; restore it, or pass --no-check-base if you know better."
            )
        loaded = hub.load_base(
            place,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            quantization=q_config.base_quantization if check_base else "",
        )
        model = QAdapterModel.from_pretrained(directory, loaded, check_base=check_base)
        model.rename(name)
        for other, where in more:
            model.add(where, other, check_base=check_base)
        policy = cls(model, tokenizer)
        policy.check_base = check_base
        return policy

    def add(self, directory: str | Path, name: str) -> Adapter:
        """Load one more adapter of the same base and tokenizer; their residuals add.

        Raises:
            ArtefactError, ConfigError: as `QAdapterModel.add`; nothing is changed then.
        """
        added: Adapter = self.model.add(directory, name, check_base=self.check_base)
        return added

    @property
    def names(self) -> list[str]:
        """The adapters' names."""
        return [adapter.name for adapter in self.model.adapters]

    def answer(
        self,
        prompts: Sequence[str | list[dict[str, str]]],
        *,
        strength: float | Sequence[float] | Sequence[Sequence[float]] = 1.0,
        **generate: Any,
    ) -> list[str]:
        """Return one answer a prompt; greedy unless `generate` asks transformers otherwise.

        Arguments and errors are those of `answer_ids`.
        """
        return self.texts(self.answer_ids(prompts, strength=strength, **generate))

    def texts(self, answers: Sequence[Sequence[int]]) -> list[str]:
        """Return what answers in tokens say, without special tokens and space around it."""
        texts: list[str] = self.tokenizer.batch_decode(list(answers), skip_special_tokens=True)
        return [text.strip() for text in texts]

    def prompt_ids(self, prompts: Sequence[str | list[dict[str, str]]]) -> list[list[int]]:
        """Return the tokens of prompts, as `answer_ids` takes them.

        Raises:
            DataError: one fills the model's context.
        """
        rows = [tokenize_prompt(prompt, self.tokenizer) for prompt in prompts]
        for i, row in enumerate(rows, start=1):
            if len(row) >= self.context:
                raise DataError(
                    f"prompt {i}: {len(row)} tokens do not fit the model's context of "
                    f"{self.context}; shorten it."
                )
        return rows

    def answer_ids(
        self,
        prompts: Sequence[str | list[dict[str, str]]],
        *,
        strength: float | Sequence[float] | Sequence[Sequence[float]] = 1.0,
        **generate: Any,
    ) -> list[list[int]]:
        """Return the tokens of one answer a prompt, its end the last unless it was cut.

        Args:
            prompts: conversations (lists of messages), or plain text to be continued.
            strength: s, one number or one a prompt; of several adapters one number, one each, or
                so many for each prompt.
            generate: passed on to `transformers`' `generate`.

        Raises:
            DataError: a prompt fills the model's context.
        """
        rows = self.prompt_ids(prompts)
        pad = cast(int, self.tokenizer.pad_token_id)
        ids, mask = pad_rows(rows, pad, left=True)
        options = {"do_sample": False, "max_new_tokens": 256, **generate}
        # Past its context a model either fails or talks nonsense: an answer ends there.
        room = self.context - max(len(row) for row in rows)
        options["max_new_tokens"] = min(options["max_new_tokens"], room)
        out = self.model.generate(
            input_ids=ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            strength=strength,
            pad_token_id=pad,
            eos_token_id=sorted(self.end_ids),
            **options,
        )
        new: list[list[int]] = out[:, ids.shape[1] :].tolist()
        ends = (next((i for i, t in enumerate(row) if t in self.end_ids), len(row)) for row in new)
        return [row[: end + 1] for row, end in zip(new, ends, strict=True)]

    def judge(self, pairs: Sequence[TokenizedPair], *, strength: Strength = 1.0) -> PairLoss:
        """Return the rewards of one batch of pairs at a strength.

        Raises:
            ConfigError: of several adapters, rewards were defined in different ways.
        """
        for name in ("gamma", "objective", "returns"):
            values = {getattr(a.q_config, name): a.name for a in self.model.adapters}
            if len(values) > 1:
                (one, first), (other, second), *_ = values.items()
                raise ConfigError(
                    f"{second}: was trained with {name} {other} and {first} with {one}, so their "
                    "sum has no one reward of a token; score and explain them one at a time."
                )
        collate = PairCollator(cast(int, self.tokenizer.pad_token_id))
        batch = (pack_pairs if packable(self.model) else collate)(pairs)
        inputs = {k: cast(torch.Tensor, v).to(self.model.device) for k, v in batch.items()}
        with torch.no_grad():
            return pair_loss(
                self.model, batch_streams(self.model, inputs), inputs, strength=strength
            )

    def score(
        self,
        pairs: Sequence[Pair],
        *,
        strength: Strength = 1.0,
        max_length: int = 1024,
        batch_size: int = 8,
    ) -> Score:
        """Return how the policy judges pairs (METHOD M4, M5).

        Raises:
            DataError: no pair fits `max_length`.
        """
        tokenized, dropped = tokenize_pairs(
            pairs,
            self.tokenizer,
            end_ids=self.end_ids,
            max_length=min(max_length, self.context),
        )
        # Alike lengths together waste less padding; the order is put back below.
        order = sorted(range(len(tokenized)), key=lambda i: _length(tokenized[i]))
        chosen, rejected = [0.0] * len(tokenized), [0.0] * len(tokenized)
        kl_sum, n_tokens = 0.0, 0
        for start in range(0, len(order), batch_size):
            index = order[start : start + batch_size]
            out = self.judge([tokenized[i] for i in index], strength=strength)
            states = out.states.at(out.taken)
            with torch.no_grad():
                kl_sum += float(self.model.kl_from_base(states, strength).double().sum())
            n_tokens += len(states.base)
            for i, won, lost in zip(
                index, *(r.tolist() for r in out.returns.chunk(2)), strict=True
            ):
                chosen[i], rejected[i] = won, lost
        right = [half_ties(w, r) for w, r in zip(chosen, rejected, strict=True)]
        prompts = numbered(tuple(p.prompt_ids) for p in tokenized)
        longer = sum(half_ties(len(p.chosen_ids), len(p.rejected_ids)) for p in tokenized)
        n = len(tokenized)
        return Score(
            pairs=n,
            prompts=max(prompts) + 1,
            dropped=sum(len(v) for v in dropped.values()),
            accuracy=sum(right) / n,
            accuracy_ci=share_interval(right, prompts),
            length_baseline=longer / n,
            margin=(math.fsum(chosen) - math.fsum(rejected)) / n,
            kl=kl_sum / n_tokens,
            strength=strength,
            chosen_rewards=tuple(chosen),
            rejected_rewards=tuple(rejected),
        )

    def drift(
        self,
        texts: Sequence[str],
        *,
        strength: Strength = 1.0,
        window: int = WINDOW,
        max_tokens: int = 50_000,
        batch_size: int = 8,
    ) -> Drift:
        """Return KL to the base and perplexities on general text.

        The texts are joined by newlines and cut into windows, of which as many as hold `max_tokens`
        are read, evenly spread; the first token of each window is not predicted.

        Raises:
            DataError: the texts hold fewer than two tokens.
        """
        rows = self.text_rows(texts, window=window, max_tokens=max_tokens)
        kl = policy_nll = base_nll = 0.0
        tokens = 0
        for states, targets in self._read(rows, batch_size):
            with torch.no_grad():
                kl += float(self.model.kl_from_base(states, strength).double().sum())
                policy_logits = partial(self.model.policy_logits, strength=strength)
                policy_nll += _nll(policy_logits, states, targets)
                with self.model.adapter_off():
                    base_nll += _nll(lambda s: self.model.head(s.base), states, targets)
            tokens += len(targets)
        return Drift(
            tokens, kl / tokens, math.exp(policy_nll / tokens), math.exp(base_nll / tokens)
        )

    def text_rows(
        self, texts: Sequence[str], *, window: int = WINDOW, max_tokens: int | None = None
    ) -> list[list[int]]:
        """Return the texts' tokens, joined by newlines, in rows of `window`, the last shorter.

        Of more than `max_tokens` as many rows as hold these are taken, evenly spread.

        Raises:
            DataError: the texts hold fewer than two tokens.
        """
        window = min(window, self.context)
        return text_windows(texts, self.tokenizer, window=window, max_tokens=max_tokens)

    def kl_curve(self, rows: Sequence[Sequence[int]], *, batch_size: int = 8) -> KLCurve:
        """Return KL to the base on rows of tokens as a function of the strength.

        It holds the hidden states, 2·D numbers a token, on the model's device.
        """
        streams = [states for states, _ in self._read(rows, batch_size)]
        return KLCurve(self.model, Streams.cat(streams), tuple(len(row) - 1 for row in rows))

    def _read(
        self, rows: Sequence[Sequence[int]], batch_size: int
    ) -> Iterator[tuple[Streams, torch.Tensor]]:
        """Yield each batch's states `[M, D]`, row after row, and the tokens `[M]` they predict."""
        for start in range(0, len(rows), batch_size):
            ids, mask = (
                t.to(self.model.device) for t in pad_rows(rows[start : start + batch_size], 0)
            )
            with torch.no_grad():
                streams = self.model.streams(ids, mask)
            at = mask[:, 1:].bool()
            yield streams.at((slice(None), slice(-1))).at(at), ids[:, 1:][at]


def _nll(
    logits: Callable[[Streams], torch.Tensor], states: Streams, targets: torch.Tensor
) -> float:
    """Return the summed negative log-likelihood, a few hundred states' logits at a time."""
    total = 0.0
    for i in range(0, len(targets), 256):
        part = slice(i, i + 256)
        loss = torch.nn.functional.cross_entropy(
            logits(states.at(part)).float(), targets[part], reduction="sum"
        )
        total += float(loss)
    return total


def _length(pair: TokenizedPair) -> int:
    return len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))
