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
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from article_perplexity import told

from qadapter import hub
from qadapter.anchors import COUNT, free_texts
from qadapter.compare.config import CompareConfig
from qadapter.compare.data import part_of, split, write_pairs
from qadapter.compare.measure import load_policy, row_figures
from qadapter.compare.train import Task, train
from qadapter.data import Pair, read_texts
from qadapter.data.tokens import kept_pairs
from qadapter.files import read_jsonl, write_text
from qadapter.policy import Policy
from qadapter.stats import mean_intervals

DATA = Path(os.environ.get("QADAPTER_DATA", "../shared/data"))
SETTINGS = Path(__file__).parent / "compare" / "entertainment.yaml"
PARAMS = {"trunk": 0.0, "learning_rate": 2e-4, "epochs": 1}
Rows = dict[str, list[list[int]]]
MOST = 192
"""Tokens of an answer that the base samples."""


def fitting(base: Policy, pairs: Iterable[Pair], most: int) -> list[Pair]:
    """Return the pairs of at most so many tokens, which are those that training keeps."""
    kept = kept_pairs(pairs, base.tokenizer, {}, end_ids=base.end_ids, max_length=most)
    return [pair for pair, _ in kept]


def own_answers(base: Policy, pairs: Sequence[Pair]) -> Iterator[tuple[Pair, Pair]]:
    """Yield each pair whose prompt the base answers to the end, and it with that for chosen."""
    torch.manual_seed(0)
    for start in range(0, len(pairs), 16):
        part = pairs[start : start + 16]
        prompts = [pair.prompt for pair in part]
        made = base.answer(
            prompts, strength=0.0, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=MOST
        )
        for pair, answer in zip(part, made, strict=True):
            length = len(base.tokenizer(answer, add_special_tokens=False)["input_ids"])
            if answer and length < MOST - 2:
                yield pair, replace(pair, chosen=[{"role": "assistant", "content": answer}])


def authors(base: Policy, config: CompareConfig) -> dict[str, list[Pair]]:
    """Return the same training pairs by who wrote what is trained on."""
    pairs = fitting(base, split(config).train, config.max_length)
    both = list(own_answers(base, pairs))
    own = fitting(base, (answered for _, answered in both), config.max_length)
    asked = {pair.source for pair in own}
    chosen = [pair for pair, _ in both if pair.source in asked]
    return {
        "chosen": chosen,
        "rejected": [replace(p, chosen=p.rejected, rejected=p.chosen) for p in chosen],
        "the base's own": own,
    }


def texts(base: Policy, config: CompareConfig, tokens: int) -> Rows:
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


def trained(
    config: CompareConfig,
    pairs: Sequence[Pair],
    seed: int,
    *,
    trainer: str = "train_sft",
    params: Mapping[str, Any] = PARAMS,
    anchors: Path | None = None,
) -> Policy:
    """Return the policy of one training; as it stands of an SFT on the chosen answers."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "pairs.jsonl")
        write_pairs(file, pairs)
        task = Task(
            params=params,
            seed=seed,
            model=config.model,
            max_length=config.max_length,
            answer_tokens=config.answer_tokens,
            training=config.training,
            pairs=file,
            replay=None,
            anchors=anchors,
            output=Path(directory, "adapter"),
        )
        train(task, trainer)
        return load_policy(config.model, task.output)


def measured(policies: Iterable[Policy], rows: Rows) -> list[dict[str, Any]]:
    """Return by text how perplexity rose over the base's, with its interval, and KL a token."""
    found: dict[str, list[Any]] = {name: [] for name in rows}
    for policy in policies:
        for name in rows:
            found[name].append(losses(policy, rows[name]))
    out = []
    for name, runs in found.items():
        [rise] = mean_intervals([[run[0]] for run in runs], runs[0][1])
        kl = sum(run[2] for run in runs) / len(runs)
        out.append({"text": name, "perplexity_rise": told(rise), "kl": kl})
    return out


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
    base = load_policy(config.model, None)
    rows = texts(base, config, args.tokens)
    out: dict[str, Any] = {"params": PARAMS, "processor": hub.processor(), **vars(args), "rows": []}
    del out["output"]
    for author, pairs in authors(base, config).items():
        out["pairs"] = len(pairs)
        found = measured((trained(config, pairs, seed) for seed in args.seeds), rows)
        out["rows"] += [{"answers": author, **row} for row in found]
        for row in found:
            share = row["perplexity_rise"]
            between = f"{share['low']:+.2%} to {share['high']:+.2%}"
            line = f"{share['value']:+.2%} ({between}) KL {row['kl']:.5f}"
            print(f"{author:16}{row['text']:24}{line}", flush=True)
    write_text(args.output, json.dumps(out, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
