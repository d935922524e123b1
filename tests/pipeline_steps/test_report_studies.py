"""Studies on the report's page: which leads, and what is said of its comparisons."""

from functools import partial

import pandas as pd
import pytest
from PIL import Image

from pipeline_steps.common.errors import UserError
from pipeline_steps.report import __main__ as report
from pipeline_steps.report import studies, study_tables
from pipeline_steps.report.tables import text_of
from tests.pipeline_steps.reported import SEEDS, build, study_summary, write_root, write_study


def test_the_study_with_all_arms_leads_the_page_with_verdicts_and_every_run(tmp_path, monkeypatch, capsys):
    write_root(tmp_path)
    write_study(tmp_path, study_summary(arms=("none", "A6", "B1")))
    write_study(tmp_path, study_summary("early", ("none", "F1")))
    page = build(tmp_path, monkeypatch)
    title = "One planned token (default) against sixteen tokens (B1): tasks that need a gaze"
    statement = "+41.5 [+30.0, +50.0] points of token accuracy (95% t-interval), 2 pairs of runs, p = 1.000 (sign "
    statement += "flips, Holm for 4 questions), equal training samples, 2.00 × the training FLOPs for sixteen tokens "
    statement += "(B1)."
    assert page.index("<dt>Exact match</dt><dd>61.5%</dd>") < page.index("<dt>Token accuracy</dt><dd>91.5%</dd>")
    assert "<dd>2 of 2</dd><p>left the plateau: token accuracy of at least 75%; 95% interval" in page
    assert 0 < page.index("<dd>2 of 2</dd>") < page.index(title) < page.index(statement) < page.index('class="lead"')
    assert '<span class="open">2 of 4 runs not converged</span>' in page
    assert "Which &lt;one&gt;?" in page
    assert "6 of 6 runs" in page
    assert '<button type="button"></button>' not in page  # every column has a name
    assert page.index('alt="Differences between the baseline') < page.index(
        "<details><summary>Study early: Which &lt;one&gt;?<"
    )
    assert page.count('alt="Accuracy of every run of the study') == 2
    assert page.count('alt="Differences between the baseline and the other arms') == 2
    text = (tmp_path / "reports/report.md").read_text()
    assert statement.replace("[", "\\[").replace("]", "\\]") in text
    assert "study_mine_forest" in text
    table = (tmp_path / "reports/tables/verdict.md").read_text()
    assert f"**{title}:** UNDECIDED (2 of 4 runs not converged). {statement[:5]}" in table
    assert table.index(title) < table.index("## Single runs kept in") < table.index("has no kept single run to compare")
    printed = capsys.readouterr().out
    assert f"{title}: UNDECIDED (2 of 4 runs not converged). {statement}" in printed
    assert "Do planned queries help?" not in printed
    row = "| sixteen tokens (B1) | 2 | 31.5 [31–32] | 61.5 [61–62] | 0 of 2 [0–84] | 2 of 2 | 60,000 | 15.0 | 5.0 |"
    assert row in text
    assert "| sixteen tokens (B1): token accuracy | 61.5 [61–62] |" in text
    assert "| one static token (A6): exact match | 21.5 [21–22] | – | – | – | – | – | – |" in text


def test_a_verdict_says_in_how_many_pairs_the_arms_are_alike(tmp_path):
    study = write_study(tmp_path, study_summary(seeds=range(8)))
    entry = study.summary.comparisons[0].model_copy(update={"verdict": "better"})
    assert "of the pairs" not in study_tables.statement(study, entry, 4)
    alike = entry.model_copy(update={"differences": [*entry.differences[2:], 0.029, -0.03]})
    assert study_tables.statement(study, alike, 4).endswith(" In 2 of the pairs the difference is within 3 points.")


def test_an_equality_says_what_it_rests_on(tmp_path):
    study = write_study(tmp_path, study_summary(seeds=range(8)))
    entry = study.summary.comparisons[0].model_copy(update={"verdict": "equal"})
    unseen = "An outcome that fewer than 37% of all runs have may have escaped these 8."
    assert study_tables.statement(study, entry, 4).endswith(f"Equal: the 90% interval lies within 3 points. {unseen}")
    entry = entry.model_copy(update={"p_adjusted": 0.047})
    text = f"within 3 points, although the difference is significant. {unseen}"
    assert study_tables.statement(study, entry, 4).endswith(text)


