"""From the cells of a study to jobs: one job per stage and distinct input, so that what cells share is made once.

A job's key is a hash of everything that its result depends on, as dvc.yaml lists it for the stage: command, parameters,
code and the keys of the jobs whose outputs it reads. Equal work has equal keys, within a study and across studies.
"""

import subprocess
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import PurePosixPath

import yaml

from pipeline_steps.common.errors import UserError
from pipeline_steps.common.hashing import fingerprint
from pipeline_steps.common.params import ROOT, TRAINING_STAGES
from pipeline_steps.study.design import (
    cells_of,
    check_tasks,
    parameters_of,
    split_of,
    with_factors,
)

TARGETS = ("evaluation", "flops")  # the stages whose results a study collects
INIT_FROM = "${training.init_from}"  # a dependency in dvc.yaml
BACKBONES = "data/backbones"  # what it stands for in a study
NOT_RUN = "parameters"  # checks params.yaml; a plan checks the parameters of every cell itself
LIBRARIES = (
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "pillow",
    "av",
    "scikit-learn",
)  # results may depend on them
RESULTS = "reports/study"  # may differ from the commit: a study writes there
COMMITTED = "committed, stashed (`git stash -u`) or ignored"


@dataclass(frozen=True)
class Stage:
    """A stage of dvc.yaml."""

    name: str
    command: str
    params: tuple[str, ...]
    code: tuple[str, ...]  # paths in the repository
    inputs: dict[str, str]  # {output of another stage: that stage}
    outs: tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """One run of a stage."""

    stage: str
    key: str
    command: str
    parameters: dict
    inputs: dict[str, tuple[str, str]]  # {path: (stage, key) of the job that writes it}
    code: dict[str, str]  # {path: git's hash of its content}
    outs: tuple[str, ...]
    num_threads: int = 1

    @property
    def folder(self):
        """Relative to the folder of all studies."""
        return folder_of(self.stage, self.key)


@dataclass
class Run:
    """A cell with its jobs."""

    name: str
    arm: str
    budget: str
    seeds: dict[str, int]
    parameters: dict
    jobs: dict[str, str]  # {stage: key}
    overrides: list[str] = field(default_factory=list)  # of the arm, without those of the study


@dataclass
class Plan:
    study: str
    commit: str
    runs: list[Run] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)  # runs whose samples follow from others that are not finished
    jobs: dict[tuple[str, str], Job] = field(default_factory=dict)  # in an order in which they can run
    code: dict[str, str] = field(default_factory=dict)  # of the whole commit
    memory_gb: float = 4.0  # of a job on a cluster

    def as_dict(self):
        """Plain data, for the workflow."""
        jobs = [asdict(job) for job in self.jobs.values()]
        runs, memory_mb = [asdict(run) for run in self.runs], round(1000 * self.memory_gb)
        return {"study": self.study, "commit": self.commit, "memory_mb": memory_mb, "runs": runs, "jobs": jobs}


def folder_of(stage, key):
    return f"jobs/{stage}/{key}"


def make_plan(name, study, flops=None, before=None, commit=None):
    """`Plan` of a `Study`; flops: {run: training FLOPs} of finished runs, for budgets of equal FLOPs; before: a plan of
    the same study, whose commit it keeps; commit: by default `clean_commit`. UserError for a cell whose parameters are
    wrong or equal another's, for arms that are scored on different splits, and for unknown tasks."""
    stages = read_stages()
    if before:
        plan = Plan(name, before.commit, code=before.code)
    else:
        plan = Plan(name, commit or clean_commit(), code=code_of_commit())
    code, plan.memory_gb = plan.code, study.memory_gb
    seen = {}
    cells, waiting = with_factors(cells_of(study), flops or {})
    plan.waiting = [cell.name for cell in waiting]
    for cell in cells:
        parameters = parameters_of(cell)
        jobs = jobs_of(stages, parameters, code)
        plan.jobs |= {(job.stage, job.key): job for job in jobs.values() if (job.stage, job.key) not in plan.jobs}
        keys = {stage: job.key for stage, job in jobs.items()}
        if (other := seen.setdefault(keys["evaluation"], cell.name)) != cell.name:
            raise UserError(
                f"{cell.name} and {other} have the same effective parameters: they are one run. Remove one of them."
            )
        overrides = list(study.arms[cell.arm].overrides)
        plan.runs.append(Run(cell.name, cell.arm, cell.budget, cell.seeds.model_dump(), parameters, keys, overrides))
    split_of(study)
    check_tasks(study)
    return plan


