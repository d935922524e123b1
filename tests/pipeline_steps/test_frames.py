"""Which frames are taken, how they are cut, and what is refused."""

import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
from av.codec.context import Flags
from PIL import Image

from model.frames import MediaError, Policy, choose_times, read_media
from model.pictures import load_image, square
from pipeline_steps.common.params import ROOT
from tests.pipeline_steps.clips import grey_frames, index_of, write_clip, write_image

LOSSLESS = {"crf": "4", "preset": "ultrafast"}


def read(path, kind="video", fps=2.0, max_frames=16, image_size=16, resize_mode="crop", **options):
    return read_media(
        path, kind, fps=fps, max_frames=max_frames, image_size=image_size, resize_mode=resize_mode, **options
    )


def taken(path, num_frames, fps=2.0, max_frames=16, **options):
    return [index_of(image, num_frames) for image in read(path, "video", fps, max_frames, **options).frames]


@pytest.mark.parametrize("num_frames", [1, 5, 6])
def test_clip_at_the_sampling_rate_gives_every_frame_once(tmp_path, num_frames):
    clip = write_clip(tmp_path / "a.mp4", grey_frames(num_frames), fps=2, options=LOSSLESS)
    assert taken(clip, num_frames) == list(range(num_frames))


def test_frames_are_uniform_over_the_whole_clip(tmp_path):
    clip = write_clip(tmp_path / "a.mp4", grey_frames(50), fps=10, options=LOSSLESS)
    assert taken(clip, 50, fps=2.0) == [2, 7, 12, 17, 22, 27, 32, 37, 42, 47]
    assert taken(clip, 50, fps=2.0, max_frames=4) == [6, 18, 31, 43]  # the cap spreads, it does not cut the end off
    media = read(clip, max_frames=4)
    assert media.timestamps == [0.6, 1.8, 3.1, 4.3]
    assert (media.width, media.height) == (32, 32)


X265 = {"x265-params": "log-level=none:pools=1:crf=4"}
MPEG_B = {"qscale": "2", "bf": "2", "b_qfactor": "0.5", "b_qoffset": "0", "sc_threshold": "1000000000"}
AV1 = {"crf": "10", "preset": "12", "svtav1-params": "lp=1"}


