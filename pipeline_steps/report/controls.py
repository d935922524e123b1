"""The table of the controls: what is lost when something is taken away from a finished network."""

from pipeline_steps.metrics import GAZE_MODES
from pipeline_steps.report.comparisons import MODE
from pipeline_steps.report.tables import MISSING, MODE_NAMES, Table, share


def costs(result):
    """`Table`: what every control costs every family, in points of accuracy."""
    names = [mode for mode in result.mean if mode not in GAZE_MODES]
    entries = [*result.families.items(), ("mean of families", result.mean)]
    rows = []
    for family, scores in entries:
        own = scores[MODE].accuracy
        costs = [points(scores[name].accuracy - own) if name in scores else MISSING for name in names]
        rows.append([family, share(own), *costs])
    columns = ["family", MODE, *(MODE_NAMES.get(name, name.replace("_", " ")) for name in names)]
    note = (
        "Accuracy in autoregressive mode, and what it becomes in points when something is taken away: far below zero "
        "means that the model needs it. Controls are other ways to look with the same weights, not trained baselines."
    )
    return Table("controls", "What each control costs", columns, rows, note, summary=[len(rows) - 1])


def points(difference):
    """A difference of shares as a cell, in points."""
    return (f"{100 * difference:+.1f}".replace("-", "−"), 100 * difference)
