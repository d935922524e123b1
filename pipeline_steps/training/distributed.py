"""Distributed training: one process per device, started by `torchrun`; a single process without it.

Every rank computes its share of each step's batch. Counts, losses and scores are reduced by `DistributedContext.sum`,
gradients by DistributedDataParallel or FSDP2.
"""

import json
import os
import time
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from pipeline_steps.common.errors import UserError
from pipeline_steps.training.training_model import TrainingModel

TIMEOUT = timedelta(minutes=10)  # for collectives


@dataclass(frozen=True)
class DistributedContext:
    """Rank, world size and device (cpu, or this rank's GPU), with collectives that also work in a single process."""

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only one that writes, prints and validates paths."""
        return self.rank == 0

    def sum(self, *numbers: float) -> list[float]:
        """All-reduced sums in float64, without the GPU, for which no rank waits."""
        if self.world_size == 1:
            return [float(number) for number in numbers]
        values = torch.tensor(numbers, dtype=torch.float64)
        distributed.all_reduce(values)
        return values.tolist()

    def add_up(self, values: torch.Tensor) -> None:
        """All-reduces a tensor of this rank's device in place, without waiting for the result on a GPU."""
        if self.world_size > 1:
            distributed.all_reduce(values)

    def smallest(self, number: int) -> int:
        """All-reduced minimum."""
        if self.world_size == 1:
            return number
        value = torch.tensor(number, device=self.device)
        distributed.all_reduce(value, distributed.ReduceOp.MIN)
        return int(value)

    def gather(self, value) -> list:
        """The values of all ranks (any picklable object), on every rank."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        distributed.all_gather_object(values, value)
        return values

    def broadcast(self, value):
        """The main process's value (any picklable object), on every rank."""
        if self.world_size == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values, device=torch.device(self.device))
        return values[0]

    def wait(self) -> None:
        """Barrier."""
        if self.world_size > 1:
            distributed.barrier()


SINGLE_PROCESS = DistributedContext()


@contextmanager
def distributed_context(device: str):
    """Yields the DistributedContext of this run and destroys the process group at the end. device: cpu or cuda.

    UserError if a machine has fewer GPUs than processes.
    """
    world_size, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    if world_size == 1:
        yield DistributedContext(device=device)
        return
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(
                f"torchrun started process {local} (counted from 0) on a machine with {torch.cuda.device_count()} "
                "GPUs. Start one process per GPU (--nproc-per-node)."
            )
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    store, rank = join_store()
    compare_start(store, rank, world_size, {"device": device.split(":")[0]})
    backend = "cpu:gloo,cuda:nccl" if device != "cpu" else "gloo"
    distributed.init_process_group(
        backend, timeout=TIMEOUT, store=distributed.PrefixStore("ranks", store), rank=rank, world_size=world_size
    )
    try:
        yield DistributedContext(rank, world_size, device)
    finally:
        distributed.destroy_process_group()


def join_store() -> tuple[distributed.Store, int]:
    """(key-value store of all ranks of this run, own rank), as torchrun's variables describe them."""
    store, rank, _ = next(distributed.rendezvous("env://", timeout=TIMEOUT))
    return store, rank


@contextmanager
def failure_announced():
    """An error inside the block, before the process group exists, also stops the other ranks, which would wait for this
    one."""
    try:
        yield
    except UserError as error:
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        if world_size > 1:
            store, rank = join_store()
            with suppress(UserError):
                compare_start(store, rank, world_size, {"error": str(error)})
        raise


def compare_start(store: distributed.Store, rank: int, world_size: int, own: dict[str, str]) -> None:
    """UserError if a rank has failed, or runs on another kind of device: its collectives would wait for the others'.

    own: {"device": cpu or cuda} or {"error": message} of this rank.
    """
    store.set(f"start/{rank}", json.dumps(own))
    found = [json.loads(store.get(f"start/{other}")) for other in range(world_size)]
    if all(entry == {"device": found[0].get("device")} for entry in found):
        return
    num_read, deadline = store.add("start/read", 1), time.monotonic() + 10
    while rank == 0 and num_read < world_size and time.monotonic() < deadline:
        time.sleep(0.01)  # without torchrun rank 0 serves the store, so the others must have read it
        num_read = store.add("start/read", 0)
    failed = [f"rank {number}: {entry['error']}" for number, entry in enumerate(found) if "error" in entry]
    if failed:
        raise UserError(f"rank {rank} stops because another rank failed. {' '.join(failed)}")
    listing = ", ".join(f"rank {number}: {entry['device']}" for number, entry in enumerate(found))
    raise UserError(f"training.common.device: the ranks run on different devices ({listing}). Set the same one.")


def wrap(model: TrainingModel, group: DistributedContext, sharded: bool) -> nn.Module:
    """The module to call in a training step: the model itself (one process), in DDP, or sharded in place.

    sharded: shard weights, gradients and optimizer state of every layer among the ranks and gather a layer's weights
    while it runs (Zhao et al. 2023, "PyTorch FSDP"; torch's `fully_shard`).
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
    # unused: vision weights in a text-only micro-batch, the planner in coarse mode
    return DistributedDataParallel(
        model, device_ids=device_ids, find_unused_parameters=True, gradient_as_bucket_view=True
    )


def without_sync(wrapped: nn.Module, last: bool):
    """Context of one micro-batch: DDP reduces gradients only in the `last` one of a step."""
    if isinstance(wrapped, DistributedDataParallel) and not last:
        return wrapped.no_sync()
    return nullcontext()
