"""Finds files that were damaged after they were written: compares their sha256 with a recorded one.

A file is hashed once: the result is cached by path, size and modification time in `.scratch/verified`. Processes that
open the same files at the same time divide the hashing among themselves.
"""

import fcntl
import json
import os
from collections.abc import Iterable
from pathlib import Path

from pipeline_steps.common.errors import UserError
from pipeline_steps.common.files import scratch_folder, to_json, write_text
from pipeline_steps.common.hashing import fingerprint, sha256_file

CHECKSUMS = "checksums.json"  # {file name: sha256} of a folder


def verify(files: Iterable[tuple[Path, str]], recorded_in: object, repair: str) -> None:
    """UserError that names the first file whose content differs from what was recorded.

    files: (path, sha256). recorded_in: the file that records the hashes, and repair: what to do, both for the message.
    OSError if a file cannot be read.
    """
    waiting = []
    for path, expected in files:
        if not _verify_one(Path(path), expected, recorded_in, repair, wait=False):
            waiting.append((path, expected))
    for path, expected in waiting:  # those that another process was hashing
        _verify_one(Path(path), expected, recorded_in, repair, wait=True)


def write_checksums(folder: Path) -> None:
    """Records the sha256 of all files of a folder in it."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != CHECKSUMS)
    write_text(folder / CHECKSUMS, to_json({name: sha256_file(folder / name) for name in names}, indent=1) + "\n")


def verify_folder(folder: Path, repair: str) -> None:
    """Verifies the files of a folder against its recorded checksums, if it has any. UserError for a missing or damaged
    file, or unreadable checksums."""
    path = folder / CHECKSUMS
    if not path.exists():
        return
    try:
        recorded = {str(name): str(value) for name, value in json.loads(path.read_text("utf-8")).items()}
    except (ValueError, AttributeError, RecursionError):
        raise UserError(f"{path}: not valid JSON. {repair}") from None
    missing = [name for name in recorded if not (folder / Path(name).name).exists()]
    if missing:
        raise UserError(f"{folder}: {', '.join(missing)} missing, but recorded in {CHECKSUMS}. {repair}")
    verify([(folder / Path(name).name, value) for name, value in recorded.items()], path, repair)


def _verify_one(path: Path, expected: str, recorded_in: object, repair: str, wait: bool) -> bool:
    """False, without a result, if another process is hashing the file and `wait` is false."""
    cache = _cache_file(path)
    if cache is None:
        found = sha256_file(path)
    else:
        with open(cache, "a+", encoding="utf-8") as entry:
            try:
                fcntl.flock(entry, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                return False
            found = _cached_hash(path, entry)
    if found != expected:
        raise UserError(
            f"{path}: its content has changed since it was written: sha256 {found[:12]}..., expected "
            f"{expected[:12]}... ({recorded_in}). {repair}"
        )
    return True


def _cache_file(path: Path) -> Path | None:
    """None if the scratch folder cannot be written; the file is then hashed every time."""
    try:
        folder = scratch_folder("verified", "files")
    except UserError:
        return None
    cache = folder / f"{fingerprint(str(path.resolve()))}.json"
    return cache if os.access(cache if cache.exists() else folder, os.W_OK) else None


def _cached_hash(path: Path, entry) -> str:
    """sha256 of a file. entry: its open and locked cache file."""
    state = path.stat()
    identity = {"size": state.st_size, "mtime_ns": state.st_mtime_ns, "ctime_ns": state.st_ctime_ns}
    entry.seek(0)
    try:
        known = json.loads(entry.read())
        if {name: known[name] for name in identity} == identity:
            return known["sha256"]
    except (ValueError, KeyError, TypeError):
        pass  # new, or cut off by a kill
    found = sha256_file(path)
    entry.seek(0)
    entry.truncate()
    entry.write(to_json({**identity, "sha256": found}))
    return found
