"""A comparison's figures as they are committed: without answers, paths as the command had them.

    python benchmarks/publish_comparison.py runs/compare/mine benchmarks/results/compare_mine.json
    python benchmarks/publish_comparison.py runs/compare/again … --methods replay

The second puts methods that were made anew into what is published, where the others stay, and so do
a method's runs of other seeds, if the new ones have its setting. Answers that methods gave to real
prompts are not ours to publish, and where the data lie is another place on every machine.
"""

from __future__ import annotations

import argparse
import json
import os
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


_FREE = ("methods", "headline", "reference", "retrain", "vary", "seeds", "settings", "output")
"""Fields of a comparison that may differ where methods are put beside others."""


def merged(old: dict[str, Any], new: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Return what is published with methods made anew, and with what made these.

    Raises:
        ValueError: a method is not there, a cell failed, or the two differ in data or sizes.
    """
    if missing := [name for name in names if name not in new["methods"]]:
        raise ValueError(f"{missing[0]} is not in the comparison")
    if new["failures"]:
        raise ValueError(f"{new['failures'][0]['cell']} failed")

    def told(comparison: dict[str, Any], field: str) -> Any:
        value = comparison["config"][field]
        if field == "suite":  # once it could be one, or none
            return [value] if isinstance(value, str) else value or []
        return value

    both = sorted({*old["config"]} & {*new["config"]} - {*_FREE})
    apart = [field for field in both if told(old, field) != told(new, field)]
    apart += ["pair_prompts"] if old["pair_prompts"] != new["pair_prompts"] else []
    apart += ["the windows of the text"] if _far(_of_base(old), _of_base(new)) else []
    if apart:
        raise ValueError(f"the two differ in {', '.join(apart)}")
    made = {"methods": names, "seeds": new["config"]["seeds"]}
    put = {name: _joined(old["methods"].get(name), new["methods"][name]) for name in names}
    # Of those whose runs are all replaced nothing is left to tell.
    left = {run["seed"] for fields in put.values() for run in fields["runs"]} - {*made["seeds"]}
    cells = [
        cell
        for cell in old.get("cells", ())
        if not {*cell.get("methods", [""])} <= {*names} or left & {*cell.get("seeds", left)}
    ]
    return old | {
        "methods": old["methods"] | put,
        "cells": [*cells, *({**cell, **made} for cell in new["cells"])],
    }


def _of_base(comparison: dict[str, Any]) -> float | None:
    """Return the base's perplexity on the text, by which others' windows are told; None if none."""
    runs = (run for fields in comparison["methods"].values() for run in fields["runs"])
    return next((p["base_perplexity"] for run in runs for p in run.get("points", ())), None)


def _far(old: float | None, new: float | None) -> bool:
    """Return whether two figures differ by more than two machines do."""
    return old is not None and new is not None and abs(old - new) > 1e-3 * old


def _joined(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """Return a method made anew, with the runs of its setting that there were of other seeds."""

    def of(method: dict[str, Any]) -> dict[int, dict[str, Any]]:
        return {run["seed"]: run for run in method["runs"]}

    first = new["runs"][0]["params"]
    kept = {k: v for k, v in of(old or {"runs": []}).items() if v["params"] == first}
    runs = kept | of(new)
    if {*kept} - {*of(new)}:  # the margin of the others' mean is another now
        for run in runs.values():
            run.pop("at_reference", None)
    return new | {"runs": [runs[seed] for seed in sorted(runs)]}


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
        try:
            told = merged(json.loads(args.output.read_text(encoding="utf-8")), told, args.methods)
        except ValueError as error:
            parser.error(str(error))
    # A vote a line would be long.
    write_text(args.output, json.dumps(told, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
