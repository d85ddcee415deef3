"""lm-eval on the base through our backend and through its own: the same answers, item by item.

    QADAPTER_DATA=../shared/data python benchmarks/lm_eval_identity.py \\
        --output benchmarks/results/lm_eval_identity.json

The adapter is a random one of visible effect, at strength 0; at strength 1 it says how many answers
would be others if its strength went unheard.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from qadapter import hub
from qadapter.compare.origin import origin
from qadapter.config import QConfig
from qadapter.files import write_text
from qadapter.lm import QAdapterLM
from qadapter.model import QAdapterModel
from qadapter.policy import Policy
from qadapter.suite import local_suite

DATA = Path(os.environ.get("QADAPTER_DATA", "../shared/data")) / "capability"
FEW = {"local_perplexity": 20, "local_ifeval": 16}
"""Items of the tasks of which those of the others would take hours."""
ANSWER = 128
"""Tokens of IFEval's answers."""
Answers = dict[str, list[Any]]


def answered(lm: Any, limit: int) -> tuple[Answers, dict[str, float]]:
    """Return what a model answers to each item of each task, and its scores."""
    configs = local_suite(DATA)
    configs[-1]["generation_kwargs"]["max_gen_toks"] = ANSWER
    loaded = TaskManager(include_defaults=False).load(configs)
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=1234)
    items = {name: list(range(FEW.get(name, limit))) for name in loaded["tasks"]}
    found = lm_eval.evaluate(lm, loaded, samples=items, bootstrap_iters=0)
    said = {n: [sample["resps"] for sample in rows] for n, rows in found["samples"].items()}
    scores = {
        name: next(v for k, v in result.items() if "," in k and "_stderr" not in k)
        for name, result in found["results"].items()
    }
    return said, scores


def main() -> None:
    """Ask both, and write how many answers are the same."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=100, help="items of a task (%(default)s)")
    args = parser.parse_args()
    base = hub.load_base(hub.DEFAULT_BASE, dtype=torch.float32)
    model = QAdapterModel.create(base, QConfig(alpha_0=0.5, alpha_tilde=0.5))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    policy = Policy(model, hub.load_tokenizer(hub.DEFAULT_BASE))
    theirs = HFLM(hub.resolve_base(hub.DEFAULT_BASE), dtype="float32", device="cpu", batch_size=8)
    own, scores = answered(theirs, args.limit)
    tasks: dict[str, Any] = {name: {"items": len(said)} for name, said in own.items()}
    for strength, field in ((0.0, "same"), (1.0, "same at strength 1")):
        ours, ours_score = answered(QAdapterLM(policy, strength=strength, batch_size=8), args.limit)
        for name, told in tasks.items():
            told[field] = sum(a == b for a, b in zip(ours[name], own[name], strict=True))
            if strength == 0.0:
                told["score"], told["score by hf"] = ours_score[name], scores[name]
    write_text(args.output, json.dumps({**origin(), "tasks": tasks}, indent=1) + "\n")


if __name__ == "__main__":
    main()
