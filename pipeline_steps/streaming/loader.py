"""The batches of a run, in order, prepared in the background: a state of a few numbers, and nothing lost silently."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial

import numpy as np

from pipeline_steps.common.errors import UserError
from pipeline_steps.streaming.batch import Batch
from pipeline_steps.streaming.collate import Collator
from pipeline_steps.streaming.dataset import Raw, TokenizedShards, UnreadableSample
from pipeline_steps.streaming.mixture import Groups, Mixture, make_groups, order_seed
from pipeline_steps.streaming.plan import Plan, make_plan
from pipeline_steps.streaming.prefetch import ordered
from pipeline_steps.streaming.remote import copy_index
from pipeline_steps.streaming.webdataset_reader import Stream, StreamedMixture, StreamedShards

MEGABYTE = 2**20
MAX_NAMED = 10  # samples in an error message


@dataclass(frozen=True)
class StagePlan:
    """What a training stage serves, and in which batches."""

    plan: Plan
    mixture: Mixture
    groups: Groups


class Loader:
    """Iterates over the batches of a `StagePlan`: those of one of `world_size` ranks, from the state's step to the end.

    A sample whose frames cannot be read or decoded is left out of its batch, told once on stderr, and counted in
    `quarantined`; UserError when these are more than the share `streaming.max_quarantined` of this rank's samples, or
    when a batch has no other ones.
    """

    def __init__(
        self, dataset, served: StagePlan, collate: Collator, streaming, runtime, *, rank: int = 0, world_size: int = 1
    ):
        """`streaming`, `runtime`: these sections of the parameters."""
        served.plan.check_ranks(world_size)
        self.dataset, self.plan, self.mixture = dataset, served.plan, served.mixture
        self.collate, self.streaming, self.runtime = collate, streaming, runtime
        self.rank, self.world_size = rank, world_size
        self.step = 0  # the next one
        self.quarantined: dict[str, dict] = {}  # key -> reason, times (how often it was left out)

    @property
    def num_steps(self) -> int:
        return self.plan.num_steps

    def samples_seen(self, num_steps: int) -> int:
        """Samples of all ranks in the first `num_steps` steps."""
        return self.plan.samples_seen(num_steps)

    def __iter__(self) -> Iterator[Batch]:
        with ExitStack() as stack:
            fetch = None
            if self.dataset.sequential:
                place = sum(len(self._items(step)) for step in range(self.step))
                stream = stack.enter_context(closing(Stream(self.dataset, self.mixture, self.rank, place)))
                fetch = partial(self._fetch, stream)
            batches = ordered(
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
                    keys = ", ".join(error.key for error in unreadable[:MAX_NAMED])
                    raise UserError(f"step {self.step + 1}: no sample of the batch can be read ({keys}). {REPAIR}")
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
        """The batch of a step, or of what `_fetch` gave for it, and the errors of the samples that it lacks."""
        items, unreadable = [], []
        for entry in job if isinstance(job, list) else self._items(job).tolist():
            try:
                items.append(self._item(entry))
            except UnreadableSample as error:
                unreadable.append(error)
        return (self.collate(items) if items else None), unreadable

    def _item(self, entry: int | Raw | UnreadableSample) -> dict:
        """An item by its number, or of what a stream has read."""
        if isinstance(entry, UnreadableSample):
            raise entry
        return self.dataset.make(entry) if isinstance(entry, Raw) else self.dataset[entry]

    def _quarantine(self, unreadable: list[UnreadableSample]) -> None:
        for error in unreadable:
            if error.key not in self.quarantined:
                print(f"left out: sample '{error.key}': {error.reason}", file=sys.stderr)
            entry = self.quarantined.setdefault(error.key, {"reason": error.reason, "times": 0})
            entry["times"] += 1
        served = self.plan.num_samples / self.world_size
        if unreadable and self.num_quarantined > self.streaming.max_quarantined * served:
            listing = "\n".join(
                f"  {key}: {entry['reason']}" for key, entry in list(self.quarantined.items())[:MAX_NAMED]
            )
            more = len(self.quarantined) - MAX_NAMED
            raise UserError(
                f"step {self.step + 1}: {self.num_quarantined} sample(s) could not be read, more than "
                f"streaming.max_quarantined allows of {served:,.0f} ({self.streaming.max_quarantined:.3%}):\n{listing}"
                + (f"\n  ... and {more} more" if more > 0 else "")
                + f"\n{REPAIR}"
            )

    @property
    def num_quarantined(self) -> int:
        """How often a sample was left out."""
        return sum(entry["times"] for entry in self.quarantined.values())

    def state_dict(self) -> dict:
        """What `load_state_dict` needs to go on after the last batch that was handed out: plain numbers and texts."""
        return {
            "step": self.step,
            "samples": self.samples_seen(self.step),
            "quarantined": {key: dict(entry) for key, entry in self.quarantined.items()},
            "plan": self.plan.fingerprint,
            "data": self.dataset.fingerprint,
        }

    def load_state_dict(self, state: dict) -> None:
        """UserError when the state belongs to another order of samples, or to other data."""
        for name, own in (("plan", self.plan.fingerprint), ("data", self.dataset.fingerprint)):
            if state[name] != own:
                raise UserError(
                    f"the saved state has read {state['samples']:,} samples of another {name} ({state[name]}, now "
                    f"{own}): the data, the mixture, the batching, the seed or the number of samples has changed. "
                    "Go back to those, or remove the state to begin anew."
                )
        self.step = state["step"]
        self.quarantined = {key: dict(entry) for key, entry in state["quarantined"].items()}


REPAIR = "Rebuild the shards (`dvc repro shards`), or raise streaming.max_quarantined."


def plan_stage(
    dataset, settings, streaming, *, stage: str, seed: int, batch_size: int, tokens_per_frame: int, world_size: int = 1
) -> StagePlan:
    """The plan of a training stage (`settings`: training.<stage>) on a `TokenizedShards`. It is the same for any
    number of ranks, but not for streamed shards. UserError where the data lack what the mixture asks for, or a sample
    is larger than a batch may be."""
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
    """UserError for batches that need another order than that of the streams."""
    if batching.bucket_samples:
        raise UserError(
            f"streaming.batching.bucket_samples is {batching.bucket_samples}, but the reader webdataset reads in one "
            "order only: set it to 0, or read local shards (streaming.reader: local)."
        )
    if batching.by != "samples" and world_size > 1:
        raise UserError(
            f"streaming.batching.by is {batching.by}, but with the reader webdataset {world_size} ranks can share "
            "batches by samples only: set it to samples, or read local shards (streaming.reader: local)."
        )


def open_training_split(config, streaming, runtime, shards_dir, tokens_dir) -> TokenizedShards:
    """The split `train` that section `streaming` names. UserError when it does not fit the FoveatedVLMConfig."""
    if streaming.reader == "local":
        return TokenizedShards.for_model(config, shards_dir, tokens_dir, "train", streaming.image_replication)
    copy = copy_index(streaming.url, "train", runtime.retries)
    return StreamedShards.for_model(
        config,
        copy / "shards",
        copy / "tokens",
        "train",
        streaming.image_replication,
        url=streaming.url,
        retries=runtime.retries,
    )
