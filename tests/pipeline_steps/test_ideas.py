"""The research's ideas: gains of planned queries in next-frame prediction, and the table of all ideas."""

import json
from functools import reduce
from operator import getitem

import numpy as np
import pandas as pd
import pytest

from pipeline_steps.common.diagnostic_results import NextFrameResult, NextFrameScore
from pipeline_steps.common.params import ROOT
from pipeline_steps.common.study_results import CLIPS, StudySummary
from pipeline_steps.report import ideas, studies, study_tables
from pipeline_steps.report.statistics import interval_verdict
from pipeline_steps.report.tables import text_of
from pipeline_steps.study import next_frame, results, statistics, summary
from pipeline_steps.study.design import EqualFlops, arm_parameters, composed, read_study
from tests.pipeline_steps.reported import build, study_summary, write_root, write_study

STUDY = read_study("next_frame")
FINE = {  # loss after one planned query, seed by seed, on moving and on static clips; the static query has 1 and 0.5
    "latent": ([0.98, 0.96, 0.97], [0.5, 0.5, 0.5]),  # gains .02 .04 .03, and 0
    "delta": ([1.002, 0.998, 1.0], [0.55, 0.54, 0.56]),  # gains -.002 .002 0, and -.1 -.08 -.12
    "flow": ([0.9, 1.1, 0.9], [0.5, None, 0.5]),  # gains .1 -.1 .1, and 0 0; the second run has no static clips
    "drop": ([0.97, 0.97, 0.97], [0.5, 0.5, 0.5]),  # gains .03 .03 .03
    "skip": ([0.9], [0.4]),  # one seed
    "latent_A6": ([None, None, None], [None, None, None]),  # one pass
    "beside_text": ([0.99, 0.99, 0.99], [0.5, 0.5, 0.5]),  # trains answers
}
ANSWERS = {"training_samples": 18000, "training_flops": 1e13, "training_seconds": 200.0, "attempts": 1}
ANSWERS |= {"mean_token_accuracy": 0.125, "exact_match_accuracy": 0.375, "mean_loss": 5.0, "converged": False}
ANSWERS |= {f"accuracy_{task}": 0.125 for task in ("card", "follow", "ask_colour", "ask_place")}
ANSWERS |= {f"accuracy_{task}": 0.125 for task in ("caption", "image", "gist")}
ANSWERS |= {"commit": "c0ffee", "parameters": "0"}


def row(arm, number, moving, static):
    """A row of runs.csv: `number` is the seed - 1."""
    names = {"run": f"{arm}-{number}", "arm": arm, "budget": "x1", **dict.fromkeys(results.SEEDS, number + 1)}
    losses = {}
    for group, fine, coarse in (("videos", moving, 1.0), ("image", static, 0.5)):
        absent = arm == "flow" and fine is None
        state = 2 * coarse if fine is None else 1.05 * fine
        values = {"coarse": coarse, "fine_1": fine, "fine_2": 9.0, "shuffled_state": state, "unchanged": 2 * coarse}
        values |= {"no_state": 1.5 * (fine or coarse), "wins": None if fine is None else 0.25 * (1 + number)}
        losses |= {f"next_frame_{group}_{name}": None if absent else value for name, value in values.items()}
    return names | ANSWERS | losses


@pytest.fixture(scope="module")
def table():
    rows = []
    for arm, (moving, static) in FINE.items():
        rows += [row(arm, number, *pair) for number, pair in enumerate(zip(moving, static, strict=True))]
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def found(table):
    return results.summarise("next_frame", table, STUDY)


def arm_of(found, name):
    return next(arm for arm in found.arms if arm.arm == name)


