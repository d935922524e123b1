"""Sequential reading of remote shards, with the interface of `TokenizedShards`.

Every group of the mixture reads its own sequence of shards, which is divided among the ranks, through a shuffle buffer
of `shuffle_samples`. In every epoch of a group each of its items is served once, by one rank; a shard in which the
share of one rank ends and that of the next begins is read by both. The order is computed from the sidecars in advance,
so batches, counts and states work as for local shards, but it depends on the number of ranks.
"""

from collections.abc import Iterator
from functools import cached_property

import numpy as np

from pipeline_steps.common.errors import UserError
from pipeline_steps.streaming import remote
from pipeline_steps.streaming.dataset import RawItem, TokenizedShards, UnreadableSample
from pipeline_steps.streaming.mixture import Groups, Mixture, interleave
from pipeline_steps.streaming.transfer import Transfers

SHARDS, ITEMS = 1, 2  # separate the random streams of this reader from other random streams


class StreamedShards(TokenizedShards):
    """The items of one split of the data set at `url`. Training reads frames sequentially, through a `Stream`."""

    sequential = True

    def __init__(self, *directories, url: str, retries: int, transfers: Transfers | None = None, **options):
        super().__init__(*directories, with_frames=False, **options)
        self.url, self.retries, self.transfers = url, retries, transfers or Transfers()

    @cached_property
    def shard_of(self) -> np.ndarray:
        """int32 [n]: index of every item's shard in `shards`."""
        return np.repeat(np.array(self._shard_of, np.int32), [batch.num_rows for batch in self.rows.batches])

    def numbers_of(self, shard: int) -> dict[str, list[int]]:
        """Return {key: item numbers} of the samples of a shard."""
        numbers: dict[str, list[int]] = {}
        for own, start, batch in zip(self._shard_of, self.rows.starts, self.rows.batches, strict=False):
            for row, key in enumerate(batch.column("key").to_pylist() if own == shard else ()):
                numbers.setdefault(key, []).append(int(start) + row)
        return numbers

    def raw(self, number: int, members: dict[str, bytes]) -> RawItem:
        """Make an item from the members of its sample. Raises UnreadableSample if a frame is missing."""
        row = self.rows[number]
        count, single = row["num_frames"], row["kind"] == "image" and row["num_frames"] == 1
        names = ["jpg"] if single else [f"{frame:03d}.jpg" for frame in range(count)]
        absent = [name for name in names if name not in members]
        if absent:
            raise UnreadableSample(self.url, row["key"], f"{absent[0]} is not in its shard")
        return RawItem(row, [members[name] for name in names], members.get("json"))

    def read(self, number: int) -> RawItem:
        """Read one item. This reads its whole shard, so use it for a few items only."""
        samples = self.read_shard(self.shard_number(number), {self.rows[number]["key"]})
        return self.raw(number, next(samples))

    def read_shard(self, shard: int, keys: set[str]) -> Iterator[dict]:
        """Yield the samples of a shard with these keys (remote.read_shard)."""
        entry = self.shards[shard]
        path = f"shards/{self.split}/{entry.name}"
        return remote.read_shard(self.url, path, keys, entry.sha256, self.retries, self.transfers)


