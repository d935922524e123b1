"""Ablation tables: every ablation against the default recipe, one table per kind of budget comparison."""

from pipeline_steps.report import budgets, comparisons
from pipeline_steps.report.comparisons import BASELINE
from pipeline_steps.report.statistics import ALPHA, holm
from pipeline_steps.report.tables import Table

COLUMNS = [
    "ablation",
    "loss / default",
    "accuracy, points",
    "p",
    "p (Holm)",
    "result",
    "seeds",
    "items",
    "training compute",
]
NOTE = (
    "Autoregressive mode, same items, runs paired by seed, means over tasks. A ratio above 1 means that the default "
    "recipe has the lower loss. Brackets: 95% intervals over seeds (random effect) and items (paired bootstrap); with "
    "one seed, over items only. p: two-sided, null hypothesis of equal losses, Student's t with the bootstrap's "
    "standard error. Holm: adjusted for all ablations of this table that have a p-value."
)
ABSENT = ("–", None)


def tables(inputs, settings):
    """`Table`s of ablations against the default recipe, one per kind of comparison (budgets.NAMES) that has runs."""
    compared, left_out = all_comparisons(inputs, settings)
    found = []
    for kind in budgets.NAMES:
        chosen = {name: comparison for name, comparison in compared.items() if comparison.kind == kind}
        if chosen:
            found.append(table_of(kind, chosen, settings))
    if left_out and found:
        found[-1].note += " Not compared: " + "; ".join(f"{name} ({reason})" for name, reason in left_out.items()) + "."
    return found


def all_comparisons(inputs, settings):
    """({ablation: `Comparison`}, {ablation: reason why it is not comparable})."""
    found = comparisons.groups(inputs)
    base, outdated = found.pop(BASELINE, {}), comparisons.outdated(inputs.current, inputs.runs)
    compared, left_out = {}, {}
    for name, runs in sorted(found.items()):
        seeds = sorted(set(base) & set(runs))
        pair = [base[seed] for seed in seeds], [runs[seed] for seed in seeds]
        reasons = outdated if seeds else ["no run of the default recipe with the same seed"]
        reasons = reasons or comparisons.different_data([*pair[0], *pair[1]])
        if reasons:
            left_out[name] = ", ".join(reasons)
        else:
            compared[name] = comparisons.compare(*pair, settings)
    return compared, left_out


def table_of(kind, compared, settings):
    """One table. Holm's correction covers its ablations."""
    tested = [name for name, entry in compared.items() if entry.loss and entry.loss.p_value is not None]
    adjusted = dict(zip(tested, holm([compared[name].loss.p_value for name in tested]), strict=True))
    rows = [row(name, entry, adjusted.get(name), settings) for name, entry in compared.items()]
    name = f"ablations_{kind.lower().replace('-', '_')}"
    title = f"Ablations against the default recipe: {budgets.NAMES[kind]}"
    return Table(name, title, COLUMNS, rows, NOTE, strong=[1])


def row(name, entry, adjusted, settings):
    ratio = f"{entry.ratio:.3f}"
    if entry.interval:
        ratio += " [{:.3f}–{:.3f}]".format(*entry.interval)
    p_value = entry.loss and entry.loss.p_value
    return [
        name,
        (ratio, entry.ratio),
        points(entry),
        ABSENT if p_value is None else (p_text(p_value), p_value),
        ABSENT if adjusted is None else (p_text(adjusted), adjusted),
        result(entry, adjusted, settings),
        (str(len(entry.seeds)), len(entry.seeds)),
        (str(entry.num_items), entry.num_items),
        ABSENT if entry.budget_ratios is None else (f"×{entry.budget_ratios[1]:.2f}", entry.budget_ratios[1]),
    ]


def points(entry):
    """The difference of the accuracies in points as a cell."""
    value = 100 * (entry.arm_accuracy - entry.accuracy)
    text = f"{value:+.1f}"
    if entry.accuracy_difference:
        text += " [{:+.1f} to {:+.1f}]".format(*(100 * border for border in entry.accuracy_difference.interval))
    return (text, value)


def result(entry, adjusted, settings):
    """The result in words: better or worse if Holm's p is below ALPHA, the same if the interval is within the
    margin; undecided without matched budgets, per-item results and enough seeds."""
    if entry.kind not in budgets.MATCHED:
        return f"undecided: {budgets.NAMES[entry.kind]}"
    if entry.loss is None:
        return "undecided: no per-item results"
    if len(entry.seeds) < settings.min_seeds:
        return f"undecided: {len(entry.seeds)} of {settings.min_seeds} seeds"
    margin = settings.margin
    same = 1 - margin < entry.interval[0] and entry.interval[1] < 1 + margin
    if adjusted is not None and adjusted < ALPHA:
        return ("worse" if entry.ratio > 1 else "better") + (f", within {margin:.0%}" if same else "")
    return f"the same within {margin:.0%}" if same else "undecided: the interval is too wide"


def p_text(value):
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
