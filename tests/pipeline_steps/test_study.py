"""Studies: their design, the plan of shared jobs, running it through Snakemake, and what is collected."""

import argparse
import copy
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml
from rich.console import Console

from pipeline_steps.common import metrics, params
from pipeline_steps.common.errors import UserError
from pipeline_steps.common.flop_formulas import training_step
from pipeline_steps.common.hashing import fingerprint
from pipeline_steps.common.params import ROOT
from pipeline_steps.common.study_results import StudySummary
from pipeline_steps.flops import iso, scales
from pipeline_steps.report import training_flops
from pipeline_steps.report.studies import EARLIER_FLOPS, FLOPS_NOTE, read_runs
from pipeline_steps.streaming.__main__ import PARAMS as STREAMING_PARAMS
from pipeline_steps.streaming.__main__ import count_stage
from pipeline_steps.streaming.dataset import TokenizedShards
from pipeline_steps.study import __main__ as study_main
from pipeline_steps.study import collect, design, job, plan, progress, results, summary
from pipeline_steps.study.design import Seeds, Study
from pipeline_steps.study.plan import Job, Plan, Run
from tests.pipeline_steps import packed
from tests.pipeline_steps.counted import flops_config, flops_result

TRAINING = params.load(ROOT / "params.yaml")["training"]
ALL = {"question": "Does it?", "arms": {"none": {}, "A6": {"overrides": ["ablation=A6"]}}, "seeds": [1, 2]}


def make(**changes):
    return Study.model_validate(ALL | changes, strict=False)


@pytest.fixture
def studies(tmp_path, monkeypatch):
    """A folder for conf/study."""
    monkeypatch.setattr(design, "STUDIES", tmp_path)
    monkeypatch.setattr(design, "ROOT", tmp_path)
    return tmp_path


# ---------------------------------------------------------------- design


NAMES = sorted(path.stem for path in (ROOT / "conf/study").glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_every_study_of_the_repository_can_be_read(name):
    design.read_study(name)


@pytest.mark.slow  # a third of a second per arm
@pytest.mark.parametrize("name", NAMES)
def test_every_study_of_the_repository_is_valid(name):
    study = design.read_study(name)
    cells, _ = design.with_factors(design.cells_of(study), {})
    for arm in study.arms:
        design.parameters_of(next(cell for cell in cells if cell.arm == arm))


def test_every_arm_meets_every_seed_and_budget():
    cells = design.cells_of(make(budgets={"x1": 1, "x2": 2}))
    assert [cell.name for cell in cells][:4] == [
        "none-x1-seed1.1.1",
        "none-x1-seed2.2.2",
        "none-x2-seed1.1.1",
        "none-x2-seed2.2.2",
    ]
    assert len(cells) == 8


def test_an_arm_may_have_its_own_seeds_and_budgets():
    arms = {"none": {}, "A6": {"overrides": ["ablation=A6"], "seeds": [7], "budgets": ["x2"]}}
    cells = design.cells_of(make(arms=arms, budgets={"x1": 1, "x2": 2}))
    assert [cell.name for cell in cells if cell.arm == "A6"] == ["A6-x2-seed7.7.7"]


def test_seeds_set_training_backbones_and_data():
    cell = design.cells_of(make(seeds=[{"training": 5, "backbones": 6, "data": 7}]))[0]
    found = design.parameters_of(cell)
    assert found["seed"] == 5
    assert found["backbones"]["embedded"]["seed"] == 6
    assert found["sources"]["procedural"]["seed"] == found["sources"]["chat"]["seed"] == found["shards"]["seed"] == 7


def test_a_budget_scales_the_samples_of_every_stage():
    found = [
        design.parameters_of(cell)["training"] for cell in design.cells_of(make(budgets={"x1": 1, "half": 0.5}))[::2]
    ]
    for stage in params.TRAINING_STAGES:
        assert found[1][stage]["num_samples"] == found[0][stage]["num_samples"] / 2


def test_an_arm_with_a_factor_has_that_many_samples_of_every_budget():
    arms = {"none": {}, "A6": {"overrides": ["ablation=A6"], "sample_factor": 0.25}}
    study = make(arms=arms, budgets={"x1": 1, "x2": 2, "same": {"flops_of": "x2"}}, seeds=[1])
    flops = {"none-x2-seed1.1.1": 3e14, "A6-x2-seed1.1.1": 1e14}
    ready, _ = design.with_factors(design.cells_of(study), flops)
    assert {cell.name.partition("-seed")[0]: cell.factor for cell in ready} == {
        **{"none-x1": 1, "none-x2": 2},
        **{"A6-x1": 0.25, "A6-x2": 0.5, "A6-same": 1.5},
    }


def test_an_arm_with_a_rate_factor_has_that_multiple_of_every_learning_rate():
    converging = [
        "training.stage3.schedule=converging",
        "training.stage3.converged_learning_rate={connector:0.004,vision:0.002,language:0.001}",
    ]
    arms = {"none": {"overrides": converging}, "double": {"overrides": converging, "rate_factor": 2}}
    study = make(arms=arms, seeds=[1])
    plain, double = (design.parameters_of(cell)["training"] for cell in design.cells_of(study))
    assert design.arm_parameters(study, "double")["training"]["stage2"] == double["stage2"]
    for stage in params.TRAINING_STAGES:
        for name in ("learning_rate", "converged_learning_rate"):
            rates, doubled = plain[stage].pop(name), double[stage].pop(name)
            assert doubled == (rates and {group: 2 * rate for group, rate in rates.items()})
    assert double == plain
    assert design.composed(tuple(converging))["training"]["stage3"]["converged_learning_rate"]["connector"] == 0.004


def test_equal_flops_follow_from_the_runs_at_another_budget():
    study = make(budgets={"x2": 2, "same": {"flops_of": "x2"}}, seeds=[1, 2])
    cells = design.cells_of(study)
    assert [cell.name for cell in cells if cell.budget == "same"] == ["A6-same-seed1.1.1", "A6-same-seed2.2.2"]
    ready, waiting = design.with_factors(cells, {"none-x2-seed1.1.1": 3e14, "A6-x2-seed1.1.1": 2e14})
    assert [cell.name for cell in waiting] == ["A6-same-seed2.2.2"]
    (cell,) = (cell for cell in ready if cell.budget == "same")
    assert cell.factor == 3.0
    assert design.parameters_of(cell)["training"]["stage3"]["num_samples"] == 3 * TRAINING["stage3"]["num_samples"]


def test_training_flops_set_the_samples_of_pretrained_backbones():
    study = make(arms={"big": {"overrides": ["scale=smollm2_135m"]}}, budgets={"C": {"flops": 1.6e16}}, seeds=[1])
    (cell,), waiting = design.with_factors(design.cells_of(study), {})
    assert not waiting
    config = scales.scaled("135M", design.composed(cell.overrides)["model"])
    objective = params.check("conf", design.composed(cell.overrides)).training.stage3.objective
    expected = 1.6e16 / training_step(config, iso.BUDGET_SAMPLE, objective)
    found = design.parameters_of(cell)["training"]
    samples = [found[stage]["num_samples"] for stage in params.TRAINING_STAGES]
    assert sum(samples) == pytest.approx(expected, abs=3)
    assert samples[0] == samples[1] == pytest.approx(12 * samples[2], rel=0.01)  # 1,000,000 to 83,000 as in conf/scale


@pytest.mark.parametrize(
    ("overrides", "flops", "message"),
    [
        ([], 1e16, r"arm a: budget C gives training FLOPs, which are counted for SmolLM2 of 135M, 360M, 1.7B"),
        (["scale=smollm2_135m", "shards.image_size=448"], 1e16, "DINOv2-small and frames of 224 px"),
        (["scale=smollm2_135m"], 8e11, "and each of 3 stages needs one"),
        (["scale=smollm2_135m"], 1e9, r"arm a: budget C has 1e\+09 FLOPs, but a training sample costs \d"),
    ],
)
def test_training_flops_that_cannot_be_counted_are_refused(overrides, flops, message):
    study = make(arms={"a": {"overrides": overrides}}, budgets={"C": {"flops": flops}}, seeds=[1])
    with pytest.raises(UserError, match=message):
        design.with_factors(design.cells_of(study), {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"series": {"one": ["none"], "two": ["A6", "none"]}},
            "have different numbers: one 1, two 2",
        ),
        (
            {"series": {"one": ["none"], "two": ["none"]}},
            "belongs to one place of one series, but none has several",
        ),
        ({"series": {"one": []}}, "series.one"),
        ({"series": {"one": ["none", "A7"]}}, r"series one: there is no arm A7 \(there are: none, A6\)"),
        ({"budgets": {"C": {"flops": 0}}}, "budgets.C"),
        ({"budgets": {"x1": 1, "same": {"flops_of": "x3"}}}, "budget same: flops_of is 'x3', expected one of: x1"),
        (
            {"arms": {"none": {}, "A6": {"budgets": ["same"]}}, "budgets": {"x1": 1, "same": {"flops_of": "x1"}}},
            "arm A6: budget same needs budget x1 of arm A6",
        ),
        (
            {"arms": {"none": {}, "A6": {"seeds": [9]}}, "budgets": {"x1": 1, "same": {"flops_of": "x1"}}},
            "arm A6: budget same needs seeds training=9 backbones=9 data=9 of arm none",
        ),
        ({"arms": {"none": {"overrides": ["seed=9"]}}}, "arm none: seed=9: seeds come from `seeds`"),
        ({"arms": {"none": {}, "A6": {"baseline": "A7"}}}, "arm A6: its baseline 'A7' is no arm of this study"),
        ({"headline": ["B1"]}, "headline 'B1' is no comparison of this study"),
        ({"arms": {"A 6": {}}}, "arm 'A 6': use letters"),
        ({"budgets": {"x0": 0}}, "budget x0 is 0.0: expected a factor above 0"),
        ({"arms": {"none": {"budgets": ["x3"]}}}, r"arm none: there is no budget 'x3' \(there are: x1\)"),
        ({"arms": {"none": {"sample_factor": 0}}}, "arms.none.sample_factor"),
        ({"arms": {"none": {"rate_factor": -1}}}, "arms.none.rate_factor"),
        (
            {"arms": {"none": {"sample_factor": 0.5}}, "budgets": {"C": {"flops": 1e15}}},
            "arm none: sample_factor 0.5 changes nothing, as its budgets are FLOPs. Remove it",
        ),
        ({"armz": {}}, "armz: Extra inputs"),
        ({"seeds": []}, "seeds: "),
        ({"seeds": [-1]}, "seeds"),
        ({"seeds": [True]}, "seeds.0.*: Input should be a valid integer"),
        ({"seeds": ["1", 2.0]}, "seeds.0.*: Input should be a valid integer"),
        ({"budgets": {}}, "budgets: .* at least 1 item"),
        ({"budgets": {"x1": True}}, "budgets.x1.float: Input should be a valid number"),
        ({"arms": {"none": {"seeds": []}}}, "arms.none.seeds: .* at least 1 item"),
        ({"arms": {"none": {"budgets": []}}}, "arms.none.budgets: .* at least 1 item"),
        ({"arms": {"none": None}}, "arm none: nothing follows its name. Write `none: {}`"),
        ({"arms": None}, "arms: Input should be"),
        ({"groups": {"gaze": []}}, "groups.gaze: .* at least 1 item"),
        ({"groups": {"gaze": ["card", "follow", "card"]}}, "group gaze: card is listed twice"),
        ({"groups": {"all": ["card"]}}, "group all: this is the name of every scored task"),
    ],
)
def test_a_wrong_design_is_refused_with_the_file(studies, changes, message):
    (studies / "mine.yaml").write_text(yaml.safe_dump(ALL | changes, sort_keys=False))
    with pytest.raises(UserError, match=message) as error:
        design.cells_of(design.read_study("mine"))
    assert "mine.yaml" in str(error.value)


