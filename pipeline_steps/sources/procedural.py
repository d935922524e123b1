"""Source `procedural`: render the world as H.264 mp4 clips, jpg stills and a Hugging Face metadata.jsonl.

`write(folder, section)` writes {train,validation,test}/{task}-{000000}.{mp4,jpg} and metadata.jsonl; the stage reads
them back with `folder.read`, like a user's own files. The bytes depend only on the section, not on the number of
processes: every clip has its own random generator, seeded by (seed, split, task, number).
Cost: about 7 ms per clip and core.
"""

from fractions import Fraction
from functools import cache, partial
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from PIL import Image

from pipeline_steps.common.files import write_jsonl
from pipeline_steps.common.processes import map_in_processes
from pipeline_steps.monitoring.progress import progress_bar
from pipeline_steps.world import digits as world

# ultrafast does not reorder frames and takes a third of the time of `medium`; crf 18 preserves the pixel noise
X264 = {"preset": "ultrafast", "crf": "18", "threads": "1"}
EXACT = Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.BITEXACT  # bit-exact on every processor

FEWER = "Rerun with fewer processes: `python -m pipeline_steps.sources --num-processes 1`."  # after a killed process


@cache
def _digits() -> world.Digits:
    return world.Digits()


def write(folder: Path, section, num_processes: int) -> None:
    """Render all clips of `section` (schema.Procedural) into the existing `folder`, and write metadata.jsonl."""
    clips = plan(section)
    for split in world.SPLITS:
        (folder / split).mkdir()
    work = partial(_write_clip, folder, section)
    made = map_in_processes(work, clips, num_processes, FEWER, chunksize=16)
    progress = progress_bar("rendering procedural clips", made, total=len(clips), unit="clip")
    rows = [row for clip_rows in progress for row in clip_rows]
    write_jsonl(folder / "metadata.jsonl", rows)


def plan(section) -> list[tuple[str, str, int]]:
    """Return all clips as (split, task, number). Counts per task follow train_mix, rounded by largest remainder."""
    counts = largest_remainder(section.num_train_clips, [getattr(section.train_mix, kind) for kind in world.KINDS])
    numbers = {
        "train": dict(zip(world.KINDS, counts, strict=True)),
        "validation": dict.fromkeys(world.KINDS, section.num_validation_clips),
        "test": dict.fromkeys(world.KINDS, section.num_test_clips),
    }
    return [(split, kind, i) for split in numbers for kind in world.KINDS for i in range(numbers[split][kind])]


def largest_remainder(total: int, weights: list[float]) -> list[int]:
    """Whole numbers in the proportions of `weights` that add up to `total`."""
    weights = np.array(weights)
    shares = total * weights / weights.sum()
    counts = np.floor(shares).astype(int)
    counts[np.argsort(counts - shares, kind="stable")[: total - counts.sum()]] += 1
    return counts.tolist()


def sample_clip(section, split: str, kind: str, number: int) -> tuple[world.Scene, list[dict]]:
    """Sample the scene of one clip and its items.

    Held-out clips have one item with balanced answers, and four objects (1 to 4 in `gist`).
    """
    key = (section.seed, world.SPLITS.index(split), world.KINDS.index(kind), number)
    rng = np.random.default_rng(key)
    if split == "train":
        weights = np.array(section.num_objects_weights)
        drawn = 1 + int(rng.choice(4, p=weights / weights.sum()))
        chosen = {"num_objects": drawn if kind in world.HOPPING_KINDS else None}
    elif kind == "gist":
        chosen = {"background": number % 4, "num_objects": 1 + number // 4 % 4}
    else:
        chosen = {"colour": number % 6, "place": (number + number // 12) % 4}
    num_frames = 1 if kind == "image" else section.num_frames
    scene = world.sample_scene(rng, kind, split, _digits(), num_frames, section.motion, **chosen)
    return scene, world.scene_items(scene, rng, section.num_ask_items if split == "train" else 0)


def _write_clip(folder: Path, section, clip: tuple[str, str, int]) -> list[dict]:
    """Render and encode one clip. Returns its metadata rows; the first one holds the ground truth."""
    split, kind, number = clip
    scene, items = sample_clip(section, split, kind, number)
    frames = world.render(scene, _digits(), section.frame_size, section.noise)
    file_name = f"{split}/{kind}-{number:06d}.{'jpg' if kind == 'image' else 'mp4'}"
    save_media(folder / file_name, frames, section.fps)
    rows = item_rows(file_name, items)
    rows[0] |= {
        "split": split,
        "num_source_frames": len(frames),
        "background": scene.background,
        "objects": [thing.to_dict() for thing in scene.objects],
        "digit_images": [list(thing.digit_images) for thing in scene.objects],
    }
    return rows


def save_media(path: Path, frames: np.ndarray, fps: float) -> None:
    """Write frames, uint8 [T, H, W, 3], as a clip (.mp4), or the first one as a still (.jpg)."""
    if path.suffix == ".jpg":
        Image.fromarray(frames[0]).save(path, quality=95, subsampling=0)
    else:
        encode(path, frames, fps)


def item_rows(file_name: str, items: list[dict]) -> list[dict]:
    """Rows of metadata.jsonl of a file's items; an item whose `user` is None is a caption."""
    rows = []
    for item in items:
        text = {"caption": item["assistant"]}
        if item["user"] is not None:
            text = {"question": item["user"], "answer": item["assistant"]}
        rows.append({"file_name": file_name, **text, **{name: item[name] for name in ("task", "cue", "target")}})
    return rows


def encode(path: Path, frames: np.ndarray, fps: float) -> None:
    """Encode frames, uint8 [T, H, W, 3], as an H.264 mp4. The bytes depend only on the frames and `fps`."""
    with av.open(str(path), "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=X264)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        to_yuv = VideoReformatter()
        for frame in frames:
            rgb = av.VideoFrame.from_ndarray(frame, format="rgb24")
            container.mux(stream.encode(to_yuv.reformat(rgb, format="yuv420p", interpolation=EXACT)))
        container.mux(stream.encode(None))
