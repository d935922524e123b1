"""The scaling grid of a study, from its runs to the tables of its README and the figure of the report."""

from itertools import product

import numpy as np
import pandas as pd
import pytest

from pipeline_steps.common.errors import UserError
from pipeline_steps.common.study_results import TOO_FEW
from pipeline_steps.report import figures, scaling, studies
from pipeline_steps.study import summary
from pipeline_steps.study.collect import earlier_results
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


def design(budgets=BUDGETS, seeds=(1, 2, 3)):
    content = {
        "question": "How?",
        "arms": {arm: {} for arm in ARMS},
        "seeds": seeds,
        "budgets": budgets,
        "series": SERIES,
        "groups": GROUPS,
    }
    return Study.model_validate(content, strict=False)


def loss(arm, task, flops):
    """One token falls fast on the gaze, sixteen hardly; in reading both fall alike, the first from twice as high."""
    way, size = arm.split("_")
    exponent = 0.5 if (way, task) != ("many", "card") else 0.05
    best = {"S": 1.0, "M": 0.8, "L": 1.0}[size]
    return best * (2.0 if (way, task) == ("one", "gist") else 1.0) * (flops / 2e12) ** -exponent


def write_runs(folder, study, kept=lambda arm, budget, seed: True):
    rows, items = [], []
    for arm, (budget, factor), seed in product(study.arms, study.budgets.items(), study.seeds):
        if not kept(arm, budget, seed):
            continue
        samples = 5e3 * factor
        flops = samples * SIZES[arm.split("_")[1]] * (2 if arm.startswith("many") else 1)
        losses = {task: loss(arm, task, flops) * (1 + seed / 100) for task in ("card", "gist")}
        run = f"{arm}-{budget}-{seed}"
        rows.append(
            {"run": run, "arm": arm, "budget": budget, **dict.fromkeys(studies.SEEDS, seed), "attempts": 1}
            | {"training_samples": samples, "training_flops": flops, "training_seconds": 60, "converged": False}
            | {"mean_token_accuracy": 0.5, "exact_match_accuracy": 0.5, "mean_loss": np.mean(list(losses.values()))}
            | {"accuracy_card": 0.5, "accuracy_gist": 0.5, "commit": "c0ffee", "parameters": "0"}
        )
        items += [{"run": run, "task": task, "num_tokens": 10, "loss_sum": 10 * losses[task]} for task in losses]
    folder.mkdir(parents=True)
    pd.DataFrame(rows).to_csv(folder / "runs.csv", index=False)
    pd.DataFrame(items).to_parquet(folder / "items.parquet")


@pytest.fixture(autouse=True)
def without_picture(monkeypatch):
    """runs.png takes seconds, and is tested elsewhere."""
    monkeypatch.setattr(summary, "figure", lambda *_: b"")


@pytest.fixture
def grid(tmp_path):
    study = design()
    write_runs(tmp_path / "grid", study)
    return write_summary("grid", study, tmp_path)


def test_the_readme_has_the_laws_the_sizes_and_the_crossings(grid):
    text = grid.read_text()
    for title in ("Power laws of study grid", "Sizes at equal FLOPs in study grid", "Crossings in study grid"):
        assert f"## {title}" in text
    assert "| need a gaze | one | one_S | 3 × 4 | 100 | 0.5 to 4 |" in text
    assert "Left out" not in text


def test_laws_sizes_and_crossings_are_by_group_of_tasks(grid):
    laws, sizes, crossings = scaling.tables(studies.read_study(grid.parent))
    assert len(laws.rows) == 3 * 6
    exponents = {(row[0], row[2]): row[7][1] for row in laws.rows}
    assert exponents["need a gaze", "one_M"] == pytest.approx(0.5)
    assert exponents["need a gaze", "many_M"] == pytest.approx(0.05)
    assert {row[-1] for row in laws.rows} == {"falls"}
    found = [row for row in sizes.rows if row[0] == "need a gaze"]
    assert {row[-1] for row in found} == {"one_M", "many_M"}
    assert found[0][4].startswith("one_S ")
    assert all(1e8 < row[5][1] < 8e8 for row in found)
    assert {row[2] for row in (*sizes.rows, *crossings.rows)} == {("3", 3)}
    assert [row[1] for row in crossings.rows[:3]] == ["one_S / many_S", "one_M / many_M", "one_L / many_L"]
    verdicts = {(row[0], row[1]): row[-1] for row in crossings.rows}
    assert verdicts["read everything", "one_M / many_M"] == "many_M lower throughout"
    assert verdicts["need a gaze", "one_S / many_S"] == "many_S lower before, one_S after"
    (place,) = (row[6] for row in crossings.rows if (row[0], row[1]) == ("need a gaze", "one_S / many_S"))
    assert place == ("2 [2, 2]", pytest.approx(2e12, rel=0.02))


def test_series_keep_the_order_of_the_study(tmp_path):
    study = design()
    assert list(study.series) != sorted(study.series)
    write_runs(tmp_path / "order", study)
    found = studies.read_study(write_summary("order", study, tmp_path).parent)
    assert [entry.name for entry in found.summary.series] == ["one", "many"]


