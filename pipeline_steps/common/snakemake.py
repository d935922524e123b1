"""Starting and stopping Snakemake from a stage or a study, on this machine or on a cluster."""

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

PROFILES = ROOT / "workflow" / "profiles"
LOG = "snakemake.log"  # in the folder of the work
GRACE = 10  # seconds that Snakemake gets to cancel its jobs


def snakemake_profile():
    """SNAKEMAKE_PROFILE: the name of a folder in workflow/profiles, a folder from here or from the repository's root,
    or a name that Snakemake finds."""
    chosen = os.environ.get("SNAKEMAKE_PROFILE") or "default"
    places = (PROFILES / chosen, Path(chosen).absolute(), ROOT / chosen)
    return next((place for place in places if place.is_dir()), chosen)


def stop_with_parent():
    """In the child: SIGKILL when the stage dies, so that a killed stage does not go on in the background (Linux).

    Not SIGTERM: Snakemake's handler of it takes a lock that the interrupted thread may hold, and then waits for ever.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def stop(process):
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
