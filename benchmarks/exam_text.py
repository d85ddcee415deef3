"""Text of people, of many kinds, to anchor on: the longer of MMLU's questions, in turn by subject.

    QADAPTER_DATA=../shared/data python benchmarks/exam_text.py --output runs/exam_text.jsonl

As many as the base writes by itself where no text is given; without choices and answers. MMLU is
no part of the local suite, but ARC-easy's questions are of its kind. With `--begin "<|im_start|>"`
each begins as lm-eval begins a text, by the tokenizer's token of beginning, which this base's
tokenizer does not add by itself.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import random
from collections import defaultdict
from itertools import chain, islice, zip_longest
from pathlib import Path
from zipfile import ZipFile

from qadapter.anchors import COUNT
from qadapter.files import write_jsonl

DATA = Path(os.environ.get("QADAPTER_DATA", "../shared/data"))
LEAST = 200
"""Characters of a question that is taken."""


def questions(path: Path) -> list[str]:
    """Return the long questions of MMLU's validation and test files: one a subject, then again."""
    found: defaultdict[str, dict[str, None]] = defaultdict(dict)
    with ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            subject, _, part = Path(name).stem.rpartition("_")
            if part in ("val", "test") and name.endswith(".csv"):
                rows = csv.reader(io.StringIO(archive.read(name).decode("utf-8")))
                texts = (row[0].strip() for row in rows)
                found[subject] |= dict.fromkeys(text for text in texts if len(text) >= LEAST)
    rng = random.Random(0)
    shuffled = [rng.sample([*texts], len(texts)) for _, texts in sorted(found.items())]
    return [text for text in chain.from_iterable(zip_longest(*shuffled)) if text]


def main() -> None:
    """Write the texts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", required=True, metavar="JSONL")
    parser.add_argument("--begin", default="", metavar="TOKEN", help="that begins each text")
    args = parser.parse_args()
    path = DATA / "capability" / "mmlu.zip"
    if not path.is_file():
        parser.exit(message=f"skipped: no {path}; set QADAPTER_DATA\n")
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    taken = islice(questions(path), COUNT)
    write_jsonl(Path(args.output), ({"text": args.begin + text} for text in taken))


if __name__ == "__main__":
    main()