@pytest.mark.parametrize(
    ("name", "codec", "options", "pix_fmt"),
    [
        ("a.mp4", "libx264", {"bf": "3", "crf": "4"}, "yuv420p"),  # with B-frames
        ("a.mkv", "libx264", {"bf": "3", "crf": "4"}, "yuv420p"),
        ("a.mp4", "libx264", {"crf": "4"}, "yuv444p10le"),
        ("a.mp4", "libx265", X265, "yuv420p"),
        ("a.mp4", "libx265", X265, "yuv420p10le"),
        ("a.mkv", "libsvtav1", AV1, "yuv420p"),
        ("a.mp4", "libsvtav1", AV1, "yuv420p10le"),
        ("a.avi", "mpeg4", {"qscale": "2"}, "yuv420p"),
        ("a.avi", "mpeg4", MPEG_B, "yuv420p"),
        ("a.webm", "libvpx", {"crf": "4", "b:v": "1M", "auto-alt-ref": "1"}, "yuv420p"),
        ("a.webm", "libvpx-vp9", {"crf": "4", "b:v": "1M", "cpu-used": "8"}, "yuv420p"),
        ("a.mov", "prores_ks", {}, "yuv422p10le"),
        ("a.mpg", "mpeg2video", {"qscale": "2"}, "yuv420p"),
        ("a.ts", "libx264", {"crf": "4"}, "yuv420p"),
        ("a.flv", "flv", {"qscale": "2"}, "yuv420p"),
        ("a.gif", "gif", {}, "rgb8"),
    ],
)
def test_codecs_and_containers(tmp_path, name, codec, options, pix_fmt):
    fps = 25 if name == "a.mpg" else 10  # of MPEG-2 only certain rates exist
    clip = write_clip(
        tmp_path / name, grey_frames(2 * fps, 64, 64), fps=fps, codec=codec, options=options, pix_fmt=pix_fmt
    )
    wanted = [int((i + 0.5) * fps / 2) for i in range(4)]
    media = read(clip)
    if pix_fmt == "rgb8":  # 8 levels of grey
        assert [image.getpixel((8, 8))[0] // 37 for image in media.frames] == [(20 + 10 * i) // 37 for i in wanted]
    else:
        assert [index_of(image, 2 * fps) for image in media.frames] == wanted
    assert media.timestamps == pytest.approx([i / fps for i in wanted], abs=0.011)
    assert media.duration == pytest.approx(2, abs=0.05)
    assert (media.width, media.height) == (64, 64)


def test_interlaced_clip(tmp_path):
    context = {"flags": Flags.interlaced_dct | Flags.interlaced_me}
    options = {"crf": "4", "x264-params": "tff=1"}
    clip = write_clip(tmp_path / "a.mp4", grey_frames(20, 64, 64), fps=10, options=options, context=context)
    with av.open(str(clip)) as container:
        assert next(container.decode(video=0)).interlaced_frame
    assert taken(clip, 20) == [2, 7, 12, 17]


def test_sound_and_a_late_start(tmp_path):
    """Times count from the first frame, and neither the sound before it nor the one after it is part of the clip."""
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=10, options=LOSSLESS)
        video.width = video.height = 32
        video.pix_fmt = "yuv420p"
        sound = container.add_stream("aac", rate=16000)
        tone = av.AudioFrame.from_ndarray(np.zeros((1, 5 * 16000), np.float32), format="fltp", layout="mono")
        tone.sample_rate, tone.pts, tone.time_base = 16000, 0, Fraction(1, 16000)
        container.mux(sound.encode(tone))
        for i, pixels in enumerate(grey_frames(20)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = i + 15, Fraction(1, 10)
            container.mux(video.encode(frame))
        container.mux(video.encode())
        container.mux(sound.encode())
    media = read(path)
    assert [index_of(image, 20) for image in media.frames] == [2, 7, 12, 17]
    assert media.timestamps == [0.2, 0.7, 1.2, 1.7]
    assert media.duration == pytest.approx(2.0)


def test_variable_frame_rate_goes_by_time_not_by_count(tmp_path):
    stamps = [
        0,
        100,
        200,
        300,
        400,
        4000,
        4900,
    ]  # a second of motion, then a still screen; the last one lasts as its gap
    clip = write_clip(tmp_path / "a.mkv", grey_frames(7), fps=10, options=LOSSLESS, stamps=stamps)
    assert taken(clip, 7, fps=1.0) == [4, 4, 4, 4, 5]


def test_choose_times_never_takes_more_than_the_clip_has():
    often, seldom = (Policy(fps=fps, max_frames=64, image_size=16, resize_mode="crop") for fps in (30.0, 2.0))
    assert choose_times([0.0, 1.0], 0.0, 2.0, often) == [0.0, 1.0]
    assert choose_times([0.0], 0.0, 0.0, seldom) == [0.0]
    assert choose_times([i / 2 for i in range(6)], 0.0, 3.0, seldom) == [0, 0.5, 1, 1.5, 2, 2.5]


@pytest.mark.parametrize(
    ("rotation", "size", "white"),
    [
        (-90, (32, 64), np.s_[:14]),  # to be turned clockwise: left becomes top
        (90, (32, 64), np.s_[18:]),
        (180, (64, 32), np.s_[:, 18:]),
        (0, (64, 32), np.s_[:, :14]),
    ],
)
def test_rotated_clips(tmp_path, rotation, size, white):
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:, :32] = 255  # the left half is white
    clip = write_clip(tmp_path / "a.mp4", [pixels] * 2, options=LOSSLESS, rotation=rotation)
    media = read(clip, image_size=32)
    upright = np.asarray(media.frames[0])
    assert (media.width, media.height) == size
    assert upright[white].mean() > 240
    assert upright[tuple(slice(None, None, -1) for _ in range(2))][white].mean() < 15


