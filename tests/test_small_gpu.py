"""The scale `small_gpu` with its own network, few clips and few steps, on the CPU: the stages take its sizes."""

import json

import pytest
import torch

from pipeline_steps.backbones import __main__ as backbones
from pipeline_steps.backbones import language_model, vision_encoder
from pipeline_steps.common import params
from tests import pipeline

pytestmark = pytest.mark.slow
FEW = (
    "scale=small_gpu",
    "sources.procedural.num_train_clips=24",
    "sources.procedural.num_validation_clips=1",
    "sources.procedural.num_test_clips=1",
    "sources.procedural.num_frames=2",
    "sources.chat.num_train=8",
    "sources.chat.num_validation=1",
    "sources.chat.num_test=1",
    "runtime.num_workers=1",
    "streaming.image_replication=1",
    "training.common.batch_size=4",
    "training.common.device=cpu",
    "training.common.num_threads=1",
    "training.common.precision=fp32",  # without bf16 instructions a CPU takes minutes
    "training.common.max_validation_items=1",
    "training.stage1.num_samples=8",
    "training.stage1.text_share=0.25",
    "evaluation.batch_size=8",
    "evaluation.max_items_per_task=2",
    "evaluation.max_control_items_per_task=1",
    "evaluation.max_temporal_clips_per_task=1",
    "evaluation.max_diagnostic_clips=1",
    "evaluation.max_answers_per_task=1",
    "evaluation.max_captions_per_task=1",
    "evaluation.bootstrap_samples=20",
    "heatmaps.num_clips=1",
)


def test_the_stages_run(tmp_path, monkeypatch):
    (tmp_path / "params.yaml").write_text(params.compose(FEW))
    embedded = params.read(tmp_path / "params.yaml", "backbones").backbones.embedded
    shorter = dict.fromkeys(("vision_steps", "language_steps"), 1) | {"vision_batch_size": 2, "language_batch_size": 2}
    monkeypatch.setattr(vision_encoder, "NUM_HELD_OUT", 4)
    monkeypatch.setattr(language_model, "NUM_HELD_OUT", 32)
    threads = torch.get_num_threads()
    try:
        short = embedded.model_copy(update=shorter | {"device": "cpu", "num_threads": 1})
        backbones.train_backbones(short, tmp_path / "data/backbones", num_workers=1)
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    pipeline.run_all(tmp_path, "sources", "shards", "tokens", "stage1")
    (tmp_path / "outputs/stage1").rename(tmp_path / "outputs/stage3")  # the stages between cost time alone
    pipeline.run_all(tmp_path, "evaluation", "flops", "heatmaps")
    config = json.loads((tmp_path / "outputs/stage3/config.json").read_text())
    assert (config["vision_config"]["image_size"], config["text_config"]["hidden_size"]) == (224, 384)
    result = json.loads((tmp_path / "outputs/metrics/evaluation.json").read_text())
    assert result["gaze"]["ask_colour"]["autoregressive"]["num_frames"] > 0
    assert list((tmp_path / "reports/heatmaps").glob("*.gif"))
