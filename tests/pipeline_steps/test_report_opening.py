"""The page's first paragraph: what it says follows from the studies' verdicts."""

import pytest

from pipeline_steps.report import opening, studies
from tests.pipeline_steps.reported import build, study_summary, write_root, write_study


def leading(root, verdicts, groups=("gaze", "reading"), **changes):
    """A leading study whose comparisons of each arm have these verdicts, in this order."""
    summary = study_summary(arms=("none", "A6", "B1"), seeds=range(8), **changes)
    entries = [
        entry.model_copy(update={"verdict": verdict, "group": groups[place % 2], "num_not_converged": 3 * (place > 1)})
        for place, (entry, verdict) in enumerate(zip(summary.comparisons, 2 * verdicts, strict=True))
    ]
    return write_study(root, summary.model_copy(update={"comparisons": entries}))


def designs(monkeypatch, folder, **arms):
    (folder / "mine.yaml").write_text("arms:\n" + "".join(f"  {arm}: {{{own}}}\n" for arm, own in arms.items()))
    monkeypatch.setattr(studies, "DESIGNS", folder)


@pytest.mark.parametrize(
    ("verdicts", "words"),
    [
        (("better", "equal"), "better in {0} and equal (within 3 points) in {1}"),
        (("better", "better"), "better in {0} and in {1}"),
        (("worse", "undecided"), "worse in {0} and not shown to be better, worse or equal in {1}"),
        (("too few runs", "too few runs"), "not judged, for too few runs, in {0} and in {1}"),
        (("unmatched budgets", "equal"), "not comparable, for unequal training budgets, in {0} and equal (within 3 "
         "points) in {1}"),
        (("worse", "exploratory"), "worse in {0}"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("groups", [("gaze", "reading"), ("near", "far")])
def test_the_answer_follows_from_the_verdicts(tmp_path, verdicts, words, groups):
    study = leading(tmp_path, verdicts, groups)
    against_sixteen, against_static, *_ = opening.sentences(study, [study])
    told = words.format(*map(studies.group_name, groups))
    facts = "8 pairs of runs, equal training samples"
    assert against_sixteen == (
        f"Against sixteen tokens, one planned token is {told} ({facts}, 3 of 16 runs not converged)."
    )
    assert against_static == f"Against one static token, one planned token is {told} ({facts})."


def test_without_a_study_or_a_headline_question_the_answer_says_so(tmp_path):
    assert opening.sentences(None, []) == [opening.NOTHING]
    study = leading(tmp_path, ("exploratory", "exploratory"))
    assert opening.sentences(study, [study]) == [
        "Study mine asks no headline question about these arms: its comparisons are exploratory."
    ]


@pytest.mark.parametrize(
    ("arms", "words"),
    [
        ({"none": "", "A6": "", "B1": ""}, "All arms have the default's learning rates, which were not tuned for the "
         "other arms."),
        (dict.fromkeys(("none", "A6", "B1"), "rate_factor: 4"), "All arms have 4 × the default's learning rates."),
        ({"none": "", "A6": "", "B1": "rate_factor: 2"}, "Learning rates: one planned token (default) 1 × the "
         "default's, one static token (A6) 1 × the default's, sixteen tokens (B1) 2 × the default's."),
        ({"none": "", "A6": ""}, "The learning rates of B1 in study mine are not known (no design in "
         "conf/study)."),
    ],
)  # fmt: skip
def test_the_answer_tells_the_learning_rates_of_the_design(tmp_path, monkeypatch, arms, words):
    study = leading(tmp_path, ("better", "equal"))
    designs(monkeypatch, tmp_path, **arms)
    assert opening.sentences(study, [study])[2:] == [words]


def test_the_outcome_at_equal_flops_is_told_with_its_samples_and_rates(tmp_path, monkeypatch):
    study = leading(tmp_path, ("better", "equal"))
    summary = study_summary("other", arms=("none", "B1"), seeds=range(8))
    for entry, verdict in zip(summary.comparisons, ("better", "worse"), strict=True):
        entry.matched, entry.verdict = "FLOPs", verdict
    for arm in summary.arms:
        arm.training_samples = 3e4
    other = write_study(tmp_path, summary)
    designs(monkeypatch, tmp_path, none="", A6="", B1="")
    (tmp_path / "other.yaml").write_text("arms: {none: {rate_factor: 4}, B1: {rate_factor: 4}}")
    assert opening.sentences(study, [study, other])[3:] == [
        "At equal training FLOPs (all arms have 4 × the default's learning rates; one planned token has 0.5 × its "
        "samples above), against sixteen tokens, one planned token is better in tasks that need a gaze and worse in "
        "tasks that must read everything (study other, 8 pairs, 2 of 16 runs not converged)."
    ]


def test_the_answer_stands_under_the_banner_and_defines_its_terms(tmp_path, monkeypatch):
    write_root(tmp_path)
    leading(tmp_path, ("better", "equal"))
    page = build(tmp_path, monkeypatch)
    places = [
        page.index(part)
        for part in ('class="banner"', "Against sixteen tokens, one planned", "Planned token: from", "<dt>Exact match")
    ]
    assert places == sorted(places)
    for term in ("(the gaze)", "Default recipe: ", "(A6): one", "(B1): means", "Plateau: ", "a gaze: card, follow"):
        assert term in page[places[2] : places[3]]
    assert "Against sixteen tokens, one planned" in (tmp_path / "reports/report.md").read_text()
