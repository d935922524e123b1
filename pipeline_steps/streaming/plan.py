"""All batches of a run, computed in advance, so that the number of steps and the samples seen at each step are exact.

Each optimizer step has one global batch, divided among the ranks. The plan does not depend on the number of ranks.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pipeline_steps.common.errors import UserError

BUCKETS = 3  # separates the random stream of bucketing from other random streams


@dataclass(frozen=True)
class Plan:
    """Step s of a run reads the items order[starts[s]:starts[s + 1]]."""

    order: np.ndarray  # int64 [num_samples], item numbers
    starts: np.ndarray  # int64 [num_steps + 1]
    by_budget: bool = False  # whether the number of samples per step varies with their lengths

    @property
    def num_steps(self) -> int:
        return len(self.starts) - 1

    @property
    def num_samples(self) -> int:
        return len(self.order)

    def items(self, step: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """Return the item numbers of a step for one rank, int64: every world_size-th, starting at `rank`."""
        return self.order[self.starts[step] : self.starts[step + 1]][rank::world_size]

    def samples_seen(self, num_steps: int) -> int:
        """Return the samples read in the first `num_steps` steps; the learning rate schedule depends on it."""
        return int(self.starts[num_steps])

    def step_weight(self, step: int) -> float:
        """Return the factor of a step's gradient with which every sample of the run has the same weight.

        The loss of a step is a mean, so a sample in a batch of few, long ones would count more. With batches of a
        budget the factor is the step's number of samples divided by their mean over the steps; otherwise it is 1.
        """
        if not self.by_budget:
            return 1.0
        return float(self.starts[step + 1] - self.starts[step]) * self.num_steps / self.num_samples

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that identify the order and the batches."""
        digest = hashlib.sha256(self.order.astype("<i8").tobytes())
        digest.update(self.starts.astype("<i8").tobytes())
        return digest.hexdigest()[:16]

    def check_ranks(self, world_size: int) -> None:
        """Raise UserError if a step has fewer samples than ranks."""
        sizes = np.diff(self.starts)
        short = np.flatnonzero(sizes < world_size)
        if len(short):
            raise UserError(
                f"step {short[0] + 1} of {self.num_steps} has {sizes[short[0]]} sample(s) for {world_size} ranks "
                f"({len(short)} such step(s)). Use fewer ranks, larger batches (training.common.batch_size, "
                "streaming.batching), or a num_samples that leaves no short batch."
            )


def make_plan(order: np.ndarray, dataset, streaming, *, batch_size: int, tokens_per_frame: int, seed: int) -> Plan:
    """Divide the items `order` of a `TokenizedShards` into batches according to section `streaming`.

    Batches have `batch_size` samples, or as many as fit into `batching.budget` frames or tokens. With
    `bucket_samples`, each window of that many samples is sorted by length, divided into batches, and the batches are
    shuffled; every sample of a window is still read exactly once. Raises UserError if one sample exceeds the budget.
    """
    batching = streaming.batching
    columns = dataset.index.take(order)
    frames = columns.shown_frames(streaming.image_replication)
    tokens = columns.num_tokens + frames * tokens_per_frame
    if batching.by == "samples":
        costs, budget = np.ones(len(order), np.int64), batch_size
    else:  # a text-only sample counts as one frame, to bound the size of batches
        costs, budget = np.maximum(frames, 1) if batching.by == "frames" else tokens, batching.budget
    _check_costs(costs, budget, batching.by, order, dataset)
    by_budget = batching.by != "samples"
    if not batching.bucket_samples:
        return Plan(order, batch_bounds(costs, budget), by_budget)
    places, starts = _buckets(tokens, costs, budget, batching.bucket_samples, seed)
    return Plan(order[places], starts, by_budget)


def _check_costs(costs: np.ndarray, budget: int, unit: str, order: np.ndarray, dataset) -> None:
    if len(costs) and costs.max() > budget:
        most = int(costs.argmax())
        raise UserError(
            f"{dataset.tokens_dir}/{dataset.split}: sample '{dataset.rows[int(order[most])]['key']}' has "
            f"{costs[most]:,} {unit}, but streaming.batching.budget allows {budget:,} in a batch. Raise the budget to "
            f"at least {costs[most]:,}."
        )


def batch_bounds(costs: np.ndarray, budget: int) -> np.ndarray:
    """Fill batches greedily, in order, up to `budget`. Returns their bounds, int64 [batches + 1]."""
    if len(costs) and costs.min() == costs.max():  # equal costs, as of samples: no search needed
        return np.append(np.arange(0, len(costs), budget // int(costs[0])), len(costs)).astype(np.int64)
    total = np.concatenate([[0], np.cumsum(costs, dtype=np.int64)])
    starts = [0]
    while starts[-1] < len(costs):
        starts.append(int(np.searchsorted(total, total[starts[-1]] + budget, side="right")) - 1)
    return np.array(starts, np.int64)


def _buckets(
    lengths: np.ndarray, costs: np.ndarray, budget: int, window: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Bucket each window by length. Returns positions in the order, int64 [n], and the bounds of batches."""
    places, sizes = [], []
    for number, start in enumerate(range(0, len(lengths), window)):
        by_length = start + np.argsort(lengths[start : start + window], kind="stable")
        bounds = batch_bounds(costs[by_length], budget)
        for batch in np.random.default_rng([seed, 0, number, BUCKETS]).permutation(len(bounds) - 1):
            places.append(by_length[bounds[batch] : bounds[batch + 1]])
            sizes.append(len(places[-1]))
    return np.concatenate(places), np.concatenate([[0], np.cumsum(sizes)])
