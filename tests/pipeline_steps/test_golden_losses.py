"""Losses of a tiny network's first steps, in every stage's kind of training and both layouts.

They move when the arithmetic of the network, of a loss or of the optimizer does. Where that is meant, print the new
ones with `python -m tests.pipeline_steps.test_golden_losses` and say in docs/experiment_log.md why they moved.
"""

import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

from model.constants import IGNORE_INDEX
from pipeline_steps.common.errors import UserError
from pipeline_steps.streaming.plan import Plan
from pipeline_steps.training.context import TrainContext
from pipeline_steps.training.distributed import DistributedContext
from pipeline_steps.training.train_loop import check_lockstep, prepare, train_step
from tests.model.tiny import NUM_FRAMES, VISUAL, as_batch, make_batch, make_model, preference_batch, rows_of
from tests.objectives import section

LAYOUTS = ("question_first", "vision_first")
LOSSES = {"stage1": "all_text", "stage2": "answer_only", "stage3": "preference"}
RUNS = ("stage1", "stage2", "stage2, muon", "stage3")
NUM_STEPS = 4
SEED = 3  # with which every stage plans a second time on some steps
GOLDEN = {
    ("stage1", "question_first"): [4.24387, 4.14179, 4.05052, 4.00553],
    ("stage1", "vision_first"): [4.2403, 4.13375, 4.04954, 4.00723],
    ("stage2", "question_first"): [4.22648, 4.05736, 3.92322, 3.86072],
    ("stage2", "vision_first"): [4.21634, 4.0464, 3.91317, 3.85201],
    ("stage2, muon", "question_first"): [4.22648, 4.14633, 4.06678, 4.02583],
    ("stage2, muon", "vision_first"): [4.21634, 4.13567, 4.05559, 4.01446],
    ("stage3", "question_first"): [0.69315, 0.64544, 0.6077, 0.59052],
    ("stage3", "vision_first"): [0.69315, 0.64429, 0.60704, 0.59058],
}


def make_run(
    stage: str, layout: str, folder, optimizer: str = "adamw", objective: dict | None = None, weights=None, **options
) -> TrainContext:
    """objective: changes of the section; weights: {step: weight in the plan}; options: of the network."""
    weights = weights or {}
    rates = SimpleNamespace(connector=3e-3, vision=4e-4, language=9e-4)
    settings = SimpleNamespace(
        loss=LOSSES[stage], learning_rate=rates, freeze_vision=False, freeze_language=False, schedule="cosine",
        warmup_ratio=0.25, min_lr_ratio=0.1, decay_share=0.0, converged_learning_rate=None,
        objective=section(**({"second_pass_probability": 0.5} | (objective or {}))),
    )  # fmt: skip
    common = SimpleNamespace(
        batch_size=4, micro_batch_size=None, optimizer=optimizer, weight_decay=0.01, betas=(0.9, 0.98), clip_norm=1.0,
        ema_decay=None, precision="fp32", activation_checkpointing=False, compile=False, sharding="ddp",
        record_every=1,
    )  # fmt: skip
    model = make_model(layout=layout, **options)
    run = TrainContext(stage, model, None, None, SEED, common, settings, None, SimpleNamespace(log_every=1), folder)
    run.__dict__["loader"] = SimpleNamespace(num_steps=NUM_STEPS, samples_seen=lambda steps: 4 * steps)
    every = SimpleNamespace(order=np.arange(4), step_weight=lambda step: weights.get(step, 1.0))
    run.__dict__["stage_plan"] = SimpleNamespace(plan=every)
    shown = {"shown_frames": lambda replication: np.array(NUM_FRAMES)}
    run.train = SimpleNamespace(index=SimpleNamespace(num_rejected=np.ones(4), **shown))
    run.streaming = SimpleNamespace(image_replication=1)
    run.logger = SimpleNamespace(peak=None, step=lambda row, is_logged, **counts: None)
    return run


def losses(name: str, layout: str, folder) -> list[float]:
    """Of NUM_STEPS steps on one batch of four samples (3, 0, 1 and 2 frames). name: of RUNS."""
    stage, _, optimizer = name.partition(", ")
    run = make_run(stage, layout, folder, optimizer or "adamw")
    batch = as_batch(preference_batch(layout) if stage == "stage3" else make_batch(layout=layout))
    if stage == "stage1":
        batch.labels = batch.input_ids.masked_fill(batch.input_ids >= VISUAL, IGNORE_INDEX)
        batch.labels = batch.labels.masked_fill(batch.attention_mask == 0, IGNORE_INDEX)
        batch.places = batch.places.of_rows(batch.input_ids, batch.attention_mask, batch.labels, 0)
    trainer = prepare(run)
    rows = [train_step(run, trainer, batch, step) for step in range(NUM_STEPS)]
    if stage == "stage3":
        assert rows[0]["loss"] == pytest.approx(math.log(2))  # the reference is the model itself, and looks as it does
    assert len({row["num_plans"] for row in rows}) == 2  # some steps plan a second time
    return [row["loss"] for row in rows]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", RUNS)
