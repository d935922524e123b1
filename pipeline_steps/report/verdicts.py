"""The verdicts: two questions, answered by comparing separately trained networks.

Both compare networks on the same items by the ratio of their losses (mean over tasks, autoregressive mode). Losses
within a margin count as equal. The 95 % interval of the ratio over seeds and items decides:

"Do planned queries help?" is a test of superiority: validated if the whole interval of loss with the static query /
loss with planned queries is above 1 + margin, not validated if it is below.
"Is one token per frame as good as sixteen?" is a test of equivalence: two one-sided tests at 2.5 % each, equivalent to
the 95 % interval lying between 1 - margin and 1 + margin. The lower bound (one token is not worse) decides between
validated and not validated; the statement adds whether one token is equal or better.

Undecided: fewer than `min_seeds` seeds of both arms, no per-item results, different data or items, training budgets
that are unknown, equal in neither samples nor compute, or differ from seed to seed, or an interval that includes the
threshold.
"""

from dataclasses import dataclass, field

import numpy as np

from pipeline_steps.report import budgets, comparisons
from pipeline_steps.report.comparisons import BASELINE, Comparison, compare, different_data, outdated

VALIDATED, NOT_VALIDATED, UNDECIDED = "validated", "not validated", "undecided"
HELPS, EQUALS = "Do planned queries help?", "Is one token per frame as good as sixteen?"


@dataclass
class Verdict:
    question: str
    status: str
    statement: str
    reasons: list[str] = field(default_factory=list)  # reasons for undecided
    commands: list[str] = field(default_factory=list)  # commands that produce the missing runs
    comparison: Comparison | None = None


def verdicts(inputs, settings):
    """All verdicts, in the order of the page."""
    fixed, sixteen = (
        "the same network trained with the static query only (A6)",
        "the same backbones with sixteen average-pooled tokens per frame (B1)",
    )
    return [judge(inputs, settings, HELPS, "A6", fixed), judge(inputs, settings, EQUALS, "B1", sixteen)]


def judge(inputs, settings, question, arm, arm_name):
    """`Verdict` on `question` from the runs of the ablation `arm` and of the default recipe."""
    found = comparisons.groups(inputs)
    base, arms = found.get(BASELINE, {}), found.get(arm, {})
    seeds = sorted(set(base) & set(arms))
    needed = list(range(1, settings.min_seeds + 1))
    if not seeds:
        return without_runs(question, base, arms, arm, arm_name, needed)
    paired = [base[seed] for seed in seeds], [arms[seed] for seed in seeds]
    reasons = outdated(inputs.current, inputs.runs) + different_data([*paired[0], *paired[1]])
    if reasons:
        statement = f"The runs of {arm} and of the default recipe are not comparable."
        return Verdict(question, UNDECIDED, statement, reasons=reasons)
    comparison = compare(*paired, settings)
    border = 1 + settings.margin if question == HELPS else 1 - settings.margin
    reasons = doubts(comparison, border, settings, kinds(*paired))
    statement = stated(comparison, arm_name)
    if question == EQUALS and comparison.loss:
        statement += " " + equivalence(comparison.loss, settings.margin)
    if reasons:
        commands = missing_commands(base, arms, arm, needed)
        return Verdict(question, UNDECIDED, statement, reasons, commands, comparison)
    status = VALIDATED if comparison.interval[0] > border else NOT_VALIDATED
    return Verdict(question, status, statement, comparison=comparison)


def without_runs(question, base, arms, arm, arm_name, needed):
    """The verdict if no seed has a run of both arms."""
    absent = [name for name, runs in (("the default recipe", base), (arm, arms)) if not runs]
    what = " and ".join(absent) or f"{arm} with a seed of the default recipe's runs"
    return Verdict(
        question,
        UNDECIDED,
        f"reports/runs has no kept single run to compare with. The answer needs {arm_name}, trained on the same data.",
        reasons=[f"no results of {what} in reports/runs"],
        commands=missing_commands(base, arms, arm, needed),
    )


