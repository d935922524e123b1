"""The table of the gaze against its references.

A table without rows says in its note what was not measured.
"""

from pipeline_steps.report.cells import difference
from pipeline_steps.report.tables import MISSING, Table, count

REFERENCES = ("chance", "coarse", "oracle")


def gaze_difference(result):
    """A row per task: the peak's share on the target above each reference, in points."""
    tasks = result.gaze_difference or {}
    names = [name for name in REFERENCES if any(name in entries for entries in tasks.values())]
    rows = []
    for task, entries in tasks.items():
        # The oracle is looked at on fewer items: the frames of both are told apart
        row = [task]
        for name in names:
            entry = entries.get(name)
            row += (
                [difference(entry.peak_on_target, entry.interval), count(entry.num_frames)] if entry else [MISSING] * 2
            )
        rows.append(row)
    note = (
        "Points of frames whose most attended patch is the target's, autoregressive minus each reference over the "
        "same frames; in brackets 95% paired bootstrap intervals over items. Above chance and coarse is what choosing "
        "where to look gains; the oracle is told where the target is: where that "
        "interval holds 0, a better choice would show no gain on these frames."
        if rows
        else "Not measured: no item of this split names a target whose place is known, or the network has no queries."
    )
    columns = ["task", *(text for name in names for text in (f"against {name}", "frames"))]
    return Table("gaze_difference", "Gaze against its references", columns, rows, note)
