"""Scaling laws of a grid of training runs: power laws, the best size at equal compute, and where two ways of training
cross.

A series is one way of training at several sizes, its arms, smallest first; every arm is trained at several budgets.
All of it is in logarithms: of the training FLOPs, of the loss, and of the size, which is the arm's training FLOPs per
sample (the width of the language model alone would leave out the vision encoder and the number of tokens).

* `power_law`: loss = a FLOPs^-b of one arm, by least squares, with Student's interval of b. An arm's FLOPs are
  proportional to its samples, so the exponent is the same in samples.
* `optima`: at equal FLOPs, losses of all sizes are read off between their budgets (straight lines in logarithms, never
  beyond the budgets that were run), and the minimum of the parabola through them is the best size (approach 2 of
  Hoffmann et al., "Training compute-optimal large language models", 2022).
* `crossing`: the lower envelope of each series over its sizes, and the FLOPs at which their order changes.

What the runs leave open is measured by draws: every observed loss is multiplied by noise with the spread of the runs
around their arms' power laws, so lack of fit counts as noise. A statement is made if it holds in 95 % of the draws.
tests/pipeline_steps/test_scaling_laws.py measures how often these intervals and statements are right.
"""

from dataclasses import dataclass

import numpy as np
from scipy import stats

from pipeline_steps.common.study_results import UNDECIDED

LEVEL = 0.95
NUM_DRAWS = 2000
NUM_STEPS = 65  # compute levels at which envelopes are compared


@dataclass(frozen=True)
class Arm:
    """The runs of one size, one entry per budget, smallest first; several seeds are averaged in logarithms."""

    name: str
    log_flops: np.ndarray  # [budgets], of the training
    log_loss: np.ndarray  # [budgets]
    num_runs: np.ndarray  # [budgets]
    log_size: float  # of the training FLOPs per sample


@dataclass(frozen=True)
class PowerLaw:
    """loss = exp(intercept) FLOPs^-exponent."""

    intercept: float
    exponent: float
    interval: tuple[float, float] | None  # of the exponent, 95 %; None: no more budgets than parameters
    residuals: np.ndarray  # of the logarithm of the loss, [budgets]

    def loss(self, flops):
        return np.exp(self.intercept) * np.asarray(flops) ** -self.exponent


@dataclass(frozen=True)
class Optimum:
    """The best size of a series at one budget."""

    flops: float
    losses: tuple[float, ...]  # by arm
    best: str  # arm with the lowest loss
    share: float  # of the draws in which it is that arm
    size: float | None  # training FLOPs per sample at the parabola's minimum; None: not within the sizes that were run
    interval: tuple[float, float] | None  # 95 %; None: without a minimum within these sizes in 95 % of the draws

    @property
    def is_decided(self):
        return self.share >= LEVEL


@dataclass(frozen=True)
class Crossing:
    """Two series over the budgets that both were trained with; ratios are of the first's loss to the second's."""

    first: str
    second: str
    flops: tuple[float, float]  # lowest and highest
    ratios: tuple[float, float]  # there
    intervals: tuple[tuple[float, float], tuple[float, float]]  # 95 %
    crossing: float | None  # FLOPs; None unless the order at both ends is certain and not the same
    interval: tuple[float, float] | None  # 95 %
    verdict: str


def make_arm(name, flops, samples, losses):
    """`Arm` of its runs, one entry per run in any order; runs with the same number of samples are averaged. ValueError
    for fewer than two budgets and for values that have no logarithm."""
    flops, samples, losses = (np.asarray(values, dtype=float) for values in (flops, samples, losses))
    if min(flops.min(), samples.min(), losses.min()) <= 0:
        raise ValueError(f"{name}: FLOPs, samples and losses must be positive")
    budgets, place, counts = np.unique(samples, return_inverse=True, return_counts=True)
    if len(budgets) < 2:
        raise ValueError(f"{name}: a law needs at least two budgets, found {len(budgets)}")

    def mean(values):
        return np.bincount(place, weights=np.log(values)) / counts

    log_size = float(np.mean(np.log(flops) - np.log(samples)))
    return Arm(name, mean(flops), mean(losses), counts, log_size)


