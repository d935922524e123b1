"""The report's tables beyond tasks and modes, on invented results whose cells are known."""

import pandas as pd
import pytest

from pipeline_steps.common import metrics
from pipeline_steps.common.caption_results import (
    CaptionParts,
    Captions,
    CaptionScore,
    CaptionStyle,
    Missed,
    PartOverlap,
)
from pipeline_steps.common.diagnostic_results import (
    Check,
    Diagnostics,
    PreliminaryDiagnostics,
    TemperatureScore,
)
from pipeline_steps.common.study_results import NextFrameGain
from pipeline_steps.report import __main__ as report
from pipeline_steps.report.studies import Study
from pipeline_steps.report.tables import text_of
from tests.pipeline_steps.reported import build, item_table, result_of, study_summary, write_root

STYLE = CaptionStyle(
    num_words=8, empty=0, repetition=0.25, distinct_1=0.5, distinct_2=None, same_opening=1, same_text=0.1
)


@pytest.fixture(scope="module")
def plain():
    """A result of an evaluation that measured none of it."""
    return result_of(item_table())


def texts(table):
    return [[text_of(cell) for cell in row] for row in table.rows]


def choice(accuracy, blind):
    return metrics.ChoiceScore(
        accuracy=accuracy,
        interval=(accuracy - 0.1, accuracy + 0.1),
        blind=blind,
        blind_interval=(blind - 0.1, blind + 0.1),
        gain=accuracy - blind,
        gain_interval=(accuracy - blind - 0.15, accuracy - blind + 0.15),
    )


def group(num_items=40):
    return metrics.MultipleChoice(
        num_items=num_items,
        chance=0.25,
        scorings={"letter": choice(0.5, 0.6), "generation": choice(0.75, 0.25)},
        no_option=0.125,
        blind_no_option=0.5,
        letters={},
        position_bias={"letter": 0.3, "generation": None},
    )


def caption_score(missed):
    return CaptionScore(
        cider=None, cider_interval=None, bleu=0.2, meteor=0.5, meteor_interval=(0.4, 0.6), missed=missed, style=STYLE
    )


def a_view(loss_difference=2.0, num_items=40):
    return metrics.View(
        loss=2.5,
        accuracy=0.3,
        all_frames_loss=0.5,
        all_frames_accuracy=0.9,
        loss_difference=loss_difference,
        loss_interval=(loss_difference - 1, loss_difference + 1),
        answers_changed=0.8,
        answers_changed_interval=(0.7, 0.9),
        tokens_changed=0.6,
        num_items=num_items,
    )


def a_check(verdict, value=0.5, low=None, high=None):
    return Check(verdict=verdict, value=value, low=low, high=high, meaning="a cosine", reason="it collapsed")


def test_an_unmeasured_table_has_no_rows_and_a_note(plain):
    for table in report.measured_tables(plain):
        assert table.rows == []
        assert table.note.startswith("Not measured"), table.name


def test_multiple_choice_is_compared_with_chance_and_blind_with_the_total_last(plain):
    groups = {"all": group(), "chat/puzzle": group(1)}
    table = report.multiple_choice(plain.model_copy(update={"multiple_choice": groups}))
    assert [row[:2] for row in table.rows] == [
        ["chat/puzzle", "letter"],
        ["chat/puzzle", "generation"],
        ["all", "letter"],
        ["all", "generation"],
    ]
    assert table.summary == [2, 3]
    assert texts(table)[2][2:] == [
        *("40", "50.0% [40–60]", "25.0%", "60.0% [50–70]", "−10.0 [−25.0 to +5.0]", "–", "0.30")
    ]
    assert texts(table)[3][-2:] == ["12.5%", "–"]
    assert texts(table)[0][3] == "50.0%"  # one item has no interval


