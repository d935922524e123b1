"""Figures as deterministic SVG, each in a light and a dark theme with transparent background."""

import io

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np

from pipeline_steps.common.modes import GAZE_MODES, SCORED_MODES
from pipeline_steps.common.names import without_math
from pipeline_steps.report.tables import COMPONENT_NAMES, MODE_NAMES, ordered_arms

WIDTH = 6.2  # inches: legible when shrunk to a phone
INK = {"light": "#1f2933", "dark": "#e6e9ee"}
FAINT = {"light": "#c9d0d8", "dark": "#414a55"}
COLOURS = {  # distinct for colour-blind readers, legible on white and on black
    "autoregressive": "#2f80ed",
    "fine": "#12a594",
    "coarse": "#8b95a3",
    "blind": "#d97706",
    "random_query": "#b05cc6",
}
MARKERS = {"autoregressive": "o", "fine": "D", "coarse": "s", "blind": "X", "random_query": "^"}
COMPONENT_COLOURS = ["#2f80ed", "#7cc4fa", "#12a594", "#a3d977", "#d97706", "#b05cc6"]
STYLE = {
    "svg.hashsalt": "report",
    "svg.fonttype": "path",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def svg(draw, width, height):
    """{theme: SVG text} of draw(figure, ink), drawn in the light theme; in the dark one ink and lines change colour."""
    ink, faint = INK["light"], FAINT["light"]
    colours = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), ink)
    with matplotlib.rc_context({**STYLE, **colours, "axes.edgecolor": faint, "grid.color": faint}):
        figure = plt.figure(figsize=(width, height))
        draw(figure, ink)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        plt.close(figure)
    light = buffer.getvalue()
    return {"light": light, "dark": light.replace(ink, INK["dark"]).replace(faint, FAINT["dark"])}


def tasks(result):
    """(draw, width, height): accuracy by task and mode with intervals, and chance."""
    names = list(result.tasks)

    def draw(figure, ink):
        axes = figure.subplots()
        for offset, mode in enumerate(reversed(SCORED_MODES)):
            scores = [result.tasks[name][mode] for name in names]
            y = np.arange(len(names)) + (2 - offset) * -0.14
            values = np.array([score.accuracy for score in scores])
            low, high = np.array([score.accuracy_interval for score in scores]).T
            errors = np.abs(np.array([values - low, high - values]))
            axes.errorbar(
                values,
                y,
                xerr=errors,
                fmt=MARKERS[mode],
                color=COLOURS[mode],
                label=MODE_NAMES[mode],
                markersize=6,
                elinewidth=1.4,
            )
        for row, name in enumerate(names):
            if result.chance.get(name) is not None:
                label = "chance" if row == 0 else None
                axes.plot(
                    [result.chance[name]] * 2,
                    [row - 0.42, row + 0.42],
                    color=ink,
                    linewidth=1.4,
                    linestyle=":",
                    label=label,
                )
        axes.set_yticks(range(len(names)), list(map(without_math, names)))
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(-0.01, 1.01)
        axes.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
        axes.set_xlabel("accuracy on held-out items")
        axes.grid(axis="x", linewidth=0.6)
        axes.set_axisbelow(True)
        handles, labels = axes.get_legend_handles_labels()
        order = [labels.index(MODE_NAMES[mode]) for mode in SCORED_MODES] + [
            i for i, label in enumerate(labels) if label == "chance"
        ]
        figure.legend([handles[i] for i in order], [labels[i] for i in order], loc="outside upper center", ncols=3)

    return draw, WIDTH, 1.4 + 0.75 * len(names)


