"""The decision table: what comparisons decide by which rule."""

from types import SimpleNamespace

import pytest

from pipeline_steps.common import params
from pipeline_steps.common.study_results import Series
from pipeline_steps.report import decisions, studies
from pipeline_steps.report.tables import text_of
from pipeline_steps.study.design import read_study
from tests.pipeline_steps.reported import study_summary, write_study


def test_decisions_follow_from_the_verdicts_and_the_rest_names_its_study(tmp_path):
    cheaper, other = decisions.CHEAPER, decisions.OTHER
    for rule, found, expected in (
        (cheaper, ("equal", "equal"), "take the alternative"),
        (other, ("equal", "equal"), "keep the default"),
        (other, ("worse", "equal"), "take the alternative"),
        (other, ("better", "worse"), "depends on the tasks"),
        (cheaper, ("better", "undecided"), "keep the default"),
        (cheaper, ("equal", "undecided"), "undecided"),
        (other, ("worse", "exploratory"), "undecided"),
        (other, ("unmatched budgets", "equal"), "undecided"),
    ):
        assert decisions.outcome(rule, found) == expected
    few, many = (
        write_study(tmp_path, study_summary(*given)) for given in (("few",), ("many", ("none", "B1"), (3, 4, 5)))
    )
    rows = {row[0]: [text_of(cell) for cell in row[1:]] for row in decisions.table([many, few]).rows}
    assert rows["more tokens: sixteen pooled (B1)"] == [
        *(
            "+44.0 [+30.0, +50.0]",
            "−10.0 [−10.0, −10.0]",
            "+50% [above 15%]",
            "−25% [worse]",
            "depends on the tasks; default: gaze better, reading worse (many, 3 pairs, exploratory, 2 of 6 runs not "
            "converged)",
            "if default worse",
        ),
    ]
    assert rows["more tokens: sixteen pooled (B1), equal FLOPs, own rates"][-2] == "not run (study equal_flops_rates)"
    paired = [entry.model_copy(update={"matched": "FLOPs"}) for entry in many.summary.comparisons]
    flops = studies.Study(many.summary.model_copy(update={"comparisons": paired}), many.runs, many.task_losses)
    of_flops = {row[0]: [text_of(cell) for cell in row[1:]] for row in decisions.table([flops, few]).rows}
    row_of_flops = of_flops["more tokens: sixteen pooled (B1), equal FLOPs, own rates"]
    assert row_of_flops[:-1] == rows["more tokens: sixteen pooled (B1)"][:-1]
    assert "2 pairs" in of_flops["more tokens: sixteen pooled (B1)"][-2]  # of the study at equal samples
    assert rows["freeze: both backbones (F1)"][-2:] == ["not run (study phase1a)", "unless default better"]
    assert len(rows) == len(decisions.CHOICES)
    not_run = [cells[-2].startswith("not run (study ") for cells in rows.values()]
    assert not_run == sorted(not_run)  # last
    assert False in not_run
    assert decisions.missing([many, few]) >= {"equal_flops_rates", "phase1a"}
    assert "confirm_longest" not in decisions.missing([write_study(tmp_path, study_summary(arms=("none", "A6", "B1")))])
    known = {path.stem for path in (params.ROOT / "conf/study").glob("*.yaml")}
    for choice in decisions.CHOICES:
        assert choice.study in known
        assert {choice.arm, choice.baseline} <= set(read_study(choice.study).arms), choice


def test_a_decision_of_a_scaling_grid_is_that_of_its_largest_budget(tmp_path):
    summary = study_summary()
    shared = {"arm": "B1", "groups": {"all": [0.6, 0.6]}, "exact_match": [0.3, 0.3], "num_above_plateau": 0}
    arms = [
        summary.arms[1].model_copy(update=shared | {"budget": name, "training_samples": samples})
        for name, samples in (("x2", 12e4), ("x1", 6e4))
    ]
    pairs = [entry.model_copy(update={"arm": f"B1, {arm.budget}"}) for arm in arms for entry in summary.comparisons]
    grid = summary.model_copy(update={"arms": arms, "comparisons": pairs, "series": [Series(name="one", arms=["B1"])]})
    choice = next(choice for choice in decisions.CHOICES if choice.arm == "B1")
    assert decisions.labels(choice, SimpleNamespace(summary=grid)) == ["B1, x2"]
    plain = grid.model_copy(update={"series": []})
    assert decisions.labels(choice, SimpleNamespace(summary=plain)) == ["B1, x2", "B1, x1"]


@pytest.mark.parametrize(
    ("num_pairs", "tested", "matched", "expected"),
    [
        (6, "undecided", "samples", "undecided"),  # corrected for many questions
        (6, "exploratory", "samples", "better"),
        (5, "undecided", "samples", "better"),
        (2, "undecided", "samples", "too few runs"),
        (5, "unmatched budgets", None, "unmatched budgets"),
    ],
)
def test_intervals_decide_where_the_test_says_nothing(num_pairs, tested, matched, expected):
    entry = SimpleNamespace(differences=[0.1] * num_pairs, interval=(0.09, 0.11), verdict=tested, matched=matched)
    assert decisions.verdict(entry, margin=0.03) == expected


@pytest.mark.parametrize(("beats_blind", "expected"), [(False, "undecided"), (True, "equal"), (None, "equal")])
def test_intervals_do_not_call_arms_equal_that_learned_nothing(beats_blind, expected):
    entry = {"differences": [0.0] * 3, "interval": (-0.01, 0.01), "verdict": "undecided", "matched": "samples"}
    assert decisions.verdict(SimpleNamespace(**entry, beats_blind=beats_blind), margin=0.03) == expected


@pytest.mark.parametrize(
    ("num_pairs", "verdict", "split", "words"),
    [
        (3, "better", "test", "3 pairs, exploratory"),
        (3, "better", "validation", "3 pairs, validation split"),
        (6, "better", "test", "6 pairs, tested"),
        (6, "exploratory", "test", "6 pairs, exploratory"),
    ],
)
def test_a_decision_tells_its_split_and_explores_without_a_test(num_pairs, verdict, split, words):
    summary = study_summary(seeds=range(num_pairs), split=split)
    own = {entry.group: entry.model_copy(update={"verdict": verdict}) for entry in summary.comparisons}
    study = SimpleNamespace(name="mine", summary=summary)
    facts = decisions.attribution(study, own)
    open_runs = f"2 of {2 * num_pairs} runs not converged"
    assert decisions.attributed("undecided", facts) == f"undecided (mine, {words}, {open_runs})"
    assert decisions.shared([facts, facts | {"study": "other"}]) == {
        name: fact for name, fact in facts.items() if name != "study"
    }