def test_arms_that_are_alike_because_they_learned_nothing_are_told(tmp_path):
    study = write_study(tmp_path, study_summary(seeds=range(8)))
    entry = study.summary.comparisons[0].model_copy(update={"verdict": "undecided", "beats_blind": False})
    text = "neither arm beats itself with grey frames by more than 3 points, so it says nothing whether they are alike."
    assert study_tables.statement(study, entry, 4).endswith(text)
    known = entry.model_copy(update={"beats_blind": True})
    assert "grey frames" not in study_tables.statement(study, known, 4)


def test_a_comparison_with_runs_on_both_sides_of_the_plateau_shows_the_interval_for_any_distribution(tmp_path):
    study = write_study(tmp_path, study_summary(seeds=range(8)))
    entry = study.summary.comparisons[0]
    assert "any distribution" not in study_tables.statement(study, entry, 4)
    is_high = (study.runs["arm"] == "B1") & (study.runs["training_seed"] < 3)
    study.runs.loc[is_high, ["accuracy_card", "accuracy_follow"]] = 0.75  # .08 above the highest of the others
    assert "any distribution" not in study_tables.statement(study, entry, 4)
    study.runs.loc[is_high, ["accuracy_card", "accuracy_follow"]] = 0.9
    assert study_tables.statement(study, entry, 4).endswith(
        "Only some runs reach 75% in these tasks (sixteen tokens (B1): 3 of 8), so this interval may be too narrow; "
        "the one for any distribution is [−20.0, +90.0]."
    )


def test_studies_of_other_tasks_do_not_lead_the_page(tmp_path, monkeypatch):
    write_root(tmp_path)
    folder = tmp_path / "reports/study/mine"
    write_study(tmp_path, study_summary(arms=("none", "A6", "B1")))
    runs = pd.read_csv(folder / "runs.csv")
    runs.rename(columns={"accuracy_card": "accuracy_puzzle"}).to_csv(folder / "runs.csv", index=False)
    page = build(tmp_path, monkeypatch)
    assert "<dd>70.0%</dd>" in page  # of this run
    assert "<h2>Studies on other data</h2>" in page
    assert "<h2>Decisions on other data</h2>" in page
    assert page.index("Do planned queries help?") < page.index("Study mine")
    assert "## Studies on other data" in (tmp_path / "reports/report.md").read_text()


@pytest.mark.parametrize(
    ("kind", "warm_up", "collect", "world", "expected"),
    [
        ("embedded", "selecting", ["procedural", "chat"], "digits", ["moving digits. Nothing", "backbones' warm-up"]),
        ("embedded", "none", ["procedural", "chat"], "digits", ["moving digits. Nothing"]),
        ("local", "selecting", ["procedural"], "objects", ["clips of moving photographs of objects. Nothing"]),
        ("embedded", "selecting", ["folder", "chat"], "digits", ["backbones' warm-up, on clips of moving digits"]),
        ("embedded", "reading", ["chat"], "digits", []),
        ("hub", "selecting", ["hub", "procedural"], "digits", []),
    ],
)
def test_the_banner_says_what_the_data_and_the_backbones_are(kind, warm_up, collect, world, expected):
    sources = {"collect": collect, "procedural": {"world": world}}
    backbones = {"kind": kind, "embedded": {"vision_queries": warm_up}}
    lines = report.texts.banner({"backbones": backbones, "sources": sources})
    assert len(lines) == len(expected)
    assert all(part in line for part, line in zip(expected, lines, strict=True))


