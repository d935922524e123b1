"""Runs one job of a study's plan; Snakemake starts it (workflow/rules/study.smk).

    python -m pipeline_steps.study.job --studies FOLDER --plan PLAN --stage STAGE --key KEY

The job has a folder of its own: params.yaml, links to the outputs of the jobs before, what the stage writes, log.txt,
and in the end done.json or failed.json. Run again after a kill, a training stage resumes from its last checkpoint.
"""

import argparse
import fcntl
import json
import os
import shlex
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from itertools import takewhile
from pathlib import Path

import yaml

from pipeline_steps.common.errors import UserError, run_main
from pipeline_steps.common.files import write_json, write_text
from pipeline_steps.common.params import ROOT
from pipeline_steps.common.processes import ends_with_this_process
from pipeline_steps.study.plan import check_code, folder_of

LAST_LINES = 15  # of the log, kept of a failed job
VISIBLE = "CUDA_VISIBLE_DEVICES"


def main():
    arguments = read_arguments()
    plan = json.loads(arguments.plan.read_text(encoding="utf-8"))
    job = next(job for job in plan["jobs"] if (job["stage"], job["key"]) == (arguments.stage, arguments.key))
    folder = arguments.studies / folder_of(job["stage"], job["key"])
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "lock"):
        if not (folder / "done.json").exists():
            run_job(job, folder, arguments.studies, plan["commit"], arguments.gpus)


def read_arguments():
    parser = argparse.ArgumentParser(description="Run one job of a study.")
    parser.add_argument("--studies", type=Path, required=True, help="folder of all studies")
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--stage", required=True)
    parser.add_argument("--key", required=True)
    parser.add_argument("--gpus", type=int, default=0, help="slots for jobs on a GPU of this machine; 0: as it comes")
    return parser.parse_args()


def run_job(job, folder, studies, commit, gpus):
    """Runs the stage in `folder`; UserError with the log's last lines if it fails."""
    prepare(job, folder, studies)
    check_code(job["code"])
    started = time.time()
    with ExitStack() as stack:
        variables = environment(folder)
        if gpus:
            variables[VISIBLE] = stack.enter_context(free_device(studies, visible_devices(gpus)))
        log = stack.enter_context(open(folder / "log.txt", "a"))
        words = shlex.split(job["command"])
        command = [sys.executable if words[0] == "python" else words[0], *words[1:]]
        process = subprocess.Popen(
            ends_with_this_process(command), cwd=folder, env=variables, stdout=log, stderr=subprocess.STDOUT
        )
        code = wait(process)
    missing = [path for path in job["outs"] if not (folder / path).exists()]
    if code or missing:
        reason = f"exit code {code}" if code else f"not written: {', '.join(missing)}"
        lines = (folder / "log.txt").read_text(errors="replace").replace("\r", "\n").splitlines()
        tail = [line for line in lines if line.strip()][-LAST_LINES:]
        write_json(folder / "failed.json", {"reason": reason, "last_lines": tail})
        raise UserError(f"{job['stage']} ({job['key']}) failed, {reason}: {' / '.join(tail[-3:])}")
    check_code(job["code"])  # also for what was imported late
    seconds = round(time.time() - started, 1)
    write_json(folder / "done.json", {"commit": commit, "seconds": seconds, "attempts": count_attempt(folder, add=0)})


def wait(process, interval=0.5):
    """The exit code of the stage, which is stopped when the process that started this job (Snakemake) is gone."""
    parent = os.getppid()
    while True:
        try:
            return process.wait(interval)
        except subprocess.TimeoutExpired:
            if os.getppid() != parent:
                process.terminate()
                process.wait()
                raise UserError("the workflow that started this job has ended") from None


def prepare(job, folder, studies):
    """params.yaml, and links to what the jobs before have written."""
    (folder / "failed.json").unlink(missing_ok=True)
    count_attempt(folder)
    write_text(folder / "params.yaml", yaml.safe_dump(job["parameters"], sort_keys=False))
    for path, (stage, key) in job["inputs"].items():
        link, target = folder / path, (studies / folder_of(stage, key) / path).resolve()
        if not target.exists():
            raise UserError(f"{target}: missing; it is an output of {stage} ({key}). Start the study again.")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(target, link.parent.resolve()))


def count_attempt(folder, add=1):
    """How often the job was started; more than once: `seconds` is that of the last attempt only."""
    path = folder / "attempts"
    count = (int(path.read_text()) if path.exists() else 0) + add
    write_text(path, f"{count}\n")
    return count


def environment(folder):
    """This checkout's code, one thread for libraries that are not told otherwise, checkpoints in the job's folder."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RUN_SCRATCH": str(folder.resolve())}


@contextmanager
def locked(path):
    """One process at a time, also between studies that share the job."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def visible_devices(count):
    """Names of the first `count` GPUs that jobs may use: those of CUDA_VISIBLE_DEVICES, by default 0, 1 ... UserError
    if it has fewer."""
    if VISIBLE not in os.environ:
        return [str(number) for number in range(count)]
    given = os.environ[VISIBLE]
    found = list(takewhile(lambda name: name not in ("", "-1"), map(str.strip, given.split(","))))  # as CUDA reads it
    if len(found) < count:
        raise UserError(f"--gpus {count}, but {VISIBLE}={given} has {len(found)} device(s). Lower --gpus or name more")
    return found[:count]


@contextmanager
def free_device(studies, devices):
    """Yields one of these GPUs that no other job of this machine uses; waits for one."""
    with ExitStack() as stack:
        places = [studies / f"gpu{name.replace('/', '-')}.lock" for name in devices]  # of a part of a GPU: with slashes
        files = [stack.enter_context(open(place, "w")) for place in places]
        while (number := first_free(files)) is None:
            time.sleep(1)
        yield devices[number]


def first_free(files):
    """The number of the first of these open files that could be locked, else None."""
    for number, file in enumerate(files):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        return number
    return None


if __name__ == "__main__":
    run_main(main)
