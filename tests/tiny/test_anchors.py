"""Text that a base writes by itself, for anchors."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing

from qadapter import anchors, engines, hub
from qadapter.anchors import COUNT, free_texts
from qadapter.cli import main
from qadapter.config import QAdapterConfig
from qadapter.data import read_texts
from qadapter.errors import ConfigError, ModelError, UserError
from qadapter.held import anchor_rows
from qadapter.train import Prepared, prepare


@pytest.fixture(scope="module")
def parts(base: str) -> Any:
    return hub.load_base(base, dtype=torch.float32), hub.load_tokenizer(base)


def texts_of(parts: Any, count: int, **options: int) -> list[str]:
    return list(free_texts(*parts, count, **options))


def kept_rows(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Return a list that gets whatever the model generates."""
    rows: list[torch.Tensor] = []
    generate = model.generate

    def kept(*args: object, **options: object) -> torch.Tensor:
        rows.append(generate(*args, **options))
        return rows[-1]

    monkeypatch.setattr(model, "generate", kept)
    return rows


def test_the_texts_follow_from_the_seed_and_disturb_no_other_draw(parts: Any) -> None:
    torch.manual_seed(7)
    undisturbed = torch.rand(3)
    torch.manual_seed(7)
    texts = texts_of(parts, 5)
    assert torch.equal(torch.rand(3), undisturbed)
    assert all(text.strip() for text in texts)
    assert texts == texts_of(parts, 5)
    assert texts[:3] == texts_of(parts, 3)
    assert texts != texts_of(parts, 5, seed=1)
    assert len(set(texts)) == 5
    assert len(texts_of(parts, 100)) == 100


def test_no_text_is_too_long_or_begins_with_or_holds_a_special_token(
    parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = parts
    rows = kept_rows(model, monkeypatch)
    texts = texts_of(parts, 60)
    drawn = torch.cat(rows)
    start = tokenizer("")["input_ids"]
    assert drawn[:, : len(start)].tolist() == [start] * len(drawn)
    body = drawn[:, len(start) :]
    assert body.shape[1] <= anchors.MAX_TOKENS
    assert not {*body[:, 0].tolist()} & {*tokenizer.all_special_ids}
    ends = (body == tokenizer.eos_token_id).int()
    assert not ends[:, :32].any()
    assert not any(token in text for text in texts for token in tokenizer.all_special_tokens)


def test_after_its_first_token_a_text_is_drawn_from_the_base_itself(
    parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the base's own generation settings say."""
    model, _ = parts
    settings = copy.deepcopy(model.generation_config)
    settings.update(
        temperature=0.01,
        top_k=1,
        top_p=0.01,
        min_p=0.9,
        num_beams=3,
        num_return_sequences=2,
        repetition_penalty=3.0,
        stop_strings=["e"],
        max_length=5,
        return_dict_in_generate=True,
    )
    monkeypatch.setattr(model, "generation_config", settings)
    monkeypatch.setattr(anchors, "MAX_TOKENS", 32)
    rows = kept_rows(model, monkeypatch)
    texts_of(parts, 400)
    assert model.generation_config is settings
    drawn = torch.cat(rows)
    with torch.no_grad():
        logits = model(input_ids=drawn[:, :-1]).logits.float()
        logits[..., model.generation_config.eos_token_id] = -torch.inf
        log_probs = logits.log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs.clamp(min=-100)).sum(-1)
    surprise = -log_probs.gather(-1, drawn[:, 1:, None])[..., 0]
    # E[−log p] under p is its entropy: at temperature 1 only.
    gap = (surprise - entropy)[:, -31:]
    assert abs(float(gap.mean())) < 4 * float(gap.std()) / math.sqrt(gap.numel())
    assert float(entropy.mean()) > 1


def test_a_text_begins_as_the_tokenizer_begins_one(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = hub.load_base(base, dtype=torch.float32), hub.load_tokenizer(base)
    bos, token = tokenizer.bos_token_id, tokenizer.bos_token
    assert tokenizer("")["input_ids"] == []
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, bos)]
    )
    assert tokenizer("")["input_ids"] == [bos]
    rows = kept_rows(model, monkeypatch)
    texts_of((model, tokenizer), 5)
    drawn = torch.cat(rows)
    assert (drawn[:, 0] == bos).all()
    assert not (drawn[:, 1] == bos).any()
    assert drawn.shape[1] <= 1 + anchors.MAX_TOKENS


