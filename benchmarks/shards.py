"""Throughput of shard building, compared with its upper bound: only decoding the same clips.

    python -m benchmarks.shards
    python -m benchmarks.shards --clips 1000 --samples-per-shard 100 --image-size 224

Renders `--files` h264 clips of `--seconds` (640 x 360, 25 frames per second, moving textures), lists them as `--clips`
samples and decodes them with the same `read_media` calls in one process per core, at most 2: the upper bound. Then runs
the whole stage (plan, Snakemake jobs, JPEG, tars, hashes, near-duplicate search, publishing) on the same cores, into an
empty scratch folder. Prints clips per second of both and their ratio, in wall time and in CPU time (more reliable on a
busy machine), then the time of a second run with one added clip.
Cost: 3 minutes.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
from PIL import Image

from model.frames import read_media
from pipeline_steps.common.errors import run_main
from pipeline_steps.common.files import write_jsonl
from pipeline_steps.common.hashing import sha256_file
from pipeline_steps.shards.__main__ import build
from pipeline_steps.shards.schema import Section

WIDTH, HEIGHT, FPS = 640, 360, 25
MAX_PROCESSES = 2


def make_section(image_size: int, samples_per_shard: int) -> Section:
    return Section(
        image_size=image_size,
        resize_mode="crop",
        hdr="refuse",
        fps=2.0,
        max_frames=64,
        jpeg_quality=95,
        samples_per_shard=samples_per_shard,
        validation_share=0.0,
        test_share=0.0,
        max_quarantined=0.0,
        max_hash_distance=24,
        seed=1,
    )


def write_clip(folder: Path, seconds: int, number: int) -> None:
    """Writes two textures moving in opposite directions, with grain: as costly to decode as ordinary video."""
    rng = np.random.default_rng(number)
    size = (WIDTH * 2, HEIGHT * 2)
    back, front = (
        np.asarray(Image.fromarray(rng.integers(0, 256, (18 * k, 32 * k, 3), np.uint8)).resize(size), np.int16)
        for k in (1, 4)
    )
    with av.open(str(folder / f"{number:04d}.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(FPS), options={"preset": "veryfast", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for t in range(FPS * seconds):
            one = back[t : t + HEIGHT, 2 * t : 2 * t + WIDTH]
            other = front[HEIGHT - t : 2 * HEIGHT - t, WIDTH - 2 * t : 2 * WIDTH - 2 * t]
            grain = rng.integers(-6, 7, (HEIGHT, WIDTH, 1), np.int16)
            pixels = np.clip((2 * one + other) // 3 + grain, 0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))


def write_index(raw: Path, num_files: int, num_clips: int) -> list[Path]:
    """Lists the files as `num_clips` training samples; returns the file of each sample."""
    rows, paths = [], []
    hashes = [sha256_file(raw / f"{i:04d}.mp4") for i in range(num_files)]
    for i in range(num_clips):
        file = i % num_files
        key = f"clip-{i:06d}"
        item = {"user": "What?", "assistant": f"Clip {i}.", "task": "caption"}
        row = {"key": key, "source": "clip", "split": "train", "video_id": key, "path": f"{file:04d}.mp4"}
        rows.append({**row, "kind": "video", "sha256": hashes[file], "items": [item]})
        paths.append(raw / f"{file:04d}.mp4")
    write_jsonl(raw / "index.jsonl", rows)
    return paths


def decode(path: Path, section: Section) -> tuple[int, float]:
    """(frames, CPU seconds of this process) of one clip."""
    start = time.process_time()
    policy = {
        "fps": section.fps,
        "max_frames": section.max_frames,
        "image_size": section.image_size,
        "resize_mode": section.resize_mode,
        "hdr": section.hdr,
    }
    return len(read_media(path, "video", **policy).frames), time.process_time() - start


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    raw, num_processes = folder / "raw", min(MAX_PROCESSES, len(os.sched_getaffinity(0)))
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:num_processes])  # Snakemake's jobs inherit it
    raw.mkdir()
    section = make_section(arguments.image_size, arguments.samples_per_shard)
    with multiprocessing.get_context("spawn").Pool(num_processes) as pool:  # not forked: this process may have threads
        pool.map(partial(write_clip, raw, arguments.seconds), range(arguments.files), chunksize=1)
        paths = write_index(raw, arguments.files, arguments.clips)
        bound = Timer()  # the processes have started
        decoded = list(pool.imap_unordered(partial(decode, section=section), paths, chunksize=4))
        bound.stop()
    num_frames, bound.processor = (sum(column) for column in zip(*decoded, strict=True))
    stage = Timer()
    manifest = build(section, raw, folder / "shards")
    stage.stop()
    train = manifest.splits["train"]
    assert train.num_frames == num_frames
    write_index(raw, arguments.files, arguments.clips + 1)
    again = Timer()
    build(section, raw, folder / "shards")
    again.stop()
    print(f"{arguments.clips} clips, {num_frames} frames of {section.image_size} px, {num_processes} cores")
    for name, timer in (("decoding alone", bound), ("the whole stage", stage)):
        rates = f"{arguments.clips / timer.wall:7.2f} clips/s, {timer.processor / arguments.clips * 1e3:7.0f} ms of"
        print(f"{name:<20}{rates} CPU time per clip")
    print(f"{'ratio':<20}{bound.wall / stage.wall:7.2f}         {bound.processor / stage.processor:7.2f}")
    print(f"{len(train.shards)} shards, {train.bytes / 1e6:.0f} MB; one more clip: {again.wall:.1f} s")


class Timer:
    """Wall-clock seconds, and CPU seconds of this process and its finished children."""

    def __init__(self):
        self.start = time.perf_counter(), sum(os.times()[:4])

    def stop(self) -> None:
        self.wall, self.processor = time.perf_counter() - self.start[0], sum(os.times()[:4]) - self.start[1]


def main() -> None:
    parser = argparse.ArgumentParser(description="Shard building against decoding alone.")
    parser.add_argument("--files", type=int, default=16)
    parser.add_argument("--seconds", type=int, default=10, choices=range(1, 13), metavar="1-12", help="of a clip")
    parser.add_argument("--clips", type=int, default=300)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--samples-per-shard", type=int, default=50)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["RUN_SCRATCH"] = folder
        measure(arguments, Path(folder))


if __name__ == "__main__":
    run_main(main)
