"""Frames from media files: which ones, decoded, upright, square. One policy for packing, asking and tests.

A video of `duration` seconds gives n = round(duration * fps) frames, at least 1, at most max_frames and what the clip
has, uniform over the WHOLE clip: the ones on screen at (i + 0.5) * duration / n. The square is the centre of the
upright picture, in its displayed proportions, resampled once (bicubic) to image_size px.

A file that cannot be read in full raises MediaError, whose `reason` is short and the same on every machine.

This file goes with every checkpoint, for the processor; pipeline_steps/frames.py is a link to it, so that packing
neither imports nor depends on the rest of the network's code. It needs Pillow, and PyAV where a video is decoded.
"""

import io
import itertools
import os
import statistics
import struct
from bisect import bisect_right
from dataclasses import dataclass

from PIL import Image, ImageOps

try:
    import av
    from av.video.reformatter import Interpolation, VideoReformatter
except ImportError:  # only a video file needs it
    av = None
else:
    av.logging.set_level(None)  # FFmpeg's own messages would flood the terminal; errors arrive as exceptions
    EXACT = Interpolation.BILINEAR | Interpolation.BITEXACT  # the same pixels on every processor

MAX_PIXELS = 2**26  # of one decoded frame or image: 8192 x 8192
VIDEO_FORMATS = "mov,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,gif"  # no playlist formats: they open other files
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
VIDEO_SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mts", ".mpg", ".mpeg", ".flv", ".wmv", ".ogv", ".gif"
)  # fmt: skip
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
DAMAGED = (OSError, SyntaxError, ValueError, struct.error)  # what Pillow raises for a damaged file
SAME_TIME = 1e-4  # seconds; containers round timestamps
UPRIGHT = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}


class MediaError(Exception):
    """A damaged or unsupported media file. `reason`: a few words for the quarantine list."""

    def __init__(self, reason):
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Media:
    frames: list  # PIL RGB images, image_size x image_size
    timestamps: list  # seconds from the first frame of the source, one per frame
    duration: float  # seconds; 0 for a still
    width: int  # of the upright source, px
    height: int


def read_media(path, kind, *, fps, max_frames, image_size):
    """The frames of a "video" or "image" file as Media. Raises MediaError."""
    _check_file(path)
    if kind == "video":
        return decode_video(path, fps, max_frames, image_size)
    image = load_image(path)
    return Media([square(image, image_size)], [0.0], 0.0, image.width, image.height)


# ---------------------------------------------------------------- images


def load_image(path):
    """A still as an upright PIL RGB image. Raises MediaError."""
    _check_file(path)
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            return upright(image)
    except Image.UnidentifiedImageError:
        raise MediaError("not an image file") from None
    except DAMAGED:
        raise MediaError("truncated or damaged image") from None


def upright(image):
    """An opened PIL image of any common mode as an upright RGB image. Raises MediaError."""
    _check_size(image.width, image.height)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        raise MediaError(f"unsupported pixel mode {image.mode}")
    try:
        image.load()
        return ImageOps.exif_transpose(image).convert("RGB")
    except DAMAGED:
        raise MediaError("truncated or damaged image") from None


