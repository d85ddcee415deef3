"""The audit of a preference file: `qadapter check`."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from qadapter.data.pairs import BadRow, Pair, Text, audit_rows, read_pairs
from qadapter.data.tokens import Sources, drop_reason, whole_ids
from qadapter.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prompt_key(pair: Pair) -> str:
    """Return a text that two pairs share exactly when their prompts are equal."""
    return text_key(pair.prompt)


def prompt_digest(pair: Pair) -> int:
    """Return 64 bits of a hash of `prompt_key`: of 10⁶ prompts two share one once in 4·10⁷ runs."""
    return _digest(prompt_key(pair))


def _digest(*texts: str) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for text in texts:
        # Its length keeps the texts apart.
        raw = text.encode()
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return int.from_bytes(digest.digest(), "little", signed=True)


def text_key(text: Text) -> str:
    """Return a text that two texts or conversations share exactly when they are equal."""
    return json.dumps(text, sort_keys=True, ensure_ascii=False)


@dataclass
class Audit:
    """What `qadapter check` tells of a file."""

    rows: int = 0
    bad_rows: int = 0
    bad: list[BadRow] = field(default_factory=list)
    """The first ten of them."""
    turns: Counter[int] = field(default_factory=Counter)
    """Messages in the prompt; 0 is plain text."""
    unit: str = "words"
    lengths: dict[str, Counter[int]] = field(default_factory=dict)
    """How many prompts, chosen and rejected have each length."""
    length_bias: float = 0.5
    """Share of pairs in which the longer response is chosen; equal lengths count half."""
    equal_lengths: int = 0
    duplicates: int = 0
    contradictions: int = 0
    """Pairs that another pair states the other way round."""
    empty_responses: int = 0
    shared_with_eval: int | None = None
    """Pairs whose prompt is in the eval file too."""
    dropped: dict[str, Sources] = field(default_factory=dict)


_SHOWN = 10
"""Bad rows that are kept and shown."""


def _words(text: Text) -> str:
    return text if isinstance(text, str) else " ".join(m["content"] or "" for m in text)


def audit(
    path: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    end_ids: frozenset[int] = frozenset(),
    max_length: int = 1024,
    eval_path: str | None = None,
) -> Audit:
    """Return what is in a preference file and what training would make of it.

    Lengths are in tokens with a tokenizer, else in words.

    Raises:
        DataError: the file itself cannot be read, or as `tokenize_pair`.
        ModelError: as `tokenize_pair`.
    """
    found = Audit(unit="words" if tokenizer is None else "tokens")
    found.lengths = {name: Counter() for name in ("prompt", "chosen", "rejected")}
    held_out = np.sort(_digests(eval_path)) if eval_path else None
    seen, shared, longer = _Seen(), 0, 0.0
    for row in audit_rows(path):
        found.rows += 1
        if isinstance(row, BadRow):
            found.bad_rows += 1
            found.bad += [row] if found.bad_rows <= _SHOWN else []
            continue
        prompt, chosen, rejected = prompt_key(row), text_key(row.chosen), text_key(row.rejected)
        seen.add(_digest(prompt, chosen, rejected), _digest(prompt, rejected, chosen))
        if held_out is not None:
            place = int(np.searchsorted(held_out, own := _digest(prompt)))
            shared += place < len(held_out) and int(held_out[place]) == own
        found.turns[0 if isinstance(row.prompt, str) else len(row.prompt)] += 1
        found.empty_responses += sum(not _words(r).strip() for r in (row.chosen, row.rejected))
        sizes = [len(_words(t).split()) for t in (row.prompt, row.chosen, row.rejected)]
        if tokenizer is not None:
            # Whole lengths for the percentiles, then what the limit would do.
            ids = whole_ids(row, tokenizer, end_ids)
            sizes = [len(part) for part in ids]
            if reason := drop_reason(ids, max_length=max_length, truncate=False):
                found.dropped.setdefault(reason, Sources()).append(row.source)
        for name, size in zip(found.lengths, sizes, strict=True):
            found.lengths[name][size] += 1
        found.equal_lengths += sizes[1] == sizes[2]
        longer += (sizes[1] > sizes[2]) + 0.5 * (sizes[1] == sizes[2])
    found.duplicates, found.contradictions = seen.repeated()
    found.shared_with_eval = None if held_out is None else shared
    good = found.rows - found.bad_rows
    found.length_bias = longer / good if good else 0.5
    return found


def _digests(path: str) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.frombuffer(array("q", map(prompt_digest, read_pairs(path))), np.int64)


class _Seen:
    """Digests of pairs, in a temporary file that SQLite keeps and removes: memory stays flat."""

    def __init__(self) -> None:
        self._rows = sqlite3.connect("", isolation_level=None)
        self._run("CREATE TABLE seen (pair INTEGER, turned INTEGER)")
        self._run("BEGIN")

    def _run(self, command: str, values: tuple[int, ...] = ()) -> sqlite3.Cursor:
        try:
            return self._rows.execute(command, values)
        except sqlite3.OperationalError as error:
            raise UserError(
                f"the temporary file of the pairs' digests cannot be written ({error}); free some "
                "space, or name another place by SQLITE_TMPDIR."
            ) from error

    def add(self, pair: int, turned: int) -> None:
        """Add a pair, and the same with chosen and rejected exchanged."""
        self._run("INSERT INTO seen VALUES (?, ?)", (pair, turned))

    def repeated(self) -> tuple[int, int]:
        """Return how many pairs an earlier one equals, and how many one states the other way."""
        self._run("CREATE INDEX by_pair ON seen (pair)")
        (again,) = self._run("SELECT COUNT(*) - COUNT(DISTINCT pair) FROM seen").fetchone()
        (against,) = self._run(
            "SELECT COUNT(*) FROM seen AS one WHERE EXISTS (SELECT 1 FROM seen AS earlier "
            "WHERE earlier.pair = one.turned AND earlier.rowid < one.rowid)"
        ).fetchone()
        self._rows.close()
        return again, against


def _percentiles(counts: Mapping[int, int]) -> list[int]:
    if not counts:
        return []
    values = np.array(sorted(counts))
    ends = np.cumsum([counts[int(v)] for v in values])

    def at(share: float) -> int:
        # Between the two values that it falls between, as quantiles' "inclusive" has it.
        low = int(share * (ends[-1] - 1))
        a, b = values[np.searchsorted(ends, [low, min(low + 1, ends[-1] - 1)], side="right")]
        return round(float(a + (b - a) * (share * (ends[-1] - 1) - low)))

    return [at(share) for share in (0.05, 0.25, 0.5, 0.75, 0.95, 1.0)]


def format_audit(found: Audit) -> str:
    """Return the audit as aligned text."""
    lines = [f"{'rows':24}{found.rows}", f"{'bad rows':24}{found.bad_rows}"]
    lines += [f"  {bad.source}: {bad.problem}" for bad in found.bad]
    if found.bad_rows > _SHOWN:
        lines.append(f"  … and {found.bad_rows - _SHOWN} more")
    turns = ", ".join(f"{n}: {c}" for n, c in sorted(found.turns.items()))
    lines.append(f"{'messages in prompt':24}{turns or 'none'}")
    lines.append(f"{'length in ' + found.unit:24}" + "".join(
        f"{p:>8}" for p in ("5%", "25%", "50%", "75%", "95%", "max")))  # fmt: skip
    for name, values in found.lengths.items():
        lines.append(f"  {name:22}" + "".join(f"{v:>8}" for v in _percentiles(values)))
    lines += [
        f"{'longer one is chosen':24}{found.length_bias:.1%} ({found.equal_lengths} equal)",
        f"{'duplicates':24}{found.duplicates}",
        f"{'contradictions':24}{found.contradictions}",
        f"{'empty responses':24}{found.empty_responses}",
    ]
    if found.shared_with_eval is not None:
        lines.append(f"{'prompts shared with eval':24}{found.shared_with_eval}")
    for reason, sources in found.dropped.items():
        lines.append(f"{'dropped, ' + reason:24} {len(sources)} (the first is {sources[0]})")
    return "\n".join(lines)
