"""The summary of a study for readers: reports/study/<name>/README.md and runs.svg, from runs.csv alone.

    python -m pipeline_steps.study.summary NAME

Every run is shown, in the table and as a point of the figure. Cost: seconds.
"""

import argparse
import io

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from pipeline_steps.common.errors import UserError, run_main
from pipeline_steps.common.files import write_text
from pipeline_steps.common.params import ROOT
from pipeline_steps.report.budgets import TOLERANCE
from pipeline_steps.study import statistics
from pipeline_steps.study.design import EqualFlops, cells_of, read_study
from pipeline_steps.study.plan import RESULTS

SEEDS = ("training_seed", "backbones_seed", "data_seed")
ACCURACY, EXACT = "accuracy_", "exact_match_"
COLOURS = ("#2f80ed", "#d97706", "#12a594", "#8b5cf6", "#c2410c", "#64748b")


def main():
    parser = argparse.ArgumentParser(description="Summarise the finished runs of a study.")
    parser.add_argument("name", help="file name in conf/study, without .yaml")
    name = parser.parse_args().name
    print(write_summary(name, read_study(name)))


def write_summary(name, study, results=ROOT / RESULTS):
    """Writes README.md and runs.svg beside the study's runs.csv; returns the page's path. UserError without runs."""
    folder = results / name
    try:
        table = pd.read_csv(folder / "runs.csv")
    except FileNotFoundError:
        raise UserError(f"{folder / 'runs.csv'}: missing; run `make study name={name}` first") from None
    write_text(folder / "runs.svg", figure(table, study))
    write_text(folder / "README.md", page(name, table, study))
    return folder / "README.md"


def group_accuracy(table, tasks):
    """Mean token accuracy over `tasks`, one value per row of the table of runs."""
    return table[[f"{ACCURACY}{task}" for task in tasks]].mean(axis=1)


def groups_of(table, study):
    """{group: tasks} of the study that the runs were scored on, "all" for every task."""
    tasks = [name.removeprefix(ACCURACY) for name in table.columns if name.startswith(ACCURACY)]
    found = {name: [task for task in group if task in tasks] for name, group in study.groups.items()}
    return {"all": tasks} | {name: group for name, group in found.items() if group}


def comparisons(table, study):
    """(`statistics.Comparison`s of every arm with the first, in every budget and group that both have; {label of the
    arm: what its budget has in common with the baseline's, or None}). With several budgets the label names one."""
    baseline = next(iter(study.arms))
    groups = {name: tasks for name, tasks in groups_of(table, study).items() if name != "all"} or groups_of(
        table, study
    )
    pairs, budgets = {}, {}
    for (arm, budget), rows in table[table["arm"] != baseline].groupby(["arm", "budget"], sort=False):
        entry = study.budgets.get(budget)
        reference = entry.flops_of if isinstance(entry, EqualFlops) else budget
        base = table[(table["arm"] == baseline) & (table["budget"] == reference)].set_index(list(SEEDS))
        own = rows.set_index(list(SEEDS))
        common = base.index.intersection(own.index)
        if not len(common):
            continue
        base, own = base.loc[common], own.loc[common]
        label = arm if len(study.budgets) == 1 else f"{arm}, {budget}"
        budgets[label] = matched_budget(base, own)
        for group, tasks in groups.items():
            pairs[label, group] = (group_accuracy(base, tasks) - group_accuracy(own, tasks)).to_numpy()
    found = statistics.compare(pairs, study.margin, lambda label: budgets[label] is not None) if pairs else []
    return found, budgets


def matched_budget(base, own):
    """ "samples", "FLOPs", "samples and FLOPs", or None: what the budgets of two paired tables have in common."""
    equal = [
        name
        for name, column in (("samples", "training_samples"), ("FLOPs", "training_flops"))
        if np.all(np.abs(own[column].to_numpy() / base[column].to_numpy() - 1) <= TOLERANCE)
    ]
    return " and ".join(equal) or None


def page(name, table, study):
    """The summary as Markdown."""
    total = len(cells_of(study))
    found, budgets = comparisons(table, study)
    parts = [f"# Study {name}", study.question, f"{len(table)} of {total} runs. `make study name={name}`"]
    parts += ["## Arms", arm_table(table, study)]
    if found:
        parts += [
            f"## {next(iter(study.arms))} against the other arms",
            *comparison_lines(found, budgets, table, study),
        ]
    parts += ["![Token accuracy of every run by task](runs.svg)", "## Runs", run_table(table, study)]
    return "\n\n".join(parts) + "\n"


def arm_table(table, study):
    rows = []
    groups = groups_of(table, study)
    for (arm, budget), runs in table.groupby(["arm", "budget"], sort=False):
        left = int((runs["mean_token_accuracy"] >= study.plateau).sum())
        low, high = statistics.share_interval(left, len(runs))
        above = f"{left} of {len(runs)} [{100 * low:.0f}, {100 * high:.0f} %]"
        converged = runs["converged"].dropna().astype(bool)
        rows.append(
            {
                "arm": arm,
                "budget": budget,
                "runs": len(runs),
                **{f"{group}, %": spread(group_accuracy(runs, tasks)) for group, tasks in groups.items()},
                "exact match, %": spread(runs["exact_match_accuracy"]),
                f"runs above {100 * study.plateau:.0f} %": above,
                "converged": f"{converged.sum()} of {len(converged)}",
                "training TFLOP": f"{runs['training_flops'].mean() / 1e12:.1f}",
                "minutes": f"{runs['training_seconds'].median() / 60:.1f}",
            }
        )
    note = (
        "Token accuracy, autoregressive mode, held-out clips: mean (lowest to highest run). Minutes: median of the "
        "training. Converged: the validation loss fell by less than 1 % over the last quarter of stage 3, or rose."
    )
    return f"{markdown(pd.DataFrame(rows))}\n\n{note}"


