"""General text that a base writes by itself, for anchors where no text is at hand (METHOD §6)."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qadapter import hub
from qadapter.data import read_texts
from qadapter.errors import ModelError
from qadapter.files import cache_dir, write_jsonl

_log = logging.getLogger(__name__)

COUNT = 192
"""Texts where no other number is asked for."""
MAX_TOKENS = 112
"""Most tokens of a text."""
_LEAST_TOKENS = 32
_ROWS = 48


def free_texts(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, *, seed: int = 0
) -> Iterator[str]:
    """Yield texts that the base samples at temperature 1, each from a random first token.

    Data-free distillation samples its text so (LLM-QAT, arXiv:2305.17888): the first token spreads
    the texts over what the base knows, and the rest is drawn from the very distribution that
    KL(π1 ‖ π) asks about, whatever the base's own generation settings; only that no text ends
    before 32 tokens. Special tokens are left out of the texts, so they may tokenise a little
    otherwise than they were drawn. The same seed gives the same texts on the same machine.

    Args:
        count: how many texts, of at most `MAX_TOKENS` tokens.

    Raises:
        ModelError: the tokenizer has no ordinary tokens, or the base writes nothing else.
    """
    start = cast(list[int], tokenizer("")["input_ids"])
    ordinary = _ordinary(base, tokenizer)
    device = base.device
    with _sampling(base), torch.random.fork_rng([] if device.type == "cpu" else [device]):
        torch.manual_seed(seed)
        left = count
        while left:
            first = ordinary[torch.randint(len(ordinary), (_ROWS, 1))]
            rows = torch.cat([torch.tensor([start] * _ROWS, dtype=torch.long), first], dim=1)
            made = _continued(base, rows.to(device), len(start))
            texts = tokenizer.batch_decode(made, skip_special_tokens=True)
            written = [text for text in texts if text.strip()][:left]
            if not written:
                raise ModelError(
                    f"{base.config.name_or_path}: writes nothing by itself; anchor on a text file."
                )
            left -= len(written)
            yield from written


def own_texts(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, base_hash: str
) -> list[str]:
    """Return `COUNT` texts of a base's own, written once and then kept in the user cache.

    Args:
        base_hash: of its weights (`hub.weights_hash`).

    Raises:
        ModelError: as `free_texts`.
        UserError: the cache cannot be written or read.
    """
    about = [base_hash, hub.quantization_of(base), str(base.dtype), hub.tokenizer_hash(tokenizer)]
    about += [str(number) for number in (COUNT, MAX_TOKENS, _LEAST_TOKENS)]
    name = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    path = cache_dir() / "anchors" / f"{name}.jsonl"
    if not path.is_file():
        _log.info("the base writes %d texts to be held to, once; they are kept in %s", COUNT, path)
        write_jsonl(path, ({"text": text} for text in free_texts(base, tokenizer, COUNT)))
    return read_texts(str(path))


def _ordinary(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return the ids of tokens that stand for text, `[N]` int64."""
    rows = cast(Tensor, base.get_input_embeddings().weight).shape[0]
    added = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ids = sorted(i for i in tokenizer.get_vocab().values() if i < rows and i not in added)
    if not ids:
        raise ModelError(
            f"{tokenizer.name_or_path}: has no tokens but special ones; anchor on a text file."
        )
    return torch.tensor(ids)


@contextmanager
def _sampling(base: PreTrainedModel) -> Iterator[None]:
    """Let a base sample from π1 itself, without settings of its own; then put all back."""
    training, settings = base.training, base.generation_config
    base.eval()
    base.generation_config = hub.token_ids(settings)
    try:
        yield
    finally:
        base.generation_config = settings
        base.train(training)


def _continued(base: PreTrainedModel, rows: Tensor, start: int) -> Tensor:
    """Return rows with what the base samples after them."""
    ends = base.generation_config.eos_token_id
    made = base.generate(
        rows,
        attention_mask=torch.ones_like(rows),
        do_sample=True,
        top_k=0,
        max_new_tokens=MAX_TOKENS - 1,
        min_new_tokens=_LEAST_TOKENS - 1,
        pad_token_id=ends[0] if isinstance(ends, list) else ends,
    )
    return cast(Tensor, made)[:, start:]
