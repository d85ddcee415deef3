"""Files: written whole or not at all, read line by line, hashed, and where the user cache lives."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from qadapter.errors import ConfigError, DataError, UserError


def cache_dir() -> Path:
    """Return the user's cache directory: `$QADAPTER_CACHE`, else `$XDG_CACHE_HOME/qadapter`."""
    if explicit := os.environ.get("QADAPTER_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "qadapter"


def nearest(directory: str | Path) -> Path:
    """Return the directory, or the nearest parent of it that exists."""
    place = Path(directory)
    while not place.exists() and place != place.parent:
        place = place.parent
    return place


def shipped(name: str) -> str:
    """Return the path of a file of `qadapter/data_files`: demo pairs and general text, our own."""
    return str(files("qadapter") / "data_files" / name)


def check_writable(directory: str | Path) -> None:
    """Raise before a long run unless `directory` is one, or can be made; it is not made here.

    Raises:
        UserError: it is a file, or it or its nearest existing parent cannot be written.
    """
    place = nearest(directory)
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{directory}: cannot be written ({place} is in the way); choose another.")


def check_new(directory: str | Path) -> None:
    """Raise unless `directory` is not there yet, or is an empty one.

    Raises:
        UserError: there is something.
    """
    path = Path(directory)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{directory}: is there already; name a new directory.")


_TRIES, _PAUSE = 20, 0.5
"""A killed run's workers hold its directory for some seconds more."""


@contextmanager
def _held(directory: Path) -> Iterator[None]:
    """Lock a directory itself, where system and file system can: a lock file would stay in it."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        for left in reversed(range(_TRIES)):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if not left:
                    raise UserError(
                        f"{directory}: another run writes to it; wait for it or name another one."
                    ) from error
                time.sleep(_PAUSE)
            except OSError:  # this file system has no locks
                break
        yield
    finally:
        os.close(handle)


@contextmanager
def alone_in(directory: str | Path) -> Iterator[None]:
    """Make a directory and hold it against other runs of this machine; if it stays empty, it goes.

    Raises:
        UserError: it cannot be made, or another run holds it.
    """
    path = Path(directory)
    new = not path.exists()
    with _told(path):
        path.mkdir(parents=True, exist_ok=True)
    try:
        with _held(path):
            yield
    finally:
        if new and path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def why_not_written(error: BaseException, directory: Path) -> str | None:
    """Return what kept a file from being written to a directory; None if that was not it.

    safetensors and torch tell of a full disk by errors of their own, and torch without the reason:
    then the system is asked, by a file of 1 MiB.
    """
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, SafetensorError) and (code := re.search(r"os error (\d+)", str(error))):
        return os.strerror(int(code[1]))
    if isinstance(error, RuntimeError):
        try:
            with tempfile.TemporaryFile(dir=directory) as file:
                file.write(bytes(1 << 20))
        except OSError as told:
            return told.strerror or str(told)
    return None


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turn what the system says of writing `path` into a UserError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = why_not_written(error, path.parent)
        if reason is None:
            raise
        raise UserError(
            f"{path}: cannot be written ({reason}); free some space or choose another output."
        ) from error


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, under a temporary name and renamed, so never half-written.

    Raises:
        UserError: the directory cannot be written or the disk is full.
    """
    path = Path(path)
    with _told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            # mkstemp makes a private file; the result is an ordinary one.
            Path(temporary).chmod(0o644)
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)


def jsonl(rows: Iterable[object]) -> str:
    """Return rows as JSON Lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_jsonl(path: str | Path, rows: Iterable[object]) -> None:
    """Write rows as JSON Lines, as `write_text` writes.

    Raises:
        UserError: the directory cannot be written or the disk is full.
    """
    write_text(path, jsonl(rows))


def read_fields(path: str | Path) -> dict[str, Any]:
    """Return the fields of a YAML file.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    import yaml

    try:
        fields = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); name another.") from error
    except (ValueError, yaml.YAMLError) as error:  # such as a 45th of December
        raise ConfigError(f"{path}: cannot be read as YAML ({error}); fix it.") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{path}: must hold fields and values, one `name: value` a line.")
    return fields


