"""Studies, plans and tables of runs for the tests of studies."""

import json
import subprocess
import time

import numpy as np
import pandas as pd

from pipeline_steps.common import params
from pipeline_steps.common.params import ROOT
from pipeline_steps.study import __main__ as study_main
from pipeline_steps.study import results
from pipeline_steps.study.design import Study
from pipeline_steps.study.plan import Job, Plan, Run

TRAINING = params.load(ROOT / "params.yaml")["training"]
ALL = {"question": "Does it?", "arms": {"none": {}, "A6": {"overrides": ["ablation=A6"]}}, "seeds": [1, 2]}


def make(**changes):
    return Study.model_validate(ALL | changes, strict=False)


def small_plan(*commands, commit="c0ffee"):
    """A plan of one run per command; all need one shared job, which takes a moment."""
    first = Job("first", "k", "python -c \"open('out', 'w').write('x'); print('made')\"", {"a": 1}, {}, {}, ("out",))
    jobs, runs = {("first", "k"): first}, []
    for number, command in enumerate(commands):
        job = Job("second", f"k{number}", command, {"a": 1}, {"out": ("first", "k")}, {}, ("result",))
        jobs["second", job.key] = job
        seeds = {"training": number, "backbones": 1, "data": 1}
        runs.append(Run(f"run{number}", "none", "x1", seeds, {"a": 1}, {"first": "k", "second": job.key}))
    return Plan("mine", commit, runs=runs, jobs=jobs)


COPY = "python -c \"open('result', 'w').write(open('out').read())\""
FAIL = "python -c \"print('reading'); raise SystemExit('no digits found')\""
SLOW = "python -c \"import time; open('begun', 'a').write('.'); time.sleep(60); open('result', 'w')\""


def write_plan(made, folder):
    (folder / "mine").mkdir(exist_ok=True)
    (folder / "mine/plan.json").write_text(json.dumps(made.as_dict()))


def run_snakemake(made, folder, cores=2):
    write_plan(made, folder)
    command = study_main.snakemake_command(folder, "mine", cores, 0)
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def names_of(run):
    """{stage: (stage, key)} of a run's jobs."""
    return {stage: (stage, key) for stage, key in run.jobs.items()}


def write_record(path, **content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def curve(path, losses):
    """A stage's csv; the autoregressive mode is validated at the end only."""
    rows = [
        {"event": "validation", "step": step, "task": task, "mode": mode, "loss": loss}
        for step, loss in losses.items()
        for task in ("card", "gist")
        for mode in (("fine", "autoregressive") if step == max(losses) else ("fine",))
    ]
    pd.DataFrame([{"event": "train", "step": 1, "loss": 9.0}, *rows]).to_csv(path, index=False)
    return path


def killed(*_, **__):
    raise KeyboardInterrupt


def runs_table(seeds=8, flops=None):
    rng = np.random.default_rng(0)
    means = {"none": (0.93, 0.9), "A6": (0.36, 0.9), "B1": (0.4, 0.97)}
    rows = []
    for arm, (gaze, reading) in means.items():
        for seed in range(seeds):
            tasks = dict.fromkeys(("card", "follow"), gaze + rng.normal(0, 0.005)) | dict.fromkeys(
                ("caption", "gist"), reading + rng.normal(0, 0.005)
            )
            rows.append(
                {
                    "run": f"{arm}-{seed}",
                    "arm": arm,
                    "budget": "x1",
                    **dict.fromkeys(results.SEEDS, seed),
                    "training_samples": 60000,
                    "training_flops": (flops or {}).get(arm, 1e14),
                    "training_seconds": 300.0,
                    "attempts": 1,
                    "mean_token_accuracy": np.mean(list(tasks.values())),
                    "exact_match_accuracy": 0.6,
                    "mean_loss": 0.2,
                    **{f"accuracy_{task}": value for task, value in tasks.items()},
                    "converged": arm != "B1",
                    "commit": "c0ffee",
                    "parameters": "0",
                }
            )
    return pd.DataFrame(rows)


STUDY = make(
    arms={"none": {}, "A6": {"overrides": ["ablation=A6"]}, "B1": {"overrides": ["ablation=B1"]}},
    seeds=list(range(8)),
    groups={"gaze": ["card", "follow"], "reading": ["caption", "gist"]},
)
