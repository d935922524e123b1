"""Gaze of every layer and head, and its difference to chance, to the static query and to an oracle."""

from functools import partial

import numpy as np
import pandas as pd
import pytest

from pipeline_steps.evaluation import gaze_difference, statistics
from pipeline_steps.inference import gaze
from pipeline_steps.streaming.targets import GroundTruth

GRID = 4
interval = partial(statistics.ratio_interval, num_samples=50, seed=1)


def truth_at(*patches):
    target = np.zeros((len(patches), GRID * GRID), bool)
    target[np.arange(len(patches)), patches] = True
    return GroundTruth(target, target, np.zeros((len(patches), 4)))


def weights_of(peaks):
    """Weights [L, T, H, 1 query, 1 + 16]: the head's strongest patch gets half of what the patches get. peaks:
    integers [L, H, T]; -1: the head attends only to the class token."""
    layers, heads, frames = np.shape(peaks)
    weights = np.zeros((layers, frames, heads, 1, 1 + GRID * GRID))
    for (layer, head, t), patch in np.ndenumerate(np.array(peaks)):
        if patch < 0:
            weights[layer, t, head, 0, 0] = 1
        else:
            weights[layer, t, head, 0, 1:] = 0.2 / 15
            weights[layer, t, head, 0, 1 + patch] = 0.2
            weights[layer, t, head, 0, 0] = 0.6
    return weights


def test_each_head_is_judged_alone():
    peaks = [[[3, 3, 3], [3, 7, 3]], [[-1, -1, -1], [0, 3, 3]]]
    seen = gaze.head_summary(gaze.head_maps(weights_of(peaks)), truth_at(3, 3, 3))
    assert seen["per_head"] == [2, 1, 0, 2]  # frame 0 is left out; the class token is no patch
    assert seen["mass_per_head"] == pytest.approx([1.0, 0.5 + 1 / 30, 0.0, 1.0])


def test_patch_zero_is_no_hit_of_a_head_that_attends_to_no_patch():
    seen = gaze.head_summary(gaze.head_maps(weights_of([[[-1, -1]]])), truth_at(0, 0))
    assert (seen["per_head"], seen["mass_per_head"]) == ([0], [0.0])


def test_patch_zero_is_no_hit_of_a_frame_without_attention_to_patches():
    maps = gaze.attention_maps(weights_of([[[3, -1, 3], [3, -1, 3]]]))
    assert maps.sum(-1) == pytest.approx(np.array([[1, 0, 1]]))
    seen = gaze.summary(maps, truth_at(3, 0, 3))
    assert (seen["peak_on_target"], seen["peak_on_any_object"], seen["mass_on_target"]) == (1, 1, pytest.approx(0.5))
    assert (seen["per_layer"], seen["per_frame"]) == ([1], [1, 0, 1])


def test_heads_of_several_clips_add_up():
    rows = []
    for peaks, patches in (([[[1, 1, 1], [2, 2, 1]]], (1, 1, 1)), ([[[1, 1], [5, 5]]], (5, 5))):
        weights, truth = weights_of(peaks), truth_at(*patches)
        rows.append(
            gaze.summary(gaze.attention_maps(weights), truth) | gaze.head_summary(gaze.head_maps(weights), truth)
        )
    result = gaze.aggregate(pd.DataFrame(rows).assign(key=["a", "b"]), lambda top, bottom, clips: (0.0, 1.0))
    assert result.num_frames == 3
    assert result.per_head == [pytest.approx([2 / 3, 2 / 3])]
    assert np.shape(result.mass_per_head) == (1, 2)


def test_tables_without_heads_still_count():
    weights, truth = weights_of([[[1, 1]]]), truth_at(1, 1)
    rows = pd.DataFrame([gaze.summary(gaze.attention_maps(weights), truth)])
    result = gaze.aggregate(rows.assign(key="a"), lambda top, bottom, clips: (0.0, 1.0))
    assert (result.peak_on_target, result.per_head) == (1.0, None)


def test_difference_to_chance_coarse_and_oracle():
    columns = ["key", "mode", "gaze_frames", "peak_on_target", "chance"]
    rows = [
        ("a", "autoregressive", 4, 3, 0.25),
        ("b", "autoregressive", 6, 5, 0.375),
        ("a", "coarse", 4, 1, 0.25),
        ("b", "coarse", 6, 2, 0.375),
        ("a", "oracle_query", 4, 4, 0.25),  # of one item only
        ("c", "autoregressive", 0, 0, 0.0),
    ]
    table = pd.DataFrame(rows, columns=columns).assign(task="card", item=0)
    found = gaze_difference.differences(table, interval)["card"]
    assert found["chance"].peak_on_target == pytest.approx(0.8 - 1 / 16)
    assert found["coarse"].peak_on_target == pytest.approx(0.5)
    assert found["coarse"].interval == pytest.approx((0.5, 0.5))  # each item gains as much
    assert found["oracle"].peak_on_target == pytest.approx(-0.25)
    assert (found["oracle"].num_frames, found["chance"].num_frames) == (4, 10)


def test_no_truth_no_difference():
    assert gaze_difference.differences(pd.DataFrame({"mode": ["fine"]}), interval) == {}
