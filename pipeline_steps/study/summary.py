"""The summary of a study: README.md, runs.png and summary.json (for the report) in reports/study/<name>/, from runs.csv
alone.

    python -m pipeline_steps.study.summary NAME

Every run is shown, in the table and as a point of the figure. Cost: seconds.
"""

import argparse
import io

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from pipeline_steps.common import metrics
from pipeline_steps.common.errors import run_main
from pipeline_steps.common.files import write_bytes, write_text
from pipeline_steps.common.params import ROOT
from pipeline_steps.common.study_results import (
    CLIPS,
    COARSE,
    EQUAL,
    EXPLORATORY,
    SEEDS,
    UNDECIDED,
    VIDEOS,
)
from pipeline_steps.report import scaling, study_tables
from pipeline_steps.report.statistics import equivalence_power, share_interval, unseen_text
from pipeline_steps.report.studies import Study, flops_note, losses_of, read_runs
from pipeline_steps.study.design import (
    label_of,
    read_study,
)
from pipeline_steps.study.next_frame import NEXT_FRAME, relative_gain, trained_on_answers
from pipeline_steps.study.plan import RESULTS
from pipeline_steps.study.results import ACCURACY, summarise

COLOUR = "#2f80ed"


def main():
    parser = argparse.ArgumentParser(description="Summarise the finished runs of a study.")
    parser.add_argument("name", help="file name in conf/study, without .yaml")
    name = parser.parse_args().name
    print(write_summary(name, read_study(name)))


def write_summary(name, study, results=ROOT / RESULTS, command=None):
    """Writes README.md, runs.png and summary.json beside the study's runs.csv; returns the path of README.md. command:
    what makes the runs, by default `make study`. UserError without runs."""
    folder = results / name
    table = read_runs(folder / "runs.csv", study)
    summary = summarise(name, table, study)
    found = Study(summary, table, losses_of(folder / "items.parquet"))
    tables = [*scaling.tables(found), study_tables.clip_parts(found)]  # before anything is written
    if any(arm.answers_trained for arm in summary.arms):
        write_bytes(folder / "runs.png", figure(table, study, summary.group_tasks["all"]))
    else:
        (folder / "runs.png").unlink(missing_ok=True)  # of an earlier version
    metrics.write_json(folder / "summary.json", summary)
    write_text(folder / "README.md", page(summary, table, study, command, tables))
    return folder / "README.md"


def page(summary, table, study, command=None, tables=()):
    """The summary as Markdown. tables: more of them, of which empty ones are left out."""
    parts = [f"# Study {summary.name}", summary.question]
    parts += [f"{summary.num_runs} of {summary.num_planned} runs. `{command or f'make study name={summary.name}'}`"]
    parts += ["## Arms", arm_table(summary, table)]
    if summary.comparisons:
        parts += ["## Baseline against other arms", *comparison_lines(summary)]
    if any(arm.next_frame for arm in summary.arms):
        parts += ["## Next frame: planned against static queries", *next_frame_lines(summary)]
    parts += [found.markdown(2).rstrip() for found in tables if found.rows]
    if any(arm.answers_trained for arm in summary.arms):
        parts += ["![Token accuracy of every run by task](runs.png)"]
    parts += ["## Runs", run_table(table, study, summary.group_tasks["all"])]
    return "\n\n".join(parts) + "\n"


