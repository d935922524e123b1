"""Studies on the page: verdicts over training runs, arms, tasks and figures with every run, from reports/study."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline_steps.common.errors import UserError
from pipeline_steps.common.metrics import read_json
from pipeline_steps.common.study_results import (
    BETTER,
    EQUAL,
    EXPLORATORY,
    SEEDS,
    UNDECIDED,
    UNMATCHED,
    WORSE,
    StudySummary,
)
from pipeline_steps.report.budgets import TOLERANCE
from pipeline_steps.report.inputs import read_study_items
from pipeline_steps.report.statistics import equivalence_power, share_interval
from pipeline_steps.report.tables import MISSING, Table, number

HEADLINE_ARMS = ("none", "A6", "B1")
GROUP_NAMES = {"gaze": "tasks that need a gaze", "reading": "tasks that must read everything", "all": "all tasks"}
SHORT_NAMES = {"gaze": "need a gaze", "reading": "read everything", "all": "all tasks"}  # in figures
ARM_NAMES = {"none": "default recipe", "A6": "one static token (A6)", "B1": "sixteen tokens (B1)"}
PILLS = {BETTER: "better", EQUAL: "equal", WORSE: "worse", UNDECIDED: "undecided", UNMATCHED: "not comparable"}
COLOURS = ("#2f80ed", "#d97706", "#12a594", "#b05cc6", "#8b95a3", "#e05252", "#a18a00", "#8d6e5a")


@dataclass(frozen=True, eq=False)
class Study:
    """The files of reports/study/<name>."""

    summary: StudySummary
    runs: pd.DataFrame  # runs.csv
    task_losses: pd.DataFrame | None  # of items.parquet: nats per scored token, a row per run, a column per task
    heatmap: Path | None = None  # heatmap.png, which `python -m benchmarks.natural --keep` adds

    @property
    def name(self):
        return self.summary.name

    def losses(self, runs, group):
        """Mean loss over the tasks of a group, one per row of `runs` (rows of runs.csv); None without per-item results
        of the group. UserError for runs without these."""
        if group == "all":
            return runs["mean_loss"].to_numpy(float)
        tasks = self.summary.group_tasks.get(group)
        if self.task_losses is None or not tasks:
            return None
        if absent := [run for run in runs["run"] if run not in self.task_losses.index]:
            raise UserError(
                f"reports/study/{self.name}: items.parquet has no items of {', '.join(absent[:3])}, which runs.csv "
                "has. Delete their rows and run the study again"
            )
        if lacking := [task for task in tasks if task not in self.task_losses.columns]:
            raise UserError(f"reports/study/{self.name}: items.parquet has no items of task {', '.join(lacking)}")
        return self.task_losses.loc[runs["run"], tasks].mean(axis=1, skipna=False).to_numpy(float)


def read_studies(folder):
    """Every `Study` in reports/study, by name. UserError for a file that does not match or is missing."""
    return [read_study(path.parent) for path in sorted(folder.glob("*/summary.json"))]


def read_study(folder):
    summary = read_json(folder / "summary.json", StudySummary, f"python -m pipeline_steps.study.summary {folder.name}")
    if not (folder / "runs.csv").exists():
        raise UserError(f"{folder / 'runs.csv'}: missing beside summary.json; run `make study name={folder.name}`")
    runs = pd.read_csv(folder / "runs.csv")
    if twice := runs.loc[runs["run"].duplicated(), "run"].tolist():
        raise UserError(f"{folder / 'runs.csv'}: {', '.join(twice[:3])} has two rows. Delete one of them")
    if len(runs) != summary.num_runs:
        raise UserError(
            f"{folder}: runs.csv has {len(runs)} runs, but summary.json is of {summary.num_runs}. "
            f"Run `python -m pipeline_steps.study.summary {folder.name}`"
        )
    heatmap = folder / "heatmap.png"
    return Study(summary, runs, losses_of(folder / "items.parquet"), heatmap if heatmap.exists() else None)


def losses_of(path):
    """Loss per scored token of items.parquet, a row per run and a column per task; None without the file. UserError if
    it is damaged or lacks a column."""
    if not path.exists():
        return None
    items = read_study_items(path, ["run", "task", "num_tokens", "loss_sum"])
    sums = items.groupby(["run", "task"], sort=True)[["loss_sum", "num_tokens"]].sum()
    return (sums["loss_sum"].astype(float) / sums["num_tokens"]).unstack("task")


def headline_of(studies):
    """The study that leads the page: of those with all HEADLINE_ARMS, the one with most replicates of all three, then a
    complete one, then the one with the highest seeds (a later study takes seeds that were never used), then the one
    with most runs. None: there is none."""
    found = [study for study in studies if num_replicates(study)]
    return max(found, key=rank, default=None)


def default_of(studies):
    """The study whose runs of the default recipe are the key figures: of those on the test split, the one with most
    such runs, then the one with the highest seeds. The default may have changed since the headline arms were compared.
    None: there is none."""
    found = [study for study in studies if study.summary.split == "test" and len(default_runs(study))]
    return max(found, key=lambda study: (len(default_runs(study)), *rank(study)[2:]), default=None)


def default_runs(study):
    """Rows of runs.csv of the default recipe, at the study's first budget."""
    runs = study.runs[study.runs["arm"] == HEADLINE_ARMS[0]]
    return runs[runs["budget"] == runs["budget"].iloc[0]] if len(runs) else runs


