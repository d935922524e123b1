"""The order in which a run reads items, determined by the seed, the weights and the data.

Items are divided into groups (one per task or source/task, and one for text-only items). Every group is reshuffled
in each of its epochs; groups are interleaved in exact proportion to their weights. The order does not depend on
workers, ranks or restarts, so the state of a reader is one number, its position.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pipeline_steps.common.errors import UserError

ANY = "*"
TEXT = "text"  # name of the group of text-only items


@dataclass(frozen=True)
class Groups:
    """The groups of items that a training stage samples from."""

    items: dict[str, np.ndarray]  # item numbers (int64, ascending) of every group
    weights: dict[str, float]  # share of the samples
    unmatched: dict[str, int]  # number of items in no group, by 'source/task'


def make_groups(dataset, settings) -> Groups:
    """Divide the items of a `TokenizedShards` by `mixture`, `text_share` and `text_source` of a training stage.

    Each item with frames goes to the most specific matching entry: source and task, then source, then task, then
    neither. Raises UserError for a duplicate entry, an entry without items, or a text share without text-only items.
    """
    index, where = dataset.index, f"{dataset.tokens_dir}/{dataset.split}"
    named = [(entry.source, entry.task) for entry in settings.mixture]
    repeated = [_entry(*name) for name, count in Counter(named).items() if count > 1]
    if repeated:
        raise UserError(f"training mixture: {', '.join(repeated)} is listed more than once. Keep one entry.")
    owner = _owners(index, named)
    absent = [_entry(*name) for number, name in enumerate(named) if not (owner == number).any()]
    if absent:
        seen = np.unique(np.stack([index.source, index.task])[:, ~index.is_text], axis=1).T
        there = ", ".join(_entry(index.sources[source], index.tasks[task]) for source, task in seen)
        raise UserError(
            f"training mixture: no items of {', '.join(absent)} in {where}, which has {there or 'none with frames'} "
            "(each item goes to the most specific matching entry). "
            "Correct the mixture ('*' stands for all) or the sources."
        )
    items, weights = _visual_groups(index, owner, settings.mixture)
    total = sum(weights.values())
    weights = {name: (1 - settings.text_share) * weight / total for name, weight in weights.items()}
    if settings.text_share:
        text = _text(index, settings.text_source)
        if not len(text):
            named = "" if settings.text_source == ANY else f" of the source '{settings.text_source}'"
            raise UserError(
                f"text_share is {settings.text_share} but {where} has 0 text-only samples{named}: "
                "collect some (sources.collect: [..., chat]), set another text_source, or set text_share to 0."
            )
        weights[TEXT], items[TEXT] = settings.text_share, text
    return Groups(items, weights, _unmatched(index, items))


def _entry(source: str, task: str) -> str:
    """Return the name of an entry in messages and statistics."""
    return task if source == ANY else f"{source}/{task}"


def _owners(index, named: list[tuple[str, str]]) -> np.ndarray:
    """Return the index of each item's entry, -1 for text-only and unmatched items: int64 [n]."""
    owner = np.full(len(index), -1)
    for number in sorted(range(len(named)), key=lambda n: (named[n][0] != ANY, named[n][1] != ANY)):
        source, task = named[number]
        match = ~index.is_text
        if source != ANY:
            match &= index.source == _place(index.sources, source)
        if task != ANY:
            match &= index.task == _place(index.tasks, task)
        owner[match] = number
    return owner


def _place(names: tuple[str, ...], name: str) -> int:
    return names.index(name) if name in names else -1


def _visual_groups(index, owner: np.ndarray, mixture) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Return items and unnormalised weights: entries with a task first, then the tasks of each `*` entry by name,
    weighted by their numbers of items. Raises UserError for a task named `text`."""
    items, weights = {}, {}
    for number, entry in sorted(enumerate(mixture), key=lambda pair: pair[1].task == ANY):
        own = np.flatnonzero(owner == number)
        if entry.task != ANY:
            items[_entry(entry.source, entry.task)], weights[_entry(entry.source, entry.task)] = own, entry.weight
            continue
        for task, places in sorted(index.numbers_by(index.task[own], index.tasks).items()):
            name = _entry(entry.source, task)
            items[name], weights[name] = own[places], entry.weight * len(places) / len(own)
    if TEXT in items:
        raise UserError(
            f"training mixture: a task with frames is named '{TEXT}', which is reserved for text-only items. Rename it."
        )
    return items, weights


def _text(index, source: str) -> np.ndarray:
    of_source = source == ANY or index.source == _place(index.sources, source)
    return np.flatnonzero(index.is_text & of_source)


def _unmatched(index, items: dict[str, np.ndarray]) -> dict[str, int]:
    left = np.ones(len(index), bool)
    for numbers in items.values():
        left[numbers] = False
    pairs, counts = np.unique(np.stack([index.source, index.task])[:, left], axis=1, return_counts=True)
    names = [f"{index.sources[source]}/{index.tasks[task]}" for source, task in pairs.T]
    return dict(sorted(zip(names, counts.tolist(), strict=True)))


def order_seed(seed: int, stage: str) -> int:
    """Return the seed of a stage's order."""
    return int(np.random.default_rng([seed, int(stage.removeprefix("stage"))]).integers(2**32))


class Mixture:
    """The item at every position 0..num_samples-1 of a run.

    groups: name -> item numbers; weights: name -> positive weight (normalised here). Every item of a group is served
    once before any is served again. Raises ValueError for an empty group.
    """

    def __init__(self, groups: dict[str, np.ndarray], weights: dict[str, float], num_samples: int, seed: int):
        empty = [name for name in weights if not len(groups.get(name, ()))]
        if empty:
            raise ValueError(f"no items of {', '.join(empty)}; the groups are {', '.join(sorted(groups))}")
        self.groups = {name: np.asarray(groups[name]) for name in weights}
        self.names, self.seed, self.num_samples = list(weights), seed, num_samples
        self.group_of = interleave(np.array([weights[name] for name in self.names], float), num_samples)[0]

    def __len__(self) -> int:
        return self.num_samples

    @cached_property
    def order(self) -> np.ndarray:
        """int64 [num_samples]: item number at every position."""
        order = np.empty(self.num_samples, np.int64)
        for group, name in enumerate(self.names):
            places = np.flatnonzero(self.group_of == group)
            num_epochs = -(-len(places) // len(self.groups[name]))
            served = [self.epoch(group, epoch) for epoch in range(num_epochs)]
            order[places] = np.concatenate([*served, np.zeros(0, np.int64)])[: len(places)]
        return order

    def epoch(self, group: int, epoch: int) -> np.ndarray:
        """Return all items of a group in the order of one of its epochs."""
        items = self.groups[self.names[group]]
        return items[np.random.default_rng([self.seed, group, epoch]).permutation(len(items))]

    def statistics(self) -> dict[str, dict[str, float]]:
        """Return the samples, share and epochs that the run reads of every group."""
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
    """Return the group of every position and the sample's rank within its group: int64 [length] each.

    The k-th sample of a group with share w is due at (k + 1/2) / w, and positions are filled in that order. In any
    window, the count of a group therefore deviates from its share by a few samples at most.
    """
    shares = weights / weights.sum()
    counts = np.ceil(shares * length).astype(int) + 1
    groups = np.repeat(np.arange(len(shares)), counts)
    ranks = np.concatenate([np.arange(count) for count in counts])
    order = np.argsort((ranks + 0.5) / shares[groups], kind="stable")[:length]
    return groups[order], ranks[order]
