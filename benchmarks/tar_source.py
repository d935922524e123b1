"""Time and memory of the source `tars`: archives of pictures, and one archive of many text samples.

python -m benchmarks.tar_source [--num-tars 8] [--num-text 300000] [--num-processes 2] [--folder /tmp]

Writes archives of 1,000 samples of 8 random frames (JPEG-sized bytes) and one of text samples, then reads them through
the source: the frames in one process and in `--num-processes`, the text in one. Prints samples/s, MB/s and the growth
of the peak memory. Cost: half a minute on two cores, 1.2 GB of disk.
"""

import argparse
import io
import json
import os
import resource
import tarfile
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from pipeline_steps.sources import tars

FRAMES, FRAME_BYTES, SAMPLES = 8, 12_000, 1000  # of one archive of pictures


def write(path, samples, frames):
    with tarfile.open(path, "w") as tar:
        for number in range(samples):
            members = [(f"{number:08d}.{i:03d}.jpg", os.urandom(FRAME_BYTES)) for i in range(frames)]
            contents = {"user": f"What is {number}?" * 4, "assistant": f"It is {number}.", "frame_count": frames}
            members.append((f"{number:08d}.json", json.dumps(contents).encode()))
            for name, content in members:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            tar.members = []  # drop the member list, whose memory would mask the reader's


def measure(folder, name, num_processes):
    entry = SimpleNamespace(path=str(folder / f"{name}*.tar"), name=name, picture_fps=1.0, tokenizer=None, split=None)
    size = sum(path.stat().st_size for path in folder.glob(f"{name}*.tar"))
    before, start, count, bad = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter(), 0, []
    for _ in tars.read(entry, folder, bad, lambda *left: None, num_processes):
        count += 1
    seconds = time.perf_counter() - start
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    print(
        f"{name}, {num_processes} process(es): {count} samples, {size / 1e6:.0f} MB in {seconds:.1f} s: "
        f"{count / seconds:.0f} samples/s, {size / seconds / 1e6:.0f} MB/s; {grown / count:.0f} bytes of RAM per sample"
    )


def main():
    parser = argparse.ArgumentParser(description="Time and memory of the source `tars`.")
    parser.add_argument("--num-tars", type=int, default=8)
    parser.add_argument("--num-text", type=int, default=300_000)
    parser.add_argument("--num-processes", type=int, default=2)
    parser.add_argument("--folder", help="parent of the temporary folder (default: the system's)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        folder = Path(folder)
        for number in range(arguments.num_tars):
            write(folder / f"frames{number:04d}.tar", SAMPLES, FRAMES)
        write(folder / "text.tar", arguments.num_text, 0)
        measure(folder, "frames", 1)
        measure(folder, "frames", arguments.num_processes)
        measure(folder, "text", 1)


if __name__ == "__main__":
    main()