def test_losses_match_the_recorded_ones(name, layout, tmp_path):
    assert losses(name, layout, tmp_path) == pytest.approx(GOLDEN[name, layout], abs=1e-4)


def test_sampled_queries_are_a_function_of_the_step_number(tmp_path):
    """Whatever was drawn before: so a resumed run draws the same."""
    found = {}
    for step in (0, 1, 0):
        run = make_run("stage2", "question_first", tmp_path, query_source="random", hard_attention="gumbel")
        trainer = prepare(run)
        torch.rand(step + 5)
        row = train_step(run, trainer, as_batch(make_batch()), step)
        found.setdefault(step, set()).add(row["loss"])
    assert len(found[0]) == 1
    assert found[0] != found[1]


@pytest.mark.parametrize(
    ("freezes", "objective"),
    [
        (True, {}),
        (False, {"text": {"weight": 0.0}, "contrastive": {"weight": 0.1, "margin": -1.0}}),
        (False, {"text": {"weight": 0.0}, "entropy": {"weight": 0.1}}),
    ],
    ids=["frozen language model", "contrastive only", "entropy only"],
)
def test_a_micro_batch_of_text_may_train_nothing(tmp_path, freezes, objective):
    """The step is that of the whole batch; a step of text only changes nothing."""
    rows = {}
    for size in (None, 1):
        run = make_run("stage2", "question_first", tmp_path, objective=objective)
        run.settings.freeze_language, run.common.micro_batch_size = freezes, size
        rows[size] = train_step(run, prepare(run), as_batch(make_batch()), 0)
    for name in ("loss", "grad_norm"):
        assert rows[1][name] == pytest.approx(rows[None][name], rel=1e-4)
    run = make_run("stage2", "question_first", tmp_path, objective=objective)
    run.settings.freeze_language, run.common.weight_decay = freezes, 0.0
    trainer = prepare(run)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    row = train_step(run, trainer, as_batch(rows_of(make_batch(), [1])), 0)
    assert row["grad_norm"] == 0
    assert row["loss"] == (pytest.approx(row["loss_text"]) if freezes else 0)
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())


def test_a_step_of_another_weight_scales_the_gradient_but_not_the_loss(tmp_path):
    plain = make_run("stage2", "question_first", tmp_path)
    doubled = make_run("stage2", "question_first", tmp_path, weights={0: 2.0})
    rows = [train_step(run, prepare(run), as_batch(make_batch()), 0) for run in (plain, doubled)]
    assert rows[1]["grad_norm"] == pytest.approx(2 * rows[0]["grad_norm"], rel=1e-5)
    assert rows[1]["loss"] == rows[0]["loss"]


class Noted(DistributedContext):
    """One process that notes how many values it sends to the others."""

    sent: ClassVar[list[int]] = []

    def sum(self, *numbers):
        self.sent.append(len(numbers))
        return [float(number) for number in numbers]

    def add_up(self, values):
        self.sent.append(len(values))


def test_a_text_only_rank_reduces_as_many_values_as_the_others(tmp_path):
    weights = {name: {"weight": 0.1} for name in ("coarse", "entropy", "contrastive")}
    sent, rows = {}, {}
    for name, samples in (("frames", [0, 2]), ("text", [1, 1])):
        run = make_run("stage2", "question_first", tmp_path, objective=weights)
        trainer = prepare(run)
        run.distributed, Noted.sent = Noted(world_size=2), []
        rows[name] = train_step(run, trainer, as_batch(rows_of(make_batch(), samples)), 0)
        sent[name] = Noted.sent
    assert sent["frames"] == sent["text"]
    assert {"loss_entropy", "loss_contrastive"} <= set(rows["frames"])
    assert not {"loss_entropy", "loss_contrastive"} & set(rows["text"])


@pytest.mark.parametrize(
    ("num_frames", "size", "wrong"),
    [([3, 3, 0, 0], 1, None), ([3, 0, 0, 3], None, None), ([3, 0, 3, 0], 1, r"\[\[True, True\], \[False, False\]\]")],
)
def test_fsdp_ranks_need_frames_in_the_same_micro_batches(tmp_path, num_frames, size, wrong):
    run = make_run("stage2", "question_first", tmp_path)
    run.distributed, run.micro_batch_size = DistributedContext(world_size=2), size
    run.train.index.num_frames = np.array(num_frames)
    run.stage_plan.plan = Plan(np.arange(4), np.array([0, 4]))
    if wrong is None:
        check_lockstep(run)
        return
    with pytest.raises(UserError, match=rf"step 1 of stage2: .* all 2 ranks need frames .* {wrong}"):
        check_lockstep(run)


if __name__ == "__main__":
    for name in itertools.product(RUNS, LAYOUTS):
        print(f"    {name}: {[round(loss, 5) for loss in losses(*name, Path())]},")
