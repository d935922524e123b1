"""Checks the working folder before `dvc repro`: what a kill, a full disk or a wrong clock leaves behind.

    python -m pipeline_steps.common.workspace        repair what is safe to repair, explain the rest (under a second)

DVC and Snakemake fail on these with errors that do not name the cause.
"""

import fcntl
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import yaml

from pipeline_steps.common.errors import UserError, run_main
from pipeline_steps.common.params import MAX_DEPTH, ROOT

PATTERNS = "[]{}*?"  # characters with a meaning in the path patterns of DVC and Snakemake
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
MIN_FREE = 50 * 2**20  # bytes
FUTURE = 60.0  # seconds that a clock may be wrong
CODE = ("pipeline_steps", "model", "conf", "workflow")


def check(root: Path) -> list[str]:
    """Repairs and checks the folder. Returns notes. UserError with the next step for what the user must repair."""
    check_path(root)
    check_space(root, "the working folder")
    notes = [*check_temporary(), *repair_rwlock(root / ".dvc" / "tmp"), *future_files(root)]
    check_dvc_lock(root / "dvc.lock")
    return notes


def check_path(root: Path) -> None:
    wrong = sorted({character for character in str(root) if character in PATTERNS})
    if wrong:
        raise UserError(
            f"{root}: the path of the repository contains {' '.join(wrong)}, which DVC and Snakemake read as a "
            "pattern, so they would not find its files. Move or rename the folder."
        )


def check_space(folder: Path, what: str) -> None:
    """UserError if the disk of a folder has no free space or no free inodes."""
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    if free < MIN_FREE:
        raise UserError(
            f"{folder}: {what} has {free / 2**20:,.0f} MiB of free disk space, at least {MIN_FREE / 2**20:,.0f} are "
            "needed. Delete files (`make clean`, `dvc gc --workspace`), or use another disk."
        )
    if disk.f_files and disk.f_favail == 0:
        raise UserError(
            f"{folder}: {what} is on a disk without free inodes ({disk.f_files:,} files), so no file can be created. "
            "Delete folders with many small files, or use another disk."
        )


def check_temporary() -> list[str]:
    """A note if temporary files go to another folder than TMPDIR. UserError if none can be written."""
    wanted = os.environ.get("TMPDIR")
    try:
        with tempfile.TemporaryFile() as file:
            file.write(bytes(2**16))
            file.flush()
        used = tempfile.gettempdir()  # Python's choice: TMPDIR, or /tmp if that is full or missing
        check_space(Path(used), "the folder for temporary files (TMPDIR)")
    except OSError as error:
        raise UserError(
            f"{wanted or '/tmp'}: no temporary file can be written ({error.strerror or error}). Free space there, or "
            "set TMPDIR to a folder on another disk."
        ) from None
    if wanted and Path(used).resolve() != Path(wanted).resolve():
        return [f"{wanted} (TMPDIR): full, missing or not writable. Temporary files go to {used}."]
    return []


def repair_rwlock(folder: Path) -> list[str]:
    """Removes DVC's file of locked paths if it is unreadable, as a kill leaves it, and no process is writing it."""
    path = folder / "rwlock"
    try:
        if isinstance(json.loads(path.read_text(encoding="utf-8")), dict):
            return []
        problem = "is no JSON object"
    except FileNotFoundError:
        return []
    except (ValueError, RecursionError):
        problem = "is empty" if path.stat().st_size == 0 else "is cut off"
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Make it yours, or delete it.") from None
    with open(folder / "rwlock.lock", "a") as guard:
        try:
            fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{path}: {problem}, but a DVC command that uses it is running. Wait for it to end, then run again."
            ) from None
        path.unlink(missing_ok=True)
    return [f"{path}: {problem}, probably since a DVC command was killed. Removed; DVC writes a new one."]


def check_dvc_lock(path: Path) -> None:
    """UserError if dvc.lock is cut off."""
    if not path.exists():
        return
    try:
        text = path.read_text(encoding="utf-8")
        check_nesting(text)
        content = yaml.load(text, Loader=LOADER)
        problem = None if isinstance(content, dict) and "stages" in content else "it has no stages"
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        problem = " ".join(str(error).split())[:200]
    if problem:
        raise UserError(
            f"{path}: not a complete lock file ({problem}). Restore it with `git checkout dvc.lock`, or delete it; "
            "`dvc repro` then takes finished stages from the run cache."
        )


def check_nesting(text: str) -> None:
    """YAMLError for more levels than MAX_DEPTH. The loader in C ends the process at some ten thousand."""
    depth = 0
    for event in yaml.parse(text, Loader=LOADER):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise yaml.YAMLError(f"more than {MAX_DEPTH} levels of nesting in line {event.start_mark.line + 1}")


def future_files(root: Path) -> list[str]:
    """A note about code and parameters that are dated in the future: Snakemake repeats work that depends on them."""
    limit = time.time() + FUTURE
    places = [root / "params.yaml", root / "dvc.yaml", *(f for name in CODE for f in (root / name).rglob("*.*"))]
    late = sorted(path for path in places if path.is_file() and path.stat().st_mtime > limit)
    if not late:
        return []
    now = time.time()
    for path in late:
        os.utime(path, (now, now))
    return [f"{len(late)} file(s) were dated in the future, such as {late[0]}. Dated now; check the clock."]


def main() -> None:
    for note in check(ROOT if (ROOT / "dvc.yaml").exists() else Path.cwd()):
        print(f"note: {note}", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
