"""Video decoding: the frames at given times, upright and square. frames.py chooses the times, video_container.py reads
the packets.

Checkpoints contain this file, like frames.py. It requires PyAV.
"""

import itertools
import math
import statistics
import struct
from bisect import bisect_right
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .hdr import BT2020, TO_BT709, TRANSFERS, refusal, to_sdr
from .pictures import MediaError, check_size, on_white, square
from .video_container import (
    MAX_FRAMES,
    MAX_VIDEO_PIXELS,
    check_boxes,
    open_video,
    packets_of,
    prepared,
    video_streams,
)

try:
    import av
    from av.sidedata.sidedata import Type as SideDataType
    from av.video.frame import PictureType
    from av.video.reformatter import Colorspace, Interpolation, VideoReformatter
except ImportError:  # only needed for videos
    av = None
else:
    EXACT = Interpolation.BILINEAR | Interpolation.BITEXACT  # equal pixels on every CPU

MAX_SECONDS = 2**20  # of a clip: twelve days; more means damaged timestamps
MAX_PIXEL_ASPECT = 16  # width of a pixel / height, or the inverse
# Codecs in which no frame after a key frame, in display order, refers to a frame before it.
RANDOM_ACCESS = ("h264", "hevc", "av1", "vp8", "vp9", "mpeg4", "mpeg1video", "mpeg2video", "mjpeg", "prores")
SAME_TIME = 1e-4  # seconds; containers round timestamps
# Signs of a, b, c, d of a display matrix, which shows the pixel at (x, y) at (a x + c y, b x + d y), y downwards.
UPRIGHT = {
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}
SWAPS_SIDES = tuple(list(UPRIGHT.values())[3:])
SLANT = 0.02  # a display matrix that is further off the axes, about one degree, is not applied
WITHOUT_HEADER = ("mpegts", "mpeg", "ogg", "gif")  # formats whose duration FFmpeg takes from the packets
HD_WIDTH, SD_HEIGHT = 1280, 576  # px; a video without a colour space is BT.709 from HD_WIDTH or above SD_HEIGHT, as
# in players, otherwise BT.601
UNSPECIFIED = 2  # FFmpeg's number of a colour space, or of primaries, that are not given
HDR_MATRICES = (0, 1, 9)  # colour spaces of HDR video that are read: RGB, BT.709, BT.2020


@dataclass(frozen=True)
class Index:
    """Timestamps of a video from its packets, without decoding."""

    times: list  # seconds since the first frame, of all frames, sorted
    start: float  # seconds, container timestamp of the first frame
    duration: float  # seconds
    keys: list  # (seconds, packet number) of the key frames after the first, ascending in both; [] if not seekable
    stream: int  # number of the video stream in the container
    numbered: bool  # whether frames are in display order and their own timestamps are wrong: frame i is at times[i]


def check_duration(seconds):
    """Returns `seconds`. MediaError if it is not a possible duration."""
    if not 0 <= seconds <= MAX_SECONDS:
        raise MediaError(f"unsupported duration {seconds:.0f} s")
    return seconds


class Unreliable(Exception):
    """A key frame is wrong or missing: decode the clip from its start instead."""


def decode(piece, index, wanted, image_size, resize_mode, hdr="refuse"):
    """[(square image, seconds, displayed (width, height))] of the frames at the times `wanted`, a sorted subset of
    index.times.

    Decodes only from the key frame before each wanted frame, if the file has key frames, and keeps only the square
    images, so memory does not grow with the length of the clip. hdr: of hdr.HDR_MODES. Raises MediaError.
    """
    settings = (image_size, resize_mode, hdr)
    try:
        return _take(piece, index, wanted, *settings, _frames_from_keys if index.keys else _frames_from_start)
    except Unreliable:
        return _take(piece, index, wanted, *settings, _frames_from_start)


def _take(piece, index, wanted, image_size, resize_mode, hdr, frames_of):
    """`decode` with the frame iterator `frames_of`."""
    tolerance = index.duration / len(wanted) + SAME_TIME  # a frame further away than one sampling step is a gap
    taken, before = [], -math.inf
    with open_video(piece) as container:
        stream = prepared(container, index.stream)
        aspect, container_colours = _pixel_aspect(stream), _colours(stream.codec_context)  # the decoder changes them
        to_rgb = VideoReformatter()  # reused: its set-up costs more than converting a small frame
        for time, frame in frames_of(container, stream, index, wanted):
            if abs(time - wanted[len(taken)]) > tolerance:
                raise MediaError(f"undecodable at {wanted[len(taken)]:.1f} s")
            if time < before:
                raise MediaError("frames out of order")
            if time > before:
                image, pixel_aspect, size = _upright(to_rgb, frame, aspect, hdr, container_colours)
                picture = square(image, image_size, resize_mode, pixel_aspect)
            taken.append((picture, time, size))
            before = time
    if len(taken) < len(wanted):
        raise MediaError("no frame can be decoded" if not taken else f"undecodable at {wanted[len(taken)]:.1f} s")
    return taken


