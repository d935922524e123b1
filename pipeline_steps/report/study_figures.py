"""Studies on the page: figures in which every run, or every pair of runs, is a point."""

import numpy as np

from pipeline_steps.report import studies, study_tables

COLOURS = ("#2f80ed", "#d97706", "#12a594", "#b05cc6", "#8b95a3", "#e05252", "#a18a00", "#8d6e5a")


def forest(comparisons, margin):
    """(draw, width, height): the differences of `ComparisonResult`s with every pair, mean and intervals; or None."""
    groups = list(dict.fromkeys(entry.group for entry in comparisons))
    entries = sorted(comparisons, key=lambda entry: groups.index(entry.group))[::-1]  # bottom first
    if not entries:
        return None
    names = list(dict.fromkeys(entry.arm.partition(", ")[0] for entry in comparisons))

    def draw(figure, ink):
        axes = figure.subplots()
        for row, entry in enumerate(entries):
            values, colour = (
                100 * np.array(entry.differences),
                COLOURS[(1 + names.index(entry.arm.partition(", ")[0])) % len(COLOURS)],
            )
            offsets = np.linspace(-0.2, 0.2, len(values)) if len(values) > 1 else np.zeros(1)
            axes.hlines(row, *(100 * value for value in entry.bounded_interval), color=ink, linewidth=0.8)
            if entry.interval:
                axes.hlines(row, *(100 * value for value in entry.interval), color=ink, linewidth=2.8)
            axes.plot([values.mean()], [row], marker="|", color=ink, markersize=16, markeredgewidth=2)
            axes.scatter(values, row + offsets, s=22, color=colour, alpha=0.85, linewidths=0, zorder=3)
        axes.axvspan(-100 * margin, 100 * margin, color=ink, alpha=0.12, linewidth=0)
        axes.axvline(0, color=ink, linewidth=0.8)
        axes.set_yticks(range(len(entries)), [*map(forest_label, entries)], fontsize=10)
        axes.set_ylim(-0.6, len(entries) - 0.4)
        axes.set_xlabel("points of token accuracy")
        axes.grid(axis="x", linewidth=0.6)
        axes.set_axisbelow(True)

    return draw, 6.2, 0.9 + 0.68 * len(entries)


def forest_label(entry):
    group = studies.SHORT_NAMES.get(entry.group, entry.group)
    return f"{studies.arm_name(entry.arm)}\n{group}: {study_tables.PILLS.get(entry.verdict, entry.verdict)}"


def points(study, chosen):
    """(draw, width, height): every run of the `ArmResult`s `chosen` that train answers: exact match, and token accuracy
    by group; None without such an arm."""
    if not (chosen := studies.trained_arms(chosen)):
        return None
    groups = list(chosen[0].groups)
    names_of_arms = [studies.label(study.summary, arm).replace(" (", "\n(") for arm in chosen]
    names = ["exact match", *(studies.SHORT_NAMES.get(group, group) for group in groups)]

    def draw(figure, ink):
        panels = figure.subplots(1, len(names), sharey=True)
        for place, (axes, name) in enumerate(zip(panels, names, strict=True)):
            for row, arm in enumerate(chosen):
                values = arm.groups[groups[place - 1]] if place else [v for v in arm.exact_match if v is not None]
                offsets = np.linspace(-0.25, 0.25, len(values)) if len(values) > 1 else np.zeros(len(values))
                colour = COLOURS[row % len(COLOURS)]
                axes.scatter(100 * np.array(values), row + offsets, s=20, color=colour, alpha=0.85, linewidths=0)
                if values:
                    axes.vlines(100 * np.mean(values), row - 0.36, row + 0.36, color=ink, linewidth=1.6)
            if place:
                axes.axvline(100 * study.summary.plateau, color=ink, linewidth=0.9, linestyle=":")
            axes.set_title(name, fontsize=9)
            axes.set_xlim(-4, 104)
            axes.set_xticks((0, 50, 100))
            for label, side in zip(axes.get_xticklabels(), ("left", "center", "right"), strict=True):
                label.set_horizontalalignment(side)  # inside its panel, apart from the next one's
            axes.grid(axis="x", linewidth=0.6)
            axes.set_axisbelow(True)
        panels[0].set_yticks(range(len(chosen)), names_of_arms, fontsize=10)
        panels[0].set_ylim(len(chosen) - 0.4, -0.6)
        figure.supxlabel("accuracy, %: whole answers (left), tokens (others)", fontsize=11)

    return draw, 6.2, 1.1 + (0.8 if len(chosen) <= 4 else 0.46) * len(chosen)


CAPTIONS = {
    "points": (
        "Accuracy of every run of the study, by arm",
        "Every run is a point, the line is the mean of the arm. Dotted: token accuracy from which a run counts as "
        "having left the plateau.",
    ),
    "forest": (
        "Differences between the baseline and the other arms of the study, pair by pair",
        "Baseline (in most studies one planned token) minus the other arm: right of 0 the baseline is better. A point "
        "is a pair of runs with equal seeds; tick and thick line: mean and 95% t-interval; thin line: 95% interval for "
        "any distribution. Grey: differences that count as none.",
    ),
}
