"""Existing WebDataset archives: every naming of frames, and keys over several archives."""

import re
import tarfile
from pathlib import Path

import pytest
import webdataset

from pipeline_steps.common.errors import UserError
from pipeline_steps.common.hashing import media_sha256
from pipeline_steps.common.schemas import RawSample
from pipeline_steps.shards.pack import Settings, pack_shard
from pipeline_steps.sources import tars
from pipeline_steps.sources.layout import HIDDEN, NO_DOT, UNKNOWN_TYPE
from tests.pipeline_steps.archives import MORE, POLICY, QUESTION, entry, frames, only, read_tars, write_tar
from tests.pipeline_steps.clips import grey_frames, index_row, text_row, write_clip, write_image


def media_of(sample):
    content = Path(sample.path).read_bytes()
    return [content[offset : offset + size] for offset, size in sample.parts]


# ---------------------------------------------------------------- layout


@pytest.mark.parametrize(
    "pattern",
    ["k.{:03d}.jpg", "k_{:03d}.jpg", "k.frame_{:03d}.jpg", "k_frame_{:03d}.jpg", "k/{:03d}.jpg", "k/frame_{:03d}.png"],
)
@pytest.mark.parametrize("shuffled", [False, True])
def test_numbered_frames_form_a_video(tmp_path, pattern, shuffled):
    members = [*frames(pattern, 12), ("k.json", QUESTION | {"frame_count": 12, "video_id": "v7"})]
    members = members[::-1] if shuffled else members
    sample = only(tmp_path, members, picture_fps=0.5)
    assert (sample.key, sample.kind, sample.picture_fps, sample.video_id) == ("old-000000-k", "video", 0.5, "old-v7")
    assert media_of(sample) == [b"frame %d" % i for i in range(12)]
    assert sample.sha256 == media_sha256(sample.path, sample.parts)
    assert sample.size == sum(map(len, media_of(sample)))
    assert sample.num_source_frames == 12


@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "png", "webp"])
def test_single_picture_forms_an_image_sample(tmp_path, suffix):
    sample = only(tmp_path, [(f"k.{suffix}", b"picture"), ("k.json", QUESTION)])
    assert (sample.kind, sample.picture_fps, media_of(sample)) == ("image", None, [b"picture"])
    assert sample.sha256 == media_sha256(sample.path, sample.parts)


def test_video_file_and_txt_form_a_sample(tmp_path):
    sample = only(tmp_path, [("k.mp4", b"movie"), ("k.txt", b"A dog."), ("k.json", {"frame_count": 90, "url": "x"})])
    assert (sample.kind, sample.picture_fps, media_of(sample)) == ("video", None, [b"movie"])
    assert [(i.user, i.assistant, i.task) for i in sample.items] == [(None, "A dog.", "caption")]
    sample = only(tmp_path, [("k.mp4", b"movie"), ("k.txt", "Ein Bär.".encode())])
    assert sample.items[0].assistant == "Ein Bär."


def test_interleaved_members_are_grouped_by_key(tmp_path):
    names = [f"a/b/{key}" for key in ("x", "y", "z")]
    members = [member for i in range(4) for key in names for member in frames(key + ".{:03d}.jpg", 1, i)]
    members += [(f"{key}.json", QUESTION) for key in reversed(names)]
    samples, reasons, _ = read_tars(write_tar(tmp_path / "0.tar", members))
    assert reasons == {}
    assert all(media_of(s) == [b"frame %d" % i for i in range(4)] for s in samples.values())
    assert len(samples) == 3
    assert all(key.startswith("old-0-a-b-") for key in samples)


def test_numbered_pictures_with_a_json_each_are_stills(tmp_path):
    members = [m for i in range(3) for m in ((f"clip_{i:03d}.jpg", b"p%d" % i), (f"clip_{i:03d}.json", QUESTION))]
    samples, reasons, _ = read_tars(write_tar(tmp_path / "0.tar", members))
    assert [s.kind for s in samples.values()] == ["image"] * 3
    assert reasons == {}


