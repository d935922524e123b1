"""Source `procedural`, world of objects: cut-outs that move over backgrounds, as mp4 clips, stills and metadata.jsonl.

`write(folder, section)` writes {train,validation,test}/{task}-{000000}.{mp4,jpg}, metadata.jsonl and pictures.json
(names and backgrounds by split, sha256 of every picture). As with the digits, every clip has its own random generator,
seeded by (seed, split, task, number), so the bytes do not depend on the number of processes.
Cost: about 40 ms per clip of twelve 224 px frames and core.
"""

from functools import partial
from pathlib import Path

import numpy as np

from pipeline_steps.common.errors import UserError
from pipeline_steps.common.files import write_json, write_jsonl
from pipeline_steps.common.names import NEW
from pipeline_steps.common.processes import map_in_processes
from pipeline_steps.monitoring.progress import progress_bar
from pipeline_steps.sources.procedural import FEWER, item_rows, largest_remainder, save_media
from pipeline_steps.world import object_scene
from pipeline_steps.world import objects as world
from pipeline_steps.world.cutouts import SPLITS, Backgrounds, Cutouts, open_picture

MIN_NEW_NAMES = 2  # in each held-out split, for tasks about new names: one object becomes another


class Pictures:
    """What clips are made of: the cut-outs and the backgrounds of a section, opened and checked."""

    def __init__(self, section):
        options = section.objects
        self.cutouts = Cutouts(options.cutouts, options.held_out_share, section.seed)
        self.backgrounds = Backgrounds(options.backgrounds, options.held_out_share, section.seed)
        few = min(len(self.cutouts.names[split]) for split in SPLITS[1:])
        if options.num_new_clips and few < MIN_NEW_NAMES:
            raise UserError(
                f"sources.procedural.objects: held_out_share {options.held_out_share} leaves {few} names out of "
                f"training, at least {MIN_NEW_NAMES} in each of validation and test are needed for the tasks about new "
                "names. Raise it, add pictures, or set num_new_clips to 0."
            )
        self.cutouts.check()
        for picture in self.backgrounds.pictures:
            open_picture(picture, "RGB")

    def to_dict(self) -> dict:
        """Names and pictures by split, and the sha256 of every picture's file."""
        named = {split: self.cutouts.names[split] for split in SPLITS}
        shown = {split: sorted({each.name for each in self.backgrounds.by_split[split]}) for split in SPLITS}
        folders = {"cutouts": self.cutouts.pictures, "backgrounds": self.backgrounds.pictures}
        files = {
            kind: {picture.file_name: picture.sha256 for picture in pictures} for kind, pictures in folders.items()
        }
        return {"names": named, "backgrounds": shown, "sha256": files}


def write(folder: Path, section, num_processes: int) -> None:
    """Render all clips of `section` (schema.Procedural) into the existing `folder`. UserError: unusable pictures."""
    pictures = Pictures(section)
    clips = plan(section)
    for split in SPLITS:
        (folder / split).mkdir()
    work = partial(_write_clip, folder, section)
    made = map_in_processes(work, clips, num_processes, FEWER, partial(_use, pictures), chunksize=8)
    progress = progress_bar("procedural clips", made, total=len(clips), unit="clip")
    rows = [row for clip_rows in progress for row in clip_rows]
    write_jsonl(folder / "metadata.jsonl", rows)
    write_json(folder / "pictures.json", pictures.to_dict())


_used: Pictures | None = None  # in every process


def _use(pictures: Pictures) -> None:
    global _used
    _used = pictures


def plan(section) -> list[tuple[str, str, int, bool]]:
    """All clips as (split, kind, number, is_new). Counts of training clips follow train_mix, by largest remainder."""
    options = section.objects
    counts = largest_remainder(options.num_train_clips, [getattr(options.train_mix, kind) for kind in world.KINDS])
    clips = [("train", kind, i, False) for kind, n in zip(world.KINDS, counts, strict=True) for i in range(n)]
    for split, number in (("validation", options.num_validation_clips), ("test", options.num_test_clips)):
        clips += [(split, kind, i, False) for kind in world.KINDS for i in range(number)]
        clips += [(split, kind, i, True) for kind in world.NEW_KINDS for i in range(options.num_new_clips)]
    return clips


def sample_clip(section, pictures: Pictures, split: str, kind: str, number: int, is_new: bool):
    """The scene of one clip and its items; held-out clips have one item."""
    key = (section.seed, SPLITS.index(split), world.KINDS.index(kind), number, int(is_new))
    rng = np.random.default_rng(key)
    shortest, longest = section.objects.num_frames
    num_frames = int(rng.integers(shortest, longest + 1))
    drawn = pictures.cutouts, pictures.backgrounds
    scene = world.sample_scene(rng, kind, split, *drawn, num_frames, is_new, section.motion)
    extra = section.objects.num_extra_items if split == "train" else 0
    return scene, world.scene_items(scene, pictures.cutouts, rng, extra)


def _write_clip(folder: Path, section, clip: tuple[str, str, int, bool]) -> list[dict]:
    """Render and encode one clip; returns its rows of metadata.jsonl, the ground truth in the first one."""
    split, kind, number, is_new = clip
    scene, items = sample_clip(section, _used, *clip)
    frames, boxes = object_scene.render(scene, _used.cutouts, _used.backgrounds, section.objects.frame_size)
    task = kind + NEW if is_new else kind
    file_name = f"{split}/{task}-{number:06d}.{'jpg' if kind == 'still' else 'mp4'}"
    save_media(folder / file_name, frames, section.fps)
    rows = item_rows(file_name, items)
    shown = [[_used.cutouts.pictures[picture] for picture in own.pictures] for own in scene.tracks]
    rows[0] |= {
        "split": split,
        "num_source_frames": len(frames),
        "background": scene.background.name,
        "objects": [
            # what shows is a name, not a colour or a digit
            {"colour": "", "place": own.place, "digits": [], "boxes": boxes[index].tolist()}
            for index, own in enumerate(scene.tracks)
        ],
        "names": [[picture.name for picture in track] for track in shown],
        "pictures": [sorted({picture.file_name for picture in track}) for track in shown],
    }
    return rows
