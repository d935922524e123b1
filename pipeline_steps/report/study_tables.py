"""Studies on the page: verdict cards, key figures, and tables of arms, tasks and comparisons."""

import math

import numpy as np
import pandas as pd

from pipeline_steps.common.study_results import BETTER, EQUAL, EXPLORATORY, TOO_FEW, UNDECIDED, UNMATCHED, WORSE
from pipeline_steps.report import studies
from pipeline_steps.report.captions import PART_NAMES
from pipeline_steps.report.statistics import ALPHA, FEWEST_PAIRS, equivalence_power, share_interval, unseen_text
from pipeline_steps.report.tables import MISSING, Table, count, number

CAPTION_PARTS = "caption_parts_"  # columns caption_parts_<part>/<part, reference or other_clip> of runs.csv
COMPARED = PART_NAMES | {"reference": "reference", "other_clip": "another clip's answer"}
MODES_APART = 0.1  # in accuracy: from this gap on, runs on both sides of the plateau are two kinds of outcomes
PILLS = {name: name for name in (BETTER, EQUAL, WORSE, UNDECIDED, TOO_FEW)} | {UNMATCHED: "not comparable"}


def cards(study):
    """One verdict per leading comparison: status, whether it holds for converged runs, title and a sentence."""
    num_questions = sum(entry.verdict != EXPLORATORY for entry in study.summary.comparisons)
    return [
        {
            "status": PILLS[entry.verdict],
            "open": entry.convergence,
            "question": question(entry),
            "statement": statement(study, entry, num_questions),
        }
        for entry in studies.leading(study)
        if entry.verdict != EXPLORATORY
    ]


def question(entry):
    arms_compared = f"{studies.arm_name(entry.baseline)} against {studies.arm_name(entry.arm)}"
    text = f"{arms_compared}: {studies.group_name(entry.group)}"
    return text[:1].upper() + text[1:]


def statement(study, entry, num_questions):
    """The effect with its interval and what it holds for."""
    count = len(entry.differences)
    text = f"{effect_text(entry)} points of token accuracy (95% t-interval), {count} pair{'s' * (count > 1)} of runs, "
    text += f"p = {entry.p_adjusted:.3f} (sign flips, Holm for {num_questions} questions), {budget_text(study, entry)}."
    margin = study.summary.margin
    if entry.verdict in (BETTER, WORSE) and (alike := sum(abs(value) <= margin for value in entry.differences)):
        text += f" In {alike} of the pairs the difference is within {100 * margin:g} points."
    if entry.verdict == EQUAL:
        text += f" {equality_text(entry, margin)}"
    if entry.verdict == UNDECIDED and entry.beats_blind is False:
        text += f" In these tasks neither arm beats itself with grey frames by more than {100 * margin:g} points, so it"
        text += " says nothing whether they are alike."
    elif entry.verdict == UNDECIDED and (power := power_text(entry, margin)):
        text += f" {power}"
    if split := split_arms(study, entry):
        low, high = map(points_text, entry.bounded_interval)
        text += f" Only some runs reach {100 * study.summary.plateau:.0f}% in these tasks ({', '.join(split)}), so "
        text += f"this interval may be too narrow; the one for any distribution is [{low}, {high}]."
    return text


def equality_text(entry, margin):
    """What an equality rests on, and what it cannot know."""
    text = f"Equal: the 90% interval lies within {100 * margin:g} points"
    if entry.p_adjusted < ALPHA:
        text += ", although the difference is significant"
    return f"{text}. {unseen_text(len(entry.differences))}"


def split_arms(study, entry):
    """["ARM: 3 of 8"] for each compared arm of which some runs, but not all, reach the plateau's accuracy in the group
    of tasks, at least `MODES_APART` above the others."""
    tasks = study.summary.group_tasks.get(entry.group, [])
    found = []
    for runs in studies.paired_runs(study, entry) if tasks else ():
        values = studies.group_accuracy(runs, tasks)
        reached = values >= study.summary.plateau
        if 0 < reached.sum() < len(runs) and values[reached].min() - values[~reached].max() >= MODES_APART:
            found.append(f"{studies.arm_name(runs['arm'].iloc[0])}: {reached.sum()} of {len(runs)}")
    return found


