"""What the trunk costs and what it keeps: adapters on the last K layers, on two data sets.

    python benchmarks/trunk_sweep.py --output benchmarks/results/trunk.jsonl --draw docs/trunk.svg

Each run trains on the same pairs in the same order; accuracy is on held-out pairs, KL to the base
on unrelated text. Runs that the output file already holds are not made again, so a cut sweep goes
on; those of other code or settings, or of another machine, do not count.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from measured import origin, read_rows
from tqdm import tqdm

from qadapter.config import QAdapterConfig
from qadapter.data import read_pairs, read_texts
from qadapter.policy import Policy
from qadapter.train import run_training

DATA = Path(os.environ.get("QADAPTER_DATA", "../shared/data"))
SETS = ("dsp_entertainment", "hh_harmless")
LAYERS = 30
DEPTHS = (8, 30, 4, 15, 2)


def measure(name: str, depth: int, seed: int, max_pairs: int, held_out: int) -> dict[str, Any]:
    """Train on the last `depth` layers; return what was learned and how far it drifted."""
    with tempfile.TemporaryDirectory() as directory:
        config = QAdapterConfig(
            data=str(DATA / f"preference/{name}.train.jsonl"),
            output_dir=str(Path(directory) / "adapter"),
            layers_to_transform=list(range(LAYERS - depth, LAYERS)),
            max_pairs=max_pairs,
            seed=seed,
            save_strategy="no",
            disable_tqdm=True,
        )
        result = run_training(config)
        policy = Policy.from_pretrained(result.directory, dtype=torch.float32)
    pairs = list(read_pairs(str(DATA / f"preference/{name}.dev.jsonl")))[:held_out]
    score = policy.score(pairs)
    texts = read_texts(str(DATA / "capability/wikitext2.valid.txt"))
    drift = policy.drift(texts, max_tokens=10_000)
    return {
        "data": name,
        "depth": depth,
        "seed": seed,
        "pairs": result.pairs,
        "held_out": score.pairs,
        "accuracy": score.accuracy,
        "accuracy_ci": score.accuracy_ci,
        "length_baseline": score.length_baseline,
        "kl_text": drift.kl,
        "perplexity_ratio": drift.perplexity / drift.base_perplexity,
        "train_loss": result.metrics["train_loss"],
    }


def draw(rows: list[dict[str, Any]], path: str) -> None:
    """Draw accuracy and drift against K, one line a data set."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    mpl.rcParams |= {"svg.hashsalt": "qadapter", "font.size": 10, "axes.spines.top": False}
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.9), layout="constrained")
    for name in sorted({row["data"] for row in rows}):
        runs = sorted((r for r in rows if r["data"] == name), key=lambda r: r["depth"])
        x, y = [r["depth"] for r in runs], [r["accuracy"] for r in runs]
        bars = [[abs(r["accuracy_ci"][i] - r["accuracy"]) for r in runs] for i in range(2)]
        left.errorbar(x, y, yerr=bars, marker="o", capsize=3, label=name)
        right.plot(x, [r["kl_text"] for r in runs], marker="o", label=name)
    left.set(xlabel=f"K, adapted layers of {LAYERS}", ylabel="held-out accuracy")
    right.set(xlabel=f"K, adapted layers of {LAYERS}", ylabel="KL to base, nats a token")
    right.set(yscale="log")
    left.legend(frameon=False)
    for axes in (left, right):
        axes.spines["right"].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Run what is missing, one line of JSON a run; then draw if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", required=True)
    parser.add_argument("--draw", metavar="SVG")
    parser.add_argument("--pairs", type=int, default=480)
    parser.add_argument("--held-out", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not DATA.is_dir():
        parser.exit(message=f"skipped: no data in {DATA}; set QADAPTER_DATA\n")
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    asked = {"max_pairs": args.pairs, "held_out": args.held_out}
    key = {**origin(Path(__file__)), **asked}
    rows = read_rows(output, key)
    done = {(r["data"], r["depth"], r["seed"]) for r in rows}
    wanted = [(name, depth, args.seed) for depth in DEPTHS for name in SETS]
    for run in tqdm([w for w in wanted if w not in done]):
        row = {**measure(*run, args.pairs, args.held_out), "key": key}
        rows.append(row)
        with output.open("a") as file:
            file.write(json.dumps(row) + "\n")
    if args.draw:
        draw(rows, args.draw)


if __name__ == "__main__":
    main()
