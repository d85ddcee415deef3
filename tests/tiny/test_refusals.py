"""What is refused, in one sentence and with nothing left behind, and what once was by mistake."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import VOCABULARY, tiny_tokenizer
from models import VOCAB, tiny_adapter
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

from qadapter.cli import main
from qadapter.config import QConfig
from qadapter.data import read_pairs
from qadapter.errors import ArtefactError, DataError, ModelError
from qadapter.model import QAdapterModel
from qadapter.policy import Policy

CONTEXT = 64


def code(words: Sequence[str]) -> int:
    """Return a command's exit code, argparse's own refusals included."""
    try:
        return main(words)
    except SystemExit as stop:
        return int(stop.code or 0)


def train(base: str, data: str, output: Path, *words: str) -> int:
    fixed = "--max_length 200 --learning_rate 0.01 --disable_tqdm true --bf16 false --trunk 0.5"
    fixed += " --anchor_weight 0"
    options = ["--data", data, "--model", base, "--output", str(output), *fixed.split()]
    return code(["train", *options, *" ".join(words).split()])


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one sentence of a refusal: ours on a line of its own, or argparse's last."""
    err = capsys.readouterr().err
    assert "Traceback" not in err
    lines = err.strip().splitlines()
    ours = [line for line in lines if line.startswith("qadapter: ")]
    assert ours == lines[-1:] or (not ours and ": error: " in lines[-1])
    return lines[-1]


def saved(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def rows(path: Path, *values: Any) -> str:
    return write(path, "".join(json.dumps(value) + "\n" for value in values))


# ── models and artefacts ────────────────────────────────────────────────────────────────────────


def test_a_run_with_gradient_checkpointing_gives_the_same_adapter(
    base: str, data: str, tmp_path: Path
) -> None:
    for name in ("false", "true"):
        options = f"--save_strategy no --gradient_checkpointing {name}"
        assert train(base, data, tmp_path / name, options) == 0
    plain, recomputed = saved(tmp_path / "false"), saved(tmp_path / "true")
    assert plain.keys() == recomputed.keys()
    assert all(torch.allclose(recomputed[n], t, atol=1e-5) for n, t in plain.items())


def _without(state: dict[str, torch.Tensor]) -> None:
    del state[min(state)]


def _foreign(state: dict[str, torch.Tensor]) -> None:
    state["base_model.model.lm_head.lora_A.weight"] = torch.zeros(2, 2)


def _renamed(state: dict[str, torch.Tensor]) -> None:
    for name in list(state):
        state[name.replace(".layers.3.", ".layers.0.")] = state.pop(name)


def _not_finite(state: dict[str, torch.Tensor]) -> None:
    state[min(state)][0, 0] = float("nan")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without, "lacks"),
        (_foreign, "foreign"),
        (_renamed, "lacks"),
        (_not_finite, "not finite"),
        (dict.clear, "lacks"),
    ],
)
def test_other_tensors_than_the_adapters_are_refused(
    adapter: str, tmp_path: Path, damage: Callable[[Any], None], message: str
) -> None:
    broken = tmp_path / "adapter"
    shutil.copytree(adapter, broken)
    state = saved(broken)
    damage(state)
    save_file(state, broken / "adapter_model.safetensors")
    with pytest.raises(ArtefactError, match=message):
        QAdapterModel.from_pretrained(broken)
    model = QAdapterModel.from_pretrained(adapter)
    before = {n: p.detach().clone() for n, p in model.adapter_parameters().items()}
    with pytest.raises(ArtefactError, match=message):
        model.load_adapter(broken)
    assert all(torch.equal(before[n], p) for n, p in model.adapter_parameters().items())


