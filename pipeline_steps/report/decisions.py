"""The decision table: what the studies say about every choice of the default recipe.

A row compares the default recipe with one alternative, in every group of tasks, in the study with most pairs of both.
Effects and verdicts are the default's. The verdicts of the groups decide by the row's rule; an alternative without runs
is listed with its study. Where the study's exact test says nothing, of fewer than six pairs or beyond its headline
questions, uncorrected intervals decide. Recipes are chosen on validation data, so what intervals say of the test split
is exploratory.
"""

from dataclasses import dataclass

from pipeline_steps.common.study_results import (
    BETTER,
    EQUAL,
    EXPLORATORY,
    TOO_FEW,
    UNDECIDED,
    UNMATCHED,
    WORSE,
)
from pipeline_steps.report import studies, study_tables
from pipeline_steps.report.statistics import FEWEST_PAIRS, interval_verdict
from pipeline_steps.report.tables import MISSING, Table

CHEAPER, OTHER = "cheaper", "other"
RULES = {CHEAPER: "unless default better", OTHER: "if default worse"}  # when an alternative is taken
MIXED = "better and worse"  # the default, in different groups of tasks
DECIDED = {BETTER: "keep the default", MIXED: "depends on the tasks", WORSE: "take the alternative"}


@dataclass(frozen=True)
class Choice:
    """An alternative to the default recipe."""

    decision: str
    arm: str  # name of the arm in a study
    description: str
    rule: str  # a key of RULES
    study: str  # in conf/study, that runs it
    baseline: str = "none"
    equal_flops: bool = False  # at equal training FLOPs that are not equal samples


CHOICES = (
    Choice("static query", "A6", "one token (A6)", CHEAPER, "confirm_longest"),
    Choice("static query", "A6_16", "sixteen tokens", OTHER, "tokens"),
    Choice("more tokens", "B1", "sixteen pooled (B1)", OTHER, "confirm_longest"),
    Choice(
        "more tokens",
        "B1",
        "sixteen pooled (B1), equal FLOPs, own rates",
        OTHER,
        "equal_flops_rates",
        equal_flops=True,
    ),
    Choice("more tokens", "B1_4", "four pooled", OTHER, "tokens"),
    Choice("freeze", "F1", "both backbones (F1)", CHEAPER, "phase1a"),
    Choice("freeze", "F2", "language model (F2)", CHEAPER, "phase1a"),
    Choice("freeze", "frozen_vision", "vision encoder (A5)", CHEAPER, "ideas"),
    Choice("connector rate", "LR2", "× 10 (LR2)", OTHER, "phase1a"),
    Choice("connector rate", "LR3", "× 0.3 (LR3)", OTHER, "phase1a"),
    Choice("connector rate", "LR4", "× 0.1 (LR4)", OTHER, "phase1a"),
    Choice("shallow query", "A1", "last layer only (A1)", CHEAPER, "phase1a"),
    Choice("planning passes", "passes2", "two", OTHER, "controls"),
    Choice("stills", "A8a", "one frame (A8a)", CHEAPER, "phase1a"),
    Choice("stills", "A8b", "sixteen frames (A8b)", OTHER, "phase1a"),
    Choice("mix", "D1", "55/30/15 % video, stills, text (D1)", OTHER, "phase1a"),
    Choice("mix", "reading", "more captions and stills", OTHER, "recipe"),
    Choice("mix", "T1", "no text-only samples (T1)", OTHER, "controls"),
    Choice("size", "foveated_M", "language model of width 96, not 64", OTHER, "scaling", "foveated_S"),
    Choice("size", "foveated_L", "language model of width 144, not 64", OTHER, "scaling", "foveated_S"),
)


def table(found):
    """`Table` of all CHOICES from a list of `studies.Study`, those without runs last."""
    chosen = sorted(((choice, best_study(choice, found)) for choice in CHOICES), key=lambda pair: pair[1] is None)
    groups = list(dict.fromkeys(entry.group for choice, study in chosen if study for entry in entries(choice, study)))
    rows = []
    for choice, study in chosen:
        if study is None:
            rows.append([name_of(choice), *[MISSING] * 2 * len(groups), not_run(choice), RULES[choice.rule]])
        else:
            rows += [row(choice, study, label, groups) for label in labels(choice, study)]
    columns = ["alternative", *(f"{group}, points" for group in groups), *(f"lower loss, {group}" for group in groups)]
    columns += ["verdict", "alternative taken"]
    note = (
        "Default minus alternative, token accuracy [95% t-interval] of pairs of runs with equal seeds; of sizes, the "
        "smaller minus the larger. Verdicts too are the default's. An alternative that costs less is taken if the "
        "default is better in no group of tasks and equal or worse in each, any other if it is also worse in one. "
        "Tested: by exact tests, corrected for the study's questions; else the intervals decide, equal within the "
        "study's margin, not corrected. Exploratory: such intervals of the test split, as recipes are chosen on "
        "validation data. All on the test split unless said. x0.3: the default has three tenths of its samples, an "
        "alternative at equal FLOPs fewer. Alternatives have the default's learning rates, which need not suit them "
        "(study rates); own rates: both have four times the default's, the best factor tried for each at equal "
        f"samples. {study_tables.TIERS} Brackets below it: the tier."
        if groups
        else "No study in reports/study has runs of these alternatives."
    )
    return Table("decisions", "Decisions", columns, rows, note)


def name_of(choice, budget=""):
    is_told = not budget or choice.equal_flops  # the description says it
    return f"{choice.decision}: {choice.description}" + ("" if is_told else f", {studies.budget_name(budget)}")


