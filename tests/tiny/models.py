"""Tiny random models of every supported family, and adapters with a visible effect."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qadapter.config import QConfig
from qadapter.model import QAdapterModel

VOCAB = 97
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "smollm3": {"no_rope_layers": [1, 1, 0, 1]},
    "mistral": {"sliding_window": 6},
    "gemma2": {"head_dim": 8, "sliding_window": 6},
    "gemma3_text": {"head_dim": 8, "sliding_window": 6},
    "phi3": {},
    "gpt_neox": {},
    "gpt2": {},
}
UNUSUAL: dict[str, dict[str, Any]] = {
    "granite": {"logits_scaling": 4.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2},
    "cohere": {"logit_scale": 0.25},
    "phi": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "gemma3n_text": {"head_dim": 8, "num_kv_shared_layers": 0, "vocab_size_per_layer_input": VOCAB},
}
"""Families whose head is scaled, or whose decoder does not end as others do."""
WHOLE = ("phi", "opt", "gemma3n_text")
"""Those of them whose decoder cannot be split."""


def tiny_base(family: str, seed: int = 0) -> Any:
    """Return a four-layer random model in float32, eval mode."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**_COMMON, **(FAMILIES | UNUSUAL)[family]})
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    return AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)


def tiny_adapter(family: str = "llama", *, effect: float = 0.3, **fields: Any) -> QAdapterModel:
    """Return a Q-adapter whose LoRA is random and large enough to change greedy answers."""
    create = {k: fields.pop(k) for k in ("trunk", "target_modules") if k in fields}
    q_config = QConfig(**{"alpha_0": 0.5, "alpha_tilde": 0.5, **fields})
    model = QAdapterModel.create(tiny_base(family), q_config, lora_r=4, **{"trunk": 0.5, **create})
    return disturbed(model, effect)


def disturbed(model: QAdapterModel, effect: float = 0.3, *, seed: int = 7) -> QAdapterModel:
    """Return the model with a random adapter in the place of its own."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.adapter_parameters().values():
        parameter.data = effect * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def parts(
    ids: torch.Tensor, mask: torch.Tensor, lengths: Sequence[int]
) -> Iterator[tuple[slice, dict[str, Any]]]:
    """Yield rows of tokens in parts of these lengths: their columns, and a model's arguments."""
    end = 0
    for length in lengths:
        start, end = end, end + length
        columns = slice(start, end)
        yield (
            columns,
            {
                "input_ids": ids[:, columns],
                "attention_mask": mask[:, :end],
                "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, columns],
                "use_cache": True,
            },
        )