def test_captions_keep_attribute_columns_for_tasks_without_attributes(plain):
    missed = Missed(complete_miss=0.1, interval=(0.0, 0.2), named=0.7, num_items=60)
    modes = {"blind": caption_score({}), "autoregressive": caption_score({"colour": missed})}
    captions = Captions(
        num_items=60,
        modes=modes,
        reference=STYLE.model_copy(update={"num_words": 9}),
        overlap_fine_coarse=0.2,
        overlap_interval=(0.1, 0.3),
        same_fine_coarse=0.05,
    )
    result = plain.model_copy(update={"captions": {"caption": captions}})
    likeness = report.captions(result)
    assert likeness.columns[-2:] == ["colour named", "colour none named"]
    assert texts(likeness) == [
        ["caption", "autoregressive", "60", "–", "0.200", "0.500 [0.400–0.600]", "70.0%", "10.0% [0–20]"],
        ["caption", "blind", "60", "–", "0.200", "0.500 [0.400–0.600]", "–", "–"],
    ]
    style = texts(report.caption_style(result))
    assert [row[:3] for row in style] == [
        ["caption", "references", "9.0"],
        ["caption", "autoregressive", "8.0"],
        ["caption", "blind", "8.0"],
    ]
    assert style[1][3:] == ["25.0%", "50.0%", "–", "100.0%", "10.0%", "0.0%"]
    assert texts(report.caption_overlap(result)) == [["caption", "60", "20.0% [10–30]", "5.0%"]]
    assert report.caption_form(result).rows == []  # a file of before
    form = {
        "num_sentences": 1.25,
        "proper_end": 0.5,
        "type_token_ratio": 0.75,
        "repetition_2": 0.1,
        "technical": 0.25,
        "technical_words": 0.02,
        "technical_terms": {"4k": 1, "fps": 3, "hd": 3},
    }
    terms = STYLE.model_copy(update=form)
    none = terms.model_copy(update={"technical": 0.0, "technical_words": 0.0, "technical_terms": {}})
    modes["autoregressive"] = modes["autoregressive"].model_copy(update={"style": terms})
    captions = captions.model_copy(update={"modes": modes, "reference": none})
    assert texts(report.caption_form(result.model_copy(update={"captions": {"caption": captions}}))) == [
        ["caption", "references", "1.2", "50.0%", "75.0%", "10.0%", "0.0%", "0.0%", "–"],
        ["caption", "autoregressive", "1.2", "50.0%", "75.0%", "10.0%", "25.0%", "2.0%", "fps (3), hd (3), 4k (1)"],
    ]


def test_answers_to_parts_are_compared_or_the_reason_is_given(plain):
    short = CaptionParts(num_items=0, longest=6, reason="the longest clip has 6 frames, 16 are needed")
    table = report.caption_parts(plain.model_copy(update={"caption_parts": {"caption": short}}))
    assert (table.rows, table.note) == (
        [],
        "Not measured for caption: the longest clip has 6 frames, 16 are needed.",
    )
    long = CaptionParts(
        num_items=40,
        longest=16,
        reference={"frames_16": 0.25},
        pairs={"first_half / frames_16": PartOverlap(overlap=0.5, interval=(0.4, 0.6), same=0.1)},
        other_clip=0.3,
    )
    table = report.caption_parts(plain.model_copy(update={"caption_parts": {"caption": short, "story": long}}))
    assert texts(table) == [
        ["story", "40", "first half", "16 frames", "50.0% [40–60]", "10.0%"],
        ["story", "40", "16 frames", "reference", "25.0%", "–"],
        ["story", "40", "16 frames", "another clip", "30.0%", "–"],
    ]
    assert table.note.endswith("Not measured for caption: the longest clip has 6 frames, 16 are needed.")


def test_parts_of_clips_are_shown_with_all_frames(plain):
    views = {"second_half": a_view(-0.0001, num_items=1), "frames_4": a_view()}
    table = report.temporal(plain.model_copy(update={"temporal": {"card": views}}))
    assert texts(table) == [
        [
            *("card", "4 frames of the clip", "40", "30.0%", "90.0%", "2.500", "0.500", "+2.000 [+1.000 to +3.000]"),
            *("80.0% [70–90]", "60.0%"),
        ],
        ["card", "second half", "1", "30.0%", "90.0%", "2.500", "0.500", "0.000", "80.0%", "60.0%"],
    ]


def test_frames_without_an_answer_token_are_omitted(plain):
    long = metrics.PerFrame(loss=[None, 1.0, 2.0], accuracy=[None, 0.5, 0.25], num_items=[0, 4, 4])
    short = metrics.PerFrame(loss=[None, 3.0], accuracy=[None, 1.0], num_items=[0, 4])
    frames = {"card": {"fine": long, "blind": long, "autoregressive": long}, "follow": {"autoregressive": short}}
    result = plain.model_copy(update={"per_frame": frames})
    table = report.per_frame(result, "accuracy")
    assert table.columns == ["task", "mode", "frame 1", "frame 2"]
    assert texts(table) == [
        ["card", "autoregressive", "50.0%", "25.0%"],
        ["card", "blind", "50.0%", "25.0%"],
        ["follow", "autoregressive", "100.0%", "–"],
    ]
    assert ("falls" in table.note, "rises" in report.per_frame(result, "loss").note) == (True, True)
    assert texts(report.per_frame(result, "loss"))[2] == ["follow", "autoregressive", "3.000", "–"]