def test_gains_are_one_minus_fine_over_coarse_with_a_t_interval_over_the_runs(found):
    moving, static = (arm_of(found, "latent").next_frame[group] for group in ("videos", "image"))
    assert moving.gain == pytest.approx([0.02, 0.04, 0.03])
    half = 4.302653 * 0.01 / 3**0.5  # quantile of Student's distribution with two degrees of freedom, s = .01
    assert moving.interval == pytest.approx((0.03 - half, 0.03 + half))
    assert (moving.verdict, static.verdict) == ("better", "equal")
    assert moving.loss["fine"] == [0.98, 0.96, 0.97]
    assert moving.wins == [0.25, 0.5, 0.75]
    assert moving.relative("shuffled_state") == pytest.approx(1.05)
    assert moving.relative("no_state") == pytest.approx(1.5)
    assert moving.relative("unchanged") == pytest.approx((2 / 0.98 + 2 / 0.96 + 2 / 0.97) / 3)
    assert moving.relative("no_previous") is None
    assert (moving.differences, moving.differences_interval) == ([], None)


def test_the_interval_decides(found):
    verdicts = {(arm.arm, group): entry.verdict for arm in found.arms for group, entry in arm.next_frame.items()}
    assert verdicts["delta", "videos"] == "equal"  # 0 +- .005
    assert verdicts["delta", "image"] == "worse"  # -.1 +- .05
    assert verdicts["flow", "videos"] == "undecided"  # .033 +- .287
    assert verdicts["flow", "image"] == "too few runs"  # one run has no static clips
    assert verdicts["drop", "videos"] == "better"
    assert verdicts["skip", "videos"] == verdicts["skip", "image"] == "too few runs"
    assert verdicts["latent_A6", "videos"] == "better"  # the planned queries of latent
    assert verdicts["latent_A6", "image"] == "equal"
    assert statistics.gain_verdict(np.array([0.02, 0.04, 0.03]), 0.06)[0] == "equal"  # a larger margin


def test_absent_losses_are_null_and_one_run_has_no_interval(found):
    static, one = arm_of(found, "flow").next_frame["image"], arm_of(found, "skip").next_frame["videos"]
    assert static.gain == [0, None, 0]
    assert static.loss["fine"] == [0.5, None, 0.5]
    assert static.wins == [0.25, None, 0.75]
    assert (one.gain, one.interval) == ([pytest.approx(0.1)], None)
    single = arm_of(found, "latent_A6").next_frame["videos"]
    assert "fine" not in single.loss
    assert single.relative("shuffled_state") == 2  # of the only pass


def test_gains_are_compared_with_the_baseline_where_the_target_is_the_same(found):
    drop, skip = arm_of(found, "drop").next_frame["videos"], arm_of(found, "skip").next_frame["videos"]
    assert drop.differences == pytest.approx([-0.01, 0.01, 0])
    half = 4.302653 * 0.01 / 3**0.5
    assert drop.differences_interval == pytest.approx((-half, half), abs=1e-6)
    assert (skip.differences, skip.differences_interval) == ([pytest.approx(-0.08)], None)
    assert arm_of(found, "delta").next_frame["videos"].differences == []
    assert arm_of(found, "flow").next_frame["videos"].differences == []


def test_runs_of_equal_flops_are_compared_with_the_budget_that_they_follow(table):
    study = STUDY.model_copy(update={"budgets": {"x1": 1.0, "same": EqualFlops(flops_of="x1")}})
    same = table.assign(budget=table["arm"].map({"latent_A6": "same", "drop": "same"}).fillna("x1"))
    drop, single = (arm_of(results.summarise("next_frame", same, study), name) for name in ("drop", "latent_A6"))
    assert (drop.budget, single.budget) == ("same", "same")
    assert drop.next_frame["videos"].differences == pytest.approx([-0.01, 0.01, 0])
    assert single.next_frame["videos"].gain == pytest.approx([0.02, 0.04, 0.03])


def test_static_looks_that_were_trained_apart_are_compared_with_planned_ones_by_seed(table):
    changed = table[(table["arm"] != "latent") | (table["training_seed"] > 1)]
    single = arm_of(results.summarise("next_frame", changed, STUDY), "latent_A6").next_frame
    assert single["videos"].gain == [None, pytest.approx(0.04), pytest.approx(0.03)]
    assert single["image"].gain == [None, 0, 0]
    assert single["videos"].differences == []
    changed = table[table["arm"] != "latent"]
    alone = arm_of(results.summarise("next_frame", changed, STUDY), "latent_A6").next_frame["videos"]
    assert (alone.gain, alone.verdict) == ([None, None, None], "single pass")


