"""Why SFT lowers perplexity on WikiText: the same training on answers from different authors.

    QADAPTER_DATA=../shared/data python benchmarks/sft_perplexity.py \\
        --output benchmarks/results/sft_perplexity.json

SFT as `benchmarks/compare/entertainment.yaml --full` chose it (rate 2e-4, one epoch), with its
prompts and seeds, on the chosen answers, on the rejected ones, and on answers that the base itself
samples. Each is asked for the change of perplexity against the base's on WikiText-2, on novels
(LAMBADA's passages), and on what the base samples by itself.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from qadapter import hub
from qadapter.anchors import COUNT, free_texts
from qadapter.compare.config import CompareConfig
from qadapter.compare.data import part_of, split, write_pairs
from qadapter.compare.measure import row_figures
from qadapter.compare.train import Task, train
from qadapter.config import QConfig
from qadapter.data import Pair, prompt_key, read_texts
from qadapter.files import read_jsonl, write_text
from qadapter.model import QAdapterModel
from qadapter.policy import Policy
from qadapter.stats import mean_intervals

DATA = Path(os.environ.get("QADAPTER_DATA", "../shared/data"))
SETTINGS = Path(__file__).parent / "compare" / "entertainment.yaml"
PARAMS = {"trunk": 0.0, "learning_rate": 2e-4, "epochs": 1}
MOST = 128
"""Tokens of an answer that the base samples."""


def own_answers(base: Policy, pairs: Sequence[Pair]) -> list[Pair]:
    """Return a pair a prompt, its chosen answer sampled by the base: those that came to an end."""
    asked = list({prompt_key(pair): pair for pair in pairs}.values())
    out = []
    torch.manual_seed(0)
    for start in range(0, len(asked), 16):
        part = asked[start : start + 16]
        prompts = [pair.prompt for pair in part]
        made = base.answer(
            prompts, strength=0.0, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=MOST
        )
        for pair, answer in zip(part, made, strict=True):
            length = len(base.tokenizer(answer, add_special_tokens=False)["input_ids"])
            if answer and length < MOST - 2:
                out.append(replace(pair, chosen=[{"role": "assistant", "content": answer}]))
    return out


def authors(base: Policy, config: CompareConfig) -> dict[str, list[Pair]]:
    """Return training pairs by who wrote what is trained on."""
    pairs = split(config).train
    return {
        "chosen": pairs,
        "rejected": [replace(p, chosen=p.rejected, rejected=p.chosen) for p in pairs],
        "the base's own": own_answers(base, pairs),
    }


def texts(base: Policy, config: CompareConfig, tokens: int) -> dict[str, list[list[int]]]:
    """Return rows of tokens by text."""
    novels = [
        str(cast(dict[str, Any], row)["context"])
        for _, row in read_jsonl(str(DATA / "capability/lambada.dev.jsonl"))
    ]
    own = free_texts(base.model.base, base.tokenizer, COUNT, seed=1)  # anchors have seed 0
    found = {
        "WikiText-2": part_of(read_texts(config.text), "report"),
        "novels": novels,
        "what the base samples": list(own),
    }
    return {name: base.text_rows(lines, max_tokens=tokens) for name, lines in found.items()}


def losses(policy: Policy, rows: Sequence[Sequence[int]]) -> tuple[list[float], list[int], float]:
    """Return by row how much the loss rose over the base's, nats, and tokens; and KL a token."""
    found = row_figures(policy, rows, [1] * len(rows), [1.0])
    assert found.kl is not None
    rise = (found.base - found.policy[0]).tolist()
    return rise, found.tokens.tolist(), float(found.kl.sum() / found.tokens.sum())


def main() -> None:
    """Train each way with each seed, measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", required=True, metavar="JSON")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=5_000, help="of each text")
    args = parser.parse_args()
    if not DATA.is_dir():
        parser.exit(message=f"skipped: no data in {DATA}; set QADAPTER_DATA\n")
    os.environ["QADAPTER_DATA"] = str(DATA)
    config = CompareConfig.read(SETTINGS, full=True)
    model = hub.load_base(config.model, dtype=torch.float32, device=hub.pick_device())
    untrained = QAdapterModel.create(model, QConfig(alpha_0=1.0, alpha_tilde=1.0))
    base = Policy(untrained, hub.load_tokenizer(config.model))
    rows = texts(base, config, args.tokens)
    trained_on = authors(base, config)
    out: dict[str, Any] = {"params": PARAMS, "seeds": args.seeds, "tokens": args.tokens, "rows": []}
    for author, pairs in trained_on.items():
        found: dict[str, list[Any]] = {name: [] for name in rows}
        for seed in args.seeds:
            with tempfile.TemporaryDirectory() as directory:
                file = Path(directory, "pairs.jsonl")
                write_pairs(file, pairs)
                task = Task(
                    params=PARAMS,
                    seed=seed,
                    model=config.model,
                    max_length=config.max_length,
                    answer_tokens=config.answer_tokens,
                    rl_prompts=config.rl_prompts,
                    common_trunk=config.trunk,
                    pairs=file,
                    answers=None,
                    anchors=None,
                    output=Path(directory, "adapter"),
                )
                train(task, "train_sft")
                policy = Policy.from_pretrained(
                    str(task.output), config.model, dtype=torch.float32, device=hub.pick_device()
                )
            for name in rows:
                found[name].append(losses(policy, rows[name]))
        for name, runs in found.items():
            [rise] = mean_intervals([[run[0]] for run in runs], runs[0][1])
            share = {k: math.expm1(getattr(rise, k)) for k in ("value", "low", "high")}
            kl = sum(run[2] for run in runs) / len(runs)
            out["rows"].append(
                {"answers": author, "text": name, "perplexity_rise": share, "kl": kl}
            )
            low, high = share["low"], share["high"]
            print(
                f"{author:26}{name:24}{share['value']:+.2%} ({low:+.2%} to {high:+.2%}) KL {kl:.5f}"
            )
    out |= {"pairs": {k: len(v) for k, v in trained_on.items()}, "processor": hub.processor()}
    write_text(args.output, json.dumps(out, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