def test_a_tokenizer_larger_than_the_base_begins_no_text_with_what_it_lacks(base: str) -> None:
    model, tokenizer = hub.load_base(base, dtype=torch.float32), hub.load_tokenizer(base)
    tokenizer.add_tokens([f"<new {i}>" for i in range(2000)])
    assert len(tokenizer) > model.get_input_embeddings().weight.shape[0]
    assert len(texts_of((model, tokenizer), 50)) == 50


def test_the_command_writes_what_training_reads(
    base: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "anchors.jsonl"
    assert main(["anchors", str(file), "--model", base, "--count", "3", "--seed", "5"]) == 0
    assert f"3 texts of {base} in {file}\n" in capsys.readouterr().out
    model, tokenizer = hub.load_base(base, dtype=torch.float32), hub.load_tokenizer(base)
    assert read_texts(str(file)) == texts_of((model, tokenizer), 3, seed=5)
    words = ["--data", data, "--model", base, "--anchor_data", str(file), "--max_steps", "3"]
    words += ["--max_length", "200"]
    assert main(["train", *words, "--output", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("file/anchors.jsonl", "cannot be written"),
        ("anchors.txt", "must end in .jsonl"),
        ("pairs.jsonl", "is there already"),
        ("folder.jsonl", "is there already"),
    ],
)
def test_the_command_tells_beforehand_that_it_cannot_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, said: str
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "pairs.jsonl").write_text("mine")
    (tmp_path / "folder.jsonl").mkdir()
    # No such base: it is not even looked for.
    assert main(["anchors", str(tmp_path / name), "--model", str(tmp_path / "none")]) == 2
    assert said in capsys.readouterr().err
    assert (tmp_path / "pairs.jsonl").read_text() == "mine"


def test_a_missing_base_is_told_and_nothing_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["anchors", str(tmp_path / "a.jsonl"), "--model", str(tmp_path / "none")]
    assert main(words) == 2
    assert "none" in capsys.readouterr().err
    assert not (tmp_path / "a.jsonl").exists()


# ── unasked ─────────────────────────────────────────────────────────────────────────────────────


