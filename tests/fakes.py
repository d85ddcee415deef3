"""A small real tokenizer: byte-level, ChatML, `<|im_end|>` both end and pad; a base with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY = 260
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
"""Of a tiny base with this tokenizer."""
# vLLM's attention on CPUs takes heads of 32 and more; two ranks want two of them for keys.
SIZES_FOR_VLLM = SIZES | {"hidden_size": 128, "intermediate_size": 96, "head_dim": 32}


def tiny_tokenizer(template: str | None = CHATML, *, bos: bool = False) -> Any:
    """Return a tokenizer with one token a byte; `bos` makes plain text begin with `<bos>`."""
    specials = ["<|im_start|>", "<|im_end|>", "<bos>", "<unk>"]
    vocabulary = {
        t: i for i, t in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if bos:
        from tokenizers.processors import TemplateProcessing

        backend.post_processor = TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


WORDS = ["▁Hello", "▁world", "▁Say", "▁", "▁▁", "▁I", "lo", "s", "é", "!", "▁a", "\n"]


def text_tokenizer() -> Any:
    """Return a tokenizer as Llama 2, Mistral 7B and Phi-3 have, with `▁` for a space.

    What has no token of its own is bytes; a text's first space is stripped in decoding.
    """
    tokens = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    space = decoders.Replace("▁", " ")
    parts = [space, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def write_base(directory: Path, sizes: dict[str, Any] = SIZES) -> None:
    """Write a random Llama with the tokenizer."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
