"""The scaling grid of a study on the page and in its README: laws, best sizes, crossings, and the figure of all runs.

A study names its series in conf/study (`series`); pipeline_steps.report.scaling_laws fits them, by group of tasks.
"""

from dataclasses import dataclass

import numpy as np
from matplotlib.ticker import LogLocator

from pipeline_steps.report import scaling_laws as laws
from pipeline_steps.report.tables import MISSING, Table, number

NAMES = {"all": "all tasks", "gaze": "need a gaze", "reading": "read everything"}
COLOURS = ("#2f80ed", "#d97706", "#12a594", "#b05cc6")
MARKERS = "osD^v"
MIN_BUDGETS = 2
EXPONENT_NOTE = (
    "Loss = a × (training FLOPs)^−b over the budgets of one size, least squares in logarithms; an arm's FLOPs are "
    "proportional to its samples, so b is the same in samples. Error: root mean square of the loss around its law. "
    "Falls: the 95% t-interval of b is above 0."
)


@dataclass(frozen=True)
class Grid:
    """What a study's series say in one group of tasks."""

    group: str
    series: dict  # {name: [`scaling_laws.Arm`]}, smallest first
    noise: float | None  # see `scaling_laws.noise_of`


def grids(study):
    """[`Grid`], one per group of tasks, of a `studies.Study`; arms with fewer than two budgets are left out, and series
    without any. [] for a study without series."""
    found = []
    for group in {"all": None, **study.summary.group_tasks} if study.summary.series else {}:
        series = {}
        for name, arms in study.summary.series.items():
            made = [arm for arm in (arm_of(study, arm, group) for arm in arms) if arm is not None]
            if made:
                series[name] = made
        if series:
            noise = laws.noise_of([arm for arms in series.values() for arm in arms])
            found.append(Grid(group, series, noise))
    return found


def arm_of(study, arm, group):
    """`scaling_laws.Arm` of the runs of an arm; None with fewer than two budgets."""
    runs = study.runs[study.runs["arm"] == arm]
    if runs["training_samples"].nunique() < MIN_BUDGETS:
        return None
    losses = study.losses(runs, group)
    if losses is None:
        return None
    return laws.make_arm(arm, runs["training_flops"], runs["training_samples"], losses)


def tables(study):
    """[`Table`]: laws, best sizes at equal FLOPs, crossings; without rows where the runs do not reach."""
    found = grids(study)
    if not found:
        return []
    return [exponents(study, found), best_sizes(study, found), crossings(study, found)]


def exponents(study, found):
    """Table of the power law of every arm."""
    rows = []
    for grid in found:
        for name, arms in grid.series.items():
            for arm in arms:
                law = laws.power_law(arm)
                losses, tflops = np.exp(arm.log_loss), np.exp(arm.log_flops) / 1e12
                interval = law.interval
                falls = "–" if interval is None else "falls" if interval[0] > 0 else "undecided"
                error = np.sqrt(np.mean(law.residuals**2))
                rows.append(
                    [
                        NAMES.get(grid.group, grid.group),
                        name,
                        arm.name,
                        (str(int(arm.num_runs.sum())), int(arm.num_runs.sum())),
                        number(np.exp(arm.log_size) / 1e6, 0),
                        (f"{tflops[0]:.3g} to {tflops[-1]:.3g}", tflops[-1]),
                        (f"{losses[0]:.3f} to {losses[-1]:.3f}", losses[-1]),
                        exponent_cell(law),
                        (f"{error:.0%}", error),
                        falls,
                    ]
                )
    columns = ["tasks", "series", "arm", "runs", "MFLOP per sample", "TFLOP", "loss", "exponent b", "error", "verdict"]
    title = f"Power laws of study {study.name}"
    return Table(f"study_{study.name}_laws", title, columns, rows, EXPONENT_NOTE, strong=[7])


def exponent_cell(law):
    text = f"{law.exponent:.2f}"
    if law.interval:
        text += f" [{law.interval[0]:.2f}, {law.interval[1]:.2f}]"
    return (text.replace("-", "−"), law.exponent)


