"""Scaling laws of a grid of training runs: power laws, the best size at equal compute, and where two arms cross.

An arm is one network size, trained at several budgets with several seeds. Everything is in logarithms: of the training
FLOPs, of the loss, and of the size, which is the arm's training FLOPs per sample (the width of the language model alone
would leave out the vision encoder and the number of tokens).

* `power_law`: loss = a FLOPs^-b, by least squares. An arm's FLOPs are proportional to its samples, so the exponent is
  the same in samples.
* `best_sizes`: at equal FLOPs, the losses of all sizes are read off between their budgets (straight lines in
  logarithms, never beyond the budgets that were run), and the minimum of the parabola through them is the best size
  (approach 2 of Hoffmann et al., "Training compute-optimal large language models", 2022).
* `crossing`: two arms over the FLOPs that both were trained with.

The unit is a seed: each of these is computed for every seed, and intervals are Student's over the seeds, because the
runs of one seed share backbones and data and may all lie above or below those of another. Two arms are compared seed by
seed. With fewer than three seeds nothing is decided. A straight line between two budgets of a bent law is wrong for all
seeds alike, which no interval over seeds shows: a difference counts only beyond what the arms' `bend`s may explain.
tests/pipeline_steps/test_scaling_laws.py measures the intervals' coverage and how often a difference is stated where
there is none.
"""

import math
from dataclasses import dataclass

import numpy as np

from pipeline_steps.common.study_results import TOO_FEW, UNDECIDED
from pipeline_steps.report.statistics import MIN_VALUES, slope_interval, t_interval

NUM_LEVELS = 65  # at which two arms are compared


@dataclass(frozen=True)
class Arm:
    """The runs of one size: every seed at every budget, fewest FLOPs first."""

    name: str
    seeds: tuple
    log_flops: np.ndarray  # [seeds, budgets], of the training
    log_loss: np.ndarray  # [seeds, budgets]
    log_size: float  # of the training FLOPs per sample

    @property
    def bend(self):
        """How far the mean loss may be from straight lines between neighbouring budgets, in logarithms: a quarter of
        its largest distance from a line over two steps (exact for a parabola with equal steps); with two budgets
        nothing is known, and it is infinite."""
        x, y = self.log_flops.mean(axis=0), self.log_loss.mean(axis=0)
        if len(x) < 3:
            return math.inf
        part = (x[1:-1] - x[:-2]) / (x[2:] - x[:-2])
        return float(np.abs(y[:-2] * (1 - part) + y[2:] * part - y[1:-1]).max()) / 4


@dataclass(frozen=True)
class PowerLaw:
    """loss ~ FLOPs^-exponent."""

    exponents: np.ndarray  # [seeds]
    interval: tuple[float, float] | None  # 95 %, over the seeds; of one seed: over its budgets; None: with two of these
    error: float  # root mean square of the logarithm of the loss around the law
    verdict: str

    @property
    def exponent(self):
        return float(np.mean(self.exponents))


@dataclass(frozen=True)
class BestSize:
    """The sizes of a series at one budget."""

    flops: float
    num_seeds: int  # that all arms have
    losses: dict[str, float]  # {arm: geometric mean over the seeds}, smallest network first
    size: (
        float | None
    )  # training FLOPs per sample at the parabola's minimum; None: not within the sizes for every seed,
    # or fewer than three seeds
    interval: tuple[float, float] | None  # 95 %, over the seeds, within the sizes
    verdict: str  # the arm whose loss is below every other's by the intervals


@dataclass(frozen=True)
class Crossing:
    """Two arms over the budgets that both were trained with; ratios are of the first's loss to the second's."""

    num_seeds: int  # that both have
    flops: tuple[float, float]  # lowest and highest
    ratios: tuple[float, float]  # there
    intervals: tuple[tuple[float, float] | None, tuple[float, float] | None]  # 95 %, over the seeds
    crossing: float | None  # FLOPs; None unless the order at both ends is clear, and changes once for every seed
    interval: tuple[float, float] | None  # 95 %, over the seeds, within the FLOPs of both
    verdict: str


