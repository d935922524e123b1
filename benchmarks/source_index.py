"""Memory and time of the `sources` stage's index for many text samples.

    python -m benchmarks.source_index [--num-samples 1000000] [--folder /tmp]

Adds generated text samples with unsorted keys to an index in a temporary folder and writes index.jsonl; prints seconds
and the growth of the peak memory. Cost for a million samples: half a minute on one core, 1 GB of disk.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

from pipeline_steps.common.schemas import RawSample
from pipeline_steps.sources.index import open_index


def samples(count):
    for number in range(count):
        key = f"smoltalk-train-00000-of-00009-{(number * 7919) % count:08d}"  # unsorted order
        item = {
            "user": f"What comes after {number}?" * 4,
            "assistant": f"After it comes {number + 1}.",
            "task": "text",
        }
        yield RawSample(key=key, source="smoltalk", video_id=key, kind="text", items=(item,))


def main():
    parser = argparse.ArgumentParser(description="Memory and time of the index of raw samples.")
    parser.add_argument("--num-samples", type=int, default=1_000_000)
    parser.add_argument("--folder", help="parent of the temporary folder (default: the system's)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder, open_index(Path(folder)) as index:
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        index.add_source("smoltalk", samples(arguments.num_samples), [], 0.0)
        summary = index.finish()
        seconds = time.perf_counter() - start
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        size = (Path(folder) / "index.jsonl").stat().st_size
    per_sample = grown / summary["num_samples"]
    print(f"{summary['num_samples']} samples, {size / 1e6:.0f} MB of index.jsonl in {seconds:.1f} s")
    print(f"memory: {grown / 1e6:.0f} MB above the start, {per_sample:.0f} bytes per sample")


if __name__ == "__main__":
    main()
