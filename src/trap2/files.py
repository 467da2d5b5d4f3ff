"""Files that are whole or absent: written under a temporary name, then renamed; and their digests.

A kill or a full disk in mid-write leaves a `*.partial` beside the target and the target untouched.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from trap2.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader sees the old file or the new one, never a part.

    Raises:
        UserError: The disk is full or the place is not writable.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise UserError(
            f"cannot write {path}: {error.strerror}; free space or choose another place"
        ) from error


def write_json(path: Path, record: Any) -> None:
    """Write `record` as JSON with stable formatting; only plain JSON types are accepted."""
    write_text(path, json.dumps(record, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def refuse_existing(path: Path, overwrite: bool, besides: Collection[str] = ()) -> None:
    """Stop before any work is done if the result would have nowhere to go.

    Args:
        path: The output folder.
        overwrite: Whether what is there may be replaced.
        besides: Names in it that are no result.

    Raises:
        UserError: `path` exists and `overwrite` is false, or it exists and is not a folder.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file, not a folder; choose another output folder")
    taken = path.exists() and any(inside.name not in besides for inside in path.iterdir())
    if taken and not overwrite:
        raise UserError(f"{path} exists already; pass --overwrite or choose another output folder")


@contextmanager
def new_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Fill a folder under a temporary name; it takes its real name only if the block succeeds.

    Args:
        path: Where the folder shall be.
        overwrite: Replace a folder that is there. It is removed only after the new one is whole.

    Yields:
        The temporary folder to write into.

    Raises:
        UserError: The place is taken, not writable, or the disk is full.
    """
    refuse_existing(path, overwrite)
    partial = path.with_name(path.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if path.exists():
            old = path.with_name(path.name + ".old")
            shutil.rmtree(old, ignore_errors=True)
            path.replace(old)
            partial.replace(path)
            shutil.rmtree(old)
        else:
            partial.replace(path)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot write {path}: {reason}; free space or choose another place"
        ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


LOCK, LEDGER = ".lock", "evaluations.sqlite"
"""By the first a process holds a folder while it works there; the second is an audit's ledger."""

UNFINISHED = (LOCK, LEDGER, f"{LEDGER}-journal")
"""What a killed audit leaves in its folder: no result, but where to go on from."""


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder for this process alone; it is made, and removed again if it stays empty.

    The hold is the operating system's (flock), so it ends with the process, however that dies.

    Args:
        folder: The folder.

    Raises:
        UserError: Another process holds it, it is a file, or the place is not writable.
    """
    import fcntl  # not on every system, and only here

    refuse_existing(folder, overwrite=True)
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    lock = folder / LOCK
    with ExitStack() as closing:
        try:
            for place in reversed(made):
                closing.callback(_remove_empty, place)
            folder.mkdir(parents=True, exist_ok=True)
            stream = closing.enter_context(lock.open("a"))
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not lock.exists() or not os.path.samestat(os.fstat(stream.fileno()), lock.stat()):
                raise BlockingIOError  # its last holder has just removed it
        except BlockingIOError as error:
            raise UserError(
                f"{folder} is in use by another process; wait for it, or choose another folder"
            ) from error
        except OSError as error:
            raise UserError(
                f"cannot write {folder}: {error.strerror}; free space or choose another place"
            ) from error
        closing.callback(lock.unlink, missing_ok=True)
        yield


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def file_digest(path: Path) -> str:
    """SHA-256 of one file, as `sha256:<hex>`."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return "sha256:" + digest.hexdigest()


def weights_digest(folder: Path) -> str:
    """One SHA-256 over the safetensors files of a folder: names and contents, in name order."""
    total = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        total.update(f"{path.name}\0{file_digest(path)}\n".encode())
    return "sha256:" + total.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: The file is missing, unreadable or holds something else.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); write it again") from error
    if not isinstance(record, dict):
        raise UserError(f"{path} holds a {type(record).__name__}, not an object; write it again")
    return record


def nested(record: Any, *keys: str) -> Any:
    """What stands under these keys, one within the other; None where something else stands.

    For records that others wrote.
    """
    for key in keys:
        record = record.get(key) if isinstance(record, dict) else None
    return record
