"""Exports: what is written says what the policy says, in every form and every way of decoding."""

from __future__ import annotations

import json
import subprocess
import sys
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES, VOCAB, disturbed, tiny_adapter, tiny_base
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaConfig

from qadapter import export, hub
from qadapter.cli import main
from qadapter.config import QConfig
from qadapter.errors import ConfigError, ModelError, UserError
from qadapter.functional import mixing_weights
from qadapter.model import QAdapterModel
from qadapter.policy import Policy
from qadapter.standalone.config import QAdapterPolicyConfig
from qadapter.standalone.model import QAdapterForCausalLM
from qadapter.vllm_plugin.live import live_part

TOLERANCE = 1e-5  # float32, six layers of width 32, logits of order one

FIELDS: list[dict[str, Any]] = [
    {},
    {"alpha_0": 0.2, "alpha_tilde": 0.7},
    {"alpha_0": 0.3, "alpha_tilde": 0.9, "parameterization": "raw"},
]


def tokens(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


def standalone(model: QAdapterModel, strength: float = 1.0) -> Any:
    """Return the exported model without going through files."""
    with torch.device("meta"):
        shape = QAdapterForCausalLM(export._policy_config(model, strength))
    found = QAdapterForCausalLM(shape.config).to(model.dtype)
    state = export._policy_state(model)
    missing, strange = found.load_state_dict(state, strict=False)
    assert not strange
    assert not [name for name in missing if "lm_head" not in name]
    found.generation_config.eos_token_id = None
    return found.eval()


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gemma2"])
@pytest.mark.parametrize("fields", FIELDS, ids=["residual", "tempered", "raw"])
def test_it_is_the_policy_at_every_strength(family: str, fields: dict[str, Any]) -> None:
    model, ids = tiny_adapter(family, **fields), tokens()
    found = standalone(model)
    for strength in (0.0, 0.3, 1.0, 1.7):
        found.config.strength = strength
        with torch.no_grad():
            theirs = found(input_ids=ids).logits.log_softmax(-1)
            ours = model(input_ids=ids, strength=strength).logits.log_softmax(-1)
        assert torch.allclose(theirs, ours, atol=TOLERANCE), strength


def test_in_float64_the_merged_branch_is_the_adapters_to_the_last_digits() -> None:
    """What differs in float32 is rounding, then, even of an adapter far larger than its base."""
    model, ids = tiny_adapter("qwen2", effect=1.0).double(), tokens()
    found = standalone(model, 0.7)
    with torch.no_grad():
        ours, base = (model(input_ids=ids, strength=s).logits for s in (0.7, 0.0))
        assert torch.allclose(found(input_ids=ids).logits, ours, atol=1e-12, rtol=0)
    assert (ours - base).abs().max() > 0.05


@pytest.mark.parametrize("trunk", [0.0, 0.75])
def test_any_depth_of_branch(trunk: float) -> None:
    model, ids = tiny_adapter(trunk=trunk), tokens()
    with torch.no_grad():
        ours = model(input_ids=ids, strength=0.6).logits
        assert torch.allclose(standalone(model, 0.6)(input_ids=ids).logits, ours, atol=TOLERANCE)


@cache
def _small() -> Any:
    # In float64: a norm of few, small numbers made 2e-5 of float32's last bit in one case of many.
    return standalone(tiny_adapter(), 0.7).double()


@settings(max_examples=10, deadline=None)
@given(
    padding=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    cut=st.integers(0, 3),
    seed=st.integers(0, 2**16),
)
def test_its_cache_is_an_ordinary_one(
    padding: list[int], lengths: list[int], cut: int, seed: int
) -> None:
    """Rows padded on the left, read in parts, reordered, cropped and read on are the rows alone."""
    model = _small()
    generator = torch.Generator().manual_seed(seed)
    width = 7 + sum(lengths)
    ids = torch.randint(3, VOCAB, (len(padding), width), generator=generator)
    mask = torch.ones_like(ids)
    for row, pad in enumerate(padding):
        ids[row, :pad], mask[row, :pad] = 0, 0
    kept, end = DynamicCache(config=model.config), 0
    order = torch.randperm(len(padding), generator=generator)
    with torch.no_grad():
        for length in [7, *lengths]:
            start, end = end, end + length
            part = {"attention_mask": mask[:, :end], "past_key_values": kept}
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, start:end]
            logits = model(input_ids=ids[:, start:end], position_ids=positions, **part).logits
        assert len(kept.layers) == 6
        kept.reorder_cache(order)
        ids, mask = ids[order], mask[order]
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, end - cut :]
        if cut:
            kept.crop(-cut)
            part = {"attention_mask": mask, "past_key_values": kept}
            logits = model(input_ids=ids[:, end - cut :], position_ids=positions, **part).logits
        else:
            logits = logits[order]
        for row in range(len(padding)):
            alone = model(input_ids=ids[row : row + 1, int((mask[row] == 0).sum()) :]).logits
            assert torch.allclose(logits[row, -1], alone[0, -1], rtol=0, atol=1e-12)


