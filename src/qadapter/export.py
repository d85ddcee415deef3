"""A policy in forms that other programs serve, each reloaded and checked before it is there.

`export_policy` the whole policy at any strength (see `qadapter.standalone`); `export_merged` one
plain model, `export_gguf` the same for llama.cpp, `export_peft` the plain LoRA: these three are the
policy only where it is the adapted model itself.
"""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from qadapter import hub
from qadapter.decoder import decoder_layers
from qadapter.errors import ConfigError, ModelError, UserError
from qadapter.files import check_new, check_writable, whole_directory
from qadapter.functional import mixing_weights
from qadapter.model import QAdapterModel
from qadapter.model.adapter import load_plain, save_plain
from qadapter.model.merge import base_state, merged_state, widened
from qadapter.model.stacked import cache_shifts, hooked, rounding
from qadapter.policy import Policy
from qadapter.standalone.config import QAdapterPolicyConfig
from qadapter.standalone.model import QAdapterForCausalLM
from qadapter.strength import Strength, each, told

CONVERTER = "convert_hf_to_gguf.py"
GGUF_NAME = "model.gguf"

PROMPTS = (
    "The ferry leaves twice a day in summer, and once a day",
    "Question: What is 17 + 25?\nAnswer:",
    "def largest(numbers):\n    return max(",
)
"""What an export is checked on."""

_DRAWS = 8
"""How often the policy is computed with other last bits: one draw may be five times too small."""


@dataclass(frozen=True)
class Export:
    """What was written, and how it compares with the policy it came from."""

    directory: Path
    difference: float
    """Largest difference of a log-prob, nats, over all tokens that may follow each of `PROMPTS`."""
    allowed: float
    """What rounding explains of it, nats."""


def export_policy(policy: Policy, output: str | Path, *, strength: Strength = 1.0) -> Export:
    """Write a transformers model directory of a `QAdapterForCausalLM`; `strength` is its default.

    Raises:
        ModelError: the policy needs two heads, or its base is not one of transformers' own.
        UserError: `output` is there already or cannot be written, or what was written is not the
            policy; nothing is left.
    """
    model = policy.model
    if model.head_weight is None:
        raise ModelError(
            f"{model.base_name}: an adapted, biased, scaled or soft-capped head needs two heads, "
            "which --format policy does not have; use --format merged, or adapt only the layers."
        )
    if not model.shares_trunk:
        raise ModelError(
            f"{model.base_name}: its decoder cannot be split, and so not be lengthened by a branch "
            "as --format policy does; use --format merged."
        )

    def write(directory: Path) -> None:
        try:
            with torch.device("meta"):
                exported = QAdapterForCausalLM(_policy_config(model, strength))
        # What a config or a decoder raises that cannot have more layers than the base has.
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ModelError(
                f"{model.base_name}: its decoder cannot be lengthened by a branch as --format "
                f"policy does ({error}); use --format merged."
            ) from error
        _save(policy, exported, _policy_state(model), directory)

    return _checked(policy, output, strength, write, _reload)


def export_merged(policy: Policy, output: str | Path, *, strength: Strength = 1.0) -> Export:
    """Write the base with the adapter merged: one plain model of the base's architecture.

    Raises:
        ConfigError: the policy is not that model at this strength.
        ModelError, UserError: as `export_policy`.
    """
    _require_alone(policy.model, strength, "merged")
    return _checked(policy, output, strength, lambda at: _write_merged(policy, at), _reload)


