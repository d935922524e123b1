"""Tables about time: clips shown in part, and scores by frame.

A table without rows says in its note what was not measured.
"""

from pipeline_steps.common.modes import VIEWS
from pipeline_steps.report.cells import optional, signed
from pipeline_steps.report.tables import MODE_NAMES, Table, count, number, share

VIEW_NAMES = {
    "frames_4": "4 frames of all",
    "frames_8": "8 frames of all",
    "frames_16": "16 frames of all",
    "first_half": "first half",
    "second_half": "second half",
    "first_half_held": "first half, held",
    "second_half_held": "second half, held",
}
FRAME_MODES = ("autoregressive", "coarse", "blind")


def temporal(result):
    """A row per task and part of the clip: scores of the part and of all frames of the same clips."""
    columns = ["task", "shown", "items", "accuracy of part", "accuracy of all", "loss of part", "loss of all"]
    columns += ["loss lost", "answers changed", "tokens changed"]
    rows = []
    for task, views in (result.temporal or {}).items():
        for name in VIEWS:
            if name in views:
                rows.append([task, VIEW_NAMES[name], *view_cells(views[name])])
    note = (
        "Autoregressive, the same clips in part and whole. Loss lost: nats per token by which the part is worse, in "
        "brackets 95% paired bootstrap intervals over items; around 0 the rest of the clip is not used. A half tells "
        "too few frames and missing content together; held, each of its frames shown again up to the whole number, "
        "loses only what the other half shows: where the half fails and the held half does not, the network is bound "
        "to the number of frames. Answers changed: items with another most likely token anywhere."
        if rows
        else "Not measured: no clips were shown in part."
    )
    return Table("temporal", "Clips shown in part", columns, rows, note, strong=[3])


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
    """`quantity` ("accuracy" or "loss") of the tokens about each frame; frames that nothing is asked of are left
    out."""
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
    meaning = "Share of scored answer tokens that are right" if quantity == "accuracy" else "Nats per scored token"
    note = (
        f"{meaning}, by the frame that the token is about. A row that {worse} to the right drifts over time; "
        "coarse: what the same weights get of a frame by a look without a plan."
        if rows
        else "Not measured: no task has an answer per frame."
    )
    columns = ["task", "mode", *(f"frame {t}" for t in asked)]
    return Table(f"per_frame_{quantity}", f"{quantity.capitalize()} by frame", columns, rows, note)
