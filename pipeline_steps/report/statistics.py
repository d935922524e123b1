"""How far two ways of training lie apart: effect, 95 % interval, p-value, equivalence, Holm's correction.

The data of a comparison are two arrays [seeds, items] of sums over an item's scored tokens (nats, or correct tokens):
the run of seed s of either arm on item i. Every run scores the same items, and the runs of a seed share the order of
their data, so everything is paired. An arm's score is the unweighted mean over the tasks of sum / tokens.

Effect of seed s: log(loss of the arm / loss of the baseline), or the difference of the accuracies. The effect of a
comparison is its mean over the seeds (for losses: the geometric mean of the seeds' ratios).

Assumed: seeds are a random sample of all seeds, with effects that are roughly normal (random effect); items are a
random sample of their task, tasks are fixed. A resample draws seeds, then items: of every task, and the same
items for both arms and for all seeds, because every run scored the same ones (other items for every seed would take
their common difficulty for independent evidence and make the interval too short). The seeds' part of that variance
has a closed form, (S - 1) / S^2 times the seeds' variance s^2; it is enlarged by S / (S - 1) to s^2 / S, since
resampling few seeds understates it by that. The items' part is drawn, without what the seeds' spread holds already.
Percentiles of the resamples of three seeds cannot reach 95 %, so interval and p-values are Student's t: the half width
is the root of the squared half widths that either part would have alone, with S - 1 degrees of freedom for the seeds
(Howe 1974, "Approximate confidence limits on the mean of X + Y where X and Y are two tabled independent random
variables").
tests/pipeline_steps/test_statistics.py measures the coverage of both.

SciPy is imported where it is used: `benchmarks.natural`, which only collects results, runs without it.
"""

from dataclasses import dataclass

import numpy as np

from pipeline_steps.common.study_results import BETTER, EQUAL, TOO_FEW, UNDECIDED, WORSE

ALPHA = 0.05  # two-sided; one-sided tests take half of it, so that one 95 % interval decides everything
LEVEL = 1 - ALPHA  # of two-sided intervals
SMALLEST = 1e-30  # p-values below it are 0
MIN_VALUES = 3  # of an interval that decides
FEWEST_PAIRS = 6  # with which a two-sided sign-flip test can have p < 0.05
LOG_RATIO, DIFFERENCE = "log ratio", "difference"


@dataclass(frozen=True)
class Effect:
    """An effect on its additive scale (a log ratio or a difference); `ratio` and `ratio_interval` undo the log."""

    per_seed: tuple[float, ...]
    items_error: float  # standard error from the items
    items_degrees: int  # degrees of freedom of the items' error
    seeds_error: float | None  # standard error from the seeds; None: one seed, which says nothing about others

    @property
    def value(self):
        return float(np.mean(self.per_seed))

    @property
    def interval(self):
        """95 %; of one seed: over items only."""
        half = self._half_width(ALPHA / 2)
        return self.value - half, self.value + half

    def _half_width(self, tail):
        """Distance from the effect to the border beyond which the share `tail` lies."""
        from scipy import stats

        items = self.items_error * stats.t.isf(tail, self.items_degrees)
        seeds = (self.seeds_error or 0.0) * stats.t.isf(tail, max(len(self.per_seed) - 1, 1))
        return float(np.hypot(items, seeds))

    def _tail(self, distance):
        """The share beyond a border `distance` away: the inverse of `_half_width`."""
        if distance < 0:
            return 1 - self._tail(-distance)
        if distance >= self._half_width(SMALLEST):
            return 0.0
        from scipy import optimize

        found = optimize.brentq(lambda log: self._half_width(np.exp(log)) - distance, np.log(SMALLEST), np.log(0.5))
        return float(np.exp(found))

    @property
    def ratio(self):
        return float(np.exp(self.value))

    @property
    def ratio_interval(self):
        low, high = np.exp(self.interval)
        return float(low), float(high)

    @property
    def p_value(self):
        """Two-sided, against no effect; None for one seed."""
        return None if self.seeds_error is None else min(1.0, 2 * min(self.p_above(0.0), self.p_below(0.0)))

    def p_above(self, border):
        """One-sided p-value of 'the effect is above `border`'."""
        return self._tail(self.value - border)

    def p_below(self, border):
        """One-sided p-value of 'the effect is below `border`'."""
        return self._tail(border - self.value)

    def p_equivalent(self, low, high):
        """Two one-sided tests: p-value of 'the effect is between `low` and `high`', the larger of the two."""
        return max(self.p_above(low), self.p_below(high))


@dataclass(frozen=True)
class Sums:
    """One run's sums over the scored tokens of its items, tasks one after another."""

    task_sizes: tuple[int, ...]
    num_tokens: np.ndarray  # [items]
    loss_sum: np.ndarray  # [items]
    num_correct: np.ndarray  # [items]


