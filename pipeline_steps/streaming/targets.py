"""Ground truth for gaze: the patches that an item's objects cover in each frame, if the data have boxes.

Boxes are [x0, y0, x1, y1], relative to the width and height of the frame (0 to 1). Shapes: T frames, N patches in
row-major order.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class GroundTruth:
    """Positions of the objects of one item in each frame."""

    target: np.ndarray  # bool [T, N], patches that show the target; all False: outside of the frame
    any_object: np.ndarray  # bool [T, N], patches that show any object
    boxes: np.ndarray  # [T, 4], the target's box in the square frame


def ground_truth(sample, item, num_frames, grid, resize_mode):
    """Return the `GroundTruth` of item number `item` of a PackedSample, or None without a target or boxes.

    grid: patches along a side of the frame. resize_mode: `frames.resize_mode` of the shards' manifest.
    """
    target = sample.items[item].target
    if target is None or not sample.objects:
        return None
    boxes = np.stack(
        [object_boxes(sample, entry, num_frames, resize_mode) for entry in sample.objects]
    )  # [objects, T, 4]
    patches = np.stack([[box_patches(box, grid) for box in track] for track in boxes])  # [objects, T, N]
    return GroundTruth(patches[target], patches.any(axis=0), boxes[target])


def object_boxes(sample, entry, num_frames, resize_mode):
    """Return the boxes of one object in the packed frames: [num_frames, 4]."""
    sources = [source_frame(index, num_frames, len(entry.boxes)) for index in range(num_frames)]
    return np.stack([square_box(entry.boxes[source], sample.width, sample.height, resize_mode) for source in sources])


def source_frame(index, num_frames, num_source_frames):
    """Return the source frame of frame `index` of `num_frames` frames sampled uniformly over the clip."""
    return min(num_source_frames - 1, int((index + 0.5) * num_source_frames / num_frames))


def square_box(box, width, height, resize_mode):
    """Convert a box of the source frame (width x height pixels) to the square frame, clipped to it: [4].

    resize_mode: `crop` (the centre of the frame) or `letterbox` (the whole frame between black bars).
    """
    side = min(width, height) if resize_mode == "crop" else max(width, height)
    scale = np.array([width, height] * 2) / side
    shift = np.array([(width - side) / 2, (height - side) / 2] * 2) / side
    return np.clip(np.asarray(box, dtype=np.float64) * scale - shift, 0, 1)


def box_patches(box, grid):
    """Return the patches of a grid x grid frame that show the box: bool [grid * grid].

    A patch counts if its overlap is at least half of the patch or half of the box, whichever is smaller. If no patch
    reaches that (a box on a corner of four patches), the ones with the largest overlap count. A box without area
    (outside of the crop) has no patch.
    """
    x0, y0, x1, y1 = box
    if x1 <= x0 or y1 <= y0:
        return np.zeros(grid * grid, dtype=bool)
    edges = np.arange(grid + 1) / grid
    along_x = np.clip(np.minimum(edges[1:], x1) - np.maximum(edges[:-1], x0), 0, None)
    along_y = np.clip(np.minimum(edges[1:], y1) - np.maximum(edges[:-1], y0), 0, None)
    overlap = np.outer(along_y, along_x).ravel()
    shown = overlap >= 0.5 * min(grid**-2, (x1 - x0) * (y1 - y0)) - 1e-9
    return shown if shown.any() else overlap >= overlap.max() - 1e-9
