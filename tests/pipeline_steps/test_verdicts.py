"""Verdicts and ablation tables on runs with known answers."""

import numpy as np
import pandas as pd
import pytest

from pipeline_steps.common import metrics
from pipeline_steps.report import budgets, differences, verdicts
from pipeline_steps.report.budgets import Budget
from pipeline_steps.report.inputs import Run
from pipeline_steps.report.verdicts import NOT_VALIDATED, UNDECIDED, VALIDATED
from tests.pipeline_steps.counted import report_section

TASKS = ("card", "gist")
MODE = "autoregressive"
SETTINGS = report_section("Report", TASKS)
BUDGET = Budget(1000, 1e9)
DIFFICULTY = np.random.default_rng(0).gamma(4.0, 0.25, (len(TASKS), 40))


def make_run(ablation, seed, scale=1.0, spread=0.02, budget=BUDGET, correct=3):
    """A run whose items lose DIFFICULTY times `scale` on average, each with noise of `spread`."""
    rng = np.random.default_rng(1000 * seed + sum(map(ord, ablation)))
    rows = [
        (f"{task}-{item}", 0, task, MODE, 5, 5 * loss * scale * (1 + spread * rng.uniform(-1, 1)), correct)
        for task, losses in zip(TASKS, DIFFICULTY, strict=True)
        for item, loss in enumerate(losses)
    ]
    columns = ["key", "item", "task", "mode", "num_tokens", "loss_sum", "num_correct"]
    items = pd.DataFrame(rows, columns=columns)
    return Run(f"{ablation}-seed{seed}", ablation, seed, result_of(items), items, budget)


def result_of(items):
    tasks = {}
    for task, rows in items.groupby("task"):
        loss, accuracy = rows.loss_sum.sum() / rows.num_tokens.sum(), rows.num_correct.sum() / rows.num_tokens.sum()
        score = {"loss": loss, "accuracy": accuracy, "num_items": len(rows), "num_tokens": 5 * len(rows)}
        intervals = {"loss_interval": (loss, loss), "accuracy_interval": (accuracy, accuracy)}
        tasks[task] = {MODE: metrics.Score(**score, **intervals)}
    provenance = {"shards_sha256": "d", "tokens_sha256": "d", "split": "test"}
    return metrics.EvaluationResult.model_construct(tasks=tasks, provenance=provenance)


class Found:
    """What verdicts and tables need of `Inputs`."""

    def __init__(self, runs):
        self.current, self.runs = runs[0], runs[1:]


def runs_of(arm, scales, **options):
    """A default run and one of `arm` for every scale, seeds 1, 2, ..."""
    seeds = range(1, len(scales) + 1)
    base = [make_run("none", seed) for seed in seeds]
    return Found(base + [make_run(arm, seed, scale, **options) for seed, scale in zip(seeds, scales, strict=True)])


def helps(found):
    return verdicts.verdicts(found, SETTINGS)[0]


def equals(found):
    return verdicts.verdicts(found, SETTINGS)[1]


@pytest.mark.parametrize(
    ("scales", "status"),
    [((2.0, 2.1, 1.9), VALIDATED), ((1.0, 1.01, 0.99), NOT_VALIDATED), ((0.6, 0.7, 0.65), NOT_VALIDATED)],
)
def test_verdict_on_planned_queries(scales, status):
    assert helps(runs_of("A6", scales)).status == status


@pytest.mark.parametrize(
    ("scales", "status", "words"),
    [
        ((1.0, 1.005, 0.995), VALIDATED, "One token equals sixteen within 5%"),
        ((1.5, 1.45, 1.55), VALIDATED, "One token is better than sixteen by more than 5%"),
        ((1.05, 1.06, 1.04), VALIDATED, "it may be equal or better"),
        ((0.7, 0.72, 0.68), NOT_VALIDATED, "One token is worse than sixteen by more than 5%"),
        ((0.95, 0.99, 0.91), UNDECIDED, "The tests show neither that one token is equal nor that it is worse"),
    ],
)
def test_verdict_on_one_token_against_sixteen(scales, status, words):
    verdict = equals(runs_of("B1", scales))
    assert (verdict.status, words in verdict.statement) == (status, True)
    assert "two one-sided tests: not worse by 5% p" in verdict.statement


def test_a_verdict_states_effect_interval_seeds_and_items():
    verdict = helps(runs_of("A6", (2.0, 2.0, 2.0), correct=2))
    assert "2.00 times that of planned queries [" in verdict.statement
    assert "95% interval over seeds and items" in verdict.statement
    assert "accuracy 40.0% against 60.0%, -20.0 points [-20.0, -20.0]" in verdict.statement
    assert "3 seeds, 2 tasks, 80 items; equal training samples (iso-sample)" in verdict.statement


def test_opposite_seeds_are_undecided():
    verdict = helps(runs_of("A6", (3.0, 0.7, 2.5)))
    assert verdict.status == UNDECIDED
    assert any("the seeds disagree: ratios of 3.0" in reason for reason in verdict.reasons)


