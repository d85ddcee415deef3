"""What the trunk and the anchors cost and keep: adapters on the last K layers, on two data sets.

    python benchmarks/trunk_sweep.py --output benchmarks/results/trunk.jsonl --draw docs/trunk.svg
    python benchmarks/trunk_sweep.py --output anchors.jsonl --depths 8 15 30 --anchor-weights 0 30

Each run trains on the same pairs in the same order; accuracy and margin are on held-out pairs, KL
to the base on text that no anchor came from. The margin is the mean difference of log π/π1 between
chosen and rejected, in nats; along the strength KL grows with its square, so KL/margin² is the KL
that a margin of one nat costs, and compares runs that learned unlike amounts. Runs that the output
file already holds are not made again, so a cut sweep goes on; those of other code or settings, or
of another machine, do not count.
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
from qadapter.data import prompt_key, read_pairs, read_texts
from qadapter.files import shipped
from qadapter.policy import Policy
from qadapter.stats import bootstrap, by_group
from qadapter.train import run_training

DATA = Path(os.environ.get("QADAPTER_DATA", "../shared/data"))
SETS = ("dsp_entertainment", "hh_harmless")
LAYERS = 30
DEPTHS = (8, 30, 4, 15, 2)


def measure(
    name: str, depth: int, anchor_weight: float, seed: int, *, settings: dict[str, Any]
) -> dict[str, Any]:
    """Train on the last `depth` layers; return what was learned and how far it drifted."""
    with tempfile.TemporaryDirectory() as directory:
        config = QAdapterConfig(
            data=str(DATA / f"preference/{name}.train.jsonl"),
            output_dir=str(Path(directory) / "adapter"),
            layers_to_transform=list(range(LAYERS - depth, LAYERS)),
            anchor_data=shipped("anchors.txt") if anchor_weight else None,
            anchor_weight=anchor_weight,
            alpha_0=settings["alpha"],
            alpha_tilde=settings["alpha"],
            learning_rate=settings["learning_rate"],
            num_train_epochs=1,
            max_pairs=settings["pairs"],
            seed=seed,
            save_strategy="no",
            disable_tqdm=True,
        )
        result = run_training(config)
        policy = Policy.from_pretrained(result.directory, dtype=torch.float32)
    held_out = list(read_pairs(str(DATA / f"preference/{name}.dev.jsonl")))[: settings["held_out"]]
    score = policy.score(held_out, max_length=policy.context)
    rewards = zip(score.chosen_rewards, score.rejected_rewards, strict=True)
    margins = [(chosen - rejected) / settings["alpha"] for chosen, rejected in rewards]
    margin = bootstrap(*by_group(margins, map(prompt_key, held_out)))
    texts = read_texts(str(DATA / "capability/wikitext2.valid.txt"))
    drift = policy.drift(texts, max_tokens=10_000)
    return {
        "data": name,
        "depth": depth,
        "anchor_weight": anchor_weight,
        "seed": seed,
        "pairs": result.pairs,
        "held_out": score.pairs,
        "prompts": score.prompts,
        "accuracy": score.accuracy,
        "accuracy_ci": score.accuracy_ci,
        "length_baseline": score.length_baseline,
        "margin": margin.value,
        "margin_ci": (margin.low, margin.high),
        "kl_text": drift.kl,
        "kl_of_one_nat": drift.kl / margin.value**2,
        "perplexity_ratio": drift.perplexity / drift.base_perplexity,
        "train_loss": result.metrics["train_loss"],
    }


def draw(rows: list[dict[str, Any]], path: str) -> None:
    """Draw accuracy, drift, and drift at one nat against K, one line a data set and weight."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    mpl.rcParams |= {"svg.hashsalt": "qadapter", "font.size": 10, "axes.spines.top": False}
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 2.9), layout="constrained")
    for name, weight in sorted({(row["data"], row["anchor_weight"]) for row in rows}):
        runs = [r for r in rows if (r["data"], r["anchor_weight"]) == (name, weight)]
        runs.sort(key=lambda r: (r["depth"], r["seed"]))
        label = f"{name}, anchors × {weight:g}" if weight else name
        x, y = [r["depth"] for r in runs], [r["accuracy"] for r in runs]
        bars = [[abs(r["accuracy_ci"][i] - r["accuracy"]) for r in runs] for i in range(2)]
        left.errorbar(x, y, yerr=bars, marker="o", capsize=3, label=label)
        middle.plot(x, [r["kl_text"] for r in runs], marker="o", label=label)
        right.plot(x, [r["kl_of_one_nat"] for r in runs], marker="o", label=label)
    left.set(ylabel="held-out accuracy")
    middle.set(ylabel="KL to base, nats a token", yscale="log")
    right.set(ylabel="KL of a margin of one nat", yscale="log")
    left.legend(frameon=False, fontsize=8)
    for axes in (left, middle, right):
        axes.set(xlabel=f"K, adapted layers of {LAYERS}")
        axes.spines["right"].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Run what is missing, one line of JSON a run; then draw if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", required=True)
    parser.add_argument("--draw", metavar="SVG")
    parser.add_argument("--data", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS, metavar="K")
    parser.add_argument("--anchor-weights", type=float, nargs="+", default=[0.0], metavar="W")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--alpha", type=float, default=0.5)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--pairs", type=int, default=480)
    parser.add_argument("--held-out", type=int, default=300)
    args = parser.parse_args()
    if not DATA.is_dir():
        parser.exit(message=f"skipped: no data in {DATA}; set QADAPTER_DATA\n")
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    settings = {n: getattr(args, n) for n in ("alpha", "learning_rate", "pairs", "held_out")}
    key = {**origin(Path(__file__)), **settings}
    rows = read_rows(output, key)
    done = {tuple(r[n] for n in ("data", "depth", "anchor_weight", "seed")) for r in rows}
    wanted = [
        (name, depth, weight, seed)
        for seed in args.seeds
        for depth in args.depths
        for weight in args.anchor_weights
        for name in args.data
    ]
    for run in tqdm([w for w in wanted if w not in done]):
        row = {**measure(*run, settings=settings), "key": key}
        rows.append(row)
        with output.open("a") as file:
            file.write(json.dumps(row) + "\n")
    if args.draw:
        draw(rows, args.draw)


if __name__ == "__main__":
    main()
