"""Table of the controls: the accuracy that each one costs."""

from pipeline_steps.common.errors import UserError
from pipeline_steps.common.modes import GAZE_MODES
from pipeline_steps.report.comparisons import MODE
from pipeline_steps.report.tables import MISSING, MODE_NAMES, Table, share


def costs(result):
    """`Table`: cost of every control by task, in points of accuracy.

    Uses the paired differences with intervals in `EvaluationResult.controls`, or the difference of the accuracies if
    the result has none.
    """
    tasks = result.controls or {
        task: {name: score.accuracy - scores[MODE].accuracy for name, score in scores.items()}
        for task, scores in result.tasks.items()
    }
    found = dict.fromkeys(name for entries in tasks.values() for name in entries if name not in GAZE_MODES)
    rows = [
        [task, share(result.tasks[task][MODE].accuracy), *(cost(entries.get(name)) for name in found)]
        for task, entries in tasks.items()
    ]
    if unknown := sorted(found.keys() - MODE_NAMES.keys()):
        raise UserError(
            f"evaluation.json: unknown mode '{unknown[0]}', expected one of {', '.join(MODE_NAMES)}. Run "
            "`dvc repro evaluation`."
        )
    columns = ["task", MODE, *(MODE_NAMES[name] for name in found)]
    note = (
        "Accuracy in autoregressive mode, and the change in points under each control. Far below 0, the model needs "
        "what the control removes. Controls use the same weights; they are not trained baselines."
    )
    if result.controls:
        note += " Brackets: 95% intervals, paired bootstrap over the clips scored in both modes."
    return Table("controls", "Cost of each control", columns, rows, note)


def cost(entry):
    """A `Control`, a difference of accuracies, or None, as a cell."""
    if entry is None:
        return MISSING
    if isinstance(entry, float):
        return points(entry)
    low, high = (points(border)[0] for border in entry.accuracy_interval)
    text, value = points(entry.accuracy_difference)
    return (f"{text} [{low} to {high}]" if entry.num_items > 1 else text, value)


def points(difference):
    """A difference of shares as a cell, in points."""
    return (f"{100 * difference:+.1f}".replace("-", "−"), 100 * difference)
