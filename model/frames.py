"""Frames from media: which ones, decoded, upright, square. One policy for packing, evaluation, the processor and ask.

A video of `duration` seconds gives n = round(duration * fps) frames, at least 1, at most max_frames and what the clip
has, uniform over the WHOLE clip (or its `segment`): the ones on screen at (i + 0.5) * duration / n. A frame becomes a
square of image_size px (pictures.square).

Media that cannot be read in full raise MediaError, whose `reason` is short and the same on every machine.

This file goes with every checkpoint, for the processor; pipeline_steps/frames.py is a link to it, so that packing
neither imports nor depends on the rest of the network's code. It needs Pillow, and PyAV where a video is decoded.
"""

import io
import itertools
import math
import os
import statistics
from bisect import bisect_left, bisect_right
from dataclasses import dataclass

from PIL import Image

from .pictures import IMAGE_SUFFIXES, MediaError, check_size, file_size, is_picture, load_image, square

try:
    import av
    from av.video.frame import PictureType
    from av.video.reformatter import Interpolation, VideoReformatter
except ImportError:  # only a video file needs it
    av = None
else:
    av.logging.set_level(None)  # FFmpeg's own messages would flood the terminal; errors arrive as exceptions
    EXACT = Interpolation.BILINEAR | Interpolation.BITEXACT  # the same pixels on every processor

MAX_VIDEO_PIXELS = 2**25  # of one frame: 8K; a decoder holds up to 17 of them
MAX_SECONDS = 2**20  # of a clip: twelve days; longer ones are damaged timestamps
MAX_FRAMES = 2**22  # of a clip: 19 hours at 60 frames per second
MAX_PIXEL_ASPECT = 16  # width of a pixel / its height, or the other way round
VIDEO_FORMATS = "mov,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,gif"  # no playlist formats: they open other files
VIDEO_SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mts", ".mpg", ".mpeg", ".flv", ".wmv", ".ogv", ".gif"
)  # fmt: skip
# Codecs of which nothing after a key frame, in display order, refers to what was before it.
RANDOM_ACCESS = ("h264", "hevc", "av1", "vp8", "vp9", "mpeg4", "mpeg1video", "mpeg2video")
SAME_TIME = 1e-4  # seconds; containers round timestamps
UPRIGHT = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}


@dataclass(frozen=True)
class Media:
    frames: list  # PIL RGB images, image_size x image_size
    timestamps: list  # seconds from the first frame of the source, one per frame
    duration: float  # seconds of the video, or of its segment; 0 for stills
    width: int  # of the upright source as displayed (of its first picture), px
    height: int


@dataclass(frozen=True)
class Policy:
    """How frames are taken."""

    fps: float  # frames per second that are taken of a video
    max_frames: int
    image_size: int  # px
    fit: str  # of pictures.FITS


@dataclass(frozen=True)
class Piece:
    """One media file: a file of its own, or a part of a container file such as a tar."""

    path: str
    size: int  # bytes
    offset: int | None = None  # bytes; None: a file of its own

    @property
    def url(self):
        """What FFmpeg opens: it reads a part in place."""
        if self.offset is None:
            return f"file:{self.path}"
        return f"subfile,,start,{self.offset},end,{self.offset + self.size},,:file:{self.path}"

    def read(self, size=None):
        """All bytes, or the first `size` ones."""
        with open(self.path, "rb") as file:
            file.seek(self.offset or 0)
            return file.read(self.size if size is None else min(size, self.size))


def read_media(path, kind, *, fps, max_frames, image_size, fit, parts=(), picture_fps=None, segment=None):
    """The frames of a medium as Media. Raises MediaError, and ImportError for a video file without PyAV.

    path: a file; or with `parts`, ((offset, bytes) ...), a file that holds the media; or a folder of pictures, taken
    in the order of their names, without the hidden ones. kind "image": one picture or several, all kept, at most
    max_frames. kind "video": one video file, or its frames as pictures at `picture_fps` frames per second (None: they
    were taken at `fps`). segment: (start, end) seconds, the piece of a video that is meant.
    """
    policy = Policy(fps, max_frames, image_size, fit)
    pieces = _pieces(os.fspath(path), parts)
    if kind == "image":
        return _stills(pieces, policy)
    alone = len(pieces) == 1 and picture_fps is None and not os.path.isdir(path)
    if alone and not (parts and is_picture(pieces[0].read(12))):
        return decode_video(pieces[0], policy, segment)
    return _picture_video(pieces, picture_fps, policy, segment)


