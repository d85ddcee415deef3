"""What the base makes of each pair, kept on disk: trunk activations and the base's own part.

The trunk and the base never change in training, so from the second epoch on (and in the next run on
the same pairs) they are read instead of computed. One directory holds, for all pairs one after
another as prompt, chosen, rejected:

    key.json     what the activations depend on
    trunk.bin    [tokens, D], what enters the first adapted layer
    base.bin     [tokens, 2] float32, the base's scalars, or [tokens, D], its final states
    sums.bin     [pairs] int64, a checksum of each pair's part of the two; 0 where nothing is yet

A part is used only if all of it is there and its checksum fits, so what a crash or a second run
left half-written, a disk has damaged, or somebody has cut off, is computed again. The files are
read, and not mapped into memory: a page of a map that is no longer in its file ends the process.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import weakref
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from qadapter import files
from qadapter.data import TokenizedPair, pair_lengths
from qadapter.errors import ConfigError, UserError

_log = logging.getLogger(__name__)

_FORMAT = 1
"""Raised when the files change their meaning, so that old ones are no longer found."""


class Kept(NamedTuple):
    """One batch's part of the cache, in the order of its packed row."""

    trunk: Tensor
    """`[T, D]`."""
    base: Tensor
    """`[T, 2]` float32 or `[T, D]`."""


class Layout(NamedTuple):
    """Shape of what is kept of a token."""

    width: int
    """D, numbers of a trunk state."""
    dtype: torch.dtype
    """Their dtype."""
    scalars: bool
    """Whether two float32 scalars are kept of the base, or a final state like the trunk's."""

    @property
    def base(self) -> tuple[int, torch.dtype]:
        """Width and dtype of the base's part."""
        return (2, torch.float32) if self.scalars else (self.width, self.dtype)

    def size(self, tokens: int) -> int:
        """Return the bytes that so many tokens take."""
        width, dtype = self.base
        return tokens * (self.width * self.dtype.itemsize + width * dtype.itemsize)