def test_members_that_belong_to_no_sample_are_counted(tmp_path):
    members = [("k.json", QUESTION), ("k.cls", b"3"), ("README", b""), (".x.jpg", b""), ("index.tsv", b"")]
    samples, reasons, others = read_tars(write_tar(tmp_path / "0.tar", members))
    assert (len(samples), reasons) == (1, {})
    reasons = {NO_DOT: 1, HIDDEN: 1, UNKNOWN_TYPE: 2}
    assert others == {"count": 4, "first": ["k.cls", "README", ".x.jpg", "index.tsv"], "reasons": reasons}


DOTTED = {  # members -> keys of samples, keys of quarantined samples, unreferenced members
    "a video": (["v1.5_clip.mp4", "v1.5_clip.json"], [], ["v1"], []),
    "two videos": (["v1.5_a.mp4", "v1.5_a.json", "v1.6_b.mp4", "v1.6_b.json"], [], ["v1"], []),
    "a number": (["22.05.png", "22.05.json"], [], ["22"], []),
    "a number with a text": (["22.05.png", "22.json"], [], ["22"], []),
    "a mask beside a picture": (["k.jpg", "k.seg.png", "k.json"], ["k"], [], ["k.seg.png"]),
    "a second text": (["k.mp4", "k.json", "k.meta.json"], ["k"], [], ["k.meta.json"]),
    "a picture of a text": (["k.json", "k.seg.png"], [], ["k"], []),
    "a folder with a dot": (["v1.5/k.jpg", "v1.5/k.json"], ["v1.5/k"], [], []),
    "an unknown type": (["k.jpg", "k.json", "k.pth.tar"], ["k"], [], ["k.pth.tar"]),
}


@pytest.mark.parametrize(("names", "taken", "quarantined", "left"), DOTTED.values(), ids=DOTTED)
def test_names_with_dots_never_vanish(tmp_path, names, taken, quarantined, left):
    members = [(name, QUESTION if name.endswith(".json") else b"x") for name in names]
    samples, reasons, others = read_tars(write_tar(tmp_path / "0.tar", members))
    assert list(samples) == [tars.make_key("old", "0", key) for key in taken]
    assert list(reasons) == [tars.make_key("old", "0", key) for key in quarantined]
    assert others["first"] == left
    assert others["count"] == sum(others["reasons"].values()) == len(left)
    keys = webdataset_keys(tmp_path / "0.tar")
    assert set(taken) | set(quarantined) == keys


def webdataset_keys(path):
    """The keys of the samples that WebDataset makes of the archive."""
    samples = webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
    return {sample["__key__"] for sample in samples}


def test_long_names_and_pax_headers_are_read(tmp_path):
    name = "d" * 90 + "/" + "k" * 140
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = write_tar(tmp_path / "0.tar", [(f"{name}.jpg", b"picture"), (f"{name}.json", QUESTION)], format)
        ((key, sample),) = read_tars(path)[0].items()
        assert media_of(sample) == [b"picture"]
        assert len(key) < 200


def test_a_shard_of_this_pipeline_reads_back(tmp_path):
    own = {
        "key": "p-1",
        "source": "procedural",
        "split": "test",
        "video_id": "v",
        "kind": "video",
        "frame_count": 3,
        "duration": 6.0,
        "num_source_frames": 12,
        "objects": [{"colour": "red", "place": "top left", "digits": [1], "boxes": [[0, 0, 1, 1]]}],
        "items": [QUESTION | {"task": "card", "cue": "A", "target": 0}],
    }
    members = [*frames("p-1.{:03d}.jpg"), ("p-1.json", own)]
    sample = only(tmp_path, members)
    assert (sample.source, sample.split, sample.picture_fps, sample.objects) == ("procedural", "test", 0.5, None)
    assert (sample.items[0].task, sample.items[0].cue, sample.items[0].target) == ("card", "A", None)
    whole = only(tmp_path, [*members[:-1], ("p-1.json", own | {"num_source_frames": 3})])
    assert (whole.items[0].target, whole.objects[0].colour) == (0, "red")
    stills = only(tmp_path, [*members[:-1], ("p-1.json", own | {"kind": "image", "duration": 0.0})])
    assert (stills.kind, stills.picture_fps, len(stills.parts)) == ("image", None, 3)