def read_index(piece):
    """The Index of a video file. Raises MediaError, and ImportError without PyAV."""
    if av is None:
        raise ImportError(
            f"{piece.path}: decoding a video requires PyAV (`pip install av`). Install it, or pass the frames as images"
        )
    check_boxes(piece)
    with open_video(piece) as container:
        candidates = {stream.index: _Track() for stream in video_streams(container)}
        bases = {other.index: float(other.time_base or 0) for other in container.streams}
        end, count = 0.0, 0
        for packet in packets_of(container):
            stamp = packet.dts if packet.pts is None else packet.pts
            track, base = candidates.get(packet.stream.index), bases.get(packet.stream.index, 0.0)
            if track is not None:
                track.num_packets += 1
            if not packet.size or stamp is None or packet.is_discard:
                continue
            end = max(end, (stamp + (packet.duration or 0)) * base)
            if track is not None:
                track.add(stamp * base, (packet.duration or 0) * base, packet.is_keyframe)
                count += 1
            if count > MAX_FRAMES:
                raise MediaError(f"more than {MAX_FRAMES} frames")
        number = _shown_stream(container, candidates)
        stream, track = container.streams[number], candidates[number]
        context = stream.codec_context
        check_size(context.width, context.height, MAX_VIDEO_PIXELS)
        if any(entry.pos + entry.size > piece.size for entry in stream.index_entries):
            raise MediaError("truncated video")
        if not track.times:
            raise MediaError("no frames")
        if _is_cut_off(container, end):
            raise MediaError("truncated video")
        # An AVI has no display times: FFmpeg numbers the frames of H.264 in the order of decoding
        numbered = container.format.name == "avi" and bool(context.has_b_frames) and track.times == sorted(track.times)
        seekable = context.codec.canonical_name in RANDOM_ACCESS and not numbered
    return track.index(number, seekable, numbered)


class _Track:
    """The timestamps of one video stream, collected from its packets."""

    def __init__(self):
        self.times, self.spans, self.keys, self.num_packets = [], [], [], 0

    def add(self, time, span, is_key):
        self.times.append(time)
        self.spans.append(span)
        if is_key:
            self.keys.append((time, self.num_packets - 1))

    def index(self, stream, seekable, numbered):
        times = self.times
        order = sorted(range(len(times)), key=times.__getitem__)
        first, last = times[order[0]], times[order[-1]]
        gaps = [times[b] - times[a] for a, b in itertools.pairwise(order)]
        last_span = self.spans[order[-1]] or (statistics.median(gaps) if gaps else 0.0)
        keys = [(time - first, n) for time, n in self.keys[1:]] if seekable and self.keys == sorted(self.keys) else []
        duration = check_duration(last - first + last_span)
        return Index([times[i] - first for i in order], first, duration, keys, stream, numbered)


def _shown_stream(container, tracks):
    """The number of the stream that players show: one that moves, then the default one, then the largest picture."""

    def rank(number):
        stream = container.streams[number]
        is_default = bool(stream.disposition & av.stream.Disposition.default)
        area = stream.codec_context.width * stream.codec_context.height
        return len(tracks[number].times) > 1, is_default, area, -number

    return max(tracks, key=rank)


def _is_cut_off(container, end):
    """Whether the header announces more than the file contains. end: of the last packet, in seconds."""
    if container.format.name in WITHOUT_HEADER:
        return False
    # The duration of a Matroska file counts from zero, also if it starts late, such as a piece of a segmenter
    start = 0 if "matroska" in container.format.name else max(0, container.start_time or 0) / av.time_base
    return end - start < 0.9 * (container.duration or 0) / av.time_base - 1.0


def _frames_from_start(container, stream, index, wanted):
    """For every wanted time, in order, the nearest (seconds, frame) among the frames that can be decoded."""
    before, queue = None, list(reversed(wanted))
    for now in _decoded(container, stream, index):
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


def _decoded(container, stream, index):
    """(seconds after the first frame, frame) of every frame that can be decoded, in display order."""
    numbers = itertools.count()
    for packet in _own_packets(container, stream):
        try:
            for time, frame in _decode(packet, stream, index.start):
                yield (index.times[min(next(numbers), len(index.times) - 1)] if index.numbered else time), frame
        except av.FFmpegError:
            continue


def _frames_from_keys(container, stream, index, wanted):
    """For every wanted time, in order, its (seconds, frame), decoded from the preceding key frame.

    Reads all packets in order but does not decode those in between: reading is cheap, and no container seeking is
    needed. Raises Unreliable if a key frame or a wanted frame is not found exactly at its time.
    """
    queue = [(time, *_key_before(index.keys, time)) for time in reversed(wanted)]
    decoded, due = -1, None  # number of the last decoded packet; time of the key frame that must come next
    for number, packet in enumerate(_own_packets(container, stream)):
        if number < queue[-1][1]:
            continue
        if number > decoded + 1:
            stream.codec_context.flush_buffers()
            due = queue[-1][2]
        decoded = number
        for time, frame in _decode_strictly(packet, stream, index.start):
            if due is not None and time < due - SAME_TIME:
                continue  # of an open GOP: refers to frames that were skipped
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
    """(packet number to decode from, seconds of its key frame) for the frame at `time`."""
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
    return (packet for packet in packets_of(container) if packet.stream.index == stream.index)


