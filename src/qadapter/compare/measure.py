"""Figures of a policy that are the same for every method: log-ratios, KL, answers.

A method's adapter, whoever trained it, is scored by its log-ratio log π(y|x) − log π1(y|x), the
implicit reward of DPO (arXiv:2305.18290), which for Q-Adapter with α0 = α̃ and γ = 1 orders a pair
as its own return does (METHOD I1, I2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
from torch import Tensor

from qadapter import fused, hub
from qadapter.config import QConfig
from qadapter.data import Text, TokenizedPair, tokenize_prompt
from qadapter.errors import DataError
from qadapter.model import QAdapterModel, Streams
from qadapter.packing import pad_rows
from qadapter.policy import Policy
from qadapter.stats import half_ties

_BATCH_TOKENS = 4096


def load_policy(model: str, adapter: Path | None) -> Policy:
    """Return the policy of an adapter's directory, or of an untrained one: the base.

    In float32 also where training is in bfloat16, which blurs log-ratios as small as these.
    """
    dtype, device = torch.float32, hub.pick_device()
    if adapter:
        return Policy.from_pretrained(adapter, model, dtype=dtype, device=device)
    base = hub.load_base(model, dtype=dtype, device=device)
    q_config = QConfig(alpha_0=1.0, alpha_tilde=1.0)
    return Policy(QAdapterModel.create(base, q_config), hub.load_tokenizer(model))


@dataclass(frozen=True)
class Figures:
    """Sums over the scored tokens of R rows, of the base and of π_s at S strengths."""

    tokens: Tensor
    """`[R]` int64."""
    base: Tensor
    """`[R]` float64, log π1 of the tokens, nats."""
    policy: Tensor
    """`[S, R]` float64, log π_s of the tokens, nats."""
    kl: Tensor | None
    """`[S, R]` float64, KL(π1 ‖ π_s) in the states in which the tokens are chosen, nats."""


def log_probs(
    model: QAdapterModel, states: Streams, actions: Tensor, strength: float | None
) -> Tensor:
    """Return log π_s(a|s), or for `strength` None log π1(a|s), of M states `[M, D]`: `[M]`."""
    weight = model.head_weight
    if weight is not None:
        states = states.to(weight.dtype)
        hidden = states.base if strength is None else model.mix(states, strength)
        taken = (hidden.float() * weight[actions].float()).sum(-1)
        return (taken - fused.linear_logsumexp(hidden, weight)).double()
    parts = []
    for i in range(0, len(actions), 256):
        part = states.at(slice(i, i + 256))
        if strength is None:
            with model.adapter_off():
                logits = model.head(part.base)
        else:
            logits = model.policy_logits(part, strength)
        chosen = logits.float().log_softmax(-1).gather(1, actions[i : i + 256, None])[:, 0]
        parts.append(chosen.double())
    return torch.cat(parts)


def row_figures(
    policy: Policy,
    rows: Sequence[Sequence[int]],
    starts: Sequence[int],
    strengths: Sequence[float],
    *,
    kl: bool = True,
) -> Figures:
    """Return the figures of rows of tokens, each scored from its index `starts` (at least 1) on.

    Whatever the strengths, a row goes once through the layers.
    """
    n, s = len(rows), len(strengths)
    tokens = torch.tensor([len(row) - at for row, at in zip(rows, starts, strict=True)])
    base, scored = torch.zeros(n, dtype=torch.float64), torch.zeros(s, n, dtype=torch.float64)
    far = torch.zeros(s, n, dtype=torch.float64) if kl else None
    model = policy.model
    # There the policy is the base itself: nothing to compute (METHOD §5).
    q = model.q_config
    moved = [j for j, s in enumerate(strengths) if s or q.alpha_0 != q.alpha_tilde]
    with torch.no_grad():
        for index in _batches([len(row) for row in rows]):
            ids, mask = pad_rows([rows[i] for i in index], 0)
            first = torch.tensor([starts[i] for i in index])[:, None]
            at = (mask[:, 1:].bool() & (torch.arange(1, ids.shape[1])[None] >= first)).to(
                model.device
            )
            ids, mask = ids.to(model.device), mask.to(model.device)
            streams = model.streams(ids, mask)
            states = streams.at((slice(None), slice(-1))).at(at)
            actions = ids[:, 1:][at]
            owner = torch.tensor(index).repeat_interleave(at.sum(1).cpu())
            base.index_add_(0, owner, log_probs(model, states, actions, None).cpu())
            for j in moved:
                found = log_probs(model, states, actions, strengths[j]).cpu()
                scored[j].index_add_(0, owner, found)
                if far is not None:
                    gap = model.kl_from_base(states, strengths[j]).double().cpu()
                    far[j].index_add_(0, owner, gap)
    for j in {*range(len(strengths))} - {*moved}:
        scored[j] = base
    return Figures(tokens, base, scored, far)


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Return indices in batches of alike lengths, each of at most so many padded tokens."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= _BATCH_TOKENS:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def preference(
    policy: Policy, pairs: Sequence[TokenizedPair], strengths: Sequence[float]
) -> list[dict[str, Any]]:
    """Return for each strength how the policy tells chosen from rejected on held-out pairs.

    `margins` are, per pair, log-ratio of chosen less that of rejected, nats; `correct` is 1 where
    it is positive, ½ at a tie. `margins_per_token` and `correct_per_token` are the same of
    log-ratios a token. `ranking_accuracy`, by pair `ranked`, asks the policy itself: whose
    log-likelihood per token is greater (as lm-eval's `acc_norm` does by bytes).
    """
    rows = [[*p.prompt_ids, *p.chosen_ids] for p in pairs]
    rows += [[*p.prompt_ids, *p.rejected_ids] for p in pairs]
    found = row_figures(policy, rows, [len(p.prompt_ids) for p in pairs] * 2, strengths, kl=False)
    points = []
    for policy_sums in found.policy:
        won, lost = (policy_sums - found.base).chunk(2)
        won_tokens, lost_tokens = found.tokens.chunk(2)
        margin, correct = won - lost, _half_ties(won - lost)
        by_token = won / won_tokens - lost / lost_tokens
        correct_by_token = _half_ties(by_token)
        likely, unlikely = (policy_sums / found.tokens).chunk(2)
        ranked = _half_ties(likely - unlikely)
        points.append(
            {
                "accuracy": float(correct.mean()),
                "margin": float(margin.mean()),
                "accuracy_per_token": float(correct_by_token.mean()),
                "margin_per_token": float(by_token.mean()),
                "ranking_accuracy": float(ranked.mean()),
                "correct": correct.tolist(),
                "ranked": ranked.tolist(),
                "margins": [round(m, 5) for m in margin.tolist()],
                "correct_per_token": correct_by_token.tolist(),
                "margins_per_token": [round(m, 7) for m in by_token.tolist()],
            }
        )
    return points


def length_baseline(pairs: Sequence[TokenizedPair]) -> float:
    """Return the accuracy of preferring the longer response; a tie counts half."""
    return fmean(half_ties(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs)


def _half_ties(difference: Tensor) -> Tensor:
    return (difference > 0).double() + 0.5 * (difference == 0).double()


def drift(
    policy: Policy, texts: Sequence[str], strengths: Sequence[float], *, max_tokens: int
) -> list[dict[str, Any]]:
    """Return for each strength KL to the base a token, and perplexities, on general text.

    The text is cut into windows as `Policy.drift` cuts it; the sums of each are kept, to be
    resampled.
    """
    rows = policy.text_rows(texts, max_tokens=max_tokens)
    found = row_figures(policy, rows, [1] * len(rows), strengths)
    total = int(found.tokens.sum())
    return [
        {
            "kl": float(kl.sum()) / total,
            "perplexity": float(torch.exp(-scored.sum() / total)),
            "base_perplexity": float(torch.exp(-found.base.sum() / total)),
            "window_kl": kl.tolist(),
            "window_tokens": found.tokens.tolist(),
        }
        for kl, scored in zip(cast(Tensor, found.kl), found.policy, strict=True)
    ]


def on_answers(
    policy: Policy, prompts: Sequence[Text], answers: Sequence[str], strengths: Sequence[float]
) -> list[dict[str, Any]]:
    """Return for each strength KL(π1 ‖ π) a token on answers that the base gave, nats.

    The sums of each answer are kept, to be resampled; `kl_generations` is None where the base said
    nothing.
    """
    rows, starts = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        before = tokenize_prompt(prompt, policy.tokenizer)
        after = cast(list[int], policy.tokenizer(answer, add_special_tokens=False)["input_ids"])
        if after:
            rows.append([*before, *after])
            starts.append(len(before))
    if not rows:
        return [{"kl_generations": None, "answer_kl": [], "answer_tokens": []} for _ in strengths]
    found = row_figures(policy, rows, starts, strengths)
    total = int(found.tokens.sum())
    return [
        {
            "kl_generations": float(kl.sum()) / total,
            "answer_kl": kl.tolist(),
            "answer_tokens": found.tokens.tolist(),
        }
        for kl in cast(Tensor, found.kl)
    ]


def with_room(
    policy: Policy, prompts: Sequence[Text], room: int, *, within: int, most: int, mend: str
) -> list[Text]:
    """Return the first prompts, `most` of them, after which `room` tokens fit `within` so many.

    Raises:
        DataError: none leaves so much; the sentence ends with `mend`.
    """
    kept: list[Text] = []
    for prompt in prompts:
        if len(kept) < most and len(tokenize_prompt(prompt, policy.tokenizer)) + room <= within:
            kept.append(prompt)
    if not kept:
        raise DataError(
            f"none of {len(prompts)} prompts leaves {room} of {within} tokens for an answer; "
            f"{mend}."
        )
    return kept


def answers_of(
    policy: Policy, prompts: Sequence[Text], *, strength: float, **generate: Any
) -> list[list[int]]:
    """Return the tokens of answers in the prompts' order, alike lengths made together.

    As `Policy.answer_ids`, whose options these are; where the longest prompt of a batch comes near
    the base's context, the others' answers end with its own.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(str(prompts[i])))
    out: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), 16):
        index = order[start : start + 16]
        made = policy.answer_ids([prompts[i] for i in index], strength=strength, **generate)
        for i, ids in zip(index, made, strict=True):
            out[i] = ids
    return out
