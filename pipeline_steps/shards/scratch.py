"""The scratch folder keeps packed shards between runs; only changed shards are packed again.

settings.json                      how frames are made; a lock of all jobs
plan/<split>/<shard>.jsonl         rows of index.jsonl, copied
packed/<split>/<shard>.tar         with .npz, .json and .progress (pack.py)
logs/<split>/<shard>.log           messages of the job
"""

import fcntl
import hashlib
import os
import shutil

from pipeline_steps.common.errors import UserError
from pipeline_steps.common.files import read_record, write_bytes, write_json
from pipeline_steps.shards.pack import Settings, ShardReport


def write_plans(index, plan, settings, scratch):
    """settings.json and a plan per shard; files with the right content stay. Returns {place: sha256 of its plan}."""
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
    """Jobs of a killed run finish their shard: each holds a shared lock on settings.json meanwhile."""
    if (scratch / "settings.json").exists():
        with open(scratch / "settings.json", "r+") as lock_file:  # writable: NFS gives no exclusive lock otherwise
            fcntl.flock(lock_file, fcntl.LOCK_EX)


def prune(scratch, plan):
    """Removes shards that no plan names, what killed jobs left behind, and the logs of the last run."""
    shutil.rmtree(scratch / "logs", ignore_errors=True)
    names = {f"{split}/{name}" for split, name in plan}
    for folder in ("plan", "packed"):
        for path in (scratch / folder).glob("*/*"):
            if f"{path.parent.name}/{path.name.split('.')[0]}" not in names:  # .NAME.partial has no name before its dot
                path.unlink()


def drop_stale(scratch, plan_hashes):
    """Removes shards that were made from another plan or changed since. Returns the places that have to be packed."""
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
    except UserError:  # cut off by a power failure
        return False
    tar = path.with_suffix(".tar").stat()
    untouched = tar.st_mtime_ns <= path.with_suffix(".json").stat().st_mtime_ns  # its links may lie in open folders
    return report.plan_sha256 == plan_sha256 and tar.st_size == report.shard.bytes and untouched


def read_report(path):
    return read_record(ShardReport, path.with_suffix(".json"), "shards")


def read_reports(scratch, plan_hashes):
    """{place: ShardReport}. UserError if one was made from another plan than the present one."""
    reports = {}
    for place, plan_sha256 in plan_hashes.items():
        path = scratch / "packed" / place[0] / place[1]
        reports[place] = read_report(path)
        if reports[place].plan_sha256 != plan_sha256:
            raise UserError(
                f"{path}.tar: written from another plan (sha256 {str(reports[place].plan_sha256)[:12]}) than the "
                f"present one ({plan_sha256[:12]}), by an earlier job. Rerun `python -m pipeline_steps.shards`."
            )
    return reports


def prune_others(scratch, raw_dir):
    """Removes finished scratch folders of the same media with other parameters or older code, unless one is in use."""
    for folder in scratch.parent.iterdir():
        if folder == scratch or not (folder / "finished").exists():
            continue
        with open(folder.with_suffix(".lock"), "a") as lock_file:
            try:
                fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            if read_record(Settings, folder / "settings.json", "shards").raw_dir == raw_dir:
                shutil.rmtree(folder)