def spread(values):
    return f"{100 * values.mean():.1f} ({100 * values.min():.1f} to {100 * values.max():.1f})"


def comparison_lines(found, budgets, table, study):
    """A table of the comparisons and how to read it."""
    rows = [
        {
            "arm": entry.arm,
            "tasks": entry.group,
            "pairs": len(entry.differences),
            "difference, points": f"{100 * entry.mean:+.1f}",
            "95 % interval (t)": points(entry.interval),
            "95 % interval (any distribution)": points(entry.bounded),
            "p": f"{entry.p_value:.4f}",
            "p, Holm": f"{entry.p_adjusted:.4f}",
            "verdict": verdict_text(entry, budgets, table),
        }
        for entry in found
    ]
    resolved = [entry.smallest_margin for entry in found if entry.smallest_margin is not None]
    power = (
        f" These runs could have shown equality within {100 * min(resolved):.1f} to {100 * max(resolved):.1f} points."
        if resolved
        else ""
    )
    note = (
        f"Differences are {next(iter(study.arms))} minus the arm, in points of token accuracy, over pairs of runs with "
        "equal seeds. p: exact sign-flip test, corrected by Holm for all rows. Equal: the 90 % t-interval lies within "
        f"{100 * study.margin:.0f} points.{power}"
    )
    return [markdown(pd.DataFrame(rows)), note]


def verdict_text(entry, budgets, table):
    """The verdict with what it is conditional on."""
    budget = budgets[entry.arm]
    if budget is None:
        return entry.verdict
    runs = table[table["arm"] == entry.arm.split(", ")[0]]
    pending = int((runs["converged"] == False).sum())  # noqa: E712 (None where it could not be measured)
    text = f"**{entry.verdict}** at equal {budget}"
    return f"{text}; {pending} of {len(runs)} runs of the arm not converged" if pending else text


def points(interval):
    return "–" if interval is None else f"[{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}]"


def run_table(table, study):
    tasks = groups_of(table, study)["all"]
    shown = table[["arm", "budget", *SEEDS]].rename(columns=lambda name: name.replace("_seed", " seed"))
    shown["mean"] = percent(table["mean_token_accuracy"])
    shown["loss"] = table["mean_loss"].map("{:.3f}".format)
    shown["exact match"] = percent(table["exact_match_accuracy"])
    for task in tasks:
        shown[task] = percent(table[f"{ACCURACY}{task}"])
    shown["converged"] = table["converged"].map({True: "yes", False: "no"}).fillna("–")
    shown["commit"] = table["commit"]
    return markdown(shown)


def percent(column):
    return column.map(lambda value: "–" if pd.isna(value) else f"{100 * value:.1f}")


def markdown(table):
    lines = ["| " + " | ".join(table.columns) + " |", "|" + " --- |" * len(table.columns)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in table.itertuples(index=False)]
    return "\n".join(lines)


def figure(table, study):
    """Every run as a point, by task and arm, as SVG text."""
    tasks = groups_of(table, study)["all"]
    labels = list(dict.fromkeys(zip(table["arm"], table["budget"], strict=True)))
    with plt.rc_context({"svg.hashsalt": "study", "font.size": 9, "svg.fonttype": "path"}):
        canvas, axes = plt.subplots(figsize=(8.4, 3.6), layout="constrained")
        for index, (arm, budget) in enumerate(labels):
            rows = table[(table["arm"] == arm) & (table["budget"] == budget)]
            colour = COLOURS[index % len(COLOURS)]
            shift = (index - (len(labels) - 1) / 2) * 0.8 / len(labels)
            name = arm if len(study.budgets) == 1 else f"{arm}, {budget}"
            columns = ["mean_token_accuracy", *(f"{ACCURACY}{task}" for task in tasks), "exact_match_accuracy"]
            for place, column in enumerate(columns):
                values = rows[column].to_numpy(dtype=float)
                offsets = np.linspace(-0.25, 0.25, len(values)) * 0.8 / len(labels) if len(values) > 1 else np.zeros(1)
                label = name if place == 0 else None
                axes.scatter(place + shift + offsets, values, s=14, color=colour, alpha=0.75, linewidths=0, label=label)
                axes.hlines(
                    np.nanmean(values),
                    place + shift - 0.3 / len(labels),
                    place + shift + 0.3 / len(labels),
                    color=colour,
                )
        axes.set_xticks(range(len(tasks) + 2), ["mean", *tasks, "exact\nmatch"])
        axes.set_ylim(0, 1.02)
        axes.set_ylabel("accuracy")
        axes.grid(axis="y", linewidth=0.5)
        axes.set_axisbelow(True)
        for border in (0.5, len(tasks) + 0.5):
            axes.axvline(border, color="0.6", linewidth=0.8)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.15), ncols=len(labels), frameon=False)
        text = io.StringIO()
        canvas.savefig(text, format="svg", metadata={"Date": None})
        plt.close(canvas)
    return text.getvalue()


if __name__ == "__main__":
    run_main(main)