def test_the_kept_heatmap_of_a_study_is_in_its_section(tmp_path, monkeypatch):
    write_root(tmp_path)
    for name, arms in (("leading", ("none", "A6", "B1")), ("natural", ("none", "A6")), ("plain", ("none", "F1"))):
        write_study(tmp_path, study_summary(name, arms))
    for name in ("leading", "natural"):
        Image.new("RGB", (96, 64), "#345").save(tmp_path / "reports/study" / name / "heatmap.png")
    page = build(tmp_path, monkeypatch)
    places = {name: page.index(f'alt="Frames of a clip of study {name} with') for name in ("leading", "natural")}
    assert page.index('id="studies"') < places["leading"] < page.index("<summary>Study natural: ")
    section = page[page.index("<summary>Study natural: ") : page.index("<summary>Study plain: ")]
    assert 'src="data:image/webp;base64,' in section
    assert "A held-out clip of a run of study natural" in section
    assert "clip of study plain" not in page
    text = (tmp_path / "reports/report.md").read_text()
    assert text.count("](study/natural/heatmap.png)") == text.count("](study/leading/heatmap.png)") == 1
    (tmp_path / "reports/study/natural/heatmap.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"study/natural/heatmap\.png is no picture"):
        build(tmp_path, monkeypatch)


def test_a_study_with_more_arms_leads_with_the_headline_arms_and_folds_the_others(tmp_path, monkeypatch):
    write_root(tmp_path)
    write_study(tmp_path, study_summary(arms=("none", "A6", "A6_16", "B1")))
    page = build(tmp_path, monkeypatch)
    folded = page.index("<details><summary>All arms of study mine</summary>")
    assert page.index(">one static token (A6)</th>") < folded < page.index(">A6_16</th>")
    assert page.index("<h2>Verdict</h2>") < page.index("Study mine: Which &lt;one&gt;?") < folded
    assert "against A6_16" not in page
    assert (tmp_path / "reports/figures/study_mine_first_forest.svg").exists()
    assert (tmp_path / "reports/figures/study_mine_forest.svg").exists()


def test_the_headline_study_has_all_arms_most_replicates_and_the_latest_seeds(tmp_path):
    arms = ("none", "A6", "B1")

    def made(name, arms, seeds, **changes):
        return write_study(tmp_path, study_summary(name, arms, seeds, **changes))

    some, tuned = made("some", ("none", "B1"), (9, 10, 11)), made("tuned", arms, (1, 2, 3), split="validation")
    assert studies.headline_of([some, tuned]) is None
    first, later = made("zeta", arms, (1, 2)), made("alpha", arms, (3, 4))
    assert studies.headline_of([some, tuned, first, later]) is later
    more = made("more", arms, (1, 2, 5))
    assert studies.headline_of([first, more, later]) is more


def test_the_key_figures_are_of_the_study_with_most_and_latest_runs_of_the_default(tmp_path):
    def made(name, arms, seeds, **changes):
        return write_study(tmp_path, study_summary(name, arms, seeds, **changes))

    compared, alone = made("zeta", ("none", "A6", "B1"), (1, 2, 3)), made("alone", ("none",), (4, 5, 6))
    others = [made("few", ("none",), (9,)), made("tuned", ("none",), (6, 7, 8, 9), split="validation")]
    others.append(made("without", ("A6",), (6, 7, 8, 9)))
    found = partial(studies.default_of, num_samples=60_000)
    assert found(others[1:]) is None
    assert found([compared, alone, *others]) is alone
    assert found([compared, *others]) is compared
    summary = study_summary("short", ("none",), range(10, 20))
    arms = [arm.model_copy(update={"training_samples": 18_000.0}) for arm in summary.arms]
    short = write_study(tmp_path, summary.model_copy(update={"arms": arms}))
    assert found([compared, short]) is compared  # its runs are as long as the pipeline's
    assert studies.default_of([compared, short], num_samples=100) is short  # no study's are


def test_the_loss_is_compared_by_group_in_the_tiers_of_the_research(tmp_path):
    study = write_study(tmp_path, study_summary())
    cells = {row[2]: row[-2:] for row in study_tables.effects(study).rows}
    assert cells["gaze"] == [("+50%", pytest.approx(50)), "above 15% (2 of 2 pairs above 5%)"]
    assert cells["reading"] == [("−25%", pytest.approx(-25)), "worse (0 of 2 pairs above 5%)"]
    tiers = [study_tables.tier([gain]).partition(" (")[0] for gain in (0.04, 0.051, 0.15, 0.151)]
    assert tiers == ["up to 5%", "5 to 15%", "5 to 15%", "above 15%"]


def test_an_arm_of_equal_flops_is_paired_with_the_runs_that_have_as_many(tmp_path):
    study = write_study(tmp_path, study_summary())
    runs = study.runs.assign(budget=["x1", "x1", "same", "same"], training_flops=[1e13, 2e13, 1.01e13, 2.0e13])
    study = studies.Study(
        study.summary, pd.concat([runs, runs.iloc[:2].assign(budget="x2", training_flops=9e13, run="z")]), None
    )
    entry = study.summary.comparisons[0].model_copy(update={"arm": "B1, same", "matched": "FLOPs"})
    own, base = studies.paired_runs(study, entry)
    assert list(zip(own["run"], base["run"], strict=True)) == [("B1-1", "none-1"), ("B1-2", "none-2")]


def test_a_study_of_another_version_names_the_command(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/summary.json").write_text('{"name": "mine"}')
    with pytest.raises(UserError, match=r"python -m pipeline_steps.study.summary mine"):
        studies.read_studies(tmp_path)


@pytest.mark.parametrize("num_pairs", [2, 3])
def test_cards_name_the_power_of_as_many_pairs_as_may_be_called_equal(tmp_path, num_pairs):
    study = write_study(tmp_path, study_summary(arms=("none", "A6", "B1"), seeds=range(num_pairs)))
    text = "With this spread, arms that are the same are called equal (within 3 points) in "
    assert [text in card["statement"] for card in study_tables.cards(study)] == [num_pairs > 2] * 4


def test_cards_and_comparisons_name_the_runs_that_were_not_measured(tmp_path):
    summary = study_summary(arms=("none", "A6", "B1"), seeds=(1, 2, 3, 4))
    entries = [entry.model_copy(update={"num_unmeasured": 4}) for entry in summary.comparisons]
    study = write_study(tmp_path, summary.model_copy(update={"comparisons": entries, "num_runs": 12}))
    assert {card["open"] for card in study_tables.cards(study)} == {"2 of 4 measured not converged, 4 not measured"}
    table = study_tables.effects(study)
    assert {row[table.columns.index("not converged")] for row in table.rows} == {("2 of 4, 4 not measured", 2)}


def test_without_a_measurement_nothing_is_counted_as_converged(tmp_path):
    summary = study_summary()
    unmeasured = summary.arms[1].model_copy(update={"num_converged": 0, "num_measured": 0})
    nothing = {"num_unmeasured": 2 * len(SEEDS), "num_not_converged": 0}
    entries = [entry.model_copy(update=nothing) for entry in summary.comparisons]
    changed = {"arms": [summary.arms[0], unmeasured], "comparisons": entries}
    study = write_study(tmp_path, summary.model_copy(update=changed))
    table, effects = study_tables.arms(study, study.summary.arms), study_tables.effects(study)
    assert [text_of(row[table.columns.index("converged")]) for row in table.rows] == ["2 of 2", "–"]
    assert "or rose; –: not measured." in table.note
    assert {text_of(row[effects.columns.index("not converged")]) for row in effects.rows} == {"not measured"}
    assert "not measured" not in study_tables.arms(study, study.summary.arms[:1]).note


@pytest.mark.parametrize(("num_pairs", "is_told"), [(5, True), (6, False)])
def test_comparisons_say_that_a_test_of_few_pairs_decides_nothing(tmp_path, num_pairs, is_told):
    summary = study_summary(seeds=range(num_pairs), num_planned=2 * num_pairs)
    note = study_tables.effects(write_study(tmp_path, summary)).note
    assert ("With fewer than 6 pairs the test cannot say better or worse" in note) == is_told


@pytest.mark.parametrize("content", ["", "run,arm\nnone-1,none\n"])
def test_a_study_with_damaged_runs_names_the_file(tmp_path, content):
    study = write_study(tmp_path, study_summary())
    folder = tmp_path / "reports/study" / study.name
    (folder / "runs.csv").write_text(content)
    with pytest.raises(UserError, match=r"mine/runs.csv: (No columns|no column budget).*Restore it"):
        studies.read_study(folder)


def test_too_few_pairs_have_a_card_of_their_own(tmp_path):
    summary = study_summary(arms=("none", "A6", "B1"))
    entries = [entry.model_copy(update={"verdict": "too few runs"}) for entry in summary.comparisons]
    study = write_study(tmp_path, summary.model_copy(update={"comparisons": entries}))
    assert {card["status"] for card in study_tables.cards(study)} == {"too few runs"}


def test_a_summary_of_other_runs_is_refused(tmp_path):
    study = write_study(tmp_path, study_summary())
    folder = tmp_path / "reports/study" / study.name
    study.runs.iloc[:-1].to_csv(folder / "runs.csv", index=False)
    with pytest.raises(UserError, match=rf"runs.csv has \d+ runs, but .* pipeline_steps.study.summary {study.name}"):
        studies.read_study(folder)
