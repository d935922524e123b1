"""Near-duplicates across splits: which copies are found, that other clips are not, and that none is missed."""

import json

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter

from model.frames import read_media
from pipeline_steps.common.errors import UserError
from pipeline_steps.shards import leaks
from pipeline_steps.shards.__main__ import build
from pipeline_steps.shards.hashes import NUM_FRAMES, WORDS, hash_frames
from pipeline_steps.shards.index import read_index
from pipeline_steps.shards.leaks import MAX_DISTANCE, Leak, check, near_duplicates
from pipeline_steps.shards.schema import Section
from tests.pipeline_steps.clips import index_row, text_row, write_clip, write_index

SIZE, DISTANCE = 56, 24
SECTION = Section(
    image_size=SIZE,
    resize_mode="crop",
    hdr="refuse",
    fps=2.0,
    max_frames=8,
    jpeg_quality=95,
    samples_per_shard=50,
    validation_share=0.1,
    test_share=0.1,
    max_quarantined=0.5,
    max_hash_distance=DISTANCE,
    seed=1,
)


def scene(seed, num_frames=8, width=160, height=112):
    """Frames of blurred coloured noise that moves: nothing in common between two seeds but the statistics."""
    noise = np.random.default_rng(seed).integers(0, 256, (14, 40, 3), np.uint8)
    picture = Image.fromarray(noise).resize((width * 2, height), Image.Resampling.BICUBIC)
    grained = picture.filter(ImageFilter.GaussianBlur(2))
    return [grained.crop((6 * i, 0, 6 * i + width, height)) for i in range(num_frames)]


def write(path, frames, **options):
    return write_clip(path, [np.asarray(frame) for frame in frames], **options)


def hashes_of(path, kind="video"):
    media = read_media(path, kind, fps=2.0, max_frames=8, image_size=SIZE, resize_mode="crop")
    return hash_frames(media.frames)


def resized(frames, factor):
    return [frame.resize((int(frame.width * factor), int(frame.height * factor))) for frame in frames]


def bars(frames):
    """Black bars at the left and right."""
    wide = [Image.new("RGB", (frame.width + 64, frame.height)) for frame in frames]
    for canvas, frame in zip(wide, frames, strict=True):
        canvas.paste(frame, (32, 0))
    return wide


def boxed(frames):
    """Black bars above and below, inside the square that is cut out."""
    tall = [Image.new("RGB", (frame.width, frame.height + 48)) for frame in frames]
    for canvas, frame in zip(tall, frames, strict=True):
        canvas.paste(frame, (0, 24))
    return tall


def bright(frames, factor):
    return [ImageEnhance.Brightness(frame).enhance(factor) for frame in frames]