@pytest.mark.parametrize(
    ("family", "fields", "trunk"),
    [
        ("qwen3_5_text", {}, 0.0),
        ("qwen3_5_text", {}, 0.5),
        ("olmo_hybrid", {}, 0.0),
        ("olmo_hybrid", {}, 0.5),
        ("mixtral", {"num_local_experts": 2}, 0.75),
        ("lfm2", {"layer_types": ["conv", "full_attention"] * 2}, 0.75),
    ],
)
def test_a_base_without_exact_streams_is_refused(
    family: str, fields: dict[str, Any], trunk: float
) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=VOCAB, pad_token_id=0, eos_token_id=2, **sizes, **heads, **fields
    )
    base = AutoModelForCausalLM.from_config(config).float().eval()
    with pytest.raises(ModelError, match="choose another base"):
        QAdapterModel.create(base, QConfig(alpha_0=0.5, alpha_tilde=0.5), lora_r=2, trunk=trunk)


IDS = torch.arange(3, 15).reshape(3, 4)


@pytest.mark.parametrize(
    "strength",
    [
        float("nan"),
        float("inf"),
        -1.0,
        torch.tensor(-1.0),
        [1.0, 0.5],
        [1.0, 0.5, -0.1],
        [1.0, float("nan"), 0.5],
        torch.ones(4),
        torch.ones(3, 1),
        torch.ones(1, 3),
    ],
    ids=str,
)
def test_a_strength_that_is_none_is_refused(strength: Any) -> None:
    model = tiny_adapter()
    with pytest.raises(ValueError, match="strength"):
        model(input_ids=IDS, strength=strength)
    with pytest.raises(ValueError, match="strength"):
        model.generate(IDS, strength=strength, max_new_tokens=2, do_sample=False)


def test_strengths_may_be_a_list_or_a_tensor_without_dimensions() -> None:
    model, strengths = tiny_adapter(), [0.0, 0.5, 1.5]
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        alone = [
            model(input_ids=IDS[i : i + 1], strength=s).logits[0] for i, s in enumerate(strengths)
        ]
        found = model(input_ids=IDS, strength=strengths).logits
    assert torch.allclose(found, torch.stack(alone), atol=1e-5)
    answers = model.generate(IDS, strength=strengths, min_new_tokens=6, **options)
    for i, s in enumerate(strengths):
        one = model.generate(IDS[i : i + 1], strength=s, min_new_tokens=6, **options)
        assert torch.equal(answers[i], one[0])
    beams = {**options, "num_beams": 3}
    assert torch.equal(
        model.generate(IDS, strength=torch.tensor(0.5), **beams),
        model.generate(IDS, strength=0.5, **beams),
    )


def test_guidance_and_labels_are_refused_and_tuples_given() -> None:
    model = tiny_adapter()
    with pytest.raises(ValueError, match="guidance_scale"):
        model.generate(IDS, guidance_scale=1.5, max_new_tokens=2)
    with pytest.raises(ValueError, match="labels"):
        model(input_ids=IDS, labels=IDS)
    with torch.no_grad():
        found = model(input_ids=IDS, return_dict=False)
        assert isinstance(found, tuple)
        assert torch.equal(found[0], model(input_ids=IDS).logits)


def test_a_base_named_by_a_relative_path_is_found_from_elsewhere(
    base: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(base).parent)
    assert train(Path(base).name, data, tmp_path / "out", "--save_strategy no") == 0
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    names = {"qadapter_config.json": "base_model", "adapter_config.json": "base_model_name_or_path"}
    for file, field in names.items():
        assert json.loads((tmp_path / "out" / file).read_text())[field] == str(Path(base).resolve())
    assert len(Policy.from_pretrained(tmp_path / "out").answer(["Say 1"], max_new_tokens=2)) == 1


def test_embeddings_are_not_adapted_and_the_base_head_is_not_saved(
    base: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--save_strategy no --lora_target_modules q_proj"
    assert train(base, data, tmp_path / "bad", words, "embed_tokens") == 2
    assert "embed_tokens" in told(capsys)
    assert not (tmp_path / "bad").exists()
    assert train(base, data, tmp_path / "out", words, "lm_head") == 0
    names = saved(tmp_path / "out")
    assert any("lm_head.lora_A" in name for name in names)
    assert all("lora_" in name for name in names)
    # The head's own adapter takes part, and plain peft still gives the policy at strength 1.
    policy, ids = Policy.from_pretrained(tmp_path / "out"), torch.arange(4, 40)[None]
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "out")
    ).eval()
    with torch.no_grad():
        ours, theirs = (m(input_ids=ids).logits.log_softmax(-1) for m in (policy.model, plain))
    assert torch.allclose(ours, theirs, atol=1e-5)


