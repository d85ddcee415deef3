"""Draw the README's picture: the demo's adapter along the strength dial.

    make demo && python benchmarks/demo_picture.py runs/demo docs/demo.svg

Left: words in the greedy answers to the held-out prompts, mean and 95% interval over prompts.
Right: perplexity on the shipped general text, as a ratio to the base's, and KL to the base.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from statistics import fmean, stdev

import matplotlib as mpl
import matplotlib.pyplot as plt
from tqdm import tqdm

from qadapter.data import read_pairs, read_texts
from qadapter.files import shipped
from qadapter.policy import Policy

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def measure(directory: str, max_new_tokens: int) -> list[dict[str, float]]:
    """Return, for each strength, the words of an answer and the drift on general text."""
    policy = Policy.from_pretrained(directory)
    prompts = [pair.prompt for pair in read_pairs(shipped("demo.dev.jsonl"))]
    texts = read_texts(shipped("general.txt"))
    rows = []
    for strength in tqdm(STRENGTHS):
        answers = policy.answer(prompts, strength=strength, max_new_tokens=max_new_tokens)
        words = [len(answer.split()) for answer in answers]
        drift = policy.drift(texts, strength=strength)
        rows.append(
            {
                "strength": strength,
                "prompts": len(prompts),
                "words": fmean(words),
                "words_ci95": 1.96 * stdev(words) / math.sqrt(len(words)),
                "kl": drift.kl,
                "perplexity_ratio": drift.perplexity / drift.base_perplexity,
            }
        )
    return rows


def draw(rows: list[dict[str, float]], path: str) -> None:
    """Draw the two panels into an SVG file that is the same for the same figures."""
    mpl.rcParams |= {"svg.hashsalt": "qadapter", "font.size": 10, "axes.spines.top": False}
    x = [row["strength"] for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.9), layout="constrained")
    left.errorbar(
        x, [r["words"] for r in rows], yerr=[r["words_ci95"] for r in rows], marker="o", capsize=3
    )
    left.set(xlabel="strength", ylabel="words in an answer", ylim=(0, None))
    left.set_title("What it learned: short answers")
    right.plot(x, [r["perplexity_ratio"] for r in rows], marker="o", label="perplexity / base's")
    right.plot(x, [r["kl"] for r in rows], marker="s", label="KL to base, nats a token")
    right.set(xlabel="strength", ylim=(0, 1.25))
    right.set_title("What it kept: general text")
    right.legend(loc="center left", frameon=False)
    for axes in (left, right):
        axes.spines["right"].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Measure, print the figures, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("adapter")
    parser.add_argument("picture")
    parser.add_argument("--max-new-tokens", type=int, default=160)
    args = parser.parse_args()
    rows = measure(args.adapter, args.max_new_tokens)
    for row in rows:
        print(json.dumps(row))
    Path(args.picture).parent.mkdir(parents=True, exist_ok=True)
    draw(rows, args.picture)


if __name__ == "__main__":
    main()
