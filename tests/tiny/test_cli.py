"""The commands as a user types them, on a tiny model, and what bad input makes them say."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qadapter.chat import Chat
from qadapter.cli import main
from qadapter.data import read_pairs
from qadapter.policy import Policy


def test_the_artefact_is_a_peft_directory_with_our_config(adapter: str, base: str) -> None:
    names = {p.name for p in Path(adapter).iterdir()}
    assert names == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "qadapter_config.json",
    }
    config = json.loads((Path(adapter) / "qadapter_config.json").read_text())
    assert config["base_model"] == base
    assert len(config["base_hash"]) == len(config["tokenizer_hash"]) == 64
    assert "alpha_tilde 0.5" in (Path(adapter) / "README.md").read_text()


def test_plain_peft_gives_the_policy_at_strength_one(adapter: str, base: str) -> None:
    from peft import PeftModel

    ids = torch.arange(4, 40)[None]
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    policy = Policy.from_pretrained(adapter)
    with torch.no_grad():
        ours = policy.model(input_ids=ids).logits.log_softmax(-1)
        theirs = plain(input_ids=ids).logits.log_softmax(-1)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_score_prints_one_object_and_learned_the_pairs(
    adapter: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("General text.\nMore of it.\n" * 5)
    rewards = tmp_path / "rewards.jsonl"
    code = main(["score", adapter, data, "--json", "--text", str(text), "--rewards", str(rewards)])
    assert code == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() >= {"accuracy", "accuracy_ci", "length_baseline", "margin", "kl", "pairs"}
    assert found["accuracy"] > 0.9
    assert found["accuracy_ci"][0] < found["accuracy"]
    assert found["kl"] > 0
    assert found["text_kl"] > 0
    rows = [json.loads(line) for line in rewards.read_text().splitlines()]
    margin = sum(r["chosen"] - r["rejected"] for r in rows) / len(rows)
    assert margin == pytest.approx(found["margin"])


def test_strength_zero_scores_like_the_base(
    adapter: str, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["score", adapter, data, "--json", "--strength", "0"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kl"] == pytest.approx(0.0, abs=1e-9)
    assert abs(found["margin"]) < 1e-5


def test_drift_equals_a_plain_computation(adapter: str) -> None:
    policy, text = Policy.from_pretrained(adapter), ["some general text, forty tokens or so long"]
    found = policy.drift(text, window=16)
    ids = policy.tokenizer(text[0])["input_ids"]
    kl, nll, n = 0.0, 0.0, 0
    for start in range(0, len(ids), 16):
        row = torch.tensor([ids[start : start + 16]])
        with torch.no_grad():
            logp = policy.model(input_ids=row, strength=0.0).logits[0, :-1].double().log_softmax(-1)
            logq = policy.model(input_ids=row).logits[0, :-1].double().log_softmax(-1)
        kl += float((logp.exp() * (logp - logq)).sum())
        nll -= float(logq.gather(-1, row[0, 1:, None]).sum())
        n += row.shape[1] - 1
    assert found.tokens == n
    assert found.kl == pytest.approx(kl / n, rel=1e-3)
    assert found.perplexity == pytest.approx(math.exp(nll / n), rel=1e-4)


def test_generate_answers_every_prompt_as_alone(adapter: str, tmp_path: Path) -> None:
    prompts, output = tmp_path / "p.txt", tmp_path / "out.jsonl"
    prompts.write_text("Say 1\nA longer thing to say\n")
    words = ["--prompts", str(prompts), "--output", str(output), "--max-new-tokens", "8"]
    assert main(["generate", adapter, *words]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    policy = Policy.from_pretrained(adapter)
    for row in rows:
        assert [row["response"]] == policy.answer([row["prompt"]], max_new_tokens=8)
    assert len(rows) == 2


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_explain_is_one_escaped_page(adapter: str, data: str, tmp_path: Path) -> None:
    output = tmp_path / "page.html"
    assert main(["explain", adapter, data, "--output", str(output), "--max-pairs", "3"]) == 0
    page = Page()
    page.feed(output.read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert page.links == []
    assert "yes é🙂" in page.text  # characters of several tokens come out whole
    assert "<script>no</script>" in page.text
    score = Policy.from_pretrained(adapter).score(list(read_pairs(data))[:3])
    for reward in (*score.chosen_rewards, *score.rejected_rewards):
        assert any(f"R = {reward + e:+.3f}" in page.text for e in (-5e-4, 0.0, 5e-4))


def test_chat_streams_remembers_and_shows_the_base(adapter: str) -> None:
    policy = Policy.from_pretrained(adapter)
    chat = Chat(policy, max_new_tokens=8)
    answer = "".join(chat.send("Say 1"))
    assert [answer.strip()] == policy.answer([chat.messages[:1]], max_new_tokens=8)
    assert [m["role"] for m in chat.messages] == ["user", "assistant"]
    base = "".join(chat.send("/base")).strip()
    assert [base] == policy.answer([chat.messages[:1]], strength=0.0, max_new_tokens=8)
    assert "".join(chat.send("/strength 0.3")) == "strength 0.3"
    list(chat.send("/reset"))
    assert chat.messages == []


def test_yaml_and_flags_are_the_same_fields(
    base: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(f"data: {data}\nmodel: {base}\nmax_length: 200\ngamma: 0.5\nbeta: 0.2\n")
    words = ["--output", str(tmp_path / "out"), "--gamma", "0.9", "--bf16", "false"]
    words += ["--save_strategy", "no", "--disable_tqdm", "true"]
    assert main(["train", "--config", str(config), *words]) == 0
    saved = json.loads((tmp_path / "out" / "qadapter_config.json").read_text())
    assert (saved["gamma"], saved["beta"]) == (0.9, 0.2)
    config.write_text("gama: 0.5\n")
    assert main(["train", "--config", str(config)]) == 2
    assert "'gama' is not a field" in capsys.readouterr().err


def damaged(adapter: str, directory: Path) -> str:
    directory.mkdir()
    for path in Path(adapter).iterdir():
        content = path.read_bytes()
        cut = len(content) // 2 if path.suffix == ".safetensors" else len(content)
        (directory / path.name).write_bytes(content[:cut])
    return str(directory)


def test_bad_input_is_one_sentence_and_exit_two(
    adapter: str, base: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text(Path(data).read_text().replace('"rejected"', '"other"', 1))
    block = tmp_path / "file"
    block.write_text("x")
    long_prompt = tmp_path / "long.txt"
    long_prompt.write_text("Why?\nWhere?\nWho?\n" * 4 + "x" * 400)
    out = str(tmp_path / "out")
    train = ["train", "--model", base, "--bf16", "false", "--max_length", "200"]
    prompts = ["--prompts", str(long_prompt), "--output", str(tmp_path / "o.jsonl")]
    cases: list[tuple[list[str], str]] = [
        ([*train, "--data", "missing.jsonl", "--output", out], "missing.jsonl"),
        ([*train, "--data", str(broken), "--output", out], "broken.jsonl:1: 'rejected' is missing"),
        ([*train, "--output", out], "data: missing"),
        ([*train, "--data", data, "--output", str(block)], "cannot be written"),
        ([*train, "--data", data, "--output", out, "--gamma", "2"], "gamma: 2.0 must lie"),
        ([*train, "--data", data, "--output", out, "--alpha_0", "0"], "alpha_0: 0.0 must be above"),
        ([*train, "--data", data, "--output", out, "--max_length", "300"], "context of 256"),
        ([*train, "--data", data, "--output", out, "--max_length", "9"], "no pair is left"),
        (["train", "--data", data, "--output", out, "--model", "./nowhere"], "./nowhere: cannot"),
        (["score", str(tmp_path), data], "qadapter_config.json: missing"),
        (["score", damaged(adapter, tmp_path / "cut"), data], "the file is damaged"),
        (["generate", adapter, *prompts], "prompt 13: "),
        (["generate", adapter, "--prompts", "none.txt", "--output", out], "none.txt"),
    ]
    for words, message in cases:
        assert main(words) == 2, words
        err = capsys.readouterr().err
        last = err.strip().splitlines()[-1]
        assert last.startswith("qadapter: "), err
        assert message in last, (words, last)
        assert "Traceback" not in err
    assert not Path(out).exists()
    assert not (tmp_path / "o.jsonl").exists()


def test_another_template_is_refused(adapter: str, base: str, data: str, tmp_path: Path) -> None:
    import shutil

    other = tmp_path / "base"
    shutil.copytree(base, other)
    template = other / "chat_template.jinja"
    template.write_text(" " + template.read_text())
    assert main(["score", adapter, data, "--base", str(other)]) == 2
    assert main(["score", adapter, data, "--base", str(other), "--no-check-base"]) == 0


def test_help_reads_and_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    from qadapter.errors import DataError

    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "qadapter train --data prefs.jsonl --output DIR" in capsys.readouterr().out
    with pytest.raises(DataError):
        main(["--debug", "check", "missing.jsonl"])


def test_check_reports(data: str, base: str, capsys: Any) -> None:
    assert main(["check", data, "--model", base, "--show", "1", "--max-length", "200"]) == 0
    printed = capsys.readouterr().out
    assert "rows                    12" in printed
    assert "chosen   yes" in printed