def test_every_way_of_generating_is_the_policys() -> None:
    ours, theirs, ids = tiny_adapter(), standalone(tiny_adapter(), 0.6), tokens()
    options: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": None}
    for way in ({"do_sample": False}, {"num_beams": 3, "do_sample": False}, {"do_sample": True}):
        torch.manual_seed(3)
        expected = ours.generate(input_ids=ids, strength=0.6, **way, **options)
        torch.manual_seed(3)
        assert torch.equal(theirs.generate(input_ids=ids, **way, **options), expected)
    greedy = theirs.generate(ids[:1], do_sample=False, **options)
    assistant = standalone(tiny_adapter(), 0.0)  # which guesses wrong now and then
    early = [{"assistant_early_exit": layers} for layers in (2, 4, 5)]
    for helper in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 2}, *early):
        assert torch.equal(theirs.generate(ids[:1], do_sample=False, **helper, **options), greedy)


def test_branches_of_two_adapters_add() -> None:
    """Two branches of different depths on one base: the residuals' sum, each at its strength."""
    deep, flat = tiny_adapter(trunk=0.5), tiny_adapter(trunk=0.75, effect=0.5)
    ids = tokens()
    fields = export._policy_config(deep, 1.0).to_dict()
    fields |= {"branch_layers": [2, 1], "strength": [0.7, 0.4]}
    fields["text_config"]["num_hidden_layers"] = 4 + 2 + 1
    both = QAdapterForCausalLM(QAdapterPolicyConfig(**fields)).eval()
    state = export._policy_state(deep)
    for name, tensor in export._policy_state(flat).items():
        if "layers.4." in name:  # the one layer of its branch
            state[name.replace("layers.4.", "layers.6.")] = tensor
    both.load_state_dict(state)
    with torch.no_grad():
        found = both(input_ids=ids).logits
        streams = [m.streams(ids) for m in (deep, flat)]
        base = deep.head(streams[0].base)
        one, two = (deep.head(s.adapted) for s in streams)
    assert torch.allclose(found, base + 0.7 * (one - base) + 0.4 * (two - base), atol=TOLERANCE)
    both.config.strength = [1.0]
    with pytest.raises(ValueError, match="one for each of 2 adapters"):
        both(input_ids=ids)


def test_the_weights_of_several_adapters() -> None:
    found = mixing_weights([0.5, 0.25], alpha_0=0.2, alpha_tilde=0.8, parameterization="raw")
    assert found == pytest.approx([0.625, 0.3125, 0.25])


@pytest.mark.parametrize("strength", [float("nan"), -0.5, float("inf"), [0.5, 0.5]])
def test_a_strength_that_is_none_is_refused(strength: Any) -> None:
    model = standalone(tiny_adapter())
    model.config.strength = strength
    with pytest.raises(ValueError, match="finite number from 0"):
        model(input_ids=tokens())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("strength", s) for s in ("0.7", None, True, [True], {"a": 1}, [[1]], [], 10**400)],
        *[("alpha_tilde", number) for number in (0, -1, "1", float("inf"))],
        *[("alpha_0", number) for number in (0, -1, None, float("nan"))],
        # What the weights are, even where the number of layers is right.
        *[("branch_layers", depths) for depths in ([2], [1], [1, 1], None)],
        ("base_layers", 4),
        ("parameterization", "raw"),
        ("tie_word_embeddings", True),
        ("text_config", {"num_hidden_layers": 4}),
        ("strengh", 0.0),
    ],
    ids=lambda value: str(value)[:20],
)
def test_an_override_that_is_no_policy_is_refused(field: str, value: Any) -> None:
    """Each was another policy without a word, or failed somewhere in a matrix product."""
    config = export._policy_config(tiny_adapter(), 1.0)
    with pytest.raises(ValueError, match=rf"^{field}: [^\n]*$"):  # noqa: PT012
        config.update({field: value})  # what vLLM's --hf-overrides does
        with torch.device("meta"):
            QAdapterForCausalLM(config)


