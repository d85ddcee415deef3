"""Files of rows: JSON Lines, JSON, CSV, Parquet, a saved directory, the Hub."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

from qadapter.errors import DataError
from qadapter.files import read_jsonl, read_lines


def read_rows(path: str) -> Iterator[tuple[str, object]]:
    """Yield `(source, row)` of any supported file, directory or Hub name."""
    place = Path(path)
    suffix = place.suffix.lower()
    if place.is_dir():
        yield from _saved_rows(path)
    elif suffix == ".jsonl":
        yield from ((f"{path}:{n}", row) for n, row in read_jsonl(path))
    elif suffix == ".json":
        yield from _json_rows(path)
    elif suffix == ".csv":
        yield from _csv_rows(path)
    elif suffix == ".parquet":
        yield from _parquet_rows(path)
    elif place.exists() or suffix in (".txt", ".tsv"):
        raise DataError(f"{path}: unknown format; give .jsonl, .json, .csv or .parquet.")
    elif path.count("/") == 1 and not path.startswith((".", "/")):
        yield from _hub_rows(path)
    else:
        raise DataError(f"{path}: no such file or directory; check the path.")


def _json_rows(path: str) -> Iterator[tuple[str, object]]:
    lines = dict(read_lines(path))  # blank lines are left out
    if not next(iter(lines.values()), "").lstrip().startswith("["):
        yield from ((f"{path}:{n}", row) for n, row in read_jsonl(path))
        return
    try:
        rows = json.loads("".join(lines.values()))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{list(lines)[error.lineno - 1]}: not valid JSON "
            f"({error.msg} at column {error.colno}); fix it."
        ) from error
    except (ValueError, RecursionError) as error:  # a number or a nesting past Python's limits
        raise DataError(f"{path}: not readable JSON ({error}); fix it.") from error
    yield from ((f"{path}:row {i}", row) for i, row in enumerate(rows, start=1))


def _csv_rows(path: str) -> Iterator[tuple[str, object]]:
    for _ in read_lines(path):  # tells what is wrong with the file's encoding, and where
        pass
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        header: list[str] = []
        line = 0
        try:
            for cells in reader:
                # A quoted field may span lines, so name the row's first.
                first, line = line + 1, reader.line_num
                if not cells:
                    continue
                if not header:
                    header = cells
                    continue
                row: dict[str | None, object] = dict(zip(header, cells, strict=False))
                if len(cells) > len(header):
                    row[None] = cells[len(header) :]
                yield f"{path}:{first}", row
        except csv.Error as error:
            raise DataError(
                f"{path}:{line + 1}: not readable CSV ({error}); fix it or use JSON Lines."
            ) from error


def _parquet_rows(path: str) -> Iterator[tuple[str, object]]:
    import pyarrow
    import pyarrow.parquet

    if not Path(path).exists():
        raise DataError(f"{path}: no such file; check the path.")
    try:
        table = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in table.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:row {number}", row
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(
            f"{path}: not a readable Parquet file ({error}); write it again."
        ) from error


def _saved_rows(path: str) -> Iterator[tuple[str, object]]:
    import datasets

    try:
        saved = datasets.load_from_disk(path)
    except Exception as error:  # datasets raises many kinds for a folder that is not its own
        raise DataError(
            f"{path}: not a directory saved by datasets ({error}); give a file or save it again."
        ) from error
    if isinstance(saved, datasets.DatasetDict):
        if "train" not in saved and len(saved) != 1:
            raise DataError(
                f"{path}: holds splits {', '.join(saved)}; name one, as {path}/{next(iter(saved))}."
            )
        saved = saved["train"] if "train" in saved else next(iter(saved.values()))
    yield from ((f"{path}:row {i}", row) for i, row in enumerate(saved, start=1))


def _hub_rows(path: str) -> Iterator[tuple[str, object]]:
    import datasets

    name, _, split = path.partition(":")
    try:
        loaded = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # hub, network and parsing errors of many kinds
        reason = " ".join(str(error).split())[:160]
        raise DataError(
            f"{path}: neither a file nor a data set that can be loaded ({reason}); check the name."
        ) from error
    yield from ((f"{path}:row {i}", row) for i, row in enumerate(loaded, start=1))
