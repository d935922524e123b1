"""Table of scores by source. The note of an empty table says what was not measured."""

from pipeline_steps.report.tables import MISSING, MODE_NAMES, MODES, Table, count, number, of_several, share

TEXT = "text"  # mode of the items without frames


def by_source(result):
    """Accuracy by source and task. No rows if all items have the same source."""
    columns = ["source", "task", "items", *(MODE_NAMES[mode] for mode in MODES), "loss"]
    table = Table("scores_by_source", "Accuracy by source", columns, [])
    if result.sources is None:
        table.note = "Not measured by source."
    elif len(result.sources) < 2:
        table.note = f"All items have the same source: {', '.join(result.sources)}."
    else:
        table.rows = [
            source_row(source, task, scores)
            for source, tasks in result.sources.items()
            for task, scores in tasks.items()
        ]
        table.strong = [columns.index("autoregressive")]
        table.note = (
            "The scores above by source. If a task differs widely between sources, its mean says little. Brackets: "
            "95% bootstrap intervals over clips, in per cent. Loss: nats per scored answer token, autoregressive "
            "mode. Scores of items without frames are in the autoregressive column."
        )
    return table


def source_row(source, task, scores):
    deployed = scores.get("autoregressive") or scores[TEXT]
    cells = [
        share(score.accuracy, of_several(score, "accuracy")) if score else MISSING
        for score in (deployed, *(scores.get(mode) for mode in MODES[1:]))
    ]
    return [source, task, count(deployed.num_items), *cells, number(deployed.loss, 3, of_several(deployed, "loss"))]
