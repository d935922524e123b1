"""Pretrained backbones on the world of objects: data, training, evaluation and a table of arms and seeds.

    python -m benchmarks.natural --cutouts CUTOUTS                              arms none, A6 and B1 on a GPU
    python -m benchmarks.natural --cutouts CUTOUTS --minutes 9.5                a piece: repeat until it says "finished"
    python -m benchmarks.natural --cutouts CUTOUTS --preset cpu --arms none A6  112 px, 3,200 samples, one core

Needs the backbones of `make pretrained` (--pretrained names another folder with vision_encoder and language_model) and
a folder of cut-outs (docs/world_objects.md; without --cutouts the photographs of tuxpaint are downloaded). The recipe
is conf/data/objects.yaml or objects_cpu.yaml; --set changes single parameters. The text-only samples are --chats, a
.jsonl (without it: the language model's own answers, which the first run makes and keeps in the user's cache).

The stages run as `python -m pipeline_steps.<stage>`, each in a folder of its own below --output; what arms share is
made once. Killed, stopped by --minutes or by Ctrl-C, the same command continues: chats, training and shards where they
were, other stages from their start; one of these that --minutes stopped twice is an error. Results, in
--output/results: runs.csv and items.parquet as of a study, scores.json (learning curves, accuracy with blind and
chance, gaze against chance), scores.md with its tables, and heatmaps of every run.
--keep NAME copies them to reports/study/NAME, which the report shows, with comparisons of the arms as in any study and
heatmap.png, a clip of the first run.

Before anything runs, `--dry-run` with the same arguments lists the jobs with samples, training FLOPs and minutes at a
stated rate, and what to copy to a bare machine (benchmarks/natural_cost.py). It makes no chats: where they are missing
it says how to make them. Neither DVC nor Snakemake is used. Parameters are composed with Hydra; on a machine without
it, copy plan.json, which `--dry-run` writes, into --output. Making data needs PyAV, ImageHash and SciPy; training and
evaluation need torch, transformers, Pillow, pydantic, pyarrow, PyYAML, simplejpeg and pandas; heatmaps, left out where
it is missing, Matplotlib; --keep Matplotlib and SciPy.
Cost: meant for 25 minutes of one H100 for three arms and one seed (not measured yet); on a CPU about an hour an arm.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from benchmarks.natural_chats import check_chats, made_later, make_chats, own_chats_path
from benchmarks.natural_plan import HEATMAPS, PRESETS, check_arms, make_plan
from benchmarks.natural_results import check_kept_name, keep, write_results
from pipeline_steps.backbones.pretrained import cache_folder, default_output
from pipeline_steps.common.errors import UserError, run_main
from pipeline_steps.common.files import exclusive, write_json
from pipeline_steps.common.params import MAX_SEED, ROOT, TRAINING_STAGES
from pipeline_steps.common.processes import ends_with_this_process
from pipeline_steps.study import job as study_job
from pipeline_steps.study.plan import Plan, folder_of
from pipeline_steps.world.cutouts import SPLITS, different, read_folder

RESUMED = (*TRAINING_STAGES, "shards")  # stages that continue where they were stopped
DEVICES = {"gpu": "cuda", "cpu": "cpu"}
OPTIONS = {"seed": "--seeds", "ablation": "--arms", "data": "--preset"}  # that set parameters of every run
STOPPED = 75  # exit code (EX_TEMPFAIL): not finished, run the same command again
GRACE = 45.0  # seconds that stages get to save their state


class Stop(Exception):
    """SIGTERM was received."""


def run_jobs(plan: Plan, output: Path, num_jobs: int, device: str, end: float | None) -> bool:
    """Runs what is not done, `num_jobs` at a time, until `end` (of time.monotonic). Returns whether all is done.
    UserError if a job fails; the others are stopped."""
    running: dict[tuple[str, str], tuple[subprocess.Popen, float]] = {}
    try:
        while waiting := [job for job in plan.jobs.values() if not is_done(job, output)]:
            for key, (process, started) in list(running.items()):
                if process.poll() is not None:
                    del running[key]
                    finish(plan.jobs[key], output, process.returncode, started, plan.commit)
            for job in waiting:
                key = (job.stage, job.key)
                ready = all(is_done(plan.jobs[before], output) for before in job.inputs.values())
                if len(running) < num_jobs and ready and key not in running and not is_done(job, output):
                    running[key] = start(job, output, device), time.monotonic()
            if end is not None and time.monotonic() > end:
                for key, (_, started) in running.items():
                    record_stop(plan.jobs[key], output, time.monotonic() - started)
                return False
            time.sleep(0.5)
        return True
    finally:
        stop(process for process, _ in running.values())
        for key, (process, started) in running.items():
            if process.returncode == 0:  # it was at its end
                finish(plan.jobs[key], output, 0, started, plan.commit)


def is_done(job, output: Path) -> bool:
    return (output / folder_of(job.stage, job.key) / "done.json").exists()


def stops_of(job, output: Path) -> list[float]:
    """Seconds after which --minutes stopped the job, one value for each time."""
    path = output / folder_of(job.stage, job.key) / "stopped.json"
    return json.loads(path.read_text()) if path.exists() else []


def record_stop(job, output: Path, seconds: float) -> None:
    folder = output / folder_of(job.stage, job.key)
    write_json(folder / "stopped.json", [*stops_of(job, output), round(seconds, 1)])


def check_minutes(plan: Plan, output: Path, seconds: float) -> None:
    """UserError if `seconds` are too few for a job that starts over each time: it was stopped twice, at least once
    after about as long."""
    for job in plan.jobs.values():
        stops = stops_of(job, output)
        if job.stage in RESUMED or is_done(job, output) or len(stops) < 2 or seconds > 1.1 * max(stops):
            continue
        raise UserError(
            f"--minutes stopped {job.stage} {len(stops)} times, after up to {max(stops):.0f} s "
            f"({output / folder_of(job.stage, job.key)}): it starts over each time, so it would never end. Give more "
            f"than --minutes {(1.1 * max(stops) + GRACE) / 60:.1f}, or leave --minutes out."
        )


def start(job, output: Path, device: str) -> subprocess.Popen:
    """Starts a stage in its folder, as `pipeline_steps.study.job` does; stdout and stderr go to its log.txt."""
    folder = output / folder_of(job.stage, job.key)
    folder.mkdir(parents=True, exist_ok=True)
    study_job.prepare(asdict(job), folder, output)
    words = shlex.split(job.command)[1:]
    if job.stage == "shards":
        words += ["--processes", str(len(os.sched_getaffinity(0)))]
    variables = study_job.environment(folder)
    if device == "cpu":
        variables["CUDA_VISIBLE_DEVICES"] = ""
    print(f"{time.strftime('%H:%M:%S')} {job.stage} {job.parameters['ablation']}: {folder}/log.txt", flush=True)
    with open(folder / "log.txt", "a") as log:
        command = [sys.executable, *words]
        return subprocess.Popen(
            ends_with_this_process(command), cwd=folder, env=variables, stdout=log, stderr=subprocess.STDOUT
        )


def finish(job, output: Path, code: int, started: float, commit: str) -> None:
    """Records a job's end in done.json. UserError with the end of its log if it failed."""
    folder = output / folder_of(job.stage, job.key)
    missing = [path for path in job.outs if not (folder / path).exists()]
    if code or missing:
        lines = (folder / "log.txt").read_text(errors="replace").replace("\r", "\n").splitlines()
        tail = " / ".join([line for line in lines if line.strip()][-5:])
        reason = f"exit code {code}" if code else f"not written: {', '.join(missing)}"
        raise UserError(f"{job.stage} failed, {reason}: {tail} (log: {folder}/log.txt)")
    record = {"commit": commit, "seconds": round(time.monotonic() - started, 1)}
    write_json(folder / "done.json", record | {"attempts": study_job.count_attempt(folder, add=0)})


