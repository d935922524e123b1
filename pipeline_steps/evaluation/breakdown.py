"""The item table by source, and by the frame that an answer is about."""

from pipeline_steps.evaluation import per_frame


def source_scores(table, score):
    """{source: {family: {mode: Score}}}; score: function of the rows of one of them."""
    found = {}
    for (source, family, mode), rows in table.groupby(["source", "family", "mode"], sort=True):
        found.setdefault(source, {}).setdefault(family, {})[mode] = score(rows)
    return found


def frame_scores(table):
    """{family: {mode: PerFrame}} of the families with an answer per frame."""
    found = {}
    for (family, mode), rows in table.groupby(["family", "mode"], sort=True):
        if (seen := per_frame.aggregate(rows)) is not None:
            found.setdefault(family, {})[mode] = seen
    return found
