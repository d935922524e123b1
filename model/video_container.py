"""Opening video files and reading their packets. video.py decodes them.

Checkpoints contain this file, like video.py. It requires PyAV.
"""

import itertools
import struct

from .pictures import MediaError

try:
    import av
except ImportError:  # only needed for videos
    av = None
else:
    av.logging.set_level(None)  # silence FFmpeg's messages; errors are raised as exceptions

MAX_VIDEO_PIXELS = 2**25  # of one frame: 8K; a decoder holds up to 17 frames
MAX_FRAMES = 2**21  # of a clip: ten hours at 60 frames per second
MAX_BOXES = 2**20  # of an mp4
FORMATS = "mov,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,gif"  # no playlist formats, which open other files
BOXES = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf")  # mp4 boxes that contain other boxes
TABLES = {b"stsz": 8, b"stz2": 8, b"trun": 4}  # mp4 boxes with a sample count, and its byte offset in their content
JOINABLE = ("mpegts", "mpeg")  # formats that are joined by appending files
MAX_GAP, MAX_BACK = 10.0, 0.1  # seconds between packets of a joinable format; beyond, another clock begins
DAMAGED_VIDEO = "truncated or damaged video"


def open_video(piece):
    options = {"format_whitelist": FORMATS, "protocol_whitelist": "file,subfile"}
    try:
        return av.open(piece.url, options=options, metadata_errors="replace")
    except av.FFmpegError:
        head = piece.read(12)
        known = head[4:8] == b"ftyp" or head[:4] == b"\x1aE\xdf\xa3" or head[:4] == b"RIFF"
        raise MediaError(DAMAGED_VIDEO if known else "not a video file") from None


def video_streams(container):
    """The video streams that are not cover images or thumbnails."""
    if not container.streams:
        raise MediaError(DAMAGED_VIDEO)
    extra = av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails
    streams = [s for s in container.streams.video if not s.disposition & extra and s.codec_context is not None]
    if not streams:
        raise MediaError("no video stream")
    return streams


def prepared(container, number):
    """The stream of this number, set up for decoding."""
    stream = container.streams[number]
    stream.codec_context.thread_count = 1  # many clips at a time, one core each
    stream.codec_context.options = {"max_pixels": str(MAX_VIDEO_PIXELS)}
    return stream


def check_boxes(piece):
    """MediaError if the tables of an mp4 announce absurdly many samples, for which FFmpeg would allocate memory."""
    num_samples, regions = 0, [(0, piece.size)]
    with open(piece.path, "rb") as file:
        for num_boxes in itertools.count():
            if not regions or num_boxes > MAX_BOXES:
                break
            at, end = regions.pop()
            if at + 8 > end:
                continue
            file.seek((piece.offset or 0) + at)
            size, name, large = struct.unpack(">I4sQ", file.read(16).ljust(16, b"\0"))
            length, header = (large, 16) if size == 1 else (size or end - at, 8)
            if length < header:
                continue
            regions.append((at + length, end))
            if name in BOXES:
                regions.append((at + header, min(at + length, end)))
            if name in TABLES:
                file.seek((piece.offset or 0) + at + header + TABLES[name])
                num_samples += int.from_bytes(file.read(4), "big")
    # a byte of old audio codecs holds up to 6 samples
    if num_boxes > MAX_BOXES or num_samples > MAX_FRAMES + 8 * piece.size:
        raise MediaError(DAMAGED_VIDEO)


def packets_of(container):
    """All packets up to the end of the file or to the first damage. Missing packets show in the timestamps.

    Video timestamps of a transport or program stream are made continuous, as players do: its clock may wrap, and parts
    with clocks of their own may be joined.
    """
    packets, clocks = container.demux(), {}
    while True:
        try:
            packet = next(packets)
        except (StopIteration, av.FFmpegError):
            return
        if container.format.name in JOINABLE and packet.stream.type == "video":
            clocks.setdefault(packet.stream.index, _Clock()).adjust(packet)
        yield packet


class _Clock:
    """Makes the timestamps of a stream's packets continuous where they go back or jump."""

    def __init__(self):
        self.offset, self.last, self.span = 0, None, 0  # ticks of the stream

    def adjust(self, packet):
        stamp = packet.pts if packet.dts is None else packet.dts
        if stamp is None:
            return
        if self.last is not None:
            gap = stamp + self.offset - self.last
            if not -MAX_BACK <= gap * float(packet.time_base) <= MAX_GAP:
                self.offset += self.span - gap
            elif gap > 0:
                self.span = gap
        self.last = stamp + self.offset
        if self.offset:
            packet.pts = None if packet.pts is None else packet.pts + self.offset
            packet.dts = None if packet.dts is None else packet.dts + self.offset
