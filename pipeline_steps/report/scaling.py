"""The scaling grid of a study on the page and in its README: laws, best sizes, crossings, and the figure of all runs.

A study names its series in conf/study (`series`); pipeline_steps.report.scaling_laws fits them, by group of tasks.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.ticker import LogLocator

from pipeline_steps.common.errors import UserError
from pipeline_steps.report import scaling_laws as laws
from pipeline_steps.report.studies import SEEDS, SHORT_NAMES
from pipeline_steps.report.study_figures import COLOURS
from pipeline_steps.report.tables import MISSING, Table, number

MARKERS = "osD^v"
BY_SEED = (
    "Every law, minimum and ratio is computed seed by seed; brackets: 95% t-intervals over the seeds, not corrected "
    "for the number of rows. With fewer than three seeds nothing is decided"
)
STRAIGHT = (
    "Losses are read off on straight lines between the budgets that were run; a difference counts beyond what the "
    "bends of the measured laws may add to it, so at least three budgets are needed"
)
LAWS_NOTE = (
    "Loss = a × (training FLOPs)^−b over the budgets of one size, least squares in logarithms; an arm's FLOPs are "
    "proportional to its samples, so b is the same in samples. Error: root mean square of the loss around its law. "
    f"{BY_SEED}; the interval of a single seed is the line's, over its budgets, and says nothing about other seeds."
)
SIZES_NOTE = (
    "Equal training FLOPs: the losses of the sizes, and the minimum of the parabola through them (–: not between the "
    "smallest and the largest size for every seed). Best size: its loss is below every other's by the intervals of the "
    f"differences. {STRAIGHT}. {BY_SEED}."
)
CROSSINGS_NOTE = (
    "Arms in the same place of two series, over the training FLOPs that both were trained with: ratio of the first's "
    "loss to the second's. A crossing is stated if the order at both ends is clear by the intervals and not the same, "
    f"and changes once for every seed. Nothing is extrapolated. {STRAIGHT}. {BY_SEED}."
)
CAPTION = (
    "Loss of every arm of the grid over its training FLOPs, by group of tasks",
    "Held-out clips, autoregressive mode; both axes logarithmic. Lines: means of the seeds that have all budgets; "
    "small points: their runs. A colour per series, a marker per size; thicker lines come later in the series.",
)


@dataclass(frozen=True)
class Grid:
    """What a study's series say in one group of tasks."""

    group: str
    series: dict[str, list]  # {name: [`scaling_laws.Arm`, or None where runs are missing]}, as in the study
    left_out: dict[str, int]  # {arm: runs that are not part of its complete grid of seeds and budgets}
    absent: list[str]  # arms without two budgets


def grids(study):
    """[`Grid`] of a `studies.Study`, one per group of tasks; [] for a study without series. UserError for runs without
    a loss."""
    groups = {"all": None, **study.summary.group_tasks} if study.summary.series else {}
    found = []
    for group in groups:
        series, left_out, absent = {}, {}, []
        for entry in study.summary.series:
            made = {arm: arm_of(study, arm, group) for arm in entry.arms}
            series[entry.name] = [arm for arm, _ in made.values()]
            left_out |= {name: count for name, (arm, count) in made.items() if count and arm}
            absent += [name for name, (arm, _) in made.items() if arm is None]
        found.append(Grid(group, series, left_out, absent))
    return found


def arm_of(study, arm, group):
    """What `scaling_laws.make_arm` returns of the runs of an arm. UserError for a run without a loss."""
    runs = study.runs[study.runs["arm"] == arm]
    losses = study.losses(runs, group)
    if losses is None:
        raise UserError(
            f"reports/study/{study.name}/items.parquet: missing, so there is no loss of tasks that "
            f"{group_name(group)}. Delete runs.csv beside it, too, and run the study again"
        )
    table = pd.DataFrame(
        {
            "seed": runs[SEEDS].astype(str).agg(".".join, axis=1) if len(runs) else [],
            "budget": runs["budget"],
            "flops": runs["training_flops"],
            "samples": runs["training_samples"],
            "loss": losses,
        }
    )
    try:
        return laws.make_arm(arm, table)
    except ValueError as error:
        raise UserError(
            f"reports/study/{study.name}: {group_name(group)}: {error}. Delete the row in runs.csv and run the study "
            "again"
        ) from None


def group_name(group):
    return SHORT_NAMES.get(group, group)


def tables(study):
    """[`Table`]: laws, best sizes at equal FLOPs, crossings; without rows where the runs do not reach. [] for a study
    without series."""
    found = grids(study)
    return [exponents(study, found), best_sizes(study, found), crossings(study, found)] if found else []


def exponents(study, found):
    """Table of the power law of every arm."""
    rows = []
    for grid in found:
        for name, arms in grid.series.items():
            for arm in filter(None, arms):
                law = laws.power_law(arm)
                flops, losses = np.exp(arm.log_flops.mean(axis=0)), np.exp(arm.log_loss.mean(axis=0))
                rows.append(
                    [
                        group_name(grid.group),
                        name,
                        arm.name,
                        f"{len(arm.seeds)} × {len(flops)}",
                        number(np.exp(arm.log_size) / 1e6, 0),
                        (f"{tflop(flops[0])} to {tflop(flops[-1])}", flops[-1]),
                        (f"{losses[0]:.3f} to {losses[-1]:.3f}", losses[-1]),
                        cell(law.exponent, law.interval, ".2f"),
                        (f"{law.error:.0%}", law.error),
                        law.verdict,
                    ]
                )
    columns = ["tasks", "series", "arm", "seeds × budgets", "MFLOP per sample", "TFLOP", "loss", "exponent b", "error"]
    note = LAWS_NOTE + omissions(found)
    title = f"Power laws of study {study.name}"
    return Table(f"study_{study.name}_laws", title, [*columns, "verdict"], rows, note, strong=[7])


