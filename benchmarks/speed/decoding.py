"""Greedy decoding in the machine's dtype: the base, the policy, the authors' two models."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from costs import shares
from measuring import own_dtype
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from training import LAYERS, LINEAR
from transformers import DynamicCache

from qadapter import hub
from qadapter.config import QAdapterConfig
from qadapter.model import QAdapterModel
from qadapter.policy import Policy

Generate = Callable[[Tensor, int], Any]
"""Prompts `[B, T]` and a number of new tokens."""


def _fill(model: nn.Module) -> None:
    """Make the adapter do something: small random numbers where LoRA starts at zero."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)


def _generate(model: Any) -> Generate:
    def run(ids: Tensor, new: int) -> Any:
        return model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=new,
            max_new_tokens=new,
        )

    return run


def base(name: str) -> Generate:
    """Return the base alone."""
    return _generate(hub.load_base(name, dtype=own_dtype()))


def policy(name: str, layers: int) -> Generate:
    """Return the policy, saved and loaded as a user would."""
    model = QAdapterModel.create(
        hub.load_base(name, dtype=own_dtype()),
        QAdapterConfig(output_dir=tempfile.gettempdir()).q_config(
            base_model=name, tokenizer_hash=hub.tokenizer_hash(hub.load_tokenizer(name))
        ),
        layers_to_transform=list(range(LAYERS - layers, LAYERS)),
    )
    _fill(model)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        return _generate(Policy.from_pretrained(directory, dtype=own_dtype()).model)


def two_models(name: str) -> Generate:
    """Return the authors' way: base and adapted model, each with its cache, logits combined."""
    from peft import LoraConfig, get_peft_model

    q = QAdapterConfig(output_dir=tempfile.gettempdir())
    reference = hub.load_base(name, dtype=own_dtype())
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=LINEAR)
    adapted = get_peft_model(hub.load_base(name, dtype=own_dtype()), lora).eval()
    _fill(adapted)

    @torch.no_grad()
    def run(ids: Tensor, new: int) -> Tensor:
        caches = [DynamicCache(), DynamicCache()]
        token, out = ids, [ids]
        for _ in range(new):
            z_1, z = (
                model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
                .logits[:, -1]
                .float()
                for model, cache in zip((reference, adapted), caches, strict=True)
            )
            values = q.alpha_tilde * (z - z_1)
            logits = (q.alpha_0 * z_1.log_softmax(-1) + values) / q.alpha_tilde
            token = logits.argmax(-1, keepdim=True)
            out.append(token)
        return torch.cat(out, dim=1)

    return run


def made(kind: str) -> Generate:
    """Return one of `base`, `policy_k8`, `policy_k30` and `two_models`."""
    name = QAdapterConfig(output_dir=tempfile.gettempdir()).model
    makers: dict[str, Callable[[], Generate]] = {
        "base": lambda: base(name),
        "policy_k8": lambda: policy(name, 8),
        "policy_k30": lambda: policy(name, LAYERS),
        "two_models": lambda: two_models(name),
    }
    return makers[kind]()


def prompts(batch: int, length: int, seed: int) -> Tensor:
    """Return prompts `[batch, length]` of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1000, 40_000, (batch, length), generator=generator)


def profiled(*, kind: str, batch: int, prompt: int, new: int, seed: int) -> dict[str, Any]:
    """Return where the time of the first token and of later ones goes."""
    torch.manual_seed(seed)
    run, ids = made(kind), prompts(batch, prompt, seed)
    run(ids, 3)
    out = {}
    for part, tokens in (("first", 1), ("whole", new)):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            run(ids, tokens)
        out[part] = shares(profiler)
    return out


def decode(
    *, kinds: list[str], batches: list[int], prompt: int, new: int, rounds: int, seed: int
) -> dict[str, Any]:
    """Return milliseconds of the first token and of each later one, by kind and batch size.

    The kinds take turns in one process: a token is a few hundredths of a second, and between
    processes the machine's own pace changes by more than what is to be seen.
    """
    torch.manual_seed(seed)
    runs = {kind: made(kind) for kind in kinds}
    out: dict[str, Any] = {kind: {} for kind in kinds}
    for batch in batches:
        ids = prompts(batch, prompt, seed)
        for run in runs.values():
            run(ids, 3)
        times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
        for _ in range(rounds):
            for kind, run in runs.items():
                times[kind].append(_times(run, ids, new))
        for kind, taken in times.items():
            first, later = (median(column) for column in zip(*taken, strict=True))
            out[kind][str(batch)] = {
                "first_ms": first * 1e3,
                "token_ms": later * 1e3,
                "tokens_per_second": batch / later,
            }
    return {"batches": out}


def _times(run: Generate, ids: Tensor, new: int) -> tuple[float, float]:
    """Return seconds of the first token and of each later one."""
    start = time.perf_counter()
    run(ids, 1)
    first = time.perf_counter() - start
    start = time.perf_counter()
    length = run(ids, new).shape[1]
    if length != ids.shape[1] + new:
        raise RuntimeError(f"{length - ids.shape[1]} tokens came instead of {new}")
    return first, (time.perf_counter() - start - first) / (new - 1)
