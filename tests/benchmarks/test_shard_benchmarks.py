"""The benchmarks of the shards stage run, at a size of seconds, and print what their docstrings promise."""

import argparse
import os

import pytest

from benchmarks import near_duplicates, shard_plan, shards
from pipeline_steps.shards.schema import Section
from tests.pipeline_steps.clips import grey_frames, index_row, write_clip, write_image, write_index


def test_planning_benchmark(tmp_path, capsys):
    shard_plan.measure(num_rows=300, num_queries=5, samples_per_shard=40, folder=tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("300 rows, ")
    assert [line.split("  ")[0] for line in lines[1:]] == [
        "read and check the index",
        "assign splits",
        "find equal chats",
        f"plan {len(list(tmp_path.glob('scratch/plan/*/*')))} shards",
        "write the plans",
        "once more, nothing changed",
        "5 samples, near-duplicates",
    ]


@pytest.mark.slow
def test_packing_benchmark(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RUN_SCRATCH", str(tmp_path))
    allowed = os.sched_getaffinity(0)
    try:
        arguments = argparse.Namespace(files=2, seconds=1, clips=4, image_size=16, samples_per_shard=2)
        shards.measure(arguments, tmp_path)
    finally:
        os.sched_setaffinity(0, allowed)
    out = capsys.readouterr().out
    assert out.startswith("4 clips, 8 frames of 16 px")
    assert "ratio" in out


def test_margins_of_near_duplicates(tmp_path, capsys):
    for i, split in enumerate(("train", "test")):
        frames = [frame // 2 + (i + 1) * 20 for frame in grey_frames(4)]
        for t, frame in enumerate(frames):
            frame[4 * i : 20, 3 * t : 3 * t + 12] = 250  # a block that moves: something to hash
        write_clip(tmp_path / f"{split}.mp4", frames)
        write_image(tmp_path / f"{split}.png", frames[0])
    rows = [index_row(tmp_path, f"{split}.mp4", split=split) for split in ("train", "test")]
    rows += [index_row(tmp_path, f"{split}.png", kind="image", split=split) for split in ("train", "test")]
    write_index(tmp_path, rows)
    section = Section(
        image_size=32,
        resize_mode="crop",
        hdr="refuse",
        fps=2.0,
        max_frames=4,
        jpeg_quality=95,
        samples_per_shard=10,
        validation_share=0.1,
        test_share=0.1,
        max_quarantined=0.0,
        max_hash_distance=24,
        seed=1,
    )
    near_duplicates.measure(section, tmp_path, 1, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("held-out video, nearest of 2 in training")
    copies = {line.split("  ")[0]: int(line.split()[-1]) for line in lines if "copy of a video" in line}
    assert len(copies) == len(near_duplicates.COPIES)
    assert copies["copy of a video: mpeg4"] < copies["copy of a video: mirrored"] / 2
