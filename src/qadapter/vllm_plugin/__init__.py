"""vLLM serves what `qadapter export --format policy` writes, once qadapter is installed beside it.

vLLM finds `register` through the entry point `vllm.general_plugins` and calls it in each of its
processes; `model` is imported where the model is built.
"""

from __future__ import annotations

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types of the bases that `model` can build."""


def register() -> None:
    """Tell vLLM's registry of models where `QAdapterForCausalLM` is."""
    from vllm import ModelRegistry

    name = "QAdapterForCausalLM"
    if name not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(name, f"qadapter.vllm_plugin.model:{name}")
