"""Splits before packing, nothing lost without a reason, the same bytes every time, and a killed run goes on."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import webdataset as wds
from PIL import Image

from pipeline_steps import records
from pipeline_steps.params import ROOT, UserError
from pipeline_steps.records import (
    FramePolicy,
    PackedSample,
    Quarantined,
    RawSample,
    ShardEntry,
    ShardsManifest,
    SplitEntry,
)
from pipeline_steps.shards import fan_out
from pipeline_steps.shards.__main__ import build, check_quarantine
from pipeline_steps.shards.pack import Settings, pack_shard
from pipeline_steps.shards.plan import assign_splits, plan_shards
from pipeline_steps.shards.schema import Section
from tests.pipeline_steps.clips import grey_frames, index_of, index_row, text_row, write_clip, write_image, write_index

FRAMES = FramePolicy(image_size=16, fit="crop", fps=2.0, max_frames=4, jpeg_quality=95)
SECTION = {
    "image_size": 16,
    "fit": "crop",
    "fps": 2.0,
    "max_frames": 4,
    "jpeg_quality": 95,
    "samples_per_shard": 3,
    "validation_share": 0.1,
    "test_share": 0.1,
    "max_quarantined": 0.5,
    "seed": 1,
}


def raw_sample(key, split=None, video_id=None, sha256=None, source="test"):
    item = {"user": "q", "assistant": "a", "family": "caption"}
    return RawSample(
        key=key,
        source=source,
        split=split,
        video_id=video_id or key,
        path=key,
        kind="image",
        sha256=sha256 or key,
        items=(item,),
    )


# ---------------------------------------------------------------- the plan


def test_splits_go_by_video_and_share():
    samples = [raw_sample(f"k{i}-{j}", video_id=f"v{i}") for i in range(1000) for j in range(2)]
    splits = assign_splits(samples, 0.1, 0.2, seed=1)
    assert all(splits[f"k{i}-0"] == splits[f"k{i}-1"] for i in range(1000))
    counts = {split: list(splits.values()).count(split) / 2000 for split in records.SPLITS}
    assert counts["validation"] == pytest.approx(0.1, abs=0.03)
    assert counts["test"] == pytest.approx(0.2, abs=0.04)
    assert splits != assign_splits(samples, 0.1, 0.2, seed=2)
    more = assign_splits([*samples, raw_sample("new")], 0.1, 0.2, seed=1)
    assert {key: more[key] for key in splits} == splits  # a new video moves no other one


@pytest.mark.parametrize(("num_videos", "expected"), [(1, {"train"}), (2, {"train", "test"}), (3, set(records.SPLITS))])
def test_small_sets_fill_every_split_they_can(num_videos, expected):
    for seed in range(20):
        samples = [raw_sample(f"k{i}") for i in range(num_videos)]
        assert set(assign_splits(samples, 0.1, 0.1, seed).values()) == expected
        beside = [*samples, raw_sample("w", split="test", source="other")]  # another source's test set is no substitute
        assert expected <= set(assign_splits(beside, 0.1, 0.1, seed).values())
    assert set(assign_splits([raw_sample(f"k{i}") for i in range(9)], 0.0, 0.0, 1).values()) == {"train"}


def test_copies_of_a_file_stay_together():
    samples = [raw_sample(f"k{i}", sha256=f"same{i // 4}") for i in range(400)]
    splits = assign_splits(samples, 0.3, 0.3, seed=1)
    assert all(len({splits[f"k{i}"] for i in range(start, start + 4)}) == 1 for start in range(0, 400, 4))
    given = [raw_sample("a", split="test", sha256="same"), raw_sample("b", sha256="same")]
    assert assign_splits(given, 0.1, 0.1, seed=1) == {"a": "test", "b": "test"}


def test_leaks_between_given_splits_are_refused():
    with pytest.raises(UserError, match=r"'a' \(split train\) and 'b' \(split test\) hold the same content"):
        assign_splits([raw_sample("a", "train", sha256="x"), raw_sample("b", "test", sha256="x")], 0.1, 0.1, 1)
    with pytest.raises(UserError, match="one and the same video"):
        assign_splits([raw_sample("a", "train", "v"), raw_sample("b", "validation", "v")], 0.1, 0.1, 1)


def test_plan_holds_every_sample_once_and_mixes_them():
    samples = [raw_sample(f"k{i:03d}", split="train") for i in range(100)]
    plan = plan_shards(samples, 0.1, 0.1, 1, samples_per_shard=30)
    assert [len(group) for group in plan.values()] == [30, 30, 30, 10]
    assert list(plan) == [("train", f"{i:06d}") for i in range(4)]
    keys = [sample.key for group in plan.values() for sample in group]
    assert sorted(keys) == [sample.key for sample in samples]
    assert keys != sorted(keys)


# ---------------------------------------------------------------- one shard


@pytest.fixture
def raw(tmp_path):
    """Two clips, one still and one chat, and one of each kind of damage."""
    raw = tmp_path / "raw"
    write_clip(raw / "v/a.mp4", grey_frames(6), options={"crf": "4"})
    write_clip(raw / "v/b.mkv", grey_frames(8), options={"crf": "4"})
    write_image(raw / "c.jpg", grey_frames(4)[2])
    (raw / "cut.mp4").write_bytes((raw / "v/a.mp4").read_bytes()[:900])
    (raw / "empty.jpg").write_bytes(b"")
    (raw / "text.mp4").write_text("no video")
    rows = [index_row(raw, "v/a.mp4", split="train"), index_row(raw, "v/b.mkv", split="validation")]
    rows += [index_row(raw, "c.jpg", kind="image", split="train"), text_row("chat-1", "Say 1", "1", split="train")]
    rows += [index_row(raw, "cut.mp4", split="train"), index_row(raw, "empty.jpg", kind="image", split="train")]
    rows += [index_row(raw, "text.mp4", split="test")]
    write_index(raw, rows)
    return raw


def settings_for(raw):
    return Settings(raw_dir=str(raw), frames=FRAMES)


def read_tar(path):
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def test_members_bytes_and_quarantine(raw, tmp_path):
    samples = [s.model_copy(update={"split": "train"}) for s in records.read_samples(raw / "index.jsonl")]
    report = pack_shard(samples, settings_for(raw), tmp_path / "one" / "000000")
    members = read_tar(tmp_path / "one" / "000000.tar")
    assert list(members) == [
        *[f"test-v-a-mp4.{i:03d}.jpg" for i in range(4)],
        "test-v-a-mp4.json",
        *[f"test-v-b-mkv.{i:03d}.jpg" for i in range(4)],
        "test-v-b-mkv.json",
        "test-c-jpg.jpg",
        "test-c-jpg.json",
        "chat-1.json",
    ]
    assert {q.key: q.reason for q in report.quarantined} == {
        "test-cut-mp4": "truncated or damaged video",
        "test-empty-jpg": "empty file",
        "test-text-mp4": "not a video file",
    }
    assert (report.shard.num_samples, report.shard.num_frames) == (4, 9)
    assert report.shard.sha256 == records.sha256_file(tmp_path / "one" / "000000.tar")
    picture = Image.open(io.BytesIO(members["test-v-a-mp4.003.jpg"]))
    assert picture.size == (16, 16)
    assert index_of(picture, 6) == 5
    packed = PackedSample.model_validate_json(members["test-v-b-mkv.json"])
    assert (packed.frame_count, packed.timestamps) == (4, (0.5, 1.5, 2.5, 3.5))
    assert (packed.width, packed.height, packed.items) == (32, 32, samples[1].items)
    again = pack_shard(samples, settings_for(raw), tmp_path / "two" / "000000")
    assert (tmp_path / "one" / "000000.tar").read_bytes() == (tmp_path / "two" / "000000.tar").read_bytes()
    assert again == report


def test_webdataset_reads_the_shard(raw, tmp_path):
    samples = [s.model_copy(update={"split": "train"}) for s in records.read_samples(raw / "index.jsonl")]
    pack_shard(samples, settings_for(raw), tmp_path / "000000")
    read = list(wds.WebDataset(str(tmp_path / "000000.tar"), shardshuffle=False).decode("rgb8"))
    assert [sample["__key__"] for sample in read] == ["test-v-a-mp4", "test-v-b-mkv", "test-c-jpg", "chat-1"]
    assert np.abs(read[0]["003.jpg"].astype(int) - (20 + 200 * 5 // 6)).max() <= 4
    assert read[3]["json"]["items"][0]["assistant"] == "1"


def test_a_changed_file_is_an_error_not_a_quarantine(raw, tmp_path):
    samples = [s.model_copy(update={"split": "train"}) for s in records.read_samples(raw / "index.jsonl")]
    write_clip(raw / "v/a.mp4", grey_frames(5))
    with pytest.raises(UserError, match=r"v/a\.mp4 \(sample 'test-v-a-mp4'\) changed after the index was written"):
        pack_shard(samples, settings_for(raw), tmp_path / "000000")


# ---------------------------------------------------------------- the stage


def run_stage(raw, output, scratch, **changes):
    """`python -m pipeline_steps.shards` with its own section, as a process that a test may kill."""
    code = (
        "import sys, json; from pipeline_steps import params; from pipeline_steps.shards.__main__ import build;"
        "from pipeline_steps.shards.schema import Section;"
        "params.run(lambda: print(build(Section(**json.loads(sys.argv[1])), sys.argv[2], sys.argv[3]).packed))"
    )
    section = json.dumps({**SECTION, **changes})
    return subprocess.Popen(
        [sys.executable, "-c", code, section, str(raw), str(output)],
        cwd=ROOT,
        env={**os.environ, "RUN_SCRATCH": str(scratch), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def working_in(folder):
    """Command lines of the processes whose working directory is `folder`."""
    found = []
    for process in psutil.process_iter(["cwd", "cmdline"]):
        if process.info["cwd"] == str(folder):
            found.append(process.info["cmdline"])
    return found


def test_stage_accounts_for_every_sample(raw, tmp_path):
    process = run_stage(raw, tmp_path / "shards", tmp_path)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    manifest = records.read_record(ShardsManifest, tmp_path / "shards" / "manifest.json", "shards")
    assert (manifest.seen, manifest.packed, len(manifest.quarantined)) == (7, 4, 3)
    assert manifest.sources == {"test": 4}
    assert "quarantined 3 of 7 samples" in errors
    assert "test-cut-mp4 (cut.mp4): truncated or damaged video" in errors
    assert "7/7" in errors  # the progress bar reached its end
    for split, entry in manifest.splits.items():
        assert [s.name for s in entry.shards] == sorted(p.name for p in (tmp_path / "shards" / split).iterdir())
        assert all(s.sha256 == records.sha256_file(tmp_path / "shards" / split / s.name) for s in entry.shards)
    assert manifest.splits["test"].shards == ()  # its only sample is damaged
    assert [p.suffix for p in (tmp_path / ".scratch" / "shards").iterdir()] == [".lock"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".scratch", "raw", "shards"]


def test_stage_fails_whole_on_too_much_damage_and_keeps_the_old_output(raw, tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "old").touch()
    process = run_stage(raw, tmp_path / "shards", tmp_path, max_quarantined=0.4)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "3 of 6 media files of 'test' are damaged (50.0%)" in errors  # the chat is no media file
    assert "Traceback" not in errors
    assert sorted(p.name for p in tmp_path.iterdir()) == [".scratch", "raw", "shards"]
    assert [p.name for p in (tmp_path / "shards").iterdir()] == ["old"]


def test_a_jobs_own_message_reaches_the_user(raw, tmp_path):
    write_clip(raw / "v/a.mp4", grey_frames(5))
    process = run_stage(raw, tmp_path / "shards", tmp_path)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "changed after the index was written" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "shards").exists()


def test_killed_run_stops_and_goes_on(tmp_path):
    raw = tmp_path / "raw"
    for i in range(16):
        write_image(raw / f"{i}.png", np.full((8, 8, 3), i, np.uint8))
    write_index(raw, [index_row(raw, f"{i}.png", kind="image", split="train") for i in range(16)])
    process = run_stage(raw, tmp_path / "shards", tmp_path, samples_per_shard=1)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".scratch/shards/*/packed/train/*.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (scratch,) = tmp_path.glob(".scratch/shards/*/")
    while working_in(scratch):  # Snakemake dies with the stage, a job ends with its shard
        assert time.monotonic() < deadline
        time.sleep(0.02)
    finished = {
        p.stem: p.with_suffix(".tar").stat().st_mtime_ns for p in tmp_path.glob(".scratch/shards/*/packed/train/*.json")
    }
    assert 0 < len(finished) < 16
    assert not (tmp_path / "shards").exists()
    rerun = run_stage(raw, tmp_path / "shards", tmp_path, samples_per_shard=1)
    _, errors = rerun.communicate(timeout=120)
    assert rerun.returncode == 0, errors
    tars = {p.stem: p.stat().st_mtime_ns for p in (tmp_path / "shards" / "train").iterdir()}
    assert len(tars) == 16
    assert {name: tars[name] for name in finished} == finished  # not packed a second time
    colours = [
        np.asarray(Image.open(io.BytesIO(content))).mean()
        for p in sorted((tmp_path / "shards/train").iterdir())
        for name, content in read_tar(p).items()
        if name.endswith("jpg")
    ]
    assert sorted(round(c) for c in colours) == list(range(16))


def test_unwritable_output(raw, tmp_path, monkeypatch):
    monkeypatch.setenv("RUN_SCRATCH", str(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/shards: cannot be written \(Not a directory\)"):
        build(Section(**SECTION), raw, tmp_path / "file" / "shards")
    monkeypatch.setenv("RUN_SCRATCH", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"file/\.scratch/shards/.*: cannot be written"):
        build(Section(**SECTION), raw, tmp_path / "shards")
    assert not (tmp_path / "shards").exists()


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(fan_out.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    assert "no space left on the disk" in fan_out._explain(tmp_path, 1, tmp_path / "snakemake.log")


def test_bad_indexes(tmp_path):
    with pytest.raises(UserError, match=r"index\.jsonl: missing.*pipeline_steps\.sources"):
        build(Section(**SECTION), tmp_path, tmp_path / "shards")
    row = text_row("a", "q", "a")
    for rows, message in [
        ([row, row], "key 'a' is in line 1 and in line 2"),
        ([{**row, "key": "a.b"}], "line 1: key: String should match"),
        ([{**row, "kind": "video"}], "has path None"),
        ([text_row("a", "q", "red: 1", cue="blue:")], "does not start with the cue"),
        ([], "no samples"),
    ]:
        write_index(tmp_path, rows)
        with pytest.raises(UserError, match=message):
            build(Section(**SECTION), tmp_path, tmp_path / "shards")


def test_nothing_left_to_train_on():
    empty = SplitEntry(shards=(), num_samples=0, num_frames=0, seconds=0.0, bytes=0)
    shard = ShardEntry(name="000000.tar", num_samples=1, num_frames=1, seconds=0.0, bytes=1, sha256="x")
    manifest = ShardsManifest(
        splits={
            "train": empty,
            "validation": empty,
            "test": SplitEntry(shards=(shard,), num_samples=1, num_frames=1, seconds=0.0, bytes=1),
        },
        seen=2,
        packed=1,
        quarantined=(Quarantined(key="a", source="s", path="a.mp4", reason="empty file"),),
        sources={"s": 1},
        frames=FRAMES,
    )
    with pytest.raises(UserError, match="no training sample is left of 2, 1 of them damaged"):
        check_quarantine(manifest, {"s": 2}, 0.5)
    with pytest.raises(ValueError, match="seen 3, packed 1"):
        ShardsManifest(**{**dict(manifest), "seen": 3})


def test_code_of_the_fingerprint_exists():
    from pipeline_steps.shards.__main__ import CODE

    assert all((ROOT / path).is_file() for path in CODE)
    assert {str(p.relative_to(ROOT)) for p in Path(ROOT, "pipeline_steps/shards").glob("p*.py")} <= set(CODE)