def power_law(arm):
    """`PowerLaw` of an `Arm`, every budget with the weight of its runs."""
    weights = arm.num_runs / arm.num_runs.sum()
    centred = arm.log_flops - weights @ arm.log_flops
    slope = weights @ (centred * arm.log_loss) / (weights @ centred**2)
    intercept = weights @ (arm.log_loss - slope * arm.log_flops)
    residuals = arm.log_loss - intercept - slope * arm.log_flops
    degrees = len(residuals) - 2
    interval = None
    if degrees > 0:
        error = (weights @ residuals**2 / degrees / (weights @ centred**2)) ** 0.5
        half = float(stats.t.isf((1 - LEVEL) / 2, degrees) * error)
        interval = float(-slope - half), float(-slope + half)
    return PowerLaw(float(intercept), float(-slope), interval, residuals)


def noise_of(arms):
    """Standard deviation of the logarithm of a run's loss around its arm's power law, pooled over `Arm`s; None without
    an arm of three budgets."""
    found = [(power_law(arm).residuals, arm.num_runs) for arm in arms]
    degrees = sum(max(len(residuals) - 2, 0) for residuals, _ in found)
    if not degrees:
        return None
    total = sum(float(runs @ residuals**2) for residuals, runs in found if len(residuals) > 2)
    return (total / degrees) ** 0.5


def draw(arms, noise, seed=0):
    """Losses of every `Arm` with noise: [1 + NUM_DRAWS, budgets] each, the first row as observed."""
    rng = np.random.default_rng(seed)
    drawn = []
    for arm in arms:
        errors = rng.normal(0, noise, (NUM_DRAWS, len(arm.log_loss))) / np.sqrt(arm.num_runs)
        drawn.append(np.vstack([arm.log_loss, arm.log_loss + errors]))
    return drawn


def at(arm, log_losses, levels):
    """`log_losses` [draws, budgets] of an arm at log FLOPs `levels`: [draws, levels], NaN beyond its budgets."""
    place = np.clip(np.searchsorted(arm.log_flops, levels) - 1, 0, len(arm.log_flops) - 2)
    low, high = arm.log_flops[place], arm.log_flops[place + 1]
    part = (levels - low) / (high - low)
    values = log_losses[:, place] * (1 - part) + log_losses[:, place + 1] * part
    slack = 1e-9
    outside = (levels < arm.log_flops[0] - slack) | (levels > arm.log_flops[-1] + slack)
    return np.where(outside, np.nan, values)


def optima(arms, noise, num_levels=3, seed=0):
    """[`Optimum`] of a series at up to `num_levels` budgets, equally spaced in logarithms over those that all of its
    `Arm`s were trained with; [] if there are none."""
    low, high = max(arm.log_flops[0] for arm in arms), min(arm.log_flops[-1] for arm in arms)
    if low > high:
        return []
    levels = np.linspace(low, high, num_levels)
    losses = np.stack(
        [at(arm, drawn, levels) for arm, drawn in zip(arms, draw(arms, noise, seed), strict=True)]
    )  # [arms, draws, levels]
    sizes = np.array([arm.log_size for arm in arms])
    found = []
    for place, level in enumerate(levels):
        values = losses[:, :, place]
        best = values.argmin(axis=0)
        minima = minimum(sizes, values)
        certain = np.mean(np.isfinite(minima[1:])) >= LEVEL
        found.append(
            Optimum(
                flops=float(np.exp(level)),
                losses=tuple(map(float, np.exp(values[:, 0]))),
                best=arms[best[0]].name,
                share=float(np.mean(best[1:] == best[0])),
                size=float(np.exp(minima[0])) if np.isfinite(minima[0]) else None,
                interval=interval_of(np.exp(minima[1:])) if certain and np.isfinite(minima[0]) else None,
            )
        )
    return found