def make_arm(name, runs):
    """(`Arm`, number of runs left out) of a table with the columns seed, budget, flops, samples and loss, one row per
    run: the seeds and budgets that form the largest complete grid. (None, all of them) if that has no two budgets.
    ValueError for values that have no logarithm, and for budgets of a seed with equal FLOPs."""
    for row in runs.itertuples():
        for column in ("flops", "samples", "loss"):
            if not getattr(row, column) > 0 or not np.isfinite(getattr(row, column)):
                value = getattr(row, column)
                raise ValueError(f"{name}, budget {row.budget}, seed {row.seed}: {column} is {value}: no logarithm")
    seeds, budgets = largest_grid(set(zip(runs["seed"], runs["budget"], strict=True)))
    if len(budgets) < 2:
        return None, len(runs)
    kept = runs[runs["seed"].isin(seeds) & runs["budget"].isin(budgets)].sort_values(["seed", "samples"])
    flops, samples, losses = (
        np.log(kept[column].to_numpy(float)).reshape(len(seeds), len(budgets))
        for column in ("flops", "samples", "loss")
    )
    if not (np.diff(flops) > 0).all():
        raise ValueError(f"{name}: budgets {', '.join(map(str, budgets))} of a seed have equal training FLOPs")
    arm = Arm(name, tuple(seeds), flops, losses, float(np.mean(flops - samples)))
    return arm, len(runs) - len(kept)


def largest_grid(cells):
    """(seeds, budgets), sorted, of the complete grid with most cells among `cells`, a set of (seed, budget), where it
    has two budgets; of equally large ones that with most seeds."""
    budgets_of = {}
    for seed, budget in sorted(cells):
        budgets_of.setdefault(seed, set()).add(budget)
    sets: set[frozenset] = set()
    for has in budgets_of.values():  # all intersections of the budgets of some seeds
        sets |= {frozenset(has), *(some & has for some in sets)}
    ordered = sorted(sorted(some) for some in sets)
    found = [([seed for seed, has in budgets_of.items() if has.issuperset(some)], some) for some in ordered]
    return max(found, key=lambda grid: (len(grid[1]) >= 2, len(grid[0]) * len(grid[1]), len(grid[0])), default=([], []))


def power_law(arm):
    """`PowerLaw` of an `Arm`. "Falls", "rises": its interval says so."""
    centred = arm.log_flops - arm.log_flops.mean(axis=1, keepdims=True)
    slopes = (centred * arm.log_loss).sum(axis=1) / (centred**2).sum(axis=1)
    residuals = arm.log_loss - arm.log_loss.mean(axis=1, keepdims=True) - slopes[:, None] * centred
    interval = t_interval(-slopes) or slope_interval(arm.log_flops[0], -arm.log_loss[0])
    verdict = TOO_FEW
    if len(slopes) >= MIN_VALUES:
        verdict = "falls" if interval[0] > 0 else "rises" if interval[1] < 0 else UNDECIDED
    return PowerLaw(-slopes, interval, float(np.mean(residuals**2) ** 0.5), verdict)


def interpolated(arm, seeds, levels):
    """Log losses of an `Arm` at log FLOPs `levels`: [seeds, levels], for these of its seeds; nothing is extrapolated:
    ValueError for a level beyond the budgets of any seed."""
    rows = [arm.seeds.index(seed) for seed in seeds]
    low, high = span([arm], seeds)
    if levels.min() < low or levels.max() > high:
        raise ValueError(f"{arm.name}: FLOPs are known from {np.exp(low):.4g} to {np.exp(high):.4g} only")
    return np.stack([np.interp(levels, arm.log_flops[row], arm.log_loss[row]) for row in rows])


def common_seeds(arms):
    return sorted(set.intersection(*(set(arm.seeds) for arm in arms)))


def span(arms, seeds):
    """(lowest, highest) log FLOPs that all `arms` were trained with, with each of the `seeds`; lowest > highest: there
    are none."""
    rows = [arm.log_flops[arm.seeds.index(seed)] for arm in arms for seed in seeds]
    return max(row[0] for row in rows), min(row[-1] for row in rows)


