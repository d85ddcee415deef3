"""Text that a base writes by itself, for anchors."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from qadapter import hub
from qadapter.anchors import free_texts
from qadapter.cli import main
from qadapter.data import read_texts


@pytest.fixture(scope="module")
def parts(base: str) -> tuple[object, object]:
    return hub.load_base(base, dtype=torch.float32), hub.load_tokenizer(base)


def test_the_texts_follow_from_the_seed_and_disturb_no_other_draw(parts: tuple) -> None:
    model, tokenizer = parts
    torch.manual_seed(7)
    undisturbed = torch.rand(3)
    torch.manual_seed(7)
    texts = free_texts(model, tokenizer, 5, max_tokens=40)
    assert torch.equal(torch.rand(3), undisturbed)
    assert len(texts) == 5
    assert all(text.strip() for text in texts)
    assert texts == free_texts(model, tokenizer, 5, max_tokens=40)
    assert texts != free_texts(model, tokenizer, 5, max_tokens=40, seed=1)
    assert len(set(texts)) == 5


def test_no_text_is_longer_than_asked_or_holds_special_tokens(parts: tuple) -> None:
    model, tokenizer = parts
    special = set(tokenizer.all_special_tokens)
    for text in free_texts(model, tokenizer, 60, max_tokens=20):
        assert not any(token in text for token in special)
        # A byte that begins no character is told as U+FFFD: three.
        assert len(tokenizer(text)["input_ids"]) <= 3 * 20


def test_after_its_first_token_a_text_is_drawn_from_the_base_itself(
    parts: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the base's own generation config says: temperature, top-k or a penalty."""
    model, tokenizer = parts
    monkeypatch.setattr(model.generation_config, "temperature", 0.01)
    monkeypatch.setattr(model.generation_config, "top_k", 1)
    monkeypatch.setattr(model.generation_config, "top_p", 0.01)
    rows: list[torch.Tensor] = []
    generate = model.generate

    def kept(*args: object, **options: object) -> torch.Tensor:
        rows.append(generate(*args, **options))
        return rows[-1]

    monkeypatch.setattr(model, "generate", kept)
    free_texts(model, tokenizer, 400, max_tokens=12)
    drawn = torch.cat(rows)
    with torch.no_grad():
        logits = model(input_ids=drawn[:, :-1]).logits.float()
        logits[..., model.generation_config.eos_token_id] = -torch.inf
        log_probs = logits.log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs.clamp(min=-100)).sum(-1)
    surprise = -log_probs.gather(-1, drawn[:, 1:, None])[..., 0]
    # E[−log p] under p is its entropy: at one temperature only.
    gap = surprise - entropy
    assert abs(float(gap.mean())) < 4 * float(gap.std()) / math.sqrt(gap.numel())
    assert float(entropy.mean()) > 1
    assert max(Counter(drawn[:, 0].tolist()).values()) < len(drawn) / 10


def test_the_command_writes_what_training_reads(
    base: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "anchors.jsonl"
    assert main(["anchors", str(file), "--model", base, "--count", "3", "--seed", "5"]) == 0
    assert capsys.readouterr().out == f"3 texts of {base} in {file}\n"
    model, tokenizer = hub.load_base(base, dtype=torch.float32), hub.load_tokenizer(base)
    assert read_texts(str(file)) == free_texts(model, tokenizer, 3, seed=5)
    words = ["--data", data, "--model", base, "--anchor_data", str(file), "--max_steps", "3"]
    words += ["--max_length", "200"]
    assert main(["train", *words, "--output", str(tmp_path / "out")]) == 0


def test_the_command_tells_beforehand_that_it_cannot_write(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    where = tmp_path / "file" / "anchors.jsonl"
    assert main(["anchors", str(where), "--model", base]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert main(["anchors", str(tmp_path / "a"), "--model", str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
