"""The data loader: prefetches the batches of a run in order, resumes exactly, and counts unreadable samples."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial

import numpy as np

from pipeline_steps.common.errors import UserError, listing, printable
from pipeline_steps.streaming.batch import Batch
from pipeline_steps.streaming.collate import Collator
from pipeline_steps.streaming.dataset import RawItem, TokenizedShards, UnreadableSample
from pipeline_steps.streaming.mixture import Groups, Mixture, make_groups, order_seed
from pipeline_steps.streaming.plan import Plan, make_plan
from pipeline_steps.streaming.prefetch import map_ordered
from pipeline_steps.streaming.remote import download_index
from pipeline_steps.streaming.transfer import Transfers
from pipeline_steps.streaming.webdataset_reader import Stream, StreamedMixture, StreamedShards

MEGABYTE = 2**20
MAX_LISTED = 10  # samples in an error message


@dataclass(frozen=True)
class StagePlan:
    """The batches of a training stage, and the mixture they are drawn from."""

    plan: Plan
    mixture: Mixture
    groups: Groups


class Loader:
    """Iterates over the batches of a `StagePlan` for one of `world_size` ranks, from `step` to the end.

    A sample whose frames cannot be read or decoded is skipped, reported once on stderr and counted in `quarantined`.
    Raises UserError if they are more than `streaming.max_quarantined` allows of the samples of all ranks, if a batch
    has no readable sample, or for the first one with `lockstep`.
    """

    def __init__(
        self,
        dataset,
        served: StagePlan,
        collate: Collator,
        streaming,
        runtime,
        *,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
        lockstep: bool = False,
    ):
        """Raises UserError if a step has fewer samples than ranks. streaming, runtime: sections of the parameters.
        pin_memory: put batches into pinned memory, for a GPU. lockstep: all ranks need the planned samples (FSDP)."""
        served.plan.check_ranks(world_size)
        self.dataset, self.plan, self.mixture = dataset, served.plan, served.mixture
        self.collate, self.streaming, self.runtime = collate, streaming, runtime
        self.rank, self.world_size, self.pin_memory, self.lockstep = rank, world_size, pin_memory, lockstep
        self.step = 0  # the next step
        self.quarantined: dict[str, dict] = {}  # key -> reason, times (how often it was skipped)

    @property
    def num_steps(self) -> int:
        return self.plan.num_steps

    def samples_seen(self, num_steps: int) -> int:
        """Return the number of samples of all ranks in the first `num_steps` steps."""
        return self.plan.samples_seen(num_steps)

    def __iter__(self) -> Iterator[Batch]:
        with ExitStack() as stack:
            fetch = None
            if self.dataset.sequential:
                place = sum(len(self._items(step)) for step in range(self.step))
                stream = stack.enter_context(closing(Stream(self.dataset, self.mixture, self.rank, place)))
                fetch = partial(self._fetch, stream)
            batches = map_ordered(
                self._make,
                range(self.step, self.num_steps),
                num_workers=self.runtime.num_workers,
                size_of=self._bytes,
                limit=self.runtime.prefetch_megabytes * MEGABYTE,
                fetch=fetch,
            )
            for batch, unreadable in stack.enter_context(closing(batches)):
                self._quarantine(unreadable)
                if batch is None:
                    keys = ", ".join(error.key for error in unreadable[:MAX_LISTED])
                    raise UserError(f"step {self.step + 1}: no sample of the batch is readable ({keys}). {REPAIR}")
                self.step += 1
                yield batch

    def _items(self, step: int) -> np.ndarray:
        return self.plan.items(step, self.rank, self.world_size)

    def _bytes(self, step: int) -> int:
        return self.dataset.batch_bytes(
            self._items(step), self.streaming.image_replication, self.collate.tokens_per_frame
        )

    def _fetch(self, stream: Stream, step: int) -> list:
        return [stream.read(number) for number in self._items(step).tolist()]

    def _make(self, job: int | list) -> tuple[Batch | None, list[UnreadableSample]]:
        """Make the batch of a step or of the items that `_fetch` read. Returns (batch, errors of skipped samples)."""
        items, unreadable = [], []
        for entry in job if isinstance(job, list) else self._items(job).tolist():
            try:
                items.append(self._item(entry))
            except UnreadableSample as error:
                unreadable.append(error)
        if not items:
            return None, unreadable
        batch = self.collate(items)
        return (batch.pin_memory() if self.pin_memory else batch), unreadable

    def _item(self, entry: int | RawItem | UnreadableSample) -> dict:
        """Return an item, given its number or what a stream read."""
        if isinstance(entry, UnreadableSample):
            raise entry
        return self.dataset.decode_item(entry) if isinstance(entry, RawItem) else self.dataset[entry]

    def _quarantine(self, unreadable: list[UnreadableSample]) -> None:
        for error in unreadable:
            if self.lockstep:
                raise UserError(
                    f"step {self.step + 1}: sample '{error.key}' is unreadable ({error.reason}). FSDP ranks run in "
                    "lockstep, so none can skip a sample. Rebuild the shards (`dvc repro shards`), or set "
                    "training.common.sharding to ddp."
                )
            if error.key not in self.quarantined:
                print(printable(f"skipped sample '{error.key}': {error.reason}"), file=sys.stderr)
            entry = self.quarantined.setdefault(error.key, {"reason": error.reason, "times": 0})
            entry["times"] += 1
        if unreadable:
            self.check_quarantined(self.quarantined)

    def check_quarantined(self, quarantined: dict[str, dict]) -> None:
        """Raise UserError if the share of skipped samples exceeds `streaming.max_quarantined`.

        quarantined: those of this rank, checked at once, or of all ranks, checked before a state is saved.
        """
        skipped, limit = sum(entry["times"] for entry in quarantined.values()), self.streaming.max_quarantined
        if skipped <= limit * self.plan.num_samples:
            return
        first = [f"{key}: {entry['reason']}" for key, entry in list(quarantined.items())[:MAX_LISTED]]
        raise UserError(
            f"step {self.step + 1}: {skipped} of {self.plan.num_samples:,} sample(s) are unreadable, more than "
            f"streaming.max_quarantined allows ({limit:.3%}):\n{listing(first, len(quarantined))}\n{REPAIR}"
        )

    def state_dict(self) -> dict:
        """Return the state to resume after the last yielded batch: plain numbers and strings."""
        return {
            "step": self.step,
            "samples": self.samples_seen(self.step),
            "quarantined": {key: dict(entry) for key, entry in self.quarantined.items()},
            "plan": self.plan.fingerprint,
            "data": self.dataset.fingerprint,
        }

    def load_state_dict(self, state: dict) -> None:
        """Resume from a state. Raises UserError if it belongs to another order of samples or to other data."""
        for name, own in (("plan", self.plan.fingerprint), ("data", self.dataset.fingerprint)):
            if state[name] != own:
                raise UserError(
                    f"the checkpoint has read {state['samples']:,} samples of another {name} ({state[name]}, now "
                    f"{own}): the data, the mixture, the batching, the seed or the number of samples has changed. "
                    "Restore them, or delete the checkpoint to start over."
                )
        self.step = state["step"]
        self.quarantined = {key: dict(entry) for key, entry in state["quarantined"].items()}


REPAIR = "Rebuild the shards (`dvc repro shards`), or raise streaming.max_quarantined."


def plan_stage(
    dataset, settings, streaming, *, stage: str, seed: int, batch_size: int, tokens_per_frame: int, world_size: int = 1
) -> StagePlan:
    """Plan the batches of a training stage on a `TokenizedShards`. settings: section training.<stage>.

    The plan does not depend on `world_size`, except for streamed shards. Raises UserError if the data lack items that
    the mixture asks for, or if a sample exceeds the budget of a batch.
    """
    groups, seed = make_groups(dataset, settings), order_seed(seed, stage)
    if dataset.sequential:
        _check_streamed(streaming.batching, world_size)
        mixture = StreamedMixture(
            groups,
            settings.num_samples,
            seed,
            shard_of=dataset.shard_of,
            shuffle_samples=streaming.shuffle_samples,
            batch_size=batch_size,
            world_size=world_size,
        )
    else:
        mixture = Mixture(groups.items, groups.weights, settings.num_samples, seed)
    sizes = {"batch_size": batch_size, "tokens_per_frame": tokens_per_frame}
    return StagePlan(make_plan(mixture.order, dataset, streaming, **sizes, seed=seed), mixture, groups)


def _check_streamed(batching, world_size: int) -> None:
    """Raise UserError for batching options that sequential reading does not support."""
    if batching.bucket_samples:
        raise UserError(
            f"streaming.batching.bucket_samples is {batching.bucket_samples}, but the reader webdataset reads "
            "sequentially. Set it to 0, or read local shards (streaming.reader: local)."
        )
    if batching.by != "samples" and world_size > 1:
        raise UserError(
            f"streaming.batching.by is {batching.by}, but with the reader webdataset {world_size} ranks need "
            "batches of samples. Set it to samples, or read local shards (streaming.reader: local)."
        )


def open_training_split(config, streaming, runtime, shards_dir, tokens_dir) -> TokenizedShards:
    """Open the split `train`, local or remote (section `streaming`). Raises UserError if it does not fit the config."""
    if streaming.reader == "local":
        return TokenizedShards.for_model(config, shards_dir, tokens_dir, "train", streaming.image_replication)
    transfers = Transfers()
    copy = download_index(streaming.url, "train", runtime.retries, transfers)
    return StreamedShards.for_model(
        config,
        copy / "shards",
        copy / "tokens",
        "train",
        streaming.image_replication,
        url=streaming.url,
        retries=runtime.retries,
        transfers=transfers,
    )
