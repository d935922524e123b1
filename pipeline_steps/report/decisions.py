"""The decision table: what the studies say about every choice of the default recipe.

A row compares the default recipe with one alternative, in every group of tasks, in the study with most pairs of both.
The verdicts of the groups decide by the row's rule; an alternative without runs is listed with its command. Where the
study's exact test says nothing, of fewer than six pairs or beyond its headline questions, uncorrected intervals decide.
Recipes are chosen on validation data, so what intervals say of the test split is exploratory.
"""

from dataclasses import dataclass

from pipeline_steps.common.study_results import BETTER, EQUAL, EXPLORATORY, TOO_FEW, UNMATCHED, WORSE
from pipeline_steps.report import studies, study_tables
from pipeline_steps.report.statistics import interval_verdict
from pipeline_steps.report.tables import MISSING, Table

CHEAPER, OTHER = "cheaper", "other"
FEWEST_PAIRS = 6  # with which a two-sided sign-flip test can have p < 0.05
RULES = {CHEAPER: "unless worse", OTHER: "if better"}  # when an alternative is adopted


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
    Choice("size", "foveated_M", "language model M, not S", OTHER, "scaling", "foveated_S"),
    Choice("size", "foveated_L", "language model L, not S", OTHER, "scaling", "foveated_S"),
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
    columns += ["verdict", "adopted"]
    note = (
        "Default minus alternative, token accuracy [95% t-interval] of pairs of runs with equal seeds; of sizes, the "
        "smaller minus the larger. An alternative that costs less is adopted if it is equal or better in every group "
        "of tasks, any other if it is better in one and equal or better in the others. Tested: by exact tests, "
        "corrected for the study's questions; else the intervals decide, equal within the study's margin, not "
        "corrected. Exploratory: such intervals of the test split, as recipes are chosen on validation data. x0.3: "
        "the default has three tenths of its samples, an alternative at equal FLOPs fewer; not converged. "
        "Alternatives have the default's learning rates, which need not suit them (`make study name=rates`); own "
        "rates: both have four times the default's, the best factor tried for each. "
        f"{study_tables.TIERS}"
        if groups
        else "No study in reports/study has runs of these alternatives."
    )
    return Table("decisions", "Decisions", columns, rows, note)


def name_of(choice, budget=""):
    is_told = not budget or choice.equal_flops  # the description says it
    return f"{choice.decision}: {choice.description}" + ("" if is_told else f", {studies.budget_name(budget)}")


def not_run(choice):
    return f"not run: make study name={choice.study}"


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


def verdict_text(choice, study, own):
    """What the comparisons `own` ({group: `ComparisonResult`}) decide, by group where these differ, of which study."""
    verdicts = {group: verdict(entry, study.summary.margin) for group, entry in own.items()}
    if TOO_FEW in verdicts.values():
        return attributed(TOO_FEW, study, own)
    text = outcome(choice.rule, list(verdicts.values()))
    if len(set(verdicts.values())) > 1 or UNMATCHED in verdicts.values():
        text += "; " + ", ".join(f"{group}: {OF_ALTERNATIVE.get(found, found)}" for group, found in verdicts.items())
    return attributed(text, study, own)


OF_ALTERNATIVE = {BETTER: "worse", WORSE: "better"}  # by the verdict on the default; the others are symmetric


def verdict(entry, margin):
    """The verdict on the default of a `ComparisonResult`: the study's, or the interval's if its test says nothing."""
    if entry.matched is None or not by_interval(entry):
        return entry.verdict
    return interval_verdict(entry.interval, len(entry.differences), margin)


def by_interval(entry):
    return len(entry.differences) < FEWEST_PAIRS or entry.verdict == EXPLORATORY


def attributed(found, study, own):
    """The outcome `found` with what is behind it: the study, its budget if it has one other than the default's, the
    number of pairs, whether their test decides or their interval explores, and the split."""
    first, split = next(iter(own.values())), study.summary.split
    count, budgets = len(first.differences), {arm.budget for arm in study.summary.arms}
    parts = [study.name, *(budgets - {"x1"} if len(budgets) == 1 else ()), f"{count} pair{'s' * (count > 1)}"]
    if not by_interval(first):
        parts.append("tested")
    elif split == "test":
        parts.append("exploratory")
    return f"{found} ({', '.join([*parts, f'{split} split'])})"


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
    """A cell per group of tasks: how much lower the default's loss is."""
    return [
        study_tables.gain_cells(studies.improvement(study, own[group], group))[0] if group in own else MISSING
        for group in groups
    ]


def outcome(rule, verdicts):
    """What the verdicts on the default, one per group of tasks, decide by a rule."""
    if BETTER in verdicts:
        return "depends on the tasks" if WORSE in verdicts else "keep the default"
    if not set(verdicts) <= {EQUAL, WORSE}:
        return "undecided"
    return "take the alternative" if WORSE in verdicts or rule == CHEAPER else "keep the default"