@pytest.mark.parametrize("rotation", [0, -90])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_pixels_that_are_not_square(tmp_path, name, rotation):
    """64 x 64 pixels shown as 128 x 64: the middle half is seen; with letterbox, bars above and below."""
    pixels = np.tile(np.arange(0, 256, 4, dtype=np.uint8)[None, :, None], (64, 1, 3))
    context = {"sample_aspect_ratio": Fraction(2, 1)}
    clip = write_clip(tmp_path / name, [pixels] * 2, options=LOSSLESS, rotation=rotation, context=context)
    turn = 1 if rotation else 0
    media = read(clip, image_size=64)
    shown = np.rot90(np.asarray(media.frames[0])[..., 0], turn).astype(int)
    assert (media.width, media.height) == ((64, 128) if rotation else (128, 64))
    assert shown[32, 1] == pytest.approx(4 * 16, abs=6)
    assert shown[32, -2] == pytest.approx(4 * 48, abs=6)
    boxed = np.rot90(np.asarray(read(clip, image_size=64, resize_mode="letterbox").frames[0])[..., 0], turn).astype(int)
    assert boxed[:16].max() == boxed[48:].max() == 0
    assert boxed[32, 62] == pytest.approx(4 * 62, abs=6)
    assert boxed[18, 32] == pytest.approx(4 * 32, abs=6)


def test_square_cuts_the_centre_and_keeps_the_shorter_side():
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 200
    assert np.asarray(square(Image.fromarray(pixels), 10, "crop"))[2:-2, 2:-2].min() > 190
    pixels[0] = 100
    assert np.asarray(square(Image.fromarray(pixels), 20, "crop"))[0, 10, 0] == 100


@pytest.mark.parametrize(("width", "height"), [(60, 20), (20, 60), (61, 20), (1000, 1), (30, 30)])
def test_letterbox_keeps_the_whole_picture(width, height):
    boxed = np.asarray(square(Image.fromarray(np.full((height, width, 3), 200, np.uint8)), 30, "letterbox"))
    assert boxed.shape == (30, 30, 3)
    rows, columns = boxed[..., 0].any(axis=1), boxed[..., 0].any(axis=0)
    inner = (max(1, round(30 * height / max(width, height))), max(1, round(30 * width / max(width, height))))
    assert (rows.sum(), columns.sum()) == inner
    assert (boxed[np.ix_(rows, columns)] == 200).all()
    assert abs(int(rows.argmax()) - int(rows[::-1].argmax())) <= 1