def _decode(packet, stream, start):
    """(seconds after `start`, frame) of every intact frame that the decoder returns for this packet."""
    for frame in packet.decode():
        check_size(frame.width, frame.height, MAX_VIDEO_PIXELS)
        stamp = frame.dts if frame.pts is None else frame.pts
        if stamp is not None and not frame.is_corrupt:
            yield stamp * float(stream.time_base) - start, frame


def _upright(to_rgb, frame, aspect, hdr, container_colours):
    """(RGB image, pixel aspect ratio, displayed (width, height)) of a decoded frame."""
    pairs = zip(_colours(frame), container_colours, strict=True)
    colours = tuple(stored if own == UNSPECIFIED else own for own, stored in pairs)
    image = _sdr(to_rgb, frame, hdr, *colours) if colours[0] in TRANSFERS else _rgb(to_rgb, frame)
    size = (max(1, round(frame.width * aspect)), frame.height)
    transpose = UPRIGHT.get(_display_signs(frame))
    if transpose is None:
        return image, aspect, size
    image = image.transpose(transpose)
    return (image, 1 / aspect, size[::-1]) if transpose in SWAPS_SIDES else (image, aspect, size)


def _rgb(to_rgb, frame):
    """A decoded frame as stored, as an RGB image; transparency shows white."""
    has_alpha = _has_alpha(frame)
    mode, name = ("RGBA", "rgba") if has_alpha else ("RGB", "rgb24")
    is_hd = frame.width >= HD_WIDTH or frame.height > SD_HEIGHT
    space = Colorspace.ITU709 if frame.colorspace == UNSPECIFIED and is_hd and not frame.format.is_rgb else None
    plane = to_rgb.reformat(frame, format=name, src_colorspace=space, interpolation=EXACT, threads=1).planes[0]
    image = Image.frombuffer(mode, (frame.width, frame.height), plane, "raw", mode, plane.line_size, 1)
    return on_white(image) if has_alpha else image


def _colours(source):
    """(transfer function, primaries, colour space) of a frame or a codec context, as FFmpeg's numbers."""
    return source.color_trc, source.color_primaries, source.colorspace


def _sdr(to_rgb, frame, hdr, transfer, primaries, space):
    """`_rgb` of an HDR frame: tone-mapped, or MediaError."""
    if hdr != "tone_map":
        raise MediaError(refusal("video", transfer))
    primaries = BT2020 if primaries == UNSPECIFIED else primaries
    space = BT2020 if space == UNSPECIFIED and not frame.format.is_rgb else space
    if primaries not in TO_BT709 or space not in (*HDR_MATRICES, UNSPECIFIED):
        raise MediaError(
            f"HDR video ({TRANSFERS[transfer]}) with unsupported colours (primaries {primaries}, matrix {space})"
        )
    has_alpha = _has_alpha(frame)
    num_channels, name = (4, "rgba64le") if has_alpha else (3, "rgb48le")
    source = None if frame.format.is_rgb else Colorspace.BT2020 if space == BT2020 else Colorspace.ITU709
    plane = to_rgb.reformat(frame, format=name, src_colorspace=source, interpolation=EXACT, threads=1).planes[0]
    codes = np.frombuffer(plane, "<u2").reshape(frame.height, -1)[:, : frame.width * num_channels]
    codes = codes.reshape(frame.height, frame.width, num_channels)
    image = Image.fromarray(to_sdr(codes[..., :3], transfer, primaries))
    if has_alpha:
        image.putalpha(Image.fromarray((codes[..., 3] >> 8).astype(np.uint8)))
    return on_white(image) if has_alpha else image


def _has_alpha(frame):
    return frame.format.name == "pal8" or any(component.is_alpha for component in frame.format.components)


def _display_signs(frame):
    """Signs of a, b, c, d of the frame's display matrix, as in UPRIGHT; None: no matrix, or one off the axes."""
    data = frame.side_data.get(SideDataType.DISPLAYMATRIX)
    if data is None:
        return None
    a, b, _, c, d = struct.unpack("=9i", bytes(data))[:5]
    if max(abs(b), abs(c)) <= SLANT * min(abs(a), abs(d)):
        b = c = 0
    elif max(abs(a), abs(d)) <= SLANT * min(abs(b), abs(c)):
        a = d = 0
    else:
        return None
    return tuple((value > 0) - (value < 0) for value in (a, b, c, d))


def _pixel_aspect(stream):
    aspect = float(stream.sample_aspect_ratio or 1)
    if not 1 / MAX_PIXEL_ASPECT <= aspect <= MAX_PIXEL_ASPECT:
        raise MediaError("unsupported proportions of a pixel")
    return aspect