def best_sizes(arms, num_levels=3):
    """[`BestSize`] of a series at `num_levels` budgets, equally spaced in logarithms over those that all of its `Arm`s
    were trained with; [] if there are none, or fewer than two arms."""
    seeds = common_seeds(arms) if len(arms) > 1 else []
    if not seeds:
        return []
    low, high = span(arms, seeds)
    if low > high:
        return []
    arms = sorted(arms, key=lambda arm: arm.log_size)
    sizes = np.array([arm.log_size for arm in arms])
    levels = np.linspace(low, high, num_levels) if low < high else np.array([low])
    losses = np.stack([interpolated(arm, seeds, levels) for arm in arms])  # [arms, seeds, levels]
    found = []
    for place, level in enumerate(levels):
        values = losses[:, :, place]
        minima = minimum(sizes, values)
        inside = len(seeds) >= MIN_VALUES and np.isfinite(minima).all()
        found.append(
            BestSize(
                flops=float(np.exp(level)),
                num_seeds=len(seeds),
                losses={arm.name: float(np.exp(value)) for arm, value in zip(arms, values.mean(axis=1), strict=True)},
                size=float(np.exp(minima.mean())) if inside else None,
                interval=exponentiated(t_interval(minima), sizes) if inside else None,
                verdict=lowest(arms, values),
            )
        )
    return found


def lowest(arms, values):
    """Name of the `Arm` whose `values` [arms, seeds] are below every other's, pair by pair and by more than their bends
    may explain, or why there is none."""
    if values.shape[1] < MIN_VALUES:
        return TOO_FEW
    best = int(values.mean(axis=1).argmin())
    below = (
        t_interval(values[row] - values[best])[0] > arm.bend + arms[best].bend
        for row, arm in enumerate(arms)
        if row != best
    )
    return arms[best].name if all(below) else UNDECIDED


def minimum(sizes, values):
    """Where the parabola through `values` [sizes, seeds] has its minimum, [seeds]; NaN if that is not within the sizes,
    or with fewer than three different ones."""
    nowhere = np.full(values.shape[1], np.nan)
    if len(np.unique(sizes)) < 3:
        return nowhere
    centre = sizes.mean()
    curvature, slope, _ = np.polyfit(sizes - centre, values, 2)
    place = centre - np.divide(slope, 2 * curvature, out=nowhere.copy(), where=curvature > 0)
    return np.where((place >= sizes.min()) & (place <= sizes.max()), place, np.nan)


def crossing(first, second):
    """`Crossing` of two `Arm`s; None if they have no seed or no budget in common."""
    seeds = common_seeds([first, second])
    if not seeds:
        return None
    low, high = span([first, second], seeds)
    if low >= high:
        return None
    levels = np.linspace(low, high, NUM_LEVELS)
    gaps = interpolated(first, seeds, levels) - interpolated(second, seeds, levels)
    intervals = [t_interval(gaps[:, place]) for place in range(NUM_LEVELS)]
    place = interval = None
    if len(seeds) < MIN_VALUES:
        verdict = TOO_FEW
    else:
        bend = first.bend + second.bend
        signs = [1 if border[0] > bend else -1 if border[1] < -bend else 0 for border in intervals]  # 0: not clear
        places = [single_change(levels, row) for row in gaps]
        if set(signs) == {-1} or set(signs) == {1}:
            verdict = f"{(first if signs[0] < 0 else second).name} lower throughout"
        elif signs[0] * signs[-1] == -1 and None not in places:
            place, interval = float(np.exp(np.mean(places))), exponentiated(t_interval(places), (low, high))
            before, after = (first, second) if signs[0] < 0 else (second, first)
            verdict = f"{before.name} lower before, {after.name} after"
        else:
            verdict = UNDECIDED
    ends = (0, -1)
    return Crossing(
        num_seeds=len(seeds),
        flops=(float(np.exp(low)), float(np.exp(high))),
        ratios=tuple(float(np.exp(gaps[:, end].mean())) for end in ends),
        intervals=tuple(exponentiated(intervals[end]) for end in ends),
        crossing=place,
        interval=interval,
        verdict=verdict,
    )


def single_change(levels, gap):
    """Where `gap` [levels] changes its sign; None if it does not, or more than once."""
    changes = np.flatnonzero(np.diff(gap < 0))
    if len(changes) != 1:
        return None
    before = int(changes[0])
    part = gap[before] / (gap[before] - gap[before + 1])
    return float(levels[before] + part * (levels[before + 1] - levels[before]))


def exponentiated(interval, within=(-math.inf, math.inf)):
    """An interval of a logarithm as one of the quantity, cut to what was run; None stays None."""
    return None if interval is None else tuple(np.exp(np.clip(interval, min(within), max(within))).tolist())