def test_a_coarse_loss_of_zero_has_no_gain(table):
    changed = table.assign(next_frame_image_coarse=0.0)
    static = arm_of(results.summarise("next_frame", changed, STUDY), "latent").next_frame["image"]
    assert static.gain == [None, None, None]
    assert static.verdict == "too few runs"


def test_a_gain_on_static_clips_is_relative_to_their_own_loss(table):
    """Half of a loss that is a thousandth of that on moving clips is no equality."""
    small = table.assign(
        next_frame_image_coarse=0.001, next_frame_image_fine_1=table["next_frame_image_fine_1"].map(lambda _: 0.0005)
    )
    static = arm_of(results.summarise("next_frame", small, STUDY), "latent").next_frame["image"]
    assert static.gain == pytest.approx([0.5] * 3)
    assert static.verdict == "better"


def test_accuracies_of_arms_without_text_loss_are_no_results(tmp_path, table, found):
    assert [arm.arm for arm in found.arms if arm.answers_trained] == ["beside_text"]
    assert found.comparisons == []  # the baseline trains no answers
    folder = tmp_path / "next_frame"
    folder.mkdir()
    table.to_csv(folder / "runs.csv", index=False)
    text = summary.write_summary("next_frame", STUDY, tmp_path).read_text()
    assert "Answers were not trained in stages 2 and 3 of latent, delta, flow, drop, skip, latent_A6, so" in text
    assert "| latent | x1 | 3 | – | – | – | – | – | – |" in text
    assert "| beside_text | x1 | 3 | 12.5 (12.5 to 12.5) |" in text
    assert (
        "| latent | x1 | moving clips | 3 | +3.00 | [+0.52, +5.48] | planned queries better | 50.0 (25.0 to 75.0) "
        "| 0.97 | 1.050 | 1.500 | – | 2.062 | – | – |"
    ) in text
    assert "| flow | x1 | static clips | 2 | +0.00 | [+0.00, +0.00] | too few runs |" in text
    assert (
        "| skip | x1 | 1 | 1 | 1 | – | – | – | – | – | – | – | – | – | – | – | +10.00 | +20.00 | c0ffee |" in text
    )  # its run
    assert (folder / "runs.png").exists()
    without = table[table["arm"] != "beside_text"]
    without.to_csv(folder / "runs.csv", index=False)
    text = summary.write_summary("next_frame", STUDY, tmp_path).read_text()
    assert "12.5" not in text
    assert "runs.png" not in text
    assert not (folder / "runs.png").exists()
    again = (folder / "summary.json").read_bytes()
    summary.write_summary("next_frame", STUDY, tmp_path)
    assert (folder / "summary.json").read_bytes() == again


def test_summaries_of_an_earlier_version_have_no_next_frame_part(found):
    content = json.loads(found.model_dump_json())
    del content["next_frame_margin"]
    for arm in content["arms"]:
        del arm["next_frame"], arm["answers_trained"]
    old = StudySummary.model_validate(content)
    assert all(arm.answers_trained and arm.next_frame == {} for arm in old.arms)
    for path in (ROOT / "reports/study").glob("*/summary.json"):
        assert StudySummary.model_validate_json(path.read_text()).arms


MEASURES = {"wins_last_frames": 0.25, "token_similarity": 0.99, "state_sensitivity": 0.5, "previous_sensitivity": 0.75}


