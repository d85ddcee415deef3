"""General text that a base writes by itself, for anchors where no text is at hand (METHOD §6)."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ROWS = 48
_LEAST_TOKENS = 32


def free_texts(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    *,
    max_tokens: int = 112,
    seed: int = 0,
) -> list[str]:
    """Return texts that the base samples at temperature 1, each from a random first token.

    Data-free distillation samples its text so (LLM-QAT, arXiv:2305.17888): the first token spreads
    the texts over what the base knows, and the rest is drawn from the very distribution that
    KL(π1 ‖ π) asks about. Special tokens are left out of the texts. The same seed gives the same
    texts on the same machine.

    Args:
        count: how many texts.
        max_tokens: most tokens of each; the base may end one after 32.
    """
    special = set(tokenizer.all_special_ids)
    ordinary = torch.tensor([i for i in range(len(tokenizer)) if i not in special])
    training = base.training
    base.eval()
    texts: list[str] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        while len(texts) < count:
            first = ordinary[torch.randint(len(ordinary), (_ROWS, 1))].to(base.device)
            rows = base.generate(
                first,
                attention_mask=torch.ones_like(first),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                repetition_penalty=1.0,
                max_new_tokens=max_tokens - 1,
                min_new_tokens=min(_LEAST_TOKENS, max_tokens) - 1,
                pad_token_id=tokenizer.pad_token_id,
            )
            made = tokenizer.batch_decode(rows, skip_special_tokens=True)
            texts += [text for text in made if text.strip()]
    base.train(training)
    return texts[:count]