def arm_table(summary, table):
    rows = []
    for arm in summary.arms:
        count = len(arm.seeds)
        low, high = share_interval(arm.num_above_plateau, count)
        above = f"{arm.num_above_plateau} of {count} [{100 * low:.0f}, {100 * high:.0f} %]"
        trained = arm.answers_trained
        minutes = arm.training_seconds
        rows.append(
            {
                "arm": arm.arm,
                "budget": arm.budget,
                "runs": count,
                **{f"{group}, %": spread(values if trained else []) for group, values in arm.groups.items()},
                "exact match, %": spread([value for value in arm.exact_match if trained and value is not None]),
                f"runs above {100 * summary.plateau:.0f} %": above if trained else "–",
                "converged": f"{arm.num_converged} of {arm.num_measured}" if trained and arm.num_measured else "–",
                "samples": f"{arm.training_samples:,.0f}",
                "training TFLOP": f"{arm.training_flops / 1e12:.1f}",
                "minutes": "–" if minutes is None else f"{minutes / 60:.1f}",
            }
        )
    note = (
        "Token accuracy, autoregressive mode, held-out clips: mean (lowest to highest run). Converged (–: not "
        "measured): the validation loss fell by less than 1 % over the last quarter of stage 3, or rose. Training "
        f"FLOPs: forward and backward, by task at its mean lengths, of the trained weights.{flops_note(table)} "
        "Minutes: median of runs without interruption."
    )
    if untrained := [arm.arm for arm in summary.arms if not arm.answers_trained]:
        names = ", ".join(dict.fromkeys(untrained))
        note += f" Answers were not trained in stages 2 and 3 of {names}, so their accuracies are no results."
    return f"{markdown(pd.DataFrame(rows))}\n\n{note}"


def next_frame_lines(summary):
    """A table of the next-frame losses and how to read it."""
    rows = [
        {
            "arm": arm.arm,
            "budget": arm.budget,
            "clips": CLIPS[group],
            "runs": len(found.known("gain")),
            "gain, %": gain_mean(found.known("gain"), found.interval),
            "95 % interval (t)": gain_points(found.interval),
            "verdict on planned queries": arm.prediction_verdict(group, summary.next_frame_margin),
            "clips won, %": spread(found.known("wins")),
            "loss": f"{np.mean([value for value in found.reference if value is not None]):.4g}",
            **{name: times_text(found.relative(key)) for key, name in RELATIVE.items()},
            "baseline − arm, points": gain_mean(found.differences, found.differences_interval),
            "its 95 % interval": gain_points(found.differences_interval),
        }
        for arm in summary.arms
        for group, found in arm.next_frame.items()
    ]
    seeds = ", ".join(map(str, summary.confirmation_seeds))
    confirmation = f" Undecided if the preregistered seeds {seeds} alone do not give the same verdict." if seeds else ""
    note = (
        "Gain: (loss of static − loss of planned queries) / loss of static queries (mean squared error of the head, "
        "after the last planned pass), "
        "mean over the runs. In static clips the change and the flow are 0 and the previous latent is the next one, so "
        "little is left to predict and small losses are compared. In networks with a single pass: of the baseline's "
        "planned queries over these, which were trained apart, pairs of runs with equal seeds. "
        f"By its interval, not corrected for their number: equal within ±{100 * summary.next_frame_margin:g} %, else "
        f"better or worse if it excludes 0.{confirmation} "
        "Loss: planned queries (static ones in networks with a single pass); divided "
        "by it: the loss with another clip's state, with the state zeroed, with the previous latent zeroed, and of the "
        "prediction that nothing changes, which is exact in static clips. "
        "Baseline − arm: difference of the gains, pairs of runs with equal seeds and targets."
    )
    return [markdown(pd.DataFrame(rows)), note, *diagnostics_lines(summary)]


RELATIVE = {
    "shuffled_state": "state shuffled, ×",
    "no_state": "state zeroed, ×",
    "no_previous": "previous latent zeroed, ×",
    "unchanged": "unchanged, ×",
}