def result_of(*tasks):
    score = NextFrameScore(
        loss={"coarse": 1.0, "fine_1": 0.9, "shuffled_state": 1.1},
        per_frame={"coarse": [1.0, 2.0], "fine_1": [0.9, 1.0]},
        wins=0.5,
        no_state=1.2,
        **{"num_clips": 1, "num_pairs": 1},
        **MEASURES,
    )
    passes = {"all": {"coarse": 1.0, "fine_1": 0.9}, "8": {"coarse": 1.0, "fine_1": 0.8, "fine_2": 0.7}}
    return NextFrameResult(settings={}, groups=dict.fromkeys(tasks, score), passes=passes)


def test_collected_columns_are_what_the_summary_reads():
    columns = next_frame.columns_of(result_of("videos", "card"))
    assert {name: columns.pop(f"next_frame_videos_{name}") for name in MEASURES} == MEASURES
    assert columns == {
        **{"next_frame_videos_coarse": 1.0, "next_frame_videos_fine_1": 0.9},
        **{"next_frame_videos_shuffled_state": 1.1, "next_frame_videos_no_state": 1.2, "next_frame_videos_wins": 0.5},
        **{"next_frame_frame_1_coarse": 1.0, "next_frame_frame_2_coarse": 2.0},
        **{"next_frame_frame_1_fine_1": 0.9, "next_frame_frame_2_fine_1": 1.0},
        **{"next_frame_passes_all_coarse": 1.0, "next_frame_passes_all_fine_1": 0.9},
        **{"next_frame_passes_8_coarse": 1.0, "next_frame_passes_8_fine_1": 0.8, "next_frame_passes_8_fine_2": 0.7},
    }
    assert next_frame.columns_of(None) == {}


def test_arms_with_shorter_clips_keep_their_gains_by_frame(table):
    rows = table[table["arm"] == "latent"].assign(**next_frame.columns_of(result_of("videos")))
    longer = {f"next_frame_frame_3_{name}": [1.0] for name in ("coarse", "fine_1")}
    rows = pd.concat([rows, rows.iloc[:1].assign(arm="frames_16", run="long", **longer)])
    gains = {arm.arm: arm.next_frame["videos"].frame_gains for arm in results.summarise("next_frame", rows, STUDY).arms}
    assert gains == {"latent": pytest.approx([0.1, 0.5]), "frames_16": pytest.approx([0.1, 0.5, 0.0])}


@pytest.mark.parametrize(
    ("seeds", "verdict"), [((), "better"), ((0, 1, 2), "better"), ((1, 2), "undecided"), ((9,), "better")]
)
def test_a_verdict_needs_the_preregistered_seeds_alone_too(table, seeds, verdict):
    """Two runs alone give none; an arm without these seeds is judged by its own."""
    rows = table[table["arm"] == "latent"]
    study = STUDY.model_copy(update={"confirmation_seeds": seeds})
    found = results.summarise("next_frame", rows.assign(training_seed=range(len(rows))), study)
    assert arm_of(found, "latent").next_frame["videos"].verdict == verdict
    told = "Undecided if the preregistered seeds" in summary.page(found, rows, study)
    assert told == bool(seeds)


def test_a_head_that_predicts_no_better_than_no_change_has_no_verdict(table):
    trivial = table.assign(next_frame_videos_unchanged=0.5)
    found = results.summarise("next_frame", trivial, STUDY)
    assert "| latent | x1 | moving clips | 3 | +3.00 | [+0.52, +5.48] | not learned: no" in summary.page(
        found, trivial, STUDY
    )
    cells = cells_of([kept(found, trivial)])["first system: the next frame's latent"]
    assert cells["verdict"] == "not learned: no better than predicting no change (3 runs)"
    assert (cells["moving clips, %"], cells["static clips, %"]) == ("–", "–")


@pytest.mark.parametrize("task", ["image", "still"])
def test_static_clips_of_both_worlds_are_one_group(task):
    assert next_frame.columns_of(result_of("videos", task))["next_frame_image_coarse"] == 1.0


