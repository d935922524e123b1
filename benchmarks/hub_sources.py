"""Speed and memory of the source `hub`, compared with iterating the rows with `datasets` alone.

    python -m benchmarks.hub_sources [--num-chats 150000] [--num-pictures 30000] [--folder /tmp]

Local copies of SmolTalk (chats of 6 turns, 1 kB) and of one subset of The Cauldron (a picture of 20 kB per row, 1000
rows per row group) are generated at the given size and at a third of it; each is read in a separate process.
Seconds are CPU time of all threads. Memory is the peak above the level after the imports.
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline_steps.sources.hub import reader, tables
from pipeline_steps.sources.hub.registry import ADAPTERS

ROWS_PER_GROUP = 1000


def write_chats(path, count):
    def rows(numbers):
        for number in numbers:
            turns = [f"Turn {turn} of chat {number}. " * 6 for turn in range(6)]
            yield [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]

    _write(path / "data/all/train-00000.parquet", count, lambda numbers: {"messages": list(rows(numbers))})


def write_pictures(path, count):
    rng = np.random.default_rng(1)

    def columns(numbers):
        pictures = [[{"bytes": rng.bytes(20_000), "path": None}] for _ in numbers]
        texts = [[{"user": "What is it?", "assistant": f"Number {number}.", "source": "x"}] for number in numbers]
        return {"images": pictures, "texts": texts}

    _write(path / "vqav2/train-00000.parquet", count, columns)


def _write(path, count, columns):
    path.parent.mkdir(parents=True)
    writer = None
    for start in range(0, count, ROWS_PER_GROUP):
        table = pa.table(columns(range(start, min(start + ROWS_PER_GROUP, count))))
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    writer.close()


def measure(name, subset, path, results):
    """Runs in a separate process; puts (rows, seconds, seconds of reading rows alone, bytes of memory) into
    `results`."""
    import datasets  # noqa: F401 - imported up front to exclude it from the measurement

    entry = SimpleNamespace(dataset=name, path=str(path), revision=None, subsets=[subset], media_dir=None)
    entry.max_samples, entry.max_missing = None, 0.0
    adapter = ADAPTERS[name]
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with tempfile.TemporaryDirectory(dir=path) as output:
        for _ in reader.read(entry, Path(output), []):
            pass
    seconds = time.process_time() - start
    memory = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    start = time.process_time()
    count = sum(1 for table in tables.chosen_tables(entry, adapter) for _ in tables.read_rows(entry, adapter, table))
    results.put((count, seconds, time.process_time() - start, memory))


def main():
    parser = argparse.ArgumentParser(description="Speed and memory of source hub.")
    parser.add_argument("--num-chats", type=int, default=150_000)
    parser.add_argument("--num-pictures", type=int, default=30_000)
    parser.add_argument("--folder", help="parent of the temporary folder (default: the system's)")
    arguments = parser.parse_args()
    cases = [("smoltalk", "stage1", write_chats, arguments.num_chats)]
    cases += [("cauldron", "vqav2", write_pictures, arguments.num_pictures)]
    print("data set  rows    rows/s  rows alone/s  memory")
    for name, subset, write, count in cases:
        for size in (count // 3, count):
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                write(Path(folder), size)
                results = multiprocessing.get_context("spawn").SimpleQueue()
                process = multiprocessing.get_context("spawn").Process(
                    target=measure, args=(name, subset, Path(folder), results)
                )
                process.start()
                rows, seconds, alone, memory = results.get()
                process.join()
            print(f"{name:8}  {rows:6}  {rows / seconds:6.0f}  {rows / alone:12.0f}  {memory / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
