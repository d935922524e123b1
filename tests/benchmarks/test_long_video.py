"""The benchmark of long videos, on a short one."""

import pytest

from benchmarks import long_video
from model import video
from pipeline_steps.common.errors import UserError


def test_both_methods_are_timed_and_their_frames_compared(tmp_path, monkeypatch):
    long_video.write_clip(tmp_path / "a.mp4", 9.0, 32, "libx264")
    found = long_video.measure(tmp_path / "a.mp4", 2, repeats=1)
    assert found.keys() == {"keys", "everything"}
    assert min(found.values()) > 0
    square, taken = video.square, []

    def changing(image, *arguments):
        taken.append(image)
        return square(image.point(lambda value: value + len(taken)), *arguments)

    monkeypatch.setattr(video, "square", changing)
    with pytest.raises(UserError, match="different frames"):
        long_video.measure(tmp_path / "a.mp4", 2, repeats=1)