def minimum(sizes, values):
    """Where the parabola through `values` [sizes, draws] has its minimum, [draws]; NaN if that is not within the sizes,
    or with fewer than three."""
    if len(sizes) < 3:
        return np.full(values.shape[1], np.nan)
    centre = sizes.mean()
    curvature, slope, _ = np.polyfit(sizes - centre, values, 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        place = centre - slope / (2 * curvature)
    inside = (curvature > 0) & (place >= sizes.min()) & (place <= sizes.max())
    return np.where(inside, place, np.nan)


def envelope(arms, drawn, levels):
    """Lowest log loss of a series at log FLOPs `levels`, [draws, levels]; at every level an arm has to be defined."""
    return np.nanmin(np.stack([at(arm, losses, levels) for arm, losses in zip(arms, drawn, strict=True)]), axis=0)


def covered(arms, levels):
    """Whether any arm was trained with less and with more than each of `levels`."""
    return np.any([(arm.log_flops[0] <= levels) & (levels <= arm.log_flops[-1]) for arm in arms], axis=0)


def crossing(first, second, noise, seed=0):
    """`Crossing` of two series, (name, [`Arm`]) each; None if they have no budget in common."""
    (name, arms), (other_name, other_arms) = first, second
    low = max(min(arm.log_flops[0] for arm in series) for series in (arms, other_arms))
    high = min(max(arm.log_flops[-1] for arm in series) for series in (arms, other_arms))
    levels = np.linspace(low, high, NUM_STEPS) if low < high else np.zeros(0)
    levels = levels[covered(arms, levels) & covered(other_arms, levels)] if len(levels) else levels
    if len(levels) < 2:
        return None
    drawn = draw([*arms, *other_arms], noise, seed)
    gap = envelope(arms, drawn[: len(arms)], levels) - envelope(other_arms, drawn[len(arms) :], levels)
    observed, gaps = gap[0], gap[1:]
    starts, ends = np.mean(gaps[:, 0] < 0), np.mean(gaps[:, -1] < 0)
    below, above = np.mean((gaps < 0).all(axis=1)), np.mean((gaps > 0).all(axis=1))
    place, interval = None, None
    if below >= LEVEL or above >= LEVEL:
        verdict = f"{name if below >= LEVEL else other_name} lower throughout"
    elif min(starts, 1 - ends) >= LEVEL or min(1 - starts, ends) >= LEVEL:
        found = np.array([last_change(levels, row) for row in gap])
        place, interval = float(np.exp(found[0])), interval_of(np.exp(found[1:]))
        before, after = (name, other_name) if starts >= LEVEL else (other_name, name)
        verdict = f"{before} lower before, {after} after"
    else:
        verdict = UNDECIDED
    return Crossing(
        first=name,
        second=other_name,
        flops=(float(np.exp(levels[0])), float(np.exp(levels[-1]))),
        ratios=(float(np.exp(observed[0])), float(np.exp(observed[-1]))),
        intervals=(interval_of(np.exp(gaps[:, 0])), interval_of(np.exp(gaps[:, -1]))),
        crossing=place,
        interval=interval,
        verdict=verdict,
    )


def last_change(levels, gap):
    """Where `gap` [levels] changes its sign for the last time; NaN if it does not."""
    changes = np.flatnonzero(np.sign(gap[:-1]) != np.sign(gap[1:]))
    if not len(changes):
        return np.nan
    before = changes[-1]
    part = gap[before] / (gap[before] - gap[before + 1])
    return levels[before] + part * (levels[before + 1] - levels[before])


def interval_of(values):
    """95 % of `values`, without those that are NaN."""
    low, high = np.nanquantile(values, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(low), float(high)
