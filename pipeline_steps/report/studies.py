"""Studies on the page: verdicts over training runs, arms and a figure with every run, from reports/study."""

import numpy as np

from pipeline_steps.common.metrics import read_json
from pipeline_steps.common.study_results import BETTER, EQUAL, EXPLORATORY, UNDECIDED, UNMATCHED, WORSE, StudySummary
from pipeline_steps.report.tables import MISSING, Table, number

GROUP_NAMES = {"gaze": "tasks that need a gaze", "reading": "tasks that read the whole frame", "all": "all tasks"}
ARM_NAMES = {"none": "default recipe", "A6": "static query (A6)", "B1": "sixteen tokens (B1)"}
PILLS = {BETTER: "better", EQUAL: "equal", WORSE: "worse", UNDECIDED: "undecided", UNMATCHED: "not comparable"}
COLOURS = ("#2f80ed", "#d97706", "#12a594", "#b05cc6", "#8b95a3")


def read_studies(folder):
    """`StudySummary` of every study in reports/study, by name. UserError for a file that does not match."""
    paths = sorted(folder.glob("*/summary.json"))
    return [
        read_json(path, StudySummary, f"python -m pipeline_steps.study.summary {path.parent.name}") for path in paths
    ]


def cards(study):
    """One verdict per comparison: status, title and a sentence."""
    return [
        {
            "status": PILLS[entry.verdict],
            "question": f"{arm_name(entry.baseline)} against {arm_name(entry.arm)}: {group_name(entry.group)}",
            "statement": statement(entry),
        }
        for entry in study.comparisons
        if entry.verdict != EXPLORATORY
    ]


def statement(entry):
    """The effect with its interval and what it holds for."""
    count, mean = len(entry.differences), 100 * float(np.mean(entry.differences))
    text = f"{mean:+.1f} points of token accuracy"
    if entry.interval:
        text += " [{:+.1f}, {:+.1f}]".format(*(100 * value for value in entry.interval))
    text += f" over {count} pair{'s' * (count > 1)} of runs, p = {entry.p_adjusted:.3f} (sign flips, Holm)"
    text += f", at equal training {entry.matched}." if entry.matched else "; the training budgets differ."
    if entry.num_not_converged:
        text += f" The validation loss of {entry.num_not_converged} of the {2 * count} runs was still falling."
    return text


def arm_name(name):
    return ARM_NAMES.get(name, name)


def group_name(name):
    return GROUP_NAMES.get(name, name)


def arms(study):
    """Table of the arms: mean, lowest and highest run."""
    groups = list(study.arms[0].groups)
    rows = []
    for arm in study.arms:
        values = [spread(arm.groups[group]) for group in groups]
        exact = [value for value in arm.exact_match if value is not None]
        rows.append(
            [
                arm_name(arm.arm),
                arm.budget,
                (str(len(arm.seeds)), len(arm.seeds)),
                *values,
                spread(exact) if exact else ("–", None),
                (f"{arm.num_above_plateau} of {len(arm.seeds)}", arm.num_above_plateau),
                (f"{arm.num_converged} of {arm.num_measured}", arm.num_converged),
                number(arm.training_flops / 1e12, 1),
                MISSING if arm.training_seconds is None else number(arm.training_seconds / 60, 1),
            ]
        )
    plateau = f"above {100 * study.plateau:.0f} %"
    columns = ["arm", "budget", "runs", *(f"{group}, %" for group in groups), "exact match, %", plateau]
    note = (
        f"{study.question} {study.num_runs} of {study.num_planned} runs. Token accuracy (teacher-forced) and exact "
        "match of generated answers, autoregressive mode, held-out clips: mean [lowest–highest run]. Every run has its "
        "own seed of training, backbones and data. Converged: the validation loss fell by less than 1 % over the last "
        "quarter of stage 3."
    )
    columns += ["converged", "training TFLOP", "minutes"]
    return Table(f"study_{study.name}", f"Study {study.name}", columns, rows, note, strong=[3])


