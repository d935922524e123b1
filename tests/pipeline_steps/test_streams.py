"""Late, wrapping and joined clocks, the choice of a stream, AVI without display times, colours of video."""

from fractions import Fraction

import av
import numpy as np
import pytest

from model.frames import MediaError, read_media
from tests.pipeline_steps.clips import grey_frames, index_of, write_clip

WRAP = 2**33 / 90_000  # seconds until the clock of a transport stream starts again
ALL = {"fps": 10.0, "max_frames": 64, "image_size": 16, "resize_mode": "crop"}


def write(path, frames, start=0.0, fps=10, codec="libx264", bf="0", gop=5):
    """A clip whose first frame is at `start` seconds."""
    with av.open(str(path), "w") as container:
        options = {"crf": "4", "preset": "ultrafast", "bf": bf} if codec == "libx264" else {"qscale": "2"}
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.gop_size = "yuv420p", gop
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = round(start * fps) + i, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def shown(path, num_frames=20, **options):
    return [index_of(image, num_frames) for image in read_media(path, "video", **{**ALL, **options}).frames]


@pytest.mark.parametrize("name", ["a.mkv", "a.ts", "a.mp4"])
@pytest.mark.parametrize("start", [0.0, 100.0])
def test_a_clip_that_starts_late(tmp_path, name, start):
    media = read_media(write(tmp_path / name, grey_frames(20), start), "video", **ALL)
    assert [index_of(image, 20) for image in media.frames] == list(range(20))
    assert media.timestamps == pytest.approx([i / 10 for i in range(20)], abs=0.002)
    assert media.duration == pytest.approx(2.0, abs=0.01)


def test_a_matroska_file_that_is_cut_off_is_still_found(tmp_path):
    clip = write(tmp_path / "a.mkv", grey_frames(200, 64, 64), fps=5)
    clip.write_bytes(clip.read_bytes()[: clip.stat().st_size // 4])
    with pytest.raises(MediaError, match=r"^truncated video$"):
        shown(clip)


@pytest.mark.parametrize("bf", ["0", "3"])
@pytest.mark.parametrize("start", [WRAP - 1, WRAP - 10, WRAP - 100])
def test_a_clock_that_wraps(tmp_path, start, bf):
    fps, count = (1, 120) if start < WRAP - 50 else (10, 120)
    frames = [frame for frame in grey_frames(20) for _ in range(count // 20)]
    clip = write(tmp_path / "a.ts", frames, start, fps, bf=bf)
    media = read_media(clip, "video", **{**ALL, "fps": fps / 6})
    assert [index_of(image, 20) for image in media.frames] == list(range(20))
    assert media.duration == pytest.approx(count / fps, rel=0.01)


@pytest.mark.parametrize("bf", ["0", "3"])
@pytest.mark.parametrize(("first", "second"), [(0.0, 0.0), (0.0, 5000.0), (5000.0, 0.0), (WRAP - 70, 3.0)])
def test_joined_transport_streams_are_shown_one_after_the_other(tmp_path, first, second, bf):
    parts = [
        write(tmp_path / f"{start}-{number}.ts", grey_frames(20)[10 * number :][:10], start, bf=bf)
        for number, start in enumerate((first, second))
    ]
    (tmp_path / "joined.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    media = read_media(tmp_path / "joined.ts", "video", **ALL)
    assert [index_of(image, 20) for image in media.frames] == list(range(20))
    assert media.timestamps == pytest.approx([i / 10 for i in range(20)], abs=0.002)
    assert media.duration == pytest.approx(2.0, abs=0.01)


def test_the_resolution_may_change_within_a_clip(tmp_path):
    parts = [write(tmp_path / "0.ts", grey_frames(20)[:10]), write(tmp_path / "1.ts", grey_frames(20, 64, 48)[10:])]
    (tmp_path / "joined.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    assert shown(tmp_path / "joined.ts") == list(range(20))


def two_streams(path, small, large, default=None):
    """Two video streams: of 32 and of 64 px. default: number of the one with the disposition `default`."""
    with av.open(str(path), "w") as container:
        streams = []
        for number, frames in enumerate((small, large)):
            stream = container.add_stream("libx264", rate=10, options={"crf": "4", "preset": "ultrafast"})
            stream.height, stream.width = frames[0].shape[:2]
            stream.pix_fmt = "yuv420p"
            stream.disposition = av.stream.Disposition.default if number == default else 0
            streams.append(stream)
        for stream, frames in zip(streams, (small, large), strict=True):
            for i, pixels in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts, frame.time_base = i, Fraction(1, 10)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return path


@pytest.mark.parametrize(("default", "expected"), [(None, 15), (0, 5), (1, 15)])
def test_of_two_streams_the_default_or_larger_one_is_shown(tmp_path, default, expected):
    small, large = [grey_frames(20)[5]] * 10, [grey_frames(20, 64, 64)[15]] * 10
    assert set(shown(two_streams(tmp_path / "a.mkv", small, large, default))) == {expected}


def test_a_still_as_the_first_stream_is_not_shown(tmp_path):
    small, large = grey_frames(20)[5:15], [grey_frames(20, 64, 64)[19]]
    assert shown(two_streams(tmp_path / "a.mkv", small, large, 1)) == list(range(5, 15))


@pytest.mark.parametrize("bf", ["0", "1", "3"])
def test_avi_of_h264_shows_every_frame_at_its_time(tmp_path, bf):
    clip = write_clip(tmp_path / "a.avi", grey_frames(20, 64, 64), 10, options={"bf": bf, "crf": "4"})
    assert shown(clip) == list(range(20))
    assert shown(clip, fps=3.0) == [1, 5, 8, 11, 15, 18]


# ---------------------------------------------------------------- colours


def coloured(path, size, colour_space=None, trc=None):
    """A clip of one colour, Y Cb Cr = (100, 110, 170), as written by `path`'s muxer with these tags."""
    with av.open(str(path), "w") as container:
        tags = {"colormatrix": colour_space, "transfer": trc}
        tags = ":".join(f"{name}={value}" for name, value in tags.items() if value)
        options = {"crf": "1", "preset": "ultrafast", **({"x264-params": tags} if tags else {})}
        stream = container.add_stream("libx264", rate=2, options=options)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        frame = av.VideoFrame(*size, "yuv420p")
        for plane, value in zip(frame.planes, (100, 110, 170), strict=True):
            plane.update(bytes([value]) * plane.buffer_size)
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def rgb(kr, kb, y=100, cb=110, cr=170):
    """Rec. ITU-R BT.601 and BT.709 with limited range, from their constants."""
    light, blue, red = (y - 16) / 219, (cb - 128) / 224, (cr - 128) / 224
    r, b = light + 2 * (1 - kr) * red, light + 2 * (1 - kb) * blue
    return [255 * value for value in (r, (light - kr * r - kb * b) / (1 - kr - kb), b)]


@pytest.mark.parametrize(
    ("size", "space", "constants"),
    [
        ((64, 64), None, (0.299, 0.114)),
        ((720, 576), None, (0.299, 0.114)),
        ((1280, 64), None, (0.2126, 0.0722)),
        ((64, 578), None, (0.2126, 0.0722)),
        ((64, 64), "bt709", (0.2126, 0.0722)),
        ((1280, 64), "smpte170m", (0.299, 0.114)),
    ],
)
def test_colour_space_as_tagged_or_else_by_size(tmp_path, size, space, constants):
    frame = read_media(coloured(tmp_path / "a.mkv", size, space), "video", **ALL).frames[0]
    assert np.abs(np.asarray(frame).astype(float)[8, 8] - rgb(*constants)).max() <= 3