def not_run(choice):
    return f"not run (study {choice.study})"


def missing(found):
    """Names of the studies of alternatives without runs."""
    return {choice.study for choice in CHOICES if best_study(choice, found) is None}


def entries(choice, study):
    """The `ComparisonResult`s of a choice in a study, of all budgets and groups."""
    return [
        entry
        for entry in study.summary.comparisons
        if entry.arm.partition(", ")[0] == choice.arm
        and entry.baseline == choice.baseline
        and (entry.matched == "FLOPs") == choice.equal_flops
    ]


def labels(choice, study):
    """Labels of a choice's comparisons in a study, one per budget; of a scaling grid, that of the largest budget."""
    found = list(dict.fromkeys(entry.arm for entry in entries(choice, study)))
    if not study.summary.series:
        return found
    samples = {arm.budget: arm.training_samples for arm in study.summary.arms if arm.arm == choice.arm}
    return [max(found, key=lambda label: samples.get(label.partition(", ")[2], 0))]


def best_study(choice, found, measured=entries, size=lambda entry: len(entry.differences)):
    """The study with most pairs of a choice, of these the one with the highest seeds; None without runs. measured: what
    a study has of a choice; size: the pairs, or runs, of one of these."""
    having = [study for study in found if measured(choice, study)]

    def key(study):
        return max(map(size, measured(choice, study))), studies.rank(study)[1:]

    return max(having, key=key, default=None)


def by_group(choice, study, label):
    """{group of tasks: `ComparisonResult`} of a choice at one budget."""
    return {entry.group: entry for entry in entries(choice, study) if entry.arm == label}


def effect_cells(own, groups):
    """A cell per group of tasks, of what `by_group` returns."""
    return [
        study_tables.interval_cell(own[group].differences, own[group].interval) if group in own else MISSING
        for group in groups
    ]


def verdict_text(choice, study, own, said=()):
    """What the comparisons `own` ({group: `ComparisonResult`}) decide, by group where these differ, of which runs.
    said: names of facts of `attribution` to leave out."""
    verdicts = {group: verdict(entry, study.summary.margin) for group, entry in own.items()}
    text = outcome(choice.rule, list(verdicts.values()))
    if text != TOO_FEW and (len(set(verdicts.values())) > 1 or UNMATCHED in verdicts.values()):
        text += "; default: " + ", ".join(f"{group} {found}" for group, found in verdicts.items())
    return attributed(text, {name: fact for name, fact in attribution(study, own).items() if name not in said})


def verdict(entry, margin):
    """The verdict on the default of a `ComparisonResult`: the study's, or the interval's if its test says nothing."""
    if entry.matched is None or not by_interval(entry):
        return entry.verdict
    found = interval_verdict(entry.interval, len(entry.differences), margin)
    return UNDECIDED if found == EQUAL and entry.beats_blind is False else found


def by_interval(entry):
    return len(entry.differences) < FEWEST_PAIRS or entry.verdict == EXPLORATORY


def attribution(study, own):
    """{name: fact} of what is behind the comparisons `own`: the study, its budget if it has one other than the
    default's, the number of pairs, whether their test decides or their interval explores, the split if it is not test,
    and how many runs had not converged."""
    first, split = next(iter(own.values())), study.summary.split
    count, budgets = len(first.differences), {arm.budget for arm in study.summary.arms}
    test = "" if by_interval(first) else "tested"
    facts = {
        "study": study.name,
        "budget": next(iter(budgets - {"x1"}), "") if len(budgets) == 1 else "",
        "pairs": f"{count} pair{'s' * (count > 1)}",
        "test": "exploratory" if not test and split == "test" else test,
        "split": "" if split == "test" else f"{split} split",
        "convergence": first.convergence,
    }
    return {name: fact for name, fact in facts.items() if fact}


def attributed(found, facts):
    """The outcome `found` with the facts that are behind it."""
    return f"{found} ({', '.join(facts.values())})" if facts else found


def shared(facts):
    """The facts that all of several {name: fact} have."""
    first, *others = facts or [{}]
    return {name: fact for name, fact in first.items() if all(other.get(name) == fact for other in others)}


def row(choice, study, label, groups):
    own = by_group(choice, study, label)
    return [
        name_of(choice, label.partition(", ")[2]),
        *effect_cells(own, groups),
        *loss_cells(study, own, groups),
        verdict_text(choice, study, own),
        RULES[choice.rule],
    ]


def loss_cells(study, own, groups):
    """A cell per group of tasks: how much lower the default's loss is, with its tier."""
    return [loss_cell(studies.improvement(study, own[group], group)) if group in own else MISSING for group in groups]


def loss_cell(gain):
    (text, mean), _ = study_tables.gain_cells(gain)
    return MISSING if mean is None else (f"{text} [{study_tables.tier_name(mean / 100)}]", mean)


def outcome(rule, verdicts):
    """What the verdicts on the default, one per group of tasks, decide by a rule."""
    found = overall(verdicts)
    if found == EQUAL:
        return DECIDED[WORSE if rule == CHEAPER else BETTER]
    return DECIDED.get(found, found)


def overall(verdicts):
    """One verdict on the default from those of the groups of tasks: better if it is in one and worse in none, equal or
    worse only if none is open."""
    if TOO_FEW in verdicts:
        return TOO_FEW
    if BETTER in verdicts:
        return MIXED if WORSE in verdicts else BETTER
    if not set(verdicts) <= {EQUAL, WORSE}:
        return UNDECIDED
    return WORSE if WORSE in verdicts else EQUAL