def _name(ids: Sequence[int], lengths: Sequence[int], terminal: Sequence[bool]) -> str:
    """Return a pair's name: its tokens, where its parts end, and whether its responses do."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (ids, lengths, [int(t) for t in terminal]):
        digest.update(torch.tensor(part, dtype=torch.int64).numpy().tobytes())
    return digest.hexdigest()


def _pair_name(pair: TokenizedPair) -> str:
    parts = (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
    ids = [i for part in parts for i in part]
    return _name(ids, [len(p) for p in parts], (pair.chosen_terminal, pair.rejected_terminal))


def _batch_names(batch: Mapping[str, Tensor]) -> list[str]:
    ids = batch["input_ids"][0].tolist()
    terminal = batch["terminal"].reshape(2, -1).T.tolist()
    return [
        _name(ids[start : start + sum(lengths)], lengths, ends)
        for (start, *lengths), ends in zip(batch["spans"].tolist(), terminal, strict=True)
    ]


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(cast(Any, tensor.reshape(-1).view(torch.uint8).numpy()))


def _checksum(part: Kept) -> int:
    """Return a checksum that is never 0."""
    return zlib.crc32(_bytes(part.base), zlib.crc32(_bytes(part.trunk))) | 1 << 32


class _Rows:
    """A file of rows of numbers, one row after another."""

    def __init__(self, path: Path, width: int, dtype: torch.dtype) -> None:
        self._file = open(path, "r+b", buffering=0)  # noqa: SIM115  as long as the cache is open
        weakref.finalize(self, self._file.close)
        self._width, self.dtype = width, dtype

    def empty(self, rows: int) -> Tensor:
        """Return room for so many rows."""
        return torch.empty(rows, self._width, dtype=self.dtype)

    def _seek(self, row: int) -> None:
        self._file.seek(row * self._width * self.dtype.itemsize)

    def read(self, row: int, into: Tensor) -> bool:
        """Read rows from one on; return whether the file holds them all."""
        self._seek(row)
        return self._file.readinto(_bytes(into)) == into.nbytes

    def write(self, row: int, rows: Tensor) -> None:
        """Write rows from one on."""
        self._seek(row)
        self._file.write(_bytes(rows))


class _Plan(NamedTuple):
    """Where the cache of a set of pairs lies, and what is in it."""

    directory: Path
    text: str
    """Of `key.json`."""
    slots: dict[str, int]
    """Place of each pair, by its name."""
    ends: list[int]
    """End of each pair, in tokens."""
    sizes: dict[str, int]
    """Bytes of each file."""

    def sound(self) -> bool:
        """Return whether the directory is there, with this key and files of the right size."""
        where = self.directory
        try:
            same = (where / "key.json").read_text(encoding="utf-8") == self.text
            return same and all((where / n).stat().st_size == s for n, s in self.sizes.items())
        except (OSError, UnicodeDecodeError):
            return False


def _plan(
    root: str | Path,
    key: Mapping[str, Any],
    pairs: Sequence[TokenizedPair],
    layout: Layout,
    limit: int,
) -> _Plan:
    """Return the plan; ConfigError if it is of more bytes than all caches may take together."""
    # First by the lengths alone: what does not fit is not read.
    size = layout.size(int(pair_lengths(pairs).sum()))
    if size > limit:
        raise ConfigError(
            f"cache_trunk: these pairs need {size / 2**30:.1f} GiB on disk and "
            f"cache_trunk_gib allows {limit / 2**30:.1f}; raise it, or set cache_trunk=false."
        )
    lengths = {_pair_name(p): p.tokens for p in pairs}
    ends = torch.tensor(list(lengths.values())).cumsum(0).tolist()
    names = hashlib.sha256("".join(lengths).encode()).hexdigest()
    told = {**key, "format": _FORMAT, "layout": repr(layout), "pairs": names}
    text = json.dumps(told, indent=2, sort_keys=True) + "\n"
    width, dtype = layout.base
    sizes = {
        "trunk.bin": ends[-1] * layout.width * layout.dtype.itemsize,
        "base.bin": ends[-1] * width * dtype.itemsize,
        "sums.bin": len(lengths) * 8,
    }
    directory = Path(root) / hashlib.sha256(text.encode()).hexdigest()[:32]
    return _Plan(directory, text, {name: i for i, name in enumerate(lengths)}, ends, sizes)


def _age_and_size(directory: Path) -> tuple[float, int, Path] | None:
    """Return when a cache was last used, its bytes, and itself; None if another run removed it."""
    try:
        size = sum(file.stat().st_size for file in directory.iterdir())
        return directory.stat().st_mtime, size, directory
    except OSError:
        return None


def _to_go(plan: _Plan, limit: int) -> list[Path]:
    """Return the directories that make room, the oldest first, so that all take `limit` bytes.

    Raises:
        ConfigError: the disk has too little room even then.
        UserError: the directory cannot be written.
    """
    root = plan.directory.parent
    files.check_writable(root)
    there = root.iterdir() if root.exists() else ()
    found = sorted(known for d in there if d.is_dir() and (known := _age_and_size(d)))
    needed = sum(plan.sizes.values())
    # What lies in the cache's own place is of no use.
    going = [known for known in found if known[2] == plan.directory]
    others = [known for known in found if known[2] != plan.directory]
    taken = needed + sum(size for _, size, _ in others)
    while others and taken > limit:
        going.append(others.pop(0))
        taken -= going[-1][1]
    free = shutil.disk_usage(files.nearest(root)).free + sum(size for _, size, _ in going)
    if needed > free:
        raise ConfigError(
            f"cache_trunk: {root} has {free / 2**30:.1f} GiB left and {needed / 2**30:.1f} are "
            "needed; make room, set QADAPTER_CACHE to another disk, or set cache_trunk=false."
        )
    return [directory for _, _, directory in going]


def _make(plan: _Plan, limit: int) -> None:
    """Write an empty cache of full size; it and all others may take `limit` bytes."""
    for directory in _to_go(plan, limit):
        shutil.rmtree(directory, ignore_errors=True)
    plan.directory.parent.mkdir(parents=True, exist_ok=True)
    _log.info("trunk cache: %.2f GiB in %s", sum(plan.sizes.values()) / 2**30, plan.directory)
    with files.whole_directory(plan.directory) as partial:
        for name, size in plan.sizes.items():
            with open(partial / name, "wb") as file:
                file.truncate(size)
                if hasattr(os, "posix_fallocate"):
                    # Reserved now: a full disk is told before the first step and not in an epoch.
                    os.posix_fallocate(file.fileno(), 0, size)
        (partial / "key.json").write_text(plan.text, encoding="utf-8")


def share_kept(
    root: str | Path,
    key: Mapping[str, Any],
    pairs: Sequence[TokenizedPair],
    layout: Layout,
    *,
    limit: int,
) -> float:
    """Return the share of the pairs' tokens that a cache on disk holds; arguments as `TrunkCache`.

    What a disk has damaged counts, for only reading all would tell.

    Raises:
        ConfigError: there is none and `TrunkCache` would not find the room for it.
        UserError: nor could it be written.
    """
    plan = _plan(root, key, pairs, layout, limit)
    if not plan.sound():
        _to_go(plan, limit)
        return 0.0
    try:
        sums = (plan.directory / "sums.bin").read_bytes()
    except OSError:  # another run removes it
        sums = b""
    if len(sums) != plan.sizes["sums.bin"]:
        return 0.0
    there = torch.frombuffer(bytearray(sums), dtype=torch.int64) != 0
    tokens = torch.tensor(plan.ends).diff(prepend=torch.tensor([0]))
    return int(tokens[there].sum()) / plan.ends[-1]


class TrunkCache:
    """Trunk activations and the base's part of a set of pairs, on disk.

    Args:
        root: directory in which each key has its own.
        key: all that the activations depend on besides the pairs' tokens: weights, precision, ….
        pairs: what will be asked for. Their tokens enter the key, and with them the tokenizer.
        limit: bytes that all caches under `root` may take together; the oldest make room.

    Raises:
        ConfigError: the pairs need more than `limit`, or more than the disk has.
        UserError: the directory cannot be read or written, or is removed by another run.
    """

    def __init__(
        self,
        root: str | Path,
        key: Mapping[str, Any],
        pairs: Sequence[TokenizedPair],
        layout: Layout,
        *,
        limit: int,
    ) -> None:
        plan = _plan(root, key, pairs, layout, limit)
        self.directory, self._slots, self._ends = plan.directory, plan.slots, plan.ends
        self.scalars = layout.scalars
        self.size = sum(plan.sizes.values())
        """Bytes on disk."""
        with self._usable():
            if not plan.sound():
                _make(plan, limit)
            os.utime(self.directory)
            self._trunk = _Rows(self.directory / "trunk.bin", layout.width, layout.dtype)
            self._base = _Rows(self.directory / "base.bin", *layout.base)
            self._sums = _Rows(self.directory / "sums.bin", 1, torch.int64)

    @contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cache_trunk: {self.directory} cannot be used ({error.strerror or error}), or "
                "another run took its place; start again, or set cache_trunk=false."
            ) from error

    def _where(self, batch: Mapping[str, Tensor]) -> list[tuple[int, int]]:
        """Return of each pair of a `PackedBatch` its place, and its first token's."""
        slots = [self._slots[name] for name in _batch_names(batch)]
        return [(slot, self._ends[slot - 1] if slot else 0) for slot in slots]

    def _load(self, slot: int, start: int, part: Kept) -> bool:
        """Read one pair's part; return whether it is there and sound."""
        told = self._sums.empty(1)
        files = (self._sums, slot, told), (self._trunk, start, part.trunk)
        whole = all(f.read(row, t) for f, row, t in (*files, (self._base, start, part.base)))
        return whole and int(told) == _checksum(part)

    def forget(self, batch: Mapping[str, Tensor]) -> None:
        """Let the pairs of a `PackedBatch` be missing."""
        for slot, _ in self._where(batch):
            self._sums.write(slot, torch.zeros(1, dtype=torch.int64))

    def read(self, batch: Mapping[str, Tensor]) -> Kept | None:
        """Return what is kept of a `PackedBatch`, on the CPU; None if any pair of it is missing.

        Raises:
            UserError: the files cannot be read.
        """
        lengths = batch["spans"][:, 1:].sum(1).tolist()
        found = Kept(self._trunk.empty(sum(lengths)), self._base.empty(sum(lengths)))
        parts = map(Kept, *(t.split(lengths) for t in found))
        with self._usable():
            whole = all(self._load(*w, p) for w, p in zip(self._where(batch), parts, strict=True))
        return found if whole else None

    def write(self, batch: Mapping[str, Tensor], kept: Kept) -> None:
        """Keep what was computed of a `PackedBatch`.

        Raises:
            UserError: the files cannot be written.
        """
        lengths = batch["spans"][:, 1:].sum(1).tolist()
        pieces = ((kept.trunk, self._trunk), (kept.base, self._base))
        parts = map(Kept, *(t.to("cpu", f.dtype).contiguous().split(lengths) for t, f in pieces))
        with self._usable():
            for (slot, start), part in zip(self._where(batch), parts, strict=True):
                self._sums.write(slot, torch.zeros(1, dtype=torch.int64))
                self._trunk.write(start, part.trunk)
                self._base.write(start, part.base)
                self._sums.write(slot, torch.tensor([_checksum(part)]))