def test_the_figure_shows_every_arm_in_every_group(grid):
    draw, width, height = scaling.figure(studies.read_study(grid.parent))
    text = figures.svg(draw, width, height)["light"]
    for name in (*ARMS, "all tasks", "need a gaze", "read everything", "training TFLOP"):
        assert name in text


def test_what_is_missing_is_left_out_and_named(tmp_path):
    study = design()
    write_runs(
        tmp_path / "part",
        study,
        lambda arm, budget, seed: budget == "x1" if arm == "many_L" else (arm, budget, seed) != ("one_M", "x8", 3),
    )
    laws, sizes, crossings = scaling.tables(studies.read_study(write_summary("part", study, tmp_path).parent))
    assert "many_L" not in {row[2] for row in laws.rows}
    for table in (laws, sizes, crossings):  # of x8, which seed 3 lacks
        assert "missing: runs of one_M 2. Without runs at two budgets: many_L." in table.note
    assert {row[4].count("_") for row in sizes.rows if row[1] == "many"} == {2}
    assert {row[1] for row in crossings.rows} == {"one_S / many_S", "one_M / many_M"}


def test_pairs_without_a_common_seed_are_named(tmp_path):
    study = design(seeds=(1, 2, 3, 4, 5, 6))
    write_runs(tmp_path / "apart", study, lambda arm, budget, seed: (seed > 3) == (arm == "many_S"))
    *_, crossings = scaling.tables(studies.read_study(write_summary("apart", study, tmp_path).parent))
    assert "Without a common seed or common FLOPs: one_S / many_S." in crossings.note


@pytest.mark.parametrize(("flops", "text"), [(5.2e11, "0.52"), (1.234e13, "12.3"), (1.6e17, "160000")])
def test_flops_are_numbers_of_three_digits(flops, text):
    assert scaling.tflop(flops) == text


def test_few_budgets_or_seeds_decide_nothing(tmp_path):
    for name, study in (("budgets", design({"x1": 1.0})), ("seeds", design(seeds=(1, 2)))):
        write_runs(tmp_path / name, study)
        found = studies.read_study(write_summary(name, study, tmp_path).parent)
        verdicts = {row[-1] for table in scaling.tables(found) for row in table.rows}
        assert verdicts == ({TOO_FEW} if name == "seeds" else set())
        assert (scaling.figure(found) is None) == (name == "budgets")


def test_a_loss_without_a_logarithm_is_refused_with_its_run(grid):
    runs = pd.read_csv(grid.parent / "runs.csv")
    runs.loc[0, "mean_loss"] = 0.0
    runs.to_csv(grid.parent / "runs.csv", index=False)
    with pytest.raises(UserError, match=r"reports/study/grid: all tasks: one_S, budget x1, seed 1\.1\.1: loss is 0\.0"):
        scaling.tables(studies.read_study(grid.parent))


def test_a_run_without_items_is_refused_by_name(grid):
    items = pd.read_parquet(grid.parent / "items.parquet")
    items[items["run"] != "one_S-x1-1"].to_parquet(grid.parent / "items.parquet")
    with pytest.raises(UserError, match=r"items\.parquet has no items of one_S-x1-1"):
        scaling.tables(studies.read_study(grid.parent))


def test_broken_files_are_refused_and_the_summary_stays(grid):
    before = (grid.parent / "summary.json").read_bytes()
    items = pd.read_parquet(grid.parent / "items.parquet")
    items[items["task"] != "gist"].to_parquet(grid.parent / "items.parquet")
    study = design()
    with pytest.raises(UserError, match=r"items\.parquet has no items of task gist"):
        write_summary("grid", study, grid.parent.parent)
    items.drop(columns="loss_sum").to_parquet(grid.parent / "items.parquet")
    with pytest.raises(UserError, match=r"items\.parquet: .*loss_sum.*Restore it \(`git checkout "):
        write_summary("grid", study, grid.parent.parent)
    (grid.parent / "items.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"items\.parquet: .*0 bytes.*run the command in README\.md"):
        earlier_results(grid.parent)
    (grid.parent / "items.parquet").unlink()
    with pytest.raises(UserError, match=r"items\.parquet: missing, .* Delete runs\.csv beside it, too"):
        write_summary("grid", study, grid.parent.parent)
    with pytest.raises(UserError, match=r"items\.parquet: missing beside runs\.csv; delete runs\.csv, too"):
        earlier_results(grid.parent)
    assert (grid.parent / "summary.json").read_bytes() == before
    runs = pd.read_csv(grid.parent / "runs.csv")
    pd.concat([runs, runs.iloc[:1]]).to_csv(grid.parent / "runs.csv", index=False)
    with pytest.raises(UserError, match="one_S-x1-1 has two rows"):
        studies.read_study(grid.parent)


def test_a_study_without_series_has_no_grid(tmp_path):
    study = design().model_copy(update={"series": {}})
    write_runs(tmp_path / "plain", study)
    text = write_summary("plain", study, tmp_path).read_text()
    assert "Power laws" not in text
    found = studies.read_study(tmp_path / "plain")
    assert scaling.tables(found) == []
    assert scaling.figure(found) is None
