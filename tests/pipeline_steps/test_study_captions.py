"""Answers to parts of clips in a study's runs.csv and README."""

from types import SimpleNamespace

import pandas as pd

from pipeline_steps.common.caption_results import CaptionParts, PartOverlap
from pipeline_steps.report import study_tables
from pipeline_steps.study import caption_parts


def parts(overlap):
    pair = PartOverlap(overlap=overlap, interval=(0.0, 1.0), same=0.5)
    pairs = {"frames_4 / frames_16": pair, "first_half / second_half": pair}
    return CaptionParts(num_items=3, longest=16, reference={"frames_8": 0.5}, pairs=pairs, other_clip=0.25)


SHORT = CaptionParts(num_items=0, longest=6, reason="the longest clip has 6 frames, 16 are needed")


def test_overlaps_are_means_over_the_tasks_with_long_clips():
    columns = caption_parts.columns_of({"caption": parts(0.5), "gist": parts(0.75), "other": SHORT})
    assert columns == {
        "caption_parts_frames_4/frames_16": 0.625,
        "caption_parts_first_half/second_half": 0.625,
        "caption_parts_frames_8/reference": 0.5,
        "caption_parts_frames_16/other_clip": 0.25,
    }
    assert caption_parts.columns_of({"caption": SHORT}) == caption_parts.columns_of(None) == {}


def study(rows, **trained):
    arms = [SimpleNamespace(arm=name, budget="x1", answers_trained=value) for name, value in trained.items()]
    return SimpleNamespace(name="mine", runs=pd.DataFrame(rows), summary=SimpleNamespace(arms=arms))


def test_a_study_shows_every_pair_of_parts_by_arm():
    """Of arms that train answers; here all but `latent`."""
    own = [caption_parts.columns_of({"caption": parts(overlap)}) for overlap in (0.25, 0.75)]
    rows = [{"arm": "none", "budget": "x1"} | found for found in (*own, {})] + [{"arm": "A6", "budget": "x1"}]
    rows.append({"arm": "latent", "budget": "x1"} | own[0])
    found = study_tables.clip_parts(study(rows, none=True, A6=True, latent=False))
    arm = found.rows[0][0]
    assert found.rows == [
        [arm, "4 frames", "16 frames", ("50.0 [25–75]", 50.0)],
        [arm, "first half", "second half", ("50.0 [25–75]", 50.0)],
        [arm, "8 frames", "reference", ("50.0 [50–50]", 50.0)],
        [arm, "16 frames", "another clip's answer", ("25.0 [25–25]", 25.0)],
    ]
    assert found.markdown(2).startswith("## Answers to parts of clips in study mine\n")
    assert not study_tables.clip_parts(study([{"arm": "A6", "budget": "x1"}], A6=True)).rows
