"""A comparison's figures as they are committed: without answers, paths as the command had them.

    python benchmarks/publish_comparison.py runs/compare/mine benchmarks/results/compare_mine.json

Answers that methods gave to real prompts are not ours to publish, and where the data lie is
another place on every machine.
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


def main() -> None:
    """Read `comparison.json` of a directory and write what is published of it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path, help="`output` of the comparison")
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    if not (data := os.environ.get("QADAPTER_DATA", "").rstrip("/")):
        parser.error("set QADAPTER_DATA, as for the comparison")
    found = json.loads((args.directory / "comparison.json").read_text(encoding="utf-8"))
    text = json.dumps(published(found, data), allow_nan=False) + "\n"  # a vote a line would be long
    write_text(args.output, text)


if __name__ == "__main__":
    main()
