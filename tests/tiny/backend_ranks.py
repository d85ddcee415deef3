"""One of several processes over which a policy is split; the first prints all the log-probs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from backends import TOKENS, Case, of_tokens

from qadapter.config import QAdapterConfig
from qadapter.trainer import QAdapterTrainer


def main(asked: dict[str, Any]) -> None:
    """Answer for this process's share of the rows."""
    adapters, strengths = asked["case"]
    case, place = Case(tuple(adapters), tuple(strengths)), Path(asked["place"])
    policy = case.policy(place)
    for parameter in policy.model.adapter_parameters().values():
        parameter.requires_grad_(True)
    config = QAdapterConfig(output_dir=str(place / "run"), use_cpu=True, bf16=False)
    trainer = QAdapterTrainer(policy.model, config)
    accelerator = trainer.accelerator
    assert trainer.shards
    assert accelerator.num_processes == 2
    trained = torch.optim.SGD(policy.model.adapter_parameters().values(), lr=0.0)
    model, _ = accelerator.prepare(policy.model, trained)
    split = [p for p in policy.model.parameters() if hasattr(p, "placements")]
    assert split, "nothing is split"
    rows, found = asked["rows"], []
    for row in rows[accelerator.process_index :: 2]:
        ids = torch.tensor([row])
        with torch.no_grad():
            logits = model(input_ids=ids, strength=case.strength).logits
        found += of_tokens(logits[:, -TOKENS - 1 : -1], [row[-TOKENS:]])
    both = gather_object([found])
    if accelerator.is_main_process:
        print(json.dumps([both[i % 2][i // 2] for i in range(len(rows))]))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