class StreamedMixture(Mixture):
    """A mixture for sequential reading: each of `world_size` ranks interleaves its own streams of all groups.

    Rank r gets every world_size-th sample of a batch of `batch_size`, starting at r. Raises UserError if a group has
    fewer shards than ranks.
    """

    def __init__(
        self,
        groups: Groups,
        num_samples: int,
        seed: int,
        *,
        shard_of: np.ndarray,
        shuffle_samples: int,
        batch_size: int,
        world_size: int,
    ):
        super().__init__(groups.items, groups.weights, num_samples, seed)
        self.shard_of, self.shuffle_samples, self.world_size = shard_of, shuffle_samples, world_size
        self.rank_of = np.arange(num_samples) % batch_size % world_size  # rank of every position
        weights = np.array([groups.weights[name] for name in self.names], float)
        for rank in range(world_size):
            mine = self.rank_of == rank
            self.group_of[mine] = interleave(weights, int(mine.sum()))[0]

    @cached_property
    def order(self) -> np.ndarray:
        order = np.empty(self.num_samples, np.int64)
        for group, counts in enumerate(self.epoch_counts):
            for rank in range(self.world_size):
                places = np.flatnonzero((self.rank_of == rank) & (self.group_of == group))
                served = [self.stream_epoch(group, epoch, rank)[0][: own[rank]] for epoch, own in enumerate(counts)]
                order[places] = np.concatenate([*served, np.zeros(0, np.int64)])
        return order

    @cached_property
    def epoch_counts(self) -> list[np.ndarray]:
        """For every group, the number of its items that each rank serves in each epoch: int64 [epochs, ranks]. All of
        the group's items, except in the last epoch."""
        counts = []
        for group, name in enumerate(self.names):
            ranks = self.rank_of[self.group_of == group]
            epochs = np.arange(len(ranks)) // len(self.groups[name])
            total = int(epochs[-1]) + 1 if len(ranks) else 0
            cells = np.bincount(epochs * self.world_size + ranks, minlength=total * self.world_size)
            counts.append(cells.reshape(total, self.world_size))
        return counts

    def stream_epoch(self, group: int, epoch: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (items of a group in the order of one epoch, shards in reading order) of one rank.

        Shuffling moves an item by fewer than `shuffle_samples` positions.
        """
        items = self.groups[self.names[group]]
        shards = np.unique(self.shard_of[items])
        if len(shards) < self.world_size:
            raise UserError(
                f"'{self.names[group]}' is in {len(shards)} shard(s), fewer than {self.world_size} ranks, but the "
                "reader webdataset divides shards among ranks. Pack smaller shards (shards.samples_per_shard), "
                "use fewer ranks, or read local shards (streaming.reader: local)."
            )
        drawn = np.random.default_rng([self.seed, group, epoch, SHARDS]).permutation(shards)
        place = np.full(int(shards[-1]) + 1, -1)
        place[drawn] = np.arange(len(drawn))
        places = place[self.shard_of[items]]
        ordered = items[np.argsort(places, kind="stable")]
        bounds = self._shares(group, epoch, np.cumsum(np.bincount(places)))
        own = ordered[bounds[rank] : bounds[rank + 1]]
        mine = drawn[np.unique(place[self.shard_of[own]])]
        random = np.random.default_rng([self.seed, group, epoch, ITEMS, rank])
        return own[np.argsort(np.arange(len(own)) + random.uniform(0, self.shuffle_samples, len(own)))], mine

    def _shares(self, group: int, epoch: int, ends: np.ndarray) -> list[int]:
        """Return the bounds of the ranks' shares of a group's items in reading order: [ranks + 1].

        A share has as many items as its rank serves. If the epoch is not served to its end, shares are larger and begin
        at shards where possible. ends: of the shards in the reading order, in items.
        """
        counts, total, bounds = self.epoch_counts[group][epoch], int(ends[-1]), [0]
        for rank in range(1, self.world_size):
            even = rank * total // self.world_size
            start = int(ends[np.searchsorted(ends, even)])
            bounds.append(min(max(start, bounds[-1] + int(counts[rank - 1])), total - int(counts[rank:].sum())))
        return [*bounds, total]


class Stream:
    """Reads the items of a rank in the order of a `StreamedMixture`, starting at the rank's position `place`."""

    def __init__(self, dataset: StreamedShards, mixture: StreamedMixture, rank: int, place: int):
        self.place, self.group_of = place, mixture.group_of[mixture.rank_of == rank]
        served = np.bincount(self.group_of[:place], minlength=len(mixture.names))
        self.readers = [_Reader(dataset, mixture, group, rank, int(count)) for group, count in enumerate(served)]

    def read(self, number: int) -> RawItem | UnreadableSample:
        """Return the next item, which must be `number`, or the error of its sample; the stream continues."""
        reader = self.readers[self.group_of[self.place]]
        self.place += 1
        return reader.read(number)

    def close(self) -> None:
        """Close the connections."""
        for reader in self.readers:
            reader.samples.close()


class _Reader:
    """The stream of one group."""

    def __init__(self, dataset: StreamedShards, mixture: StreamedMixture, group: int, rank: int, served: int):
        self.dataset, self.mixture, self.group, self.rank = dataset, mixture, group, rank
        self.epoch, self.skipped = 0, served  # items to skip in this epoch
        self.pending: dict[int, dict] = {}  # members of samples that were read but not requested yet
        self.left = 0  # items left in this epoch
        self.samples: Iterator[dict] = _nothing()

    def read(self, number: int) -> RawItem | UnreadableSample:
        while not self.left:
            self._begin()
        while number not in self.pending:
            self._advance()
        self.left -= 1
        try:
            return self.dataset.raw(number, self.pending.pop(number))
        except UnreadableSample as error:
            return error

    def _begin(self) -> None:
        """Start the next epoch, or skip it if all of it was read before the resume."""
        items, shards = self.mixture.stream_epoch(self.group, self.epoch, self.rank)
        self.epoch += 1
        wanted = items[self.skipped :]
        self.skipped, self.left = max(self.skipped - len(items), 0), len(wanted)
        if self.left:
            self.samples.close()
            self.samples = self._samples(set(wanted.tolist()), shards)

    def _samples(self, wanted: set[int], shards: np.ndarray) -> Iterator[dict]:
        """Yield the samples of the wanted items, each with its items' `numbers`."""
        for shard in shards.tolist():
            numbers = {
                key: own
                for key, all_of_it in self.dataset.numbers_of(shard).items()
                if (own := [number for number in all_of_it if number in wanted])
            }
            if numbers:
                for sample in self.dataset.read_shard(shard, set(numbers)):
                    yield {**sample, "numbers": numbers[sample["__key__"]]}

    def _advance(self) -> None:
        sample = next(self.samples)
        for number in sample["numbers"]:
            self.pending[number] = sample


def _nothing() -> Iterator[dict]:
    yield from ()