def test_square_is_one_resampling():
    """A picture that has the size already comes out as it was, whatever the fit."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8))
    assert square(noise, 24, "crop").tobytes() == square(noise, 24, "letterbox").tobytes() == noise.tobytes()


def test_exif_orientation_and_modes(tmp_path):
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    image = load_image(write_image(tmp_path / "a.jpg", pixels, exif=exif))
    assert image.size == (8, 16)
    assert np.asarray(image)[:7].mean() > 240
    assert load_image(write_image(tmp_path / "a.png", pixels[..., 0])).mode == "RGB"


def packed(tmp_path, files):
    """(a container with foreign bytes between the files, their parts)."""
    path, parts = tmp_path / "pack,:.tar", []
    with open(path, "wb") as container:
        for file in files:
            container.write(b"x" * 700)
            parts.append((container.tell(), file.stat().st_size))
            container.write(file.read_bytes())
        container.write(b"x" * 300)
    return path, parts


def stills(tmp_path, num_frames, sizes=((32, 32),)):
    frames = [np.full((*sizes[i % len(sizes)], 3), 20 + 200 * i // num_frames, np.uint8) for i in range(num_frames)]
    return [write_image(tmp_path / f"pictures/{i:02d}.png", pixels) for i, pixels in enumerate(frames)]


def test_several_pictures_of_one_still(tmp_path):
    path, parts = packed(tmp_path, stills(tmp_path, 5, sizes=((32, 64), (32, 32))))
    media = read(path, "image", max_frames=5, parts=parts)
    assert [index_of(image, 5) for image in media.frames] == [0, 1, 2, 3, 4]
    assert (media.timestamps, media.duration, media.width, media.height) == ([0.0] * 5, 0.0, 64, 32)
    with pytest.raises(MediaError, match=r"^5 pictures, at most 4 are taken$"):
        read(path, "image", max_frames=4, parts=parts)
    assert read(path, "image", parts=parts[3:4]).frames[0].tobytes() == media.frames[3].tobytes()


def test_video_given_as_pictures(tmp_path):
    path, parts = packed(tmp_path, stills(tmp_path, 20))
    for place in ({"path": path, "parts": parts}, {"path": tmp_path / "pictures"}):
        media = read(**place, picture_fps=10.0)
        assert [index_of(image, 20) for image in media.frames] == [2, 7, 12, 17]
        assert (media.timestamps, media.duration) == ([0.2, 0.7, 1.2, 1.7], 2.0)
        assert taken(**place, num_frames=20, picture_fps=10.0, max_frames=2) == [5, 15]
        assert taken(**place, num_frames=20, picture_fps=10.0, segment=(1.0, 2.0)) == [12, 17]
        assert taken(**place, num_frames=20, max_frames=20) == list(range(20))  # taken at `fps` before
        assert read(**place).duration == 10.0
    assert len(read(path, parts=parts[:1]).frames) == len(read(path, parts=parts[:1], picture_fps=9.0).frames) == 1


def test_a_clip_equals_the_same_frames_as_pictures(tmp_path):
    clip = write_clip(tmp_path / "a.mkv", grey_frames(50), fps=10, options=LOSSLESS)
    stills(tmp_path, 50)
    for options in ({}, {"max_frames": 3}, {"segment": (1.3, 3.9)}, {"fps": 7.0, "max_frames": 64}):
        one, other = read(clip, **options), read(tmp_path / "pictures", picture_fps=10.0, **options)
        assert one.timestamps == other.timestamps
        assert one.duration == pytest.approx(other.duration)
        assert [index_of(i, 50) for i in one.frames] == [index_of(i, 50) for i in other.frames]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.ts"])
def test_video_file_inside_a_container(tmp_path, name):
    codec = {"codec": "mpeg4", "options": {"qscale": "2"}} if name == "a.avi" else {"options": LOSSLESS}
    clip = write_clip(tmp_path / name, grey_frames(20, 64, 64), fps=10, **codec)
    path, parts = packed(tmp_path, [clip, clip])
    expected = read(clip)
    assert [index_of(image, 20) for image in expected.frames] == [2, 7, 12, 17]
    for part in parts:
        media = read(path, parts=[part])
        assert [image.tobytes() for image in media.frames] == [image.tobytes() for image in expected.frames]
        assert (media.timestamps, media.duration) == (expected.timestamps, expected.duration)
    offset, size = parts[0]
    if name == "a.mp4":
        with pytest.raises(MediaError, match=r"^truncated or damaged video$"):
            read(path, parts=[(offset, size // 2)])


def test_parts_and_folders_that_are_wrong(tmp_path):
    path, parts = packed(tmp_path, stills(tmp_path, 3))
    size = path.stat().st_size
    for kind in ("image", "video"):
        for wrong in ((size - 10, 11), (size + 5, 1), (0, 2**62)):
            assert reason(path, kind, parts=(*parts, wrong)) == "a part lies beyond the end of its file"
        assert reason(path, kind, parts=((5, 0),)) == "empty file"
        assert reason(path, kind, parts=((0, 700), *parts)) == "not an image file"
    assert reason(path, parts=((0, 700),)) == "not a video file"
    for rate in (0.0, -1.0, float("nan"), float("inf")):
        assert reason(tmp_path / "pictures", picture_fps=rate) == f"unsupported frame rate {rate:g}"
    assert reason(tmp_path / "pictures", picture_fps=1e-300).startswith("unsupported duration")
    (tmp_path / "pictures/.hidden").write_text("x")
    assert len(read(tmp_path / "pictures").frames) == 3
    (tmp_path / "pictures/a.txt").write_text("x")
    assert reason(tmp_path / "pictures") == "a folder with other files than pictures"
    (tmp_path / "empty").mkdir()
    assert reason(tmp_path / "empty", "image") == "a folder without pictures"


def test_segment_of_a_clip(tmp_path):
    """The policy applies to the piece: its frames, uniform from its start to its end, times on the clip's clock."""
    clip = write_clip(tmp_path / "a.mp4", grey_frames(50), fps=10, options=LOSSLESS)
    assert taken(clip, 50, segment=(2.0, 4.0)) == [22, 27, 32, 37]
    media = read(clip, segment=(2.0, 4.0), max_frames=1)
    assert (media.timestamps, media.duration) == ([3.0], 2.0)
    assert taken(clip, 50, segment=(0.0, 5.0)) == taken(clip, 50)
    assert taken(clip, 50, segment=(3.0, 99.0)) == [32, 37, 42, 47]  # ends with the clip
    assert read(clip, segment=(3.0, 99.0)).duration == 2.0
    assert taken(clip, 50, fps=30.0, max_frames=64, segment=(1.0, 1.5)) == [10, 11, 12, 13, 14]  # all that it has
    assert taken(clip, 50, segment=(1.01, 1.02)) == [10]
    with pytest.raises(MediaError, match=r"^the segment begins at 5 s of 5 s$"):
        read(clip, segment=(5.0, 6.0))
    with pytest.raises(MediaError, match=r"^unsupported segment from 2 to nan s$"):
        read(clip, segment=(2.0, float("nan")))


