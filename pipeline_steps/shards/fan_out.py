"""Pack the shards of a planned scratch folder, one job per shard: with Snakemake, which logs to a file, or in processes
of this machine."""

import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from pipeline_steps.common.errors import UserError
from pipeline_steps.common.params import ROOT
from pipeline_steps.common.processes import ends_with_this_process, map_in_processes
from pipeline_steps.common.snakemake import LOG, cancel_leftover_jobs, snakemake_profile, stop
from pipeline_steps.monitoring.progress import progress_bar
from pipeline_steps.shards.pack import pack_planned

MANY = 1000  # shards, from which on progress is polled less often


def run_snakemake(target, scratch, progress, lock_file):
    """Run the workflow's `target` in the folder `scratch`. Finished shards of an earlier run are reused.

    progress: {file: number of samples}; each job appends one byte per finished sample to its file. lock_file: an open,
    locked file; child processes inherit it, so the lock is held until the last one ends. Raises UserError, with the
    first failed job's message, if Snakemake fails.
    """
    log = scratch / LOG
    command = [sys.executable, "-m", "snakemake", target, "--snakefile", ROOT / "workflow" / "Snakefile"]
    command += ["--directory", scratch, "--profile", snakemake_profile(), "--workflow-profile", "none"]
    command += ["--nolock", "--rerun-triggers", "mtime"]
    command += ["--ignore-incomplete"]  # jobs rename complete files into place
    command += ["--config", f"python={sys.executable}", f"root={ROOT}"]
    with open(log, "w") as output:
        process = subprocess.Popen(
            ends_with_this_process(command),
            stdout=output,
            stderr=subprocess.STDOUT,
            env={
                name: value for name, value in os.environ.items() if name != "SNAKEMAKE_PROFILE"
            },  # applies to this call only
            pass_fds=[lock_file.fileno()],
        )
        try:
            _show_progress(process, target, progress)
        finally:
            if process.poll() is None:
                stop(process)
                cancel_leftover_jobs(scratch)
    if process.returncode != 0:
        raise UserError(_explain(scratch, process.returncode, log))


def run_pool(missing, scratch, num_processes):
    """Pack the shards `missing`, [(split, name)], in processes of this machine, where Snakemake is not installed."""
    work = partial(pack_planned, scratch)
    packed = map_in_processes(work, missing, num_processes, "Rerun with fewer processes (--processes).")
    for _ in progress_bar("shards", packed, total=len(missing), unit="shard"):
        pass


def _show_progress(process, target, progress):
    waiting, finished = dict(progress), 0
    with progress_bar(target, total=sum(progress.values()), unit="sample") as bar:
        running = True
        while running:
            time.sleep(0.1 if len(waiting) < MANY else 5)
            running = process.poll() is None
            sizes = {path: path.stat().st_size for path in waiting if path.exists()}
            for path, size in list(sizes.items()):
                if size == waiting[path]:  # finished, no need to poll it again
                    finished += sizes.pop(path)
                    del waiting[path]
            bar.update(finished + sum(sizes.values()) - bar.n)


def _explain(scratch, code, log):
    """Return the first failed job's message, else SLURM's message about a job, else the end of Snakemake's log."""
    for job_log in sorted((scratch / "logs").glob("**/*.log")):
        text = job_log.read_text().strip()
        if text.startswith("error: "):
            return text.removeprefix("error: ")
        if text:
            return f"a job failed: {text.splitlines()[-1]} (full log: {job_log})"
    for job_log in sorted(scratch.glob(".snakemake/slurm_logs/**/*.log")):
        lines = [line for line in job_log.read_text().splitlines() if line.startswith(("srun: ", "slurmstepd: "))]
        if lines:
            return f"a job failed: {lines[-1]} (full log: {job_log})"
    if shutil.disk_usage(scratch).free < 2**20:
        return f"{scratch}: no space left on the disk. Free space, or set RUN_SCRATCH to a folder on another disk."
    end = " / ".join(line.strip() for line in Path(log).read_text().splitlines()[-5:] if line.strip())
    return f"snakemake failed with exit code {code}: {end} (full log: {log})"