def diagnostics_lines(summary):
    """A table of what else was measured on moving clips, and how to read it; [] without any."""
    arms = [arm for arm in summary.arms if VIDEOS in arm.next_frame and arm.next_frame[VIDEOS].measures]
    rows = []
    for arm in arms:
        found = arm.next_frame[VIDEOS]
        row = {"arm": arm.arm, "budget": arm.budget}
        for name, (title, factor, digits) in DIAGNOSTICS.items():
            values = found.known(name)
            row[title] = f"{factor * np.mean(values):.{digits}f}" if values else "–"
        row["gain by frame, %"] = ", ".join(map(gain_text, found.frame_gains)) or "–"
        gains = (f"{count}: {', '.join(map(gain_text, values))}" for count, values in found.pass_gains.items())
        rows.append(row | {"gain after 1, 2, 3 passes, %": "; ".join(gains) or "–"})
    note = (
        "Moving clips, means of the runs with these measures. Similarity: cosine of a frame's static and planned "
        "token. Sensitivity: relative change of the prediction / of the input. Gains here are relative to the loss of "
        "static queries in the same frames; after more passes than were trained, and by the number of frames that "
        "clips are cut to (all: as they are)."
    )
    return [markdown(pd.DataFrame(rows)), note] if rows else []


DIAGNOSTICS = {
    "wins_last_frames": ("clips won in the last four frames, %", 100, 1),
    "token_similarity": ("token similarity", 1, 3),
    "state_sensitivity": ("sensitivity to the state", 1, 3),
    "previous_sensitivity": ("to the previous latent", 1, 3),
}


def gain_text(value, digits=2):
    """A relative gain in per cent; + 0.0: no negative zero."""
    return "–" if pd.isna(value) else f"{round(100 * value, digits) + 0.0:+.{digits}f}"


def gain_mean(values, interval):
    return gain_text(np.mean(values), study_tables.digits(interval)) if values else "–"


def gain_points(interval):
    digits = study_tables.digits(interval)
    return "–" if interval is None else f"[{', '.join(gain_text(border, digits) for border in interval)}]"


def times_text(value):
    return "–" if value is None else f"{value:.3f}"


def spread(values):
    if not len(values):
        return "–"
    low, mean, high = (100 * value for value in (min(values), float(np.mean(values)), max(values)))
    return f"{mean:.1f} ({low:.1f} to {high:.1f})"


def comparison_lines(summary):
    """A table of the comparisons and how to read it."""
    found = summary.comparisons
    rows = [
        {
            "baseline": entry.baseline,
            "arm": entry.arm,
            "tasks": entry.group,
            "pairs": len(entry.differences),
            "difference, points": f"{100 * float(np.mean(entry.differences)):+.1f}",
            "95 % interval (t)": points(entry.interval),
            "95 % interval (any distribution)": points(entry.bounded_interval),
            "p": f"{entry.p_value:.4f}",
            "p, Holm": "–" if entry.verdict == EXPLORATORY else f"{entry.p_adjusted:.4f}",
            "power for equality": power_text(entry, summary.margin),
            "verdict on the baseline": verdict_text(entry),
        }
        for entry in found
    ]
    undecided = [entry for entry in found if entry.verdict == UNDECIDED]
    open_ones = [entry for entry in undecided if entry.smallest_margin is not None and entry.beats_blind is not False]
    power = "".join(
        f" {entry.arm}, {entry.group}: these runs would show equality within {100 * entry.smallest_margin:.1f} points."
        for entry in open_ones
    )
    equal = [len(entry.differences) for entry in found if entry.verdict == EQUAL]
    unseen = f" {unseen_text(min(equal))}" if equal else ""
    note = (
        "Differences are baseline minus arm, in points of token accuracy, over pairs of runs with equal seeds. p: "
        "exact sign-flip test; Holm: corrected for all headline rows. Equal: the 90 % t-interval lies within "
        f"{100 * summary.margin:.0f} points (not corrected).{unseen} Power: how often as many runs with this spread "
        "would say so of arms that are the same. The t-interval covers less than 95 % where some runs stay on a "
        f"plateau; the other one holds for any distribution.{power}"
    )
    return [markdown(pd.DataFrame(rows)), note]


def power_text(entry, margin):
    power = equivalence_power(entry.differences, margin)
    return "–" if power is None else f"{power:.0%}"


