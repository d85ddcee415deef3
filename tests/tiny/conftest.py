"""A tiny base on disk, pairs for it, and an adapter that learned them through the command line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import write_base
from models import disturbed

from qadapter import hub
from qadapter.cli import main
from qadapter.config import QConfig
from qadapter.files import write_jsonl
from qadapter.model import QAdapterModel


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QADAPTER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("base")
    write_base(directory)
    return str(directory)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Say {i}"}],
            "chosen": [{"role": "assistant", "content": "yes é🙂 " * (1 + i % 2)}],
            "rejected": [{"role": "assistant", "content": "<script>no</script>" * (1 + i % 3)}],
        }
        for i in range(12)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory, base: str, data: str) -> str:
    directory = tmp_path_factory.mktemp("run") / "adapter"
    options = "--max_length 200 --learning_rate 0.01 --num_train_epochs 6 --bf16 false --trunk 0.75"
    options += " --save_strategy no --disable_tqdm true --alpha_0 0.5 --alpha_tilde 0.5"
    options += " --anchor_weight 0"
    words = ["--data", data, "--model", base, "--output", str(directory)]
    code = main(["train", *words, *options.split()])
    assert code == 0
    return str(directory)


@pytest.fixture(scope="session")
def second(tmp_path_factory: pytest.TempPathFactory, adapter: str, base: str) -> str:
    """An adapter on the same base, deeper than the first and with other alphas."""
    q_config = dataclasses.replace(QConfig.load(adapter), alpha_0=0.8, alpha_tilde=0.8)
    loaded = hub.load_base(base, dtype=torch.float32)
    model = disturbed(QAdapterModel.create(loaded, q_config, lora_r=4, trunk=0.5), 0.4)
    directory = tmp_path_factory.mktemp("second") / "second"
    model.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="session")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a file for each task of the local suite."""
    directory = tmp_path_factory.mktemp("suite")
    choices = ["a short one", "quite a longer one it is", "é"]
    queries = ["Question: dresser\n", "Question: Which?", "Question: é🙂"]
    rows = [
        {"query": q, "choices": choices[: 2 + i % 2], "gold": i % 2} for i, q in enumerate(queries)
    ]
    write_jsonl(directory / "piqa.jsonl", rows)
    write_jsonl(directory / "arc_easy.jsonl", rows)
    rest = {"Once upon a": "time", "He said it to": "her", "[1,": "2]"}
    rows = [{"context": context, "continuation": word} for context, word in rest.items()]
    write_jsonl(directory / "lambada.dev.jsonl", rows)
    (directory / "other.txt").write_text(" = Title = \n \n A line , of words . \n[1, 2]\n\nLast\n")
    instruction = ["punctuation:no_comma", "length_constraints:number_sentences"]
    row = {
        "key": 1,
        "prompt": "Say it.",
        "instruction_id_list": instruction,
        "kwargs": [{}, {"relation": "at least", "num_sentences": 1}],
    }
    write_jsonl(directory / "ifeval.jsonl", [row, {**row, "key": 2, "prompt": "Say it again."}])
    return directory


@pytest.fixture(scope="session")
def one_index() -> Iterator[None]:
    """Read lm-eval's thousands of task files once and not for each command."""
    from lm_eval.tasks._index import TaskIndex

    build, kept = TaskIndex.build, {}

    def built(paths: Iterable[Path]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for path in paths:
            if "lm_eval" not in path.parts:  # a test's own, which may change
                found |= build([path])
            else:
                if path not in kept:
                    kept[path] = build([path])
                found |= kept[path]
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskIndex, "build", staticmethod(built))
        yield
