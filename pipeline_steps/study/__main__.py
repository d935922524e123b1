"""Runs a study: every run of conf/study/<name>.yaml through the pipeline's stages, on all cores or on a cluster.

    python -m pipeline_steps.study NAME [--cores 2] [--gpus 0] [--dry-run]
    make study name=NAME STUDY_OPTIONS="--cores 2"

What runs share (backbones, data, earlier stages) is made once, also across studies. Snakemake runs the jobs
(workflow/rules/study.smk; SNAKEMAKE_PROFILE chooses a profile, such as slurm). Runs are collected into
reports/study/NAME/ as they end: runs.csv, items.parquet, and in the end README.md with comparisons and runs.png.
A failed job does not stop the others. Interrupted or killed, the same command continues. Jobs live in
${RUN_SCRATCH:-.}/.scratch/study/jobs; cost at the embedded scale: six to ten minutes of one core per run.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.live import Live

from pipeline_steps.common.errors import UserError, run_main
from pipeline_steps.common.files import exclusive, write_json
from pipeline_steps.common.params import ROOT
from pipeline_steps.common.processes import ends_with_this_process
from pipeline_steps.common.snakemake import LOG, cancel_leftover_jobs, snakemake_profile, stop
from pipeline_steps.study import progress
from pipeline_steps.study.collect import check_earlier, collect
from pipeline_steps.study.design import read_study, seeds_of
from pipeline_steps.study.job import VISIBLE, visible_devices
from pipeline_steps.study.plan import COMMITTED, RESULTS, checked_out, make_plan, uncommitted
from pipeline_steps.study.results import power_warning
from pipeline_steps.study.summary import write_summary

INTERVAL = 2.0  # seconds between two views of the jobs
DEVICES = {"training": "common", "backbones": "embedded"}  # sections of the parameters that name a device


def main():
    arguments = read_arguments()
    console = Console(soft_wrap=True)
    study = read_study(arguments.name)
    if is_local():
        visible_devices(arguments.gpus)  # UserError before anything runs
    studies = Path(os.environ.get("RUN_SCRATCH") or ROOT).resolve() / ".scratch" / "study"
    results = ROOT / RESULTS / arguments.name
    problem = uncommitted() if arguments.dry_run else ""
    plan = make_plan(arguments.name, study, commit=checked_out() if arguments.dry_run else None)
    flops, other = check_earlier(plan, results)
    plan = make_plan(arguments.name, study, flops, plan) if plan.waiting else plan
    if not arguments.gpus and not is_local():
        check_without_gpus(plan)
        console.print("No job asks the cluster for a GPU, so device auto is the CPU. With --gpus N, jobs get one each.")
    if other:
        console.print(
            f"{results / 'runs.csv'} has {len(other)} run(s) of another version or with other parameters "
            f"({', '.join(other[:3])}): each row stays until its run is repeated"
        )
    cores = arguments.cores or len(os.sched_getaffinity(0))
    if arguments.dry_run:
        show_plan(study, plan, chosen_part(plan, study, arguments), studies, cores, console)
        if problem:
            console.print(f"{problem} The study cannot run before these are {COMMITTED}.", markup=False)
        return 0
    folder = studies / plan.study
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive(folder / "lock", f"the study {plan.study} is running already ({folder}): wait for it or stop it"):
        while True:
            todo = chosen_part(plan, study, arguments)
            write_json(folder / "plan.json", todo.as_dict())
            for job in todo.jobs.values():
                (studies / job.folder / "failed.json").unlink(missing_ok=True)
            code = run_jobs(plan, todo, studies, results, arguments, cores, console)
            following = (
                make_plan(arguments.name, study, check_earlier(plan, results)[0], plan) if plan.waiting else plan
            )
            if len(following.runs) == len(plan.runs):
                break
            plan = following  # budgets of equal FLOPs are known now
    return report_end(study, plan, todo, studies, results, code, console)


def check_without_gpus(plan):
    """UserError if the parameters of a run ask for a GPU, which no job would get from the cluster."""
    for run in plan.runs:
        for section, part in DEVICES.items():
            if run.parameters[section][part]["device"] == "cuda":
                raise UserError(
                    f"{run.name}: {section}.{part}.device is cuda, but no job asks the cluster for a GPU. "
                    "Add --gpus N: one GPU per job, N jobs at a time"
                )


def show_plan(study, plan, todo, studies, cores, console):
    """Prints the runs and the expected time."""
    found, costs = progress.states(todo, studies), progress.measure_costs(plan, studies)
    console.print(study.question)
    console.print(progress.run_table(todo, found, costs))
    seconds, num_unknown = progress.total_seconds(todo, found, costs)
    share = progress.format_time(seconds / cores)
    unknown = f", without {num_unknown} jobs of pretrained networks that have not run here" if num_unknown else ""
    console.print(f"Expected: {progress.format_time(seconds)} on one core, about {share} on {cores}{unknown}.")
    if plan.waiting:
        console.print(f"{len(plan.waiting)} more run(s), of equal FLOPs, are planned when those they follow are done.")
    if (warning := power_warning(study)) is not None:
        console.print(warning)


def read_arguments():
    parser = argparse.ArgumentParser(description="Run a study of conf/study.")
    parser.add_argument("name", help="file name in conf/study, without .yaml")
    parser.add_argument("--cores", type=int, help="jobs at a time on this machine (default: its cores)")
    parser.add_argument("--gpus", type=int, default=0, help="jobs at a time that have a GPU, each its own (default: 0)")
    parser.add_argument("--arms", nargs="+", help="run only these arms now (default: all)")
    parser.add_argument("--budgets", nargs="+", help="run only these budgets now (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, help="run only these training seeds now (default: all)")
    parser.add_argument("-n", "--dry-run", action="store_true", help="show the runs and their cost, run nothing")
    arguments = parser.parse_args()
    for option, least in (("cores", 1), ("gpus", 0)):
        if (value := getattr(arguments, option)) is not None and value < least:
            parser.error(f"--{option}: expected a number of at least {least}, found {value}")
    return arguments


def chosen_part(plan, study, arguments):
    """The part of a `Plan` that the runs with the arms, budgets and seeds of the options need. UserError for an unknown
    name, and if there is no such run."""
    seeds = {entry.training for arm in study.arms for entry in seeds_of(study, arm)}
    known = {"arms": study.arms, "budgets": study.budgets, "seeds": sorted(seeds)}
    named = {option: names if (names := getattr(arguments, option)) is not None else known[option] for option in known}
    for option, names in named.items():
        if unknown := [str(name) for name in names if name not in known[option]]:
            raise UserError(
                f"--{option}: {plan.study} has no {', '.join(unknown)} (it has: {', '.join(map(str, known[option]))})"
            )
    runs = [
        run
        for run in plan.runs
        if run.arm in named["arms"] and run.budget in named["budgets"] and run.seeds["training"] in named["seeds"]
    ]
    if not runs:
        waiting = f". {len(plan.waiting)} run(s) of equal FLOPs wait for those that they follow" if plan.waiting else ""
        raise UserError(
            f"{plan.study} has no run with the named --arms, --budgets and --seeds: leave one option out{waiting}"
        )
    names = {name for run in runs for name in run.jobs.items()}
    return replace(plan, runs=runs, jobs={name: job for name, job in plan.jobs.items() if name in names})


def run_jobs(plan, todo, studies, results, arguments, cores, console):
    """Runs Snakemake to its end, shows the state of the jobs, collects runs as they finish; returns its exit code."""
    log = studies / plan.study / LOG
    command = snakemake_command(studies, plan.study, cores, arguments.gpus)
    console.print(f"log: {log}")
    console.out(shlex.join(command), highlight=False)  # to run it by hand
    cancel_leftover_jobs(log.parent)
    with open(log, "w") as output:
        process = subprocess.Popen(ends_with_this_process(command), stdout=output, stderr=subprocess.STDOUT)
        try:
            show_until_end(process, plan, todo, studies, results, cores, console)
        finally:
            if process.poll() is None:
                stop(process)
                cancel_leftover_jobs(log.parent)
    return process.returncode


def snakemake_command(studies, name, cores, gpus):
    """The words of the command that runs the jobs of `studies`/<name>/plan.json, with what it needs of this process's
    environment: it works in any folder and shell."""
    command = ["env", "-u", "SNAKEMAKE_PROFILE"]  # --profile has its value; Snakemake in a job must not read it again
    if VISIBLE in os.environ:
        command.append(f"{VISIBLE}={os.environ[VISIBLE]}")
    command += [sys.executable, "-m", "snakemake", "study", "--snakefile", ROOT / "workflow" / "Snakefile"]
    command += ["--directory", studies, "--profile", snakemake_profile(), "--workflow-profile", "none"]
    command += ["--nolock", "--rerun-triggers", "mtime", "--ignore-incomplete", "--keep-going"]
    if is_local():
        command += ["--cores", cores]
    if gpus:
        command += ["--resources", f"gpu={gpus}"]
    slots = gpus if is_local() else 0  # a cluster assigns GPUs itself
    command += ["--config", f"python={sys.executable}", f"root={ROOT}", f"plan={name}/plan.json"]
    command += [f"gpus={gpus}", f"slots={slots}"]
    return [str(word) for word in command]


def is_local():
    return Path(snakemake_profile()).name == "default"


def show_until_end(process, plan, todo, studies, results, cores, console):
    shown, finished = None, None
    with Live(console=console, auto_refresh=False, transient=False) as live:
        running = True
        while running:
            running = process.poll() is None
            found = progress.states(todo, studies)
            if (number := progress.num_finished(todo, found)) != finished:
                finished = number
                try:
                    collect(plan, studies, results)
                except UserError as error:  # the other runs go on; the end reports it again
                    console.print(f"not collected: {error}", markup=False)
            if found != shown or console.is_terminal:
                shown = found
                table = progress.stage_table(todo, found, progress.measure_costs(plan, studies), cores)
                if console.is_terminal:
                    live.update(table, refresh=True)
                else:
                    console.print(one_line(todo, found, table.caption))
            if running:
                time.sleep(INTERVAL)


def one_line(plan, found, caption):
    """The state of the study for a log file."""
    values = list(found.values())
    counts = ", ".join(f"{values.count(state)} {state}" for state in progress.STATES)
    done = f"{progress.num_finished(plan, found)}/{len(plan.runs)} runs"
    return f"{time.strftime('%H:%M:%S')} {done}; jobs: {counts}; {caption}"


def report_end(study, plan, todo, studies, results, code, console):
    """Prints the results and every failure; returns the exit code: 1 if something is missing."""
    table = collect(plan, studies, results)
    if table is not None:
        columns = ["run", "mean_token_accuracy", "exact_match_accuracy", "mean_loss", "converged"]
        console.print(table[columns].to_string(index=False, float_format="%.3f"))
        summary = write_summary(plan.study, study)
        console.print(f"{len(table)} of {len(plan.runs) + len(plan.waiting)} runs: {results / 'runs.csv'}, {summary}")
        console.print("`dvc repro` adds them to reports/report.html")
    failed = progress.failures(todo, studies)
    for text in failed:
        console.print(text, markup=False)
    if code and not failed:
        lines = (studies / plan.study / LOG).read_text(errors="replace").splitlines()
        end = " / ".join(line.strip() for line in lines[-5:] if line.strip())
        raise UserError(f"snakemake ended with exit code {code}: {end} (log: {studies / plan.study / LOG})")
    missing = progress.num_finished(todo, progress.states(todo, studies)) < len(todo.runs)
    return 1 if failed or missing or (plan.waiting and todo.runs == plan.runs) else 0


if __name__ == "__main__":
    run_main(main)
