"""From the rows of runs.csv to the `StudySummary`: arms, and the baseline's comparisons with them."""

import numpy as np
import pandas as pd

from pipeline_steps.common.errors import UserError
from pipeline_steps.common.study_results import SEEDS, ArmResult, ComparisonResult, Series, StudySummary
from pipeline_steps.report.budgets import TOLERANCE
from pipeline_steps.report.studies import group_accuracy
from pipeline_steps.study import statistics
from pipeline_steps.study.design import (
    ALL,
    baseline_of,
    cells_of,
    comparisons_of,
    label_of,
    reference_budget,
    seeds_of,
    split_of,
)
from pipeline_steps.study.next_frame import next_frame_of, optional, trained_on_answers, trains_answers

ACCURACY, BLIND = "accuracy_", "blind_"


def summarise(name, table, study):
    """`StudySummary` of the table of runs."""
    groups, trained = groups_of(table, study), trained_on_answers(table, study)
    arms = []
    for (arm, budget), runs in table.groupby(["arm", "budget"], sort=False):
        converged = runs["converged"].dropna().astype(bool)
        whole = runs[runs["attempts"] == 1]  # of a resumed run, only the last attempt's time is known
        arms.append(
            ArmResult(
                arm=arm,
                budget=budget,
                seeds=runs[SEEDS].to_numpy().tolist(),
                groups={group: group_accuracy(runs, tasks).tolist() for group, tasks in groups.items()},
                exact_match=optional(runs["exact_match_accuracy"]),
                num_above_plateau=int((runs["mean_token_accuracy"] >= study.plateau).sum()),
                num_converged=int(converged.sum()),
                num_measured=len(converged),
                training_samples=float(runs["training_samples"].mean()),
                training_flops=float(runs["training_flops"].mean()),
                training_seconds=float(whole["training_seconds"].median()) if len(whole) else None,
                answers_trained=arm in trained,
                next_frame=next_frame_of(runs, table, study),
            )
        )
    return StudySummary(
        name=name,
        question=study.question,
        baseline=next(iter(study.arms)),
        num_runs=len(table),
        num_planned=len(cells_of(study)),
        margin=study.margin,
        next_frame_margin=study.next_frame_margin,
        confirmation_seeds=list(study.confirmation_seeds),
        plateau=study.plateau,
        split=split_of(study),
        group_tasks={group: list(tasks) for group, tasks in groups.items()},
        series=[Series(name=name, arms=list(arms)) for name, arms in study.series.items()],
        arms=arms,
        comparisons=comparisons(table, study),
    )


def groups_of(table, study):
    """{group: tasks} of the study, and "all" for every scored task. Default groups of another world are left out;
    UserError for a group of which only a part was scored, and for runs that lack tasks of others."""
    tasks = [name.removeprefix(ACCURACY) for name in table.columns if name.startswith(ACCURACY)]
    for run, row in table.set_index("run").iterrows():
        if lacking := [task for task in tasks if pd.isna(row[f"{ACCURACY}{task}"])]:
            raise UserError(
                f"runs.csv: {run} has no accuracy of {', '.join(lacking)}, which other runs have, so their means would "
                "be of different tasks. Delete its row and run the study again, or compare it in a study of its own."
            )
    groups = {ALL: tasks}
    for name, group in study.groups.items():
        absent = [task for task in group if task not in tasks]
        if absent and (len(absent) < len(group) or "groups" in study.model_fields_set):
            raise UserError(f"group {name}: no run was scored on {', '.join(absent)} (tasks: {', '.join(tasks)})")
        if not absent:
            groups[name] = list(group)
    return groups


