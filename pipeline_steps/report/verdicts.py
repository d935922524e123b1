"""The two questions and what the runs say about them.

Both compare separately trained networks on the same items by the ratio of their losses (mean over tasks,
autoregressive mode), with a margin within which losses count as equal. The 95 % interval over seeds and items decides:

"Does looking where you choose help?" is a test of superiority: validated when the whole interval of loss without the
choice / loss with it is above 1 + margin, not validated when it is below.
"Does one token per frame equal sixteen?" is a test of equivalence, two one-sided tests at 2.5 % each, which together
are the same as the 95 % interval lying within 1 - margin and 1 + margin. The lower one (one token is not worse) decides
between validated and not validated; the statement says whether the upper one makes it equal, or one token is better.

Undecided: fewer than `min_seeds` seeds of both, no per-item results, other data or items, other training budgets from
seed to seed, or an interval that reaches over the border.
"""

from dataclasses import dataclass, field

import numpy as np

from pipeline_steps.report import budgets, comparisons
from pipeline_steps.report.comparisons import BASELINE, Comparison, compare, different_data, outdated

VALIDATED, NOT_VALIDATED, UNDECIDED = "validated", "not validated", "undecided"
HELPS, EQUALS = "Does looking where you choose help?", "Does one token per frame equal sixteen?"


@dataclass
class Verdict:
    question: str
    status: str
    statement: str
    reasons: list[str] = field(default_factory=list)  # why it is undecided
    commands: list[str] = field(default_factory=list)  # which would change that
    comparison: Comparison | None = None


def verdicts(inputs, settings):
    """The verdicts of the page, in order."""
    fixed, sixteen = (
        "the same network trained with the static query only (A6)",
        "the same backbones with sixteen ordinary tokens per frame (B1)",
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
    """The verdict where no seed has a run of both."""
    absent = [name for name, runs in (("the default recipe", base), (arm, arms)) if not runs]
    what = " and ".join(absent) or f"{arm} with the seed of the default run"
    return Verdict(
        question,
        UNDECIDED,
        f"No separately trained run to compare with: the answer needs {arm_name}, on the same data.",
        reasons=[f"no results of {what} in reports/runs"],
        commands=missing_commands(base, arms, arm, needed),
    )


def kinds(base, arms):
    """The budget kinds of the single seeds."""
    return {budgets.kind_of([own], [other]) for own, other in zip(base, arms, strict=True)}


def doubts(comparison, border, settings, found_kinds):
    """Reasons why a comparison decides nothing."""
    reasons = []
    if comparison.interval is None:
        reasons.append("per-item results (items.parquet) of a run are missing, so there is no paired interval")
    elif comparison.interval[0] <= border <= comparison.interval[1]:
        reasons.append(f"the interval reaches over {border:.2f}, the border between yes and no")
        ratios = np.exp(comparison.loss.per_seed)
        if ratios.min() < border < ratios.max():
            reasons.append(f"the seeds disagree: ratios of {', '.join(f'{ratio:.2f}' for ratio in ratios)}")
    if len(comparison.seeds) < settings.min_seeds:
        reasons.append(f"{len(comparison.seeds)} of {settings.min_seeds} seeds")
    if len(found_kinds) > 1:
        reasons.append(f"the training budgets differ from seed to seed: {', '.join(sorted(found_kinds))}")
    return reasons


def stated(comparison, arm_name):
    """Effect, interval, seeds and items of a comparison."""
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
    """What the two one-sided tests say about sixteen tokens' loss / one token's."""
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
        return f"One token is not worse than sixteen by {margin:.0%}; whether equal or better is open ({tests})."
    return f"Neither equal nor worse is shown ({tests})."


def p_text(value):
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


def missing_commands(base, arms, arm, seeds):
    """Commands that train and keep the runs which are not there yet."""
    return [
        command
        for ablation, runs in ((BASELINE, base), (arm, arms))
        for seed in seeds
        if seed not in runs
        for command in run_commands(ablation, seed)
    ]


def run_commands(ablation, seed):
    """The commands that train one run in the workspace and keep its results for the report."""
    return [
        f"dvc exp run --name {ablation}-seed{seed} -S ablation={ablation} -S seed={seed}",
        "python -m pipeline_steps.report.keep",
    ]
