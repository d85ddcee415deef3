"""Whether bfloat16 learns what float32 learns: the loss of each step, same pairs, same order.

    python benchmarks/precision.py --output benchmarks/results/precision.json \\
        --draw docs/precision.svg

The noise that a difference is judged by is that of the same float32 run with another seed, which
changes the adapter's first weights and the order of the pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from qadapter.config import QAdapterConfig
from qadapter.train import prepare

DATA = Path(os.environ.get("QADAPTER_DATA", "../shared/data"))
CURVES = {
    "bfloat16": {"bf16": True, "seed": 0},
    "float32": {"bf16": False, "seed": 0},
    "float32, another seed": {"bf16": False, "seed": 1},
}


def losses(pairs: int, **settings: Any) -> list[float]:
    """Return the loss of each step of a run with the default settings but these."""
    with tempfile.TemporaryDirectory() as directory:
        config = QAdapterConfig(
            data=str(DATA / "preference/dsp_entertainment.train.jsonl"),
            output_dir=directory,
            max_pairs=pairs,
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            **settings,
        )
        trainer = prepare(config).trainer(config)
        trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


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
    args = parser.parse_args()
    if not DATA.is_dir():
        parser.exit(message=f"skipped: no data in {DATA}; set QADAPTER_DATA\n")
    curves = {name: losses(args.pairs, **settings) for name, settings in CURVES.items()}
    exact = curves["float32"]
    gaps = {
        name: sum(abs(a - b) for a, b in zip(values, exact, strict=True)) / len(exact)
        for name, values in curves.items()
    }
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    result = {"pairs": args.pairs, "mean_gap_to_float32": gaps, "losses": curves}
    Path(args.output).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(gaps))
    if args.draw:
        draw(curves, args.draw)


if __name__ == "__main__":
    main()