def test_an_empty_file_names_the_keys_of_a_study(studies):
    (studies / "mine.yaml").write_text("# later\n")
    with pytest.raises(UserError, match=r"mine.yaml: expected keys such as 'question:' and 'arms:' .* found nothing"):
        design.read_study("mine")


def test_an_unknown_study_lists_those_that_exist(studies):
    (studies / "mine.yaml").write_text(yaml.safe_dump(ALL))
    with pytest.raises(UserError, match=r"other.yaml: there is no such study \(there are: mine\)"):
        design.read_study("other")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ablation=A66", "A66"),
        ("model.query_dims=3", "query_dims"),
        ("model.query_dim=three", "model.query_dim"),
        ("model.fovea_size=4", "model.fovea_size=4 with frame_downsampling=1"),
        ("training.stage2.objective.text.weight=0.0", "training.stage2"),
    ],
)
def test_an_arm_that_cannot_be_trained_is_refused_by_name(override, message):
    study = make(arms={"none": {}, "mine": {"overrides": [override]}})
    with pytest.raises(UserError, match=f"(?s)arm mine: .*{message}"):
        design.parameters_of(design.cells_of(study)[-1])


def test_an_ablation_that_changes_nothing_is_refused():
    study = make(base=["model.coarse_only=true"])
    with pytest.raises(UserError, match=r"arm A6: .*changes no parameter"):
        design.parameters_of(design.cells_of(study)[-1])


OBJECTS = ["sources.procedural.world=objects", "sources.procedural.objects.cutouts=/tmp"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": {"gaze": ["card", "folow"]}}, r"group gaze: arm none has no task folow \(there are: card, follow"),
        ({"base": OBJECTS, "groups": {"gaze": ["card"]}}, r"group gaze: arm none has no task card \(there are: become"),
        ({"base": OBJECTS, "groups": {"new": ["place_new"]}}, None),
        ({"base": OBJECTS}, None),  # the default groups
        ({"base": ["sources.collect=[folder]"], "groups": {"gaze": ["card", "folow"]}}, None),
    ],
)
def test_a_group_of_unknown_tasks_is_refused_before_training(clean, changes, message):
    study = make(**changes)
    if message is None:
        design.check_tasks(study)
        return
    with pytest.raises(UserError, match=message):
        plan.make_plan("mine", study)


def test_the_same_run_twice_is_refused():
    with pytest.raises(UserError, match=r"1 run.s. twice: none-x1-seed1.1.1"):
        design.cells_of(make(arms={"none": {"seeds": [1, {"training": 1, "backbones": 1, "data": 1}]}}))


# ---------------------------------------------------------------- plan


@pytest.fixture
def clean(monkeypatch):
    monkeypatch.setattr(plan, "clean_commit", lambda: "c0ffee")


def test_runs_share_the_stages_whose_parameters_are_equal(clean):
    made = plan.make_plan("mine", make())
    one, two, other, _ = made.runs
    shared = ("backbones", "sources", "shards", "tokens")
    assert all(one.jobs[stage] == other.jobs[stage] for stage in shared)  # another arm
    assert all(one.jobs[stage] != two.jobs[stage] for stage in shared)  # other seeds of backbones and data
    assert all(one.jobs[stage] != other.jobs[stage] for stage in ("stage1", "stage2", "stage3", "evaluation"))
    assert len(made.jobs) == 2 * len(shared) + 4 * 5


