"""A run within a budget in one of several processes, of which only the first reads all the text."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from qadapter.config import QAdapterConfig
from qadapter.train import prepare


def main(base: str, data: str, text: str, out: str, limit: str) -> None:
    """Train, and print whether all processes have the same adapter, and what the first one says."""
    config = QAdapterConfig(
        data=data,
        model=base,
        output_dir=out,
        max_length=200,
        use_cpu=True,
        bf16=False,
        trunk=0.5,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        num_train_epochs=6,
        save_strategy="no",
        cache_trunk=False,
        anchor_weight=0,
        disable_tqdm=True,
        max_kl=float(limit),
        budget_text=text,
    )
    run = prepare(config)
    assert run.budget is not None
    if dist.get_rank() > 0:  # it reads another KL, by which it must not decide
        (meter,) = run.budget._meters
        meter._texts = meter._texts[:4]  # type: ignore[attr-defined]
    run.trainer(config).train()
    adapter = torch.cat([p.detach().flatten() for p in run.model.adapter_parameters().values()])
    all_of_them = [torch.empty_like(adapter) for _ in range(dist.get_world_size())]
    dist.all_gather(all_of_them, adapter)
    if dist.get_rank() == 0:
        equal = all(torch.equal(adapter, other) for other in all_of_them)
        print(len(all_of_them), "processes, equal:", equal, "|", run.budget.summary())


if __name__ == "__main__":
    main(*sys.argv[1:])
