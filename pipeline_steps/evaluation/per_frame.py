"""Scores per frame, for answers with one token per frame after the first, such as the digits of a hopping object.

The k-th scored token (k = 1, 2 ...) refers to frame k, which gives a loss per frame. T frames of a clip.
"""

import numpy as np

from pipeline_steps.common.metrics import PerFrame
from pipeline_steps.streaming.targets import source_frame


def is_per_frame(sample, item, num_frames):
    """Whether an item (a row with `input_ids` and `score_mask`) has one answer token per frame, according to its
    PackedSample: the target shows a digit in every frame, T - 1 tokens are scored, and two tokens are equal exactly if
    their digits are."""
    target = sample.items[item["item"]].target
    if item["kind"] != "video" or target is None or not sample.objects:
        return False
    tokens = np.asarray(item["input_ids"])[np.asarray(item["score_mask"], bool)]
    shown = sample.objects[target].digits
    if not shown:
        return False
    digits = np.array([shown[source_frame(t, num_frames, len(shown))] for t in range(1, num_frames)])
    if len(tokens) == 0 or len(tokens) != len(digits):
        return False
    return bool(np.array_equal(tokens[:, None] == tokens, digits[:, None] == digits))


def token_columns(losses, correct):
    """The table columns of one item: loss (nats) and correctness of its scored tokens, in order."""
    return {"token_losses": losses.tolist(), "token_correct": correct.tolist()}


def aggregate(rows):
    """`PerFrame` of the rows of a DataFrame with `token_columns`, or None if no item has them."""
    if "token_losses" not in rows or not (measured := rows[rows["token_losses"].notna()]).size:
        return None
    losses, hits = (by_frame(measured[name]) for name in ("token_losses", "token_correct"))
    counts = (~np.isnan(losses)).sum(0)

    def means(values):
        sums = np.nansum(values, axis=0)
        return [float(total / count) if count else None for total, count in zip(sums, counts, strict=True)]

    return PerFrame(loss=means(losses), accuracy=means(hits), num_items=counts.tolist())


def by_frame(lists):
    """Lists of the values at frames 1, 2 ... -> [items, T], NaN where an item has no value (always at frame 0)."""
    longest = max(map(len, lists))
    return np.array([[np.nan, *values, *[np.nan] * (longest - len(values))] for values in lists], np.float64)