def best_sizes(study, found):
    """Table of the best size of every series at equal training FLOPs."""
    rows = []
    for grid in found:
        for name, arms in grid.series.items():
            if len(arms) < 2 or grid.noise is None:
                continue
            for entry in laws.optima(arms, grid.noise):
                size = MISSING
                if entry.size is not None:
                    text = f"{entry.size / 1e6:.0f}"
                    if entry.interval:
                        text += f" [{entry.interval[0] / 1e6:.0f}, {entry.interval[1] / 1e6:.0f}]"
                    size = (text, entry.size)
                rows.append(
                    [
                        NAMES.get(grid.group, grid.group),
                        name,
                        (f"{entry.flops / 1e12:.3g}", entry.flops),
                        ", ".join(f"{loss:.3f}" for loss in entry.losses),
                        entry.best,
                        (f"{entry.share:.0%}", entry.share),
                        size,
                        entry.best if entry.is_decided else "undecided",
                    ]
                )
    columns = ["tasks", "series", "TFLOP", "losses, smallest size first", "lowest", "in draws"]
    columns += ["minimum, MFLOP per sample", "verdict"]
    note = (
        "Equal training FLOPs: the losses of all sizes at a compute budget, read off between the budgets that were "
        "run, and the minimum of the parabola through them (– : not between the smallest and the largest size). In "
        f"draws: how often the same size stays the best when every loss gets noise of the spread around the laws "
        f"({noise_text(found)}); decided from {laws.LEVEL:.0%}."
    )
    return Table(f"study_{study.name}_sizes", f"Best size at equal FLOPs in study {study.name}", columns, rows, note)


def crossings(study, found):
    """Table of the order of the first series and each other one over the budgets that both have."""
    rows = []
    for grid in found:
        names = list(grid.series)
        for name in names[1:]:
            if grid.noise is None:
                continue
            entry = laws.crossing((names[0], grid.series[names[0]]), (name, grid.series[name]), grid.noise)
            if entry is None:
                continue
            place = MISSING
            if entry.crossing is not None:
                low, high = (value / 1e12 for value in entry.interval)
                place = (f"{entry.crossing / 1e12:.3g} [{low:.3g}, {high:.3g}]", entry.crossing)
            rows.append(
                [
                    NAMES.get(grid.group, grid.group),
                    f"{entry.first} / {entry.second}",
                    (f"{entry.flops[0] / 1e12:.3g} to {entry.flops[1] / 1e12:.3g}", entry.flops[1]),
                    *(
                        (f"{ratio:.2f} [{low:.2f}, {high:.2f}]", ratio)
                        for ratio, (low, high) in zip(entry.ratios, entry.intervals, strict=True)
                    ),
                    place,
                    entry.verdict,
                ]
            )
    columns = ["tasks", "series", "TFLOP", "loss ratio, lowest budget", "highest budget", "crossing, TFLOP", "verdict"]
    note = (
        "The lowest loss of each series over its sizes, at the compute budgets that both were trained with: ratio of "
        f"the first to the second [95% of draws, with noise of {noise_text(found)}]. A crossing is stated if the order "
        "at both ends is certain and not the same. Nothing is extrapolated."
    )
    return Table(f"study_{study.name}_crossings", f"Crossings in study {study.name}", columns, rows, note)


def noise_text(found):
    return ", ".join(
        f"{NAMES.get(grid.group, grid.group)} {grid.noise:.0%}" for grid in found if grid.noise is not None
    )


def figure(study):
    """(draw, width, height): loss of every arm over training FLOPs, a panel per group of tasks; None without arms of
    two budgets."""
    found = grids(study)
    if not found:
        return None

    def draw(canvas, ink):
        panels = np.atleast_1d(canvas.subplots(len(found), 1, sharex=True))
        for axes, grid in zip(panels, found, strict=True):
            for line, arms in enumerate(grid.series.values()):
                for place, arm in enumerate(arms):
                    axes.plot(
                        np.exp(arm.log_flops) / 1e12,
                        np.exp(arm.log_loss),
                        label=arm.name,
                        color=COLOURS[line % len(COLOURS)],
                        marker=MARKERS[place % len(MARKERS)],
                        markersize=5,
                        linewidth=0.8 + 0.7 * place,
                        alpha=0.9,
                    )
            axes.set_title(NAMES.get(grid.group, grid.group), fontsize=10, loc="left")
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_ylabel("loss, nats per token")
            axes.yaxis.set_major_locator(ticks())
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_formatter("")
            axes.grid(which="both", linewidth=0.5)
            axes.set_axisbelow(True)
        panels[-1].xaxis.set_major_locator(ticks())
        panels[-1].xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panels[-1].xaxis.set_minor_formatter("")
        panels[-1].set_xlabel("training TFLOP")
        columns = max(len(grid.series) for grid in found)
        canvas.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=columns)

    return draw, 6.2, 0.9 + 2.3 * len(found)


def ticks():
    return LogLocator(subs=(1, 2, 5))


CAPTION = (
    "Loss of every arm of the grid over its training FLOPs, by group of tasks",
    "Held-out clips, autoregressive mode; both axes logarithmic. A colour per series, a marker per size; thicker lines "
    "are larger networks.",
)
