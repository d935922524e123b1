"""Verdicts on single kept runs: validated, undecided, not compared."""

import re

import pytest

from pipeline_steps.report import __main__ as report
from pipeline_steps.report import verdicts
from tests.pipeline_steps.reported import SETTINGS, Found, item_table, make_run, result_of


def three_seeds(arm, scale, **options):
    base = [make_run(f"none-seed{seed}", "none", seed) for seed in (1, 2, 3)]
    return Found(base[0], base[1:] + [make_run(f"{arm}-seed{seed}", arm, seed, scale, **options) for seed in (1, 2, 3)])


def test_clear_difference_on_three_seeds_is_validated():
    verdict = verdicts.verdicts(three_seeds("A6", 3.0), SETTINGS)[0]
    assert verdict.status == verdicts.VALIDATED
    assert verdict.comparison.ratio == pytest.approx(3.0, rel=0.02)
    assert verdict.comparison.interval[0] < 3.0 < verdict.comparison.interval[1]


def test_equal_losses_do_not_validate_help_but_validate_equality():
    assert verdicts.verdicts(three_seeds("A6", 1.0), SETTINGS)[0].status == verdicts.NOT_VALIDATED
    assert verdicts.verdicts(three_seeds("B1", 1.0), SETTINGS)[1].status == verdicts.VALIDATED


def test_better_sixteen_tokens_do_not_validate_equality():
    assert verdicts.verdicts(three_seeds("B1", 0.6), SETTINGS)[1].status == verdicts.NOT_VALIDATED


def test_an_interval_that_includes_the_threshold_is_undecided():
    verdict = verdicts.verdicts(three_seeds("A6", 1.05), SETTINGS)[0]
    assert verdict.status == verdicts.UNDECIDED
    assert "threshold" in verdict.reasons[0]


def test_one_seed_or_missing_items_is_undecided():
    one = Found(make_run("none", "none", 1), [make_run("A6", "A6", 1, 3.0)])
    verdict = verdicts.verdicts(one, SETTINGS)[0]
    assert verdict.status == verdicts.UNDECIDED
    assert verdict.reasons == ["1 of 3 seeds"]
    assert any("A6-seed2" in command for command in verdict.commands)
    blind = verdicts.verdicts(three_seeds("A6", 3.0, items=False), SETTINGS)[0]
    assert blind.status == verdicts.UNDECIDED
    assert blind.comparison.interval is None


def test_runs_on_different_data_are_not_compared():
    verdict = verdicts.verdicts(three_seeds("A6", 3.0, data="d2"), SETTINGS)[0]
    assert verdict.status == verdicts.UNDECIDED
    assert verdict.comparison is None
    assert "shards_sha256 differs" in verdict.reasons[0]


def test_runs_on_different_items_are_not_compared():
    found = three_seeds("A6", 3.0)
    found.runs[-1].items["key"] = "other-" + found.runs[-1].items["key"]
    verdict = verdicts.verdicts(found, SETTINGS)[0]
    assert verdict.status == verdicts.UNDECIDED
    assert verdict.comparison is None
    assert "different items" in verdict.reasons[0]


def test_an_outdated_kept_run_is_not_compared():
    found = three_seeds("A6", 3.0)
    found.runs.append(make_run("none-seed1", "none", 1))
    assert verdicts.verdicts(found, SETTINGS)[0].status == verdicts.VALIDATED
    found.runs[-1].result.provenance["checkpoint_sha256"] = "another"
    verdict = verdicts.verdicts(found, SETTINGS)[0]
    assert verdict.status == verdicts.UNDECIDED
    assert "reports/runs/none-seed1 is not the run of this page" in verdict.reasons[0]


def test_targets_are_judged_on_the_embedded_world_only():
    result = result_of(item_table())
    table = report.tables.targets(result, SETTINGS.targets)
    assert {row[1] for row in table.rows} == {"met"}
    required, reached = next(row[2:] for row in table.rows if row[0].startswith("blind"))
    assert required == "≤ 10 points"
    assert re.fullmatch(r"[+-]\d+\.\d points \(\w+, the highest\)", reached)
    bad = result.model_copy(deep=True)
    bad.tasks["card"]["autoregressive"].loss = 9.0
    judged = {row[0]: row[1] for row in report.tables.targets(bad, SETTINGS.targets).rows}
    assert judged["loss of card"] == "missed"
    del bad.tasks["gist"]
    assert report.tables.targets(bad, SETTINGS.targets).rows == []


def test_a_single_item_has_no_interval_and_decides_nothing():
    several, one = (result_of(item_table(num_items=count)) for count in (40, 1))
    for build_table in (report.tables.accuracies, report.tables.losses):
        assert " [" in build_table(several).markdown()
        assert " [" not in build_table(one).markdown()
    assert "apart in 7 of 7" in " ".join(report.texts.controls(several, SETTINGS.targets))
    assert "apart in 0 of 7" in " ".join(report.texts.controls(one, SETTINGS.targets))
