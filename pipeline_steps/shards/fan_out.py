"""Run Snakemake over a planned scratch folder: one job per shard, a progress bar here, its own log in a file."""

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from pipeline_steps.common.errors import UserError
from pipeline_steps.common.params import ROOT
from pipeline_steps.monitoring.progress import progress_bar

PROFILES = ROOT / "workflow" / "profiles"
LOG = "snakemake.log"  # in scratch
GRACE = 10  # seconds that Snakemake gets to cancel its jobs
MANY = 1000  # shards, whose progress is looked at less often


def run_snakemake(target, scratch, progress, lock_file):
    """Makes the workflow's `target` in `scratch`; finished shards are kept from an earlier run.

    progress: the files into which the jobs write one byte per finished sample, and the number of samples of each.
    lock_file: an open locked file that the children inherit, so that the lock lasts as long as they do.
    """
    log = scratch / LOG
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
            env={name: value for name, value in os.environ.items() if name != "SNAKEMAKE_PROFILE"},  # for this one only
            pass_fds=[lock_file.fileno()],
            preexec_fn=_stop_with_parent,
        )
        try:
            _show_progress(process, target, progress)
        finally:
            if process.poll() is None:
                _stop(process)
                cancel_left_over(scratch)
    if process.returncode != 0:
        raise UserError(_explain(scratch, process.returncode, log))


def _profile():
    """SNAKEMAKE_PROFILE: the name of a folder in workflow/profiles, a folder from here or from the repository's root,
    or a name that Snakemake finds."""
    chosen = os.environ.get("SNAKEMAKE_PROFILE") or "default"
    places = (PROFILES / chosen, Path(chosen).absolute(), ROOT / chosen)
    return next((place for place in places if place.is_dir()), chosen)


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


def cancel_left_over(scratch):
    """Jobs that a killed run left in the queue of a SLURM cluster are cancelled, and waited for until they are gone.

    Snakemake cancels them itself when it is interrupted, not when it is killed.
    """
    log = scratch / LOG
    found = re.search(r"SLURM run ID: (\S+)", log.read_text(errors="replace")) if log.exists() else None
    if found is None:
        return
    name = found.group(1)
    if shutil.which("scancel") is None:
        print(f"jobs of an earlier run may still be in SLURM's queue: `scancel --name={name}`", file=sys.stderr)
        return
    left = _slurm("squeue", "--noheader", f"--name={name}", "--format=%i").split()
    if left:
        print(f"cancelling {len(left)} SLURM jobs of run {name}", file=sys.stderr)
        _slurm("scancel", f"--name={name}")
    while _slurm("squeue", "--noheader", f"--name={name}", "--format=%i").strip():
        time.sleep(1)


def _slurm(*command):
    """What a SLURM command prints. UserError if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{' '.join(command)} ended with exit code {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def _show_progress(process, target, progress):
    waiting, finished = dict(progress), 0
    with progress_bar(target, total=sum(progress.values()), unit="sample") as bar:
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
    """The first failed job's own message, else what SLURM says of a job, else the end of Snakemake's log."""
    for job_log in sorted((scratch / "logs").glob("**/*.log")):
        text = job_log.read_text().strip()
        if text.startswith("error: "):
            return text.removeprefix("error: ")
        if text:
            return f"a job failed: {text.splitlines()[-1]} (whole message: {job_log})"
    for job_log in sorted(scratch.glob(".snakemake/slurm_logs/**/*.log")):
        lines = [line for line in job_log.read_text().splitlines() if line.startswith(("srun: ", "slurmstepd: "))]
        if lines:
            return f"a job failed: {lines[-1]} (whole message: {job_log})"
    if shutil.disk_usage(scratch).free < 2**20:
        return f"{scratch}: no space left on the disk. Make room, or set RUN_SCRATCH to a folder on another disk."
    end = " / ".join(line.strip() for line in Path(log).read_text().splitlines()[-5:] if line.strip())
    return f"snakemake ended with exit code {code}: {end} (whole log: {log})"