def gaze(result):
    """(draw, width, height) of peak-on-target per task and per frame position, or None without ground truth."""
    names = list(result.gaze)
    if not names:
        return None

    def draw(figure, ink):
        left, right = figure.subplots(2, 1, height_ratios=[len(names) + 1, 3])
        for offset, mode in enumerate(GAZE_MODES):
            shown = [(row, result.gaze[name][mode]) for row, name in enumerate(names) if mode in result.gaze[name]]
            if not shown:
                continue
            y = np.array([row for row, _ in shown]) + (offset - 1) * 0.2
            values = np.array([entry.peak_on_target for _, entry in shown])
            low, high = np.array([entry.peak_on_target_interval for _, entry in shown]).T
            errors = np.abs(np.array([values - low, high - values]))
            left.errorbar(
                values, y, xerr=errors, fmt=MARKERS[mode], color=COLOURS[mode], label=mode, markersize=6, elinewidth=1.4
            )
            tracks = [entry.per_frame for _, entry in shown]
            longest = max(map(len, tracks))
            padded = np.array(
                [[*(np.nan if v is None else v for v in track), *[np.nan] * (longest - len(track))] for track in tracks]
            )
            frames = np.flatnonzero(~np.isnan(padded).all(0))
            right.plot(
                frames, np.nanmean(padded[:, frames], axis=0), marker=MARKERS[mode], color=COLOURS[mode], markersize=5
            )
        for row, name in enumerate(names):
            entry = next(iter(result.gaze[name].values()))
            for value, style, label in (
                (entry.chance, ":", "chance, any patch"),
                (entry.chance_among_objects, "--", "chance, any object"),
            ):
                shown = label if row == 0 else None
                left.plot([value] * 2, [row - 0.42, row + 0.42], color=ink, linestyle=style, linewidth=1.3, label=shown)
        left.set_yticks(range(len(names)), list(map(without_math, names)))
        left.set_ylim(len(names) - 0.5, -0.5)
        left.set_xlim(-0.01, 1.01)
        right.set_ylim(-0.02, 1.02)
        left.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
        right.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
        right.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        left.set_xlabel("frames whose attention peak is on the target")
        right.set_xlabel("frame (mean of the tasks)")
        for axes in (left, right):
            axes.grid(axis="both" if axes is right else "x", linewidth=0.6)
            axes.set_axisbelow(True)
        figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=3)

    return draw, WIDTH, 3.8 + 0.55 * len(names)


def flops(result):
    """(draw, width, height): FLOPs by component for modes and arms, and over the number of frames."""
    arms = ordered_arms(result)

    def draw(figure, ink):
        left, right = figure.subplots(2, 1, height_ratios=[1.1, 1])
        entries = [(mode, result.modes[mode]) for mode in GAZE_MODES] + [(name, result.arms[name]) for name in arms]
        names = [*GAZE_MODES, *(f"arm: {name.split('_')[0]}" for name in arms)]
        bottom = np.zeros(len(entries))
        for (component, label), colour in zip(COMPONENT_NAMES.items(), COMPONENT_COLOURS, strict=True):
            values = np.array([getattr(entry.components, component) for _, entry in entries]) / 1e6
            left.barh(range(len(entries)), values, left=bottom, color=colour, label=label, height=0.68)
            bottom += values
        left.set_yticks(range(len(entries)), names)
        left.invert_yaxis()
        left.set_xlabel("MFLOP per sample")
        for name, colour, marker in zip(arms, ("#2f80ed", "#8b95a3", "#d97706"), "os^", strict=True):
            totals = np.array(result.curves[name]) / 1e6
            right.plot(
                result.curves["num_frames"], totals, marker + "-", color=colour, markersize=4, label=name.split("_")[0]
            )
        right.set_xscale("log", base=2)
        right.set_yscale("log")
        right.set_xticks(result.curves["num_frames"], [f"{count:.0f}" for count in result.curves["num_frames"]])
        right.yaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
        right.set_xlabel("frames")
        right.set_ylabel("MFLOP per sample")
        right.legend(fontsize=9)
        for axes in (left, right):
            axes.grid(axis="both" if axes is right else "x", linewidth=0.6)
            axes.set_axisbelow(True)
        figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=3)

    return draw, WIDTH, 6.4