def omissions(found):
    """A sentence on the runs and arms that are left out, or ""."""
    parts = [f"{arm} {count}" for arm, count in found[0].left_out.items()]
    text = f" Left out because other seeds or budgets are missing: runs of {', '.join(parts)}." if parts else ""
    return text + (f" Without runs at two budgets: {', '.join(found[0].absent)}." if found[0].absent else "")


def present(grid):
    return [arm for arms in grid.series.values() for arm in arms if arm is not None]


def tflop(flops):
    """FLOPs as a number of TFLOP with three digits, such as 0.52, 12.3 or 160000."""
    return np.format_float_positional(flops / 1e12, precision=3, unique=False, fractional=False, trim="-")


def cell(value, interval, form, factor=1.0):
    """A number with its interval, as a cell."""
    text = format(value * factor, form)
    if interval:
        text += f" [{', '.join(format(border * factor, form) for border in interval)}]"
    return (text.replace("-", "−"), value)


def best_sizes(study, found):
    """Table of the sizes of every series at equal training FLOPs."""
    rows = []
    for grid in found:
        for name, arms in grid.series.items():
            for entry in laws.best_sizes([arm for arm in arms if arm is not None]):
                rows.append(
                    [
                        group_name(grid.group),
                        name,
                        (str(entry.num_seeds), entry.num_seeds),
                        (tflop(entry.flops), entry.flops),
                        ", ".join(f"{arm} {loss:.3f}" for arm, loss in entry.losses.items()),
                        MISSING if entry.size is None else cell(entry.size, entry.interval, ".0f", 1e-6),
                        entry.verdict,
                    ]
                )
    columns = ["tasks", "series", "seeds", "TFLOP", "loss", "minimum, MFLOP per sample", "best size"]
    title = f"Sizes at equal FLOPs in study {study.name}"
    return Table(f"study_{study.name}_sizes", title, columns, rows, SIZES_NOTE + omissions(found))


def crossings(study, found):
    """Table of the order of the first series' arms and those of each other one, over the budgets that both have."""
    rows, apart = [], {}
    for grid in found:
        first, *others = grid.series.values()
        for pair in (pair for arms in others for pair in zip(first, arms, strict=True) if None not in pair):
            names = " / ".join(arm.name for arm in pair)
            entry = laws.crossing(*pair)
            if entry is None:
                apart[names] = None
            else:
                place = MISSING
                if entry.crossing is not None:
                    low, high = map(tflop, entry.interval)
                    place = (f"{tflop(entry.crossing)} [{low}, {high}]", entry.crossing)
                rows.append(
                    [
                        group_name(grid.group),
                        names,
                        (str(entry.num_seeds), entry.num_seeds),
                        (f"{tflop(entry.flops[0])} to {tflop(entry.flops[1])}", entry.flops[1]),
                        *(
                            cell(ratio, interval, ".2f")
                            for ratio, interval in zip(entry.ratios, entry.intervals, strict=True)
                        ),
                        place,
                        entry.verdict,
                    ]
                )
    columns = [
        "tasks",
        "arms",
        "seeds",
        "TFLOP",
        "loss ratio, fewest FLOPs",
        "most FLOPs",
        "crossing, TFLOP",
        "verdict",
    ]
    note = CROSSINGS_NOTE + (f" Without a common seed or common FLOPs: {', '.join(apart)}." if apart else "")
    title = f"Crossings in study {study.name}"
    return Table(f"study_{study.name}_crossings", title, columns, rows, note + omissions(found))


def figure(study):
    """(draw, width, height): loss of every arm over training FLOPs, a panel per group of tasks; None without arms of
    two budgets."""
    found = [grid for grid in grids(study) if present(grid)]
    if not found:
        return None

    def draw(canvas, ink):
        panels = np.atleast_1d(canvas.subplots(len(found), 1, sharex=True))
        for axes, grid in zip(panels, found, strict=True):
            for line, arms in enumerate(grid.series.values()):
                for place, arm in enumerate(arms):
                    if arm is None:
                        continue
                    style = {"color": COLOURS[line % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}
                    mean = [np.exp(values.mean(axis=0)) for values in (arm.log_flops, arm.log_loss)]
                    axes.plot(mean[0] / 1e12, mean[1], label=arm.name, linewidth=0.8 + 0.7 * place, ms=5, **style)
                    if len(arm.seeds) > 1:
                        runs = [np.exp(values).ravel() for values in (arm.log_flops, arm.log_loss)]
                        axes.scatter(runs[0] / 1e12, runs[1], s=9, alpha=0.6, linewidths=0, **style)
            axes.set_title(group_name(grid.group), fontsize=10, loc="left")
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_ylabel("loss, nats per token")
            axes.grid(which="both", linewidth=0.5)
            axes.set_axisbelow(True)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.set_major_formatter(lambda value, _: f"{value:g}")
                axis.set_minor_formatter("")
        panels[-1].set_xlabel("training TFLOP")
        columns = max(len(grid.series) for grid in found)
        canvas.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=columns)

    return draw, 6.2, 0.9 + 2.3 * len(found)
