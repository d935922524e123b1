"""The world of objects through sources, shards, tokens, a training stage and the evaluation, at a size of seconds."""

import json
import shutil

import pandas as pd
import pytest

from pipeline_steps.common.metrics import EvaluationResult
from pipeline_steps.common.modes import SCORED_MODES
from pipeline_steps.world.objects import GAZE_KINDS, KINDS, NEW_KINDS
from tests import drawings, pipeline

pytestmark = pytest.mark.slow


def test_the_objects_are_trained_on_and_evaluated(tmp_path):
    drawings.write(tmp_path / "cutouts")
    objects = {"cutouts": tmp_path / "cutouts", "held_out_share": 0.2, "frame_size": 112, "num_frames": "[6,8]"}
    objects |= {"num_train_clips": 36, "num_validation_clips": 1, "num_test_clips": 2, "num_new_clips": 1}
    options = [f"sources.procedural.objects.{name}={value}" for name, value in objects.items()]
    pipeline.write_params(tmp_path, "data=objects", *options, "shards.image_size=56", "training.common.record_every=1")
    pipeline.run_all(tmp_path, "backbones", "sources", "shards", "tokens", "stage1")
    rows = pd.read_csv(tmp_path / "outputs/metrics/stage1.csv").query("event == 'train'")
    assert rows["loss"].iloc[-1] < rows["loss"].iloc[0]

    shutil.copytree(tmp_path / "outputs/stage1", tmp_path / "outputs/stage3")  # one stage shows it
    pipeline.run_all(tmp_path, "evaluation")
    text = (tmp_path / "outputs/metrics/evaluation.json").read_text()
    EvaluationResult.model_validate_json(text)
    result = json.loads(text)
    new = [f"{kind}_new" for kind in NEW_KINDS]
    assert set(result["tasks"]) == {*KINDS, *new}
    for task, scores in result["tasks"].items():
        assert all(scores[mode]["num_items"] == (1 if task in new else 2) for mode in SCORED_MODES)
    for kind in GAZE_KINDS:
        gaze = result["gaze"][kind]["autoregressive"]
        assert 0 < gaze["chance"] < 0.7  # boxes of the target on the grid of 4 x 4 patches
        assert gaze["num_frames"] > 0
    assert all(result["chance"][kind] is not None for kind in (*KINDS, *new))
