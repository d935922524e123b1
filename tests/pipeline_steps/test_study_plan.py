"""The plan of a study: which jobs its runs share, and which part of it the options choose."""

import argparse
import re
import subprocess
import sys

import pytest

from pipeline_steps.common import params
from pipeline_steps.common.errors import UserError
from pipeline_steps.common.params import ROOT
from pipeline_steps.study import __main__ as study_main
from pipeline_steps.study import design, plan
from tests.pipeline_steps.studies import make


def test_runs_share_the_stages_whose_parameters_are_equal(clean_tree):
    made = plan.make_plan("mine", make())
    one, two, other, _ = made.runs
    shared = ("backbones", "sources", "shards", "tokens")
    assert all(one.jobs[stage] == other.jobs[stage] for stage in shared)  # another arm
    assert all(one.jobs[stage] != two.jobs[stage] for stage in shared)  # other seeds of backbones and data
    assert all(one.jobs[stage] != other.jobs[stage] for stage in ("stage1", "stage2", "stage3", "evaluation"))
    assert len(made.jobs) == 2 * len(shared) + 4 * 5


def test_a_change_of_the_last_stage_shares_all_before(clean_tree):
    arms = {"none": {}, "long": {"overrides": ["training.stage3.num_samples=48000"]}}
    one, _, other, _ = plan.make_plan("mine", make(arms=arms)).runs
    assert {stage for stage in one.jobs if one.jobs[stage] != other.jobs[stage]} == {"stage3", "evaluation", "flops"}


def test_runtime_settings_share_everything(clean_tree):
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


def test_jobs_come_after_those_that_they_need(clean_tree):
    seen = set()
    for name, entry in plan.make_plan("mine", make()).jobs.items():
        assert set(entry.inputs.values()) <= seen
        seen.add(name)


def test_uncommitted_changes_are_refused_but_results_are_not(git_repository):
    (git_repository / "reports/study/mine").mkdir(parents=True)
    (git_repository / "reports/study/mine/runs.csv").write_text("run\n")
    assert len(plan.clean_commit()) == 40
    (git_repository / "code.py").write_text("2")
    with pytest.raises(UserError, match=r"1 file.s. differ from the last commit \(code.py\)"):
        plan.clean_commit()
    assert plan.uncommitted().startswith("1 file(s) differ from the last commit (code.py)")
    assert len(plan.checked_out()) == 40


def test_threads_follow_from_the_scale(clean_tree):
    made = plan.make_plan("mine", make(arms={"large": {"overrides": ["scale=smollm2_135m"]}}, seeds=[1], memory_gb=9))
    found = {stage: made.jobs[stage, key].num_threads for stage, key in made.runs[0].jobs.items()}
    assert {stage for stage, count in found.items() if count == 4} == {*params.TRAINING_STAGES, "evaluation"}
    assert made.as_dict()["memory_mb"] == 9000
    assert {entry.num_threads for entry in plan.make_plan("mine", make()).jobs.values()} == {1}


def named(arms=None, budgets=None, seeds=None):
    return argparse.Namespace(arms=arms, budgets=budgets, seeds=seeds)


def test_only_some_arms(clean_tree):
    study = make()
    made = plan.make_plan("mine", study)
    part = study_main.chosen_part(made, study, named(["A6"]))
    assert [run.arm for run in part.runs] == ["A6", "A6"]
    assert {job.stage for job in part.jobs.values()} == {job.stage for job in made.jobs.values()}
    assert len(part.jobs) == 18
    assert study_main.chosen_part(made, study, named()) == made


def test_only_some_budgets_and_seeds(clean_tree):
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
def test_unknown_arms_budgets_and_seeds_are_refused(arguments, message, clean_tree):
    study = make()
    with pytest.raises(UserError, match=re.escape(message)):
        study_main.chosen_part(plan.make_plan("mine", study), study, arguments)


def test_names_that_no_run_has_together_are_refused(clean_tree):
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