def rank(study):
    summary = study.summary
    highest = int(study.runs[SEEDS].to_numpy().max())
    return num_replicates(study), summary.num_runs >= summary.num_planned, highest, summary.num_runs, study.name


def num_replicates(study):
    """Number of seeds at which every headline arm has a run at one budget; 0 on another split than test."""
    if study.summary.split != "test":
        return 0
    counts = []
    for _, runs in study.runs.groupby("budget"):
        seeds = [set(map(tuple, runs.loc[runs["arm"] == arm, SEEDS].to_numpy())) for arm in HEADLINE_ARMS]
        counts.append(len(set.intersection(*seeds)))
    return max(counts, default=0)


def leading(study):
    """The comparisons that lead the page: the headline questions about HEADLINE_ARMS, or all about them."""
    own = [entry for entry in study.summary.comparisons if entry.arm.partition(", ")[0] in HEADLINE_ARMS]
    return [entry for entry in own if entry.verdict != EXPLORATORY] or own


def leading_arms(study):
    """The `ArmResult`s that `leading` compares, in the study's order."""
    pairs = [runs for entry in leading(study) for runs in paired_runs(study, entry)]
    used = {name for runs in pairs for name in zip(runs["arm"], runs["budget"], strict=True)}
    return [arm for arm in study.summary.arms if (arm.arm, arm.budget) in used]


def cards(study):
    """One verdict per leading comparison: status, whether it holds for converged runs, title and a sentence."""
    num_questions = sum(entry.verdict != EXPLORATORY for entry in study.summary.comparisons)
    return [
        {
            "status": PILLS[entry.verdict],
            "open": not_converged(entry),
            "question": f"{capital(arm_name(entry.baseline))} against {arm_name(entry.arm)}: {group_name(entry.group)}",
            "statement": statement(study, entry, num_questions),
        }
        for entry in leading(study)
        if entry.verdict != EXPLORATORY
    ]


def capital(text):
    return text[:1].upper() + text[1:]


def not_converged(entry):
    """A note if the validation loss of some runs of a `ComparisonResult` was still falling, else ""."""
    total = 2 * len(entry.differences)
    return f"{entry.num_not_converged} of {total} runs not converged" if entry.num_not_converged else ""


def statement(study, entry, num_questions):
    """The effect with its interval and what it holds for."""
    count = len(entry.differences)
    text = f"{effect_text(entry)} points of token accuracy, {count} pair{'s' * (count > 1)} of runs, "
    text += f"p = {entry.p_adjusted:.3f} (sign flips, Holm for {num_questions} questions), {budget_text(study, entry)}."
    if entry.verdict == UNDECIDED and (power := power_text(entry, study.summary.margin)):
        text += f" {power}"
    return text


def effect_text(entry):
    """Mean difference of a `ComparisonResult` with its t-interval, in points."""
    return interval_text(entry.differences, entry.interval)