# ── learned positions end ───────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory, data: str) -> str:
    """Return an adapter on a GPT-2 of 64 learned positions; some pairs are longer."""
    directory = tmp_path_factory.mktemp("short")
    torch.manual_seed(0)
    ends = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 1}
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=32, n_layer=4, n_head=4, **ends
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory / "base")
    tiny_tokenizer().save_pretrained(directory / "base")
    words = f"--max_length {CONTEXT} --save_strategy no"
    assert train(str(directory / "base"), data, directory / "out", words) == 0
    return str(directory / "out")


def test_pairs_past_the_context_are_dropped(
    short: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, page = write(tmp_path / "text.txt", "Some text. " * 30), tmp_path / "page.html"
    assert main(["score", short, data, "--json", "--text", text]) == 0
    found = json.loads(capsys.readouterr().out)
    # 24 tokens of prompt, and 20, 39 or 58 of the rejected response.
    assert (found["pairs"], found["dropped"]) == (8, 4)
    assert found["text_tokens"] == 324  # of 330, the first of each window of 64 is not predicted
    assert main(["explain", short, data, "--output", str(page)]) == 0
    assert page.read_text(encoding="utf-8").count("<section>") == 8


def test_answers_end_with_the_context(
    short: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    policy, lengths = Policy.from_pretrained(short), []
    generate = QAdapterModel.generate

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = generate(self, *args, **{**kwargs, "eos_token_id": None})  # an answer without end
        lengths.append(out.shape[1])
        return out

    monkeypatch.setattr(QAdapterModel, "generate", watched)
    policy.answer(["Say 1", "Say it"], max_new_tokens=500)
    prompts = write(tmp_path / "p.txt", "Say 1\n")
    words = ["--prompts", prompts, "--output", str(tmp_path / "o.jsonl"), "--max-new-tokens", "99"]
    assert main(["generate", short, *words]) == 0
    lines = iter(["Say 1", "and now the talk is longer than the context"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines, None) or _leave())
    capsys.readouterr()
    assert main(["chat", short, "--max-new-tokens", "99"]) == 0
    assert "do not fit the model's context of 64" in capsys.readouterr().out
    assert lengths == [CONTEXT] * 3


def _leave() -> str:
    raise EOFError


# ── training settings ───────────────────────────────────────────────────────────────────────────

BEST = "--load_best_model_at_end true --eval_strategy epoch --save_strategy epoch"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--num_train_epochs 0", "the adapter did not change"),
        ("--max_pairs -1", "max_pairs:"),
        ("--eval_strategy steps", "--eval_data"),
        ("--eval_on_start true", "--eval_data"),
        ("--per_device_train_batch_size 0", "per_device_train_batch_size:"),
        ("--per_device_train_batch_size -4", "per_device_train_batch_size:"),
        ("--per_device_eval_batch_size 0", "per_device_eval_batch_size:"),
        ("--gradient_accumulation_steps 0", "gradient_accumulation_steps:"),
        ("--learning_rate nan", "learning_rate:"),
        ("--learning_rate -1", "learning_rate:"),
        ("--seed -1", "seed:"),
        ("--neftune_noise_alpha 5", "neftune_noise_alpha: would put noise into the base"),
        ("--label_smoothing_factor 0.1", "label_smoothing_factor: is of a loss over labels"),
        ("--lr_scheduler_type cosine_with_min_lr", "min_lr"),
        ("--train_sampling_strategy group_by_length", "qadapter: train_sampling_strategy:"),
        ("--train_sampling_strategy group_by_length --dry-run", "train_sampling_strategy:"),
        ("--train_sampling_strategy batch_rebalance", "qadapter: train_sampling_strategy:"),
        ("--group_by_length true", "--group_by_length"),
        (f"{BEST} --metric_for_best_model nonsense --eval_data DATA", "nonsense"),
        ("--optim adamw_bnb_8bit", "bitsandbytes"),
        ("--deepspeed x.json", "deepspeed"),
        ("--fsdp full_shard", "fsdp"),
        ("--resume_from_checkpoint missing", "resume_from_checkpoint:"),
        ("--resume_from_checkpoint true", "resume_from_checkpoint:"),
        ("--resume_from_checkpoint BASE", "is no checkpoint"),
    ],
)
def test_a_setting_that_cannot_be_is_one_sentence_and_leaves_nothing(
    flags: str,
    message: str,
    base: str,
    data: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = flags.replace("DATA", data).replace("BASE", base)
    assert train(base, data, tmp_path / "out", flags) == 2
    assert message in told(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("learning_rate: null", 2),
        ("data:", 2),
        ("lora_target_modules: null", 2),
        ("lora_r: [1, 2]", 2),
        ("lora_r: 1.5", 2),
        ("max_length: {a: 1}", 2),
        ("lora_r: [1", 2),
        ("save_strategy: no", 0),
        ("save_strategy: no\nlora_target_modules: q_proj", 0),
        ("save_strategy: no\nlora_target_modules: [q_proj, up_proj]\nlayers_to_transform: 3", 0),
    ],
)
def test_yaml_values_are_read_as_flags_are(
    text: str,
    expected: int,
    base: str,
    data: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write(tmp_path / "run.yaml", text + "\n")
    words = ["--config", config, "--output", str(tmp_path / "out"), "--bf16", "false"]
    words += ["--data", data, "--model", base, "--max_length", "200", "--disable_tqdm", "true"]
    assert code(["train", *words]) == expected
    if expected:
        assert told(capsys)
        assert not (tmp_path / "out").exists()
        return
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    if "lora_target_modules" in text:
        modules = {name.split(".")[-3] for name in saved(tmp_path / "out")}
        assert modules == {m for m in ("q_proj", "up_proj") if m in text}


def test_resuming_from_true_takes_the_last_checkpoint(base: str, data: str, tmp_path: Path) -> None:
    out, options = tmp_path / "out", "--save_strategy steps --save_steps 2 --num_train_epochs 2"
    assert train(base, data, out, options) == 0
    whole = saved(out)
    shutil.rmtree(out / "checkpoint-6")
    early = (out / "checkpoint-2" / "adapter_model.safetensors").stat().st_mtime_ns
    (out / "adapter_model.safetensors").unlink()
    assert train(base, data, out, options, "--resume_from_checkpoint true") == 0
    assert {p.name for p in out.glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (2, 4, 6)}
    # Started anew, the run would have written its second step again.
    assert (out / "checkpoint-2" / "adapter_model.safetensors").stat().st_mtime_ns == early
    assert all(torch.equal(t, whole[n]) for n, t in saved(out).items())


# ── other commands ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "words",
    [
        "generate ADAPTER --prompts PROMPTS --output OUT --batch-size -1",
        "generate ADAPTER --prompts PROMPTS --output OUT --batch-size 0",
        "generate ADAPTER --prompts PROMPTS --output OUT --max-new-tokens 0",
        "generate ADAPTER --prompts PROMPTS --output OUT --temperature nan",
        "generate ADAPTER --prompts PROMPTS --output OUT --temperature -1",
        "generate ADAPTER --prompts PROMPTS --output OUT --temperature 1 --seed -1",
        "generate ADAPTER --prompts PROMPTS --output OUT --device bogus",
        "generate ADAPTER --prompts PROMPTS --output OUT --strength nan",
        "generate ADAPTER --prompts PROMPTS --output OUT --strength -1",
        "explain ADAPTER DATA --output OUT --max-pairs -1",
        "explain ADAPTER DATA --output OUT --strength inf",
        "score ADAPTER DATA --rewards OUT --strength nan",
        "score ADAPTER DATA --rewards OUT --strength -1",
        "score ADAPTER DATA --rewards OUT --device bogus",
        "chat ADAPTER --max-new-tokens 0",
        "check DATA --model BASE --show -1",
    ],
)
def test_a_number_out_of_range_leaves_the_output_alone(
    words: str,
    adapter: str,
    base: str,
    data: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out"
    names = {"ADAPTER": adapter, "BASE": base, "DATA": data, "OUT": write(output, "mine")}
    names["PROMPTS"] = write(tmp_path / "p.txt", "Say 1\n")
    assert code([names.get(word, word) for word in words.split()]) == 2
    assert told(capsys)
    assert output.read_text() == "mine"
    assert {p.name for p in tmp_path.iterdir()} == {"out", "p.txt"}


@pytest.mark.parametrize("value", ["[" * 200_000, "9" * 5_000], ids=["deep", "long"])
def test_json_past_pythons_limits_is_named_by_its_line(tmp_path: Path, value: str) -> None:
    good = json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"})
    path = write(tmp_path / "pairs.jsonl", f'{good}\n{{"prompt": {value}')
    with pytest.raises(DataError, match=r"pairs\.jsonl:2: not "):
        list(read_pairs(path))
    path = write(tmp_path / "whole.jsonl", f"{good}\n{value}\n")
    with pytest.raises(DataError, match=r"whole\.jsonl:2: "):
        list(read_pairs(path))


def test_a_message_is_one_line_even_where_its_cause_has_many(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(tmp_path / "run.yaml", "lora_r: [1\nbeta: {\n")
    assert main(["train", "--config", config]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"qadapter: {config}: cannot be read as YAML (while parsing")
    assert line.endswith("; fix it.")


def test_a_config_that_is_not_there_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(tmp_path / "run.yaml")
    for command in (["train", "--config", config], ["compare", config]):
        assert main(command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith(f"{config}: cannot be read (No such file or directory); name another.")


GOOD = {"prompt": "a", "chosen": "b", "rejected": "c"}


def test_check_fails_on_a_bad_row_after_its_audit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = rows(tmp_path / "pairs.jsonl", GOOD, {**GOOD, "chosen": "c"}, GOOD)
    assert main(["check", path]) == 2
    out, err = capsys.readouterr()
    assert "bad rows                1" in out
    assert "duplicates              1" in out
    assert "1 of 3 rows cannot be trained on, the first is " + path + ":2; " in err
    assert main(["check", rows(tmp_path / "good.jsonl", GOOD)]) == 0


def test_a_tool_call_without_words_may_stand_in_a_prompt(tmp_path: Path) -> None:
    call = {"function": {"name": "clock", "arguments": "{}"}, "type": "function"}
    prompt = [
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "noon"},
    ]
    row = {
        "prompt": prompt,
        "chosen": [{"role": "assistant", "content": "Noon."}],
        "rejected": [{"role": "assistant", "content": "No."}],
    }
    (pair,) = read_pairs(rows(tmp_path / "pairs.jsonl", row))
    assert pair.prompt == prompt
    assert main(["check", str(tmp_path / "pairs.jsonl")]) == 0
    prompt[1] = {"role": "assistant", "content": None}
    with pytest.raises(DataError, match="without text"):
        list(read_pairs(rows(tmp_path / "silent.jsonl", row)))


def test_control_characters_are_written_out(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"prompt": "a\x1b[2Jb", "chosen": "c\x07\x9b\n", "rejected": "d\x1b]0;e\x07"}
    words = ["--model", base, "--show", "1"]
    assert main(["check", rows(tmp_path / "pairs.jsonl", row), *words]) == 0
    out = capsys.readouterr().out
    assert not {c for c in out if c < " " or "\x7f" <= c <= "\x9f"} - {"\n"}
    for text in (r"a\x1b[2Jb", r"chosen   c\x07\x9b", r"rejected d\x1b]0;e\x07"):
        assert text in out


def test_control_characters_in_field_names_are_written_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = rows(tmp_path / "pairs.jsonl", {"ch\x1b[2Josen": "a", "rejected": "b"})
    assert main(["check", path]) == 2
    assert "\x1b" not in "".join(capsys.readouterr())