def test_segment_of_a_variable_frame_rate(tmp_path):
    stamps = [0, 100, 200, 300, 400, 4000, 4900]
    clip = write_clip(tmp_path / "a.mkv", grey_frames(7), fps=10, options=LOSSLESS, stamps=stamps)
    assert taken(clip, 7, fps=2.0, segment=(3.0, 4.9)) == [4, 5]  # two frames are on screen in it
    assert taken(clip, 7, fps=10.0, segment=(0.15, 0.45)) == [2, 3, 4]
    assert read(clip, segment=(3.0, 4.9)).timestamps == [0.4, 4.0]


@pytest.fixture
def clip(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (20, 32, 32, 3), np.uint8)
    return write_clip(tmp_path / "clip.mp4", list(noise), fps=10)


def reason(path, kind="video", **options):
    with pytest.raises(MediaError) as caught:
        read(path, kind, **options)
    return caught.value.reason


def test_damaged_videos(tmp_path, clip, capfd):
    content = clip.read_bytes()
    bad = tmp_path / "bad.mp4"
    assert reason(tmp_path / "none.mp4") == "missing file"
    bad.write_bytes(b"")
    assert reason(bad) == "empty file"
    bad.write_text("This is not a video.\n" * 50)
    assert reason(bad) == "not a video file"
    bad.write_text(f"#EXTM3U\n#EXTINF:1,\n{clip}\n#EXT-X-ENDLIST\n")
    assert reason(bad) == "not a video file"  # a playlist never opens another file
    bad.write_bytes(content[: len(content) // 2])  # the index is at the end: gone
    assert reason(bad) == "truncated or damaged video"
    assert capfd.readouterr() == ("", "")


def test_video_truncated_behind_its_index(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (20, 32, 32, 3), np.uint8)
    first = write_clip(tmp_path / "a.mp4", list(noise), fps=10)
    fast = tmp_path / "fast.mp4"
    with av.open(str(first)) as source, av.open(str(fast), "w", options={"movflags": "faststart"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    assert len(read(fast).frames) == 4
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(fast.read_bytes()[: fast.stat().st_size * 3 // 4])
    assert reason(bad) == "truncated video"


def test_matroska_truncated(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (60, 32, 32, 3), np.uint8)
    clip = write_clip(tmp_path / "a.mkv", list(noise), fps=10)
    bad = tmp_path / "bad.mkv"
    bad.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    assert reason(bad) == "truncated video"


def test_a_hole_in_the_stream_is_not_papered_over(tmp_path, clip):
    content = bytearray(clip.read_bytes())
    start = content.index(b"mdat") + 1000
    end = content.index(b"moov") - 1000
    content[start:end] = bytes(end - start)
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(content)
    assert reason(bad).startswith(("undecodable", "no frame"))


def test_sound_only_and_oversized(tmp_path, clip, monkeypatch):
    sound = tmp_path / "sound.mp4"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert reason(sound) == "no video stream"
    monkeypatch.setattr("model.video.MAX_VIDEO_PIXELS", 31 * 32)
    monkeypatch.setattr("model.pictures.MAX_PIXELS", 31 * 32)
    assert reason(clip) == "unsupported size 32x32, at most 992 px"
    image = write_image(tmp_path / "a.png", np.zeros((32, 32, 3), np.uint8))
    assert reason(image, "image") == "unsupported size 32x32, at most 992 px"


def test_damaged_images(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    good = write_image(tmp_path / "a.jpg", noise)
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"")
    assert reason(bad, "image") == "empty file"
    bad.write_bytes(good.read_bytes()[:-800])
    assert reason(bad, "image") == "truncated or damaged image"
    bad.write_text("no picture")
    assert reason(bad, "image") == "not an image file"
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "float.tif")
    assert reason(tmp_path / "float.tif", "image") == "unsupported pixel mode F"


def test_packing_imports_neither_torch_nor_the_network():
    unwanted = {"torch", "transformers", "model.registration"}
    code = f"import sys, pipeline_steps.shards.pack; print({unwanted} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