def _pieces(path, parts):
    """The media at `path` in their order."""
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


# ---------------------------------------------------------------- pictures


def _stills(pieces, policy):
    if len(pieces) > policy.max_frames:
        raise MediaError(f"{len(pieces)} pictures, at most {policy.max_frames} are taken")
    return _media_of(pieces, [0.0] * len(pieces), 0.0, policy)


def _picture_video(pieces, picture_fps, policy, segment):
    rate = policy.fps if picture_fps is None else picture_fps
    if not 0 < rate < math.inf:
        raise MediaError(f"unsupported frame rate {rate:g}")
    duration = _check_duration(len(pieces) / rate)
    times = [i / rate for i in range(len(pieces))]
    start, end = _bounds(duration, segment)
    wanted = choose_times(times, start, end, policy)
    return _media_of([pieces[bisect_left(times, time)] for time in wanted], wanted, end - start, policy)


def _media_of(pieces, times, duration, policy):
    frames, sizes = [], []
    for piece in pieces:
        image = load_image(piece.path if piece.offset is None else io.BytesIO(piece.read()))
        sizes.append(image.size)
        frames.append(square(image, policy.image_size, policy.fit))
    return Media(frames, [round(time, 4) for time in times], round(duration, 4), *sizes[0])


# ---------------------------------------------------------------- which frames


def choose_times(times, start, end, policy):
    """The timestamps to take, uniform from `start` to `end`, of the sorted timestamps of all frames (first one 0)."""
    first = max(0, bisect_right(times, start + SAME_TIME) - 1)  # on screen at the start
    on_screen = max(bisect_left(times, end - SAME_TIME), first + 1) - first
    count = max(1, min(int((end - start) * policy.fps + 0.5), policy.max_frames, on_screen))
    middles = (start + (i + 0.5) * (end - start) / count for i in range(count))
    return [times[max(0, bisect_right(times, middle + SAME_TIME) - 1)] for middle in middles]


def _bounds(duration, segment):
    """(start, end) seconds of the piece of a clip that is meant."""
    if segment is None:
        return 0.0, duration
    start, end = segment
    if not 0 <= start < end:
        raise MediaError(f"unsupported segment from {start:g} to {end:g} s")
    if start >= duration:
        raise MediaError(f"the segment begins at {start:g} s of {duration:g} s")
    return float(start), float(min(end, duration))


def _check_duration(seconds):
    if not 0 <= seconds <= MAX_SECONDS:
        raise MediaError(f"unsupported duration {seconds:.0f} s")
    return seconds


# ---------------------------------------------------------------- video


@dataclass(frozen=True)
class Index:
    """What the packets of a video say, without decoding."""

    times: list  # seconds from the first frame, of all frames, sorted
    start: float  # seconds on the container's clock, of the first frame
    duration: float  # seconds
    keys: list  # (seconds, number of the packet) of the key frames after the first one, in both orders; or []


class Unreliable(Exception):
    """A key frame that did not turn out to be one: the clip is decoded from its beginning."""


def decode_video(piece, policy, segment=None):
    """Media of a video file: a first pass over its packets for the real timestamps, a second one that decodes.

    Only what lies between a wanted frame and the key frame before it is decoded, if the file has such, and only the
    squares of chosen frames are kept: memory does not grow with the clip's length.
    """
    if av is None:
        raise ImportError(
            f"{piece.path}: decoding a video needs PyAV (`pip install av`); or give its frames as pictures"
        )
    index = _read_index(piece)
    start, end = _bounds(index.duration, segment)
    wanted = choose_times(index.times, start, end, policy)
    try:
        taken = _take(piece, index, wanted, policy, _frames_from_keys if index.keys else _frames_from_start)
    except Unreliable:
        taken = _take(piece, index, wanted, policy, _frames_from_start)
    times, frames, sizes = zip(*taken, strict=True)
    return Media(list(frames), [round(time, 4) for time in times], round(end - start, 4), *sizes[-1])


