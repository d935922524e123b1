"""All batches of a run, computed before it starts, so the number of steps and the samples seen at each are exact.

Each optimizer step has one global batch, which the ranks share. The plan is the same for any number of ranks.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pipeline_steps.common.errors import UserError

BUCKETS = 3  # separates the random stream of bucketing from those of other orders


@dataclass(frozen=True)
class Plan:
    """Step s of a run reads the items order[starts[s]:starts[s + 1]]."""

    order: np.ndarray  # int64 [num_samples], item numbers
    starts: np.ndarray  # int64 [num_steps + 1]

    @property
    def num_steps(self) -> int:
        return len(self.starts) - 1

    @property
    def num_samples(self) -> int:
        return len(self.order)

    def items(self, step: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """int64: the items of a step, or one rank's share of them: every world_size-th, from `rank` on."""
        return self.order[self.starts[step] : self.starts[step + 1]][rank::world_size]

    def samples_seen(self, num_steps: int) -> int:
        """Samples read in the first `num_steps` steps: the clock of the learning rate."""
        return int(self.starts[num_steps])

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of the order and of the batches."""
        digest = hashlib.sha256(self.order.astype("<i8").tobytes())
        digest.update(self.starts.astype("<i8").tobytes())
        return digest.hexdigest()[:16]

    def check_ranks(self, world_size: int) -> None:
        """UserError if a step has fewer samples than there are ranks."""
        sizes = np.diff(self.starts)
        short = np.flatnonzero(sizes < world_size)
        if len(short):
            raise UserError(
                f"step {short[0] + 1} of {self.num_steps} has {sizes[short[0]]} sample(s) for {world_size} ranks "
                f"({len(short)} such step(s)). Take fewer ranks, larger batches (training.common.batch_size, "
                "streaming.batching), or a num_samples that leaves no short batch."
            )


def make_plan(order: np.ndarray, dataset, streaming, *, batch_size: int, tokens_per_frame: int, seed: int) -> Plan:
    """The batches of the items `order` of a `TokenizedShards`, by section `streaming`.

    Batches have `batch_size` samples, or as many as fit into `batching.budget` frames or tokens, in this order. With
    `bucket_samples` they are made of as many samples at a time, sorted by length, and shuffled: within such a window
    every sample is still read exactly once. UserError when one sample alone exceeds the budget.
    """
    batching = streaming.batching
    columns = dataset.index.take(order)
    frames = columns.shown_frames(streaming.image_replication)
    tokens = columns.num_tokens + frames * tokens_per_frame
    if batching.by == "samples":
        costs, budget = np.ones(len(order), np.int64), batch_size
    else:  # a text-only sample counts as one frame, so that no batch is endless
        costs, budget = np.maximum(frames, 1) if batching.by == "frames" else tokens, batching.budget
    _check_costs(costs, budget, batching.by, order, dataset)
    if not batching.bucket_samples:
        return Plan(order, cut(costs, budget))
    places, starts = _buckets(tokens, costs, budget, batching.bucket_samples, seed)
    return Plan(order[places], starts)


def _check_costs(costs: np.ndarray, budget: int, unit: str, order: np.ndarray, dataset) -> None:
    if len(costs) and costs.max() > budget:
        most = int(costs.argmax())
        raise UserError(
            f"{dataset.tokens_dir}/{dataset.split}: sample '{dataset.rows[int(order[most])]['key']}' has "
            f"{costs[most]:,} {unit}, but streaming.batching.budget allows {budget:,} in a batch. Raise the budget to "
            f"at least {costs[most]:,}."
        )


def cut(costs: np.ndarray, budget: int) -> np.ndarray:
    """Bounds of batches that each take as many samples as fit into `budget`, in order: int64 [batches + 1]."""
    if len(costs) and costs.min() == costs.max():  # such as samples: no need to go one by one
        return np.append(np.arange(0, len(costs), budget // int(costs[0])), len(costs)).astype(np.int64)
    total = np.concatenate([[0], np.cumsum(costs, dtype=np.int64)])
    starts = [0]
    while starts[-1] < len(costs):
        starts.append(int(np.searchsorted(total, total[starts[-1]] + budget, side="right")) - 1)
    return np.array(starts, np.int64)


def _buckets(
    lengths: np.ndarray, costs: np.ndarray, budget: int, window: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Places in the order [n] and the bounds of batches: window by window sorted by length, cut, and shuffled."""
    places, sizes = [], []
    for number, start in enumerate(range(0, len(lengths), window)):
        by_length = start + np.argsort(lengths[start : start + window], kind="stable")
        bounds = cut(costs[by_length], budget)
        for batch in np.random.default_rng([seed, 0, number, BUCKETS]).permutation(len(bounds) - 1):
            places.append(by_length[bounds[batch] : bounds[batch + 1]])
            sizes.append(len(places[-1]))
    return np.concatenate(places), np.concatenate([[0], np.cumsum(sizes)])