COPIES = {
    "quality": (lambda frames: frames, {"options": {"crf": "35"}}, "mp4"),
    "size": (lambda frames: resized(frames, 0.5), {}, "mp4"),
    "codec": (lambda frames: frames, {"codec": "mpeg4"}, "avi"),
    "brighter": (lambda frames: bright(frames, 1.1), {}, "mp4"),
    "darker": (lambda frames: bright(frames, 0.8), {}, "mp4"),
    "bars outside the square": (bars, {}, "mp4"),
    "twice the frame rate": (lambda frames: [f for f in frames for _ in range(2)], {"fps": 4}, "mp4"),
}
NOT_FOUND = {
    "bars within the square": boxed,
    "mirrored": lambda frames: [frame.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for frame in frames],
    "half of the picture": lambda frames: [frame.crop((0, 0, frame.width // 2, frame.height // 2)) for frame in frames],
}


@pytest.fixture(scope="module")
def others():
    """Hashes of 40 clips of other scenes."""
    return np.stack([hash_frames(resized([f.crop((24, 0, 136, 112)) for f in scene(s)], 0.5)) for s in range(100, 140)])


@pytest.mark.parametrize("copy", COPIES)
def test_reencoded_copies_are_found(tmp_path, others, copy):
    change, options, ending = COPIES[copy]
    original = write(tmp_path / "a.mp4", scene(1))
    again = write(tmp_path / f"b.{ending}", change(scene(1)), **options)
    references = np.concatenate([others, hashes_of(original)[None]])
    nearest, distances = near_duplicates(hashes_of(again)[None], references, DISTANCE)
    assert nearest.tolist() == [len(others)]
    assert distances[0] <= NUM_FRAMES * DISTANCE


@pytest.mark.parametrize("copy", NOT_FOUND)
def test_copies_beyond_the_perceptual_hash_are_not_found(tmp_path, copy):
    """Documented limits: docs/data.md."""
    original = write(tmp_path / "a.mp4", scene(1))
    again = write(tmp_path / "b.mp4", NOT_FOUND[copy](scene(1)))
    assert near_duplicates(hashes_of(again)[None], hashes_of(original)[None], DISTANCE)[0].tolist() == [-1]


def test_different_clips_are_not_reported(others):
    assert (near_duplicates(others[:20], others[20:], MAX_DISTANCE)[0] == -1).all()


def test_frames_without_contrast_are_ignored(others):
    black = hash_frames([Image.new("RGB", (SIZE, SIZE), (9, 9, 9))] * 3)
    assert not black.any()
    assert near_duplicates(black[None], black[None], DISTANCE)[0].tolist() == [-1]
    one, other = others[0].copy(), others[1].copy()
    one[:3] = other[:3] = 0  # three black frames each, and the fourth is another one
    assert near_duplicates(one[None], other[None], DISTANCE)[0].tolist() == [-1]
    other[3] = one[3]
    assert near_duplicates(one[None], other[None], DISTANCE)[0].tolist() == [0]


def flip(hashes, num_bits, rng):
    """A copy in which num_bits of every frame are others."""
    bits = np.unpackbits(hashes.view(np.uint8), axis=1)
    for frame in bits:
        frame[rng.choice(len(frame), num_bits, replace=False)] ^= 1
    return np.packbits(bits, axis=1).view(np.uint64)


@pytest.mark.parametrize("distance", [0, 7, 15, 16, 24, MAX_DISTANCE])
def test_search_equals_brute_force_comparison(distance):
    rng = np.random.default_rng(distance)
    references = rng.integers(0, 2**64, (400, NUM_FRAMES, WORDS), dtype=np.uint64)
    copies = [flip(references[i], min(i % (distance + 3), 256), rng) for i in range(200)]
    queries = np.concatenate([copies, rng.integers(0, 2**64, (50, NUM_FRAMES, WORDS), dtype=np.uint64)])
    queries[::7, 1] = rng.integers(0, 2**64, (36, WORDS), dtype=np.uint64)  # one of four frames is another one
    queries[::11, 2:] = 0
    bits = np.bitwise_count(queries[:, None] ^ references[None]).sum(-1, dtype=int)
    known = queries.any(-1)[:, None] & references.any(-1)[None]
    same = ((bits <= distance) & known).sum(-1) * 2 > known.sum(-1)
    totals = np.where(same, bits.sum(-1), 10**6)
    expected = np.where(same.any(1), totals.argmin(1), -1)
    nearest, distances = near_duplicates(queries, references, distance)
    assert nearest.tolist() == expected.tolist()
    assert (expected >= 0).sum() > 50
    assert distances[expected >= 0].tolist() == totals.min(1)[expected >= 0].tolist()
    with pytest.raises(ValueError, match="max_distance is 32, expected at most 31"):
        near_duplicates(queries, references, MAX_DISTANCE + 1)


def test_max_hash_distance_is_limited_to_what_the_search_supports():
    with pytest.raises(ValueError, match="less than or equal to 31"):
        Section(**{**SECTION.model_dump(), "max_hash_distance": MAX_DISTANCE + 1})
    assert Section(**{**SECTION.model_dump(), "max_hash_distance": MAX_DISTANCE}).max_hash_distance == 31


def test_all_leaks_are_written_to_a_file(tmp_path):
    found = [Leak(("test", f"a{i}"), ("train", f"b{i}"), "near-duplicate frames") for i in range(30)]
    write_index(tmp_path, [text_row(key, "q", key) for leak in found for _, key in (leak.held_out, leak.other)])
    index = read_index(tmp_path / "index.jsonl", 1)
    with pytest.raises(UserError, match="30 held-out samples") as error:
        check(found, index, tmp_path / "leaks.jsonl")
    assert str(error.value).count("near-duplicate frames") == leaks.MAX_LISTED
    assert "... and 10 more" in str(error.value)
    assert f"Full list: {tmp_path / 'leaks.jsonl'}" in str(error.value)
    lines = (tmp_path / "leaks.jsonl").read_text().splitlines()
    assert len(lines) == 30
    assert '"key": "a29"' in lines[29]
    check([], index, tmp_path / "leaks.jsonl")
    assert not (tmp_path / "leaks.jsonl").exists()


# ---------------------------------------------------------------- the stage


@pytest.fixture
def raw(tmp_path, monkeypatch):
    """Three scenes in training; a copy of the second in test, and another scene in validation."""
    monkeypatch.setenv("RUN_SCRATCH", str(tmp_path))
    raw = tmp_path / "raw"
    for i in range(3):
        write(raw / f"train{i}.mp4", scene(i))
    write(raw / "copy.avi", resized(bright(scene(1), 1.1), 0.75), codec="mpeg4")
    write(raw / "other.mp4", scene(9))
    return raw


def rows_of(raw, copy_split):
    rows = [index_row(raw, f"train{i}.mp4", split="train") for i in range(3)]
    rows += [index_row(raw, "copy.avi", split=copy_split), index_row(raw, "other.mp4", split="validation")]
    return rows


def test_copy_in_another_split_fails_the_stage(raw, tmp_path):
    write_index(raw, rows_of(raw, "test"))
    with pytest.raises(UserError, match=r"1 held-out samples also occur in another split") as error:
        build(SECTION, raw, tmp_path / "shards")
    message = str(error.value)
    pair = "'test-copy-avi' (test, copy.avi) and 'test-train1-mp4' (train, train1.mp4): near-duplicate frames: "
    assert pair in message
    assert "Give both samples of a pair the same video_id or split, or remove one" in message
    (listed,) = tmp_path.glob(".scratch/shards/*/leaks.jsonl")
    assert str(listed) in message
    (row,) = map(json.loads, listed.read_text().splitlines())
    assert (row["path"], row["other_path"]) == ("copy.avi", "train1.mp4")
    assert not (tmp_path / "shards").exists()
    build(SECTION.model_copy(update={"max_hash_distance": None}), raw, tmp_path / "shards")  # the check is off
    assert (tmp_path / "shards" / "manifest.json").exists()
    write_index(raw, rows_of(raw, "train"))  # the same split
    assert build(SECTION, raw, tmp_path / "shards").splits["train"].num_samples == 4
    assert not listed.exists()


def test_copy_in_validation_and_test_fails_the_stage(raw, tmp_path):
    rows = [index_row(raw, "train0.mp4", split="train"), index_row(raw, "train1.mp4", split="validation")]
    write_index(raw, [*rows, index_row(raw, "copy.avi", split="test")])
    with pytest.raises(UserError, match=r"'test-copy-avi' \(test, .*\) and 'test-train1-mp4' \(validation, "):
        build(SECTION, raw, tmp_path / "shards")


def test_equal_chats_in_two_splits_fail_before_packing(raw, tmp_path):
    chats = [text_row("chat-1", "Say 1", "1", split="train"), text_row("chat-2", "say  1", "1", split="test")]
    write_index(raw, [*chats, text_row("chat-3", "Say 2", "2", split="test")])
    message = r"'chat-2' \(test, text-only\) and 'chat-1' \(train, text-only\): the same question and answer"
    with pytest.raises(UserError, match=message):
        build(SECTION, raw, tmp_path / "shards")
    assert not list(tmp_path.glob(".scratch/shards/*/packed"))
