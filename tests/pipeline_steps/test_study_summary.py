"""The summary of a study: verdicts, conditions, damaged files."""

import subprocess

import numpy as np
import pandas as pd
import pytest

from pipeline_steps.common.errors import UserError
from pipeline_steps.common.params import ROOT
from pipeline_steps.common.study_results import StudySummary
from pipeline_steps.report.studies import EARLIER_FLOPS, FLOPS_NOTE, read_runs
from pipeline_steps.study import collect, design, results, summary
from tests.pipeline_steps.studies import STUDY, runs_table


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


def test_arms_that_learned_nothing_are_not_equal(tmp_path):
    """Reading of A6 equals the default's. With grey frames both are as good, one of them is not, or nobody knows."""

    def found(blind):
        table = runs_table()
        for arm, level in blind.items():
            table.loc[table["arm"] == arm, ["blind_caption", "blind_gist"]] = level
        (tmp_path / "mine").mkdir(exist_ok=True)
        table.to_csv(tmp_path / "mine/runs.csv", index=False)
        text = summary.write_summary("mine", STUDY, tmp_path).read_text()
        entry = next(e for e in results.comparisons(table, STUDY) if (e.arm, e.group) == ("A6", "reading"))
        remark = "**undecided** at equal samples and FLOPs; neither arm beats itself with grey frames |"
        assert (remark in text) == (entry.beats_blind is False)
        assert "A6, reading: these runs would show equality" not in text
        return entry.verdict, entry.beats_blind

    assert found({"none": 0.88, "A6": 0.89}) == ("undecided", False)
    assert found({"none": 0.88, "A6": 0.5}) == ("equal", True)
    assert found({"none": 0.88}) == ("equal", None)
    assert found({}) == ("equal", None)


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
