"""Studies of reports/study: reading them, choosing those that lead the page, pairing runs, and names."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline_steps.common import params
from pipeline_steps.common.errors import UserError
from pipeline_steps.common.metrics import read_json
from pipeline_steps.common.study_results import EXPLORATORY, SEEDS, StudySummary
from pipeline_steps.report.budgets import TOLERANCE
from pipeline_steps.report.inputs import read_study_items

TEXTS = ("run", "arm", "budget", "commit", "parameters")  # columns of runs.csv
NUMBERS = ("training_samples", "training_flops", "training_seconds", "attempts")
NUMBERS += ("mean_token_accuracy", "exact_match_accuracy", "mean_loss")
CONVERGED = "converged"  # True, False or unknown
EARLIER_FLOPS = frozenset(  # commits of runs in reports/study that do not descend from 8747296, which counts by task
    ("2f209dcc9960", "7f35c22afd79", "955a1cabb865", "b5bb9a4a64ca")
)
FLOPS_NOTE = (
    "FLOPs of runs from before commit 8747296 count every sample as a mean sample that trains all weights: they are "
    "higher, and ratios between arms are not those of later runs."
)
DESIGNS = params.ROOT / "conf/study"
HEADLINE_ARMS = ("none", "A6", "B1")
GROUP_NAMES = {"gaze": "tasks that need a gaze", "reading": "tasks that must read everything", "all": "all tasks"}
SHORT_NAMES = {"gaze": "need a gaze", "reading": "read everything", "all": "all tasks"}  # in figures
ARM_NAMES = {"none": "one planned token (default)", "A6": "one static token (A6)", "B1": "sixteen tokens (B1)"}


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
    runs = read_runs(folder / "runs.csv")
    if len(runs) != summary.num_runs:
        raise UserError(
            f"{folder}: runs.csv has {len(runs)} runs, but summary.json is of {summary.num_runs}. "
            f"Run `python -m pipeline_steps.study.summary {folder.name}`"
        )
    heatmap = folder / "heatmap.png"
    return Study(summary, runs, losses_of(folder / "items.parquet"), heatmap if heatmap.exists() else None)


def read_runs(path, study=None):
    """The table of runs.csv. study: of conf/study, whose arms and budgets these have to be. UserError if the file is
    missing or damaged, lacks a column or a value, has text in place of a number, or a run twice."""
    again = (
        f"Restore it (`git checkout {path}`), or delete it and items.parquet, and run the command in README.md beside "
        "them, which collects both again"
    )
    try:
        table = pd.read_csv(path, dtype=dict.fromkeys(TEXTS, str), keep_default_na=False, na_values=[""])
    except FileNotFoundError:
        raise UserError(f"{path}: missing; run `make study name={path.parent.name}` first") from None
    except (ValueError, OSError) as error:  # empty, binary, or rows of different lengths
        raise UserError(f"{path}: {str(error).splitlines()[0]}. {again}") from None
    if absent := [name for name in (*TEXTS, *SEEDS, *NUMBERS, CONVERGED) if name not in table]:
        raise UserError(f"{path}: no column {', '.join(absent)}. {again}")
    if table.empty:
        raise UserError(f"{path}: has no runs. {again}")
    for name in table.columns.difference(TEXTS):
        column = table[name].dropna()
        known = column.isin([True, False]) if name == CONVERGED else pd.to_numeric(column, errors="coerce").notna()
        if not known.all():
            row, expected = known.idxmin(), "True or False" if name == CONVERGED else "a number"
            raise UserError(
                f"{path}: {table['run'][row]}: {name} is {column[row]!r}, expected {expected}. Correct it, or delete "
                "the row and run the study again"
            )
    for name in ("run", "arm", "budget", *SEEDS):
        if table[name].isna().any():
            line = int(table[name].isna().idxmax()) + 2
            raise UserError(f"{path}: line {line} has no {name}. Delete the line and run the study again")
    is_twice = table["run"].duplicated() | table[["arm", "budget", *SEEDS]].duplicated()
    if twice := table.loc[is_twice, "run"].tolist():
        raise UserError(f"{path}: {', '.join(twice[:3])} has two rows. Delete one of them")
    for kind, known in () if study is None else (("arm", study.arms), ("budget", study.budgets)):
        if unknown := sorted(set(table[kind]) - set(known)):
            raise UserError(
                f"{path}: {kind} {', '.join(unknown)} is not in the study (there are: {', '.join(known)}). Add it to "
                f"conf/study/{path.parent.name}.yaml, or delete its rows"
            )
    return table


def losses_of(path):
    """Loss per scored token of items.parquet, a row per run and a column per task; None without the file. UserError if
    it is damaged or lacks a column."""
    if not path.exists():
        return None
    items = read_study_items(path, ["run", "task", "num_tokens", "loss_sum"])
    sums = items.groupby(["run", "task"], sort=True)[["loss_sum", "num_tokens"]].sum()
    return (sums["loss_sum"].astype(float) / sums["num_tokens"]).unstack("task")


def flops_note(runs):
    """FLOPS_NOTE with a space before it if it applies to one of the runs (rows of runs.csv), else ""."""
    return f" {FLOPS_NOTE}" if runs["commit"].isin(EARLIER_FLOPS).any() else ""


def rate_factors(name):
    """{arm: factor on the default's learning rates} of conf/study/<name>.yaml, {} without that file."""
    path = DESIGNS / f"{name}.yaml"
    arms = params.load(path, "keys such as 'question:' and 'arms:'")["arms"] if path.is_file() else {}
    return {arm: (entry or {}).get("rate_factor", 1) for arm, entry in arms.items()}


def tasks_of(study):
    """The set of tasks that the study's runs were scored on."""
    scored = study.runs.dropna(axis="columns", how="all")
    return {column.removeprefix("accuracy_") for column in scored if column.startswith("accuracy_")}


def group_accuracy(runs, tasks):
    """Mean token accuracy over `tasks`, one value per row of `runs` (rows of runs.csv)."""
    return runs[[f"accuracy_{task}" for task in tasks]].mean(axis=1)


def headline_of(studies):
    """The study that leads the page: of those with all HEADLINE_ARMS, the one with most replicates of all three, then a
    complete one, then the one with the highest seeds (a later study takes seeds that were never used), then the one
    with most runs. None: there is none."""
    found = [study for study in studies if num_replicates(study)]
    return max(found, key=rank, default=None)


def default_of(studies, num_samples):
    """The study whose runs of the default recipe are the key figures: of those on the test split, with `num_samples`
    training samples if there is such a study, the one with most such runs, then the one with the highest seeds. The
    default may have changed since the headline arms were compared. None: there is none."""
    found = [study for study in studies if study.summary.split == "test" and len(default_runs(study))]
    whole = [study for study in found if (default_runs(study)["training_samples"] == num_samples).all()]
    return max(whole or found, key=lambda study: (len(default_runs(study)), *rank(study)[2:]), default=None)


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


def flops_ratio(study, entry):
    """Training FLOPs of the arm / those of its baseline, means over the paired runs; None without pairs."""
    own, base = paired_runs(study, entry)
    return float(own["training_flops"].mean() / base["training_flops"].mean()) if len(own) else None


def improvement(study, entry, group="all"):
    """1 - loss of the baseline / loss of the arm, an array with an entry per pair of runs, mean over the group's tasks;
    empty without per-item results of the group."""
    own, base = (study.losses(runs, group) for runs in paired_runs(study, entry))
    return np.zeros(0) if own is None else 1 - base / own


def trained_arms(chosen):
    """Those of the `ArmResult`s whose accuracies are results."""
    return [arm for arm in chosen if arm.answers_trained]


def arm_name(name):
    arm, _, budget = name.partition(", ")
    return ARM_NAMES.get(arm, arm) + (f", {budget_name(budget)}" if budget else "")


def group_name(name):
    return GROUP_NAMES.get(name, name)


def budget_name(budget):
    return budget.replace("equal_flops", "equal FLOPs")


def label(summary, arm):
    """Name of an `ArmResult`, with its budget if the study has several."""
    name = arm_name(arm.arm)
    return name if len({entry.budget for entry in summary.arms}) == 1 else f"{name}, {budget_name(arm.budget)}"
