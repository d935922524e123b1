"""Registry of evaluation modes and controls: name, label, description, and what each does to the batch.

A new control is one `register(Mode(...))` entry in this file: the evaluation, the names in the result files and the
report are derived from the registry. The module does not import torch, which keeps the report fast.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Mode:
    """One way to run a trained network over evaluation items. A control changes one thing in autoregressive mode.

    forward_mode: the `mode` of the network's forward pass.
    query_source: overrides the network's `query_source`; None: no override. Networks of ordinary visual
        tokens skip a mode with an override.
    pixels: function of the frames' pixel tensor [F, 3, H, W] that returns the tensor to use in its place.
    frame_order: function of (number of frames T, numpy Generator seeded per item) that returns the indices of the
        frames to show: int [T].
    needs_target: run only on items whose target boxes are known; the batch gets `target_patches` from them.
    subset: score at most `evaluation.max_control_items_per_task` items of a task instead of all.
    captions: generate free-form captions in this mode as well.
    """

    name: str
    description: str
    forward_mode: str = "autoregressive"
    query_source: str | None = None
    pixels: Callable | None = None
    frame_order: Callable | None = None
    needs_target: bool = False
    subset: bool = True
    captions: bool = False

    def __post_init__(self):
        """ValueError where an option would have no effect."""
        if not self.subset and (self.frame_order or self.needs_target):
            raise ValueError(f"mode {self.name!r}: frame_order and needs_target need subset=True")
        if self.captions and (self.query_source or self.frame_order or self.needs_target):
            raise ValueError(f"mode {self.name!r}: captions need a mode that changes nothing but the pixels")

    @property
    def label(self):
        """The name as tables and figures show it."""
        return self.name.replace("_", " ")

    @property
    def is_control(self):
        return self.name != self.forward_mode


REGISTRY: dict[str, Mode] = {}  # by name, in the order of tables


def register(mode):
    """Adds a `Mode`. ValueError when the name is taken."""
    if mode.name in REGISTRY:
        raise ValueError(f"mode {mode.name!r} is registered twice: give one of the two another name")
    REGISTRY[mode.name] = mode


def shuffled_order(count, rng):
    """A permutation of `count` frames that is not the identity (for one frame it is): int64 [count]."""
    order = rng.permutation(count)
    while count > 1 and np.array_equal(order, np.arange(count)):
        order = rng.permutation(count)
    return order


register(
    Mode(
        "coarse",
        "the static query on every frame. A network trained with fine passes never trains this path: use it as a "
        "diagnostic, not as a baseline",
        forward_mode="coarse",
        subset=False,
        captions=True,
    )
)
register(
    Mode(
        "fine",
        "queries planned from the coarse tokens, all frames in parallel, as in training",
        forward_mode="fine",
        subset=False,
        captions=True,
    )
)
register(
    Mode(
        "autoregressive",
        "frame by frame, each query planned from the frames before: the inference mode",
        subset=False,
        captions=True,
    )
)
register(
    Mode(
        "blind",
        "autoregressive with every pixel at the mean colour",
        pixels=lambda pixels: pixels.new_zeros(pixels.shape),
        subset=False,
        captions=True,
    )
)
register(
    Mode(
        "random_query",
        "autoregressive with random queries in place of the planned ones, each with the norm of the one it replaces",
        query_source="random",
        subset=False,
    )
)
register(
    Mode(
        "static_query",
        "autoregressive with the static query on every frame: the query of `coarse` on the autoregressive code path",
        query_source="static",
    )
)
register(
    Mode(
        "shuffled_frames",
        "autoregressive with the frames of each clip in another order, drawn from (seed, key, item)",
        frame_order=shuffled_order,
    )
)
register(
    Mode(
        "first_frame",
        "autoregressive with every frame replaced by the clip's first",
        frame_order=lambda count, rng: np.zeros(count, np.int64),
    )
)
register(
    Mode(
        "oracle_query",
        "autoregressive with attention limited to the target's patches, on items whose target boxes are known: an "
        "upper bound for the gaze",
        query_source="oracle",
        needs_target=True,
    )
)


def subset_controls():
    """Names of the controls that are scored on a subset of the items."""
    return [name for name, mode in REGISTRY.items() if mode.subset]


def all_controls():
    """Names of all modes that are compared with the autoregressive mode on the same items."""
    return [name for name, mode in REGISTRY.items() if mode.is_control]


SCORED_MODES = tuple(name for name, mode in REGISTRY.items() if not mode.subset)  # on all items
GAZE_MODES = tuple(name for name, mode in REGISTRY.items() if not mode.is_control)
CAPTION_MODES = tuple(name for name, mode in REGISTRY.items() if mode.captions)
LABELS = {name: mode.label for name, mode in REGISTRY.items()}

# parts of a clip whose answers are compared with the answers for all frames (pipeline_steps/evaluation/temporal.py)
VIEWS = ("frames_4", "frames_8", "frames_16", "first_half", "second_half", "first_half_held", "second_half_held")
