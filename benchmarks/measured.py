"""Rows measured before: taken up again only where code, processor and libraries are the same."""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qadapter import hub
from qadapter.files import code_digest


def versions() -> dict[str, str]:
    """Return the versions of the libraries that are measured."""
    return {name: version(name) for name in ("torch", "transformers", "trl", "peft", "qadapter")}


def origin(scripts: Path) -> dict[str, Any]:
    """Return what a row depends on besides its settings.

    Args:
        scripts: the benchmark's file, or its directory.
    """
    package = importlib.util.find_spec("qadapter")
    assert package is not None
    assert package.origin is not None
    code = code_digest(Path(package.origin).parent, scripts)
    return {"code": code, "cpu": hub.processor(), "versions": versions()}


def read_rows(path: Path, key: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a JSONL file that have this key; tell how many others there are."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    same = [row for row in rows if row.get("key") == key]
    if left := len(rows) - len(same):
        print(
            f"{path}: {left} of {len(rows)} rows are left out: other code, settings, libraries or "
            "another processor made them",
            file=sys.stderr,
            flush=True,
        )
    return same
