"""Splits before packing, nothing lost without a reason, the same bytes every time, and a killed run goes on."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import webdataset as wds
from PIL import Image

from pipeline_steps.common.errors import UserError
from pipeline_steps.common.files import read_record
from pipeline_steps.common.hashing import sha256_file
from pipeline_steps.common.params import ROOT
from pipeline_steps.common.schemas import (
    SPLITS,
    FramePolicy,
    PackedSample,
    Quarantined,
    ShardEntry,
    ShardsManifest,
    SplitEntry,
    read_samples,
)
from pipeline_steps.shards import fan_out
from pipeline_steps.shards.__main__ import build, check_quarantine, main
from pipeline_steps.shards.pack import Settings, ShardReport, pack_shard
from pipeline_steps.shards.schema import Section
from pipeline_steps.shards.scratch import read_reports, remove_outdated_folders
from tests.pipeline_steps.clips import grey_frames, index_of, index_row, text_row, write_clip, write_image, write_index
from tests.test_pipeline_contract import WITHOUT_EFFECT

FRAMES = FramePolicy(image_size=16, resize_mode="crop", fps=2.0, max_frames=4, jpeg_quality=95)
SECTION = {
    "image_size": 16,
    "resize_mode": "crop",
    "hdr": "refuse",
    "fps": 2.0,
    "max_frames": 4,
    "jpeg_quality": 95,
    "samples_per_shard": 3,
    "validation_share": 0.1,
    "test_share": 0.1,
    "max_quarantined": 0.5,
    "max_hash_distance": 24,
    "seed": 1,
}


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
    rows += [index_row(raw, "text.mp4", split="validation")]
    write_index(raw, rows)
    return raw


def settings_for(raw):
    return Settings(raw_dir=str(raw), frames=FRAMES)


def read_tar(path):
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def test_shard_has_expected_members_stable_bytes_and_quarantine(raw, tmp_path):
    samples = [s.model_copy(update={"split": "train"}) for s in read_samples(raw / "index.jsonl")]
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
    assert report.shard.sha256 == sha256_file(tmp_path / "one" / "000000.tar")
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
    samples = [s.model_copy(update={"split": "train"}) for s in read_samples(raw / "index.jsonl")]
    pack_shard(samples, settings_for(raw), tmp_path / "000000")
    read = list(wds.WebDataset(str(tmp_path / "000000.tar"), shardshuffle=False).decode("rgb8"))
    assert [sample["__key__"] for sample in read] == ["test-v-a-mp4", "test-v-b-mkv", "test-c-jpg", "chat-1"]
    assert np.abs(read[0]["003.jpg"].astype(int) - (20 + 200 * 5 // 6)).max() <= 4
    assert read[3]["json"]["items"][0]["assistant"] == "1"


def test_file_changed_after_indexing_is_an_error(raw, tmp_path):
    samples = [s.model_copy(update={"split": "train"}) for s in read_samples(raw / "index.jsonl")]
    write_clip(raw / "v/a.mp4", grey_frames(5))
    with pytest.raises(UserError, match=r"a\.mp4 \(sample 'test-v-a-mp4'\) changed .*`dvc repro --force sources`"):
        pack_shard(samples, settings_for(raw), tmp_path / "000000")


# ---------------------------------------------------------------- the stage


def run_stage(raw, output, scratch, **changes):
    """`python -m pipeline_steps.shards` with its own section, as a process that a test may kill."""
    code = (
        "import sys, json; from pipeline_steps.common import errors; from pipeline_steps.shards.__main__ import build;"
        "from pipeline_steps.shards.schema import Section;"
        "errors.run_main(lambda: print(build(Section(**json.loads(sys.argv[1])), sys.argv[2], sys.argv[3]).packed))"
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
    manifest = read_record(ShardsManifest, tmp_path / "shards" / "manifest.json", "shards")
    assert (manifest.seen, manifest.packed, len(manifest.quarantined)) == (7, 4, 3)
    assert manifest.sources == {"test": 4}
    assert "quarantined 3 of 7 samples" in errors
    assert "To use them, repair them and run `dvc repro --force sources` and `dvc repro`." in errors
    assert "test-cut-mp4 (cut.mp4): truncated or damaged video" in errors
    assert "7/7" in errors  # the progress bar reached its end
    for split, entry in manifest.splits.items():
        assert [s.name for s in entry.shards] == sorted(p.name for p in (tmp_path / "shards" / split).iterdir())
        assert all(s.sha256 == sha256_file(tmp_path / "shards" / split / s.name) for s in entry.shards)
    assert manifest.splits["test"].shards == ()  # no sample was given to it
    for entry in (*manifest.splits.values(), *(s for e in manifest.splits.values() for s in e.shards)):
        assert (entry.num_samples > 0) == (entry.bytes > 0)
    train = manifest.splits["train"]
    assert train.bytes == sum(p.stat().st_size for p in (tmp_path / "shards" / "train").iterdir())
    assert [manifest.splits[s].seconds for s in SPLITS] == [3.0, 4.0, 0.0]  # 6 and 8 frames at 2 per second
    assert {q.key: (q.source, q.path, q.reason) for q in manifest.quarantined} == {
        "test-cut-mp4": ("test", "cut.mp4", "truncated or damaged video"),
        "test-empty-jpg": ("test", "empty.jpg", "empty file"),
        "test-text-mp4": ("test", "text.mp4", "not a video file"),
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == [".scratch", "raw", "shards"]


def test_too_many_damaged_media_fail_the_stage_and_keep_the_old_output(raw, tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "old").touch()
    process = run_stage(raw, tmp_path / "shards", tmp_path, max_quarantined=0.4)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "3 of 6 media files of 'test' are damaged (50.0%)" in errors  # the chat is no media file
    assert "Traceback" not in errors
    assert sorted(p.name for p in tmp_path.iterdir()) == [".scratch", "raw", "shards"]
    assert [p.name for p in (tmp_path / "shards").iterdir()] == ["old"]


def test_job_error_message_reaches_the_user(raw, tmp_path):
    write_clip(raw / "v/a.mp4", grey_frames(5))
    process = run_stage(raw, tmp_path / "shards", tmp_path)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "changed after the index was written" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "shards").exists()


def write_stills(raw, numbers):
    """Grey stills whose level is their number, each given a split."""
    for i in numbers:
        write_image(raw / f"{i}.png", np.full((8, 8, 3), i, np.uint8))
    splits = {i: "test" if i % 5 == 4 else "train" for i in numbers}
    write_index(raw, [index_row(raw, f"{i}.png", kind="image", split=splits[i]) for i in numbers])


def run_to_its_end(raw, output, scratch, **changes):
    """What the stage printed."""
    process = run_stage(raw, output, scratch, **changes)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return errors


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def inodes(folder):
    return {p.stat().st_ino for p in folder.rglob("*.tar")}


def wait_until_quiet(folder):
    """Snakemake dies with the stage, a job ends with its shard."""
    deadline = time.monotonic() + 60
    while working_in(folder):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_killed_run_stops_its_jobs_and_resumes(tmp_path):
    raw = tmp_path / "raw"
    write_stills(raw, range(32))
    process = run_stage(raw, tmp_path / "shards", tmp_path, samples_per_shard=1)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".scratch/shards/*/packed/train/*.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (scratch,) = tmp_path.glob(".scratch/shards/*/")
    wait_until_quiet(scratch)
    finished = {p.with_suffix(".tar").stat().st_ino for p in tmp_path.glob(".scratch/shards/*/packed/*/*.json")}
    assert 0 < len(finished) < 32
    assert not (tmp_path / "shards").exists()
    errors = run_to_its_end(raw, tmp_path / "shards", tmp_path, samples_per_shard=1)
    assert f"{32 - len(finished)} shards packed, {len(finished)} reused" in errors
    assert len(inodes(tmp_path / "shards")) == 32
    assert finished < inodes(tmp_path / "shards")  # not packed a second time
    colours = [
        np.asarray(Image.open(io.BytesIO(data))).mean()
        for p in sorted((tmp_path / "shards").rglob("*.tar"))
        for name, data in read_tar(p).items()
        if name.endswith("jpg")
    ]
    assert sorted(round(c) for c in colours) == list(range(32))


@pytest.mark.slow
def test_run_killed_at_any_moment_resumes_to_the_same_bytes(tmp_path):
    raw = tmp_path / "raw"
    write_stills(raw, range(12))
    started = time.monotonic()
    run_to_its_end(raw, tmp_path / "whole", tmp_path / "a", samples_per_shard=2)
    duration = time.monotonic() - started
    moments = np.random.default_rng().uniform(0.1, 1.0, 4) * duration
    for moment in moments:
        process = run_stage(raw, tmp_path / "shards", tmp_path / "b", samples_per_shard=2)
        time.sleep(moment)
        process.kill()
        process.communicate()
        for scratch in tmp_path.glob("b/.scratch/shards/*/"):
            wait_until_quiet(scratch)
    run_to_its_end(raw, tmp_path / "shards", tmp_path / "b", samples_per_shard=2)
    assert content(tmp_path / "shards") == content(tmp_path / "whole"), f"killed after {moments} s"
    left = [p for p in tmp_path.glob("b/.scratch/shards/*/packed/**/*") if p.name.startswith(".")]
    assert left == []


@pytest.mark.slow
def test_one_more_sample_repacks_one_shard(tmp_path):
    raw, output = tmp_path / "raw", tmp_path / "shards"
    write_stills(raw, range(40))
    run_to_its_end(raw, output, tmp_path, samples_per_shard=6)
    first, first_content = inodes(output), content(output)
    assert len(first) > 7
    shutil.rmtree(raw)  # as DVC does before it runs the stage that writes the media
    write_stills(raw, [*range(40), 41])
    errors = run_to_its_end(raw, output, tmp_path, samples_per_shard=6)
    new = inodes(output) - first
    assert len(new) in (1, 2)  # two: the bucket was full and is halved
    assert f"{len(new)} shards packed" in errors
    run_to_its_end(raw, tmp_path / "from_nothing", tmp_path / "elsewhere", samples_per_shard=6)
    assert content(output) == content(tmp_path / "from_nothing")
    names = [p.name for p in sorted((output / "train").iterdir())]
    assert names == [f"{i:06d}.tar" for i in range(len(names))]

    write_stills(raw, range(40))  # without it again
    errors = run_to_its_end(raw, output, tmp_path, samples_per_shard=6)
    assert content(output) == first_content
    assert len(inodes(output) - first) <= 1
    planned = {p.name.split(".")[0] for p in tmp_path.glob(".scratch/shards/*/plan/train/*")}
    assert {p.name.split(".")[0] for p in tmp_path.glob(".scratch/shards/*/packed/train/*")} == planned


def test_split_parameters_and_rewritten_media_repack_nothing(tmp_path):
    raw, output = tmp_path / "raw", tmp_path / "shards"
    write_stills(raw, range(10))
    run_to_its_end(raw, output, tmp_path)
    before = inodes(output)
    shutil.rmtree(raw)
    write_stills(raw, range(10))
    assert "0 shards packed" in run_to_its_end(raw, output, tmp_path, max_quarantined=0.1, max_hash_distance=None)
    assert inodes(output) == before


def test_scratch_folders_of_other_versions_are_left_alone(tmp_path):
    own, other = tmp_path / "own", tmp_path / "other"
    for folder, settings in ((own, "{}"), (other, '{"raw_dir": "raw", "option_of_another_version": 1}')):
        folder.mkdir()
        (folder / "finished").touch()
        (folder / "settings.json").write_text(settings)
    remove_outdated_folders(own, "raw")
    assert (other / "settings.json").exists()


@pytest.mark.slow
def test_modified_published_tar_is_packed_again(tmp_path):
    raw, output = tmp_path / "raw", tmp_path / "shards"
    write_stills(raw, range(10))
    run_to_its_end(raw, output, tmp_path)
    before = content(output)
    victim = output / "train" / "000000.tar"
    assert victim.stat().st_mode & 0o222 == 0  # a hard link of the one in scratch: nobody writes into it by mistake
    victim.chmod(0o644)
    with open(victim, "r+b") as file:
        file.write(b"x")
    assert "1 shards packed" in run_to_its_end(raw, output, tmp_path)
    assert content(output) == before


@pytest.mark.slow
def test_older_scratch_folders_of_the_same_media_are_removed(tmp_path):
    raw, output = tmp_path / "raw", tmp_path / "shards"
    write_stills(raw, range(4))
    run_to_its_end(raw, output, tmp_path)
    (first,) = tmp_path.glob(".scratch/shards/*/")
    run_to_its_end(raw, output, tmp_path, jpeg_quality=90)
    (second,) = tmp_path.glob(".scratch/shards/*/")
    assert first != second


@pytest.mark.slow
def test_shard_of_an_earlier_plan_is_rejected(tmp_path):
    """On a cluster a job may outlive its stage, and end after a later one has written another plan."""
    raw, output = tmp_path / "raw", tmp_path / "shards"
    write_stills(raw, range(5))
    run_to_its_end(raw, output, tmp_path)
    (scratch,) = tmp_path.glob(".scratch/shards/*/")
    (report_path,) = scratch.glob("packed/test/*.json")
    report = json.loads(report_path.read_text())
    report_path.write_text(json.dumps({**report, "plan_sha256": "0" * 64}))
    place = ("test", report_path.stem)
    with pytest.raises(UserError, match=r"an earlier job packed another plan \(sha256 000000000000, expected"):
        read_reports(scratch, {place: report["plan_sha256"]})
    assert "1 shards packed" in run_to_its_end(raw, output, tmp_path)


def test_unwritable_output_is_rejected(raw, tmp_path, monkeypatch):
    monkeypatch.setenv("RUN_SCRATCH", str(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/shards: cannot be written \(Not a directory\)"):
        build(Section(**SECTION), raw, tmp_path / "file" / "shards")
    monkeypatch.setenv("RUN_SCRATCH", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"file/\.scratch/shards/.*: cannot be written"):
        build(Section(**SECTION), raw, tmp_path / "shards")
    assert not (tmp_path / "shards").exists()


def test_full_disk_error_names_the_path(tmp_path, monkeypatch):
    monkeypatch.setattr(fan_out.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    assert "no space left on the disk" in fan_out._explain(tmp_path, 1, tmp_path / "snakemake.log")


def test_empty_files_of_two_splits_are_quarantined(raw, tmp_path, monkeypatch):
    monkeypatch.setenv("RUN_SCRATCH", str(tmp_path))
    (raw / "none.jpg").touch()
    rows = [index_row(raw, "v/a.mp4", split="train"), index_row(raw, "empty.jpg", kind="image", split="train")]
    rows += [index_row(raw, "v/b.mkv", split="test"), index_row(raw, "none.jpg", kind="image", split="test")]
    write_index(raw, rows)
    manifest = build(Section(**SECTION), raw, tmp_path / "shards", num_processes=1)
    assert {q.path: q.reason for q in manifest.quarantined} == {"empty.jpg": "empty file", "none.jpg": "empty file"}


@pytest.mark.parametrize("number", ["0", "-1"])
def test_a_number_of_processes_below_1_is_refused(monkeypatch, capsys, number):
    monkeypatch.setattr("sys.argv", ["shards", "--processes", number])
    with pytest.raises(SystemExit):
        main()
    assert f"--processes is {number}, expected at least 1" in capsys.readouterr().err


def test_a_split_without_a_sample_left_fails_the_stage():
    empty = SplitEntry(shards=(), num_samples=0, num_frames=0, seconds=0.0, bytes=0)
    shard = ShardEntry(name="000000.tar", num_samples=1, num_frames=1, seconds=0.0, bytes=1, sha256="x")
    full = SplitEntry(shards=(shard,), num_samples=1, num_frames=1, seconds=0.0, bytes=1)
    manifest = ShardsManifest(
        splits={"train": empty, "validation": empty, "test": full},
        seen=2,
        packed=1,
        quarantined=(Quarantined(key="a", source="s", path="a.mp4", reason="empty file"),),
        sources={"s": 1},
        frames=FRAMES,
    )
    place = ("train", "p")
    reports = {place: ShardReport(shard=shard, quarantined=manifest.quarantined, sources={}, plan_sha256=None)}
    with pytest.raises(UserError, match="no training sample is left of 2 samples, 1 of them damaged"):
        check_quarantine(manifest, reports, {"s": 2}, 0.5)
    other = manifest.model_copy(update={"splits": {"train": full, "validation": empty, "test": empty}})
    message = r"all 1 samples of the split test are damaged:\n  a \(a\.mp4\): empty file\nRepair these files, or re"
    with pytest.raises(UserError, match=message):
        check_quarantine(other, {("test", "p"): reports[place]}, {"s": 2}, 0.5)
    check_quarantine(other, reports, {"s": 2}, 0.5)  # no sample was given to the other splits
    with pytest.raises(ValueError, match="seen 3, packed 1"):
        ShardsManifest(**{**dict(manifest), "seen": 3})


def test_files_in_the_code_fingerprint_exist():
    from pipeline_steps.shards.__main__ import CODE

    assert all((ROOT / path).is_file() for path in CODE)
    code = "import sys, pipeline_steps.shards.pack; print(*(m for m in sys.modules if m.startswith('pipeline_steps.')))"
    imported = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split()
    packing = {f"{name.replace('.', '/')}.py" for name in imported} - {
        "pipeline_steps/shards.py",
        "pipeline_steps/common.py",
    }
    assert packing - WITHOUT_EFFECT.keys() <= set(CODE)
