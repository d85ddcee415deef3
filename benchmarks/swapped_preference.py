"""What of a change of perplexity turns round with the preference: the same pairs, swapped.

    QADAPTER_DATA=../shared/data python benchmarks/swapped_preference.py --method dpo \\
        --seeds 0 1 --output benchmarks/results/swapped_dpo.json

A preference turned round asks for the opposite. So of two policies that learned as many nats of
margin, one of the pairs as they are and one of the same pairs with chosen and rejected swapped,
half the difference of what text costs them is what turns round with the preference: all effects of
the first order of what tells chosen from rejected, be they meant or not. Half the sum is what stays
whatever is preferred: what is lost either way, less what is gained either way. Methods are as
`benchmarks/compare/entertainment_suite.yaml` has them, seed by seed; both ways they are turned
to one margin on every third of its held-out pairs. Texts are the lines of the suite's perplexity,
each alone after the token of beginning as lm-eval reads them, the next lines of its order, the
first window of each of WikiText-2's articles, and novels (LAMBADA's passages, each alone after that
token). `benchmarks/swapped_difference.py` tells how two outputs differ.

SFT on rejected answers hardly learns to prefer them. What cannot be turned to that margin both ways
is asked at one dial, `--strength`; half the sum of its two margins is then what turns round.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from article_perplexity import articles, told
from datasets import load_dataset
from sft_perplexity import trained

from qadapter import hub
from qadapter.anchors import COUNT, free_texts
from qadapter.compare.config import CompareConfig
from qadapter.compare.data import split
from qadapter.compare.measure import load_policy, preference, row_figures
from qadapter.compare.methods import METHODS
from qadapter.data import Pair, TokenizedPair, read_pairs, read_texts, tokenize_pairs
from qadapter.files import read_jsonl, write_jsonl, write_text
from qadapter.policy import Policy
from qadapter.stats import dial_at, mean_intervals
from qadapter.suite import with_text

DATA = Path(os.environ.get("QADAPTER_DATA", "../shared/data"))
SETTINGS = Path(__file__).parent / "compare" / "entertainment_suite.yaml"
MARGIN = 4.2
"""About DPO's on the held-out pairs, nats."""
STRENGTHS = [0.0, 0.6, 1.0, 1.4, 2.0, 2.8]
WAYS = ("as they are", "swapped")
LINES, NEXT_LINES, NOVELS = 100, 75, 60


Losses = Sequence[npt.NDArray[Any]]
Rises = dict[str, Losses]


class Rows(NamedTuple):
    """A text as it is scored."""

    rows: list[list[int]]
    """Of one line, article or passage each, which are what a bootstrap draws."""
    sizes: npt.NDArray[np.int64]
    """`[rows]`, words or tokens of each."""
    per: str


def alone(base: Policy, texts: Sequence[str]) -> Rows:
    """Return texts, each read alone after the token of beginning; perplexity is a word's."""
    begin, encode = base.tokenizer.bos_token_id, base.tokenizer
    rows = [[begin, *encode(text, add_special_tokens=False)["input_ids"]] for text in texts]
    words = np.array([len(text.split()) for text in texts])
    return Rows(rows, words, "word")


