"""Temporal sensitivity: the same questions with only part of each clip's frames, in autoregressive mode.

frames_4, frames_8, frames_16   4, 8 or 16 frames, uniformly spaced; only clips with more frames
first_half, second_half         clips of at least two frames; an odd middle frame belongs to the second half
first_half_held, ..._held       the same halves, with frames repeated up to the original number of frames

Answers are compared with the answers for all frames of the same clips: if they do not change, the network does not use
the removed frames. The held halves keep the number of frames, which separates missing content from a clip length that
is rare in training. Still images are excluded.
"""

import numpy as np
import pandas as pd

from pipeline_steps.common.metrics import View
from pipeline_steps.common.modes import VIEWS
from pipeline_steps.evaluation import scoring
from pipeline_steps.evaluation.predictions import by_item, predicted_tokens
from pipeline_steps.streaming.targets import source_frame

ALL_FRAMES = "all_frames"
HELD = "_held"


def places(view, num_frames):
    """Indices of the frames that a view shows: int64 array, or None if the clip is too short."""
    if view.endswith(HELD):
        chosen = places(view.removesuffix(HELD), num_frames)
        return None if chosen is None else chosen[np.arange(num_frames) * len(chosen) // num_frames]
    half = num_frames // 2
    if view in ("first_half", "second_half"):
        chosen = np.arange(half) if view == "first_half" else np.arange(half, num_frames)
        return chosen if half else None
    count = int(view.removeprefix("frames_"))
    return np.array([source_frame(i, count, num_frames) for i in range(count)]) if count < num_frames else None


def select(item, chosen):
    """The item reduced to the chosen frames, their target patches and their times. A held view, which has as many
    frames as the clip, keeps the clip's times."""
    kept = {name: item[name][chosen] for name in ("frames", "target_patches") if name in item}
    times = np.asarray(item["frame_times"], np.float32)
    kept["frame_times"] = times if len(chosen) == len(times) else times[chosen]
    return item | kept | {"num_frames": len(chosen)}


def score_views(model, collate, loaded, progress):
    """DataFrame with one row per clip and view (and one for all frames): task, key, item, view, num_tokens,
    loss_sum, num_correct, predicted (token ids). loaded: `scoring.batches`."""
    rows = []
    for task, items, _, _ in loaded:
        videos = [item for item in items if item["kind"] == "video"]
        for view in (ALL_FRAMES, *VIEWS):
            rows += view_rows(model, collate, task, videos, view)
        progress.update(len(items))
    return pd.DataFrame(rows)


def view_rows(model, collate, task, items, view):
    """The rows of one view, for the clips that are long enough."""
    counts = [len(item["frames"]) for item in items]
    parts = [np.arange(count) if view == ALL_FRAMES else places(view, count) for count in counts]
    pairs = [(item, part) for item, part in zip(items, parts, strict=True) if part is not None]
    if not pairs:
        return []
    shown = [select(item, part) for item, part in pairs]
    device = next(model.parameters()).device
    batch = collate(shown).to(device)
    with predicted_tokens(model) as found:
        output = scoring.forward(model, batch, "autoregressive")
    nothing = [None] * len(shown)
    rows = scoring.table_rows(task, shown, nothing, batch, ALL_FRAMES, output)
    ids = by_item(found, [row["num_tokens"] for row in rows])
    names = ("task", "key", "item", "num_tokens", "loss_sum", "num_correct")
    return [
        {name: row[name] for name in names} | {"view": view, "predicted": own.tolist()}
        for row, own in zip(rows, ids, strict=True)
    ]


def aggregate(table, interval):
    """{task: {view: `View`}}; interval: function of (numerators, denominators, clips) per item."""
    found = {}
    if table.empty:
        return found
    indexed = table.set_index(["task", "view", "key", "item"]).sort_index()
    for task in sorted(set(table["task"])):
        everything = indexed.loc[task, ALL_FRAMES]
        views = set(table.loc[table["task"] == task, "view"])
        found[task] = {view: compare(indexed.loc[task, view], everything, interval) for view in VIEWS if view in views}
    return found


def compare(part, everything, interval):
    """`View` of the items of `part`; both are indexed by (key, item)."""
    everything = everything.loc[part.index]
    tokens = part["num_tokens"].to_numpy()
    loss, correct = part["loss_sum"].to_numpy(), part["num_correct"].to_numpy()
    full_loss, full_correct = everything["loss_sum"].to_numpy(), everything["num_correct"].to_numpy()
    others = np.array(
        [np.sum(np.array(a) != np.array(b)) for a, b in zip(part["predicted"], everything["predicted"], strict=True)]
    )
    changed = others > 0
    return View(
        loss=float(loss.sum() / tokens.sum()),
        accuracy=float(correct.sum() / tokens.sum()),
        all_frames_loss=float(full_loss.sum() / tokens.sum()),
        all_frames_accuracy=float(full_correct.sum() / tokens.sum()),
        loss_difference=float((loss - full_loss).sum() / tokens.sum()),
        loss_interval=interval(loss - full_loss, tokens, clips=part.index.get_level_values("key")),
        answers_changed=float(changed.mean()),
        answers_changed_interval=interval(changed, np.ones(len(changed)), clips=part.index.get_level_values("key")),
        tokens_changed=float(others.sum() / tokens.sum()),
        num_items=len(part),
    )
