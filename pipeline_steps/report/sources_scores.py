"""The table of scores by source.

A table without rows says in its note what was not measured.
"""

from pipeline_steps.report.tables import MISSING, MODE_NAMES, MODES, Table, count, number, of_several, share

TEXT = "text"  # mode of the items without frames


def by_source(result):
    """Accuracy of every source and task; no rows where all items are of one source."""
    columns = ["source", "task", "items", *(MODE_NAMES[mode] for mode in MODES), "loss"]
    table = Table("scores_by_source", "Accuracy by source", columns, [])
    if result.sources is None:
        table.note = "Not measured by source."
    elif len(result.sources) < 2:
        table.note = f"All items are of one source: {', '.join(result.sources)}."
    else:
        table.rows = [
            source_row(source, task, scores)
            for source, tasks in result.sources.items()
            for task, scores in tasks.items()
        ]
        table.strong = [columns.index("autoregressive")]
        table.note = (
            "The same scores as above, apart for each source: where a task differs widely between its sources, "
            "the mean over them says little. In brackets 95% bootstrap intervals over items, in per cent. Loss: nats "
            "per scored answer token, autoregressive. Items without frames stand in the autoregressive column."
        )
    return table


def source_row(source, task, scores):
    deployed = scores.get("autoregressive") or scores[TEXT]
    cells = [
        share(score.accuracy, of_several(score, "accuracy")) if score else MISSING
        for score in (deployed, *(scores.get(mode) for mode in MODES[1:]))
    ]
    return [source, task, count(deployed.num_items), *cells, number(deployed.loss, 3, of_several(deployed, "loss"))]
