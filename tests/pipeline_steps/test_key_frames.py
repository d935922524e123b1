"""Decoding from the key frame before a wanted frame gives the very frames of decoding everything."""

import dataclasses

import numpy as np
import pytest

from model import frames, video
from model.frames import MediaError, read_media
from tests.pipeline_steps.clips import write_clip

NUM_FRAMES, FPS = 90, 10
X265 = "log-level=none:pools=1:keyint=12:min-keyint=12:scenecut=0:bframes=3"
AV1 = {"crf": "30", "preset": "12", "svtav1-params": "lp=1:keyint=12"}
VP9 = {"b:v": "200k", "cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "10"}
CLIPS = {
    "h264 with B-frames": ("a.mp4", "libx264", {"bf": "3", "preset": "fast"}),
    "h264, open groups": ("a.mp4", "libx264", {"bf": "3", "x264-params": "open-gop=1:scenecut=0:keyint=12"}),
    "h264, open groups, mkv": ("a.mkv", "libx264", {"bf": "3", "x264-params": "open-gop=1:scenecut=0:keyint=12"}),
    "h264, ts": ("a.ts", "libx264", {"bf": "3"}),
    "hevc, open groups": ("a.mp4", "libx265", {"x265-params": X265 + ":open-gop=1"}),
    "hevc, mkv": ("a.mkv", "libx265", {"x265-params": X265 + ":open-gop=0"}),
    "av1": ("a.mp4", "libsvtav1", AV1),
    "vp9": ("a.webm", "libvpx-vp9", VP9),
    "vp8": ("a.webm", "libvpx", {"b:v": "200k", "auto-alt-ref": "1", "lag-in-frames": "10"}),
    "mpeg-4": ("a.avi", "mpeg4", {"qscale": "8", "sc_threshold": "1000000000"}),
    "mpeg-4 with B-frames": ("a.mkv", "mpeg4", {"qscale": "8", "bf": "2", "sc_threshold": "1000000000"}),
    "motion jpeg": ("a.avi", "mjpeg", {"qscale": "8"}),
    "prores": ("a.mov", "prores_ks", {}),
    "mpeg-2": ("a.mpg", "mpeg2video", {"qscale": "8", "bf": "2", "sc_threshold": "1000000000"}),
}


def moving(num_frames, size=64):
    """Smooth texture that moves, with some noise: no frame is like another, and every one predicts the next."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size]
    for i in range(num_frames):
        wave = 128 + 60 * np.sin((x + 3 * i) / 5) + 40 * np.cos((y - 2 * i) / 7)
        yield np.clip(wave[..., None] + rng.normal(0, 6, (size, size, 3)), 0, 255).astype(np.uint8)


def write(tmp_path, name, codec, options, **more):
    fps = 25 if name.endswith("mpg") else FPS
    return write_clip(tmp_path / name, list(moving(NUM_FRAMES)), fps=fps, codec=codec, options=options, **more)


class Decoder:
    """Reads clips either way, and counts the frames that come out of the decoder."""

    def __init__(self, monkeypatch):
        self.patch, self.num_decoded, self.num_given_up = monkeypatch, 0, 0
        decode, read_index, from_keys = video._decode, frames.read_index, video._frames_from_keys
        self.keys = True

        def counted(*arguments):
            for found in decode(*arguments):
                self.num_decoded += 1
                yield found

        def watched(*arguments):
            try:
                yield from from_keys(*arguments)
            except video.Unreliable:
                self.num_given_up += 1
                raise

        def index(piece):
            found = read_index(piece)
            return found if self.keys else dataclasses.replace(found, keys=[])

        monkeypatch.setattr(video, "_decode", counted)
        monkeypatch.setattr(video, "_frames_from_keys", watched)
        monkeypatch.setattr(frames, "read_index", index)

    def __call__(self, path, keys, **options):
        """(what is read, frames that were decoded for it, whether the key frames were given up)."""
        self.keys, self.num_decoded, self.num_given_up = keys, 0, 0
        policy = {"fps": 2.0, "max_frames": 64, "image_size": 64, "resize_mode": "crop"} | options
        media = read_media(path, "video", **policy)
        return media, self.num_decoded, self.num_given_up > 0


@pytest.fixture
def decoder(monkeypatch):
    return Decoder(monkeypatch)


def assert_same(one, other):
    assert [image.tobytes() for image in one.frames] == [image.tobytes() for image in other.frames]
    assert dataclasses.replace(one, frames=[]) == dataclasses.replace(other, frames=[])


@pytest.mark.parametrize("name", CLIPS)
def test_the_same_frames(tmp_path, decoder, name):
    pix_fmt = {"motion jpeg": "yuvj420p", "prores": "yuv422p10le"}.get(name, "yuv420p")
    clip = write(tmp_path, *CLIPS[name], pix_fmt=pix_fmt)
    for options in (
        {"max_frames": 1},
        {"max_frames": 2},
        {"max_frames": 3},
        {"max_frames": 5},
        {"fps": 3.0},
        {"fps": 99.0, "max_frames": 99},  # every frame
        {"segment": (1.25, 1.75)},
        {"segment": (2.55, 3.45), "fps": 10.0},
    ):
        found, num_decoded, given_up = decoder(clip, keys=True, **options)
        expected, num_all, _ = decoder(clip, keys=False, **options)
        assert_same(found, expected)
        assert not given_up, options
        assert num_decoded <= num_all, options
        if options == {"max_frames": 1}:
            assert num_decoded < num_all / 2


def test_every_single_frame_by_its_segment(tmp_path, decoder):
    """Each frame alone, so that decoding begins at every key frame and ends at every place after it."""
    for name in ("h264, open groups", "hevc, open groups", "mpeg-4 with B-frames"):
        clip = write(tmp_path, *CLIPS[name])
        every, _, _ = decoder(clip, keys=False, fps=99.0, max_frames=NUM_FRAMES)
        for number in range(0, NUM_FRAMES, 5):
            middle = every.timestamps[number] + 0.5 / FPS
            found, num_decoded, given_up = decoder(clip, keys=True, segment=(middle - 0.01, middle + 0.01))
            assert found.frames[0].tobytes() == every.frames[number].tobytes(), (name, number)
            assert num_decoded <= 24 + 5
            assert not given_up


def test_clip_with_one_key_frame_is_decoded_from_its_start(tmp_path, decoder):
    clip = write(tmp_path, "a.mp4", "libx264", {"bf": "3"}, gop=NUM_FRAMES)
    found, num_decoded, _ = decoder(clip, keys=True, max_frames=2)
    expected, num_all, _ = decoder(clip, keys=False, max_frames=2)
    assert_same(found, expected)
    assert num_decoded == num_all


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "libx264", {"x264-params": "intra-refresh=1:keyint=12:bframes=0"}),  # no whole picture to begin at
        ("a.avi", "mpeg4", {"qscale": "8", "bf": "2", "sc_threshold": "1000000000"}),  # no times of display
        ("a.mkv", "libsvtav1", AV1 | {"svtav1-params": "lp=1:keyint=12:irefresh-type=1"}),  # forward key frames
        ("a.gif", "gif", {}),  # every frame changes the one before
    ],
)
def test_no_reliable_key_frames(tmp_path, decoder, name, codec, options):
    clip = write(tmp_path, name, codec, options, pix_fmt="rgb8" if codec == "gif" else "yuv420p")
    found, _, _ = decoder(clip, keys=True, max_frames=3)
    expected, _, _ = decoder(clip, keys=False, max_frames=3)
    assert_same(found, expected)


def test_uneven_times(tmp_path, decoder):
    stamps = np.cumsum(np.random.default_rng(1).integers(20, 900, NUM_FRAMES)).tolist()
    clip = write(tmp_path, "a.mkv", "libx264", {"bf": "3"}, stamps=stamps)
    for options in ({"max_frames": 3}, {"max_frames": 40}, {"segment": (7.0, 20.0)}):
        found, num_decoded, given_up = decoder(clip, keys=True, **options)
        expected, num_all, _ = decoder(clip, keys=False, **options)
        assert_same(found, expected)
        assert num_decoded < num_all or options == {"max_frames": 40}
        assert not given_up


def test_damaged_key_frames_are_given_up(tmp_path, decoder):
    """What follows is decoded from the start; an outcome is either whole or an error, and the same every time."""
    content = write(tmp_path, *CLIPS["h264 with B-frames"]).read_bytes()
    rng = np.random.default_rng(2)
    bad, outcomes = tmp_path / "bad.mp4", set()
    for _ in range(30):
        damaged = bytearray(content)
        for place in rng.integers(100, len(content) - 300, rng.integers(1, 4)):
            damaged[place : place + 200] = rng.bytes(200)
        bad.write_bytes(damaged)
        results = []
        for _ in range(2):
            try:
                media, _, _ = decoder(bad, keys=True, max_frames=3)
                results.append(([image.tobytes() for image in media.frames], media.timestamps))
            except MediaError as error:
                results.append(error.reason)
        assert results[0] == results[1]
        outcomes.add("error" if isinstance(results[0], str) else decoder.num_given_up > 0)
    assert outcomes == {"error", True, False}
