"""Which item is served at which position: a function of (seed, position) alone.

Every family has its own permutation per epoch of the family; families are interleaved in exact proportion to their
weights. The order does not depend on workers or restarts, so the state of a reader is one number, the position.
"""

import numpy as np


class Mixture:
    """Positions 0..num_samples-1 of a run.

    groups: name -> item numbers; weights: name -> positive weight (normalised here). No item of a group is served
    twice before all of them were served once. Raises ValueError for an empty group.
    """

    def __init__(self, groups: dict[str, list[int]], weights: dict[str, float], num_samples: int, seed: int):
        empty = [name for name in weights if not groups.get(name)]
        if empty:
            raise ValueError(f"no items of {', '.join(empty)}; there are {', '.join(sorted(groups))}")
        self.groups = {name: np.asarray(groups[name]) for name in weights}
        self.names, self.seed, self.num_samples = list(weights), seed, num_samples
        self.group_of, self.rank_of = interleave(np.array([weights[name] for name in self.names], float), num_samples)
        self._permutations: dict[tuple[int, int], np.ndarray] = {}

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, position: int) -> int:
        """The number of the item at a position."""
        group, rank = int(self.group_of[position]), int(self.rank_of[position])
        items = self.groups[self.names[group]]
        epoch, place = divmod(rank, len(items))
        return int(items[self._permutation(group, epoch)[place]])

    def _permutation(self, group: int, epoch: int) -> np.ndarray:
        if (group, epoch) not in self._permutations:
            self._permutations = {known: order for known, order in self._permutations.items() if known[0] != group}
            rng = np.random.default_rng([self.seed, group, epoch])
            self._permutations[group, epoch] = rng.permutation(len(self.groups[self.names[group]]))
        return self._permutations[group, epoch]

    def statistics(self) -> dict[str, dict[str, float]]:
        """What the run serves of every group: samples, share and epochs."""
        counts = np.bincount(self.group_of, minlength=len(self.names))
        return {
            name: {
                "num_samples": int(count),
                "share": round(float(count / self.num_samples), 6),
                "epochs": round(float(count / len(self.groups[name])), 4),
            }
            for name, count in zip(self.names, counts, strict=True)
        }


def interleave(weights: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Group and rank within its group of every position: int64 [length] each.

    The k-th sample of a group with share w is due at (k + 1/2) / w; positions are filled in order of that time. So the
    count of a group over any window differs from its share of the window by a few samples at most, whatever the number
    of groups.
    """
    shares = weights / weights.sum()
    counts = np.ceil(shares * length).astype(int) + 1
    groups = np.repeat(np.arange(len(shares)), counts)
    ranks = np.concatenate([np.arange(count) for count in counts])
    order = np.argsort((ranks + 0.5) / shares[groups], kind="stable")[:length]
    return groups[order], ranks[order]
