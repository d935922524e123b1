"""Token-weighted aggregates, bootstrap intervals and the chance baseline.

A group of n items is given as three arrays: loss_sum [n] (nats summed over the item's scored tokens), num_correct [n],
num_tokens [n].
"""

import numpy as np
import pandas as pd

from pipeline_steps.common.metrics import Gap, Score

BLOCK = 100  # resamples drawn at a time; bounds memory to BLOCK x num_items counts
INTERVAL = (2.5, 97.5)


def bootstrap_sums(values, num_samples, seed):
    """Sums of values [n, c] over `num_samples` resamples of the n items with replacement: [num_samples, c]."""
    values = np.asarray(values, dtype=np.float64)
    num_items = len(values)
    rng = np.random.default_rng(seed)
    sums = []
    for start in range(0, num_samples, BLOCK):
        drawn = rng.integers(0, num_items, (min(BLOCK, num_samples - start), num_items))
        counts = np.stack([np.bincount(row, minlength=num_items) for row in drawn])
        sums.append(counts @ values)
    return np.concatenate(sums)


def ratio_interval(numerator, denominator, num_samples, seed, clips=None):
    """95 % percentile interval of sum(numerator) / sum(denominator), bootstrap over clips: a clip's items are drawn
    together. clips: the clip of every item, None if each has its own. Resamples with denominator 0 are discarded."""
    sums = bootstrap_sums(by_clip(np.stack([numerator, denominator], axis=1), clips), num_samples, seed)
    sums = sums[sums[:, 1] > 0]
    low, high = np.percentile(sums[:, 0] / sums[:, 1], INTERVAL)
    return float(low), float(high)


def by_clip(values, clips):
    """Sums of values [n, c] over the items of each clip, clips in the order of their first item: [clips, c]."""
    if clips is None:
        return values
    numbers, _ = pd.factorize(pd.Index(clips))
    return np.stack([np.bincount(numbers, weights=column) for column in values.T.astype(np.float64)], axis=1)


def score(loss_sum, num_correct, num_tokens, num_samples, seed, clips=None):
    """`Score` of a group of items; every scored token has equal weight, so an item's weight is its number of scored
    tokens."""
    total = float(np.sum(num_tokens))
    return Score(
        loss=float(np.sum(loss_sum)) / total,
        accuracy=float(np.sum(num_correct)) / total,
        num_items=len(num_tokens),
        num_tokens=int(total),
        loss_interval=ratio_interval(loss_sum, num_tokens, num_samples, seed, clips),
        accuracy_interval=ratio_interval(num_correct, num_tokens, num_samples, seed, clips),
    )


def gap(autoregressive_loss_sum, fine_loss_sum, num_samples, seed, clips=None):
    """`Gap`: both arrays hold the same items in the same order."""
    return Gap(
        loss_ratio=float(np.sum(autoregressive_loss_sum) / np.sum(fine_loss_sum)),
        interval=ratio_interval(autoregressive_loss_sum, fine_loss_sum, num_samples, seed, clips),
    )


def most_frequent_tokens(counts):
    """Most frequent scored token at each position of the answer.

    counts: {(position, token id): how often} over the scored tokens of a task's training items, position counted
    from the answer's start. Returns {position: token id}; ties go to the smallest id.
    """
    best = {}
    for (position, token), count in counts.items():
        best[position] = max(best.get(position, (0, 0)), (count, -token))
    return {position: -token for position, (_, token) in best.items()}


def chance_accuracy(guesses, counts):
    """Share of the tokens `counts` {(position, token id): how often} that `guesses` {position: token id} gets right;
    a position without a guess counts as wrong."""
    right = sum(count for (position, token), count in counts.items() if guesses.get(position) == token)
    return right / sum(counts.values())
