"""Table of multiple-choice items. The note of an empty table says what was not measured."""

from pipeline_steps.common.metrics import SCORINGS
from pipeline_steps.report.cells import difference, optional
from pipeline_steps.report.tables import Table, count, share

ALL = "all"  # the group of all items


def multiple_choice(result):
    """A row per group and scoring, the group of all items last."""
    columns = ["group", "scoring", "items", "accuracy", "chance", "blind", "gain over blind", "no option", "bias"]
    table = Table("multiple_choice", "Multiple choice", columns, [], strong=[3])
    for name in sorted(result.multiple_choice, key=lambda name: name == ALL):
        group = result.multiple_choice[name]
        for scoring in SCORINGS:
            if scoring in group.scorings:
                if name == ALL:
                    table.summary.append(len(table.rows))
                table.rows.append([name, scoring, *choice_cells(group, scoring)])
    table.note = (
        "Share of items with the correct option chosen. Brackets: 95% bootstrap intervals over clips. Gain: points of "
        "accuracy above the same network with grey frames; if its interval includes 0, the options alone may give the "
        "answer. Scorings: letter (most likely letter), likelihood (option with the lowest loss per token), "
        "generation (option that the generated answer names; no option: share of answers that name none and count as "
        "wrong). Bias: distance between the distributions of chosen and correct letters, 0 = none."
        if table.rows
        else "Not measured: no item of this split has options."
    )
    return table


def choice_cells(group, scoring):
    score, several = group.scorings[scoring], group.num_items > 1
    return [
        count(group.num_items),
        share(score.accuracy, score.interval if several else None),
        share(group.chance),
        share(score.blind, score.blind_interval if several else None),
        difference(score.gain, score.gain_interval if several else None),
        share(group.no_option if scoring == "generation" else None),
        optional(group.position_bias.get(scoring), 2),
    ]