def budget_text(study, entry):
    """What the training budgets of a comparison have in common, and by how much the FLOPs differ."""
    if entry.matched is None:
        return "training budgets differ"
    if entry.matched == "convergence":
        return "both trained until they converged"
    text = f"equal training {entry.matched}"
    ratio = studies.flops_ratio(study, entry)
    if "FLOPs" in entry.matched or ratio is None:
        return text
    return f"{text}, {ratio:.2f} × the training FLOPs for {studies.arm_name(entry.arm.partition(', ')[0])}"


def power_text(entry, margin):
    """How likely these runs would have shown two equal arms to be equal, or "" for too few pairs."""
    power = equivalence_power(entry.differences, margin)
    if power is None:
        return ""
    text = f"With this spread, arms that are the same are called equal (within {100 * margin:.0f} points) in "
    text += f"{power:.0%} of such studies"
    if entry.smallest_margin is not None:
        text += f"; these runs show equality within {100 * entry.smallest_margin:.1f} points"
    return f"{text}."


def headline_tiles(study):
    """Key figures of the default recipe: name, value, note."""
    runs = studies.default_runs(study)
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
                studies.label(summary, arm),
                (str(len(arm.seeds)), len(arm.seeds)),
                spread(exact) if exact and trained else MISSING,
                *(spread(arm.groups[group]) if trained else MISSING for group in groups),
                (
                    f"{arm.num_above_plateau} of {len(arm.seeds)} [{100 * low:.0f}–{100 * high:.0f}]",
                    arm.num_above_plateau,
                )
                if trained
                else MISSING,
                (f"{arm.num_converged} of {arm.num_measured}", arm.num_converged)
                if trained and arm.num_measured
                else MISSING,
                count(round(arm.training_samples)),
                number(arm.training_flops / 1e12, 1),
                MISSING if arm.training_seconds is None else number(arm.training_seconds / 60, 1),
            ]
        )
    columns = ["arm", "runs", "exact match, %", *(f"token accuracy, {group}, %" for group in groups)]
    columns += [f"runs above {100 * summary.plateau:.0f}%", "converged", "samples", "TFLOP", "min"]
    note = f"{summary.question} {summary.num_runs} of {summary.num_planned} runs, {summary.split} split. Every run has "
    note += "its own seed of training, backbones and data."
    answering = studies.trained_arms(chosen)
    if answering:
        note += (
            " Autoregressive mode: mean [lowest–highest run]. Exact match: whole generated answers. Brackets of the "
            "runs above the plateau: 95% interval of the share, in %. Converged: the validation loss fell by less than "
            "1% over the last quarter of stage 3, or rose"
        )
        note += "." if all(arm.num_measured for arm in answering) else "; –: not measured."
    note += " Samples, TFLOP and minutes: of training; minutes are medians of runs without interruption."
    note += studies.flops_note(study.runs)
    if untrained := [studies.label(summary, arm) for arm in chosen if not arm.answers_trained]:
        note += f" Answers not trained, so accuracies are no results: {', '.join(untrained)}; see Ideas."
    shown = [index for index in range(len(columns)) if any(row[index] != MISSING for row in rows)]
    return Table(
        f"study_{study.name}",
        f"Arms of study {study.name}",
        [columns[index] for index in shown],
        [[row[index] for index in shown] for row in rows],
        note,
        strong=[2, 3] if answering else [],
    )


def by_task(study, chosen):
    """Table of the token accuracy and the exact match of the `ArmResult`s `chosen` in every task."""
    tasks = [name.removeprefix("accuracy_") for name in study.runs.columns if name.startswith("accuracy_")]
    rows = []
    for arm in studies.trained_arms(chosen):
        runs = study.runs[(study.runs["arm"] == arm.arm) & (study.runs["budget"] == arm.budget)]
        for name, prefix in (("token accuracy", "accuracy_"), ("exact match", "exact_match_")):
            cells = [
                runs[f"{prefix}{task}"].dropna() if f"{prefix}{task}" in runs else pd.Series(dtype=float)
                for task in tasks
            ]
            if any(map(len, cells)):
                rows.append(
                    [
                        f"{studies.label(study.summary, arm)}: {name}",
                        *(spread(values) if len(values) else MISSING for values in cells),
                    ]
                )
    note = (
        "Per cent: mean over the runs [lowest–highest run]. Exact match is measured on fewer items than token accuracy."
    )
    return Table(f"study_{study.name}_tasks", f"Every task in study {study.name}", ["arm", *tasks], rows, note)


