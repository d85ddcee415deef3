"""Whether bfloat16 learns what float32 learns: the loss of each step, and held-out pairs after it.

    python benchmarks/precision.py --output benchmarks/results/precision.json \\
        --draw docs/precision.svg

Same pairs, same order. What a run learned is scored in float32, whatever it was trained in, since a
log-ratio read in bfloat16 is blurred by rounding. The noise that a difference is judged by is that
of the same float32 run with another seed, which changes the adapter's first weights and the order
of the pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from qadapter.config import QAdapterConfig
from qadapter.data import read_pairs
from qadapter.policy import Policy
from qadapter.train import prepare

DATA = Path(os.environ.get("QADAPTER_DATA", "../shared/data"))
CURVES = {
    "bfloat16": {"bf16": True, "seed": 0},
    "float32": {"bf16": False, "seed": 0},
    "float32, another seed": {"bf16": False, "seed": 1},
}


def run(pairs: int, held_out: int, **settings: Any) -> dict[str, Any]:
    """Train the last quarter for one epoch; return each step's loss and the held-out score."""
    with tempfile.TemporaryDirectory() as directory:
        config = QAdapterConfig(
            data=str(DATA / "preference/dsp_entertainment.train.jsonl"),
            output_dir=directory,
            max_pairs=pairs,
            trunk=0.75,
            num_train_epochs=1,
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            anchor_weight=0,
            **settings,
        )
        trainer = prepare(config).trainer(config)
        trainer.train()
        trainer.model.save_pretrained(directory)
        policy = Policy.from_pretrained(directory, dtype=torch.float32)
    dev = read_pairs(str(DATA / "preference/dsp_entertainment.dev.jsonl"))
    score = policy.score(list(islice(dev, held_out)))
    margins = torch.tensor(score.chosen_rewards) - torch.tensor(score.rejected_rewards)
    return {
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "held_out": score.pairs,
        "accuracy": score.accuracy,
        "accuracy_ci": score.accuracy_ci,
        "margin": score.margin,
        "margin_se": float(margins.std() / len(margins) ** 0.5),
        "kl": score.kl,
    }


def smooth(values: list[float], width: int = 5) -> list[float]:
    """Return means of so many neighbours."""
    return [sum(values[i : i + width]) / width for i in range(len(values) - width + 1)]


def draw(curves: dict[str, list[float]], path: str) -> None:
    """Draw the smoothed losses of each run."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    mpl.rcParams |= {"svg.hashsalt": "qadapter", "font.size": 10, "axes.spines.top": False}
    figure, axes = plt.subplots(figsize=(5.5, 2.9), layout="constrained")
    for (name, values), style in zip(curves.items(), ("-", "--", ":"), strict=True):
        axes.plot(smooth(values), style, label=name)
    axes.set(xlabel="step", ylabel="loss, mean of 5 steps")
    axes.spines["right"].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Train each way, write the losses, draw if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", required=True, metavar="JSON")
    parser.add_argument("--draw", metavar="SVG")
    parser.add_argument("--pairs", type=int, default=160)
    parser.add_argument("--held-out", type=int, default=100)
    args = parser.parse_args()
    if not DATA.is_dir():
        parser.exit(message=f"skipped: no data in {DATA}; set QADAPTER_DATA\n")
    runs = {name: run(args.pairs, args.held_out, **settings) for name, settings in CURVES.items()}
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text(json.dumps({"pairs": args.pairs, "runs": runs}, indent=1) + "\n")
    for name, found in runs.items():
        mean = sum(found["losses"]) / len(found["losses"])
        print(
            f"{name:24} loss {mean:.3f} accuracy {found['accuracy']:.3f} margin "
            f"{found['margin']:.3f} ± {found['margin_se']:.3f}"
        )
    if args.draw:
        draw({name: found["losses"] for name, found in runs.items()}, args.draw)


if __name__ == "__main__":
    main()
