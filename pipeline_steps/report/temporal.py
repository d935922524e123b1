"""Tables about time: scores on parts of clips, and scores by frame.

The note of an empty table says what was not measured.
"""

from pipeline_steps.common.modes import VIEWS
from pipeline_steps.report.cells import optional, signed
from pipeline_steps.report.tables import MODE_NAMES, Table, count, number, share

VIEW_NAMES = {
    "frames_4": "4 frames of the clip",
    "frames_8": "8 frames of the clip",
    "frames_16": "16 frames of the clip",
    "first_half": "first half",
    "second_half": "second half",
    "first_half_held": "first half, held",
    "second_half_held": "second half, held",
}
FRAME_MODES = ("autoregressive", "coarse", "blind")


def temporal(result):
    """A row per task and part: scores with that part and with all frames of the same clips."""
    columns = ["task", "shown", "items", "accuracy of part", "accuracy of all", "loss of part", "loss of all"]
    columns += ["loss difference", "answers changed", "tokens changed"]
    rows = []
    for task, views in (result.temporal or {}).items():
        for name in VIEWS:
            if name in views:
                rows.append([task, VIEW_NAMES[name], *view_cells(views[name])])
    note = (
        "Autoregressive mode, the same clips in part and in full. Loss difference: part minus all frames, nats per "
        "token; brackets: 95% paired bootstrap intervals over clips. Near 0, the model does not use the rest of the "
        "clip. A half has both fewer frames and less content. A held half repeats its frames up to the full number, "
        "so that only the content differs: if the half is worse but the held half is not, the network depends on the "
        "number of frames. Answers changed: share of items with a different most likely token at any position."
        if rows
        else "Not measured: no parts of clips were scored."
    )
    return Table("temporal", "Parts of clips", columns, rows, note, strong=[3])


def view_cells(view):
    several = view.num_items > 1
    return [
        count(view.num_items),
        share(view.accuracy),
        share(view.all_frames_accuracy),
        number(view.loss),
        number(view.all_frames_loss),
        signed(view.loss_difference, 3, view.loss_interval if several else None),
        share(view.answers_changed, view.answers_changed_interval if several else None),
        share(view.tokens_changed),
    ]


def per_frame(result, quantity):
    """`quantity` ("accuracy" or "loss") of the answer tokens about each frame. Frames without an answer token are
    omitted."""
    found = [
        (task, mode, getattr(modes[mode], quantity))
        for task, modes in (result.per_frame or {}).items()
        for mode in FRAME_MODES
        if mode in modes
    ]
    asked = sorted({t for _, _, values in found for t, value in enumerate(values) if value is not None})
    cell = share if quantity == "accuracy" else optional
    rows = [
        [task, MODE_NAMES[mode], *(cell(values[t] if t < len(values) else None) for t in asked)]
        for task, mode, values in found
    ]
    worse = "falls" if quantity == "accuracy" else "rises"
    meaning = "Share of correct scored answer tokens" if quantity == "accuracy" else "Nats per scored answer token"
    note = (
        f"{meaning}, by the frame that the token refers to. A row that {worse} to the right shows drift over time. "
        "Coarse: the same weights with the static query on every frame."
        if rows
        else "Not measured: no task has an answer per frame."
    )
    columns = ["task", "mode", *(f"frame {t}" for t in asked)]
    return Table(f"per_frame_{quantity}", f"{quantity.capitalize()} by frame", columns, rows, note)
