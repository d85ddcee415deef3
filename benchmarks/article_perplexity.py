"""How perplexity on running text changed, over many articles and drawn by article.

    QADAPTER_DATA=../shared/data python benchmarks/article_perplexity.py \\
        --adapters DPO 1 DIR DIR DIR --adapters "Q-Adapter" 0.81 DIR DIR DIR \\
        --output benchmarks/results/article_perplexity.json

Lines of one article are alike: what happens to a text about lobsters happens to all of its lines,
and WikiText-2's first hundred lines are of five articles. Here each of its sixty has a part,
windows from all of it, and a bootstrap draws articles. Half of them are where a comparison's
settings were chosen, by a KL on a few thousand tokens. Of each method it takes the seeds' adapters
(`cells/train-*/adapter` of a comparison) and the strength at which they are asked, as trained (1)
or at another's margin.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from qadapter import hub
from qadapter.compare.config import CompareConfig
from qadapter.compare.measure import load_policy, row_figures
from qadapter.data import read_texts
from qadapter.files import write_text
from qadapter.stats import Interval, mean_intervals, paired_bootstrap

DATA = Path(os.environ.get("QADAPTER_DATA", "../shared/data"))
HEADING = re.compile(r" = [^=].* = ")


def articles(lines: list[str]) -> list[list[str]]:
    """Return the lines of each article; one begins with a heading of the first order."""
    found: list[list[str]] = []
    for line in lines:
        if HEADING.fullmatch(line.rstrip("\n")):
            found.append([])
        if found:
            found[-1].append(line)
    return found


def told(interval: Interval) -> dict[str, float]:
    """Return a rise of loss, nats a token, as a share of perplexity."""
    return {k: math.expm1(getattr(interval, k)) for k in ("value", "low", "high")}


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--adapters", nargs="+", action="append", required=True, metavar="NAME STRENGTH DIR…")
    add("--output", required=True, metavar="JSON")
    add("--tokens", type=int, default=512, help="of each article")
    add("--articles", type=int, help="only the first so many: 32 are in the half that is reported")
    args = parser.parse_args()
    names = [name for name, *_ in args.adapters]
    if len({*names}) < len(names) or any(len(given) < 3 for given in args.adapters):
        parser.error("--adapters: each takes a name of its own, a strength and directories")
    if not DATA.is_dir():
        parser.exit(message=f"skipped: no data in {DATA}; set QADAPTER_DATA\n")
    text, model = DATA / "capability/wikitext2.valid.txt", CompareConfig.model
    base = load_policy(model, None)
    rows, owner = [], []
    for i, lines in enumerate(articles(read_texts(str(text)))[: args.articles]):
        of_it = base.text_rows(lines, max_tokens=args.tokens)
        rows += of_it
        owner += [i] * len(of_it)
    tokens = np.bincount(owner, [len(row) - 1 for row in rows])
    rises: dict[str, Any] = {}
    out = []
    for name, strength, *places in args.adapters:
        found = [
            row_figures(load_policy(model, Path(place)), rows, [1] * len(rows), [float(strength)])
            for place in places
        ]
        rises[name] = [np.bincount(owner, (f.base - f.policy[0]).numpy()) for f in found]
        far = [np.bincount(owner, f.kl[0].numpy()) for f in found if f.kl is not None]
        [rise], [kl] = (mean_intervals([[x] for x in sums], tokens) for sums in (rises[name], far))
        row = {"name": name, "strength": float(strength), "seeds": len(places)}
        out.append({**row, "perplexity_rise": told(rise), "kl": asdict(kl)})
        print(json.dumps(out[-1]), flush=True)
    first, *others = rises
    beside = {name: told(paired_bootstrap(rises[name], rises[first], tokens)) for name in others}
    report = {
        "articles": len(tokens),
        "tokens": int(tokens.sum()),
        "processor": hub.processor(),
        "rows": out,
        f"perplexity higher than that of {first}": beside,
    }
    print(json.dumps(beside))
    write_text(args.output, json.dumps(report, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
