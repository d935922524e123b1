"""Parts of clips: which frames, and scores and changed answers of a network that counts in a known way."""

from functools import partial

import numpy as np
import pytest
import torch
from tqdm import tqdm

from pipeline_steps.common.modes import VIEWS
from pipeline_steps.evaluation import scoring, statistics, temporal
from pipeline_steps.evaluation.predictions import by_item, predicted_tokens
from tests.model import tiny
from tests.pipeline_steps.evaluated import Weighing, clip, collate, loaded

interval = partial(statistics.ratio_interval, num_samples=50, seed=1)


@pytest.mark.parametrize(
    ("view", "num_frames", "expected"),
    [
        ("first_half", 6, [0, 1, 2]),
        ("second_half", 6, [3, 4, 5]),
        ("first_half", 5, [0, 1]),
        ("second_half", 5, [2, 3, 4]),
        ("first_half", 1, None),
        ("second_half", 1, None),
        ("first_half_held", 6, [0, 0, 1, 1, 2, 2]),
        ("second_half_held", 5, [2, 2, 3, 3, 4]),
        ("first_half_held", 1, None),
        ("frames_4", 8, [1, 3, 5, 7]),
        ("frames_4", 6, [0, 2, 3, 5]),
        ("frames_4", 4, None),  # nothing is left out
        ("frames_8", 6, None),
        ("frames_16", 64, list(range(2, 64, 4))),
    ],
)
def test_which_frames_a_view_shows(view, num_frames, expected):
    chosen = temporal.places(view, num_frames)
    assert (None if chosen is None else chosen.tolist()) == expected


def test_frames_keep_their_truth():
    item = clip("a", [1, 2, 3], target_patches=np.eye(3, dtype=bool))
    part = temporal.select(item, np.array([0, 2]))
    assert part["frames"][:, 0, 0, 0].tolist() == [1, 3]
    assert part["target_patches"].argmax(1).tolist() == [0, 2]
    assert part["frame_times"].tolist() == [0, 2]
    held = temporal.select(item, temporal.places("second_half_held", 3))
    assert held["frame_times"].tolist() == [0, 1, 2]  # the clip is as long as before
    assert part["num_frames"] == 2
    assert item["num_frames"] == 3


def test_known_scores_and_changes():
    items = [
        clip("a", [7, 0, 0, 0, 0, 0]),  # 7 all in all and in the first half, 0 in the second
        clip("b", [1, 1, 1, 1, 1, 2]),  # 7, 3, 4
        clip("c", [2, 5]),  # 7, 2, 5
        clip("d", [7], kind="image"),
    ]
    table = temporal.score_views(Weighing(), collate, loaded(items), tqdm(disable=True))
    found = temporal.aggregate(table, interval)["made"]
    assert set(found) == {"first_half", "second_half", "first_half_held", "second_half_held", "frames_4"}
    first, second = found["first_half"], found["second_half"]
    assert (first.num_items, second.num_items, found["frames_4"].num_items) == (3, 3, 2)
    assert (first.answers_changed, second.answers_changed) == pytest.approx((2 / 3, 1.0))
    assert first.tokens_changed == pytest.approx(2 / 3)
    assert (first.accuracy, first.all_frames_accuracy) == pytest.approx((1 / 3, 1.0))
    losses = {"all": (7 + 27 + 12) / 3, "first": (7 + 6 + 2) / 3}  # b: 1 + 2 + 3 + 4 + 5 + 12
    assert first.all_frames_loss == pytest.approx(losses["all"])
    assert first.loss == pytest.approx(losses["first"])
    assert first.loss_difference == pytest.approx(losses["first"] - losses["all"])
    held = found["second_half_held"]  # a: 0; b: 1 1 1 1 2 2; c: 5 5
    assert held.loss == pytest.approx((0 + (1 + 2 + 3 + 4 + 10 + 12) + 15) / 3)
    assert (held.num_items, held.answers_changed) == (3, 1.0)
    four = found["frames_4"]  # frames 0, 2, 3, 5
    assert four.loss == pytest.approx((7 + 1 + 2 + 3 + 8) / 2)
    assert four.answers_changed == pytest.approx(1 / 2)


def test_a_network_that_ignores_frames_changes_nothing():
    items = [clip(key, [0] * 20) for key in "ab"]
    table = temporal.score_views(Weighing(), collate, loaded(items), tqdm(disable=True))
    found = temporal.aggregate(table, interval)["made"]
    assert set(found) == set(VIEWS)
    assert {view.answers_changed for view in found.values()} == {0.0}
    assert {view.loss_interval for view in found.values()} == {(0.0, 0.0)}


def test_stills_alone_have_no_views():
    table = temporal.score_views(Weighing(), collate, loaded([clip("d", [7], kind="image")]), tqdm(disable=True))
    assert temporal.aggregate(table, interval) == {}


def test_predictions_are_the_networks_own():
    model, batch = tiny.make_model(), tiny.as_batch(tiny.make_batch())
    with predicted_tokens(model) as found:
        output = scoring.forward(model, batch, "autoregressive")
    counts = batch.score_mask.sum(1).tolist()
    ids = by_item(found, counts)
    with torch.no_grad():
        logits = model(**batch.inputs(), mode="autoregressive", options={"return_logits": True}).logits
    for row, own in enumerate(ids):
        scored = batch.score_mask[row]
        assert own.tolist() == logits[row, :-1][scored[1:]].argmax(-1).tolist()
        assert (own == batch.labels[row][scored].numpy()).tolist() == output.correct[row][scored].tolist()
    assert len(model.language_model.lm_head._forward_hooks) == 0


def test_predictions_at_other_positions_are_refused():
    with pytest.raises(ValueError, match="logits at 3 positions, but 4 tokens are scored"):
        by_item([np.array([1, 2, 3])], [2, 2])
