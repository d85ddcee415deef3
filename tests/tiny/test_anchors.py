"""Text that a base writes by itself, for anchors."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from qadapter import anchors, engines, hub
from qadapter.anchors import COUNT, free_texts
from qadapter.cli import main
from qadapter.config import QAdapterConfig
from qadapter.data import read_texts
from qadapter.errors import ConfigError, UserError
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

    def again(*_: object, **__: object) -> None:
        raise AssertionError("written twice")

    monkeypatch.setattr(anchors, "free_texts", again)
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
        {"anchor_weight": 0},
        {"alpha_0": 0.2, "alpha_tilde": 0.5},
        {"parameterization": "raw"},
        {"max_kl": 0.1, "budget_text": "TEXT", "anchor_weight": 0},
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


def test_a_cache_that_cannot_be_written_is_told(
    base: str, data: str, own_cache: Path, tmp_path: Path
) -> None:
    own_cache.mkdir()
    (own_cache / "anchors").write_text("")
    with pytest.raises(UserError, match=r"anchors.*cannot be written"):
        run_for(base, data, tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("weight", [0, 100])
def test_a_base_that_is_split_writes_none_and_says_so(
    base: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weight: float
) -> None:
    shard = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    shard |= {"FSDP_CPU_RAM_EFFICIENT_LOADING": "false", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
    for name, value in shard.items():
        monkeypatch.setenv(name, value)
    config = QAdapterConfig(data=data, output_dir=str(tmp_path), bf16=False, anchor_weight=weight)
    if weight:
        with pytest.raises(ConfigError, match=r"a base that fsdp2 splits .* anchors F"):
            engines.check(config)
    else:
        assert engines.check(config) == "fsdp2"
