"""The two dataclasses of the train loop: `TrainContext` (a stage and its data) and `TrainState` (what a step
updates)."""

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import nn

from pipeline_steps.monitoring.metrics_logger import MetricsLogger
from pipeline_steps.monitoring.mfu import StepFlops
from pipeline_steps.monitoring.progress import write_line
from pipeline_steps.streaming.batch import Batch
from pipeline_steps.streaming.collate import Collator
from pipeline_steps.streaming.dataset import TokenizedShards
from pipeline_steps.streaming.loader import Loader, StagePlan, plan_stage
from pipeline_steps.training.distributed import SINGLE_PROCESS, DistributedContext
from pipeline_steps.training.ema import EMA
from pipeline_steps.training.objectives import build
from pipeline_steps.training.optimizers import Optimizer
from pipeline_steps.training.training_model import TrainingModel


@dataclass
class TrainContext:
    """One stage: model, data, settings and results so far."""

    stage: str
    model: nn.Module  # the network
    train: TokenizedShards
    validation: TokenizedShards
    seed: int
    common: object  # training.common
    settings: object  # training.<stage>
    streaming: object
    runtime: object
    folder: Path  # scratch folder for the states
    distributed: DistributedContext = SINGLE_PROCESS
    history: list[dict] = field(default_factory=list)  # rows of the metrics table
    best: dict | None = None  # {"step", "loss"} of the best validation so far
    micro_batch_size: int | None = None
    reference: nn.Module | None = None  # frozen copy of the initial network, if an objective needs it
    logger: MetricsLogger | None = None
    published: nn.Module | None = None  # network to publish; set at the end of the stage, main process only
    published_heads: dict[str, torch.Tensor] = field(
        default_factory=dict
    )  # tensors of the objectives' own modules, likewise
    stop_requested: bool = False

    @property
    def device(self) -> str:
        return self.distributed.device

    @cached_property
    def training_model(self) -> TrainingModel:
        """The network with the stage's objectives. Their own modules are initialised from the seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            objectives = build(self.stage, self.settings, self.model.config)
        return TrainingModel(self.model, objectives).to(self.device)

    @cached_property
    def stage_plan(self) -> StagePlan:
        """The plan of all batches of the stage. UserError if the data lack the items of the mixture."""
        return plan_stage(
            self.train,
            self.settings,
            self.streaming,
            stage=self.stage,
            seed=self.seed,
            batch_size=self.common.batch_size,
            tokens_per_frame=self.model.config.tokens_per_frame,
            world_size=self.distributed.world_size,
        )

    @cached_property
    def loader(self) -> Loader:
        """Data loader of this rank's batches."""
        collate = Collator.for_model(
            self.model.config, loss=self.settings.loss, image_replication=self.streaming.image_replication
        )
        group = self.distributed
        place = {"rank": group.rank, "world_size": group.world_size, "pin_memory": group.device != "cpu"}
        place["lockstep"] = self.is_sharded
        return Loader(self.train, self.stage_plan, collate, self.streaming, self.runtime, **place)

    @cached_property
    def step_flops(self) -> StepFlops:
        """FLOP counter of the training steps. Use it only after `trainable_parameters` has frozen the frozen
        weights."""
        names = self.training_model.term_names
        return StepFlops(self.model, self.train.image_size, coarse_loss="loss_coarse" in names)

    @property
    def num_steps(self) -> int:
        return self.loader.num_steps

    @property
    def is_sharded(self) -> bool:
        """Whether weights and optimizer state are sharded among the ranks (FSDP2), which then run in lockstep."""
        return self.distributed.world_size > 1 and self.common.sharding == "fsdp"

    def is_recorded(self, step: int) -> bool:
        """Whether a step (from 0) gets a row in the metrics table."""
        return step % self.common.record_every == 0 or step == self.num_steps - 1

    def is_logged(self, step: int) -> bool:
        """Whether a step (from 0) is sent to the progress bar and the live curves."""
        return step % self.runtime.log_every == 0 or step == self.num_steps - 1

    def generator(self, *names: int) -> np.random.Generator:
        """Random generator seeded by (seed, stage, *names)."""
        return np.random.default_rng([self.seed, int(self.stage[-1]), *names])


@dataclass
class LaunchedStep:
    """A step whose work is under way on the device."""

    step: int
    batch: Batch
    row: dict  # of the metrics table, without the numbers that the device computes
    names: list[str]  # of `values`
    values: torch.Tensor  # float64, on the CPU; complete once `done` has happened
    done: torch.cuda.Event | None  # None: already
    counts: dict[str, float]  # of the step, over all ranks
    flops: float


@dataclass
class TrainState:
    """What a training step updates and a saved state contains."""

    wrapped: nn.Module  # the training model, in DDP or FSDP2 where there are several ranks
    optimizer: Optimizer
    ema: EMA | None
    names: dict[int, str]  # {id(parameter): name}
    launched: LaunchedStep | None = None  # not in a saved state


@contextmanager
def averaged(state: TrainState):
    """Inside the block the model has the EMA weights, if there is an EMA."""
    with state.ema.in_place() if state.ema is not None else nullcontext():
        yield


def announce(run: TrainContext, lines: list[str]) -> None:
    """Prints lines above the progress bar, in the main process only."""
    if run.distributed.is_main:
        for line in lines:
            write_line(line)
