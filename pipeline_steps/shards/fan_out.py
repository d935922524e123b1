"""Run Snakemake over a planned scratch folder: one job per shard, a progress bar here, its own log in a file."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

from pipeline_steps.params import ROOT, UserError

PROFILES = ROOT / "workflow" / "profiles"
GRACE = 10  # seconds that Snakemake gets to cancel its jobs
MANY = 1000  # shards, whose progress is looked at less often


def run_snakemake(target, scratch, progress, lock_file):
    """Makes the workflow's `target` in `scratch`; finished shards are kept from an earlier run.

    progress: the files into which the jobs write one byte per finished sample, and the number of samples of each.
    lock_file: an open locked file that the children inherit, so that the lock lasts as long as they do.
    """
    log = scratch / "snakemake.log"
    command = [sys.executable, "-m", "snakemake", target, "--snakefile", ROOT / "workflow" / "Snakefile"]
    command += ["--directory", scratch, "--profile", _profile(), "--workflow-profile", "none"]
    command += ["--nolock", "--rerun-triggers", "mtime"]
    command += ["--ignore-incomplete"]  # a job renames whole files into place, its report last: what is there is whole
    command += ["--config", f"python={sys.executable}", f"root={ROOT}"]
    with open(log, "w") as output:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=[lock_file.fileno()],
            preexec_fn=_stop_with_parent,
        )
        try:
            _show_progress(process, target, progress)
        finally:
            if process.poll() is None:
                _stop(process)
    if process.returncode != 0:
        raise UserError(_explain(scratch, process.returncode, log))


def _profile():
    """SNAKEMAKE_PROFILE: the name of a folder in workflow/profiles, or any path or name that Snakemake finds."""
    chosen = os.environ.get("SNAKEMAKE_PROFILE") or "default"
    return PROFILES / chosen if (PROFILES / chosen).is_dir() else chosen


def _stop_with_parent():
    """In the child: SIGKILL when the stage dies, so that a killed stage does not go on in the background (Linux).

    Not SIGTERM: Snakemake's handler of it takes a lock that the interrupted thread may hold, and then waits for ever.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _stop(process):
    """Interrupt Snakemake, which then cancels its jobs; kill it if that takes too long (a job ends with its shard)."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _show_progress(process, target, progress):
    waiting, finished = dict(progress), 0
    with tqdm(total=sum(progress.values()), desc=target, unit="sample", mininterval=0.5) as bar:
        running = True
        while running:
            time.sleep(0.1 if len(waiting) < MANY else 5)
            running = process.poll() is None
            sizes = {path: path.stat().st_size for path in waiting if path.exists()}
            for path, size in list(sizes.items()):
                if size == waiting[path]:  # of a finished shard: not looked at again
                    finished += sizes.pop(path)
                    del waiting[path]
            bar.update(finished + sum(sizes.values()) - bar.n)


def _explain(scratch, code, log):
    """The first failed job's own message, else the end of Snakemake's log."""
    for job_log in sorted((scratch / "logs").glob("**/*.log")):
        text = job_log.read_text().strip()
        if text.startswith("error: "):
            return text.removeprefix("error: ")
        if text:
            return f"a job failed: {text.splitlines()[-1]} (whole message: {job_log})"
    if shutil.disk_usage(scratch).free < 2**20:
        return f"{scratch}: no space left on the disk. Make room, or set RUN_SCRATCH to a folder on another disk."
    end = " / ".join(line.strip() for line in Path(log).read_text().splitlines()[-5:] if line.strip())
    return f"snakemake ended with exit code {code}: {end} (whole log: {log})"