def interval_text(values, interval, digits=1):
    """Mean of values with its interval, times 100; interval: None with one value."""
    mean, *borders = (points_text(value, digits) for value in (float(np.mean(values)), *(interval or ())))
    return f"{mean} [{', '.join(borders)}]" if borders else mean


def interval_cell(values, interval, digits=1):
    return (interval_text(values, interval, digits), 100 * float(np.mean(values)))


def points_text(value, digits=1):
    return f"{round(100 * value, digits) + 0.0:+.{digits}f}".replace("-", "−")  # + 0.0: no negative zero


def budget_text(study, entry):
    """What the training budgets of a comparison have in common, and by how much the FLOPs differ."""
    if entry.matched is None:
        return "training budgets differ"
    if entry.matched == "convergence":
        return "both trained until they converged"
    text = f"equal training {entry.matched}"
    ratio = flops_ratio(study, entry)
    if "FLOPs" in entry.matched or ratio is None:
        return text
    return f"{text}, {ratio:.2f} × the training FLOPs for {arm_name(entry.arm.partition(', ')[0])}"


def flops_ratio(study, entry):
    """Training FLOPs of the arm / those of its baseline, means over the paired runs; None without pairs."""
    own, base = paired_runs(study, entry)
    return float(own["training_flops"].mean() / base["training_flops"].mean()) if len(own) else None


def power_text(entry, margin):
    """How likely these runs would have shown two equal arms to be equal, or "" for one pair."""
    power = equivalence_power(entry.differences, margin)
    if power is None:
        return ""
    text = f"With this spread, arms that are the same are called equal (within {100 * margin:.0f} points) in "
    text += f"{power:.0%} of such studies"
    if entry.smallest_margin is not None:
        text += f"; these runs show equality within {100 * entry.smallest_margin:.1f} points"
    return f"{text}."


def paired_runs(study, entry):
    """(runs of the arm, runs of its baseline) with equal seeds, of a `ComparisonResult`: at the same budget or, for an
    arm of equal FLOPs, at the baseline's budget with as many."""
    arm, _, budget = entry.arm.partition(", ")
    runs = study.runs
    own = runs[(runs["arm"] == arm) & ((runs["budget"] == budget) | (not budget))]
    base = runs[runs["arm"] == entry.baseline]
    budgets = own["budget"].unique()
    if base["budget"].isin(budgets).any():
        base = base[base["budget"].isin(budgets)]
    merged = own.merge(base, on=SEEDS, suffixes=("", "_base"))
    if not base["budget"].isin(budgets).any():
        same = (merged["training_flops"] / merged["training_flops_base"] - 1).abs() <= TOLERANCE
        merged = merged[same].drop_duplicates("run")
    by_run = runs.set_index("run", drop=False)
    return by_run.loc[merged["run"]], by_run.loc[merged["run_base"]]


def arm_name(name):
    arm, _, budget = name.partition(", ")
    return ARM_NAMES.get(arm, arm) + (f", {budget_name(budget)}" if budget else "")


def group_name(name):
    return GROUP_NAMES.get(name, name)


def headline_tiles(study):
    """Key figures of the default recipe: name, value, note."""
    runs = default_runs(study)
    count, summary = len(runs), study.summary
    what = f"mean of {count} training runs (study {study.name})"
    tiles = []
    for name, column, meaning in (
        ("Exact match", "exact_match_accuracy", "whole generated answers that are right"),
        ("Token accuracy", "mean_token_accuracy", "answer tokens predicted right, given the tokens before"),
    ):
        values = runs[column].dropna()
        if len(values):
            low, mean, high = 100 * values.min(), 100 * values.mean(), 100 * values.max()
            note = f"{meaning}; {what}, lowest {low:.0f}%, highest {high:.0f}%"
            tiles.append({"name": name, "value": f"{mean:.1f}%", "note": note})
    above = int((runs["mean_token_accuracy"] >= summary.plateau).sum())
    low, high = (100 * border for border in share_interval(above, count))
    note = f"left the plateau: token accuracy of at least {100 * summary.plateau:.0f}%; 95% interval of the share of "
    note += f"such runs: {low:.0f} to {high:.0f}%"
    return [*tiles, {"name": "Runs that learned", "value": f"{above} of {count}", "note": note}]


