"""Table of the gaze relative to its references. The note of an empty table says what was not measured."""

from pipeline_steps.report.cells import difference
from pipeline_steps.report.tables import MISSING, Table, count

REFERENCES = ("chance", "coarse", "oracle")


def gaze_difference(result):
    """A row per task: share of peaks on the target minus that of each reference, in points."""
    tasks = result.gaze_difference or {}
    names = [name for name in REFERENCES if any(name in entries for entries in tasks.values())]
    rows = []
    for task, entries in tasks.items():
        # each reference with its own number of frames: the oracle is measured on fewer items
        row = [task]
        for name in names:
            entry = entries.get(name)
            row += (
                [difference(entry.peak_on_target, entry.interval), count(entry.num_frames)] if entry else [MISSING] * 2
            )
        rows.append(row)
    note = (
        "Share of frames whose most attended patch shows the target: autoregressive minus reference on the same "
        "frames, in points. Brackets: 95% paired bootstrap intervals over clips. A positive difference to chance and "
        "coarse is the gain from planned queries. The oracle attends to the target only; if its interval includes 0, "
        "better queries would show no gain on these frames."
        if rows
        else "Not measured: no item of this split has a target with known boxes, or the network has no queries."
    )
    columns = ["task", *(text for name in names for text in (f"against {name}", "frames"))]
    return Table("gaze_difference", "Gaze against its references", columns, rows, note)