@pytest.mark.parametrize(
    "fields",
    [
        {"parameterization": "residul"},
        *[{"branch_layers": found} for found in ([1], [3], [2, 1], [], [True], [2.0], None, 2)],
        {"base_layers": 5},
    ],
    ids=str,
)
def test_a_config_whose_parts_do_not_fit_is_refused(fields: dict[str, Any]) -> None:
    config = export._policy_config(tiny_adapter(), 1.0).to_dict() | fields
    with pytest.raises(ValueError, match=r"^(parameterization|branch_layers): [^\n]*$"):
        QAdapterPolicyConfig(**config).check()


def test_overrides_that_are_a_policy_are_taken_and_older_exports_load(
    adapter: str, tmp_path: Path
) -> None:
    export.export_policy(Policy.from_pretrained(adapter), tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    fields = json.loads(file.read_text())
    assert fields.pop("base_layers") == 4
    file.write_text(json.dumps(fields))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", strength=[0.5], alpha_0=0.6)
    assert (found.config.base_layers, found.config.strengths) == (4, [0.5])
    with pytest.raises(ValueError, match="branch_layers"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", branch_layers=[2])


# ── files ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["policy", "merged", "peft"])
def test_the_command_writes_a_complete_directory(
    name: str, adapter: str, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert main(["export", adapter, str(output), "--format", name]) == 0
    printed = capsys.readouterr().out
    assert "largest difference" in printed
    policy, ids = Policy.from_pretrained(adapter), torch.arange(4, 40)[None]
    plain = str(output)
    if name == "peft":
        names = {"adapter_config.json", "adapter_model.safetensors"}
        found = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), plain)
    else:
        names = {"model.safetensors", "config.json", "generation_config.json"}
        names |= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
        found, info = AutoModelForCausalLM.from_pretrained(plain, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys"))
        tokenizer = AutoTokenizer.from_pretrained(plain)
        assert tokenizer.chat_template == policy.tokenizer.chat_template
        assert found.generation_config.eos_token_id == sorted(policy.end_ids)
    assert {p.name for p in output.iterdir()} == names
    assert [p.name for p in tmp_path.iterdir()] == ["out"]  # no temporary directory is left
    assert str(tmp_path) not in "".join(p.read_text() for p in output.glob("*.json"))
    with torch.no_grad():
        ours = policy.model(input_ids=ids).logits
        assert torch.allclose(found.eval()(input_ids=ids).logits, ours, atol=1e-4)


def test_strength_and_dtype_are_kept(adapter: str, tmp_path: Path) -> None:
    words = ["export", adapter, str(tmp_path / "out"), "--strength", "0.4", "--dtype", "bfloat16"]
    assert main(words) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["strength"], config["dtype"]) == (0.4, "bfloat16")
    assert config["architectures"] == ["QAdapterForCausalLM"]
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert found.dtype == torch.bfloat16
    assert found.config.strength == 0.4


def test_a_bases_settings_of_decoding_are_in_no_policy_and_no_export(
    base: str, tmp_path: Path
) -> None:
    """With a penalty in the base's file, `generate`, the server and vLLM said three things."""
    loaded = hub.load_base(base, dtype=torch.float32)
    ends = loaded.generation_config.eos_token_id
    loaded.generation_config.update(
        repetition_penalty=1.8, do_sample=True, temperature=0.3, top_k=3, top_p=0.5
    )
    q_config = QConfig(alpha_0=0.5, alpha_tilde=0.5, base_model=base)
    model = disturbed(QAdapterModel.create(loaded, q_config, lora_r=4))
    policy, ids = Policy(model, tiny_tokenizer()), torch.arange(4, 24)[None]
    export.export_policy(policy, tmp_path / "policy")
    export.export_merged(policy, tmp_path / "merged")
    expected = ids
    with torch.no_grad():
        for _ in range(20):
            best = model(input_ids=expected).logits[:, -1:].argmax(-1)
            expected = torch.cat([expected, best], dim=1)
    exports = [AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("policy", "merged")]
    for found in (model, *exports):
        made = found.generate(ids, max_new_tokens=20, eos_token_id=None)
        assert torch.equal(made, expected)
    for name in ("policy", "merged"):
        kept = json.loads((tmp_path / name / "generation_config.json").read_text())
        kept = {k: v for k, v in kept.items() if v is not None and "transformers" not in k}
        assert set(kept) <= {"bos_token_id", "eos_token_id", "pad_token_id", "_from_model_config"}
        assert kept["eos_token_id"] == [ends]


def test_large_weights_are_sharded(adapter: str, tmp_path: Path) -> None:
    policy = Policy.from_pretrained(adapter)
    export.export_policy(policy, tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    found.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "shards")
    assert all(torch.equal(p, again.state_dict()[n]) for n, p in found.state_dict().items())


@pytest.mark.parametrize("order", ["qadapter, transformers", "transformers, qadapter"])
def test_auto_classes_know_it_whatever_is_imported_first(
    order: str, adapter: str, tmp_path: Path
) -> None:
    export.export_policy(Policy.from_pretrained(adapter), tmp_path / "out")
    early = "from transformers import AutoConfig" if order.startswith("transformers") else ""
    program = f"""{early}
import {order}
config = transformers.AutoConfig.from_pretrained({str(tmp_path / "out")!r})
from transformers import AutoModelForCausalLM, pipeline
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "out")!r})
print(type(config).__name__, type(model).__name__)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["QAdapterPolicyConfig", "QAdapterForCausalLM"]


# ── refusals ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["merged", "peft", "gguf"])
@pytest.mark.parametrize(
    ("fields", "strength"), [({}, 0.5), (FIELDS[1], 1.0), (FIELDS[2], 1.0)], ids=str
)
def test_one_plain_model_is_refused_where_it_is_not_the_policy(
    name: str, fields: dict[str, Any], strength: float, tmp_path: Path
) -> None:
    policy = Policy(tiny_adapter(**fields), tiny_tokenizer())
    with pytest.raises(ConfigError, match=r"is the policy only at strength 1 .* --format policy"):
        export.FORMATS[name](policy, tmp_path / "out", strength=strength)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "model",
    [
        lambda: tiny_adapter("gemma2"),
        lambda: tiny_adapter(target_modules=["q_proj", "lm_head"]),
    ],
    ids=["soft-capped", "adapted head"],
)
def test_two_heads_are_refused(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="needs two heads"):
        export.export_policy(Policy(model(), tiny_tokenizer()), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_decoder_that_cannot_be_longer_is_refused_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One with a list of its own, of a value for each layer, ended in a traceback."""
    monkeypatch.setattr("qadapter.model.branches.by_layer", lambda _: ["layer_types"])
    policy = Policy(tiny_adapter("smollm3"), tiny_tokenizer())
    with pytest.raises(ModelError, match=r"cannot be lengthened by a branch .* --format merged"):
        export.export_policy(policy, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_there_is_refused(
    adapter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("x")
    for place in (tmp_path, tmp_path / "mine"):
        assert main(["export", adapter, str(place)]) == 2
        assert "is there already" in capsys.readouterr().err
    assert (tmp_path / "mine").read_text() == "x"


HALF = torch.bfloat16


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_in_half_precision_what_is_right_stays_by_the_tight_bound(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The noise of two bfloat16 passes was taken for an error, and errors for noise."""
    monkeypatch.setattr(export, "PROMPTS", ("Question:What,is17+25?", "largest(numbers):"))
    tiny_base(family).to(HALF).save_pretrained(tmp_path / "base")
    base = hub.load_base(str(tmp_path / "base"), dtype=HALF)
    q_config = QConfig(alpha_0=0.5, alpha_tilde=0.5, base_model=str(tmp_path / "base"))
    model = disturbed(QAdapterModel.create(base, q_config, lora_r=4, trunk=0.5), 1.0)
    before = {n: p.clone() for n, p in model.named_parameters()}
    policy = Policy(model, tiny_tokenizer())
    for name in ("policy", "merged", "peft"):
        done = export.FORMATS[name](policy, tmp_path / name)
        assert done.allowed < 2e-3, name
    for name, parameter in model.named_parameters():
        assert parameter.dtype == before[name].dtype
        assert torch.equal(parameter, before[name])


def test_a_state_that_magnifies_rounding_is_no_error(
    second: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A correct export was refused for one token at which the last bits grew a thousandfold."""
    monkeypatch.setattr(export, "rounding", lambda _: 0.0)  # the fixed part of the bound
    done = export.export_policy(Policy.from_pretrained(second, dtype=HALF), tmp_path / "out")
    assert 0 < done.difference <= done.allowed < 1e-3


def test_in_half_precision_another_strength_does_not_stay(
    adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = export._policy_config
    policy = Policy.from_pretrained(adapter, dtype=HALF)
    monkeypatch.setattr(export, "_policy_config", lambda model, s: inner(model, 0.998 * s))
    with pytest.raises(UserError, match="differ from the policy's by"):
        export.export_policy(policy, tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["policy", "merged", "peft"])
def test_an_export_that_is_another_policy_does_not_stay(
    name: str, dtype: torch.dtype, adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check is of the files: here a tensor of the adapter is changed on its way to them."""
    policy = Policy.from_pretrained(adapter, dtype=dtype)
    write = {"policy": "_save", "merged": "_save", "peft": "save_plain"}[name]
    inner = getattr(export, write)

    def spoil(*args: Any) -> None:
        parameter = next(iter(policy.model.adapter_parameters().values()))
        state = args[2] if write == "_save" else None
        if state is not None:
            key = max(k for k in state if "layers" in k and "q_proj" in k)
            state[key] = state[key] * 1.05
            inner(*args)
            return
        kept = parameter.data.clone()
        parameter.data.mul_(1.5)
        inner(*args)
        parameter.data = kept

    monkeypatch.setattr(export, write, spoil)
    with pytest.raises(UserError, match=r"differ from the policy's by .* nothing was written"):
        export.FORMATS[name](policy, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# ── llama.cpp ───────────────────────────────────────────────────────────────────────────────────


def test_gguf_without_the_converter_is_refused(
    adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    assert main(["export", adapter, str(tmp_path / "out"), "--format", "gguf"]) == 2
    assert "convert_hf_to_gguf.py is not found; set LLAMA_CPP" in capsys.readouterr().err


def test_a_converter_that_fails_is_told(
    adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / export.CONVERTER).write_text("raise SystemExit('no such family')")
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    assert main(["export", adapter, str(tmp_path / "out"), "--format", "gguf"]) == 2
    assert "failed (no such family)" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == [export.CONVERTER]


@given(
    data=st.data(),
    layers=st.integers(1, 5),
    several=st.integers(1, 3),
    alpha_0=st.sampled_from([0.25, 0.5, 1.0]),
    raw=st.booleans(),
)
def test_what_is_left_out_has_no_weight(
    data: st.DataObject, layers: int, several: int, alpha_0: float, raw: bool
) -> None:
    """On lines of numbered layers: what is left says the same states with the same weights."""
    depths = data.draw(st.lists(st.integers(1, layers), min_size=several, max_size=several))
    some = st.sampled_from([0.0, 0.1, 0.2, 0.25, 0.5, 0.7, 1.0])
    strengths = data.draw(st.lists(some, min_size=several, max_size=several))
    config = QAdapterPolicyConfig(
        text_config=LlamaConfig(num_hidden_layers=layers + sum(depths)),
        branch_layers=depths,
        strength=strengths,
        alpha_0=alpha_0,
        alpha_tilde=0.5,
        parameterization="raw" if raw else "residual",
    )
    # A state is told by the layers that made it.
    base = tuple(range(layers))
    firsts = [layers + sum(depths[:i]) for i in range(several)]
    ends = [
        base[: layers - depth] + tuple(range(first, first + depth))
        for first, depth in zip(firsts, depths, strict=True)
    ]
    exact = [Fraction(str(s)) for s in strengths]
    scale = Fraction(str(alpha_0)) * 2
    whole = [*(2 * s for s in exact), scale] if raw else [*exact, scale - sum(exact)]
    wanted = {end: float(w) for end, w in zip([*ends, base], whole, strict=True) if w}

    live = live_part(config, fixed=True)

    run = tuple(range(live.base_layers))
    found = [
        run[: branch.start] + tuple(range(branch.first, branch.first + branch.depth))
        for branch in live.branches
    ]
    found += [run] if live.mixes_base else []
    weights = dict(zip(found, live.weights, strict=True))
    assert weights == pytest.approx(wanted)
    assert live.layers == {layer for end in wanted for layer in end}

    every = live_part(config, fixed=False)
    assert every.weights == pytest.approx([float(w) for w in whole])
    assert every.layers == set(range(layers + sum(depths)))
