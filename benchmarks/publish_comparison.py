"""A comparison's figures as they are committed: without answers, paths as the command had them.

    python benchmarks/publish_comparison.py runs/compare/mine benchmarks/results/compare_mine.json
    python benchmarks/publish_comparison.py runs/compare/again … --methods replay

The second puts methods that were made anew into what is published, where the others stay. Answers
that methods gave to real prompts are not ours to publish, and where the data lie is another place
on every machine.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qadapter.files import write_text


def published(comparison: dict[str, Any], data: str) -> dict[str, Any]:
    """Return a comparison without answers, `data` in its paths being `$QADAPTER_DATA` again."""

    def cleaned(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: cleaned(v) for k, v in value.items() if k != "answers" or isinstance(v, int)}
        if isinstance(value, list):
            return [cleaned(v) for v in value]
        return value.replace(data, "$QADAPTER_DATA") if isinstance(value, str) else value

    found: dict[str, Any] = cleaned(comparison)
    return found


_SCORED_ON = (
    "model",
    "test",
    "test_pairs",
    "held_out_pairs",
    "text",
    "text_tokens",
    "max_length",
    "suite",
    "suite_limit",
    "answers",
    "answer_tokens",
)


def merged(old: dict[str, Any], new: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return what is published with methods made anew, and with what made these.

    Raises:
        ValueError: the two were not scored on the same.
    """

    def asked(comparison: dict[str, Any], name: str) -> Any:
        value = comparison["config"].get(name)
        return [value] if name == "suite" and isinstance(value, str) else value or None

    apart = [name for name in _SCORED_ON if asked(old, name) != asked(new, name)]
    if apart or old["pair_prompts"] != new["pair_prompts"]:
        raise ValueError(f"not scored on the same: {', '.join(apart) or 'pairs'}")
    methods = old["methods"] | {name: new["methods"][name] for name in names}
    return old | {"methods": methods, "cells": [*old.get("cells", ()), *new["cells"]]}


def main() -> None:
    """Read `comparison.json` of a directory and write what is published of it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path, help="`output` of the comparison")
    parser.add_argument("output", type=Path)
    parser.add_argument(
        "--methods", nargs="+", metavar="NAME", help="put these alone into the published file"
    )
    args = parser.parse_args()
    if not (data := os.environ.get("QADAPTER_DATA", "").rstrip("/")):
        parser.error("set QADAPTER_DATA, as for the comparison")
    found = json.loads((args.directory / "comparison.json").read_text(encoding="utf-8"))
    told = published(found, data)
    if args.methods:
        told = merged(json.loads(args.output.read_text(encoding="utf-8")), told, args.methods)
    # A vote a line would be long.
    write_text(args.output, json.dumps(told, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
