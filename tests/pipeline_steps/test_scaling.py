"""The scaling grid of a study, from its runs to the tables of its README and the figure of the report."""

import numpy as np
import pandas as pd
import pytest

from pipeline_steps.report import figures, scaling, studies
from pipeline_steps.study.design import Study
from pipeline_steps.study.summary import write_summary

BUDGETS = {"x1": 1.0, "x2": 2.0, "x4": 4.0, "x8": 8.0}
SIZES = {"S": 1e8, "M": 2e8, "L": 4e8}
SERIES = {
    "one": [f"one_{size}" for size in SIZES],
    "many": [f"many_{size}" for size in SIZES],
}
ARMS = [*SERIES["one"], *SERIES["many"]]
GROUPS = {"gaze": ["card"], "reading": ["gist"]}


def design(budgets=BUDGETS):
    arms = {arm: {} if number == 0 else {"overrides": [f"ablation={arm}"]} for number, arm in enumerate(ARMS)}
    return Study.model_validate(
        {"question": "How?", "arms": arms, "seeds": [1], "budgets": budgets, "series": SERIES, "groups": GROUPS},
        strict=False,
    )


def loss(arm, task, flops):
    """One token falls fast on the gaze, sixteen hardly; in reading both fall alike, the first from twice as high."""
    way, size = arm.split("_")
    exponent = 0.5 if (way, task) != ("many", "card") else 0.05
    best = {"S": 1.0, "M": 0.8, "L": 1.0}[size]
    return best * (2.0 if (way, task) == ("one", "gist") else 1.0) * (flops / 1e12) ** -exponent


def write_runs(folder, study, kept=lambda arm, budget: True):
    rows, items = [], []
    for arm in study.arms:
        for budget, factor in study.budgets.items():
            if not kept(arm, budget):
                continue
            samples = 5e3 * factor
            flops = samples * SIZES[arm.split("_")[1]] * (2 if arm.startswith("many") else 1)
            losses = {task: loss(arm, task, flops) for task in ("card", "gist")}
            run = f"{arm}-{budget}"
            rows.append(
                {"run": run, "arm": arm, "budget": budget, **dict.fromkeys(studies.SEEDS, 1), "attempts": 1}
                | {"training_samples": samples, "training_flops": flops, "training_seconds": 60, "converged": False}
                | {"mean_token_accuracy": 0.5, "exact_match_accuracy": 0.5, "mean_loss": np.mean(list(losses.values()))}
                | {"accuracy_card": 0.5, "accuracy_gist": 0.5, "commit": "c0ffee"}
            )
            items += [
                {"run": run, "task": task, "num_tokens": 10, "loss_sum": 10 * value} for task, value in losses.items()
            ]
    folder.mkdir(parents=True)
    pd.DataFrame(rows).to_csv(folder / "runs.csv", index=False)
    pd.DataFrame(items).to_parquet(folder / "items.parquet")


@pytest.fixture
def grid(tmp_path):
    study = design()
    write_runs(tmp_path / "grid", study)
    return write_summary("grid", study, tmp_path)


def test_the_readme_has_the_laws_the_best_sizes_and_the_crossings(grid):
    text = grid.read_text()
    for title in ("Power laws of study grid", "Best size at equal FLOPs in study grid", "Crossings in study grid"):
        assert f"## {title}" in text
    assert "| need a gaze | one | one_S | 4 | 100 | 0.5 to 4 |" in text


def test_laws_sizes_and_crossings_are_by_group_of_tasks(grid):
    laws, sizes, crossings = scaling.tables(studies.read_study(grid.parent))
    assert len(laws.rows) == 3 * 6
    exponents = {(row[0], row[2]): row[7][1] for row in laws.rows}
    assert exponents["need a gaze", "one_M"] == pytest.approx(0.5)
    assert exponents["need a gaze", "many_M"] == pytest.approx(0.05)
    assert {row[-1] for row in laws.rows} == {"falls"}
    best = {row[-1] for row in sizes.rows if row[0] == "need a gaze"}
    assert best == {"one_M", "many_M"}
    assert {row[6][0] for row in sizes.rows if row[0] == "need a gaze"} != {"–"}
    verdicts = {row[0]: row[-1] for row in crossings.rows}
    assert verdicts["read everything"] == "many lower throughout"
    assert verdicts["need a gaze"].startswith("one lower")


def test_the_figure_shows_every_arm_in_every_group(grid):
    draw, width, height = scaling.figure(studies.read_study(grid.parent))
    text = figures.svg(draw, "light", width, height)
    for name in (*ARMS, "need a gaze", "read everything", "training TFLOP"):
        assert name in text


def test_arms_without_two_budgets_are_left_out_and_nothing_is_extrapolated(tmp_path):
    study = design()
    write_runs(tmp_path / "part", study, lambda arm, budget: arm.startswith("one") or budget == "x1")
    folder = write_summary("part", study, tmp_path).parent
    laws, sizes, crossings = scaling.tables(studies.read_study(folder))
    assert {row[1] for row in laws.rows} == {row[1] for row in sizes.rows} == {"one"}
    assert crossings.rows == []
    few = design({"x1": 1.0, "x2": 2.0})
    write_runs(tmp_path / "few", few)
    laws, sizes, crossings = scaling.tables(studies.read_study(write_summary("few", few, tmp_path).parent))
    assert {row[-1] for row in laws.rows} == {"–"}  # two budgets have a law, but no interval
    assert sizes.rows == crossings.rows == []


def test_a_study_without_series_has_no_grid(tmp_path):
    study = design().model_copy(update={"series": {}})
    write_runs(tmp_path / "plain", study)
    text = write_summary("plain", study, tmp_path).read_text()
    assert "Power laws" not in text
    found = studies.read_study(tmp_path / "plain")
    assert scaling.tables(found) == []
    assert scaling.figure(found) is None