def clip_parts(study):
    """Table of the words that answers to parts of the same clips have in common, of the arms that train answers."""
    rows = []
    for arm in studies.trained_arms(study.summary.arms):
        runs = study.runs[(study.runs["arm"] == arm.arm) & (study.runs["budget"] == arm.budget)]
        for column in (name for name in runs if name.startswith(CAPTION_PARTS)):
            one, other = map(COMPARED.get, column.removeprefix(CAPTION_PARTS).split("/"))
            if len(values := runs[column].dropna()):
                rows.append([studies.label(study.summary, arm), one, other, spread(values)])
    note = (
        "Share of words that the answers have in common (autoregressive mode), clips of 16 frames or more: mean "
        "[lowest–highest run]. Near 100%, the answer does not use the frames that differ; read it against another "
        "clip's answer."
    )
    columns = ["arm", "answers for", "compared with", "word overlap, %"]
    return Table(f"study_{study.name}_parts", f"Answers to parts of clips in study {study.name}", columns, rows, note)


def effects(study):
    """Table of all comparisons: effects, both intervals, p-values, budgets, and the loss in the research's tiers."""
    rows = []
    for entry in study.summary.comparisons:
        gain = studies.improvement(study, entry, entry.group)
        mean = 100 * float(np.mean(entry.differences))
        power = equivalence_power(entry.differences, study.summary.margin)
        rows.append(
            [
                studies.arm_name(entry.baseline),
                studies.arm_name(entry.arm),
                entry.group,
                (str(len(entry.differences)), len(entry.differences)),
                (effect_text(entry), mean),
                f"{points_text(entry.bounded_interval[0])} to {points_text(entry.bounded_interval[1])}",
                (p_text(entry.p_value), entry.p_value),
                MISSING if entry.verdict == EXPLORATORY else (p_text(entry.p_adjusted), entry.p_adjusted),
                PILLS.get(entry.verdict, entry.verdict),
                entry.matched or "none",
                (num_text(entry), entry.num_not_converged),
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
        "other interval holds for any distribution. "
    )
    if any(len(entry.differences) < FEWEST_PAIRS for entry in study.summary.comparisons):
        note += f"With fewer than {FEWEST_PAIRS} pairs the test cannot say better or worse; Decisions and Ideas then "
        note += "go by the t-interval. "
    note += TIERS
    return Table(f"study_{study.name}_effects", f"Comparisons of study {study.name}", columns, rows, note, strong=[4])


def num_text(entry):
    """How many runs of a `ComparisonResult` had not converged, of those for which that was measured."""
    if not entry.num_measured:
        return "not measured"
    text = f"{entry.num_not_converged} of {entry.num_measured}"
    return f"{text}, {entry.num_unmeasured} not measured" if entry.num_unmeasured else text


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
    above = int((np.asarray(gain) > 0.05).sum())
    return f"{tier_name(float(np.mean(gain)))} ({above} of {len(gain)} pairs above 5%)"


def tier_name(mean):
    return "worse" if mean < 0 else "up to 5%" if mean <= 0.05 else "5 to 15%" if mean <= 0.15 else "above 15%"


def effect_text(entry):
    """Mean difference of a `ComparisonResult` with its t-interval, in points."""
    return interval_text(entry.differences, entry.interval)


def interval_text(values, interval, digits=1):
    """Mean of values with its interval, times 100; interval: None with one value."""
    mean, *borders = (points_text(value, digits) for value in (float(np.mean(values)), *(interval or ())))
    return f"{mean} [{', '.join(borders)}]" if borders else mean


def interval_cell(values, interval, digits=1):
    return (interval_text(values, interval, digits), 100 * float(np.mean(values)))


def digits(interval):
    """Decimals in per cent with which the half width of an interval, or None, has two digits: two to four."""
    half = 50 * (interval[1] - interval[0]) if interval else 0
    return min(max(1 - math.floor(math.log10(half)), 2), 4) if half else 2


def points_text(value, digits=1):
    return f"{round(100 * value, digits) + 0.0:+.{digits}f}".replace("-", "−")  # + 0.0: no negative zero


def spread(values):
    """Mean with the lowest and the highest value, in per cent, as a cell."""
    low, mean, high = (100 * value for value in (min(values), float(np.mean(values)), max(values)))
    return (f"{mean:.1f} [{low:.0f}–{high:.0f}]", mean)


def p_text(value):
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