def stop(processes: Iterable[subprocess.Popen]) -> None:
    """Asks the processes to end, which training stages do after saving their state; kills them after GRACE."""
    processes = list(processes)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    end = time.monotonic() + GRACE
    for process in processes:
        try:
            process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=["none", "A6", "B1"], metavar="ARM", help="names in conf/ablation")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], metavar="SEED", help="of training and data")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="gpu")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: as the preset is called")
    parser.add_argument("--jobs", type=int, help="stages side by side (default: 3 on a GPU, else 1)")
    parser.add_argument("--minutes", type=float, help="stop and save after this time; run again to continue")
    parser.add_argument("--cutouts", type=Path, help="folder of cut-outs (default: tuxpaint's, in the user's cache)")
    parser.add_argument("--backgrounds", type=Path, help="folder of photographs (default: textures)")
    parser.add_argument("--chats", type=Path, help=".jsonl of text-only chats (default: the language model's own)")
    parser.add_argument("--pretrained", type=Path, default=default_output(), help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="default: outputs/natural/PRESET")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="Hydra overrides of every run")
    parser.add_argument("--keep", metavar="NAME", help="copy the results to reports/study/NAME")
    parser.add_argument("--dry-run", action="store_true", help="write plan.json; list jobs, cost and what to copy")
    parser.add_argument("--rate", type=float, metavar="FLOPS", help="FLOP/s of training, for the minutes of --dry-run")
    arguments = parser.parse_args()
    arguments.device = arguments.device or DEVICES[arguments.preset]
    if arguments.jobs is None:
        arguments.jobs = 3 if arguments.device == "cuda" else 1
    arguments.output = (arguments.output or ROOT / "outputs" / "natural" / arguments.preset).resolve()
    return arguments


