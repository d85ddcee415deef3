"""The audit of a preference file: `qadapter check`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import quantiles
from typing import TYPE_CHECKING, cast

from qadapter.data.pairs import BadRow, Pair, Text, audit_rows, read_pairs
from qadapter.data.tokens import drop_reason, whole_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prompt_key(pair: Pair) -> str:
    """Return a text that two pairs share exactly when their prompts are equal."""
    return _key(pair.prompt)


def _key(text: Text) -> str:
    return json.dumps(text, sort_keys=True, ensure_ascii=False)


@dataclass
class Audit:
    """What `qadapter check` tells of a file."""

    rows: int = 0
    bad: list[BadRow] = field(default_factory=list)
    turns: Counter[int] = field(default_factory=Counter)
    """Messages in the prompt; 0 is plain text."""
    unit: str = "words"
    lengths: dict[str, list[int]] = field(default_factory=dict)
    """Length of every prompt, chosen and rejected."""
    length_bias: float = 0.5
    """Share of pairs in which the longer response is chosen; equal lengths count half."""
    equal_lengths: int = 0
    duplicates: int = 0
    contradictions: int = 0
    """Pairs that another pair states the other way round."""
    empty_responses: int = 0
    shared_with_eval: int | None = None
    """Pairs whose prompt is in the eval file too."""
    dropped: dict[str, list[str]] = field(default_factory=dict)


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
        DataError: the file itself cannot be read.
        ModelError: as `tokenize_pair`.
    """
    found = Audit(unit="words" if tokenizer is None else "tokens")
    found.lengths = {"prompt": [], "chosen": [], "rejected": []}
    held_out = {prompt_key(p) for p in read_pairs(eval_path)} if eval_path else None
    found.shared_with_eval = None if held_out is None else 0
    seen: set[tuple[str, str, str]] = set()
    longer = 0.0
    for row in audit_rows(path):
        found.rows += 1
        if isinstance(row, BadRow):
            found.bad.append(row)
            continue
        key = prompt_key(row), _key(row.chosen), _key(row.rejected)
        found.duplicates += key in seen
        found.contradictions += (key[0], key[2], key[1]) in seen
        seen.add(key)
        if held_out is not None:
            found.shared_with_eval = cast(int, found.shared_with_eval) + (key[0] in held_out)
        found.turns[0 if isinstance(row.prompt, str) else len(row.prompt)] += 1
        found.empty_responses += sum(not _words(r).strip() for r in (row.chosen, row.rejected))
        sizes = [len(_words(t).split()) for t in (row.prompt, row.chosen, row.rejected)]
        if tokenizer is not None:
            # Whole lengths for the percentiles, then what the limit would do.
            ids = whole_ids(row, tokenizer, end_ids)
            sizes = [len(part) for part in ids]
            if reason := drop_reason(ids, max_length=max_length, truncate=False):
                found.dropped.setdefault(reason, []).append(row.source)
        for name, size in zip(found.lengths, sizes, strict=True):
            found.lengths[name].append(size)
        found.equal_lengths += sizes[1] == sizes[2]
        longer += (sizes[1] > sizes[2]) + 0.5 * (sizes[1] == sizes[2])
    good = found.rows - len(found.bad)
    found.length_bias = longer / good if good else 0.5
    return found


def _percentiles(values: Sequence[int]) -> list[int]:
    if len(values) < 2:
        return list(values) * 6
    cuts = quantiles(values, n=20, method="inclusive")
    return [round(cuts[i]) for i in (0, 4, 9, 14, 18)] + [max(values)]


def format_audit(found: Audit) -> str:
    """Return the audit as aligned text."""
    lines = [f"{'rows':24}{found.rows}", f"{'bad rows':24}{len(found.bad)}"]
    lines += [f"  {bad.source}: {bad.problem}" for bad in found.bad[:10]]
    if len(found.bad) > 10:
        lines.append(f"  … and {len(found.bad) - 10} more")
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
