"""Scores of the item table by source, and by the frame that an answer token refers to."""

from pipeline_steps.evaluation import per_frame


def source_scores(table, score):
    """{source: {task: {mode: Score}}}; score: function of the rows of one group."""
    found = {}
    for (source, task, mode), rows in table.groupby(["source", "task", "mode"], sort=True):
        found.setdefault(source, {}).setdefault(task, {})[mode] = score(rows)
    return found


def frame_scores(table):
    """{task: {mode: PerFrame}} of the tasks with one answer token per frame."""
    found = {}
    for (task, mode), rows in table.groupby(["task", "mode"], sort=True):
        if (scores := per_frame.aggregate(rows)) is not None:
            found.setdefault(task, {})[mode] = scores
    return found