def export_peft(policy: Policy, output: str | Path, *, strength: Strength = 1.0) -> Export:
    """Write the adapter alone, as peft and stock LoRA loaders read it.

    Raises:
        ConfigError, UserError: as `export_merged`.
    """
    _require_alone(policy.model, strength, "peft")
    base = policy.model.base

    def reload(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
        plain = hub.load_base(
            base.name_or_path or policy.model.q_config.base_model,
            dtype=dtype,
            trust_remote_code=_brings_code(base),
        )
        return load_plain(plain, directory)

    def write(directory: Path) -> None:
        save_plain(policy.model.peft_model, directory)

    return _checked(policy, output, strength, write, reload, merged=False)


def export_gguf(policy: Policy, output: str | Path, *, strength: Strength = 1.0) -> Export:
    """Write the merged model as `model.gguf`, by llama.cpp's own converter.

    Raises:
        ConfigError: as `export_merged`; or the converter is not found.
        UserError: as `export_merged`; or the converter fails.
    """
    _require_alone(policy.model, strength, "gguf")
    converter = _find_converter()

    def write(directory: Path) -> None:
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".merged.") as merged:
            _write_merged(policy, Path(merged))
            _convert(converter, Path(merged), directory / GGUF_NAME, policy.model.dtype)

    def reload(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
        return cast(
            PreTrainedModel,
            AutoModelForCausalLM.from_pretrained(directory, gguf_file=GGUF_NAME, dtype=dtype),
        )

    newer = "another format, or a llama.cpp that knows transformers 5: older ones misread its files"
    return _checked(policy, output, strength, write, reload, instead=newer)


FORMATS: dict[str, Callable[..., Export]] = {
    "policy": export_policy,
    "merged": export_merged,
    "peft": export_peft,
    "gguf": export_gguf,
}
"""What `qadapter export --format` chooses from."""


def _require_alone(model: QAdapterModel, strength: Strength, name: str) -> None:
    """Raise ConfigError unless the adapted model's logits are the policy's."""
    if len(model.adapters) > 1:
        raise ConfigError(
            f"--format {name}: is one adapter's, and the hidden states of {len(model.adapters)} "
            "are mixed; use --format policy."
        )
    q, (strength,) = model.q_config, each(strength, [model.adapters[0].name])
    alphas = {"alpha_0": q.alpha_0, "alpha_tilde": q.alpha_tilde}
    weights = mixing_weights([strength], parameterization=q.parameterization, **alphas)
    if weights != [1.0, 0.0]:
        raise ConfigError(
            f"--format {name}: is the policy only at strength 1 with alpha_0 = alpha_tilde "
            f"(residual), and this one is {q.parameterization} with strength {told(strength)}, "
            f"alpha_0 {q.alpha_0:g} and alpha_tilde {q.alpha_tilde:g}; use --format policy."
        )


def _brings_code(model: PreTrainedModel) -> bool:
    return type(model).__module__.startswith("transformers_modules")


def _policy_config(model: QAdapterModel, strength: Strength) -> QAdapterPolicyConfig:
    """Return the config of a model with a branch for each adapter."""
    text = model.config.to_dict()  # which says L + ΣK layers already
    text.pop("_name_or_path", None)  # a place on this machine
    q = model.q_config
    return QAdapterPolicyConfig(
        text_config=text,
        branch_layers=[adapter.depth for adapter in model.adapters],
        strength=list(strength) if isinstance(strength, tuple) else strength,
        alpha_0=q.alpha_0,
        alpha_tilde=q.alpha_tilde,
        parameterization=q.parameterization,
    )


def _policy_state(model: QAdapterModel) -> dict[str, Tensor]:
    """Return the tensors of a `QAdapterForCausalLM`, its layers where a cache has theirs."""
    base, decoder = model.base, model.base.get_decoder()
    names = {id(m): n for n, m in base.named_modules()}
    n_layers = int(base.config.num_hidden_layers)
    inside = names[id(decoder)] + "."
    layers = names[id(decoder_layers(decoder, n_layers))]
    state = {
        "model." + n.removeprefix(inside): t
        for n, t in base_state(model).items()
        if n.startswith(inside)
    }
    for adapter, shift in cache_shifts(model.adapters).items():
        for name, tensor in merged_state(model, adapter).items():
            if name.startswith(layers + "."):
                index, rest = name.removeprefix(layers + ".").split(".", 1)
                if int(index) >= adapter.first:
                    place = f"{layers}.{int(index) + shift}.{rest}"
                    # Cloned: safetensors holds no tensor under two names.
                    state["model." + place.removeprefix(inside)] = tensor.clone()
    return state | {"lm_head.weight": cast(Tensor, model.head_weight).detach()}


def _write_merged(policy: Policy, directory: Path) -> None:
    base = policy.model.base
    with torch.device("meta"):
        # Through its fields, and so without what `let_pack` set in it.
        merged = type(base)(type(base.config).from_dict(base.config.to_dict()))
    (adapter,) = policy.model.adapters
    _save(policy, merged, merged_state(policy.model, adapter), directory)


def _save(
    policy: Policy, model: PreTrainedModel, state: dict[str, Tensor], directory: Path
) -> None:
    """Write a model made on the meta device, with these weights, and all that is beside them."""
    if _brings_code(policy.model.base):
        raise ModelError(
            f"{policy.model.base_name}: brings Python code of its own, which an export does not "
            "carry; load the adapter itself."
        )
    _, strange = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    left = sorted({n for n, p in model.named_parameters() if p.is_meta} | set(strange))
    if left:
        raise ModelError(
            f"{policy.model.base_name}: {left[0]!r} has no place in the exported model; "
            "this architecture cannot be exported."
        )
    model.config.dtype = policy.model.dtype
    model.generation_config = copy.deepcopy(policy.model.generation_config)
    model.generation_config.eos_token_id = sorted(policy.end_ids)
    model.generation_config.pad_token_id = policy.tokenizer.pad_token_id
    model.save_pretrained(directory)
    policy.tokenizer.save_pretrained(directory)


def _reload(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    return cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(directory, dtype=dtype))


def _checked(
    policy: Policy,
    output: str | Path,
    strength: Strength,
    write: Callable[[Path], None],
    reload: Callable[[Path, torch.dtype], PreTrainedModel],
    *,
    merged: bool = True,
    instead: str = "another format",
) -> Export:
    """Write, load what was written, and let it stay if it is the policy.

    Args:
        merged: whether what is written are sums of weights, rounded to the policy's dtype.
    """
    if held := hub.quantization_of(policy.model.base):
        raise ModelError(
            f"{output}: the policy's base is held in {held}, which no export has; load the adapter "
            "on the base itself by --no-check-base, measure it again, and export that."
        )
    check_new(output)
    check_writable(output)
    with whole_directory(output) as partial:
        write(partial)
        difference, allowed = _compare(
            policy, strength, lambda d: reload(partial, d), merged=merged
        )
        if not difference <= allowed:
            raise UserError(
                f"{output}: the exported log-probs differ from the policy's by {difference:.3g} "
                f"nats, and rounding explains {allowed:.3g}; nothing was written, use {instead}."
            )
    return Export(Path(output), difference, allowed)


@torch.no_grad()
def _compare(
    policy: Policy,
    strength: Strength,
    reload: Callable[[torch.dtype], PreTrainedModel],
    *,
    merged: bool,
) -> tuple[float, float]:
    """Return the largest difference of log-probs on `PROMPTS`, and what rounding explains, nats.

    Both compute in float32 or wider whatever the dtype of their weights: half precision's own noise
    would hide an adapter. The export reads each prompt in two parts, so that its cache is checked
    too.
    """
    model, read = policy.model, policy.tokenizer
    rows = [read(text, return_tensors="pt")["input_ids"].to(model.device) for text in PROMPTS]
    with widened(model, as_merged=merged) as wide:
        ours = [model(input_ids=ids, strength=strength).logits.double() for ids in rows]
        # At some states a model magnifies the last bits: the policy shows by how much itself.
        magnified = 0.0
        for seed in range(_DRAWS):
            with _last_bits_off(model, torch.finfo(wide).eps, seed):
                again = [model(input_ids=ids, strength=strength).logits.double() for ids in rows]
            magnified = max(magnified, *(_apart(a, b) for a, b in zip(again, ours, strict=True)))
    # In its own dtype first, for what a model makes of that beside its weights.
    exported: Any = reload(model.dtype).eval().to(model.device, wide)
    difference = 0.0
    for ids, logits in zip(rows, ours, strict=True):
        cache = DynamicCache(config=exported.config)
        parts = [
            exported(input_ids=part, past_key_values=cache, use_cache=True).logits
            for part in ids.split(-(-ids.shape[1] // 2), dim=1)
        ]
        theirs = torch.cat(parts, dim=1).double()[..., : logits.shape[-1]]
        difference = max(difference, _apart(theirs, logits))
    scale = max(1.0, *(float(logits.abs().max()) for logits in ours))
    # No policy is so wild that anything would pass.
    return difference, max(rounding(wide) * scale, min(4 * magnified, 0.01 * scale))


@contextmanager
def _last_bits_off(model: QAdapterModel, eps: float, seed: int) -> Iterator[None]:
    """Put what every module of the model computes off by a random last bit inside the block."""
    numbers = torch.Generator().manual_seed(seed)

    def off(module: Any, args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        return output * (1 + eps * torch.randn(output.shape, generator=numbers).to(output))

    leaves = [module for module in model.modules() if not any(module.children())]
    with hooked([module.register_forward_hook(off) for module in leaves]):
        yield


def _apart(one: Tensor, other: Tensor) -> float:
    """Return the largest difference of log-probs, nats; infinite where there is none."""
    found = (one.log_softmax(-1) - other.log_softmax(-1)).abs().max()
    return float(found.nan_to_num(nan=torch.inf))


def _find_converter() -> Path:
    """Return llama.cpp's converter: where LLAMA_CPP says, else on PATH."""
    named = os.environ.get("LLAMA_CPP")
    found = Path(named) / CONVERTER if named else shutil.which(CONVERTER)
    if found is None or not Path(found).is_file():
        raise ConfigError(
            f"--format gguf: llama.cpp's {CONVERTER} is not found; set LLAMA_CPP to a checkout of "
            "llama.cpp, or use --format merged."
        )
    return Path(found)


def _convert(converter: Path, merged: Path, output: Path, dtype: torch.dtype) -> None:
    kind = {torch.float32: "f32", torch.bfloat16: "bf16"}.get(dtype, "f16")
    words = [sys.executable, str(converter), str(merged), "--outfile", str(output)]
    done = subprocess.run([*words, "--outtype", kind], capture_output=True, text=True)
    if done.returncode or not output.is_file():
        said = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
        raise UserError(
            f"--format gguf: {converter} failed ({said}); install what it needs beside qadapter, "
            "or use --format merged and convert that elsewhere."
        )
