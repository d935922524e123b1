"""Launches of a training step at the depths of SmolLM2-135M and DINOv2-small, and where the host waits. Root mean
squares count as on CUDA (`tests/model/launches.py`)."""

from unittest import mock

import pytest
import torch

from pipeline_steps.streaming.batch import Batch
from pipeline_steps.training import train_loop
from tests.model.launches import Launches, true_depths
from tests.model.tiny import as_batch, make_batch, preference_batch
from tests.pipeline_steps.test_golden_losses import make_run

# Of a step with one plan. bf16 adds casts between the fp32 residual stream and bf16 linear layers: two per norm, one
# per projection onto the stream, which also needs an addition of its own.
MAX_LAUNCHES = {"fp32": 4_000, "bf16": 4_640}


def launched(run, batch, step=0):
    trainer = train_loop.prepare(run)
    train_loop.launch_step(run, trainer, batch, 7)  # makes the optimizer's state
    stays = mock.patch.object(Batch, "to", lambda batch, device: batch)  # the run's own device is "cpu": no wait
    with stays, Launches() as launches:
        train_loop.launch_step(run, trainer, batch, step)
    return launches


def deep_run(folder, stage="stage2", optimizer="muon", **options):
    run = make_run(stage, "question_first", folder, optimizer, objective={"second_pass_probability": 0.0})
    run.model = true_depths(**options)
    return run


@pytest.mark.parametrize(("optimizer", "precision"), [("muon", "fp32"), ("muon", "bf16"), ("adamw", "fp32")])
def test_a_step_has_few_launches_and_never_waits(optimizer, precision, tmp_path):
    run = deep_run(tmp_path, optimizer=optimizer)
    run.common.precision = precision
    batch = as_batch(make_batch() | {"pixel_values": torch.randint(0, 255, (6, 3, 28, 28), dtype=torch.uint8)})
    launches = launched(run, batch)
    assert 1_500 < launches.count <= MAX_LAUNCHES[precision]
    assert launches.waits == []


def test_preferences_wait_for_nothing(tmp_path):
    launches = launched(deep_run(tmp_path, "stage3"), as_batch(preference_batch()))
    assert launches.waits == []