def test_what_else_was_measured_is_shown(table):
    rows = table[table["arm"] == "latent"].assign(**next_frame.columns_of(result_of("videos")))
    found = results.summarise("next_frame", rows, STUDY)
    videos = arm_of(found, "latent").next_frame["videos"]
    assert videos.frame_gains == pytest.approx([0.1, 0.5])
    assert videos.pass_gains == {"all": [pytest.approx(0.1)], "8": pytest.approx([0.2, 0.3])}
    text = summary.page(found, rows, STUDY)
    assert "| latent | x1 | 25.0 | 0.990 | 0.500 | 0.750 | +10.00, +50.00 | all: +10.00; 8: +20.00, +30.00 |" in text
    cells = cells_of([kept(found, rows)])["first system: the next frame's latent"]
    assert cells["won in the last four frames, %"] == "25.0 [25–25]"
    assert cells["sensitivity to state / previous latent"] == "0.50 / 0.75"
    assert cells["token similarity"] == "0.99"
    assert "sensitivity to the state" not in summary.page(results.summarise("next_frame", table, STUDY), table, STUDY)


def test_figures_of_some_of_the_runs_say_of_how_many(table):
    rows = table[table["arm"] == "latent"].assign(**next_frame.columns_of(result_of("videos")))
    names = ("no_state", "wins_last_frames", "token_similarity")
    for name, count in zip(names, (2, 1, 2), strict=True):
        rows.loc[rows.index[count:], f"next_frame_videos_{name}"] = None
    cells = cells_of([kept(results.summarise("next_frame", rows, STUDY), rows)])
    cells = cells["first system: the next frame's latent"]
    assert cells["won in the last four frames, %"] == "25.0 (1 run)"
    assert cells["token similarity"] == "0.99 (2 runs)"
    assert cells["loss without the state, ×"] == "1.22 / 1.33 (2 runs)"
    assert cells["sensitivity to state / previous latent"] == "0.50 / 0.75"


# ---------------------------------------------------------------- the table


def cells_of(found):
    """{idea: texts of its cells by column} of the tables of ideas."""
    return {
        row[0]: dict(zip(table.columns, map(text_of, row), strict=True))
        for table in ideas.tables(found)
        for row in table.rows
    }


def kept(found, table):
    return studies.Study(found, table, None)


def test_every_idea_has_its_arm_study_and_parameter_in_conf():
    assert {idea.choice.decision.split()[0] for idea in ideas.IDEAS} == {"first", *map(str, range(1, 13)), "fovea"}
    for idea in ideas.IDEAS:
        study = read_study(idea.choice.study)
        assert {idea.choice.arm, idea.choice.baseline} <= set(study.arms), idea
        own, other = arm_parameters(study, idea.choice.arm), arm_parameters(study, idea.choice.baseline)
        if idea.choice.arm == idea.choice.baseline:  # what the study itself changes
            other = composed(())
        for parameter in idea.parameters:
            keys = parameter.replace("stageN", "stage3").split(".")
            assert reduce(getitem, keys, own) != reduce(getitem, keys, other), (idea, parameter)


def test_ideas_without_runs_name_the_study():
    rows = cells_of([])
    assert len(rows) == len(ideas.IDEAS)
    assert rows["3 skip: query to head"]["verdict"] == "not run (study next_frame)"
    assert rows["5 entropy margin: weight 0.1"]["verdict"] == "not run (study ideas)"
    for name in ("low resolution alone", "the same at equal FLOPs"):
        assert rows[f"fovea: {name}"]["verdict"] == "not run (study fovea)"
    assert rows["10 motion: objects glide, flow"]["verdict"] == "not run (study next_frame_objects)"
    assert ideas.finding([]).endswith(
        "not measured for latent on moving clips, latent on static clips, delta on moving clips, delta on static clips"
        ", flow on moving clips, flow on static clips, latent without the previous one on moving clips, latent without "
        "the previous one on static clips."
    )


