"""Comparisons of arms over training runs: the unit is a run, with its own seeds of training, backbones and data.

Runs of two arms with equal seeds form a pair, so what a seed's backbones, clips and items have in common cancels. Of a
sample of pairs:

* `sign_flip_p`: exact randomization test (Fisher 1935). Under "the arm makes no difference" the two runs of a pair are
  exchangeable, so every pattern of signs of the differences is equally likely; nothing is assumed about their shape.
* `t_interval`: Student's interval of the mean; covers less than it says if some runs stay on a plateau and others do
  not.
* `bounded_interval`: interval of the mean of a bounded quantity, whatever its distribution (Learned-Miller and Thomas,
  "A new confidence interval for the mean of a bounded random variable", 2019; validity: Phan, Thomas and
  Learned-Miller, "Towards practical mean bounds for small samples", ICML 2021). It allows for outcomes that so few runs
  need not have shown, so it is wide.

tests/pipeline_steps/test_study_statistics.py measures the coverage of both for Gaussian, bimodal and skewed runs.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np

from pipeline_steps.common.study_results import BETTER, EQUAL, EXPLORATORY, TOO_FEW, UNDECIDED, UNMATCHED, WORSE
from pipeline_steps.report.statistics import LEVEL, MIN_VALUES, holm, interval_verdict, t_interval

EQUIVALENCE_LEVEL = 0.90  # of the interval that has to lie within the margin: two one-sided tests at 5 %
MAX_EXACT_PAIRS = 16  # 65,536 patterns of signs; beyond, as many are drawn
NUM_DRAWS = 20_000


@dataclass(frozen=True)
class Comparison:
    """An arm against the baseline in one group of tasks; differences are baseline minus arm, in units of accuracy."""

    arm: str
    group: str
    differences: tuple[float, ...]  # one per pair of runs
    interval: tuple[float, float] | None  # Student's, 95 %; None with fewer than two pairs
    bounded: tuple[float, float]  # 95 %, for any distribution
    p_value: float  # sign-flip test, two-sided
    p_adjusted: float  # Holm, over all comparisons of the study
    verdict: str
    smallest_margin: float | None  # with which these runs would have been called equal; None: too few runs

    @property
    def mean(self):
        return float(np.mean(self.differences))


def sign_flip_p(differences, seed=0):
    """Two-sided p-value of 'the mean difference is 0' over all patterns of signs (drawn ones beyond 16 pairs)."""
    values = np.asarray(differences, dtype=float)
    if len(values) <= MAX_EXACT_PAIRS:
        signs = np.array(list(product((-1, 1), repeat=len(values))))
    else:
        signs = np.random.default_rng(seed).choice((-1, 1), (2**MAX_EXACT_PAIRS, len(values)))
        signs[0] = 1  # what was observed is one of the patterns
    sums, observed = np.abs(signs @ values), abs(values.sum())
    return float(np.mean(sums >= observed - 1e-12))


def gain_verdict(values, margin):
    """(verdict, 95 % t-interval) of the mean of `values`, one per run, as `report.statistics.interval_verdict`."""
    interval = t_interval(values)
    return interval_verdict(interval, len(values), margin), interval


def bounded_interval(values, low, high, level=LEVEL, seed=0):
    """Interval of the mean of a quantity between `low` and `high`, (lower, upper), without further assumptions."""
    values = np.asarray(values, dtype=float)
    if values.min() < low or values.max() > high:
        raise ValueError(f"values from {values.min():.4g} to {values.max():.4g} are not within [{low}, {high}]")
    tail = (1 - level) / 2
    return -_upper_bound(-values, -low, tail, seed), _upper_bound(values, high, tail, seed)


def _upper_bound(values, high, tail, seed):
    """Upper confidence bound of the mean at level 1 - tail: the quantile, over the order statistics of uniform samples,
    of the largest mean that they allow for the sorted sample."""
    ordered = np.append(np.sort(values), high)
    uniforms = np.sort(np.random.default_rng(seed).random((NUM_DRAWS, len(values))), axis=1)
    means = high - uniforms @ np.diff(ordered)
    return float(np.quantile(means, 1 - tail, method="higher"))


def smallest_p(num_pairs):
    """The smallest p-value that a sign-flip test of this many pairs can reach."""
    return min(1.0, 2 / 2**num_pairs)


def compare(pairs, margin, matched=lambda arm: True, headline=lambda arm: True, uninformed=lambda arm, group: False):
    """`Comparison`s of {(arm, group): differences, baseline minus arm, one per pair}.

    margin: differences below it count as none, in units of accuracy. matched: whether an arm's budget equals the
    baseline's; without, no verdict is given. headline: whether an arm is a headline question; Holm's correction is for
    these, and others get no verdict; nor do fewer than `MIN_VALUES` pairs. uninformed: whether neither side has learned
    the group's tasks, so that being alike does not make them equal. "Better" is the baseline.
    """
    p_values = {name: sign_flip_p(values) for name, values in pairs.items()}
    asked = [name for name in pairs if headline(name[0])]
    corrected = dict(zip(asked, holm([p_values[name] for name in asked]), strict=True)) if asked else {}
    found = []
    for (arm, group), values in pairs.items():
        p = p_values[arm, group]
        adjusted = corrected.get((arm, group), p)
        is_enough = len(values) >= MIN_VALUES
        smallest = max(map(abs, t_interval(values, EQUIVALENCE_LEVEL))) if is_enough else None
        if (arm, group) not in corrected:
            verdict = EXPLORATORY
        elif not matched(arm):
            verdict = UNMATCHED
        elif not is_enough:
            verdict = TOO_FEW
        elif smallest <= margin:
            verdict = UNDECIDED if uninformed(arm, group) else EQUAL
        elif adjusted < 1 - LEVEL:
            verdict = BETTER if np.mean(values) > 0 else WORSE
        else:
            verdict = UNDECIDED
        found.append(
            Comparison(
                arm,
                group,
                tuple(map(float, values)),
                t_interval(values),
                bounded_interval(values, -1.0, 1.0),
                p,
                adjusted,
                verdict,
                smallest,
            )
        )
    return found