def comparisons(table, study):
    """`ComparisonResult`s of every arm with its baseline, in every budget and group that both have."""
    groups = groups_of(table, study)
    groups = {name: tasks for name, tasks in groups.items() if name != ALL} or groups
    trained = trained_on_answers(table, study)
    pairs, conditions, informed = {}, {}, {}
    for (arm, budget), rows in table.groupby(["arm", "budget"], sort=False):
        if (baseline := baseline_of(study, arm)) == arm or not {arm, baseline} <= trained:
            continue
        reference = reference_budget(study, budget)
        base = table[(table["arm"] == baseline) & (table["budget"] == reference)].set_index(SEEDS)
        own = rows.set_index(SEEDS)
        common = base.index.intersection(own.index)
        if not len(common):
            continue
        base, own = base.loc[common], own.loc[common]
        label = label_of(study, arm, budget)
        conditions[label] = {
            "baseline": baseline,
            "matched": matched_budget(base, own),
            "num_not_converged": sum(int((side["converged"] == False).sum()) for side in (base, own)),  # noqa: E712
            "num_unmeasured": sum(int(side["converged"].isna().sum()) for side in (base, own)),
        }
        for group, tasks in groups.items():
            pairs[label, group] = (group_accuracy(base, tasks) - group_accuracy(own, tasks)).to_numpy()
            informed[label, group] = beats_blind((base, own), tasks, study.margin)
    found = statistics.compare(
        pairs,
        study.margin,
        matched=lambda label: conditions[label]["matched"] is not None,
        headline=lambda label: study.headline is None or label in study.headline,
        uninformed=lambda label, group: informed[label, group] is False,
    )
    return [
        ComparisonResult(
            arm=entry.arm,
            group=entry.group,
            differences=list(entry.differences),
            interval=entry.interval,
            bounded_interval=entry.bounded,
            p_value=entry.p_value,
            p_adjusted=entry.p_adjusted,
            verdict=entry.verdict,
            smallest_margin=entry.smallest_margin,
            beats_blind=informed[entry.arm, entry.group],
            **conditions[entry.arm],
        )
        for entry in found
    ]


def beats_blind(sides, tasks, margin):
    """Whether the runs of one of the arms, in the mean, are better in these tasks than with grey frames, by more than
    `margin`; None if that was not measured for every run."""
    blind = [side.reindex(columns=[f"{BLIND}{task}" for task in tasks]) for side in sides]
    if any(columns.isna().any(axis=None) for columns in blind):
        return None
    gains = [group_accuracy(side, tasks) - columns.mean(axis=1) for side, columns in zip(sides, blind, strict=True)]
    return any(gain.mean() > margin for gain in gains)


def matched_budget(base, own):
    """What the budgets of two paired tables have in common: "samples", "FLOPs", "samples and FLOPs"; "convergence" if
    both differ but every run of both has converged; None if nothing, or if a budget is unknown."""
    equal = [
        name
        for name, column in (("samples", "training_samples"), ("FLOPs", "training_flops"))
        if np.all(np.abs(own[column].to_numpy() / base[column].to_numpy() - 1) <= TOLERANCE)
    ]
    if equal:
        return " and ".join(equal)
    known = all(side[["training_samples", "training_flops"]].notna().all(axis=None) for side in (base, own))
    settled = all((side["converged"] == True).all() for side in (base, own))  # noqa: E712
    return "convergence" if known and settled else None


def power_warning(study):
    """A sentence if headline questions of the study cannot be decided by their number of pairs, else None."""
    num_pairs = {}
    for arm, budget in comparisons_of(study):
        label, baseline = label_of(study, arm, budget), baseline_of(study, arm)
        is_asked = study.headline is None or label in study.headline
        if is_asked and trains_answers(study, arm) and trains_answers(study, baseline):
            num_pairs[label] = sum(seeds in seeds_of(study, baseline) for seeds in seeds_of(study, arm))
    questions = [label for label, count in num_pairs.items() if count for _ in study.groups or (ALL,)]
    counts = [num_pairs[label] for label in questions]
    smallest = dict(zip(questions, statistics.holm([*map(statistics.smallest_p, counts)]), strict=True))
    open_ones = [label for label, p in smallest.items() if p >= 1 - statistics.LEVEL]
    if not open_ones:
        return None
    fewest, most = (choose(num_pairs[label] for label in open_ones) for choose in (min, max))
    pairs = f"{fewest} to {most}" if fewest < most else f"{most}"
    which = "" if len(open_ones) == len(smallest) else f" of {'; '.join(open_ones)}"
    return (
        f"With {pairs} pair(s) of runs and {len(questions)} questions no difference{which} can be significant "
        f"(smallest corrected p: {min(smallest[label] for label in open_ones):.2g}). For verdicts, add seeds or name "
        "fewer questions in `headline`."
    )
