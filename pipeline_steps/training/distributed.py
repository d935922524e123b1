"""One training in several processes, one device each, started by `torchrun`; without it, one process.

Every process makes its own share of each step's batch. Sums over the processes (labelled tokens, losses, scores) go
through `DistributedContext.sum`, gradients through DistributedDataParallel or FSDP2.
"""

import os
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from pipeline_steps.common.errors import UserError
from pipeline_steps.training.training_model import TrainingModel

TIMEOUT = timedelta(minutes=10)  # after which waiting for another process is an error


@dataclass(frozen=True)
class DistributedContext:
    """This process among the others. `device`: cpu, or the process's own GPU."""

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"

    @property
    def is_main(self) -> bool:
        """Only the main process writes, prints and validates paths."""
        return self.rank == 0

    def sum(self, *numbers: float) -> list[float]:
        """The sums of every process's numbers, in double precision, the same in every process."""
        if self.world_size == 1:
            return [float(number) for number in numbers]
        values = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        distributed.all_reduce(values)
        return values.tolist()

    def smallest(self, number: int) -> int:
        """The smallest of every process's numbers, in every process."""
        if self.world_size == 1:
            return number
        value = torch.tensor(number, device=self.device)
        distributed.all_reduce(value, distributed.ReduceOp.MIN)
        return int(value)

    def gather(self, value) -> list:
        """Every process's value (anything that can be pickled), in every process."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        distributed.all_gather_object(values, value)
        return values

    def broadcast(self, value):
        """The main process's value (anything that can be pickled), in every process."""
        if self.world_size == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values, device=torch.device(self.device))
        return values[0]

    def wait(self) -> None:
        """Until every process is here."""
        if self.world_size > 1:
            distributed.barrier()


SINGLE_PROCESS = DistributedContext()


@contextmanager
def distributed_context(device: str):
    """Yields the DistributedContext of this run and closes their group at the end. `device`: cpu or cuda.

    UserError for more processes on a machine than it has GPUs.
    """
    world_size, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    if world_size == 1:
        yield DistributedContext(device=device)
        return
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(
                f"torchrun started process {local} on this machine, which has {torch.cuda.device_count()} GPUs. Start "
                "one process per GPU (--nproc-per-node)."
            )
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    distributed.init_process_group("nccl" if device != "cpu" else "gloo", timeout=TIMEOUT)
    try:
        yield DistributedContext(int(os.environ["RANK"]), world_size, device)
    finally:
        distributed.destroy_process_group()


def wrap(model: TrainingModel, group: DistributedContext, sharded: bool) -> nn.Module:
    """What is called in a training step: the model itself, or one that shares gradients with the other processes.

    `sharded`: every layer's weights, gradients and optimizer state are divided among the processes (Zhao et al. 2023,
    "PyTorch FSDP"; torch's `fully_shard`) and put together while the layer runs. The model is changed in place.
    """
    if group.world_size == 1:
        return model
    if sharded:
        for layer in model.network.vision_encoder.encoder.layer:
            fully_shard(layer)
            register_fsdp_forward_method(layer, "attend")
        for layer in model.network.language_model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        register_fsdp_forward_method(model, "infer")
        return model
    device_ids = None if group.device == "cpu" else [group.device]
    # a text-only share of a batch uses no vision weights, a coarse step no planner
    return DistributedDataParallel(
        model, device_ids=device_ids, find_unused_parameters=True, gradient_as_bucket_view=True
    )


def without_sync(wrapped: nn.Module, last: bool):
    """Around a micro-batch: gradients are shared among the processes once a step, with its `last` one."""
    if isinstance(wrapped, DistributedDataParallel) and not last:
        return wrapped.no_sync()
    return nullcontext()