def spread(values):
    """Mean with the lowest and the highest value, in per cent, as a cell."""
    low, mean, high = (100 * value for value in (min(values), float(np.mean(values)), max(values)))
    return (f"{mean:.1f} [{low:.0f}–{high:.0f}]", mean)


def forest(study):
    """(draw, width, height): differences per comparison, every pair as a point, mean and interval; or None."""
    entries = study.comparisons
    if not entries:
        return None

    def draw(figure, ink):
        axes = figure.subplots()
        for row, entry in enumerate(reversed(entries)):
            values, colour = (
                100 * np.array(entry.differences),
                COLOURS[len(entries) - 1 - row if len(entries) <= 5 else 0],
            )
            offsets = np.linspace(-0.18, 0.18, len(values)) if len(values) > 1 else np.zeros(1)
            axes.scatter(values, row + offsets, s=16, color=colour, alpha=0.7, linewidths=0)
            axes.hlines(row, *(100 * value for value in entry.bounded_interval), color=ink, linewidth=0.8)
            if entry.interval:
                axes.hlines(row, *(100 * value for value in entry.interval), color=ink, linewidth=2.4)
            axes.plot([values.mean()], [row], marker="|", color=ink, markersize=14, markeredgewidth=2)
        axes.axvspan(-100 * study.margin, 100 * study.margin, color=ink, alpha=0.1, linewidth=0)
        axes.axvline(0, color=ink, linewidth=0.8)
        labels = [f"{arm_name(entry.arm)}\n{group_name(entry.group)}" for entry in reversed(entries)]
        axes.set_yticks(range(len(entries)), labels)
        axes.set_ylim(-0.6, len(entries) - 0.4)
        axes.set_xlabel("baseline minus arm, points of token accuracy")
        axes.grid(axis="x", linewidth=0.6)
        axes.set_axisbelow(True)

    return draw, 6.2, 1.2 + 0.62 * len(entries)


def points(study):
    """(draw, width, height): every run of every arm, by group of tasks and exact match."""
    groups = list(study.arms[0].groups)

    def draw(figure, ink):
        axes = figure.subplots()
        width = 0.8 / len(study.arms)
        for index, arm in enumerate(study.arms):
            colour, shift = COLOURS[index % len(COLOURS)], (index - (len(study.arms) - 1) / 2) * width
            columns = [*(arm.groups[group] for group in groups), [v for v in arm.exact_match if v is not None]]
            for place, values in enumerate(columns):
                offsets = np.linspace(-0.3, 0.3, len(values)) * width if len(values) > 1 else np.zeros(len(values))
                label = f"{arm_name(arm.arm)}{'' if len({a.budget for a in study.arms}) == 1 else ', ' + arm.budget}"
                axes.scatter(
                    place + shift + offsets,
                    100 * np.array(values),
                    s=20,
                    color=colour,
                    alpha=0.75,
                    linewidths=0,
                    label=label if place == 0 else None,
                )
                if values:
                    axes.hlines(
                        100 * np.mean(values), place + shift - width * 0.4, place + shift + width * 0.4, color=ink
                    )
        axes.axhline(100 * study.plateau, color=ink, linewidth=0.8, linestyle=":")
        axes.set_xticks(range(len(groups) + 1), [*groups, "exact match"])
        axes.set_ylim(0, 102)
        axes.set_ylabel("accuracy, %")
        axes.grid(axis="y", linewidth=0.6)
        axes.set_axisbelow(True)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=min(len(study.arms), 3))

    return draw, 6.2, 3.8


CAPTIONS = {
    "points": (
        "Accuracy of every run of the study, by arm",
        "Every run is a point, the line is the mean of the arm; dotted: the level from which a run counts as having "
        "left the plateau.",
    ),
    "forest": (
        "Differences between the default recipe and the other arms of the study, pair by pair",
        "Every pair of runs with equal seeds is a point; tick and thick line: mean and 95 % t-interval; "
        "thin line: 95 % interval for any distribution. Grey band: differences that count as none.",
    ),
}