def never(*_: object, **__: object) -> Any:
    raise AssertionError("not to be called")


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user cache without texts."""
    monkeypatch.setenv("QADAPTER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def run_for(base: str, data: str, tmp_path: Path, **fields: Any) -> Prepared:
    fixed: dict[str, Any] = {"max_length": 200, "bf16": False, "trunk": 0.5}
    config = QAdapterConfig(
        data=data, model=base, output_dir=str(tmp_path / "out"), **{**fixed, **fields}
    )
    return prepare(config)


def test_training_anchors_on_the_bases_own_texts_and_writes_them_once(
    base: str,
    data: str,
    parts: Any,
    own_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(3)
    run = run_for(base, data, tmp_path)
    assert run.anchors == anchor_rows(texts_of(parts, COUNT), parts[1])
    without = run_for(base, data, tmp_path, anchor_weight=0)
    assert without.anchors == []
    fresh, plain = run.model.adapter_state(), without.model.adapter_state()
    assert all(torch.equal(fresh[name], tensor) for name, tensor in plain.items())

    monkeypatch.setattr(anchors, "free_texts", never)
    assert run_for(base, data, tmp_path).anchors == run.anchors
    assert len(list((own_cache / "anchors").iterdir())) == 1


def test_another_base_has_texts_of_its_own(
    base: str, data: str, own_cache: Path, tmp_path: Path
) -> None:
    model, tokenizer = hub.load_base(base, dtype=torch.float32), hub.load_tokenizer(base)
    model.get_input_embeddings().weight.data.mul_(1.5)
    model.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    one = run_for(base, data, tmp_path)
    other = run_for(str(tmp_path / "other"), data, tmp_path)
    assert one.anchors != other.anchors
    assert len(list((own_cache / "anchors").iterdir())) == 2


@pytest.mark.parametrize(
    "fields",
    [
        {"alpha_0": 0.2, "alpha_tilde": 0.5},
        {"parameterization": "raw"},
        {"parameterization": "raw", "max_kl": 0.1, "budget_text": "TEXT"},
    ],
)
def test_where_the_untrained_policy_is_not_the_base_there_are_none_unasked(
    base: str, data: str, own_cache: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    (tmp_path / "general.txt").write_text("a line of text\nand another\n")
    text = str(tmp_path / "general.txt")
    fields = {name: text if value == "TEXT" else value for name, value in fields.items()}
    assert run_for(base, data, tmp_path, **fields).anchors == []
    assert not (own_cache / "anchors").exists()


def test_anchors_that_are_asked_for_are_there_for_any_policy(
    base: str, data: str, own_cache: Path, tmp_path: Path, parts: Any
) -> None:
    (tmp_path / "general.txt").write_text("a line of text\n")
    text = str(tmp_path / "general.txt")
    run = run_for(base, data, tmp_path, anchor_data=text, parameterization="raw")
    assert run.anchors == [parts[1]("a line of text")["input_ids"]]
    assert not own_cache.joinpath("anchors").exists()


@pytest.mark.parametrize("weight", [0.0, 10.0])
def test_a_budget_is_measured_on_texts_that_are_not_trained_on(
    base: str, data: str, parts: Any, tmp_path: Path, weight: float
) -> None:
    run = run_for(base, data, tmp_path, max_kl=0.1, anchor_weight=weight)
    texts = texts_of(parts, COUNT)
    assert run.budget is not None
    (meter,) = run.budget._meters
    held_out = meter._texts  # type: ignore[attr-defined]
    assert held_out == texts[::5]
    trained = anchor_rows([t for i, t in enumerate(texts) if i % 5], parts[1])
    assert run.anchors == (trained if weight else [])


def test_a_run_unasked_stays_nearer_to_its_base(
    base: str, data: str, parts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unseen = texts_of(parts, COUNT + 48)[COUNT:]
    text = tmp_path / "general.txt"
    text.write_text("\n".join(" ".join(one.split()) for one in unseen))
    kl = {}
    for weight in ("0", "100"):
        out = tmp_path / weight
        words = ["--data", data, "--model", base, "--output", str(out), "--max_length", "200"]
        words += ["--bf16", "false", "--learning_rate", "0.01", "--num_train_epochs", "6"]
        words += ["--save_strategy", "no", "--disable_tqdm", "true", "--anchor_weight", weight]
        assert main(["train", *words]) == 0
        capsys.readouterr()
        assert main(["score", str(out), data, "--json", "--text", str(text)]) == 0
        kl[weight] = json.loads(capsys.readouterr().out)["text_kl"]
    assert kl["100"] < kl["0"] / 2


def test_a_cache_that_cannot_be_written_is_told_before_any_is_written(
    base: str, data: str, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_cache.mkdir()
    (own_cache / "anchors").write_text("")
    monkeypatch.setattr(anchors, "free_texts", never)
    with pytest.raises(UserError, match=r"anchors: cannot be written, and .* QADAPTER_CACHE"):
        run_for(base, data, tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["a line less", "another letter", "gone"])
def test_damaged_texts_are_written_anew(
    base: str, data: str, own_cache: Path, tmp_path: Path, damage: str
) -> None:
    whole = run_for(base, data, tmp_path).anchors
    (place,) = (own_cache / "anchors").iterdir()
    file = place / "texts.jsonl"
    kept = file.read_text()
    lines = kept.splitlines(keepends=True)
    if damage == "gone":
        file.unlink()
    elif damage == "a line less":
        file.write_text("".join(lines[:-1]))
    else:
        file.write_text(kept.replace("e", "a", 1))
    assert run_for(base, data, tmp_path).anchors == whole
    assert file.read_text() == kept


def test_a_run_goes_on_with_its_texts_where_the_cache_has_others(
    base: str, data: str, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train", "--data", data, "--model", base, "--max_length", "200", "--bf16", "false"]
    words += ["--learning_rate", "0.01", "--num_train_epochs", "2", "--disable_tqdm", "true"]
    words += ["--save_strategy", "steps", "--save_steps", "3"]
    assert main([*words, "--output", str(tmp_path / "whole")]) == 0
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "cut" / "checkpoint-3")
    shutil.rmtree(own_cache)
    monkeypatch.setattr(anchors, "free_texts", never)
    resumed = ["--output", str(tmp_path / "cut"), "--resume_from_checkpoint", "true"]
    assert main([*words, *resumed]) == 0
    one, other = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("whole", "cut"))
    assert all(torch.equal(other[name], tensor) for name, tensor in one.items())


def test_what_a_named_text_lacks_is_told_before_the_base_is_loaded(
    base: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "short.txt").write_text("one text\n")
    monkeypatch.setattr(hub, "load_base", never)
    with pytest.raises(ConfigError, match="one text is too few"):
        run_for(base, data, tmp_path, anchor_data=str(tmp_path / "short.txt"), max_kl=0.1)
    missing = str(tmp_path / "missing.txt")
    with pytest.raises(UserError, match=r"missing\.txt"):
        run_for(base, data, tmp_path, budget_text=missing, max_kl=0.1)
    missing = str(tmp_path / "missing.jsonl")
    with pytest.raises(UserError, match=r"missing\.jsonl"):
        run_for(base, data, tmp_path, max_drop=1.0, drop_task=missing)


def test_a_dry_run_writes_them_and_says_so(
    base: str, data: str, own_cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = ["train", "--data", data, "--model", base, "--max_length", "200", "--bf16", "false"]
    words += ["--disable_tqdm", "true", "--output", str(tmp_path / "out"), "--dry-run"]
    assert main(words) == 0
    assert len(list((own_cache / "anchors").iterdir())) == 1
    assert "the base writes 192 texts to be held to, once" in caplog.text
    assert not (tmp_path / "out").exists()


def test_the_card_says_what_a_run_was_held_to(base: str, data: str, tmp_path: Path) -> None:
    (tmp_path / "general.txt").write_text("a line of text\n")
    words = ["train", "--data", data, "--model", base, "--max_length", "200", "--bf16", "false"]
    words += ["--disable_tqdm", "true", "--save_strategy", "no", "--learning_rate", "0.01"]
    text = str(tmp_path / "general.txt")
    for flags, said in (
        ([], "anchors 100 on the base's own texts;"),
        (["--anchor_weight", "0"], "anchors none;"),
        (["--anchor_weight", "3", "--anchor_data", text], f"anchors 3 on `{text}`;"),
    ):
        out = tmp_path / str(len(flags))
        assert main([*words, "--output", str(out), *flags]) == 0
        assert said in (out / "README.md").read_text()


def test_a_base_of_a_short_context_writes_shorter_texts(
    parts: Any, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = hub.load_base(base, dtype=torch.float32)
    model.config.max_position_embeddings = 40
    rows = kept_rows(model, monkeypatch)
    assert len(texts_of((model, parts[1]), 5)) == 5
    assert [made.shape[1] for made in rows] == [40]


def test_a_base_that_writes_nothing_finite_is_told(parts: Any, base: str) -> None:
    model = hub.load_base(base, dtype=torch.float32)
    model.get_output_embeddings().weight.data.fill_(math.nan)
    with pytest.raises(ModelError, match=r"cannot write text by itself .* --anchor_weight 0"):
        texts_of((model, parts[1]), 3)


@pytest.fixture
def under_fsdp(monkeypatch: pytest.MonkeyPatch) -> None:
    shard = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    shard |= {"FSDP_CPU_RAM_EFFICIENT_LOADING": "false", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
    for name, value in shard.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("under_fsdp")
def test_a_base_that_is_split_writes_none_and_says_what_to_do(
    base: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "load_base", never)
    command = re.escape(f"qadapter anchors F.jsonl --model {base} --dtype bfloat16")
    with pytest.raises(ConfigError, match=f"anchor_data: under fsdp2 .*{command}"):
        run_for(base, data, tmp_path)


@pytest.mark.usefixtures("under_fsdp")
@pytest.mark.parametrize("fields", [{"anchor_weight": 0}, {"anchor_data": "F"}, {}])
def test_who_names_a_text_or_makes_a_trainer_is_not_refused(
    data: str, tmp_path: Path, fields: dict[str, Any]
) -> None:
    config = QAdapterConfig(data=data, output_dir=str(tmp_path), bf16=False, **fields)
    assert engines.check(config) == "fsdp2"
    if fields:
        engines.check_own_text(config)
