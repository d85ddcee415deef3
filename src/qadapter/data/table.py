"""Tokenised pairs in an Arrow file that is mapped into memory: a million take no more than a few.

It lies in a directory of its own under `<cache>/pairs/`, named by all that it depends on, and goes
with the run. One that a killed or stopped run left is what the resumed run begins with; after a
week the next run of any kind removes it. The ranks of a machine share their first one's.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
import weakref
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast, overload

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from qadapter.data.audit import prompt_digest
from qadapter.data.pairs import Pair
from qadapter.data.tokens import Sources, TokenizedPair, kept_pairs
from qadapter.errors import UserError
from qadapter.files import cache_dir, sha256, write_text
from qadapter.ranks import local_number

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_FORMAT = 1
_ROWS, _SEAL = "pairs.arrow", "pairs.json"
_NAMELESS = "nameless."
_WEEK = 7 * 24 * 3600


class _Seal(NamedTuple):
    """What is known of rows that are whole."""

    digest: str
    """As `pairs_digest` gives it."""
    dropped: dict[str, Sources]


class TokenTable(Sequence[TokenizedPair]):
    """Pairs in tokens, read from their file when they are asked for.

    Args:
        rows: the fields of `TokenizedPair` as columns, with `tokens` and `prompt`.
        digest: as `pairs_digest` gives it.
        place: where their file is, removed with the table, or when that is closed.
    """

    def __init__(self, rows: Dataset, digest: str, place: _Place | None = None) -> None:
        self._rows = rows
        self.digest = digest
        self._place = place
        self._end = None if place is None else weakref.finalize(self, place.remove)

    def keep(self) -> None:
        """Leave the file for the run that goes on from here."""
        if self._place is not None and self._end is not None and self._end.detach():
            self._place.leave()

    def close(self) -> None:
        """Remove the file, unless it was kept; what is asked for after this may be gone."""
        if self._end is not None:
            self._end()

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
        return TokenTable, (self._rows, self.digest)

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


def _fold(digest: Any, pair: TokenizedPair) -> None:
    parts = (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
    digest.update(array("q", [*map(len, parts), pair.chosen_terminal, pair.rejected_terminal]))
    for part in parts:
        digest.update(array("q", part))


def pairs_digest(pairs: Iterable[TokenizedPair]) -> str:
    """Return what tells pairs in tokens from others, or from the same in another order."""
    if isinstance(pairs, TokenTable):
        return pairs.digest
    digest = hashlib.sha256()
    for pair in pairs:
        _fold(digest, pair)
    return digest.hexdigest()


def token_table(
    pairs: Iterable[Pair],
    tokenizer: PreTrainedTokenizerBase,
    *,
    end_ids: frozenset[int],
    max_length: int,
    truncate: bool = False,
    identity: Sequence[object] | None = None,
) -> tuple[TokenTable, dict[str, Sources]]:
    """Return what `tokenize_pairs` returns, in a file instead of in memory.

    Args:
        identity: what else the tokens depend on: data and tokenizer. Where a run that is no more
            left the same ones, they are taken and `pairs` is not read. None: they never are.

    Raises:
        DataError: as `read_pairs`, or nothing is left.
        ModelError: as `tokenize_pair`.
        UserError: the file cannot be written.
    """
    from datasets import Dataset

    limits: dict[str, Any] = {"end_ids": end_ids, "max_length": max_length, "truncate": truncate}
    name = None
    if identity is not None:
        told = [_FORMAT, *identity, sorted(end_ids), max_length, truncate]
        name = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]
    root = cache_dir() / "pairs"
    try:
        place, seal = _Place.taken(root, name)
        try:
            if seal is None:
                seal = _write(place.directory, pairs, tokenizer, limits)
            rows = Dataset.from_file(str(place.directory / _ROWS))
            table = TokenTable(rows, seal.digest, place)
        except BaseException:
            place.remove()
            raise
    except OSError as error:
        raise UserError(
            f"{root}: cannot be written ({error.strerror or error}), and pairs are kept there "
            "while they are trained on; make room, or set QADAPTER_CACHE to another disk."
        ) from error
    return table, seal.dropped


def file_identity(path: str) -> list[object] | None:
    """Return what tells a file from an earlier one of its name; None for what is no file."""
    place = Path(path)
    if not place.is_file():
        return None
    found = place.stat()
    return [str(place.resolve()), found.st_size, found.st_mtime_ns]


def _write(
    directory: Path,
    pairs: Iterable[Pair],
    tokenizer: PreTrainedTokenizerBase,
    limits: dict[str, Any],
) -> _Seal:
    """Write the rows, and then beside them what says that they are whole."""
    from datasets import Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    ids, text, flag = List(Value("int32")), Value("string"), Value("bool")
    plain = [field.name for field in fields(TokenizedPair)]
    columns = {"prompt_ids": ids, "chosen_ids": ids, "rejected_ids": ids}
    columns |= {"chosen_terminal": flag, "rejected_terminal": flag, "source": text}
    columns |= {"tokens": Value("int64"), "prompt": Value("int64")}
    dropped: dict[str, Sources] = {}
    digest = hashlib.sha256()
    rows = directory / _ROWS
    (directory / _SEAL).unlink(missing_ok=True)
    with ArrowWriter(path=str(rows), features=Features(columns)) as writer:
        for pair, tokens in kept_pairs(pairs, tokenizer, dropped, **limits):
            more = {"tokens": tokens.tokens, "prompt": prompt_digest(pair)}
            writer.write({n: getattr(tokens, n) for n in plain} | more)
            _fold(digest, tokens)
        writer.finalize()
    told = [digest.hexdigest(), {why: of.told() for why, of in dropped.items()}]
    write_text(directory / _SEAL, json.dumps([_checksum(rows, told), told]))
    return _Seal(digest.hexdigest(), dropped)


def _checksum(rows: Path, told: object) -> str:
    return hashlib.sha256((sha256(rows) + json.dumps(told)).encode()).hexdigest()


def _kept(directory: Path) -> _Seal | None:
    """Return what is known of the rows that are here, or None where none are whole."""
    try:
        checksum, told = json.loads((directory / _SEAL).read_text(encoding="utf-8"))
        if checksum != _checksum(directory / _ROWS, told):
            return None
        digest, dropped = told
        return _Seal(digest, {why: Sources.of(places) for why, places in dropped.items()})
    except (OSError, ValueError, TypeError):
        return None


class _Place:
    """A directory under `<cache>/pairs/` that this process holds, or that its first rank does."""

    def __init__(self, directory: Path, lock: FileLock | None) -> None:
        self.directory = directory
        self._lock = lock
        self._owner = os.getpid()

    @classmethod
    def taken(cls, root: Path, name: str | None) -> tuple[_Place, _Seal | None]:
        """Return the directory of that name, or one of no name while another run has that.

        With it comes what `_kept` says of the rows that are in it.
        """
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".lock"):
            _clean(root)
            if name is not None:
                directory = root / name
                directory.mkdir(exist_ok=True)
                lock = _locked(directory)
                # A machine's later ranks read what its first one holds.
                seal = _kept(directory) if lock or local_number() > 0 else None
                if lock or seal is not None:
                    return cls(directory, lock), seal
            directory = Path(tempfile.mkdtemp(dir=root, prefix=_NAMELESS))
            return cls(directory, _locked(directory)), None

    def leave(self) -> None:
        """Let others have it, as it is."""
        if self._lock is not None:
            self._lock.release()

    def remove(self) -> None:
        """Remove the directory, if it is this process's own: not a rank's or a fork's."""
        if self._lock is not None and os.getpid() == self._owner:
            shutil.rmtree(self.directory, ignore_errors=True)
            self._lock.release()


def _locked(directory: Path) -> FileLock | None:
    """Return the lock of a directory, held, or None while another process holds it."""
    lock = FileLock(directory / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        return None
    return lock


def _clean(root: Path) -> None:
    """Remove what nobody holds and nobody will come back for."""
    for old in (p for p in root.iterdir() if p.is_dir()):
        recent = time.time() - old.stat().st_mtime < _WEEK
        if not (recent and not old.name.startswith(_NAMELESS)) and (lock := _locked(old)):
            shutil.rmtree(old, ignore_errors=True)
            lock.release()
