"""Which frames are taken, how they are cut, and what is refused."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from pipeline_steps.frames import MediaError, Policy, choose_times, read_media
from pipeline_steps.params import ROOT
from pipeline_steps.pictures import load_image, square
from tests.pipeline_steps.clips import grey_frames, index_of, write_clip, write_image

LOSSLESS = {"crf": "4", "preset": "ultrafast"}


def read(path, kind="video", fps=2.0, max_frames=16, image_size=16, fit="crop", **options):
    return read_media(path, kind, fps=fps, max_frames=max_frames, image_size=image_size, fit=fit, **options)


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


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "libx264", {"bf": "3", "crf": "4"}),
        ("a.mkv", "libx264", {"bf": "3", "crf": "4"}),
        ("a.mp4", "libx265", {"x265-params": "log-level=none:pools=1:crf=4"}),
        ("a.mkv", "libsvtav1", {"crf": "10", "preset": "12", "svtav1-params": "lp=1"}),
        ("a.avi", "mpeg4", {"qscale": "2"}),
        ("a.webm", "libvpx", {"crf": "4", "b:v": "1M", "auto-alt-ref": "1"}),
        ("a.ts", "libx264", {"crf": "4"}),
    ],
)
def test_codecs_and_containers(tmp_path, name, codec, options):
    clip = write_clip(tmp_path / name, grey_frames(20, 64, 64), fps=10, codec=codec, options=options)
    assert taken(clip, 20, fps=2.0) == [2, 7, 12, 17]


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
    often, seldom = (Policy(fps=fps, max_frames=64, image_size=16, fit="crop") for fps in (30.0, 2.0))
    assert choose_times([0.0, 1.0], 0.0, 2.0, often) == [0.0, 1.0]
    assert choose_times([0.0], 0.0, 0.0, seldom) == [0.0]
    assert choose_times([i / 2 for i in range(6)], 0.0, 3.0, seldom) == [0, 0.5, 1, 1.5, 2, 2.5]


def test_rotated_and_anamorphic_clips(tmp_path):
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:, :32] = 255  # the left half is white
    clip = write_clip(tmp_path / "a.mp4", [pixels] * 2, options=LOSSLESS, rotation=-90)  # to be turned clockwise
    media = read(clip, image_size=32)
    upright = np.asarray(media.frames[0])
    assert (media.width, media.height) == (32, 64)
    assert upright[:10].mean() > 240
    assert upright[-10:].mean() < 15
    wide = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8)[None, :, None], (64, 1, 3)))
    assert (
        np.asarray(square(wide, 64, "crop", pixel_aspect=2.0))[0, 0, 0] == 16
    )  # 64x64 pixels shown as 2:1: the middle half
    assert np.asarray(square(wide, 64, "crop"))[0, 0, 0] == 0


def test_square_cuts_the_centre_and_keeps_the_shorter_side():
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 200
    assert np.asarray(square(Image.fromarray(pixels), 10, "crop"))[2:-2, 2:-2].min() > 190
    pixels[0] = 100
    assert np.asarray(square(Image.fromarray(pixels), 20, "crop"))[0, 10, 0] == 100


def test_exif_orientation_and_modes(tmp_path):
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    image = load_image(write_image(tmp_path / "a.jpg", pixels, exif=exif))
    assert image.size == (8, 16)
    assert np.asarray(image)[:7].mean() > 240
    assert load_image(write_image(tmp_path / "a.png", pixels[..., 0])).mode == "RGB"


@pytest.fixture
def clip(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (20, 32, 32, 3), np.uint8)
    return write_clip(tmp_path / "clip.mp4", list(noise), fps=10)


def reason(path, kind="video"):
    with pytest.raises(MediaError) as caught:
        read(path, kind)
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
    import av

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
    import av

    sound = tmp_path / "sound.mp4"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert reason(sound) == "no video stream"
    monkeypatch.setattr("pipeline_steps.frames.MAX_VIDEO_PIXELS", 31 * 32)
    monkeypatch.setattr("pipeline_steps.pictures.MAX_PIXELS", 31 * 32)
    assert reason(clip) == "unsupported size 32x32"
    image = write_image(tmp_path / "a.png", np.zeros((32, 32, 3), np.uint8))
    assert reason(image, "image") == "unsupported size 32x32"


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
    deep = Image.fromarray(np.full((8, 8), 40000, np.uint16))
    deep.save(tmp_path / "deep.png")
    assert reason(tmp_path / "deep.png", "image") == "unsupported pixel mode I;16"


def test_packing_imports_neither_torch_nor_the_network():
    code = "import sys, pipeline_steps.shards.pack; print({'torch', 'transformers', 'model'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
