"""What a study has done, what it is doing, and how long the rest will take."""

import fcntl
import json
import math
from collections import Counter
from dataclasses import dataclass
from functools import cache
from statistics import median

from rich.table import Table

from pipeline_steps.common.hashing import fingerprint
from pipeline_steps.common.params import ROOT, TRAINING_STAGES
from pipeline_steps.common.study_results import SEEDS
from pipeline_steps.report.studies import read_runs
from pipeline_steps.study.design import STUDIES, read_study, total_samples
from pipeline_steps.study.plan import RESULTS, folder_of

DONE, FAILED, RUNNING, WAITING = "done", "failed", "running", "waiting"
STATES = (DONE, RUNNING, WAITING, FAILED)
# Seconds on one core at the embedded scale, for stages that have not run here yet; training: per sample
FIRST_GUESS_PER_SAMPLE = 0.0055
FIRST_GUESS = {"backbones": 120, "sources": 20, "shards": 15, "tokens": 15, "evaluation": 60, "flops": 10}
FIRST_GUESS |= {"training": FIRST_GUESS_PER_SAMPLE}


@dataclass(frozen=True)
class Costs:
    """Expected seconds of jobs."""

    # {(kind of work, network or None for any): median per amount}, see work_of; for any: at the cost of the default
    measured: dict[tuple[str, str | None], float]
    relative: dict[tuple[str, str], float]  # {(stage, key): a sample's cost in kept studies, relative to the default}

    def seconds(self, job):
        """Expected seconds of a `Job`: those of its stage for its network, else for any network, else a first guess,
        the last two times what the job's arm costs relative to the default in kept studies, if it was run in one.
        NaN for the training and evaluation of a pretrained network that was not measured: others say nothing of it."""
        kind, amount = work_of(job)
        of_network = kind in ("training", "evaluation") and job.parameters["backbones"]["kind"] != "embedded"
        if of_network and (kind, network_of(job)) not in self.measured:
            return math.nan
        guess = self.measured.get((kind, None), FIRST_GUESS.get(kind, 60)) * self.relative.get((job.stage, job.key), 1)
        return amount * self.measured.get((kind, network_of(job)), guess)


def work_of(job):
    """(kind, amount): a training stage's work is its samples, whichever stage it is; of others, the job is the unit."""
    if job.stage in TRAINING_STAGES:
        return "training", job.parameters["training"][job.stage]["num_samples"]
    return job.stage, 1


def network_of(job):
    """Identifies what the time of a sample depends on: the network, its sizes and those of its inputs."""
    backbones = job.parameters["backbones"]
    embedded = {name: value for name, value in backbones["embedded"].items() if name != "seed"}
    return fingerprint(
        job.parameters["model"], backbones | {"embedded": embedded}, job.parameters["shards"]["image_size"]
    )


def measure_costs(plan, studies):
    """`Costs` from the jobs of the plan that are done in the folder `studies`."""
    found, relative = {}, {}
    for run in plan.runs:
        cost = relative_costs().get(tuple(run.overrides), 1.0)
        relative |= {(stage, run.jobs[stage]): cost for stage in TRAINING_STAGES if stage in run.jobs}
    for name, job in plan.jobs.items():
        path = studies / job.folder / "done.json"
        if path.exists():
            seconds, (kind, amount) = json.loads(path.read_text())["seconds"], work_of(job)
            found.setdefault((kind, network_of(job)), []).append(seconds / amount)
            found.setdefault((kind, None), []).append(seconds / amount / relative.get(name, 1.0))
    return Costs({key: median(values) for key, values in found.items()}, relative)


@cache
def relative_costs(results=ROOT / RESULTS):
    """{overrides of an arm: its training seconds per sample, relative to an arm without overrides}: the median over the
    kept runs of all studies that have one of both arms with the same seeds. Of resumed runs the seconds are unknown."""
    found = {}
    for path in sorted(results.glob("*/runs.csv")):
        if not (STUDIES / f"{path.parent.name}.yaml").exists():
            continue
        arms, own = read_study(path.parent.name).arms, {}
        for row in read_runs(path).to_dict("records"):
            if row["attempts"] == 1 and row["arm"] in arms:
                key = (arms[row["arm"]].overrides, *(row[name] for name in SEEDS))
                own.setdefault(key, []).append(row["training_seconds"] / row["training_samples"])
        for (overrides, *seeds), values in own.items():
            if ((), *seeds) in own:
                found.setdefault(overrides, []).append(median(values) / median(own[(), *seeds]))
    return {overrides: median(values) for overrides, values in found.items()}


