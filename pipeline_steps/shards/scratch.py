"""The scratch folder, which keeps packed shards between runs so that only changed shards are repacked.

settings.json                      settings of all jobs; jobs hold a shared lock on it
plan/<split>/<shard>.jsonl         copied rows of index.jsonl
packed/<split>/<shard>.tar         with .npz, .json and .progress (pack.py)
logs/<split>/<shard>.log           stderr of the job
"""

import fcntl
import hashlib
import os
import shutil

from pipeline_steps.common.errors import UserError
from pipeline_steps.common.files import read_record, remove_folder, write_bytes, write_json
from pipeline_steps.shards.pack import Settings, ShardReport


def write_plans(index, plan, settings, scratch):
    """Write settings.json and one plan per shard, if changed. Returns {(split, name): sha256 of its plan}."""
    if not (scratch / "settings.json").exists():
        write_json(scratch / "settings.json", settings)
    hashes = {}
    with open(index.path, "rb") as file:
        for (split, name), rows in plan.items():
            spans = zip(index.sizes[rows].tolist(), index.starts[rows].tolist(), strict=True)
            content = b"".join(os.pread(file.fileno(), *span).rstrip(b"\r\n") + b"\n" for span in spans)
            path = scratch / "plan" / split / f"{name}.jsonl"
            if not path.exists() or path.read_bytes() != content:
                write_bytes(path, content)
            hashes[split, name] = hashlib.sha256(content).hexdigest()
    return hashes


def wait_for_jobs(scratch):
    """Wait for running jobs of a killed run, which hold a shared lock on settings.json."""
    if (scratch / "settings.json").exists():
        with open(scratch / "settings.json", "r+") as lock_file:  # writable: NFS requires it for an exclusive lock
            fcntl.flock(lock_file, fcntl.LOCK_EX)


def prune(scratch, plan):
    """Remove shards that are not in the plan, partial files of killed jobs, and the logs of the last run."""
    shutil.rmtree(scratch / "logs", ignore_errors=True)
    names = {f"{split}/{name}" for split, name in plan}
    for folder in ("plan", "packed"):
        for path in (scratch / folder).glob("*/*"):
            if f"{path.parent.name}/{path.name.split('.')[0]}" not in names:  # .NAME.partial has no name before its dot
                path.unlink()


def drop_stale(scratch, plan_hashes):
    """Remove shards that are out of date or were modified. Returns the (split, name) of the shards to pack."""
    missing = []
    for (split, name), plan_sha256 in plan_hashes.items():
        path = scratch / "packed" / split / name
        if not _is_packed(path, plan_sha256):
            for suffix in (".json", ".tar", ".npz", ".progress"):
                path.with_suffix(suffix).unlink(missing_ok=True)
            missing.append((split, name))
    return missing


def _is_packed(path, plan_sha256):
    if not all(path.with_suffix(suffix).exists() for suffix in (".json", ".tar", ".npz")):
        return False
    try:
        report = read_report(path)
    except UserError:  # truncated, such as by a power failure
        return False
    tar = path.with_suffix(".tar").stat()
    untouched = tar.st_mtime_ns <= path.with_suffix(".json").stat().st_mtime_ns  # published hard links may be modified
    return report.plan_sha256 == plan_sha256 and tar.st_size == report.shard.bytes and untouched


def read_report(path):
    """Read the ShardReport beside a shard; `path` has no suffix."""
    return read_record(ShardReport, path.with_suffix(".json"), "shards")


def read_reports(scratch, plan_hashes):
    """Return {(split, name): ShardReport}. Raises UserError if a shard was packed from another plan."""
    reports = {}
    for place, plan_sha256 in plan_hashes.items():
        path = scratch / "packed" / place[0] / place[1]
        reports[place] = read_report(path)
        if reports[place].plan_sha256 != plan_sha256:
            raise UserError(
                f"{path}.tar: an earlier job packed another plan (sha256 {str(reports[place].plan_sha256)[:12]}, "
                f"expected {plan_sha256[:12]}). Run `dvc repro shards`."
            )
    return reports


def remove_outdated_folders(scratch, raw_dir):
    """Remove finished, unused scratch folders of the same raw data with other parameters or older code."""
    for folder in scratch.parent.iterdir():
        if folder == scratch or folder.suffix == ".deleted" or not (folder / "finished").exists():
            continue
        with open(folder.with_suffix(".lock"), "a") as lock_file:
            try:
                fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            try:
                same = read_record(Settings, folder / "settings.json", "shards").raw_dir == raw_dir
            except UserError:  # of a version with other parameters
                same = False
            if same:
                remove_folder(folder)
