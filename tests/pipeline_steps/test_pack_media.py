"""Packing samples whose media are parts of a container, folders of pictures, or pieces of a video."""

import io
import tarfile

import pytest
from PIL import Image

from pipeline_steps.common.errors import UserError
from pipeline_steps.common.hashing import media_sha256
from pipeline_steps.common.schemas import FramePolicy, PackedSample, RawSample
from pipeline_steps.shards.pack import Settings, pack_shard
from tests.pipeline_steps.clips import grey_frames, index_of, write_clip, write_image

FRAMES = FramePolicy(image_size=16, resize_mode="crop", fps=2.0, max_frames=4, jpeg_quality=95)
ITEM = {"user": "What?", "assistant": "grey", "task": "caption"}


@pytest.fixture
def raw(tmp_path):
    """20 pictures in a folder, and a tar with the same pictures and a clip of 50 frames at 10 per second."""
    for i, pixels in enumerate(grey_frames(20)):
        write_image(tmp_path / f"raw/pictures/{i:02d}.png", pixels)
    write_clip(tmp_path / "clip.mp4", grey_frames(50), fps=10, options={"crf": "4", "preset": "ultrafast"})
    with tarfile.open(tmp_path / "raw/media.tar", "w") as tar:
        tar.add(tmp_path / "raw/pictures", "pictures")
        tar.add(tmp_path / "clip.mp4", "clip.mp4")
    return tmp_path / "raw"


def sample(raw, key, path, kind, parts=(), **more):
    sha256 = media_sha256(raw / path, parts)
    return RawSample(
        key=key, source="test", split="train", video_id=key, path=path, parts=parts, kind=kind, sha256=sha256,
        items=[ITEM], **more,
    )  # fmt: skip


def parts_of(raw, *names):
    with tarfile.open(raw / "media.tar") as tar:
        return tuple((tar.getmember(name).offset_data, tar.getmember(name).size) for name in names)


def pack(raw, *samples):
    """(ShardReport, {member's name: its bytes})."""
    report = pack_shard(samples, Settings(raw_dir=str(raw), frames=FRAMES), raw / "packed/000000")
    with tarfile.open(raw / "packed/000000.tar") as tar:
        return report, {member.name: tar.extractfile(member).read() for member in tar}


def packed(members, key, num_frames):
    """(PackedSample, the indexes of its pictures, the names of their members)."""
    names = [name for name in members if name.startswith(f"{key}.") and name.endswith(".jpg")]
    shown = [index_of(Image.open(io.BytesIO(members[name])), num_frames) for name in names]
    return PackedSample.model_validate_json(members[f"{key}.json"]), shown, names


def test_every_kind_of_media_is_packed(raw):
    pictures = parts_of(raw, *(f"pictures/{i:02d}.png" for i in range(20)))
    clip = parts_of(raw, "clip.mp4")
    _, members = pack(
        raw,
        sample(raw, "chat", "media.tar", "image", pictures[5:8]),
        sample(raw, "one", "media.tar", "image", pictures[5:6]),
        sample(raw, "folder", "pictures", "video", picture_fps=10.0),
        sample(raw, "frames", "media.tar", "video", pictures, picture_fps=10.0),
        sample(raw, "clip", "media.tar", "video", clip),
        sample(raw, "piece", "media.tar", "video", clip, segment=(2.0, 4.0)),
    )
    found, shown, names = packed(members, "chat", 20)
    assert (shown, names) == ([5, 6, 7], ["chat.000.jpg", "chat.001.jpg", "chat.002.jpg"])
    assert (found.frame_count, found.duration, found.timestamps) == (3, 0.0, (0.0, 0.0, 0.0))
    assert packed(members, "one", 20)[1:] == ([5], ["one.jpg"])
    for key in ("folder", "frames"):
        found, shown, _ = packed(members, key, 20)
        assert (shown, found.timestamps, found.duration) == ([2, 7, 12, 17], (0.2, 0.7, 1.2, 1.7), 2.0)
    found, shown, _ = packed(members, "clip", 50)
    assert (shown, found.duration) == ([6, 18, 31, 43], 5.0)
    found, shown, _ = packed(members, "piece", 50)
    assert (shown, found.timestamps, found.duration) == ([22, 27, 32, 37], (2.2, 2.7, 3.2, 3.7), 2.0)


def test_unreadable_media_are_quarantined_with_both_numbers(raw):
    pictures = parts_of(raw, *(f"pictures/{i:02d}.png" for i in range(5)))
    late = sample(raw, "late", "media.tar", "video", parts_of(raw, "clip.mp4"), segment=(7.0, 9.0))
    report, _ = pack(raw, sample(raw, "many", "media.tar", "image", pictures), late)
    assert {entry.key: entry.reason for entry in report.quarantined} == {
        "many": "5 pictures, at most 4 are taken",
        "late": "the segment begins at 7 s of 5 s",
    }
    assert report.shard.num_samples == 0


@pytest.mark.parametrize("name", ["media.tar", "pictures/03.png"])
def test_media_changed_after_indexing_are_named(raw, name):
    path = "media.tar" if name == "media.tar" else "pictures"
    parts = parts_of(raw, "pictures/03.png") if path == "media.tar" else ()
    old = sample(raw, "old", path, "video", parts)
    content = bytearray((raw / name).read_bytes())
    content[(parts or ((0, 0),))[0][0] + 20] ^= 1
    (raw / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{path} \(sample 'old'\) changed after the index was written"):
        pack(raw, old)
