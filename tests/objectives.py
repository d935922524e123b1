"""Training models with some objectives, and their steps, for the tests."""

import copy
from types import SimpleNamespace

import torch

from pipeline_steps.streaming.batch import Batch
from pipeline_steps.training import objectives
from pipeline_steps.training.training_model import TrainingModel

DEFAULTS = {
    "second_pass_probability": 0.0,
    "initial_modules": "new",
    "text": {"weight": 1.0},
    "coarse": {"weight": 0.0},
    "contrastive": {"weight": 0.0, "margin": 0.5},
    "entropy": {"weight": 0.0, "margin": 0.5},
    "preference": {"beta": 0.1},
    "next_frame": {
        "weight": 0.0,
        "coarse_weight": 1.0,
        "target": "latent",
        "autoencoder": "data/backbones/autoencoder",
        "previous_latent": "keep",
        "drop_probability": 0.5,
        "noise_std": 0.5,
        "skip_query": False,
        "separate_heads": False,
        "l1_weight": 0.0,
        "head_width": 64,
        "modes": {"joint": 1.0, "video_only": 0.0, "text_conditioned": 0.0, "captions": 0.0},
    },
}
# Every term beside the text loss that needs nothing but the network
ALL = {"coarse": {"weight": 0.5}, "entropy": {"weight": 0.3}, "contrastive": {"weight": 0.2, "margin": -1.0}}


def section(**changes):
    """A section training.<stage>.objective: DEFAULTS with changes, which are values or dicts of values."""
    content = copy.deepcopy(DEFAULTS)
    for name, value in changes.items():
        content[name] = content.get(name, {}) | value if isinstance(value, dict) else value
    return objectives.section().model_validate(content)


def settings(loss: str = "answer_only", **changes) -> SimpleNamespace:
    """What objectives read of a section training.<stage>."""
    return SimpleNamespace(loss=loss, objective=section(**changes))


def training_model(model, loss: str = "answer_only", **changes) -> TrainingModel:
    return TrainingModel(model, objectives.build("stage2", settings(loss, **changes), model.config)).train()


def frozen(model):
    """The reference of preference training."""
    return copy.deepcopy(model).requires_grad_(False).eval()


def step(training: TrainingModel, batch: Batch, size: int | None = None, num_plans: int = 1, reference=None):
    """({"loss" and terms: value}, {name: gradient}) of a batch in micro-batches of `size`."""
    training.zero_grad()
    totals, sums = training.counts(batch), {}
    for piece in batch.split(size):
        loss, values = training(piece, num_plans, totals, reference)
        loss.backward()
        for name, value in {"loss": loss, **values}.items():
            sums[name] = sums.get(name, 0.0) + value.item()
    return sums, {name: p.grad.clone() for name, p in training.named_parameters() if p.grad is not None}


def assert_same(one, other, rtol=0.0):
    """Two results of `step` are the same up to rounding."""
    assert one[0].keys() == other[0].keys()
    for name, value in one[0].items():
        assert abs(value - other[0][name]) <= 1e-6 * max(1, abs(value)) + rtol * abs(value), name
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient, other[1][name], atol=1e-6, rtol=rtol)