def _take(piece, index, wanted, policy, frames_of):
    """[(seconds, square, displayed (width, height))] of the wanted times, as `frames_of` decodes them."""
    tolerance = index.duration / len(wanted) + SAME_TIME  # a frame further off than one sampling step is a hole
    taken = []
    with _open(piece) as container:
        stream = _video_stream(container)
        aspect = _pixel_aspect(stream)
        to_rgb = VideoReformatter()  # keeps its set-up, which costs more than converting a small frame
        for time, frame in frames_of(container, stream, index, wanted):
            if abs(time - wanted[len(taken)]) > tolerance:
                raise MediaError(f"undecodable at {wanted[len(taken)]:.1f} s")
            if taken and time == taken[-1][0]:
                taken.append(taken[-1])
            else:
                taken.append((time, *_upright_square(to_rgb, frame, aspect, policy)))
    if len(taken) < len(wanted):
        raise MediaError("no frame can be decoded" if not taken else f"undecodable at {wanted[len(taken)]:.1f} s")
    if any(later[0] < earlier[0] for earlier, later in itertools.pairwise(taken)):
        raise MediaError("frames out of order")
    return taken


def _read_index(piece):
    with _open(piece) as container:
        stream = _video_stream(container)
        check_size(stream.codec_context.width, stream.codec_context.height, MAX_VIDEO_PIXELS)
        if any(entry.pos + entry.size > piece.size for entry in stream.index_entries):
            raise MediaError("truncated video")
        bases = {other.index: float(other.time_base or 0) for other in container.streams}
        times, spans, keys, end, number = [], [], [], 0.0, -1
        for packet in _packets(container):
            stamp = packet.dts if packet.pts is None else packet.pts
            own, base = packet.stream.index == stream.index, bases.get(packet.stream.index, 0.0)
            number += own
            if not packet.size or stamp is None or packet.is_discard:
                continue
            end = max(end, (stamp + (packet.duration or 0)) * base)
            if own:
                times.append(stamp * base)
                spans.append((packet.duration or 0) * base)
                if packet.is_keyframe:
                    keys.append((times[-1], number))
            if len(times) > MAX_FRAMES:
                raise MediaError(f"more than {MAX_FRAMES} frames")
        announced = (container.duration or 0) / av.time_base
        container_start = max(0, container.start_time or 0) / av.time_base
        seekable = stream.codec_context.codec.canonical_name in RANDOM_ACCESS
    if not times:
        raise MediaError("no frames")
    if end - container_start < 0.9 * announced - 1.0:  # the header promises more than the file holds
        raise MediaError("truncated video")
    order = sorted(range(len(times)), key=times.__getitem__)
    first, last = times[order[0]], times[order[-1]]
    gaps = [times[b] - times[a] for a, b in itertools.pairwise(order)]
    last_span = spans[order[-1]] or (statistics.median(gaps) if gaps else 0.0)
    keys = [(time - first, number) for time, number in keys[1:]] if seekable and keys == sorted(keys) else []
    return Index([times[i] - first for i in order], first, _check_duration(last - first + last_span), keys)


def _packets(container):
    """All packets up to the end of the file, or up to where it is damaged (what is missing shows in the timestamps)."""
    packets = container.demux()
    while True:
        try:
            yield next(packets)
        except (StopIteration, av.FFmpegError):
            return


def _frames_from_start(container, stream, index, wanted):
    """For every wanted time, in order, the (seconds, frame) nearest to it of all that decode well."""
    before, queue = None, list(reversed(wanted))
    for now in _decoded(container, stream, index.start):
        while queue and now[0] >= queue[-1] - SAME_TIME:
            use_before = before is not None and queue[-1] - before[0] < abs(now[0] - queue[-1])
            yield before if use_before else now
            queue.pop()
        if not queue:
            return
        before = now
    while queue and before is not None:
        yield before
        queue.pop()


def _decoded(container, stream, start):
    """(seconds after `start`, frame) of every frame that decodes well, in display order."""
    for packet in _own_packets(container, stream):
        try:
            yield from _decode(packet, stream, start)
        except av.FFmpegError:
            continue


