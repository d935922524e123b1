"""Tables of the data by source: samples and items by outcome, and what the training stages read."""

from collections import Counter

from pipeline_steps.report.tables import Table, count, number, share

COLUMNS = [
    "stage",
    "source",
    "task",
    "items",
    "samples",
    "share",
    "epochs",
    "frames",
    "text tokens",
    "visual tokens",
    "truncated",
]


def reading(streaming):
    """`Table` of a `StreamingResult`: a row per stage, source and task, and a total per stage. None: an empty table."""
    table = Table("reading", "What the training stages read", COLUMNS, [])
    if streaming is None:
        table.note = "outputs/metrics/streaming.json does not exist (run `dvc repro streaming`)."
        return table
    unmatched = []
    for stage, found in streaming.stages.items():
        for source, tasks in found.sources.items():
            for task, counts in tasks.items():
                if f"{source}/{task}" not in found.unmatched:
                    table.rows.append([stage, source, task, *cells(counts)])
        table.summary.append(len(table.rows))
        table.rows.append([f"{stage}, all", "", "", *cells(found.total)])
        if found.unmatched:
            names = ", ".join(f"{name} ({num_items})" for name, num_items in sorted(found.unmatched.items()))
            unmatched.append(f"{stage}: {names}")
    table.note = (
        "Counted from the parameters and the token files before training. Items: available. Samples: read in "
        "training, repeats included. Epochs: samples / items. Frames and tokens: of the samples; an image counts as "
        "often as it is repeated. Truncated: samples whose chat lost its last turns. Items that match no mixture "
        f"entry: {'; '.join(unmatched) if unmatched else 'none'}."
    )
    return table


def cells(counts):
    """The numbers of one `SampleCounts`."""
    return [
        count(counts.num_items),
        count(counts.num_samples),
        share(counts.share),
        number(counts.epochs, 2),
        count(counts.num_frames),
        count(counts.text_tokens),
        count(counts.visual_tokens),
        count(counts.num_truncated),
    ]


def sources(shards, tokens):
    """`Table` of every source: samples packed and quarantined, items kept, truncated and dropped."""
    quarantined = Counter(entry.source for entry in shards.quarantined)
    rows = []
    for name in sorted({*shards.sources, *quarantined, *tokens.sources}):
        items = tokens.sources.get(name)
        counts = [items.seen, items.kept, items.truncated, items.dropped, items.tokens] if items else [0] * 5
        rows.append([name, *map(count, (shards.sources.get(name, 0), quarantined[name], *counts))])
    reasons = "; ".join(f"{entry.key}, item {entry.item} ({entry.reason})" for entry in tokens.dropped[:5])
    note = "Items read = kept + dropped. Truncated: kept, but tokens.max_tokens cut the last turns of the chat."
    return Table(
        "sources",
        "Sources",
        ["source", "packed samples", "quarantined", "items read", "kept", "truncated", "dropped", "text tokens"],
        rows,
        note + (f" First dropped items: {reasons}." if reasons else ""),
    )
