"""General text that a base writes by itself, for anchors where no text is at hand (METHOD §6)."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qadapter import hub
from qadapter.data import read_texts
from qadapter.errors import ModelError, UserError
from qadapter.files import cache_dir, check_writable, damage, seal, whole_directory, write_jsonl

_log = logging.getLogger(__name__)

COUNT = 192
"""Texts where no other number is asked for."""
_FILE = "texts.jsonl"
_FORMAT = 1
"""Raised when texts come to be written otherwise, so that old ones are no longer found."""
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
    devices = [] if device.type == "cpu" else [device]
    with _sampling(base), torch.random.fork_rng(devices, device_type=device.type):
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

    What is kept is sealed, and written anew where it is damaged.

    Args:
        base_hash: of its weights (`hub.weights_hash`).

    Raises:
        ModelError: as `free_texts`.
        UserError: the cache cannot be written.
    """
    ends = base.generation_config.eos_token_id if base.generation_config else None
    about: list[object] = [
        base_hash,
        hub.quantization_of(base),
        str(base.dtype),
        hub.tokenizer_hash(tokenizer),
    ]
    about += [hub.config_key(base), ends, _FORMAT, COUNT, MAX_TOKENS, _LEAST_TOKENS, _ROWS]
    told = json.dumps(about, sort_keys=True)
    place = cache_dir() / "anchors" / hashlib.sha256(told.encode()).hexdigest()[:16]
    if damage(place) is None:
        return read_texts(str(place / _FILE))
    with _cache_told(place.parent):
        check_writable(place)
    _log.info("the base writes %d texts to be held to, once; they are kept in %s", COUNT, place)
    texts = list(free_texts(base, tokenizer, COUNT))
    if damage(place) is not None:  # or another run has written them meanwhile
        with _cache_told(place.parent), whole_directory(place) as partial:
            write_jsonl(partial / _FILE, ({"text": text} for text in texts))
            seal(partial)
    return texts


@contextmanager
def _cache_told(place: Path) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(
            f"{place}: cannot be written, and the base's own texts are kept there; make room, set "
            "QADAPTER_CACHE to another disk, or name a text by --anchor_data F."
        ) from error


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
    context = hub.context_of(base.config) or MAX_TOKENS + start
    most = max(2, min(MAX_TOKENS, context - start))
    try:
        made = base.generate(
            rows,
            attention_mask=torch.ones_like(rows),
            do_sample=True,
            top_k=0,
            max_new_tokens=most - 1,
            min_new_tokens=min(_LEAST_TOKENS, most) - 1,
            pad_token_id=ends[0] if isinstance(ends, list) else ends,
        )
    except RuntimeError as error:  # what sampling says of logits that are not finite, or of memory
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{base.config.name_or_path}: cannot write text by itself ({reason}); anchor on a text "
            "file by --anchor_data F, or train without by --anchor_weight 0."
        ) from error
    return cast(Tensor, made)[:, start:]