def states(plan, studies):
    """{(stage, key): one of STATES} of the plan's jobs."""
    return {name: state_of(studies / job.folder) for name, job in plan.jobs.items()}


def state_of(folder):
    if (folder / "done.json").exists():
        return DONE
    if is_locked(folder / "lock"):
        return RUNNING
    return FAILED if (folder / "failed.json").exists() else WAITING


def is_locked(path):
    """Whether another process holds the lock on this file."""
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def stage_table(plan, found, costs, num_parallel):
    """`rich` table of the jobs by stage and state, with the expected time left on `num_parallel` cores."""
    left = [costs.seconds(job) for name, job in plan.jobs.items() if found[name] in (RUNNING, WAITING)]
    done = num_finished(plan, found)
    title = f"study {plan.study}: {done} of {len(plan.runs)} runs done"
    seconds, num_unknown = total_of(left)
    unknown = f", and {num_unknown} jobs of unknown cost" if num_unknown else ""
    table = Table(title=title, caption=f"about {format_time(seconds / num_parallel)} left{unknown}")
    for column in ("stage", *STATES):
        table.add_column(column, justify="left" if column == "stage" else "right")
    counts = {}
    for (stage, _), state in found.items():
        counts.setdefault(stage, Counter())[state] += 1
    for stage, states_of_stage in counts.items():
        table.add_row(stage, *(str(states_of_stage[state] or "") for state in STATES))
    return table


def run_table(plan, found, costs):
    """`rich` table of the runs with the seconds that each adds: what it shares with a run above it counts there."""
    table = Table(title=f"study {plan.study}: {len(plan.runs)} runs, {len(plan.jobs)} jobs")
    table.add_column("run", overflow="fold")  # whole names, over several lines if need be
    for column in ("samples", "jobs to do", "shared", "expected time on one core"):
        table.add_column(column, justify="right")
    counted = set()
    for run in plan.runs:
        todo = [name for name in run.jobs.items() if found[name] != DONE]
        own = [name for name in todo if name not in counted]
        counted |= set(own)
        seconds = sum(costs.seconds(plan.jobs[name]) for name in own)
        samples = f"{total_samples(run.parameters):,}"
        table.add_row(run.name, samples, str(len(own)), str(len(run.jobs) - len(own)), format_time(seconds))
    return table


def num_finished(plan, found):
    return sum(all(found[name] == DONE for name in run.jobs.items()) for run in plan.runs)


def total_seconds(plan, found, costs):
    """(expected seconds, on one core, of all that is not done and whose cost is known; number of other jobs)."""
    return total_of([costs.seconds(job) for name, job in plan.jobs.items() if found[name] != DONE])


def total_of(seconds):
    """(sum of those that are known, number of the others)."""
    known = [value for value in seconds if not math.isnan(value)]
    return sum(known), len(seconds) - len(known)


def failures(plan, studies):
    """One text per failed job: which runs need it, why it failed, the last lines of its log and where the log is."""
    texts = []
    for (stage, key), job in plan.jobs.items():
        folder = studies / folder_of(stage, key)
        if state_of(folder) != FAILED:
            continue
        record = json.loads((folder / "failed.json").read_text())
        runs = [run.name for run in plan.runs if run.jobs.get(stage) == key]
        lines = "\n".join(f"    {line}" for line in record["last_lines"])
        listed = ", ".join(runs[:3]) + (f" and {len(runs) - 3} more" if len(runs) > 3 else "")
        texts.append(f"{job.stage} of {listed} failed ({record['reason']}); log: {folder / 'log.txt'}\n{lines}")
    return texts


def format_time(seconds):
    """Such as '45 s', '12 min' or '3 h 20 min'; 'unknown' for NaN."""
    if math.isnan(seconds):
        return "unknown"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
