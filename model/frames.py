"""Sampling of frames from media files, shared by packing, evaluation, the processor and `ask`.

A video of `duration` seconds gives n = round(duration * fps) frames, at least 1 and at most max_frames or the number of
frames in the clip. They are sampled uniformly over the WHOLE clip (or its `segment`): the frames on screen at
(i + 0.5) * duration / n. Frames are rotated upright and made square with a side of image_size px (pictures.square).

Media that cannot be read completely raise MediaError. Its `reason` is short and equal on every machine.

Checkpoints contain this file because the processor uses it. Importing it from the package `model` does not import
torch, so packing does not depend on the network. Requires Pillow, and PyAV for videos.
"""

import io
import math
import os
from bisect import bisect_left, bisect_right
from dataclasses import dataclass

from .pictures import IMAGE_SUFFIXES, MediaError, Piece, file_size, is_picture, load_image, square
from .video import SAME_TIME, check_duration, decode, read_index

VIDEO_SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mts", ".mpg", ".mpeg", ".flv", ".wmv", ".ogv", ".gif"
)  # fmt: skip


@dataclass(frozen=True)
class Media:
    frames: list  # PIL RGB images, image_size x image_size
    timestamps: list  # seconds since the first frame of the source, one per frame
    duration: float  # seconds of the video, or of its segment; 0 for stills
    width: int  # px, of the source as displayed upright (of the first image if there are several)
    height: int


@dataclass(frozen=True)
class Policy:
    """How frames are sampled and resized."""

    fps: float  # sampled frames per second of a video
    max_frames: int
    image_size: int  # px
    resize_mode: str  # of pictures.RESIZE_MODES
    hdr: str = "refuse"  # of hdr.HDR_MODES


def read_media(
    path, kind, *, fps, max_frames, image_size, resize_mode, hdr="refuse", parts=(), picture_fps=None, segment=None
):
    """The frames of a medium as Media. Raises MediaError, and ImportError for a video file without PyAV.

    path: a media file; with `parts`, ((offset, bytes) ...), a container file such as a tar; or a folder of images,
    sorted by name, hidden files ignored. kind "image": one or several images, all kept; more than max_frames are an
    error. kind "video": one video file, or images that are its frames at `picture_fps` frames per second (None: `fps`).
    segment: (start, end) in seconds to sample from. hdr: of hdr.HDR_MODES, for media with PQ or HLG.
    """
    policy = Policy(fps, max_frames, image_size, resize_mode, hdr)
    pieces = _pieces(os.fspath(path), parts)
    if kind == "image":
        return _stills(pieces, policy)
    alone = len(pieces) == 1 and picture_fps is None and not os.path.isdir(path)
    if alone and not (parts and is_picture(pieces[0].read(12))):
        return _video(pieces[0], policy, segment)
    return _picture_video(pieces, picture_fps, policy, segment)


def _pieces(path, parts):
    """The media files at `path`, in order."""
    if parts:
        total = file_size(path)
        if any(offset < 0 or size < 0 or offset + size > total for offset, size in parts):
            raise MediaError("a part lies beyond the end of its file")
        if any(size == 0 for _, size in parts):
            raise MediaError("empty file")
        return [Piece(path, size, offset) for offset, size in parts]
    if not os.path.isdir(path):
        return [Piece(path, file_size(path))]
    names = sorted(name for name in os.listdir(path) if not name.startswith("."))
    others = [name for name in names if not name.lower().endswith(IMAGE_SUFFIXES)]
    if others or not names:
        raise MediaError("a folder with other files than pictures" if others else "a folder without pictures")
    return [Piece(os.path.join(path, name), file_size(os.path.join(path, name))) for name in names]


# ---------------------------------------------------------------- kinds of media


def _stills(pieces, policy):
    if len(pieces) > policy.max_frames:
        raise MediaError(f"{len(pieces)} pictures, at most {policy.max_frames} are taken")
    return _media_of(pieces, [0.0] * len(pieces), 0.0, policy)


def _picture_video(pieces, picture_fps, policy, segment):
    rate = policy.fps if picture_fps is None else picture_fps
    if not 0 < rate < math.inf:
        raise MediaError(f"unsupported frame rate {rate:g}")
    duration = check_duration(len(pieces) / rate)
    times = [i / rate for i in range(len(pieces))]
    start, end = _bounds(duration, segment)
    wanted = choose_times(times, start, end, policy)
    return _media_of([pieces[bisect_left(times, time)] for time in wanted], wanted, end - start, policy)


def _media_of(pieces, times, duration, policy):
    frames, sizes = [], []
    for piece in pieces:
        image = load_image(piece.path if piece.offset is None else io.BytesIO(piece.read()), policy.hdr)
        sizes.append(image.size)
        frames.append(square(image, policy.image_size, policy.resize_mode))
    return Media(frames, [round(time, 4) for time in times], round(duration, 4), *sizes[0])


def _video(piece, policy, segment):
    index = read_index(piece)
    start, end = _bounds(index.duration, segment)
    wanted = choose_times(index.times, start, end, policy)
    settings = (policy.image_size, policy.resize_mode, policy.hdr)
    frames, times, sizes = zip(*decode(piece, index, wanted, *settings), strict=True)
    return Media(list(frames), [round(time, 4) for time in times], round(end - start, 4), *sizes[-1])


# ---------------------------------------------------------------- which frames


def choose_times(times, start, end, policy):
    """Timestamps of the frames to sample, uniform from `start` to `end` (seconds). times: of all frames, sorted, from
    0."""
    first = max(0, bisect_right(times, start + SAME_TIME) - 1)  # on screen at the start
    on_screen = max(bisect_left(times, end - SAME_TIME), first + 1) - first
    count = max(1, min(int((end - start) * policy.fps + 0.5), policy.max_frames, on_screen))
    middles = (start + (i + 0.5) * (end - start) / count for i in range(count))
    return [times[max(0, bisect_right(times, middle + SAME_TIME) - 1)] for middle in middles]


def _bounds(duration, segment):
    """(start, end) in seconds of the segment, or of the whole clip."""
    if segment is None:
        return 0.0, duration
    start, end = segment
    if not 0 <= start < end:
        raise MediaError(f"unsupported segment from {start:g} to {end:g} s")
    if start >= duration:
        raise MediaError(f"the segment begins at {start:g} s of {duration:g} s")
    return float(start), float(min(end, duration))
