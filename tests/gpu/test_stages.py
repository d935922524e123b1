"""The training loop on a device: every stage and precision, resuming, micro-batches, model FLOPs."""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("pydantic", reason="the parameters of the stages need pydantic")
pytest.importorskip("pyarrow", reason="the items of the stages need pyarrow")
pytest.importorskip("simplejpeg", reason="the frames of the stages need simplejpeg")

from benchmarks.workload import clips
from pipeline_steps.monitoring.metrics_logger import MetricsLogger
from pipeline_steps.training import train_loop
from pipeline_steps.training.checkpointing import save_state
from pipeline_steps.training.distributed import DistributedContext
from pipeline_steps.training.train_loop import prepare, train_step
from tests.model.tiny import as_batch, make_batch, preference_batch
from tests.objectives import ALL
from tests.pipeline_steps.test_golden_losses import NUM_STEPS, RUNS, make_run

STEPS = {"fp32": 0.01, "bf16": 0.05}  # optimizers divide small differences of gradients by small gradients


def batch_of(run):
    """As the loader gives it: for a GPU in pinned memory."""
    batch = as_batch(preference_batch() if run.stage == "stage3" else make_batch())
    return batch if run.device == "cpu" else batch.pin_memory()


def run_on(device: str, name: str, folder, objective: dict | None = None, **common):
    """name: of RUNS; objective: changes of the section; common: of training.common."""
    stage, _, optimizer = name.partition(", ")
    run = make_run(stage, "question_first", folder, optimizer or "adamw", objective)
    run.model.to(device)
    run.distributed = DistributedContext(device=device)
    run.common.__dict__.update(common)
    run.runtime.keep_checkpoints = 1
    return run


def steps(run, trainer, first: int = 0, last: int = NUM_STEPS) -> list[float]:
    return [train_step(run, trainer, batch_of(run), step)["loss"] for step in range(first, last)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", RUNS)
def test_every_stage_trains_as_on_the_cpu_in_fp32(name, precision, device, tmp_path):
    runs = run_on("cpu", name, tmp_path), run_on(device, name, tmp_path, precision=precision)
    expected, found = (steps(run, prepare(run)) for run in runs)
    assert found == pytest.approx(expected, abs=STEPS[precision])


def test_other_objectives_train_as_on_the_cpu(device, tmp_path):
    losses = []
    for own in ("cpu", device):
        run = run_on(own, "stage2", tmp_path, ALL)
        losses.append(steps(run, prepare(run)))
    assert losses[1] == pytest.approx(losses[0], abs=STEPS["fp32"])


@pytest.mark.parametrize("size", [1, 3])
def test_micro_batches_add_up_on_the_device(size, device, tmp_path):
    losses = []
    for micro_batch_size in (None, size):
        run = run_on(device, "stage2", tmp_path, micro_batch_size=micro_batch_size)
        losses.append(steps(run, prepare(run)))
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


@pytest.mark.parametrize("ema_decay", [None, 0.9])
@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_goes_on_from_the_same_numbers(name, ema_decay, device, tmp_path):
    """Weights, optimizer and average come back bit by bit; the steps after are those of an uninterrupted run."""
    run = run_on(device, name, tmp_path, ema_decay=ema_decay)
    loader = {"quarantined": {}, "check_quarantined": lambda found: None, "state_dict": lambda: {"step": 2}, "step": 2}
    run.loader.__dict__.update(loader)
    trainer = prepare(run)
    steps(run, trainer, 0, 2)
    save_state(run, trainer, 2)
    weights = {key: value.detach().clone() for key, value in run.model.state_dict().items()}
    state = {key: value.clone() for key, value in trainer.optimizer.tensors(trainer.names).items()}
    expected = steps(run, trainer, 2)
    again = run_on(device, name, tmp_path, ema_decay=ema_decay)
    again.loader.__dict__.update(step=2, load_state_dict=lambda values: None)
    if name == "stage3":
        again.model.load_state_dict(run.reference.state_dict())  # what the stage before had left
    resumed = prepare(again)
    assert all(torch.equal(value, weights[key]) for key, value in again.model.state_dict().items())
    restored = resumed.optimizer.tensors(resumed.names)
    assert restored.keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in restored.items())
    assert {value.device.type for value in weights.values()} == {device}
    assert steps(again, resumed, 2) == (expected if device == "cpu" else pytest.approx(expected, abs=1e-3))


def auto_run(device: str, folder, batch_size: int):
    """A run with samples of three frames, as `choose_micro_batch_size` sees it."""
    run = run_on(device, "stage2", folder, batch_size=batch_size, micro_batch_size="auto")
    run.stage_plan.plan.__dict__.update(starts=np.array([0, batch_size]), order=np.arange(batch_size))
    index = SimpleNamespace(num_tokens=np.full(batch_size, 48), shown_frames=lambda repeats: np.full(batch_size, 3))
    run.train = Numbers(index)
    run.streaming = SimpleNamespace(image_replication=1)
    run.loader.collate = lambda numbers: clips(run.model.config, len(numbers), 3)
    return run


@dataclass
class Numbers:
    """A split whose items are their numbers."""

    index: SimpleNamespace
    image_size: int = 56

    def __getitem__(self, number: int) -> int:
        return number


def test_no_micro_batch_is_chosen_on_a_cpu(tmp_path):
    run = auto_run("cpu", tmp_path, 8)
    assert train_loop.choose_micro_batch_size(run) is None
    train_loop.try_micro_batch(run, run.loader.collate(range(8)), accumulates=True)  # which would be tried


def test_the_micro_batch_that_is_chosen_fits_the_memory(cuda, tmp_path):
    run = auto_run(cuda, tmp_path, 1024)
    assert train_loop.choose_micro_batch_size(run) == 1024
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    train_loop.try_micro_batch(run, run.loader.collate(range(256)), accumulates=True)
    needed = torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.5 * needed / torch.cuda.get_device_properties(0).total_memory)
    try:
        assert 128 <= train_loop.choose_micro_batch_size(run) < 1024
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("name", ["stage1", "stage3"])
def test_model_flops_are_counted(name, device, tmp_path):
    run = run_on(device, name, tmp_path, precision="bf16")
    settings = SimpleNamespace(peak_tflops=None, tensorboard=False, dvclive=False, wandb_project=None)
    if device == "cpu":
        settings.peak_tflops = 1.0  # no table knows it
    run.logger = MetricsLogger(settings, name, NUM_STEPS, tmp_path, run.distributed, "bf16")
    run.logger.bar = SimpleNamespace(set_postfix_str=lambda text: None)
    run.train.image_size = 56
    if run.logger.peak is None:
        pytest.skip(f"the peak of {torch.cuda.get_device_name()} is not in the table: no figure is right")
    steps(run, prepare(run))
    assert 0 < run.logger.speed()["speed/mfu"] < 1
