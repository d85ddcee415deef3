"""Tokenised pairs in an Arrow file that is mapped into memory: a million take no more than a few.

Each process writes its own file under `<cache>/pairs/`, removes it when it ends, and removes first
what processes left there that were killed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, overload

import numpy as np
from numpy.typing import NDArray

from qadapter.data.audit import prompt_digest
from qadapter.data.pairs import Pair
from qadapter.data.tokens import Sources, TokenizedPair, kept_pairs
from qadapter.errors import UserError
from qadapter.files import cache_dir

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


class TokenTable(Sequence[TokenizedPair]):
    """Pairs in tokens, read from their file when they are asked for.

    Args:
        rows: the fields of `TokenizedPair` as columns, with `tokens` and `prompt`.
    """

    def __init__(self, rows: Dataset) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> TokenizedPair: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenizedPair]: ...
    def __getitem__(self, index: int | slice) -> TokenizedPair | list[TokenizedPair]:
        """Return one pair, or a list of them."""
        if isinstance(index, slice):
            return self.__getitems__(range(*index.indices(len(self))))
        return _pair(self._rows[index])

    def __getitems__(self, index: Iterable[int]) -> list[TokenizedPair]:
        """Return the pairs of a batch, as torch's DataLoader asks for them."""
        return [self[i] for i in index]

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what a worker process opens the same file by; it is not the worker's to remove."""
        return TokenTable, (self._rows,)

    def source(self, index: int) -> str:
        """Return where a pair was read."""
        return str(self._rows[index]["source"])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of prompt and both responses of each pair, without reading them."""
        return cast("NDArray[np.int64]", self._rows.data.column("tokens").to_numpy())

    @property
    def prompts(self) -> NDArray[np.int64]:
        """Digest of each pair's prompt."""
        return cast("NDArray[np.int64]", self._rows.data.column("prompt").to_numpy())


def _pair(row: dict[str, Any]) -> TokenizedPair:
    return TokenizedPair(**{n: v for n, v in row.items() if n not in ("tokens", "prompt")})


def pair_lengths(pairs: Sequence[TokenizedPair]) -> NDArray[np.int64]:
    """Return the tokens of prompt and both responses of each pair."""
    if isinstance(pairs, TokenTable):
        return pairs.lengths
    return np.fromiter((p.tokens for p in pairs), np.int64, len(pairs))


def token_table(
    pairs: Iterable[Pair],
    tokenizer: PreTrainedTokenizerBase,
    *,
    end_ids: frozenset[int],
    max_length: int,
    truncate: bool = False,
) -> tuple[TokenTable, dict[str, Sources]]:
    """Return what `tokenize_pairs` returns, in a file instead of in memory.

    Raises:
        DataError: as `read_pairs`, or nothing is left.
        ModelError: as `tokenize_pair`.
        UserError: the file cannot be written.
    """
    from datasets import Dataset, Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    ids, text, flag = List(Value("int32")), Value("string"), Value("bool")
    plain = [field.name for field in fields(TokenizedPair)]
    columns = {"prompt_ids": ids, "chosen_ids": ids, "rejected_ids": ids}
    columns |= {"chosen_terminal": flag, "rejected_terminal": flag, "source": text}
    columns |= {"tokens": Value("int64"), "prompt": Value("int64")}
    dropped: dict[str, Sources] = {}
    kept = kept_pairs(
        pairs, tokenizer, dropped, end_ids=end_ids, max_length=max_length, truncate=truncate
    )
    root = cache_dir() / "pairs"
    try:
        directory, remove = _own_directory(root)
        try:
            file = str(directory / "pairs.arrow")
            with ArrowWriter(path=file, features=Features(columns)) as writer:
                for pair, tokens in kept:
                    more = {"tokens": tokens.tokens, "prompt": prompt_digest(pair)}
                    writer.write({n: getattr(tokens, n) for n in plain} | more)
                writer.finalize()
            table = TokenTable(Dataset.from_file(file))
        except BaseException:
            remove()
            raise
    except OSError as error:
        raise UserError(
            f"{root}: cannot be written ({error.strerror or error}), and pairs are kept there "
            "while they are trained on; make room, or set QADAPTER_CACHE to another disk."
        ) from error
    weakref.finalize(table, remove)
    return table, dropped


def _own_directory(root: Path) -> tuple[Path, Any]:
    """Return a new directory and what removes it; those of processes that are gone are removed."""
    from filelock import FileLock, Timeout

    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / ".lock"):
        for old in (p for p in root.iterdir() if p.is_dir()):
            try:
                with FileLock(old / ".lock", timeout=0):
                    shutil.rmtree(old, ignore_errors=True)
            except Timeout:  # its process lives
                continue
        directory = Path(tempfile.mkdtemp(dir=root))
        lock = FileLock(directory / ".lock")
        lock.acquire()
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # and not in a process forked from it
            shutil.rmtree(directory, ignore_errors=True)
            lock.release()

    return directory, remove