def jobs_of(stages, parameters, code, targets=TARGETS, libraries=None):
    """{stage: `Job`} of one cell, every job after those that it needs. targets: the last stages; libraries: {name:
    version} of what results may depend on, None: those installed."""
    if (start := parameters["training"]["init_from"]) != BACKBONES:
        raise UserError(f"training.init_from is {start!r}: the runs of a study start from {BACKBONES}. Remove it.")
    jobs, libraries = {}, libraries or {library: version(library) for library in LIBRARIES}

    def add(name):
        if name in jobs:
            return jobs[name]
        stage = stages[name]
        inputs = {path: add(maker) for path, maker in sorted(stage.inputs.items())}
        own_code = {path: content for path, content in sorted(code.items()) if is_within(path, stage.code)}
        key = fingerprint(
            name,
            stage.command,
            {path: value_of(parameters, path) for path in stage.params},
            list(own_code.items()),
            {path: job.key for path, job in inputs.items()},
            libraries,
        )
        links = {path: (job.stage, job.key) for path, job in inputs.items()}
        jobs[name] = Job(
            name, key, stage.command, parameters, links, own_code, stage.outs, threads_of(name, parameters)
        )
        return jobs[name]

    for target in targets:
        add(target)
    return jobs


def threads_of(stage, parameters):
    """Number of threads that a stage computes with."""
    places = dict.fromkeys(TRAINING_STAGES, "training.common")
    places |= {"backbones": "backbones.embedded", "evaluation": "evaluation"}
    return value_of(parameters, f"{places[stage]}.num_threads") if stage in places else 1


def value_of(parameters, dotted):
    for part in dotted.split("."):
        parameters = parameters[part]
    return parameters


def is_within(path, places):
    """Whether a path is one of `places` or lies in one of them."""
    return any(path == place or path.startswith(f"{place}/") for place in places)


@cache
def read_stages(path=ROOT / "dvc.yaml"):
    """{name: `Stage`} of dvc.yaml."""
    entries = yaml.safe_load(path.read_text(encoding="utf-8"))["stages"]
    outs = {name: tuple(paths_of(entry, "outs") + paths_of(entry, "metrics")) for name, entry in entries.items()}
    maker = {out: name for name, found in outs.items() for out in found}
    stages = {}
    for name, entry in entries.items():
        code, inputs = [], {}
        for dep in paths_of(entry, "deps"):
            dep = BACKBONES if dep == INIT_FROM else dep
            places = [dep, *map(str, PurePosixPath(dep).parents)]
            made = next((place for place in places if place in maker), None)
            if made is None:
                code.append(dep)
            elif maker[made] != NOT_RUN:
                inputs[made] = maker[made]
        stages[name] = Stage(name, entry["cmd"], tuple(entry.get("params", [])), tuple(code), inputs, outs[name])
    return stages


def paths_of(entry, kind):
    return [item if isinstance(item, str) else next(iter(item)) for item in entry.get(kind, [])]


def clean_commit():
    """The commit that is checked out. UserError if tracked or new files differ from it."""
    if problem := uncommitted():
        raise UserError(f"{problem} These have to be {COMMITTED} first.")
    return checked_out()


def checked_out():
    """The commit that is checked out, whatever differs from it."""
    return git("rev-parse", "HEAD").strip()


def uncommitted():
    """A sentence that names files that differ from the commit, new ones included but for results; "" if there are
    none."""
    changed = [line[3:] for line in git("status", "--porcelain", "--untracked-files=all").splitlines()]
    changed = [path for path in changed if not is_within(path.rstrip("/"), [RESULTS])]
    if not changed:
        return ""
    listed = ", ".join(changed[:5]) + (", ..." if len(changed) > 5 else "")
    return (
        f"{len(changed)} file(s) differ from the last commit ({listed}): a study's rows name the commit that made them."
    )


def code_of_commit():
    """{path: git's hash of its content} of all files of the commit."""
    entries = (line.split("\t", 1) for line in git("ls-tree", "-r", "-z", "HEAD").split("\0") if line)
    return {path: info.split()[2] for info, path in entries}


def check_code(code):
    """UserError if files of this checkout differ from {path: git's hash}: what was planned would not be what runs."""
    paths = list(code)
    missing = [path for path in paths if not (ROOT / path).exists()]
    found = [] if missing else git("hash-object", "--stdin-paths", given="\n".join(paths)).split()
    changed = missing or [path for path, content in zip(paths, found, strict=True) if content != code[path]]
    if changed:
        raise UserError(
            f"{len(changed)} file(s) changed since the study was planned ({', '.join(changed[:5])}). Restore them, or "
            "start the study again after committing. Long studies are best run from a clone of their own."
        )


def git(*words, given=None):
    command = ["git", *words]
    done = subprocess.run(command, cwd=ROOT, input=given, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"git {' '.join(words)} failed in {ROOT}: {done.stderr.strip()}")
    return done.stdout