class Resamples:
    """How often every item is drawn in each of `num_samples` resamples, task by task; shared by all comparisons of
    the same items."""

    def __init__(self, task_sizes, num_samples, seed):
        rng = np.random.default_rng(seed)
        self.task_sizes = tuple(task_sizes)
        self.counts = [rng.multinomial(size, np.full(size, 1 / size), num_samples).astype(float) for size in task_sizes]

    def means(self, sums, num_tokens):
        """Mean over tasks of sum / tokens: (resampled [num_samples, seeds], observed [seeds]) of sums
        [seeds, items]."""
        borders = np.cumsum(self.task_sizes)[:-1]
        parts = np.split(np.asarray(sums, dtype=float), borders, axis=1)
        weights = np.split(np.asarray(num_tokens, dtype=float), borders)
        drawn = [
            count @ part.T / (count @ weight)[:, None]
            for count, part, weight in zip(self.counts, parts, weights, strict=True)
        ]
        observed = [part.sum(1) / weight.sum() for part, weight in zip(parts, weights, strict=True)]
        return np.mean(drawn, axis=0), np.mean(observed, axis=0)


def paired_effect(base, arm, num_tokens, resamples, scale=LOG_RATIO):
    """`Effect` of `arm` against `base`, both [seeds, items] (row s of both: the same seed), num_tokens [items].

    Raises ValueError for a loss of 0, which has no ratio.
    """
    base_drawn, base_seen = resamples.means(base, num_tokens)
    arm_drawn, arm_seen = resamples.means(arm, num_tokens)
    if scale == LOG_RATIO:
        if min(base_drawn.min(), arm_drawn.min()) <= 0:
            raise ValueError("a loss of 0 has no ratio: compare accuracies, or score more items")
        base_drawn, base_seen, arm_drawn, arm_seen = map(np.log, (base_drawn, base_seen, arm_drawn, arm_seen))
    per_seed = arm_seen - base_seen
    num_seeds, num_tasks = len(per_seed), len(resamples.task_sizes)
    seeds = float(np.std(per_seed, ddof=1)) / num_seeds**0.5 if num_seeds > 1 else None
    return Effect(
        per_seed=tuple(map(float, per_seed)),
        items_error=_items_error(arm_drawn - base_drawn),
        items_degrees=max(sum(resamples.task_sizes) - num_tasks, 1),
        seeds_error=seeds,
    )


def _items_error(drawn):
    """Standard error from the items that the seeds share, of resampled effects [num_samples, seeds].

    What differs from seed to seed on the same item is part of the seeds' spread already, so it is taken out here.
    """
    shared = drawn.mean(1)
    variance, num_seeds = np.var(shared), drawn.shape[1]
    if num_seeds > 1:
        variance -= np.var(drawn - shared[:, None], axis=0).mean() / (num_seeds - 1)
    return float(max(variance, 0.0) ** 0.5)


def t_interval(values, level=LEVEL):
    """Student's interval of the mean, (low, high); None for fewer than two values."""
    from scipy import stats

    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return None
    half = stats.t.isf((1 - level) / 2, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean() - half), float(values.mean() + half)


def slope_interval(x, y, level=LEVEL):
    """Student's interval of the slope of a least-squares line, (low, high); None for fewer than three points."""
    from scipy import stats

    if len(x) < 3:
        return None
    found = stats.linregress(x, y)
    half = float(stats.t.isf((1 - level) / 2, len(x) - 2) * found.stderr)
    return float(found.slope) - half, float(found.slope) + half


def share_interval(count, total, level=LEVEL):
    """Clopper-Pearson interval of a share, (low, high)."""
    from scipy import stats

    found = stats.binomtest(count, total).proportion_ci(confidence_level=level, method="exact")
    return float(found.low), float(found.high)


def unseen_text(num_runs):
    """What `num_runs` runs that are alike cannot tell: others, such as those on a plateau, may have been missed."""
    share = share_interval(0, num_runs)[1]
    return f"An outcome that fewer than {share:.0%} of all runs have may have escaped these {num_runs}."


def equivalence_power(differences, margin, level=0.9):
    """Chance that as many pairs, normal with the spread of `differences` around 0, are called equal: that their
    t-interval of the mean at `level` lies within +- margin. None for fewer than `MIN_VALUES` pairs."""
    from scipy import stats

    count = len(differences)
    if count < MIN_VALUES:
        return None
    error = float(np.std(differences, ddof=1)) / count**0.5
    if error == 0:
        return 1.0
    ranks = (np.arange(2000) + 0.5) / 2000
    errors = error * np.sqrt(stats.chi2.ppf(ranks, count - 1) / (count - 1))  # of such studies, in quantiles
    room = np.maximum(margin - stats.t.isf((1 - level) / 2, count - 1) * errors, 0)
    return float(np.mean(2 * stats.norm.cdf(room / error) - 1))


def interval_verdict(interval, num_values, margin):
    """Verdict by a mean's 95 % interval, without correction for other questions: TOO_FEW below `MIN_VALUES`, EQUAL if
    the interval lies within +- margin, BETTER or WORSE if it excludes 0, else UNDECIDED."""
    if num_values < MIN_VALUES:
        return TOO_FEW
    low, high = interval
    if -margin <= low and high <= margin:
        return EQUAL
    return BETTER if low > 0 else WORSE if high < 0 else UNDECIDED


def holm(p_values):
    """Holm's adjusted p-values, in the given order: the chance of one false finding in the whole table stays below
    the level."""
    p_values = np.asarray(p_values, dtype=float)
    order = np.argsort(p_values, kind="stable")
    steps = (len(p_values) - np.arange(len(p_values))) * p_values[order]
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted.tolist()