def read(base: Policy) -> dict[str, Rows]:
    """Return the texts by name."""
    wikitext = str(DATA / "capability/wikitext2.valid.txt")
    lines = with_text(load_dataset("text", data_files={"test": wikitext})["test"])
    lines = [lines[i]["text"] for i in range(LINES + NEXT_LINES)]
    # Of each its first window.
    running = [base.text_rows(text, max_tokens=1)[0] for text in articles(read_texts(wikitext))]
    passages = read_jsonl(str(DATA / "capability/lambada.dev.jsonl"))
    novels = [str(row["context"]) for _, row in passages]
    return {
        "the suite's lines": alone(base, lines[:LINES]),
        "the next lines": alone(base, lines[LINES:]),
        "running text": Rows(running, np.array([len(row) - 1 for row in running]), "token"),
        "novels": alone(base, novels[:: len(novels) // NOVELS][:NOVELS]),
    }


def turned(pairs: Iterable[Pair]) -> list[Pair]:
    """Return pairs with chosen and rejected swapped."""
    return [replace(pair, chosen=pair.rejected, rejected=pair.chosen) for pair in pairs]


def margins(
    policy: Policy, pairs: Sequence[TokenizedPair], way: str, strengths: Sequence[float]
) -> list[float]:
    """Return the mean margin at each strength, of what the training preferred, nats."""
    sign = -1 if way == "swapped" else 1
    return [sign * point["margin"] for point in preference(policy, pairs, strengths)]


def dial(found: Iterable[Sequence[float]]) -> float:
    """Return where the mean margin over seeds is MARGIN."""
    curve = [fmean(at) for at in zip(*found, strict=True)]
    place = dial_at(STRENGTHS, curve, STRENGTHS, MARGIN)
    if place is None:
        raise SystemExit(f"no margin of {MARGIN} nats along the dial: {curve}; give --strength")
    return float(f"{place:.3g}")


def measured(
    policies: Sequence[Policy],
    held_out: Sequence[TokenizedPair],
    texts: Mapping[str, Rows],
    way: str,
    strength: float | None = None,
) -> tuple[dict[str, Any], Rises]:
    """Return what is told of one way: dial, margins, KL by text; and how loss rose, by text.

    KL is a word's where perplexity is. The dial is at `strength`, else where the margin is MARGIN.
    """
    strengths = STRENGTHS if strength is None else [strength]
    learned = [margins(policy, held_out, way, strengths) for policy in policies]
    at = dial(learned) if strength is None else strength
    margin = MARGIN if strength is None else fmean(found for [found] in learned)
    kl, rises = {}, {}
    for name, text in texts.items():
        found = [row_figures(p, text.rows, [1] * len(text.rows), [at]) for p in policies]
        rises[name] = [(f.base - f.policy[0]).numpy() for f in found]
        far = [f.kl[0].numpy() for f in found if f.kl is not None]
        kl[name] = asdict(mean_intervals(np.stack(far)[:, None], text.sizes)[0])
    return {"strength": at, "margin": margin, "margins": learned, "kl": kl}, rises


def parts(as_is: Losses, swapped: Losses) -> dict[str, npt.NDArray[np.float64]]:
    """Return how loss rose both ways, what turns round, and what stays: `[seeds, rows]`, nats.

    Of each seed both have how much the loss of each row rose.
    """
    one, other = np.stack(as_is), np.stack(swapped)
    return {
        "as they are": one,
        "swapped": other,
        "turns round": (one - other) / 2,
        "stays": (one + other) / 2,
    }


def shares(text: Rows, as_is: Losses, swapped: Losses) -> dict[str, dict[str, float]]:
    """Return `parts` as shares of perplexity, with 95% intervals over seeds and rows."""
    found = parts(as_is, swapped)
    return {n: told(mean_intervals(x[:, None], text.sizes)[0]) for n, x in found.items()}


def digest(text: Rows) -> str:
    """Return what tells a text's tokens from others'."""
    return hashlib.sha256(json.dumps(text.rows).encode()).hexdigest()


def main() -> None:
    """Train both ways with each seed, measure, write and print."""
    os.environ["QADAPTER_DATA"] = str(DATA)
    config = CompareConfig.read(SETTINGS)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--method", choices=[*config.settings], required=True)
    add("--output", required=True, metavar="JSON")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--strength", type=float, help="of both ways, for a method that cannot learn both as far")
    args = parser.parse_args()
    if len({*args.seeds}) < len(args.seeds):
        parser.error("--seeds: one is there twice")
    if args.strength is not None and not 0 < args.strength < math.inf:
        parser.error("--strength: must be finite and above 0")
    if not DATA.is_dir():
        parser.exit(message=f"skipped: no data in {DATA}; set QADAPTER_DATA\n")
    base = load_policy(config.model, None)
    texts, pairs = read(base), split(config).train
    held_out, _ = tokenize_pairs(
        read_pairs(config.test), base.tokenizer, end_ids=base.end_ids, max_length=config.max_length
    )
    method, settings = METHODS[args.method], config.settings[args.method]
    report: dict[str, Any] = {"method": args.method, "params": settings}
    report |= {"seeds": args.seeds, "processor": hub.processor(), "ways": {}}
    params = {**method.fixed, **settings}
    rises = {}
    with tempfile.TemporaryDirectory() as directory:
        anchors = Path(directory, "anchors.jsonl") if method.has("anchor_weight") else None
        if anchors:
            own = free_texts(base.model.base, base.tokenizer, COUNT)
            write_jsonl(anchors, ({"text": text} for text in own))
        for way, preferred in zip(WAYS, (pairs, turned(pairs)), strict=True):
            made = [
                trained(
                    config, preferred, s, trainer=method.trainer, params=params, anchors=anchors
                )
                for s in args.seeds
            ]
            report["ways"][way], rises[way] = measured(
                made, held_out[::3], texts, way, args.strength
            )
            print(way, json.dumps(report["ways"][way]), flush=True)
    report["texts"] = [
        {
            "text": name,
            "per": text.per,
            "rows": len(text.rows),
            **shares(text, *(rises[way][name] for way in WAYS)),
            "sha256": digest(text),
            "sizes": text.sizes.tolist(),
            "rises": {way: np.stack(rises[way][name]).round(6).tolist() for way in WAYS},
        }
        for name, text in texts.items()
    ]
    kept = ("sha256", "sizes", "rises")
    print(json.dumps([{k: text[k] for k in text if k not in kept} for text in report["texts"]]))
    write_text(args.output, json.dumps(report, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