def test_what_the_stage_shards_writes_reads_back(tmp_path):
    raw = tmp_path / "raw"
    write_clip(raw / "clip.mp4", grey_frames(8), fps=2)
    write_image(raw / "still.jpg", grey_frames(1)[0])
    chat = [{"messages": MORE, "task": "x", "rejected": "No."}]
    choice = [{"user": "A?", "options": ["b", "c"], "correct_option": 1, "task": "choice"}]
    rows = [index_row(raw, "clip.mp4", items=choice, split="test"), text_row("t", "A?", "B.", split="test")]
    rows.append(index_row(raw, "still.jpg", kind="image", items=chat, split="test"))
    samples = [RawSample.model_validate(row) for row in rows]
    pack_shard(samples, Settings(raw_dir=str(raw), frames=POLICY), tmp_path / "packed" / "000000")
    found, reasons, others = read_tars(tmp_path / "packed")
    assert (reasons, others["count"]) == ({}, 0)
    for sample in samples:
        (again,) = (s for s in found.values() if s.video_id == f"old-{sample.video_id}")
        assert (again.source, again.split, again.kind) == (sample.source, "test", sample.kind)
        assert again.items == sample.items
    video = next(s for s in found.values() if s.kind == "video")
    assert (len(video.parts), video.picture_fps) == (4, 1.0)  # 4 frames of 4 seconds


# ---------------------------------------------------------------- keys, several archives


def test_keys_are_unique_and_stable(tmp_path):
    for name in ("a/0.tar", "a/1.tar", "b/0.tar"):
        write_tar(tmp_path / name, [("k.json", QUESTION), ("x/k.json", QUESTION), ("x-k.json", QUESTION)])
    samples, _, _ = read_tars(tmp_path)
    assert len(samples) == 9
    again, _, _ = read_tars(tmp_path, num_processes=2)
    assert list(again) == list(samples)
    assert {s.key: s for s in again.values()} == samples
    write_tar(tmp_path / "a/2.tar", [("k.json", QUESTION)])
    assert set(samples) < set(read_tars(tmp_path)[0])
    hashed = tars.make_key("old", "0", "x/k")
    assert set(read_tars(tmp_path / "a" / "0.tar")[0]) == {"old-0-k", "old-0-x-k", hashed}
    assert hashed.startswith("old-0-x-k-")


def test_entry_path_may_be_a_folder_a_pattern_or_a_file(tmp_path):
    for name in ("train-0.tar", "train-1.tar", "test-0.tar", "sub/train-2.tar"):
        write_tar(tmp_path / name, [("k.json", QUESTION)])
    (tmp_path / "notes.txt").touch()
    names = [name for _, name in tars.find_tars(entry(tmp_path))]
    assert names == ["sub/train-2", "test-0", "train-0", "train-1"]
    assert [name for _, name in tars.find_tars(entry(tmp_path / "train-*.tar"))] == ["train-0", "train-1"]
    assert [name for _, name in tars.find_tars(entry(tmp_path / "*" / "*.tar"))] == ["sub/train-2"]
    assert tars.find_tars(entry(tmp_path / "test-0.tar")) == [(str(tmp_path / "test-0.tar"), "test-0")]
    (tmp_path / "folder.tar").mkdir()
    for path, problem in (
        (tmp_path / "no", "does not exist"),
        (tmp_path / "sub" / "no", "does not exist"),
        (tmp_path / "no-*.tar", "no .tar found"),
        (tmp_path / "fold*.tar", f"{tmp_path / 'folder.tar'} is not a file"),
    ):
        with pytest.raises(UserError, match=re.escape(f"'old': {path}: {problem}. Give a folder")):
            tars.find_tars(entry(path))


def test_archives_in_linked_folders_and_in_upper_case_are_found(tmp_path):
    write_tar(tmp_path / "elsewhere/1.TAR", [("k.json", QUESTION)])
    write_tar(tmp_path / "data/0.tar", [("k.json", QUESTION)])
    (tmp_path / "data/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "data")
    names = [name for _, name in tars.find_tars(entry(tmp_path / "data"))]
    assert names == ["0", "linked/1"]