def kinds(base, arms):
    """The kinds of comparison (budgets.NAMES) of the single seeds."""
    return {budgets.kind_of([own], [other]) for own, other in zip(base, arms, strict=True)}


def doubts(comparison, border, settings, found_kinds):
    """Reasons why a comparison is undecided."""
    reasons = []
    if comparison.interval is None:
        reasons.append("per-item results (items.parquet) of a run are missing, so there is no paired interval")
    elif comparison.interval[0] <= border <= comparison.interval[1]:
        reasons.append(f"the interval includes {border:.2f}, the threshold between yes and no")
        ratios = np.exp(comparison.loss.per_seed)
        if ratios.min() < border < ratios.max():
            reasons.append(f"the seeds disagree: ratios of {', '.join(f'{ratio:.2f}' for ratio in ratios)}")
    if len(comparison.seeds) < settings.min_seeds:
        reasons.append(f"{len(comparison.seeds)} of {settings.min_seeds} seeds")
    if len(found_kinds) > 1:
        reasons.append(f"the training budgets differ from seed to seed: {', '.join(sorted(found_kinds))}")
    elif comparison.kind not in budgets.MATCHED:
        reasons.append(budgets.NAMES[comparison.kind])
    return reasons


def stated(comparison, arm_name):
    """A comparison in words: effect, interval, seeds and items."""
    num_seeds = len(comparison.seeds)
    text = f"Loss of {arm_name}: {comparison.ratio:.2f} times that of planned queries"
    if comparison.interval:
        over = "seeds and items" if num_seeds > 1 else "items only"
        text += " [{:.2f}, {:.2f}]".format(*comparison.interval) + f" (95% interval over {over})"
    text += f"; accuracy {comparison.arm_accuracy:.1%} against {comparison.accuracy:.1%}"
    if comparison.accuracy_difference:
        low, high = (100 * border for border in comparison.accuracy_difference.interval)
        text += f", {100 * comparison.accuracy_difference.value:+.1f} points [{low:+.1f}, {high:+.1f}]"
    text += f". {num_seeds} seed{'s' * (num_seeds > 1)}, {comparison.num_tasks} tasks, "
    text += f"{comparison.num_items} items; {budgets.NAMES[comparison.kind]}"
    if comparison.budget_ratios:
        text += " (samples ×{:.2f}, compute ×{:.2f})".format(*comparison.budget_ratios)
    return text + "."


def equivalence(loss, margin):
    """The result of the two one-sided tests in words. loss: `Effect` on log(loss of sixteen tokens / loss of one)."""
    low, high = np.log(1 - margin), np.log(1 + margin)
    tests = (
        f"two one-sided tests: not worse by {margin:.0%} p {p_text(loss.p_above(low))}, "
        f"not better by {margin:.0%} p {p_text(loss.p_below(high))}"
    )
    interval = loss.interval
    if interval[0] > high:
        return f"One token is better than sixteen by more than {margin:.0%} ({tests})."
    if interval[1] < low:
        return f"One token is worse than sixteen by more than {margin:.0%} ({tests})."
    if low < interval[0] and interval[1] < high:
        return f"One token equals sixteen within {margin:.0%} ({tests})."
    if low < interval[0]:
        return f"One token is not worse than sixteen by {margin:.0%}; it may be equal or better ({tests})."
    return f"The tests show neither that one token is equal nor that it is worse ({tests})."


def p_text(value):
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


def missing_commands(base, arms, arm, seeds):
    """Commands that train and keep the missing runs."""
    return [
        command
        for ablation, runs in ((BASELINE, base), (arm, arms))
        for seed in seeds
        if seed not in runs
        for command in run_commands(ablation, seed)
    ]


def run_commands(ablation, seed):
    """Commands that train one run in the workspace and keep its results for the report."""
    return [
        f"dvc exp run --name {ablation}-seed{seed} -S ablation={ablation} -S seed={seed}",
        "python -m pipeline_steps.report.keep",
    ]