def square(image, size, pixel_aspect=1.0):
    """Shorter side to `size` px and centre crop, in one resampling. pixel_aspect: width of a pixel / its height."""
    side = min(image.width * pixel_aspect, image.height)
    half_width, half_height = side / pixel_aspect / 2, side / 2
    x, y = image.width / 2, image.height / 2
    box = (x - half_width, y - half_height, x + half_width, y + half_height)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def jpeg(image, quality):
    """The picture as the bytes of a JPEG file, its colours at full resolution. quality: 1 to 100."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


# ---------------------------------------------------------------- video


def decode_video(path, fps, max_frames, image_size):
    """Media of a video file: a first pass over its packets for the real timestamps, a second one that decodes.

    Only the chosen frames are converted, and only their squares are kept: memory does not grow with the clip's length.
    Raises MediaError, and ImportError without PyAV.
    """
    if av is None:
        raise ImportError(f"{path}: decoding a video needs PyAV (`pip install av`); or give its frames as pictures")
    _check_file(path)
    times, start, duration = _packet_times(path)
    wanted = choose_times(times, duration, fps, max_frames)
    tolerance = duration / len(wanted) + SAME_TIME  # a frame further off than one sampling step is a hole
    frames, taken = [], []
    with _open(path) as container:
        stream = _video_stream(container)
        to_rgb = VideoReformatter()  # keeps its set-up, which costs more than converting a small frame
        aspect = float(stream.sample_aspect_ratio or 1)
        for time, frame in _nearest_frames(_decoded(container, stream, start), wanted):
            if abs(time - wanted[len(taken)]) > tolerance:
                raise MediaError(f"undecodable at {wanted[len(taken)]:.1f} s")
            if taken and time == taken[-1]:
                frames.append(frames[-1])
            else:
                frames.append(_upright_square(to_rgb, frame, image_size, aspect))
            taken.append(time)
            width, height = (frame.width, frame.height)[:: -1 if frame.rotation % 180 else 1]
    if len(taken) < len(wanted):
        raise MediaError("no frame can be decoded" if not taken else f"undecodable at {wanted[len(taken)]:.1f} s")
    return Media(frames, [round(time, 4) for time in taken], round(duration, 4), width, height)


def choose_times(times, duration, fps, max_frames):
    """The timestamps to take, from the sorted timestamps of all frames (first one 0): uniform over the whole clip."""
    count = max(1, min(int(duration * fps + 0.5), max_frames, len(times)))
    middles = ((i + 0.5) * duration / count for i in range(count))
    return [times[max(0, bisect_right(times, middle + SAME_TIME) - 1)] for middle in middles]


def _packet_times(path):
    """Without decoding: display times of all frames (sorted seconds from the first), the first one's own, duration."""
    with _open(path) as container:
        stream = _video_stream(container)
        _check_size(stream.codec_context.width, stream.codec_context.height)
        file_size = os.path.getsize(path)
        if any(entry.pos + entry.size > file_size for entry in stream.index_entries):
            raise MediaError("truncated video")
        base = float(stream.time_base)
        times, spans, end = [], [], 0.0
        for packet in _packets(container):
            stamp = packet.dts if packet.pts is None else packet.pts
            if not packet.size or stamp is None or packet.is_discard:
                continue
            end = max(end, float((stamp + (packet.duration or 0)) * packet.time_base))
            if packet.stream.index == stream.index:
                times.append(stamp * base)
                spans.append((packet.duration or 0) * base)
        announced = (container.duration or 0) / av.time_base
        container_start = max(0, container.start_time or 0) / av.time_base
    if not times:
        raise MediaError("no frames")
    if end - container_start < 0.9 * announced - 1.0:  # the header promises more than the file holds
        raise MediaError("truncated video")
    order = sorted(range(len(times)), key=times.__getitem__)
    first, last = times[order[0]], times[order[-1]]
    gaps = [times[b] - times[a] for a, b in itertools.pairwise(order)]
    last_span = spans[order[-1]] or (statistics.median(gaps) if gaps else 0.0)
    return [times[i] - first for i in order], first, last - first + last_span


def _packets(container):
    """All packets up to the end of the file, or up to where it is damaged (what is missing shows in the timestamps)."""
    packets = container.demux()
    while True:
        try:
            yield next(packets)
        except (StopIteration, av.FFmpegError):
            return


def _decoded(container, stream, start):
    """(seconds after `start`, frame) of every frame that decodes well, in display order."""
    stream.codec_context.thread_count = 1  # many clips at a time, one core each
    for packet in _packets(container):
        if packet.stream.index != stream.index:
            continue
        try:
            frames = packet.decode()
        except av.FFmpegError:
            continue
        for frame in frames:
            _check_size(frame.width, frame.height)
            stamp = frame.dts if frame.pts is None else frame.pts
            if stamp is None or frame.is_corrupt:
                continue
            yield stamp * float(stream.time_base) - start, frame


def _nearest_frames(decoded, wanted):
    """For every wanted time, in order, the decoded (time, frame) nearest to it. Stops reading after the last one."""
    before, queue = None, list(reversed(wanted))
    for now in decoded:
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


def _upright_square(to_rgb, frame, image_size, aspect):
    plane = to_rgb.reformat(frame, format="rgb24", interpolation=EXACT, threads=1).planes[0]
    image = Image.frombuffer("RGB", (frame.width, frame.height), plane, "raw", "RGB", plane.line_size, 1)
    rotation = frame.rotation % 360
    if rotation in UPRIGHT:
        image = image.transpose(UPRIGHT[rotation])
        aspect = 1 / aspect if rotation != 180 else aspect
    return square(image, image_size, aspect)


def _open(path):
    try:
        return av.open(f"file:{path}", options={"format_whitelist": VIDEO_FORMATS, "protocol_whitelist": "file"})
    except av.FFmpegError:
        with open(path, "rb") as file:
            head = file.read(12)
        known = head[4:8] == b"ftyp" or head[:4] == b"\x1aE\xdf\xa3" or head[:4] == b"RIFF"
        raise MediaError("truncated or damaged video" if known else "not a video file") from None


def _video_stream(container):
    """The first video stream that is not a cover picture."""
    if not container.streams:
        raise MediaError("truncated or damaged video")
    cover = av.stream.Disposition.attached_pic
    streams = [s for s in container.streams.video if not s.disposition & cover and s.codec_context is not None]
    if not streams:
        raise MediaError("no video stream")
    return streams[0]


def _check_file(path):
    try:
        size = os.path.getsize(path)
    except FileNotFoundError:
        raise MediaError("missing file") from None
    if size == 0:
        raise MediaError("empty file")


def _check_size(width, height):
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        raise MediaError(f"unsupported size {width}x{height}")
