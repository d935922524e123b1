"""Objectives in two processes: the gradients of one process on the joined batch, whatever the sharding."""

import pytest
import torch
from torch import distributed, multiprocessing, nn

from pipeline_steps.training.checkpoint_io import full_tensor
from pipeline_steps.training.distributed import DistributedContext, without_sync, wrap
from pipeline_steps.training.objectives.base import Objective, Term
from pipeline_steps.training.training_model import TrainingModel
from tests.model.tiny import as_batch, make_batch, make_model, preference_batch, rows_of
from tests.objectives import frozen, step, training_model

pytestmark = pytest.mark.slow
EVERYWHERE, TEXT_ON_ONE = ([0, 2], [2, 3]), ([1, 1], [0, 3])  # samples of each process
CASES = [
    ("text", "ddp", EVERYWHERE),
    ("text", "ddp", TEXT_ON_ONE),
    ("text", "fsdp", EVERYWHERE),
    ("preference", "ddp", EVERYWHERE),
    ("preference", "ddp", TEXT_ON_ONE),
    ("preference", "fsdp", EVERYWHERE),
    ("head", "ddp", TEXT_ON_ONE),
    ("head", "fsdp", EVERYWHERE),
]


class FrameTime(Objective):
    """A head that tells the time of a frame."""

    name, term_names = "frame_time", ("loss_frame_time",)

    def make_module(self):
        torch.manual_seed(5)
        return nn.Linear(self.config.text_config.hidden_size, 1)

    def terms(self, outputs, batch):
        if outputs.visual_tokens is None:
            return {}
        errors = self.module(outputs.visual_tokens).mean((1, 2)) - batch.frame_times
        return {"loss_frame_time": Term(errors.square().mean(), 0.5, "frames")}


def make_training(kind: str) -> tuple[TrainingModel, nn.Module | None]:
    """(the training model, the reference of preferences)."""
    model = make_model(tie_first_query=False)
    if kind == "preference":
        return training_model(model, "preference"), frozen(make_model(visual_scale=0.3))
    weights = {"coarse": {"weight": 0.5}, "entropy": {"weight": 0.3}, "contrastive": {"weight": 0.2, "margin": -1.0}}
    training = training_model(model, **weights)
    if kind == "head":
        training = TrainingModel(model, [*training.objectives, FrameTime(None, model.config)]).train()
    return training, None


def make_frozen() -> TrainingModel:
    training = training_model(make_model())
    training.network.language_model.requires_grad_(False)
    return training


def train_frozen_in_one_of_two_processes(rank: int, folder: str) -> None:
    """Writes the gradients in this process of a micro-batch of text and one of frames."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/frozen", rank=rank, world_size=2)
    try:
        arguments, results = make_batch(), []
        for sharding in ("ddp", "fsdp"):
            training = make_frozen()
            wrapped = wrap(training, DistributedContext(rank, 2), sharding == "fsdp")
            totals = training.counts(as_batch(rows_of(arguments, [1, 0, 1, 2])))
            for number, row in enumerate((1, (0, 2)[rank])):
                with without_sync(wrapped, number == 1):
                    part, _ = wrapped(as_batch(rows_of(arguments, [row])), 1, totals)
                    (2 * part).backward()
            trained = {name: p for name, p in training.named_parameters() if p.requires_grad}
            results.append({name: full_tensor(p.grad) for name, p in trained.items()})
        torch.save(results, f"{folder}/frozen-{rank}.pt")
    finally:
        distributed.destroy_process_group()


def test_two_processes_accumulate_text_and_frames_with_a_frozen_language_model(tmp_path):
    multiprocessing.spawn(train_frozen_in_one_of_two_processes, (str(tmp_path),), nprocs=2)
    _, expected = step(make_frozen(), as_batch(rows_of(make_batch(), [1, 0, 1, 2])))
    for rank in (0, 1):
        for found in torch.load(tmp_path / f"frozen-{rank}.pt"):
            assert found.keys() == expected.keys()
            for name, gradient in expected.items():
                torch.testing.assert_close(found[name], gradient, atol=2e-6, rtol=1e-3, msg=name)


def train_in_one_of_two_processes(rank: int, folder: str) -> None:
    """Writes the gradients in this process, and how often it encoded frames."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        arguments, results = torch.load(f"{folder}/batch.pt"), []
        for kind, sharding, rows in CASES:
            (training, reference), passes = make_training(kind), []
            layer = training.network.vision_encoder.encoder.layer[0]
            layer.register_forward_hook(lambda *_, passes=passes: passes.append(1))
            wrapped = wrap(training, DistributedContext(rank, 2), sharding == "fsdp")
            totals = training.counts(as_batch(rows_of(arguments, rows[0] + rows[1])))
            part, _ = wrapped(as_batch(rows_of(arguments, rows[rank])), 1, totals, reference)
            (2 * part).backward()  # of the two processes' gradients the mean is taken
            results.append(({name: full_tensor(p.grad) for name, p in training.named_parameters()}, len(passes)))
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        distributed.destroy_process_group()


def test_two_processes_get_the_gradients_of_one_process_with_the_joined_batch(tmp_path):
    batch = preference_batch()
    torch.save(batch, tmp_path / "batch.pt")
    multiprocessing.spawn(train_in_one_of_two_processes, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for number, (kind, sharding, (left, right)) in enumerate(CASES):
        training, reference = make_training(kind)
        _, expected = step(training, as_batch(rows_of(batch, left + right)), reference=reference)
        assert sum(gradient.abs().max() > 0 for gradient in expected.values()) == len(list(training.parameters()))
        assert ("objective.frame_time.weight" in expected) == (kind == "head")
        for process in (first, second):
            found = process[number][0]
            assert found.keys() == expected.keys()
            for name, gradient in expected.items():
                torch.testing.assert_close(found[name], gradient, atol=2e-6, rtol=1e-3, msg=f"{kind} {sharding} {name}")
        assert first[number][1] == (0 if (left, right) == TEXT_ON_ONE else 1)  # one encoding for all objectives
        assert second[number][1] == 1
        _, alone = step(training, as_batch(rows_of(batch, right)), reference=reference)  # without the other process
        assert max((alone[name] - expected[name]).abs().max() for name in alone) > 1e-4
