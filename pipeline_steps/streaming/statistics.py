"""Count what a run reads, from its plan and the index alone."""

import numpy as np

from pipeline_steps.common.metrics import SampleCounts, StageCounts
from pipeline_steps.streaming.loader import StagePlan


def count(dataset, planned: StagePlan, *, image_replication: int, tokens_per_frame: int) -> StageCounts:
    """Count a stage's plan on a `TokenizedShards` by source and task."""
    index, order = dataset.index, planned.plan.order
    group = index.source.astype(np.int64) * len(index.tasks) + index.task  # source and task of every item
    frames = index.shown_frames(image_replication)
    num_groups = len(index.sources) * len(index.tasks)
    columns = {
        "num_items": np.bincount(group, minlength=num_groups),
        "num_samples": np.bincount(group[order], minlength=num_groups),
    }
    amounts = {
        "num_frames": frames,
        "text_tokens": index.num_tokens,
        "visual_tokens": frames * tokens_per_frame,
        "num_truncated": index.truncated,
    }
    for name, values in amounts.items():
        columns[name] = np.bincount(group[order], weights=values[order], minlength=num_groups).astype(np.int64)
    sources: dict[str, dict[str, SampleCounts]] = {}
    for code in np.flatnonzero(columns["num_items"]):
        source, task = divmod(int(code), len(index.tasks))
        row = _sample_counts({name: int(values[code]) for name, values in columns.items()}, len(order))
        sources.setdefault(index.sources[source], {})[index.tasks[task]] = row
    total = _sample_counts({name: int(values.sum()) for name, values in columns.items()}, len(order))
    unmatched = planned.groups.unmatched
    return StageCounts(num_steps=planned.plan.num_steps, sources=sources, total=total, unmatched=unmatched)


def _sample_counts(counts: dict[str, int], num_samples: int) -> SampleCounts:
    return SampleCounts(
        **counts, share=counts["num_samples"] / num_samples, epochs=counts["num_samples"] / counts["num_items"]
    )


COLUMNS = {  # title -> cell of a `SampleCounts`, in the printed table
    "items": lambda row: f"{row.num_items:,}",
    "samples": lambda row: f"{row.num_samples:,}",
    "share": lambda row: f"{row.share:.2%}",
    "epochs": lambda row: f"{row.epochs:.2f}",
    "frames": lambda row: f"{row.num_frames:,}",
    "text tokens": lambda row: f"{row.text_tokens:,}",
    "visual tokens": lambda row: f"{row.visual_tokens:,}",
    "truncated": lambda row: f"{row.num_truncated:,}",
}


def table(stage: str, counts: StageCounts) -> str:
    """Format the counts of a stage as a text table."""
    names = [(f"{source}/{task}", row) for source, rows in counts.sources.items() for task, row in rows.items()]
    rows = [[name, *(text(row) for text in COLUMNS.values())] for name, row in [*sorted(names), ("all", counts.total)]]
    rows.insert(0, [f"{stage}, {counts.num_steps:,} steps", *COLUMNS])
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    left = ", ".join(f"{name} {number:,}" for name, number in counts.unmatched.items())
    return "\n".join([*lines, f"not in the mixture: {left}" if left else "all items are in the mixture"])
