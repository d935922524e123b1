"""The section `sources` of params.yaml with a few clips of moving digits, for the tests of the stage."""

from pipeline_steps.common import params
from pipeline_steps.sources import schema

MIX = {"card": 9, "follow": 9, "ask_colour": 3, "ask_place": 3, "caption": 4, "gist": 4, "image": 4}
OBJECTS = params.load(params.ROOT / "params.yaml")["sources"]["procedural"]["objects"] | {"num_frames": (8, 16)}


def section(collect=("procedural", "chat"), path=None, **changes):
    """path: of the user's folder; changes: of sources.procedural."""
    values = {
        "collect": list(collect),
        "procedural": {
            "world": "digits",
            "seed": 1,
            "num_train_clips": 18,
            "train_mix": MIX,
            "num_validation_clips": 1,
            "num_test_clips": 2,
            "num_ask_items": 2,
            "frame_size": 112,
            "fps": 2.0,
            "num_frames": 6,
            "noise": 0.06,
            "num_objects_weights": (2, 1, 1, 1),
            "motion": None,
            "objects": OBJECTS,
            **changes,
        },
        "chat": {"path": None, "seed": 1, "num_train": 40, "num_validation": 8, "num_test": 8},
        "folder": {"path": path and str(path), "name": "mine"},
        "tars": [],
        "hub": [],
        "actions": [],
    }
    return schema.Section.model_validate(values)