def test_one_seed_is_always_undecided():
    verdict = helps(runs_of("A6", (3.0,)))
    assert verdict.status == UNDECIDED
    assert verdict.reasons == ["1 of 3 seeds"]
    assert "95% interval over items only" in verdict.statement


def test_a_wide_interval_is_undecided():
    verdict = helps(runs_of("A6", (1.1, 1.0, 1.4), spread=0.5))
    assert verdict.status == UNDECIDED
    assert "includes 1.05" in verdict.reasons[0]


def test_budgets_are_named_and_not_mixed():
    same = helps(runs_of("A6", (2.0,) * 3, budget=Budget(1000, 0.6e9)))
    assert "equal training samples (iso-sample) (samples ×1.00, compute ×0.60)" in same.statement
    found = runs_of("A6", (2.0,) * 3, budget=Budget(1000, 0.6e9))
    found.runs[-1].budget = Budget(1700, 1e9)
    verdict = helps(found)
    assert verdict.status == UNDECIDED
    assert "the training budgets differ from seed to seed: iso-FLOP, iso-sample" in verdict.reasons


@pytest.mark.parametrize(
    ("budget", "reason"),
    [
        (Budget(100, 1e8), "neither equal training samples nor equal training compute"),
        (None, "training budget not kept"),
    ],
)
def test_without_matched_budgets_there_is_no_verdict(budget, reason):
    """An arm with a tenth of the samples, or with an unknown number, is undecided, however large the difference."""
    for ablation, judged in (("A6", helps), ("B1", equals)):
        verdict = judged(runs_of(ablation, (2.0,) * 3, budget=budget))
        assert (verdict.status, verdict.reasons) == (UNDECIDED, [reason])
    table = differences.tables(runs_of("A6", (2.0,) * 3, budget=budget), SETTINGS)[0]
    assert table.rows[0][5] == f"undecided: {reason}"


def test_runs_with_different_scored_tokens_are_not_compared():
    found = runs_of("A6", (2.0,) * 3)
    found.runs[-1].items.loc[0, "num_tokens"] = 6
    assert "different items or tokens" in helps(found).reasons[0]


def ablation_study():
    runs = [make_run("none", seed) for seed in (1, 2, 3)]
    arms = {
        "A6": (2.0, Budget(1000, 0.6e9)),
        "A4": (1.0, BUDGET),
        "B1": (0.5, Budget(1000, 1.8e9)),
        "B1_same_compute": (0.8, Budget(555, 1e9)),
        "other": (1.0, None),
    }
    for name, (scale, budget) in arms.items():
        runs += [make_run(name, seed, scale, budget=budget) for seed in (1, 2, 3)]
    return [*runs, make_run("K4", 1, 2.0), make_run("K5", 9, 2.0)]


def test_ablation_tables_are_separate_by_budget_and_holm_corrected():
    found = {table.name: table for table in differences.tables(Found(ablation_study()), SETTINGS)}
    assert list(found) == ["ablations_iso_sample", "ablations_iso_flop", "ablations_unknown"]
    rows = {row[0]: row for row in found["ablations_iso_sample"].rows}
    assert list(rows) == ["A4", "A6", "B1", "K4"]
    words = {name: row[5] for name, row in rows.items()}
    assert words == {"A4": "the same within 5%", "A6": "worse", "B1": "better", "K4": "undecided: 1 of 3 seeds"}
    p_values = [rows[name][3][1] for name in ("A4", "A6", "B1")]
    assert [rows[name][4][1] for name in ("A4", "A6", "B1")] == pytest.approx(differences.holm(p_values))
    assert rows["K4"][3] == differences.ABSENT
    assert rows["A6"][1][1] == pytest.approx(2.0, abs=0.01)
    assert rows["A6"][8] == ("×0.60", pytest.approx(0.6))
    assert [row[0] for row in found["ablations_iso_flop"].rows] == ["B1_same_compute"]
    assert "Not compared: K5 (no run of the default recipe with the same seed)" in found["ablations_unknown"].note


def test_holm_requires_smaller_p_values_with_more_ablations():
    """A difference that is found alone may not be found among fifty."""
    runs = [make_run("none", seed) for seed in (1, 2, 3)]
    runs += [make_run("A1", seed, scale) for seed, scale in ((1, 1.10), (2, 1.13), (3, 1.16))]
    others = [make_run(f"N{number}", seed) for number in range(49) for seed in (1, 2, 3)]
    alone, among = (
        next(row for row in differences.tables(Found(given), SETTINGS)[0].rows if row[0] == "A1")
        for given in (runs, runs + others)
    )
    assert (alone[5], among[5]) == ("worse", "undecided: the interval is too wide")


def test_without_runs_there_is_no_ablation_table():
    assert differences.tables(Found([make_run("none", 1)]), SETTINGS) == []


def test_compute_is_equal_within_two_per_cent():
    own, other = make_run("none", 1), make_run("B1", 1, budget=Budget(500, 1.019e9))
    assert budgets.kind_of([own], [other]) == budgets.ISO_FLOP
    other.budget = Budget(500, 1.03e9)
    assert budgets.kind_of([own], [other]) == budgets.UNMATCHED
