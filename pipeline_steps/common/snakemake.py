"""Starting and stopping Snakemake from a stage or a study, on this machine or on a cluster."""

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

PROFILES = ROOT / "workflow" / "profiles"
LOG = "snakemake.log"  # in the folder of the work
GRACE = 10  # seconds that Snakemake gets to cancel its jobs


def snakemake_profile():
    """Resolve SNAKEMAKE_PROFILE: a folder in workflow/profiles, a path relative to the working directory or to the
    repository root, or a profile name known to Snakemake."""
    chosen = os.environ.get("SNAKEMAKE_PROFILE") or "default"
    places = (PROFILES / chosen, Path(chosen).absolute(), ROOT / chosen)
    return next((place for place in places if place.is_dir()), chosen)


def stop(process):
    """Interrupt Snakemake so that it cancels its jobs; kill it after GRACE seconds. Running jobs finish their shard."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def cancel_leftover_jobs(scratch):
    """Cancel the SLURM jobs that a killed run left in the queue, and wait until they are gone.

    Snakemake cancels its jobs when it is interrupted, but not when it is killed. Raises UserError if SLURM fails.
    """
    log = scratch / LOG
    found = re.search(r"SLURM run ID: (\S+)", log.read_text(errors="replace")) if log.exists() else None
    if found is None:
        return
    name = found.group(1)
    if shutil.which("scancel") is None:
        print(
            f"jobs of an earlier run may still be queued in SLURM. Cancel them with `scancel --name={name}`",
            file=sys.stderr,
        )
        return
    left = _slurm("squeue", "--noheader", f"--name={name}", "--format=%i").split()
    if left:
        print(f"cancelling {len(left)} SLURM jobs of run {name}", file=sys.stderr)
        _slurm("scancel", f"--name={name}")
    while _slurm("squeue", "--noheader", f"--name={name}", "--format=%i").strip():
        time.sleep(1)


def _slurm(*command):
    """Run a SLURM command and return its output. Raises UserError if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed with exit code {done.returncode}: {done.stderr.strip()}")
    return done.stdout