def _frames_from_keys(container, stream, index, wanted):
    """For every wanted time, in order, its (seconds, frame), decoded from the key frame before it on.

    Packets are read one after the other and those in between are not decoded: reading costs little, and a container's
    own seeking is not needed. Raises Unreliable where a key frame or a wanted one is not found exactly at its time.
    """
    queue = [(time, *_key_before(index.keys, time)) for time in reversed(wanted)]
    decoded, due = -1, None  # number of the last packet that was decoded; time of the key frame that has to come next
    for number, packet in enumerate(_own_packets(container, stream)):
        if number < queue[-1][1]:
            continue
        if number > decoded + 1:
            stream.codec_context.flush_buffers()
            due = queue[-1][2]
        decoded = number
        for time, frame in _decode_strictly(packet, stream, index.start):
            if due is not None and time < due - SAME_TIME:
                continue  # of an open group of pictures: refers to what was left out
            if due is not None and not (time <= due + SAME_TIME and _is_key(frame)):
                raise Unreliable
            due = None
            while queue and time >= queue[-1][0] - SAME_TIME:
                if time > queue[-1][0] + SAME_TIME:
                    raise Unreliable
                yield time, frame
                queue.pop()
            if not queue:
                return
    raise Unreliable


def _key_before(keys, time):
    """(number of the packet to decode from, seconds of its key frame) for the frame at `time`."""
    found = bisect_right(keys, (time, math.inf)) - 1
    return (keys[found][1], keys[found][0]) if found >= 0 else (0, None)


def _is_key(frame):
    return frame.key_frame and frame.pict_type == PictureType.I


def _decode_strictly(packet, stream, start):
    try:
        yield from _decode(packet, stream, start)
    except av.FFmpegError:
        raise Unreliable from None


def _own_packets(container, stream):
    return (packet for packet in _packets(container) if packet.stream.index == stream.index)


def _decode(packet, stream, start):
    """(seconds after `start`, frame) of every frame that comes out well when the decoder gets this packet."""
    for frame in packet.decode():
        check_size(frame.width, frame.height, MAX_VIDEO_PIXELS)
        stamp = frame.dts if frame.pts is None else frame.pts
        if stamp is not None and not frame.is_corrupt:
            yield stamp * float(stream.time_base) - start, frame


def _upright_square(to_rgb, frame, aspect, policy):
    """(square, displayed (width, height)) of a decoded frame."""
    plane = to_rgb.reformat(frame, format="rgb24", interpolation=EXACT, threads=1).planes[0]
    image = Image.frombuffer("RGB", (frame.width, frame.height), plane, "raw", "RGB", plane.line_size, 1)
    size = (max(1, round(frame.width * aspect)), frame.height)
    rotation = frame.rotation % 360
    if rotation in UPRIGHT:
        image = image.transpose(UPRIGHT[rotation])
        aspect, size = (aspect, size) if rotation == 180 else (1 / aspect, size[::-1])
    return square(image, policy.image_size, policy.fit, aspect), size


def _pixel_aspect(stream):
    aspect = float(stream.sample_aspect_ratio or 1)
    if not 1 / MAX_PIXEL_ASPECT <= aspect <= MAX_PIXEL_ASPECT:
        raise MediaError("unsupported proportions of a pixel")
    return aspect


def _open(piece):
    options = {"format_whitelist": VIDEO_FORMATS, "protocol_whitelist": "file,subfile"}
    try:
        return av.open(piece.url, options=options, metadata_errors="replace")
    except av.FFmpegError:
        head = piece.read(12)
        known = head[4:8] == b"ftyp" or head[:4] == b"\x1aE\xdf\xa3" or head[:4] == b"RIFF"
        raise MediaError("truncated or damaged video" if known else "not a video file") from None


def _video_stream(container):
    """The first video stream that is not a cover picture, set up for decoding."""
    if not container.streams:
        raise MediaError("truncated or damaged video")
    cover = av.stream.Disposition.attached_pic
    streams = [s for s in container.streams.video if not s.disposition & cover and s.codec_context is not None]
    if not streams:
        raise MediaError("no video stream")
    context = streams[0].codec_context
    context.thread_count = 1  # many clips at a time, one core each
    context.options = {"max_pixels": str(MAX_VIDEO_PIXELS)}
    return streams[0]
