"""Comparisons of an ablation with the default recipe: which runs are comparable, and by how much they differ.

They compare separately trained networks on the same items in autoregressive mode. (Coarse-only and multi-token networks
have a single pass, so their modes are equal.) pipeline_steps/report/statistics.py documents effects, intervals and
p-values.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pipeline_steps.report import budgets
from pipeline_steps.report.statistics import DIFFERENCE, LOG_RATIO, Effect, Resamples, Sums, paired_effect

MODE = "autoregressive"
BASELINE = "none"  # the ablation name of the default recipe


@dataclass
class Comparison:
    """Loss of an arm divided by the loss of the default recipe. Above 1 the default recipe is better."""

    ratio: float  # geometric mean over the seeds
    loss: Effect | None  # log of that ratio; None: no per-item results, so no interval
    accuracy_difference: Effect | None  # accuracy of the arm minus that of the default recipe
    accuracy: float  # default recipe, mean over tasks
    arm_accuracy: float
    seeds: list[int]
    num_tasks: int
    num_items: int
    kind: str  # one of budgets.NAMES
    budget_ratios: tuple[float, float] | None  # training samples and compute, arm / default; None: not kept

    @property
    def interval(self):
        """95 % of the ratio, over seeds and items (of one seed: over items only), or None."""
        return self.loss and self.loss.ratio_interval


def groups(inputs):
    """{ablation: {seed: run}} of all runs. The run of this page replaces a kept run with the same ablation and seed."""
    found = {}
    for run in [*inputs.runs, inputs.current]:
        found.setdefault(run.ablation, {})[run.seed] = run
    return found


def outdated(current, runs):
    """Reasons why kept runs are outdated: one has the ablation and seed of this run but another checkpoint."""
    return [
        f"reports/runs/{run.name} is not the run of this page, although ablation and seed are equal: run "
        "`python -m pipeline_steps.report.keep` again"
        for run in runs
        if (run.ablation, run.seed) == (current.ablation, current.seed)
        and run.result.provenance.get("checkpoint_sha256") != current.result.provenance.get("checkpoint_sha256")
    ]


def different_data(runs):
    """Reasons why runs are not comparable: different data, split, tasks or items."""
    reasons = []
    for key in ("shards_sha256", "tokens_sha256", "split"):
        values = {run.name: str(run.result.provenance.get(key))[:12] for run in runs}
        if len(set(values.values())) > 1:
            reasons.append(f"{key} differs: " + ", ".join(f"{name} {value}" for name, value in values.items()))
    if len({tuple(sorted(run.result.tasks)) for run in runs}) > 1:
        reasons.append("the runs have different tasks")
    elif all(run.items is not None for run in runs) and len({scored_items(run) for run in runs}) > 1:
        reasons.append(
            "the runs scored different items or tokens of them (evaluation.seed or evaluation.max_items_per_task)"
        )
    return reasons


@lru_cache(maxsize=64)  # every ablation needs the default recipe's runs
def scored_items(run):
    """{(key, item, number of scored tokens)} of a run in the mode of the comparison."""
    rows = run.items[run.items["mode"] == MODE]
    return frozenset(zip(rows["key"], rows["item"], rows["num_tokens"], strict=True))


def compare(base, arms, settings):
    """`Comparison` of two lists of runs, paired by position (equal seeds). settings: report.schema.Section."""
    tasks = sorted(base[0].result.tasks)
    scores = {name: [means_of(run, tasks) for run in runs] for name, runs in (("base", base), ("arm", arms))}
    ratios = [arm[0] / own[0] for own, arm in zip(scores["base"], scores["arm"], strict=True)]
    loss = accuracy = None
    if all(run.items is not None for run in (*base, *arms)):
        loss, accuracy = effects(base, arms, tasks, settings)
    return Comparison(
        ratio=loss.ratio if loss else float(np.exp(np.mean(np.log(ratios)))),
        loss=loss,
        accuracy_difference=accuracy,
        accuracy=float(np.mean([score[1] for score in scores["base"]])),
        arm_accuracy=float(np.mean([score[1] for score in scores["arm"]])),
        seeds=[run.seed for run in base],
        num_tasks=len(tasks),
        num_items=sum(base[0].result.tasks[task][MODE].num_items for task in tasks),
        kind=budgets.kind_of(base, arms),
        budget_ratios=budgets.ratios_of(base, arms),
    )


def means_of(run, tasks):
    """(loss, accuracy) of a run, means over the tasks."""
    scores = [run.result.tasks[task][MODE] for task in tasks]
    return float(np.mean([score.loss for score in scores])), float(np.mean([score.accuracy for score in scores]))


def effects(base, arms, tasks, settings):
    """(`Effect` on the log loss, `Effect` on the accuracy)."""
    base, arms = ([item_sums(run, tuple(tasks)) for run in runs] for runs in (base, arms))
    resamples = resamples_of(base[0].task_sizes, settings.bootstrap_samples, settings.seed)
    return tuple(
        paired_effect(
            *(np.stack([getattr(sums, name) for sums in runs]) for runs in (base, arms)),
            base[0].num_tokens,
            resamples,
            scale,
        )
        for name, scale in (("loss_sum", LOG_RATIO), ("num_correct", DIFFERENCE))
    )


@lru_cache(maxsize=4)
def resamples_of(task_sizes, num_samples, seed):
    """The same resamples for every comparison of a table."""
    return Resamples(task_sizes, num_samples, seed)


@lru_cache(maxsize=64)
def item_sums(run, tasks):
    """`Sums` of a run's clips in the mode of the comparison, sorted by task and key: a clip's items are one unit."""
    rows = run.items[(run.items["mode"] == MODE) & run.items["task"].isin(tasks)]
    columns = ["num_tokens", "loss_sum", "num_correct"]
    rows = rows.groupby(["task", "key"], sort=True)[columns].sum().reset_index()
    sizes = rows["task"].value_counts()
    return Sums(
        tuple(int(sizes[task]) for task in tasks),
        *(rows[name].to_numpy(dtype=float) for name in columns),
    )