def arms(study, chosen):
    """Table of the `ArmResult`s `chosen`: mean, lowest and highest run."""
    summary = study.summary
    groups = list(summary.arms[0].groups)
    rows = []
    for arm in chosen:
        trained, exact = arm.answers_trained, [value for value in arm.exact_match if value is not None]
        low, high = share_interval(arm.num_above_plateau, len(arm.seeds))
        rows.append(
            [
                label(summary, arm),
                (str(len(arm.seeds)), len(arm.seeds)),
                spread(exact) if exact and trained else MISSING,
                *(spread(arm.groups[group]) if trained else MISSING for group in groups),
                (
                    f"{arm.num_above_plateau} of {len(arm.seeds)} [{100 * low:.0f}–{100 * high:.0f}%]",
                    arm.num_above_plateau,
                )
                if trained
                else MISSING,
                (f"{arm.num_converged} of {arm.num_measured}", arm.num_converged) if trained else MISSING,
                number(arm.training_flops / 1e12, 1),
                MISSING if arm.training_seconds is None else number(arm.training_seconds / 60, 1),
            ]
        )
    columns = ["arm", "runs", "exact match, %", *(f"token accuracy, {group}, %" for group in groups)]
    columns += [f"runs above {100 * summary.plateau:.0f}%", "converged", "training TFLOP", "minutes"]
    note = (
        f"{summary.question} {summary.num_runs} of {summary.num_planned} runs, {summary.split} split, "
        "autoregressive mode: "
        "mean [lowest–highest run]. Every run has its own seed of training, backbones and data. Exact match: whole "
        "generated answers. Brackets of the runs above the plateau: 95% interval of the share. Converged: the "
        "validation loss fell by less than 1% over the last quarter of stage 3, or rose. Minutes: of training, median."
    )
    if untrained := [label(summary, arm) for arm in chosen if not arm.answers_trained]:
        note += f" Answers not trained, so accuracies are no results: {', '.join(untrained)}; see Ideas."
    return Table(f"study_{study.name}", f"Arms of study {study.name}", columns, rows, note, strong=[2, 3])


def label(summary, arm):
    """Name of an `ArmResult`, with its budget if the study has several."""
    name = arm_name(arm.arm)
    return name if len({entry.budget for entry in summary.arms}) == 1 else f"{name}, {budget_name(arm.budget)}"


def budget_name(budget):
    return budget.replace("equal_flops", "equal FLOPs")


def trained_arms(chosen):
    """Those of the `ArmResult`s whose accuracies are results."""
    return [arm for arm in chosen if arm.answers_trained]


def spread(values):
    """Mean with the lowest and the highest value, in per cent, as a cell."""
    low, mean, high = (100 * value for value in (min(values), float(np.mean(values)), max(values)))
    return (f"{mean:.1f} [{low:.0f}–{high:.0f}]", mean)


def by_task(study, chosen):
    """Table of the token accuracy and the exact match of the `ArmResult`s `chosen` in every task."""
    tasks = [name.removeprefix("accuracy_") for name in study.runs.columns if name.startswith("accuracy_")]
    rows = []
    for arm in trained_arms(chosen):
        runs = study.runs[(study.runs["arm"] == arm.arm) & (study.runs["budget"] == arm.budget)]
        for name, prefix in (("token accuracy", "accuracy_"), ("exact match", "exact_match_")):
            cells = [
                runs[f"{prefix}{task}"].dropna() if f"{prefix}{task}" in runs else pd.Series(dtype=float)
                for task in tasks
            ]
            if any(map(len, cells)):
                rows.append(
                    [
                        f"{label(study.summary, arm)}: {name}",
                        *(spread(values) if len(values) else MISSING for values in cells),
                    ]
                )
    note = "Per cent: mean over the runs [lowest–highest run]. Exact match is measured on fewer items than tokens."
    return Table(f"study_{study.name}_tasks", f"Every task in study {study.name}", ["arm", *tasks], rows, note)