def command_of(arguments) -> str:
    """The command that makes these results, without what is of one machine: paths, --jobs, --minutes."""
    words = ["python", "-m", "benchmarks.natural", "--preset", arguments.preset, "--arms", *arguments.arms]
    words += ["--seeds", *map(str, arguments.seeds)]
    if arguments.device != DEVICES[arguments.preset]:
        words += ["--device", arguments.device]
    for name in ("cutouts", "backgrounds", "chats"):
        if getattr(arguments, name) is not None:
            words += [f"--{name}", name.upper()]
    words += ["--set", *arguments.set] if arguments.set else []
    return shlex.join([*words, "--keep", arguments.keep] if arguments.keep else words)


def check_arguments(arguments) -> None:
    """UserError, before anything is made."""
    for option, value in (("rate", arguments.rate), ("minutes", arguments.minutes), ("jobs", arguments.jobs)):
        if value is not None and not value > 0:
            raise UserError(f"--{option} is {value:g}, expected a number above 0")
    if arguments.minutes is not None and 60 * arguments.minutes <= GRACE:
        raise UserError(
            f"--minutes is {arguments.minutes:g}, expected more than {GRACE / 60:g}: the last {GRACE:g} seconds are "
            "for saving"
        )
    if wrong := [seed for seed in arguments.seeds if not 0 <= seed <= MAX_SEED]:
        raise UserError(f"--seeds: {wrong[0]}, expected whole numbers from 0 to {MAX_SEED}")
    for option, values in (("arms", arguments.arms), ("seeds", arguments.seeds)):
        if len(set(values)) < len(values):
            raise UserError(f"--{option} {' '.join(map(str, values))}: expected each once")
    for override in arguments.set:
        if option := OPTIONS.get(override.partition("=")[0].lstrip("+")):
            raise UserError(f"--set {override}: {option} sets this. Give {option} instead.")
    check_arms(arguments.arms)
    if arguments.keep:
        check_kept_name(arguments.keep)
    if arguments.device == "cuda" and not arguments.dry_run:
        import torch

        if not torch.cuda.is_available():
            raise UserError("torch finds no CUDA device. On a CPU run with --preset cpu.")