def test_ideas_about_the_next_frame_show_gains_and_the_use_of_the_state(found, table):
    rows = cells_of([kept(found, table)])
    assert rows["1 previous latent: dropped"] == {
        "idea": "1 previous latent: dropped",
        "parameter": "next_frame.previous_latent",
        "moving clips, %": "+3.00 [+3.00, +3.00]",
        "static clips, %": "+0.00 [+0.00, +0.00]",
        "clips won, %": "50.0 [25–75]",
        "won in the last four frames, %": "–",
        "loss without the state, ×": "1.05 / 1.50",
        "sensitivity to state / previous latent": "–",
        "token similarity": "–",
        "reference − idea, points": "+0.00 [−2.48, +2.48]",
        "verdict": "moving clips: planned queries better; static clips: equal within 1% (3 runs)",
    }
    assert rows["2 delta: with L1 safeguard"]["static clips, %"] == "−10.00 [−14.97, −5.03]"
    assert rows["2 delta: with L1 safeguard"]["reference − idea, points"] == "–"
    assert rows["3 skip: query to head"]["verdict"] == "too few runs (1 run)"
    assert rows["6 separate heads: coarse and planned"]["moving clips, %"] == "–"
    assert "moving clips, %" not in rows["8 contrastive: weight 0.1"]


def test_the_negative_result_is_reproduced_or_refuted_by_the_runs(found, table):
    text = ideas.finding([kept(found, table)])
    assert "static ones: reproduced for latent on static clips (+0.00 [+0.00, +0.00]%), delta on moving clips (" in text
    assert "refuted, planned queries are better, for latent on moving clips (+3.00 [+0.52, +5.48]%);" in text
    assert "not refuted, planned queries are even worse, for delta on static clips (−10.00 [−14.97, −5.03]%);" in text
    assert "undecided for flow on moving clips (+3.33 [−25.35, +32.02]%);" in text
    assert "not decided by fewer than three runs for flow on static clips (+0.00 [+0.00, +0.00]%);" in text
    rest = " for latent without the previous one on moving clips, latent without the previous one on static clips."
    assert text.endswith(f"; not measured{rest}")


def test_the_finding_names_heads_that_do_not_use_the_state(table):
    name = "next_frame_videos_shuffled_state"
    same = table.assign(**{name: table[name].mask(table["arm"] == "latent", table["next_frame_videos_fine_1"] * 1.002)})
    text = ideas.finding([kept(results.summarise("next_frame", same, STUDY), same)])
    assert "the loss on moving clips is only so many times as high: latent 1.002. So these heads" in text
    used = ideas.ratios_text({"latent": 1.002, "delta": 1.25, "flow": 1.01}, lambda ratio: ratio >= ideas.UNUSED)
    assert used == "delta 1.250, flow 1.010"
    assert " More informative are heads that do use it: delta " in text


def test_a_head_that_learned_nothing_reproduces_nothing(table):
    trivial = table.assign(
        next_frame_videos_unchanged=table["next_frame_videos_unchanged"].mask(table["arm"] == "flow", 0.5)
    )
    text = ideas.finding([kept(results.summarise("next_frame", trivial, STUDY), trivial)])
    assert "static ones: reproduced for latent on static clips" in text
    flow = "flow on moving clips (+3.33 [−25.35, +32.02]%), flow on static clips (+0.00 [+0.00, +0.00]%)"
    assert f"not learned, no better than predicting no change, for {flow};" in text


def test_the_title_counts_every_row_once(table):
    """Also of an arm that trains both answers and prediction, and so has a row in each table."""
    text_only = table[table["arm"] == "beside_text"].assign(arm="text_only", run=["a", "b", "c"])
    text_only = text_only.assign(**{name: None for name in table.columns if name.startswith("next_frame")})
    both = pd.concat([table, text_only])
    study = kept(results.summarise("next_frame", both, STUDY), both)
    title = ideas.folded_title([study])
    for start, found in zip(("default ", "planned queries "), ideas.tables([study]), strict=True):
        counts = title.partition(start)[2].partition(".")[0].split(", ")
        run = [cells for cells in found.rows if not any("not run" in text_of(cell) for cell in cells)]
        assert sum(int(text.rpartition(" ")[2]) for text in counts) == len(run)


