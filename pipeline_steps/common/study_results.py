"""Schema of reports/study/<name>/summary.json, which a study writes and the report reads."""

from typing import Literal

from pipeline_steps.common.metrics import Result

BETTER, EQUAL, WORSE, UNDECIDED, UNMATCHED = "better", "equal", "worse", "undecided", "unmatched budgets"
EXPLORATORY = "exploratory"


class ArmResult(Result):
    """The finished runs of an arm at a budget; lists have one entry per run."""

    arm: str
    """Name of the arm."""
    budget: str
    """Name of the budget."""
    seeds: list[list[int]]
    """Seeds of training, backbones and data."""
    groups: dict[str, list[float]]
    """By group of tasks: mean token accuracy, autoregressive mode."""
    exact_match: list[float | None]
    """Share of generated answers that are right, mean over tasks."""
    num_above_plateau: int
    """Runs whose mean token accuracy is at least the study's `plateau`."""
    num_converged: int
    """Runs whose validation loss had stopped falling."""
    num_measured: int
    """Runs for which that could be measured."""
    training_samples: float
    """Mean over runs."""
    training_flops: float
    """Mean over runs."""
    training_seconds: float | None
    """Median over runs without interruption; null: there is none."""


class ComparisonResult(Result):
    """The baseline against an arm in a group of tasks, over pairs of runs with equal seeds."""

    arm: str
    """Name of the arm, with its budget if the study has several."""
    baseline: str
    """The arm that it is compared with."""
    group: str
    """Name of the group of tasks."""
    differences: list[float]
    """Accuracy of the baseline minus the arm's, per pair."""
    interval: tuple[float, float] | None
    """95 % t-interval of the mean difference; null: one pair."""
    bounded_interval: tuple[float, float]
    """95 % interval for any distribution."""
    p_value: float
    """Exact sign-flip test, two-sided."""
    p_adjusted: float
    """The same after Holm's correction for the headline questions."""
    verdict: Literal["better", "equal", "worse", "undecided", "unmatched budgets", "exploratory"]
    """Of the baseline; exploratory: not among the study's headline questions."""
    smallest_margin: float | None
    """Margin with which these runs would be called equal."""
    matched: str | None
    """What the budgets have in common: samples, FLOPs, both, or convergence (every run has converged); null: nothing,
    or unknown."""
    num_not_converged: int
    """Runs of both arms whose validation loss was still falling."""


class StudySummary(Result):
    """What a study has found so far."""

    name: str
    """File name in conf/study."""
    question: str
    """What the study asks."""
    baseline: str
    """The first arm."""
    num_runs: int
    """Finished runs."""
    num_planned: int
    """All runs."""
    margin: float
    """Differences below it count as none."""
    plateau: float
    """Mean token accuracy from which a run has left the plateau."""
    split: str = "test"
    """Split that was scored; studies that choose a recipe score the validation split."""
    group_tasks: dict[str, list[str]] = {}
    """Tasks of every group of `comparisons`; empty in files of an earlier version."""
    arms: list[ArmResult]
    """In the study's order."""
    comparisons: list[ComparisonResult]
    """Every arm and group of tasks."""