def find_inputs(arguments) -> None:
    """Fills in --cutouts and, where they were made before, --chats. UserError for what is missing or unusable."""
    for role in ("language_model", "vision_encoder"):
        if not (arguments.pretrained / role).is_dir():
            raise UserError(f"{arguments.pretrained}: no {role} there. Run `make pretrained`.")
    if arguments.chats is not None:
        check_chats(arguments.chats)
    if arguments.backgrounds is not None:
        count = len(different(read_folder(arguments.backgrounds, "--backgrounds")))
        if count < len(SPLITS):
            raise UserError(
                f"--backgrounds {arguments.backgrounds}: {count} different picture(s), expected at least "
                f"{len(SPLITS)}, add some."
            )
    if arguments.cutouts is None:
        arguments.cutouts = cache_folder() / "tuxpaint"
        if not (arguments.cutouts / "metadata.jsonl").exists():
            from pipeline_steps.world import tuxpaint

            print(f"{arguments.cutouts}: downloading {tuxpaint.PACKAGE}", flush=True)
            tuxpaint.build(arguments.cutouts, None)
    read_folder(arguments.cutouts, "--cutouts")
    if arguments.chats is None and (made := own_chats_path(arguments.pretrained)).exists():
        arguments.chats = made


def main() -> int:
    arguments = read_arguments()
    began = time.monotonic()
    command = command_of(arguments)
    check_arguments(arguments)
    find_inputs(arguments)
    plan = make_plan(arguments)
    if arguments.chats is None and not arguments.dry_run:
        arguments.chats = make_chats(arguments.pretrained, arguments.device)
        plan = make_plan(arguments)
    left = [job for job in plan.jobs.values() if not is_done(job, arguments.output)]
    print(f"{arguments.output}: {len(plan.runs)} runs, {len(left)} of {len(plan.jobs)} jobs to do", flush=True)
    if HEATMAPS not in {stage for stage, _ in plan.jobs}:
        print("no heatmaps: Matplotlib is not installed", flush=True)
    if arguments.dry_run:
        from benchmarks.natural_cost import describe  # imports what makes data, which a bare machine may lack

        print(describe(plan, left, arguments, arguments.rate))
        if arguments.chats is None:
            print(made_later(arguments.pretrained))
        return 0
    arguments.output.mkdir(parents=True, exist_ok=True)
    busy = f"--output {arguments.output}: another process of this benchmark is at work there: wait for it or stop it"
    with exclusive(arguments.output / "lock", busy):
        return run(arguments, plan, began, command)


def run(arguments, plan: Plan, began: float, command: str) -> int:
    """Runs the plan, collects what is finished and returns the exit code. began: of time.monotonic."""
    signal.signal(signal.SIGTERM, _raise_stop)
    end = seconds = None
    if arguments.minutes is not None:
        end = began + 60 * arguments.minutes - GRACE
        seconds = end - time.monotonic()
        check_minutes(plan, arguments.output, seconds)
    try:
        is_finished = run_jobs(plan, arguments.output, arguments.jobs, arguments.device, end)
    except (KeyboardInterrupt, Stop):
        is_finished = False
    names = write_results(plan, arguments.output)
    print(f"{len(names)} of {len(plan.runs)} runs: {arguments.output / 'results'}")
    if arguments.keep and names:
        print(f"kept in {keep(plan, arguments.output, arguments.keep, command)}")
    if not is_finished and seconds is not None:
        check_minutes(plan, arguments.output, seconds)
    print("finished" if is_finished else "stopped: run the same command to continue")
    return 0 if is_finished else STOPPED


def _raise_stop(*_):
    raise Stop


if __name__ == "__main__":
    run_main(main)