def test_ideas_about_answers_are_decided_by_their_intervals(tmp_path):
    study = write_study(tmp_path, study_summary("ideas", ("none", "entropy"), (1, 2, 3)))
    row = cells_of([study])["5 entropy margin: weight 0.1"]
    assert row["gaze, points"] == "+42.0 [+30.0, +50.0]"
    assert row["verdict"] == "depends on the tasks; default: gaze better, reading worse"
    answers, _ = ideas.tables([study])
    assert answers.note.endswith(" All rows: ideas, 3 pairs, exploratory, 2 of 6 runs not converged.")
    title = f"14 ideas in {len(ideas.IDEAS)} variants. Answers: default better 0, equal 0, worse 0, undecided 0, "
    assert ideas.folded_title([study]).startswith(f"{title}better and worse 1. ")
    assert "moving clips, %" not in row


@pytest.mark.parametrize(
    ("interval", "count", "verdict"),
    [
        ((-0.029, 0.03), 3, "equal"),
        ((0.001, 0.029), 3, "equal"),
        ((-0.031, 0.02), 3, "undecided"),
        ((0.01, 0.04), 3, "better"),
        ((-0.04, -0.01), 8, "worse"),
        ((0.01, 0.04), 2, "too few runs"),
        (None, 1, "too few runs"),
    ],
)
def test_an_interval_decides(interval, count, verdict):
    assert interval_verdict(interval, count, 0.03) == verdict


def test_few_pairs_decide_nothing(tmp_path):
    study = write_study(tmp_path, study_summary("ideas", ("none", "entropy"), (1, 2)))
    verdict = cells_of([study])["5 entropy margin: weight 0.1"]["verdict"]
    assert verdict == "too few runs"
    assert ideas.folded_title([study]).count("too few runs 1") == 1


def test_gains_have_as_many_digits_as_their_interval_needs():
    assert [study_tables.digits((-half, half)) for half in (0.2, 0.0012, 0.0002, 0.00004, 1e-6, 0.0)] == [
        2,
        2,
        3,
        4,
        4,
        2,
    ]
    assert study_tables.digits(None) == 2


def test_the_page_has_the_ideas_and_no_accuracy_of_untrained_arms(tmp_path, table, monkeypatch):
    write_root(tmp_path)
    folder = tmp_path / "reports/study/next_frame"
    folder.mkdir(parents=True)
    table[table["arm"] != "beside_text"].to_csv(folder / "runs.csv", index=False)
    summary.write_summary("next_frame", STUDY, tmp_path / "reports/study")
    page = build(tmp_path, monkeypatch)
    text = (tmp_path / "reports/report.md").read_text()
    sentence = "refuted, planned queries are better, for latent on moving clips"
    ideas_at, losses_at = page.index('id="ideas-rows"'), page.index('id="ideas_next_frame-rows"')
    assert page.index("<h2>Ideas of the research</h2>") < page.index(sentence) < ideas_at < losses_at
    folded = page.index(f"<details><summary>14 ideas in {len(ideas.IDEAS)} variants. Answers: ")
    assert page.index(sentence) < folded < ideas_at
    assert "</details>" not in page[folded:losses_at]
    assert "planned queries better 3, equal 0, worse 1" in page[folded : page.index("</summary>", folded)]
    assert page.index("<pre>make study name=") > page.index('id="table-data"')
    assert text.index("## Ideas of the research") < text.index(sentence) < text.index("| 1 previous latent: dropped |")
    assert "| arm | runs | samples | TFLOP | min |" in text  # no columns of answers, which no arm trains
    assert "| latent | 3 | 18,000 | 10.0 | 3.3 |" in text
    assert "Every task in study next_frame" not in page + text
    assert not (tmp_path / "reports/figures/study_next_frame_points.svg").exists()
    assert "| 1 previous latent: dropped |" in (tmp_path / "reports/tables/ideas_next_frame.md").read_text()
    assert all(clips in page for clips in CLIPS.values())
    assert '<td class="">next_<wbr>frame.<wbr>weight' in page
