"""File handling: atomic writes, locks and validated reads.

The stages decide what the files contain, so no stage lists this module in dvc.yaml.
"""

import fcntl
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from pipeline_steps.common.errors import UserError

# ---------------------------------------------------------------- reading


def parse(model, text, where, next_step=""):
    """`model` from JSON text; UserError that starts with `where` and ends with `next_step` if it is invalid."""
    from pydantic import ValidationError  # here, so that writing files needs no pydantic: benchmarks.gpu

    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "row"
        problem = f"{where}: {place}: {first['msg']} ({error.error_count()} problem(s) in this record)"
        raise UserError(f"{problem}. {next_step}" if next_step else problem) from None


def read_record(model, path, made_by):
    """One JSON file as `model`. `made_by`: the stage that writes it, named when the file is missing."""
    return parse(model, read_text(path, made_by), path)


def read_text(path, made_by):
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: missing. Run `dvc repro {made_by}`, which writes it.") from None


def check_outputs(folders=(), files=()):
    """UserError before the work begins if one of these outputs could not be written at its end."""
    for path, is_file in [(Path(p), False) for p in folders] + [(Path(p), True) for p in files]:
        if path.is_dir() == is_file and path.exists():
            found, wanted = ("a folder", "a file") if is_file else ("a file", "a folder")
            raise UserError(f"{path}: is {found}, but the output is {wanted}. Move it or choose another path.")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path.parent).close()
        except OSError as error:
            reason = "Not a directory" if path.parent.is_file() else error.strerror
            raise UserError(
                f"{path}: cannot be written ({reason}). Check that the folder exists, is yours and has space, "
                "or choose another path."
            ) from None


# ---------------------------------------------------------------- writing: whole files and folders or nothing


NUMBERS = re.compile(r"\[\n\s*(?:[-+.\w]+,?\s+)+\]")  # no JSON string has a line break, so this is never within one


def to_json(value, indent=None):
    """Deterministic JSON of a Record (fields in their own order) or of plain data (keys sorted). With `indent`, the
    numbers of a list share a line."""
    if hasattr(value, "model_dump"):
        text = json.dumps(value.model_dump(mode="json"), indent=indent, ensure_ascii=False)
    else:
        text = json.dumps(value, indent=indent, ensure_ascii=False, sort_keys=True)
    return NUMBERS.sub(lambda match: " ".join(match[0].split()).replace("[ ", "[").replace(" ]", "]"), text)


def write_text(path, text):
    """`write_bytes` of text in utf-8."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path, content):
    """Write a file by os.replace from a temporary neighbour; parents are created. UserError if that is impossible."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(content)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def write_json(path, value):
    write_text(path, to_json(value, indent=1) + "\n")


def write_jsonl(path, rows):
    write_text(path, "".join(to_json(row) + "\n" for row in rows))


@contextmanager
def writable(path):
    """Turns an OSError inside the block into a UserError that names `path` and the system's reason."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"{path}: cannot be written ({reason}). Check that the folder exists, is yours and has space, "
            "or choose another path."
        ) from None


@contextmanager
def replaced_folder(path):
    """Yields an empty folder beside `path`; it becomes `path` if the block succeeds and is removed otherwise.

    A crash leaves `path` as it was (and a hidden `.NAME.partial` that the next run empties). While another process
    fills the folder, such as a stage that outlived a killed `dvc repro`, this one waits.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    check_outputs(folders=[path])
    with writable(path):
        lock = _lock_empty(partial)
        if not path.exists() and _old(path).exists():  # killed between the two renames
            os.rename(_old(path), path)
    try:
        try:
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        with writable(path):
            _swap_in(partial, path)
    finally:
        os.close(lock)


def check_own_folder(folder, mark):
    """Raises UserError if a folder that is about to be replaced has files, but not the one that this project writes
    into such folders."""
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / mark).exists():
        raise UserError(
            f"{folder} has files, but no {mark}, so it was not made by this command, which would delete them. Name "
            "another folder, or remove this one."
        )


def _lock_empty(folder):
    """Creates or empties `folder`; returns the open descriptor that locks it (flock: until closed, or the end)."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that writes {folder}", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists() and os.path.samestat(os.fstat(lock), os.stat(folder)):
            break
        os.close(lock)  # the other process has renamed or removed it: make a new one
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    return lock


def _old(path):
    return path.with_name(f".{path.name}.old")


def _swap_in(partial, path):
    old = _old(path)
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.rename(path, old)
    os.rename(partial, path)
    shutil.rmtree(old, ignore_errors=True)


def remove_folder(path):
    """Delete a folder of which no half may be found later, such as a saved state: it is renamed first.

    A crash leaves a hidden `.NAME.deleted`; the next call for a neighbour, or for a new `path`, deletes that too.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.deleted")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(path, aside)
    for deleted in path.parent.glob(".*.deleted"):
        shutil.rmtree(deleted, ignore_errors=True)


def scratch_folder(stage, fingerprint):
    """Create and return `${RUN_SCRATCH:-.}/.scratch/<stage>/<fingerprint>`, a folder for unfinished work.

    `fingerprint`: hashing.fingerprint() of everything that the work depends on, so that only equal work is resumed.
    """
    folder = Path(os.environ.get("RUN_SCRATCH") or ".").resolve() / ".scratch" / stage / fingerprint
    with writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def exclusive(path, busy):
    """Holds the lock file `path`; UserError with the message `busy` if another process holds it."""
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(busy) from None
        yield


@contextmanager
def locked_scratch(stage, fingerprint, each_minute=lambda: None):
    """Yields (scratch_folder, open lock file), one process at a time: a second run of the same work waits, and calls
    `each_minute` meanwhile.

    The lock (flock) ends with the process and with the children that inherited the file, however they end.
    """
    folder = scratch_folder(stage, fingerprint)
    with open(folder.with_suffix(".lock"), "w") as lock_file:
        try:
            fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{stage}: waiting for another run of the same work ({folder})", file=sys.stderr)
            _wait_for(lock_file, each_minute)
        # created again if the other run has finished and removed it
        yield scratch_folder(stage, fingerprint), lock_file


def _wait_for(lock_file, each_minute):
    for second in itertools.count(1):
        time.sleep(1)
        try:
            return fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if second % 60 == 0:
                each_minute()