def test_gaze_is_compared_with_the_available_references(plain):
    entry = metrics.GazeDifference(peak_on_target=0.5, interval=(0.4, 0.6), num_frames=600)
    below = metrics.GazeDifference(peak_on_target=-0.01, interval=(-0.03, 0.0), num_frames=300)
    differences = {"card": {"oracle": below, "chance": entry}, "follow": {"chance": entry}}
    table = report.gaze_difference(plain.model_copy(update={"gaze_difference": differences}))
    assert table.columns == ["task", "against chance", "frames", "against oracle", "frames"]
    assert texts(table) == [
        ["card", "+50.0 [+40.0 to +60.0]", "600", "−1.0 [−3.0 to +0.0]", "300"],
        ["follow", "+50.0 [+40.0 to +60.0]", "600", "–", "–"],
    ]


def diagnosed(plain):
    checks = {
        "fine_check": a_check("ok", 0.00025, low=0.0001, high=0.98),
        "no_check": a_check("not applicable", None),
        "bad_check": a_check("suspicious", -0.5, low=3.0),
    }
    entropy, peak = {"fine": [[0.5, 1.0], [0.25, 0.75]]}, {"fine": [[0.5, 0.5], [0.25, 0.75]]}
    diagnostics = Diagnostics(checks=checks, entropy=entropy, peak=peak, num_items=42, num_frames=252)
    return plain.model_copy(update={"diagnostics": diagnostics})


def test_suspicious_checks_come_first_with_their_bounds(plain):
    table = report.checks(diagnosed(plain))
    assert texts(table) == [
        ["bad check", "suspicious", "−0.5", "≥ 3", "a cosine", "it collapsed"],
        ["fine check", "ok", "0.00025", "0.0001 to 0.98", "a cosine", "it collapsed"],
        ["no check", "not applicable", "–", "–", "a cosine", "it collapsed"],
    ]
    assert table.note.startswith("1 suspicious, 1 ok, 1 not applicable")
    assert "42 items with 252 frames" in table.note


def test_preliminary_diagnostics_are_one_table(plain):
    point = TemperatureScore(factor=0.1, loss=0.5, accuracy=0.75, entropy=0.25, peak=0.6, top_tenth=0.8)
    found = PreliminaryDiagnostics(
        previous_latent={"loss": 2.0, "no_state": 4.0, "shuffled_state": 3.0},
        feature_similarity={"cosine static / planned": 0.5, "cosine static / random": 0.25},
        temperature=[point],
        query_projection={"before": -0.1, "after": 0.2},
        head_sensitivity={"state": 0.5, "previous": 0.1},
        not_measured={},
        num_items=42,
    )
    table = report.preliminary(plain.model_copy(update={"preliminary": found}))
    assert texts(table) == [
        ["1 previous latent", "loss without the previous latent / loss", "–", "–"],
        ["1 previous latent", "loss without the state / loss", "2.000", "–"],
        ["1 previous latent", "loss with another clip's state / loss", "1.500", "–"],
        ["2 feature similarity", "cosine static / planned", "0.500", "0.988"],
        ["2 feature similarity", "cosine static / random", "0.250", "0.990"],
        [
            "3 attention temperature",
            "temperature × 0.1",
            "loss 0.500, accuracy 75.0%, entropy 25.0%, largest weight 60.0%, strongest tenth 80.0%",
            "entropy 86%, largest weight 4.6%",
        ],
        ["4 query projection", "cosine before", "−0.100", "−0.015"],
        ["4 query projection", "cosine after", "0.200", "–"],
        ["5 head sensitivity", "change by the state", "0.500", "–"],
        ["5 head sensitivity", "change by the previous latent", "0.100", "–"],
        ["5 head sensitivity", "state / previous latent", "5.0", "4.7"],
    ]
    assert table.note.startswith("2 to 4 were measured on 42 clips,")
    missing = {"previous_latent": None, "head_sensitivity": None}
    reasons = dict.fromkeys(missing, "not trained with the next-frame objective")
    without = found.model_copy(update=missing | {"not_measured": reasons})
    rows = texts(report.preliminary(plain.model_copy(update={"preliminary": without})))
    assert rows[0] == ["1 previous latent", "not trained with the next-frame objective", "–", "–"]
    assert rows[-1] == ["5 head sensitivity", "not trained with the next-frame objective", "–", "–"]
    rows = texts(report.preliminary(plain.model_copy(update={"preliminary": without}), [next_frame_study()]))
    assert rows[:3] == [
        ["1 previous latent (next_frame, 2 runs)", "loss without the previous latent / loss", "–", "–"],
        ["1 previous latent (next_frame, 2 runs)", "loss without the state / loss", "2.500", "–"],
        ["1 previous latent (next_frame, 2 runs)", "loss with another clip's state / loss", "–", "–"],
    ]
    assert rows[-3:] == [
        ["5 head sensitivity (next_frame, 2 runs)", "change by the state", "0.300", "–"],
        ["5 head sensitivity (next_frame, 2 runs)", "change by the previous latent", "0.150", "–"],
        ["5 head sensitivity (next_frame, 2 runs)", "state / previous latent", "2.0", "4.7"],
    ]
    own = report.preliminary(plain.model_copy(update={"preliminary": found}), [next_frame_study()])
    assert texts(own) == texts(table)  # what the run itself measured comes first


