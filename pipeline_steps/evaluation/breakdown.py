"""Scores of the item table by source, and by the frame that an answer token is about."""

from pipeline_steps.evaluation import per_frame


def source_scores(table, score):
    """{source: {task: {mode: Score}}}; score: function of the rows of one of them."""
    found = {}
    for (source, task, mode), rows in table.groupby(["source", "task", "mode"], sort=True):
        found.setdefault(source, {}).setdefault(task, {})[mode] = score(rows)
    return found


def frame_scores(table):
    """{task: {mode: PerFrame}} of the tasks with an answer per frame."""
    found = {}
    for (task, mode), rows in table.groupby(["task", "mode"], sort=True):
        if (scores := per_frame.aggregate(rows)) is not None:
            found.setdefault(task, {})[mode] = scores
    return found