def test_a_change_of_the_last_stage_shares_all_before(clean):
    arms = {"none": {}, "long": {"overrides": ["training.stage3.num_samples=48000"]}}
    one, _, other, _ = plan.make_plan("mine", make(arms=arms)).runs
    assert {stage for stage in one.jobs if one.jobs[stage] != other.jobs[stage]} == {"stage3", "evaluation", "flops"}


def test_runtime_settings_share_everything(clean):
    arms = {"none": {}, "logs": {"overrides": ["runtime.log_every=5"]}}
    with pytest.raises(UserError, match=r"logs-x1-seed1.1.1 and none-x1-seed1.1.1 have the same effective parameters"):
        plan.make_plan("mine", make(arms=arms))


def test_a_change_of_code_changes_the_stages_that_use_it():
    stages, parameters = plan.read_stages(), design.parameters_of(design.cells_of(make())[0])
    code = plan.code_of_commit()
    before = plan.jobs_of(stages, parameters, code)
    after = plan.jobs_of(stages, parameters, code | {"pipeline_steps/evaluation/__main__.py": "0"})
    assert [stage for stage in before if before[stage].key != after[stage].key] == ["evaluation"]


def test_a_job_starts_without_the_libraries_of_its_stage():
    """They take seconds, and every job starts a process of its own."""
    code = "import sys, pipeline_steps.study.job; print([name for name in ('torch', 'pandas') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_jobs_come_after_those_that_they_need(clean):
    seen = set()
    for name, entry in plan.make_plan("mine", make()).jobs.items():
        assert set(entry.inputs.values()) <= seen
        seen.add(name)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "ROOT", tmp_path)
    for words in (["init", "-q"], ["config", "user.email", "a@b.c"], ["config", "user.name", "n"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    (tmp_path / "code.py").write_text("1")
    subprocess.run("git add -A && git commit -qm one", cwd=tmp_path, shell=True, check=True)
    return tmp_path


def test_uncommitted_changes_are_refused_but_results_are_not(repository):
    (repository / "reports/study/mine").mkdir(parents=True)
    (repository / "reports/study/mine/runs.csv").write_text("run\n")
    assert len(plan.clean_commit()) == 40
    (repository / "code.py").write_text("2")
    with pytest.raises(UserError, match=r"1 file.s. differ from the last commit \(code.py\)"):
        plan.clean_commit()
    assert plan.uncommitted().startswith("1 file(s) differ from the last commit (code.py)")
    assert len(plan.checked_out()) == 40


# ---------------------------------------------------------------- jobs


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


def test_the_printed_command_runs_the_jobs_from_any_folder_and_shell(tmp_path, monkeypatch, capsys):
    """With quotes, spaces and what Rich would read as markup or as an emoji in its words."""
    studies, elsewhere = tmp_path / "my [bold]'s :ant: studies", tmp_path / "elsewhere"
    studies.mkdir()
    elsewhere.mkdir()
    names = "('CUDA_VISIBLE_DEVICES', 'SNAKEMAKE_PROFILE')"
    made = small_plan(f"python -c \"import os; open('result', 'w').write(str([*map(os.environ.get, {names})]))\"")
    write_plan(made, studies)
    monkeypatch.delenv("SNAKEMAKE_PROFILE", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    monkeypatch.setattr(study_main, "show_until_end", lambda process, *_: process.wait(120))
    console, arguments = Console(soft_wrap=True, width=60), SimpleNamespace(gpus=2)
    assert study_main.run_jobs(made, made, studies, None, arguments, 1, console) == 0
    printed = capsys.readouterr().out.splitlines()[-1]
    shutil.rmtree(studies / "jobs")
    variables = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    variables["SNAKEMAKE_PROFILE"] = "slurm"
    subprocess.run(["sh", "-c", printed], cwd=elsewhere, env=variables, check=True, timeout=120, capture_output=True)
    assert set(progress.states(made, studies).values()) == {"done"}
    assert (studies / "jobs/second/k0/result").read_text() == "['3, 5', None]"  # no stage of this plan takes a GPU


def test_a_failed_job_does_not_stop_the_others_and_is_reported(tmp_path):
    made = small_plan(FAIL, COPY, COPY)
    done = run_snakemake(made, tmp_path)
    assert done.returncode != 0
    found = progress.states(made, tmp_path)
    assert [found["second", f"k{number}"] for number in range(3)] == ["failed", "done", "done"]
    (text,) = progress.failures(made, tmp_path)
    assert "second of run0 failed (exit code 1)" in text
    assert "reading" in text
    assert "no digits found" in text
    assert (tmp_path / "jobs/second/k1/result").read_text() == "x"
    assert not (tmp_path / "jobs/second/k0/done.json").exists()


def test_only_what_is_missing_runs_again(tmp_path):
    run_snakemake(small_plan(FAIL, COPY), tmp_path)
    made = small_plan(COPY, COPY)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("jobs/*/*/done.json")}
    assert len(times) == 2
    assert run_snakemake(made, tmp_path).returncode == 0
    assert all(path.stat().st_mtime_ns == before for path, before in times.items())
    assert set(progress.states(made, tmp_path).values()) == {"done"}
    assert not progress.failures(made, tmp_path)
    record = json.loads((tmp_path / "jobs/second/k0/done.json").read_text())
    assert record.keys() == {"commit", "seconds", "attempts"}
    assert record["commit"] == "c0ffee"
    assert record["attempts"] == 2


def test_a_job_that_another_study_finishes_meanwhile_is_kept(tmp_path):
    """The second job's record appears when the study has begun: Snakemake must not delete it."""
    meanwhile = "p = pathlib.Path('../../second/k0'); p.mkdir(parents=True); (p / 'done.json').write_text('{}')"
    made = small_plan(FAIL)
    first = made.jobs["first", "k"]
    made.jobs["first", "k"] = replace(first, command=f"python -c \"import pathlib; open('out', 'w'); {meanwhile}\"")
    done = run_snakemake(made, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "jobs/second/k0/done.json").read_text() == "{}"


def test_an_output_that_was_not_written_fails_the_job(tmp_path):
    run_snakemake(small_plan('python -c "pass"'), tmp_path)
    assert json.loads((tmp_path / "jobs/second/k0/failed.json").read_text())["reason"] == "not written: result"


def test_a_killed_study_leaves_nothing_running_and_continues(tmp_path):
    write_plan(small_plan(SLOW), tmp_path)
    process = subprocess.Popen(study_main.snakemake_command(tmp_path, "mine", 1, 0), stderr=subprocess.DEVNULL)
    folder = tmp_path / "jobs/second/k0"
    wait_for(lambda: (folder / "begun").exists())
    assert progress.state_of(folder) == "running"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_for(lambda: progress.state_of(folder) == "waiting")
    assert not progress.failures(small_plan(SLOW), tmp_path)
    assert run_snakemake(small_plan(COPY), tmp_path).returncode == 0


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_jobs_take_a_gpu_each_and_wait_for_one(tmp_path):
    names = ["2", "MIG-GPU-8/1/0"]
    with job.free_device(tmp_path, names) as first, job.free_device(tmp_path, names) as second:
        assert [first, second] == names
        code = (
            "from pathlib import Path\nfrom pipeline_steps.study.job import free_device\n"
            f"with free_device(Path({str(tmp_path)!r}), {names}) as name: print(name)"
        )
        third = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        time.sleep(1.5)
        assert third.poll() is None
    assert third.communicate(timeout=30)[0].strip() in names
    assert {path.name for path in tmp_path.iterdir()} == {"gpu2.lock", "gpuMIG-GPU-8-1-0.lock"}


@pytest.mark.parametrize(
    ("given", "count", "expected"),
    [(None, 2, ["0", "1"]), ("2,3", 1, ["2"]), ("3, 2", 2, ["3", "2"]), ("GPU-8f,MIG-1", 2, ["GPU-8f", "MIG-1"])],
)
def test_jobs_use_the_gpus_that_the_user_selected(monkeypatch, given, count, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert job.visible_devices(count) == expected


@pytest.mark.parametrize(("given", "found"), [("2,3", 2), ("", 0), ("-1", 0), ("0,-1,1", 1)])
def test_more_gpus_than_the_user_selected_are_refused_before_anything_runs(monkeypatch, given, found):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    monkeypatch.delenv("SNAKEMAKE_PROFILE", raising=False)
    monkeypatch.setattr(sys, "argv", ["study", "smoke", "--gpus", "3"])
    monkeypatch.setattr(study_main, "make_plan", lambda *_: pytest.fail("planned"))
    with pytest.raises(UserError, match=rf"--gpus 3, but CUDA_VISIBLE_DEVICES={given} has {found} device"):
        study_main.main()


def test_a_job_asks_for_its_threads_and_the_memory_of_the_study(tmp_path):
    made = replace(small_plan(COPY), memory_gb=48.0)
    made.jobs["second", "k0"] = replace(made.jobs["second", "k0"], num_threads=3)
    write_plan(made, tmp_path)
    command = [*study_main.snakemake_command(tmp_path, "mine", 4, 0), "--dry-run", "--quiet", "progress"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True)
    first, second = done.stdout.split("rule study_first:")[1].split("rule study_second:")
    assert "threads:" not in first
    assert "threads: 3" in second.partition("rule study:")[0]
    assert first.count("mem_mb=48000") == second.partition("rule study:")[0].count("mem_mb=48000") == 1


def test_threads_follow_from_the_scale(clean):
    made = plan.make_plan("mine", make(arms={"large": {"overrides": ["scale=smollm2_135m"]}}, seeds=[1], memory_gb=9))
    found = {stage: made.jobs[stage, key].num_threads for stage, key in made.runs[0].jobs.items()}
    assert {stage for stage, count in found.items() if count == 4} == {*params.TRAINING_STAGES, "evaluation"}
    assert made.as_dict()["memory_mb"] == 9000
    assert {entry.num_threads for entry in plan.make_plan("mine", make()).jobs.values()} == {1}


def test_code_that_changed_since_the_plan_is_refused(repository):
    code = {"code.py": plan.git("hash-object", "code.py").strip()}
    plan.check_code(code)
    (repository / "code.py").write_text("2")
    with pytest.raises(UserError, match=r"1 file.s. changed since the study was planned \(code.py\)"):
        plan.check_code(code)
    (repository / "code.py").unlink()
    with pytest.raises(UserError, match=r"changed since the study was planned \(code.py\)"):
        plan.check_code(code)


def test_missing_inputs_name_the_job_that_makes_them(tmp_path):
    made = small_plan(COPY).as_dict()["jobs"][1]
    folder = tmp_path / "jobs/second/k0"
    folder.mkdir(parents=True)
    with pytest.raises(UserError, match=r"jobs/first/k/out: missing; it is an output of first \(k\)"):
        job.prepare(made, folder, tmp_path)


# ---------------------------------------------------------------- progress


def test_costs_are_measured_and_scale_with_the_samples(tmp_path, clean):
    made = plan.make_plan("mine", make())
    long, short = (job for job in list(made.jobs.values()) if job.stage == "stage2" and job.key in [
        run.jobs["stage2"] for run in made.runs[:2]
    ])  # fmt: skip
    guess = progress.measure_costs(made, tmp_path)
    assert guess.seconds(short) == progress.FIRST_GUESS_PER_SAMPLE * TRAINING["stage2"]["num_samples"]
    folder = tmp_path / long.folder
    folder.mkdir(parents=True)
    (folder / "done.json").write_text(json.dumps({"seconds": 304.0}))
    costs = progress.measure_costs(made, tmp_path)
    assert costs.seconds(short) == pytest.approx(304.0)
    other = plan.Job(**vars(short) | {"parameters": copy.deepcopy(short.parameters), "key": "other"})
    other.parameters["model"]["num_passes"] = 2  # slower, it turns out
    assert costs.seconds(other) == pytest.approx(304.0)
    both = plan.Plan("mine", "commit", jobs={("stage2", job.key): job for job in (long, other)})
    (tmp_path / other.folder).mkdir(parents=True)
    (tmp_path / other.folder / "done.json").write_text(json.dumps({"seconds": 608.0}))
    assert progress.measure_costs(both, tmp_path).seconds(short) == pytest.approx(304.0)
    assert progress.measure_costs(both, tmp_path).seconds(other) == pytest.approx(608.0)
    found = progress.states(made, tmp_path)
    assert found["stage2", long.key] == "done"
    everything = sum(costs.seconds(job) for job in made.jobs.values())
    assert progress.total_seconds(made, found, costs) == (pytest.approx(everything - 304.0), 0)


def test_the_expected_time_of_an_arm_follows_from_kept_runs(tmp_path, clean, monkeypatch, studies):
    """Of two studies count the runs that were not resumed and have a run without overrides beside them."""
    arms = {"none": {}, "fast": {"rate_factor": 4}, "small": {"overrides": ["ablation=A6"]}}
    arms |= {"many": {"overrides": ["ablation=B1"]}, "other": {"overrides": ["ablation=A2"]}}
    columns = ["arm", "seed", "training_samples", "training_seconds", "attempts"]
    tables = {
        "one": [
            ("none", 1, 100, 10, 1),
            ("fast", 1, 200, 20, 1),
            ("small", 1, 100, 5, 1),
            ("small", 2, 100, 90, 1),
            ("many", 1, 200, 40, 1),
            ("gone", 1, 100, 9, 1),
        ],
        "two": [("none", 3, 1000, 10, 1), ("small", 3, 1000, 7, 1), ("many", 3, 1000, 1, 2)],
    }
    monkeypatch.setattr(progress, "STUDIES", studies)
    for name, rows in tables.items():
        (studies / f"{name}.yaml").write_text(yaml.safe_dump(ALL | {"arms": arms}, sort_keys=False))
        (studies / "kept" / name).mkdir(parents=True)
        own = pd.DataFrame(rows, columns=columns)
        own[[*results.SEEDS]] = own[["seed"] * 3].to_numpy()
        own["run"] = [f"r{number}" for number in own.index]
        whole = runs_table(seeds=1).iloc[[0] * len(own)].reset_index(drop=True).assign(**own.drop(columns="seed"))
        whole.to_csv(studies / "kept" / name / "runs.csv", index=False)
    shutil.copytree(studies / "kept/one", studies / "kept/natural")  # of no study
    relative = progress.relative_costs(studies / "kept")
    assert relative == {(): 1, ("ablation=A6",): pytest.approx(0.6), ("ablation=B1",): pytest.approx(2)}
    monkeypatch.setattr(progress, "relative_costs", lambda: relative)
    made = plan.make_plan("mine", make(arms=arms, seeds=[1]))
    costs = progress.measure_costs(made, tmp_path)
    stage2 = {run.arm: made.jobs["stage2", run.jobs["stage2"]] for run in made.runs}
    guess = progress.FIRST_GUESS_PER_SAMPLE * TRAINING["stage2"]["num_samples"]
    expected = {"none": 1, "fast": 1, "small": 0.6, "many": 2, "other": 1}
    assert {arm: costs.seconds(job) / guess for arm, job in stage2.items()} == pytest.approx(expected)
    folder = tmp_path / stage2["many"].folder  # measured here: what it says of the others
    folder.mkdir(parents=True)
    (folder / "done.json").write_text(json.dumps({"seconds": 300.0}))
    costs = progress.measure_costs(made, tmp_path)
    expected = {"none": 150, "fast": 150, "small": 90, "many": 300, "other": 150}
    assert {arm: costs.seconds(job) for arm, job in stage2.items()} == pytest.approx(expected)


def test_the_cost_of_a_pretrained_network_is_unknown_until_it_has_run(tmp_path, clean):
    scales_of = {name: {"overrides": [f"scale={name}"]} for name in ("smollm2_135m", "smollm2_360m")}
    made = plan.make_plan("mine", make(arms=scales_of, seeds=[1]))
    small, large = (made.jobs["stage2", run.jobs["stage2"]] for run in made.runs)
    costs = progress.measure_costs(made, tmp_path)
    assert math.isnan(costs.seconds(small))
    assert costs.seconds(made.jobs["sources", made.runs[0].jobs["sources"]]) > 0
    seconds, num_unknown = progress.total_seconds(made, progress.states(made, tmp_path), costs)
    assert seconds > 0
    assert num_unknown == 2 * (len(params.TRAINING_STAGES) + 1)  # and the evaluation
    (tmp_path / small.folder).mkdir(parents=True)
    (tmp_path / small.folder / "done.json").write_text(json.dumps({"seconds": 1000.0}))
    costs = progress.measure_costs(made, tmp_path)
    assert costs.seconds(small) == 1000.0
    assert math.isnan(costs.seconds(large))


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_running_study_shows_its_jobs_by_stage_and_state_and_the_time_left(tmp_path, monkeypatch, clean, is_terminal):
    """Of four runs one is done, one has failed in stage 2, one is in stage 1, one waits. 10 ms per training sample."""
    monkeypatch.setattr(progress, "relative_costs", dict)
    made = plan.make_plan("mine", make())
    first, second, third, _ = ({stage: made.jobs[name] for stage, name in names_of(run).items()} for run in made.runs)
    before = [second[stage] for stage in ("backbones", "sources", "shards", "tokens", "stage1")]
    for entry in (*first.values(), *before):
        kind, amount = progress.work_of(entry)
        write_record(tmp_path / entry.folder / "done.json", seconds=0.01 * amount if kind == "training" else 36.0)
    write_record(tmp_path / second["stage2"].folder / "failed.json", reason="exit code 1", last_lines=[])
    write_record(tmp_path / third["stage1"].folder / "params.yaml")
    polled, collected = iter([None, None, 0]), []
    monkeypatch.setattr(study_main, "INTERVAL", 0)
    monkeypatch.setattr(study_main, "collect", lambda *given: collected.append(given))
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=100, color_system=None, soft_wrap=True)
    with job.locked(tmp_path / third["stage1"].folder / "lock"):
        process = SimpleNamespace(poll=lambda: next(polled))
        study_main.show_until_end(process, made, made, tmp_path, "results", 2, console)
    assert collected == [(made, tmp_path, "results")]  # again only when another run ends
    samples = {stage: TRAINING[stage]["num_samples"] for stage in params.TRAINING_STAGES}
    left = 0.01 * (2 * samples["stage1"] + 2 * samples["stage2"] + 3 * samples["stage3"]) + 6 * 36  # not what failed
    left = f"about {progress.format_time(left / 2)} left"
    text = console.file.getvalue()
    if not is_terminal:
        (line,) = text.splitlines()  # as nothing has changed
        assert line.partition(" ")[2] == f"1/4 runs; jobs: 14 done, 1 running, 12 waiting, 1 failed; {left}"
        return
    last = text[text.rindex("study mine:") :]
    assert last.startswith("study mine: 1 of 4 runs done")
    assert left in last
    assert [[cell.strip() for cell in line.split("│")[1:-1]] for line in last.splitlines() if "│" in line] == [
        ["backbones", "2", "", "", ""],
        ["sources", "2", "", "", ""],
        ["shards", "2", "", "", ""],
        ["tokens", "2", "", "", ""],
        ["stage1", "2", "1", "1", ""],
        ["stage2", "1", "", "2", "1"],
        ["stage3", "1", "", "3", ""],
        ["evaluation", "1", "", "3", ""],
        ["flops", "1", "", "3", ""],
    ]
    assert re.search(r"stage +┃ +done +┃ +running +┃ +waiting +┃ +failed", last)


def names_of(run):
    """{stage: (stage, key)} of a run's jobs."""
    return {stage: (stage, key) for stage, key in run.jobs.items()}


def write_record(path, **content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("seconds", "text"), [(45, "45 s"), (720, "12 min"), (12000, "3 h 20 min"), (float("nan"), "unknown")]
)
def test_times_are_readable(seconds, text):
    assert progress.format_time(seconds) == text


def named(arms=None, budgets=None, seeds=None):
    return argparse.Namespace(arms=arms, budgets=budgets, seeds=seeds)


def test_only_some_arms(clean):
    study = make()
    made = plan.make_plan("mine", study)
    part = study_main.chosen_part(made, study, named(["A6"]))
    assert [run.arm for run in part.runs] == ["A6", "A6"]
    assert {job.stage for job in part.jobs.values()} == {job.stage for job in made.jobs.values()}
    assert len(part.jobs) == 18
    assert study_main.chosen_part(made, study, named()) == made


def test_only_some_budgets_and_seeds(clean):
    arms = {"none": {}, "A6": {"overrides": ["ablation=A6"], "seeds": [7]}}
    study = make(budgets={"half": 0.5, "x1": 1.0}, arms=arms)
    made = plan.make_plan("mine", study)
    half = study_main.chosen_part(made, study, named(budgets=["half"]))
    assert {run.budget for run in half.runs} == {"half"}
    assert {run.arm for run in half.runs} == {"none", "A6"}
    seven = study_main.chosen_part(made, study, named(seeds=[7], budgets=["x1"]))
    assert [run.name for run in seven.runs] == ["A6-x1-seed7.7.7"]
    assert set(seven.jobs) < set(made.jobs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (named(arms=["A6", "A7"]), "--arms: mine has no A7 (it has: none, A6)"),
        (named(budgets=["x2"]), "--budgets: mine has no x2 (it has: x1)"),
        (named(seeds=[1, 4]), "--seeds: mine has no 4 (it has: 1, 2)"),
    ],
    ids=str,
)
def test_unknown_arms_budgets_and_seeds_are_refused(arguments, message, clean):
    study = make()
    with pytest.raises(UserError, match=re.escape(message)):
        study_main.chosen_part(plan.make_plan("mine", study), study, arguments)


def test_names_that_no_run_has_together_are_refused(clean):
    budgets = {"x1": 1.0, "equal_flops": {"flops_of": "x1"}}
    study = make(arms={"none": {"seeds": [1, 2]}, "A6": {"overrides": ["ablation=A6"], "seeds": [1]}}, budgets=budgets)
    made = plan.make_plan("mine", study)
    with pytest.raises(UserError, match=r"^mine has no run with .* leave one option out. 1 run.s. of equal FLOPs wait"):
        study_main.chosen_part(made, study, named(["A6"], ["equal_flops"]))
    made.waiting = []
    with pytest.raises(UserError, match=r"^mine has no run with .* leave one option out$"):
        study_main.chosen_part(made, study, named(["A6"], seeds=[2]))


def test_make_passes_options_to_the_study():
    command = [
        "make",
        "--no-print-directory",
        "--dry-run",
        "study",
        "name=smoke",
        "STUDY_OPTIONS=--cores 8 --arms none A6 -n",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "python -m pipeline_steps.study smoke --cores 8 --arms none A6 -n"


@pytest.mark.parametrize("problem", ["", "1 file(s) differ from the last commit (code.py)."])
def test_a_dry_run_shows_runs_and_cost_and_runs_nothing(problem, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(study_main, "uncommitted", lambda: problem)
    monkeypatch.setenv("RUN_SCRATCH", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["study", "rates_full", "--dry-run", "--cores", "4"])
    assert study_main.main() == 0
    text = capsys.readouterr().out
    assert "none-x1-seed1.1.1" in text
    assert "B1_quadruple-x1-seed" in text
    assert "…" not in text  # a longer name goes on in the next line
    assert "on one core, about" in text
    assert ("The study cannot run before these are committed" in text) == bool(problem)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- results


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


def test_convergence_is_the_fall_over_the_last_quarter(tmp_path):
    change, converged = collect.convergence(curve(tmp_path / "a.csv", {250: 1.0, 500: 0.9, 750: 0.8, 1000: 0.6}))
    assert change == pytest.approx(0.25)
    assert not converged
    change, converged = collect.convergence(curve(tmp_path / "b.csv", {500: 0.6, 750: 0.6, 1000: 0.597}))
    assert converged
    assert collect.convergence(curve(tmp_path / "c.csv", {500: 0.5, 1000: 0.7}))[1]  # has passed its minimum
    assert collect.convergence(curve(tmp_path / "d.csv", {500: 0.5})) == (None, None)
    assert collect.convergence(curve(tmp_path / "e.csv", {800: 0.5, 1000: 0.5})) == (None, None)  # too late to tell


@pytest.fixture
def run_with_results(tmp_path):
    """(run, folder of studies, training FLOPs) with the files of a finished run, every number of which is another."""
    data, parameters = tmp_path / "data", params.load(ROOT / "params.yaml")
    packed.write(data, packed.clips(60, text_every=4), 30)
    for number, stage in enumerate(params.TRAINING_STAGES, start=1):
        parameters["training"][stage] |= {
            "mixture": [{"source": "*", "task": "*", "weight": 1.0}],
            "text_share": 0.25,
            "text_source": "*",
            "num_samples": 40 * number,
        }
    seeds = {"training": 5, "backbones": 6, "data": 7}
    stages = ("shards", "tokens", *params.TRAINING_STAGES, "evaluation", "flops")
    run = Run("none-x1-seed5.6.7", "none", "x1", seeds, parameters, {stage: f"key_of_{stage}" for stage in stages})
    folders = {stage: tmp_path / plan.folder_of(stage, key) for stage, key in run.jobs.items()}
    for number, folder in enumerate(folders.values()):
        (folder / "outputs/metrics").mkdir(parents=True)
        record = {"commit": f"{number}" * 40, "seconds": 10.0**number, "attempts": 9 - number}
        (folder / "done.json").write_text(json.dumps(record))
    for stage in ("shards", "tokens"):
        (folders[stage] / "data").mkdir()
        (folders[stage] / "data" / stage).symlink_to(data / stage)
    dataset = TokenizedShards(data / "shards", data / "tokens", "train", with_frames=False)
    (folders["stage3"] / "params.yaml").write_text(yaml.safe_dump(parameters))
    read = params.read(folders["stage3"] / "params.yaml", *STREAMING_PARAMS)
    contents, counts = {}, {stage: count_stage(dataset, read, stage, None) for stage in params.TRAINING_STAGES}
    for number, stage in enumerate(params.TRAINING_STAGES):
        mixture = {}
        for tasks in counts[stage].sources.values():
            for task, found in tasks.items():
                mixture.setdefault(task, {"num_samples": 0})["num_samples"] += found.num_samples
        groups = [{"group": group, "trainable": int(number < 2)} for group in ("vision", "language")]
        contents[stage] = {"mixture": mixture, "parameters": [{"group": "connector", "trainable": 9}, *groups]}
        (folders[stage] / f"outputs/metrics/{stage}.json").write_text(json.dumps(contents[stage]))
    config, training = flops_config(), params.read(folders["stage3"] / "params.yaml", "training").training
    config.save_pretrained(folders["stage3"] / "outputs/stage3")
    config.vision_config.image_size = packed.SIZE
    counted = metrics.StreamingResult(stages=counts)
    budget = training_flops.budget_of(contents, counted, flops_result(), config, training)
    curve(folders["stage3"] / "outputs/metrics/stage3.csv", {500: 0.6, 750: 0.6, 1000: 0.597})
    curve(folders["stage2"] / "outputs/metrics/stage2.csv", {500: 0.6, 750: 0.6, 1000: 0.3})
    metrics.write_json(folders["flops"] / "outputs/metrics/flops.json", flops_result())
    metrics.write_json(folders["evaluation"] / "outputs/metrics/evaluation.json", evaluated())
    return run, tmp_path, budget.flops


def evaluated():
    """An `EvaluationResult` of two tasks."""
    interval = {"loss_interval": (0, 9), "accuracy_interval": (0, 1), "num_items": 1, "num_tokens": 1}
    modes = ("coarse", "fine", "autoregressive", "blind")
    return metrics.EvaluationResult(
        tasks={
            task: {mode: metrics.Score(loss=9, accuracy=base + 0.1 * n, **interval) for n, mode in enumerate(modes)}
            for task, base in (("gist", 0.5), ("card", 0.25))
        },
        mean={mode: metrics.MeanScore(loss=n + 0.5, accuracy=0.01 * n + 0.7) for n, mode in enumerate(modes)},
        generation={
            task: metrics.Generation(exact_match=share, num_items=4)
            for task, share in (("text", 0.125), ("gist", 0.75), ("card", 0.625))
        },
        mean_exact_match=0.6875,
        gap={},
        text=None,
        chance={},
        gaze={},
        provenance={},
    )


def test_the_row_of_a_run_has_every_column_with_its_value(run_with_results):
    run, studies, flops = run_with_results
    row = collect.row_of(run, studies)
    expected = {
        "run": "none-x1-seed5.6.7",
        "arm": "none",
        "budget": "x1",
        "training_seed": 5,
        "backbones_seed": 6,
        "data_seed": 7,
        "training_samples": 40 + 80 + 120,
        "training_flops": flops,
        "training_seconds": 1e2 + 1e3 + 1e4,
        "attempts": 7,
        "mean_token_accuracy": 0.72,
        "exact_match_accuracy": 0.6875,
        "mean_loss": 2.5,
        "accuracy_card": pytest.approx(0.45),
        "accuracy_gist": pytest.approx(0.7),
        "exact_match_card": 0.625,
        "exact_match_gist": 0.75,
        "exact_match_text": 0.125,
        "blind_accuracy": 0.73,
        "validation_loss_change": pytest.approx(0.005),
        "converged": True,
        "commit": "4" * 12,
        "parameters": fingerprint({name: value for name, value in run.parameters.items() if name != "runtime"}),
    }
    assert list(row) == list(expected)
    assert row == expected


def killed(*_, **__):
    raise KeyboardInterrupt


def test_earlier_results_stay_and_foreign_ones_are_refused(tmp_path, monkeypatch):
    """Of two planned runs one was collected elsewhere; the other is finished here."""
    runs = [Run(f"r{n}", "none", "x1", {"training": n}, {"seed": n}, {"evaluation": f"k{n}"}) for n in (1, 2)]
    made = Plan("mine", "c0ffee", runs=runs)
    items = pd.DataFrame({"run": ["r2"], "task": ["card"]})
    old = runs_table(seeds=1).iloc[0].to_dict()
    old |= {"run": "r2", "training_flops": 7.0, "parameters": collect.parameters_hash({"seed": 2})}
    pd.DataFrame([old]).to_csv(tmp_path / "runs.csv", index=False)
    items.to_parquet(tmp_path / "items.parquet")
    assert collect.check_earlier(made, tmp_path) == ({"r2": 7.0}, [])
    monkeypatch.setattr(collect, "finished", lambda run, studies: run.name == "r1")
    new = old | {"run": "r1", "training_flops": 5.0, "training_seed": 1}
    monkeypatch.setattr(collect, "row_of", lambda run, studies: new)
    monkeypatch.setattr(collect, "items_of", lambda run, studies: items.assign(run=run.name))
    table = collect.collect(made, tmp_path, tmp_path)
    assert list(zip(table["run"], table["training_flops"], strict=True)) == [("r1", 5.0), ("r2", 7.0)]
    assert sorted(pd.read_parquet(tmp_path / "items.parquet")["run"]) == ["r1", "r2"]
    with monkeypatch.context() as patched:
        patched.setattr(collect, "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            collect.collect(made, tmp_path, tmp_path / "other")
    assert collect.check_earlier(made, tmp_path / "other") == ({}, [])
    pd.DataFrame([old | {"parameters": "other"}]).to_csv(tmp_path / "runs.csv", index=False)
    assert collect.check_earlier(made, tmp_path) == ({}, ["r2"])
    pd.DataFrame([old | {"run": "r3"}]).to_csv(tmp_path / "runs.csv", index=False)
    with pytest.raises(UserError, match=r"has 1 run.s. that are not in the study \(r3\)"):
        collect.check_earlier(made, tmp_path)


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


def test_summary_names_every_run_and_every_verdict_with_its_condition(tmp_path):
    table = runs_table(flops={"B1": 2e14})
    (tmp_path / "mine").mkdir()
    table.to_csv(tmp_path / "mine/runs.csv", index=False)
    text = summary.write_summary("mine", STUDY, tmp_path).read_text()
    assert "24 of 24 runs" in text
    assert "**better** at equal samples and FLOPs |" in text  # A6, gaze
    assert "**equal** at equal samples and FLOPs |" in text
    assert "**worse** at equal samples; 8 of 16 runs not converged" in text  # B1 reads more, at twice the FLOPs
    assert FLOPS_NOTE not in text  # of runs with a commit of today's count
    assert text.count("| none | x1 | ") == 9  # the arm and its runs
    assert "8 of 8 [63, 100 %]" in text
    assert (tmp_path / "mine/runs.png").read_bytes().startswith(b"\x89PNG")
    found = StudySummary.model_validate_json((tmp_path / "mine/summary.json").read_text())
    assert (found.num_runs, found.num_planned, found.baseline) == (24, 24, "none")
    assert [(arm.arm, len(arm.seeds), arm.num_above_plateau, arm.num_converged) for arm in found.arms] == [
        ("none", 8, 8, 8),
        ("A6", 8, 0, 8),
        ("B1", 8, 0, 0),
    ]
    assert [entry.num_not_converged for entry in found.comparisons] == [0, 0, 8, 8]
    table.assign(commit=[*EARLIER_FLOPS, *table["commit"][len(EARLIER_FLOPS) :]]).to_csv(tmp_path / "mine/runs.csv")
    assert FLOPS_NOTE in summary.write_summary("mine", STUDY, tmp_path).read_text()


def test_every_commit_of_a_study_counts_flops_by_task_or_is_listed():
    """Commits that this clone lacks prove nothing."""
    if git("rev-parse", "--is-shallow-repository").stdout.strip() != "false" or git("cat-file", "-e", "8747296").stderr:
        pytest.skip("needs the whole history")
    paths = sorted((ROOT / "reports/study").glob("*/runs.csv"))
    commits = {commit for path in paths for commit in pd.read_csv(path, dtype={"commit": str})["commit"]}
    known = {commit for commit in commits if git("cat-file", "-e", f"{commit}^{{commit}}").returncode == 0}
    earlier = {commit for commit in known if git("merge-base", "--is-ancestor", "8747296", commit).returncode == 1}
    assert earlier == EARLIER_FLOPS


def git(*arguments):
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("of_default", "of_b1", "text"),
    [
        (True, True, ""),
        (False, None, "; 8 of 8 measured not converged, 8 not measured"),
        (True, None, "; 0 of 8 measured not converged, 8 not measured"),
        (None, None, "; convergence not measured"),
    ],
)
def test_runs_whose_convergence_was_not_measured_do_not_count_as_converged(of_default, of_b1, text):
    table = runs_table()
    table["converged"] = table["arm"].map({"none": of_default, "A6": True, "B1": of_b1}).astype(object)
    entry = next(entry for entry in results.comparisons(table, STUDY) if entry.arm == "B1")
    assert summary.verdict_text(entry) == f"**better** at equal samples and FLOPs{text}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "", r"runs.csv: No columns to parse from file. Restore it"),
        (lambda text: b"\x89PNG\r\n\x1a\n\xff", r"runs.csv: .*can't decode byte 0x89.* Restore it"),
        (lambda text: text.replace(",converged,", ",settled,"), r"runs.csv: no column converged. Restore it"),
        (lambda text: text.partition("\n")[0], r"runs.csv: has no runs. Restore it"),
        (lambda text: text.replace("none-1,none,", "none-1,,"), r"runs.csv: line 3 has no arm"),
        (lambda text: text.replace("none-1,none,x1,1,", "none-1,none,x1,,"), r"runs.csv: line 3 has no training_seed"),
        (lambda text: text + text.splitlines()[-1], r"runs.csv: B1-7 has two rows. Delete one of them"),
        (lambda text: text + text.splitlines()[-1].replace("B1-7", "again"), r"runs.csv: again has two rows"),
        (lambda text: text.replace(",300.0,", ",long,", 1), r"none-0: training_seconds is 'long', expected a number"),
        (lambda text: text.replace(",True,", ",yes,", 1), r"none-0: converged is 'yes', expected True or False"),
        (
            lambda text: text.replace(",A6,", ",A7,"),
            r"runs.csv: arm A7 is not in the study \(there are: none, A6, B1\)",
        ),
        (lambda text: text.replace(",x1,", ",x2,"), r"runs.csv: budget x2 is not in the study \(there are: x1\)"),
    ],
)
def test_damaged_runs_are_refused_with_the_file(tmp_path, change, message):
    (tmp_path / "mine").mkdir()
    changed = change(runs_table().to_csv(index=False))
    (tmp_path / "mine/runs.csv").write_bytes(changed if isinstance(changed, bytes) else changed.encode())
    with pytest.raises(UserError, match=message):
        summary.write_summary("mine", STUDY, tmp_path)
    if "not in the study" not in message:
        (tmp_path / "mine/items.parquet").touch()
        with pytest.raises(UserError, match=message):
            collect.earlier_results(tmp_path / "mine")


def test_texts_that_look_like_numbers_stay_texts(tmp_path):
    table = runs_table(seeds=1).assign(commit="123456789012", parameters="12e4")
    table.to_csv(tmp_path / "runs.csv", index=False)
    assert read_runs(tmp_path / "runs.csv")[["commit", "parameters"]].equals(table[["commit", "parameters"]])


def test_summary_is_the_same_bytes_again(tmp_path):
    table = runs_table(seeds=2)
    pages = [summary.page(results.summarise("mine", table, STUDY), table, STUDY) for _ in range(2)]
    assert pages[0] == pages[1]
    tasks = results.groups_of(table, STUDY)["all"]
    assert summary.figure(table, STUDY, tasks) == summary.figure(table, STUDY, tasks)


def test_arms_with_other_seeds_or_budgets_get_no_verdict():
    table = runs_table()
    table.loc[table["arm"] == "A6", list(results.SEEDS)] += 100
    table.loc[table["arm"] == "B1", ["training_samples", "training_flops"]] *= 2
    found = results.comparisons(table, STUDY)
    assert {entry.arm for entry in found} == {"B1"}
    assert {(entry.verdict, entry.matched) for entry in found} == {("unmatched budgets", None)}


def test_unequal_budgets_are_matched_if_every_run_has_converged():
    table = runs_table()
    table.loc[table["arm"] != "none", ["training_samples", "training_flops"]] *= 2
    found = {entry.arm: (entry.matched, entry.verdict) for entry in results.comparisons(table, STUDY)[::2]}
    assert found == {"A6": ("convergence", "better"), "B1": (None, "unmatched budgets")}  # B1 has not converged


@pytest.mark.parametrize("changes", [{"training_samples": np.nan}, {"training_flops": np.nan}, {"converged": None}])
def test_an_unknown_budget_gets_no_verdict(changes):
    table = runs_table().astype({"converged": object})
    table.loc[table["arm"] == "A6", ["training_samples", "training_flops"]] *= 2
    for name, value in changes.items():
        table.loc[table["arm"] == "A6", name] = value
    assert {entry.verdict for entry in results.comparisons(table, STUDY) if entry.arm == "A6"} == {"unmatched budgets"}


def test_the_summary_names_the_split_and_the_tasks_of_every_group():
    found = results.summarise("mine", runs_table(), STUDY.model_copy(update={"base": ("evaluation.split=validation",)}))
    assert found.split == "validation"
    assert results.summarise("mine", runs_table(), STUDY).split == "test"
    assert found.group_tasks["gaze"] == ["card", "follow"]


def test_the_split_is_that_of_the_composed_parameters_and_of_every_arm(clean):
    assert design.split_of(make(base=["++evaluation.split=validation"])) == "validation"
    validated = {"overrides": ["evaluation.split=validation"]}
    assert design.split_of(make(arms={"none": validated})) == "validation"
    with pytest.raises(UserError, match=r"arm A6: evaluation.split is validation, but test in arm none"):
        plan.make_plan("mine", make(arms={"none": {}, "A6": validated}))


def test_only_headline_questions_are_corrected_and_get_a_verdict():
    study = STUDY.model_copy(update={"headline": ("B1",)})
    found = results.comparisons(runs_table(), study)
    assert [(entry.arm, entry.verdict) for entry in found] == [
        ("A6", "exploratory"),
        ("A6", "exploratory"),
        ("B1", "better"),
        ("B1", "worse"),
    ]
    assert [entry.p_adjusted for entry in found][2:] == [2 * 2 / 256] * 2


NO_ANSWERS = [f"training.{stage}.objective.{term}" for stage in ("stage2", "stage3")
              for term in ("text.weight=0.0", "next_frame.weight=1.0")]  # fmt: skip


@pytest.mark.parametrize(
    ("seeds", "b1", "text"),
    [
        ([1, 2, 3], {}, "With 3 pair(s) of runs and 4 questions no difference can be significant (smallest"),
        (list(range(8)), {}, None),
        (list(range(8)), {"seeds": [1, 2, 3]}, "With 3 pair(s) of runs and 4 questions no difference of B1 can be"),
        (list(range(8)), {"seeds": [91]}, None),  # without a pair
        ([1], {"seeds": [1, 2]}, "With 1 pair(s) of runs and 4 questions no difference can be"),
        ([1, 2, 3], {"overrides": NO_ANSWERS}, "With 3 pair(s) of runs and 2 questions no difference can be"),
    ],
)
def test_a_design_that_cannot_decide_says_so(seeds, b1, text):
    arms = {"none": {}, "A6": {"overrides": ["ablation=A6"]}, "B1": {"overrides": ["ablation=B1"]} | b1}
    found = results.power_warning(make(arms=arms, seeds=seeds))
    assert found is None if text is None else found.startswith(text)


def test_a_group_of_which_a_task_was_not_scored_is_refused():
    study = STUDY.model_copy(update={"groups": {"gaze": ("card", "folow")}})
    with pytest.raises(UserError, match=r"group gaze: no run was scored on folow"):
        results.groups_of(runs_table(), study)


def test_a_run_that_lacks_a_task_is_refused():
    table = runs_table()
    table.loc[table["run"] == "A6-3", "accuracy_follow"] = np.nan
    with pytest.raises(UserError, match=r"A6-3 has no accuracy of follow, which other runs have"):
        results.comparisons(table, STUDY)


def test_equal_flops_are_compared_with_the_budget_that_they_follow():
    study = STUDY.model_copy(update={"budgets": {"x1": 1.0, "same": design.EqualFlops(flops_of="x1")}})
    table = runs_table(flops={"B1": 2e14})
    same = table[table["arm"] == "B1"].assign(budget="same", training_samples=30000, training_flops=1e14)
    found = results.comparisons(pd.concat([table, same]), study)
    matched = {entry.arm: entry.matched for entry in found}
    assert matched == {"A6, x1": "samples and FLOPs", "B1, x1": "samples", "B1, same": "FLOPs"}
    assert len(found) == 6


def test_an_arm_may_have_its_own_baseline():
    arms = {**STUDY.arms, "B1": STUDY.arms["B1"].model_copy(update={"baseline": "A6"})}
    found = results.comparisons(runs_table(), STUDY.model_copy(update={"arms": arms}))
    assert [(entry.arm, entry.baseline) for entry in found][2:] == [("B1", "A6"), ("B1", "A6")]


def test_a_summary_without_runs_says_what_to_run(tmp_path):
    with pytest.raises(UserError, match=r"runs.csv: missing; run `make study name=mine` first"):
        summary.write_summary("mine", STUDY, tmp_path)


def test_seeds_are_non_negative():
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        Seeds(training=-1, backbones=0, data=0)


@pytest.mark.slow
def test_a_study_end_to_end(tmp_path, monkeypatch, clean):
    """Two arms of seconds through the real stages; then nothing is left to do."""
    monkeypatch.setenv("RUN_SCRATCH", str(tmp_path))
    monkeypatch.setattr(study_main, "RESULTS", str(tmp_path / "results"))
    monkeypatch.setattr(
        study_main, "write_summary", lambda name, study: summary.write_summary(name, study, tmp_path / "results")
    )
    monkeypatch.setattr(sys, "argv", ["study", "smoke", "--cores", "2", "--seeds", "1"])
    assert study_main.main() == 0
    table = pd.read_csv(tmp_path / "results/smoke/runs.csv")
    assert list(table["arm"]) == ["none", "A6"]
    assert (table["training_samples"] == 100).all()
    assert table["training_flops"].iloc[0] > table["training_flops"].iloc[1]  # planning costs
    items = pd.read_parquet(tmp_path / "results/smoke/items.parquet")
    for run, rows in items.groupby("run"):
        tasks = rows.groupby("task")[["num_correct", "num_tokens"]].sum()
        found = table.set_index("run").loc[run, [f"accuracy_{task}" for task in tasks.index]]
        assert list(found) == pytest.approx(list(tasks["num_correct"] / tasks["num_tokens"]), abs=1e-5)
    started = time.monotonic()
    assert study_main.main() == 0
    assert time.monotonic() - started < 60