def next_frame_study():
    summary = study_summary("next_frame", ("latent", "delta"), (1, 2))
    measures = {"state_sensitivity": [0.2, 0.4], "previous_sensitivity": [0.1, 0.2]}
    nothing = {"interval": None, "differences": [], "differences_interval": None, "verdict": "too few runs"}
    moving = {"loss": {"coarse": [1.0, 1.0], "fine": [0.5, 0.5], "no_state": [1.0, 1.5]}, "measures": measures}
    gains = NextFrameGain(**moving, wins=[0.5, 0.5], gain=[0.5, 0.5], **nothing)
    summary.arms[0].next_frame = {"videos": gains}
    return Study(summary, pd.DataFrame(), None)


def test_attention_is_shown_by_mode_and_layer(plain):
    assert texts(report.attention(diagnosed(plain))) == [
        ["fine", "0", "75.0%", "50.0%", "100.0%", "50.0%", "50.0%"],
        ["fine", "1", "50.0%", "25.0%", "75.0%", "50.0%", "75.0%"],
    ]


def test_scores_are_split_by_source_if_there_are_several(plain):
    alone = report.by_source(plain.model_copy(update={"sources": {"procedural": plain.tasks}}))
    assert (alone.rows, alone.note) == ([], "All items have the same source: procedural.")
    score = plain.tasks["card"]["autoregressive"].model_copy(update={"num_items": 1})
    sources = {"chat": {"text": {"text": score}}, "procedural": {"card": plain.tasks["card"]}}
    table = report.by_source(plain.model_copy(update={"sources": sources}))
    assert [row[:2] for row in table.rows] == [["chat", "text"], ["procedural", "card"]]
    assert texts(table)[0][2:] == ["1", f"{score.accuracy:.1%}", "–", "–", "–", "–", f"{score.loss:.3f}"]
    assert table.rows[1][3][1] == plain.tasks["card"]["autoregressive"].accuracy


def test_page_and_markdown_show_all_tables(plain, tmp_path, monkeypatch):
    write_root(tmp_path)
    full = diagnosed(plain).model_copy(
        update={"multiple_choice": {"all": group()}, "temporal": {"card": {"frames_4": a_view()}}}
    )
    metrics.write_json(tmp_path / "outputs/metrics/evaluation.json", full)
    page = build(tmp_path, monkeypatch)
    text = (tmp_path / "reports/report.md").read_text()
    assert 'word suspicious">suspicious</td>' in page
    for table in report.measured_tables(full):
        shown = table.rows or table.name not in ("caption_style", "caption_form", "caption_overlap", "per_frame_loss")
        assert (f'id="table-{table.name}"' in page) == bool(shown), table.name
        assert (f"### {table.title}\n" in text) == bool(shown), table.name
        assert (tmp_path / f"reports/tables/{table.name}.md").exists() == bool(table.rows)
    for row in report.multiple_choice(full).rows:
        assert "| " + " | ".join(text_of(cell) for cell in row) + " |" in text