def verdict_text(entry):
    """The verdict with what it is conditional on."""
    if entry.matched is None or entry.verdict == EXPLORATORY:
        return entry.verdict
    text = f"**{entry.verdict}** at {'' if entry.matched == 'convergence' else 'equal '}{entry.matched}"
    if entry.verdict == UNDECIDED and entry.beats_blind is False:
        text += "; neither arm beats itself with grey frames"
    return f"{text}; {entry.convergence}" if entry.convergence else text


def points(interval):
    return "–" if interval is None else f"[{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}]"


def run_table(table, study, tasks):
    shown = table[["arm", "budget", *SEEDS]].rename(columns=lambda name: name.replace("_seed", " seed"))
    trained = table["arm"].isin(trained_on_answers(table, study))
    answers = {"mean": percent(table["mean_token_accuracy"]), "loss": table["mean_loss"].map("{:.3f}".format)}
    answers["exact match"] = percent(table["exact_match_accuracy"])
    answers |= {task: percent(table[f"{ACCURACY}{task}"]) for task in tasks}
    answers["converged"] = table["converged"].map({True: "yes", False: "no"}).fillna("–")
    for name, column in answers.items():
        if trained.any():
            shown[name] = column.where(trained, "–")
    for group, clips in CLIPS.items():
        if f"{NEXT_FRAME}{group}_{COARSE}" in table:
            gains = [relative_gain(rows, study, arm, group) for arm, rows in table.groupby("arm", sort=False)]
            shown[f"gain, {clips}, %"] = pd.concat(gains).reindex(table.index).map(gain_text)
    shown["commit"] = table["commit"]
    return markdown(shown)


def percent(column):
    return column.map(lambda value: "–" if pd.isna(value) else f"{100 * value:.1f}")


def markdown(table):
    lines = ["| " + " | ".join(table.columns) + " |", "|" + " --- |" * len(table.columns)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in table.itertuples(index=False)]
    return "\n".join(lines)


def figure(table, study, tasks):
    """Every run as a point, as PNG bytes: a row per arm and budget, a panel per task, with mean and exact match."""
    table = table[table["arm"].isin(trained_on_answers(table, study))]
    labels = [label_of(study, arm, budget) for arm, budget in zip(table["arm"], table["budget"], strict=True)]
    arms = pd.Series(labels, index=table.index)
    columns = {"mean": "mean_token_accuracy"} | {task: f"{ACCURACY}{task}" for task in tasks}
    columns |= {"exact match": "exact_match_accuracy"}
    names = list(dict.fromkeys(labels))
    with plt.rc_context({"font.size": 9, "font.family": "DejaVu Sans"}):
        size = 1.4 + 1.05 * len(columns), 0.8 + 0.3 * len(names)
        canvas, panels = plt.subplots(1, len(columns), figsize=size, layout="constrained", sharex=True, sharey=True)
        for axes, (title, column) in zip(panels, columns.items(), strict=True):
            for place, name in enumerate(names):
                values = 100 * table.loc[arms == name, column].to_numpy(dtype=float)
                offsets = np.linspace(-0.2, 0.2, len(values)) if len(values) > 1 else np.zeros(1)
                axes.scatter(values, place + offsets, s=14, color=COLOUR, alpha=0.75, linewidths=0, clip_on=False)
                axes.vlines(np.nanmean(values), place - 0.35, place + 0.35, color="black", linewidth=1.2)
            axes.set_title(title, fontsize=9)
            axes.grid(linewidth=0.5)
            axes.set_axisbelow(True)
            axes.tick_params(left=False)
        panels[0].set_xlim(0, 100)
        panels[0].set_xticks((0, 50, 100))
        panels[0].set_yticks(range(len(names)), names)
        panels[0].set_ylim(len(names) - 0.5, -0.5)
        canvas.supxlabel("accuracy, %; line: mean of the runs", fontsize=9)
        content = io.BytesIO()
        canvas.savefig(content, format="png", dpi=120, metadata={"Software": None})
        plt.close(canvas)
    return content.getvalue()


if __name__ == "__main__":
    run_main(main)
