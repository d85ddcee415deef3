"""How two outputs of `swapped_preference.py` differ: in what turns round, and in what stays.

    python benchmarks/swapped_difference.py runs/swapped_sft_kl.json runs/swapped_qadapter.json

Told of each text is the first method's perplexity over the other's, less 1: as they are, swapped,
half the difference of these, and half the sum. Intervals draw a row of text for both at once, and
seeds for each by itself, as the runs of two methods have nothing in common but a number. Margins
may differ, where one was asked with `--strength`: they are printed, and how much of them turns
round.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from article_perplexity import told
from swapped_preference import WAYS, parts

from qadapter.stats import paired_bootstrap


def read(file: str) -> dict[str, Any]:
    """Return an output.

    Raises:
        ValueError: it is none, or of the time when rows were not kept.
    """
    try:
        report = json.loads(Path(file).read_text())
        shapes = [
            (np.shape(text["rises"][way]), (len(report["seeds"]), len(text["sizes"])))
            for text in report["texts"]
            for way in WAYS
        ]
        complete = all("sha256" in text for text in report["texts"])
        _ = [report["method"], *(report["ways"][way]["margin"] for way in WAYS)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: {type(error).__name__}: {error}") from error
    if not complete or not shapes or any(there != wanted for there, wanted in shapes):
        raise ValueError(f"{file}: lacks rows of some seed; make it with swapped_preference.py")
    return report


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return by text and part the perplexity of one over the other's, less 1, with its interval.

    Raises:
        ValueError: they are of other text.
    """
    texts = {text["text"]: text for text in other["texts"]}
    same = {name: text["sha256"] for name, text in texts.items()}
    if same != {text["text"]: text["sha256"] for text in one["texts"]}:
        raise ValueError("the two were measured on different text")
    out = {}
    for mine in one["texts"]:
        a, b = (
            parts(*(np.array(text["rises"][way]) for way in WAYS))
            for text in (mine, texts[mine["text"]])
        )
        out[mine["text"]] = {
            part: told(paired_bootstrap(a[part], b[part], mine["sizes"])) for part in a
        }
    return out


def main() -> None:
    """Print a line for each text and part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("one", metavar="JSON")
    parser.add_argument("other", metavar="JSON")
    args = parser.parse_args()
    try:
        one, other = read(args.one), read(args.other)
        found = differences(one, other)
    except ValueError as error:
        parser.error(str(error))
    for report in (one, other):
        learned = ", ".join(f"{way} {report['ways'][way]['margin']:.2f} nats" for way in WAYS)
        turns = sum(report["ways"][way]["margin"] for way in WAYS) / 2
        print(f"{report['method']}, {len(report['seeds'])} seeds: {learned}, turns {turns:.2f}")
    for text, by_part in found.items():
        for part, x in by_part.items():
            between = f"{x['low']:+.3%} to {x['high']:+.3%}"
            print(f"{text:20}{part:14}{x['value']:+.3%} ({between})")


if __name__ == "__main__":
    main()