@contextmanager
def whole_directory(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary directory that replaces `path` on success and else goes.

    An existing `path` is replaced only after the new directory is complete.

    Raises:
        UserError: the parent cannot be written or the disk is full.
    """
    path = Path(path)
    with _told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            yield temporary
            # mkdtemp makes a private directory; the result is an ordinary one.
            temporary.chmod(0o755)
            if path.exists():
                old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
                os.replace(path, old / path.name)
                os.replace(temporary, path)
                shutil.rmtree(old, ignore_errors=True)
            else:
                os.replace(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def whole_files(directory: str | Path) -> Iterator[Path]:
    """Yield a temporary directory whose files are moved into `directory` on success, else dropped.

    For a directory that holds more than these files, such as a run with its checkpoints.

    Raises:
        UserError: it cannot be written or the disk is full.
    """
    directory = Path(directory)
    with _told(directory):
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".partial.") as partial:
            yield Path(partial)
            for file in sorted(Path(partial).iterdir()):
                os.replace(file, directory / file.name)


def sha256(path: str | Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def code_digest(*places: Path) -> str:
    """Return the hexadecimal SHA-256 of Python files and their names.

    Args:
        places: files, and directories with all that is under them.
    """
    digest = hashlib.sha256()
    for place in places:
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(f"{path.relative_to(place)}|{path.stat().st_size}|".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


MANIFEST = "manifest.json"
"""Written last: a directory without it was cut while it was written."""


def seal(directory: Path) -> None:
    """Write the digest of every file of a directory beside them.

    Raises:
        UserError: it cannot be written.
    """
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST)
    digests = {str(p.relative_to(directory)): sha256(p) for p in files}
    write_text(directory / MANIFEST, json.dumps(digests, indent=1) + "\n")


def damage(directory: Path) -> str | None:
    """Return what is wrong with a sealed directory, None where every file is as it was written."""
    try:
        digests = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        if not digests:
            return f"{MANIFEST} names no file"
        inside = directory.resolve()
        for name, digest in digests.items():
            # Neither "..", a whole path nor a link may lead to a file that lies elsewhere.
            if not (directory / name).resolve().is_relative_to(inside):
                return f"{name} leads out of the directory"
            if not (directory / name).is_file():
                return f"{name} is missing"
            if sha256(directory / name) != digest:
                return f"{name} is damaged, or {MANIFEST}, which says what it was"
    except FileNotFoundError:
        return "it was not written to its end"
    except (OSError, ValueError, AttributeError):
        return f"{MANIFEST} is damaged"
    return None


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yield `(line number from 1, text)` of every non-blank line of a UTF-8 file.

    Raises:
        DataError: the file is missing, unreadable, or has a line that is not UTF-8.
    """
    path = Path(path)
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or error}); check the path."
        ) from error
    with file:
        for number, raw in enumerate(file, start=1):
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}:{number}: not UTF-8 (byte {error.start + 1} of the line); "
                    "save the file as UTF-8."
                ) from error
            if text.strip():
                yield number, text


def read_jsonl(path: str | Path) -> Iterator[tuple[int, object]]:
    """Yield `(line number from 1, decoded value)` of a JSON Lines file.

    Raises:
        DataError: as `read_lines`, or a line is not valid JSON.
    """
    for number, text in read_lines(path):
        try:
            yield number, json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{number}: not valid JSON ({error.msg} at column {error.colno}); "
                "fix or drop the line."
            ) from error
        except (ValueError, RecursionError) as error:  # a number or a nesting past Python's limits
            raise DataError(
                f"{path}:{number}: not readable JSON ({error}); fix or drop the line."
            ) from error
