"""Time and memory of shard planning for many samples, and of the near-duplicate search over their hashes.

    python -m benchmarks.shard_plan                              # a million rows
    python -m benchmarks.shard_plan --rows 4500000 --queries 20000

Writes an index of simulated rows (videos with a question and an answer, a fifth of them text-only, no split given) to a
temporary folder and runs the steps of `python -m pipeline_steps.shards` before packing: read, assign splits, plan,
write the plan of every shard, and again with all plans written. Then searches `--queries` random held-out hashes among
one hash per row. Time is CPU time (everything runs on one core); memory is the peak above the start of the process.
Cost for a million rows: 3 minutes, 2 GB of disk.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from pipeline_steps.common.errors import run_main
from pipeline_steps.common.schemas import FramePolicy
from pipeline_steps.shards.hashes import NUM_FRAMES, WORDS
from pipeline_steps.shards.index import read_index
from pipeline_steps.shards.leaks import near_duplicates, text_leaks
from pipeline_steps.shards.pack import Settings
from pipeline_steps.shards.plan import assign_splits, plan_shards
from pipeline_steps.shards.scratch import write_plans

SEED, SHARE = 1, 0.005  # of validation and of test
DISTANCE = 24  # bits
TEXT = "What does the person on the left do after the door has been opened, and who is watching? " * 3
ANSWER = "She puts the box on the table and sits down. " * 4
FRAMES = FramePolicy(image_size=224, resize_mode="crop", fps=2.0, max_frames=64, jpeg_quality=95)


def write_rows(path: Path, num_rows: int) -> None:
    with open(path, "w") as file:
        for i in range(num_rows):
            text = i % 5 == 0
            row = {
                "key": f"simulated-{i:08d}-train-clip",
                "source": "simulated",
                "split": None,
                "video_id": f"video-{i // 2:08d}",
                "path": None if text else f"videos/{i:08d}.mp4",
                "kind": "text" if text else "video",
                "sha256": None if text else f"{i:064x}",
                "items": [{"user": f"{TEXT}{i}", "assistant": ANSWER, "task": "question"}],
            }
            file.write(json.dumps(row) + "\n")


class Steps:
    """Prints CPU seconds and peak memory after every step."""

    def __init__(self, num_rows: int):
        self.num_rows, self.base, self.started = num_rows, peak_bytes(), time.process_time()

    def done(self, name: str) -> None:
        seconds = time.process_time() - self.started
        memory = peak_bytes() - self.base
        per_row = f"{seconds / self.num_rows * 1e6:8.1f} us a row{memory / self.num_rows:8.0f} bytes a row at the peak"
        print(f"{name:<34}{seconds:8.1f} s{per_row}", flush=True)
        self.started = time.process_time()


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(num_rows: int, num_queries: int, samples_per_shard: int, folder: Path) -> None:
    write_rows(folder / "index.jsonl", num_rows)
    size = (folder / "index.jsonl").stat().st_size
    print(f"{num_rows} rows, {size / num_rows:.0f} bytes each, {samples_per_shard} samples a shard at most")
    steps = Steps(num_rows)
    index = read_index(folder / "index.jsonl", SEED)
    steps.done("read and check the index")
    splits = assign_splits(index, SHARE, SHARE)
    steps.done("assign splits")
    assert not text_leaks(index, splits)
    steps.done("find equal chats")
    plan = plan_shards(index, splits, samples_per_shard)
    steps.done(f"plan {len(plan)} shards")
    settings = Settings(raw_dir=str(folder), frames=FRAMES)
    for name in ("write the plans", "once more, nothing changed"):
        write_plans(index, plan, settings, folder / "scratch")
        steps.done(name)
    rng = np.random.default_rng(SEED)
    references = rng.integers(0, 2**64, (num_rows, NUM_FRAMES, WORDS), np.uint64)
    near_duplicates(rng.integers(0, 2**64, (num_queries, NUM_FRAMES, WORDS), np.uint64), references, DISTANCE)
    steps.done(f"{num_queries} samples, near-duplicates")


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of planning shards for many samples.")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--samples-per-shard", type=int, default=1000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(arguments.rows, arguments.queries, arguments.samples_per_shard, Path(folder))


if __name__ == "__main__":
    run_main(main)