def effects(study):
    """Table of all comparisons: effects, both intervals, p-values, budgets, and the loss in the research's tiers."""
    rows = []
    for entry in study.summary.comparisons:
        gain = improvement(study, entry, entry.group)
        mean = 100 * float(np.mean(entry.differences))
        power = equivalence_power(entry.differences, study.summary.margin)
        rows.append(
            [
                arm_name(entry.baseline),
                arm_name(entry.arm),
                entry.group,
                (str(len(entry.differences)), len(entry.differences)),
                (effect_text(entry), mean),
                f"{points_text(entry.bounded_interval[0])} to {points_text(entry.bounded_interval[1])}",
                (p_text(entry.p_value), entry.p_value),
                MISSING if entry.verdict == EXPLORATORY else (p_text(entry.p_adjusted), entry.p_adjusted),
                PILLS.get(entry.verdict, entry.verdict),
                entry.matched or "none",
                (f"{entry.num_not_converged} of {2 * len(entry.differences)}", entry.num_not_converged),
                MISSING if power is None else (f"{power:.0%}", power),
                *gain_cells(gain),
            ]
        )
    columns = ["baseline", "arm", "tasks", "pairs", "points [95% t]", "any distribution", "p", "p (Holm)", "verdict"]
    columns += ["equal budgets", "not converged", "power for equality", "lower loss", "tier of the research"]
    note = (
        "Token accuracy of the baseline minus the arm's, pairs of runs with equal seeds. p: exact sign-flip test; "
        "Holm: corrected for the study's headline questions. Equal: the 90% t-interval lies within "
        f"{100 * study.summary.margin:.0f} points; power for equality: how often this many runs with this spread would "
        "say so of arms that are the same. The t-interval covers less than 95% where some runs stay on a plateau; the "
        f"other interval holds for any distribution. {TIERS}"
    )
    return Table(f"study_{study.name}_effects", f"Comparisons of study {study.name}", columns, rows, note, strong=[4])


TIERS = (
    "Lower loss: 1 − loss of the default / loss of the alternative, mean over the pairs. The research asks for more "
    "than 5% in every run; its tiers are up to 5%, 5 to 15% and above 15%."
)


def gain_cells(gain):
    """Cells of the relative improvements of the loss, one per pair: mean, and tier."""
    if not len(gain):
        return [MISSING, "–"]
    mean = 100 * float(np.mean(gain))
    return [(f"{mean:+.0f}%".replace("-", "−"), mean), tier(gain)]


def tier(gain):
    """The research's tier of a relative improvement of the loss, and how many pairs are above its first border."""
    mean, above = float(np.mean(gain)), int((np.asarray(gain) > 0.05).sum())
    name = "worse" if mean < 0 else "up to 5%" if mean <= 0.05 else "5 to 15%" if mean <= 0.15 else "above 15%"
    return f"{name} ({above} of {len(gain)} pairs above 5%)"


def improvement(study, entry, group="all"):
    """1 - loss of the baseline / loss of the arm, an array with an entry per pair of runs, mean over the group's tasks;
    empty without per-item results of the group."""
    own, base = (study.losses(runs, group) for runs in paired_runs(study, entry))
    return np.zeros(0) if own is None else 1 - base / own


def p_text(value):
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


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
    group = SHORT_NAMES.get(entry.group, entry.group)
    return f"{arm_name(entry.arm)}\n{group}: {PILLS.get(entry.verdict, entry.verdict)}"


def points(study, chosen):
    """(draw, width, height): every run of the `ArmResult`s `chosen` that train answers: exact match, and token accuracy
    by group; None without such an arm."""
    if not (chosen := trained_arms(chosen)):
        return None
    groups = list(chosen[0].groups)
    names_of_arms = [label(study.summary, arm).replace(" (", "\n(") for arm in chosen]
    names = ["exact match", *(SHORT_NAMES.get(group, group) for group in groups)]

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
        "Differences between the default recipe and the other arms of the study, pair by pair",
        "Default recipe minus the other arm: right of 0 the default is better. A point is a pair of runs with equal "
        "seeds; tick and thick line: mean and 95% t-interval; thin line: 95% interval for any distribution. Grey: "
        "differences that count as none.",
    ),
}
