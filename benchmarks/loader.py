"""Throughput of the training data loader, and time and memory of an index with millions of items.

    python -m benchmarks.loader                        all benchmarks
    python -m benchmarks.loader --only index --items 4500000

`speed`: clips of 8 frames of 224 px, packed as the stage `shards` packs them, measured in alternating rounds, so
that other load on the machine affects all variants equally:
    raw           Pillow decodes the same JPEG files from memory, in as many threads (ours decodes with simplejpeg)
    raw_batches   the same, keeping the pixels of a batch (as every loader must), which exceed the CPU caches
    pixels        our loader up to the decoded frames, in batches
    normalised    raw, then the pixels as float32, normalised
    loader        our loader: whole batches of tokens and uint8 pixels, normalised on the device
    webdataset    plain `WebDataset(...).shuffle().decode("pil")` in a DataLoader with as many workers: no batches
Rates are medians over the rounds, ratios are medians of the per-round ratios. "per CPU second" divides by
CPU time instead of wall time; other load hardly affects it.
`index`: sidecars of `--items` items in shards of 1,000 are written to a temporary folder once, then opened in a new
process: seconds, memory, and random items per second.
Cost: 3 minutes on two cores; 5 GB on the disk for 4.5 million items.
"""

import argparse
import io
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
from PIL import Image

from model.processing_foveated_vlm import normalise
from pipeline_steps.common import params, sidecar
from pipeline_steps.common.errors import run_main
from pipeline_steps.common.files import write_json
from pipeline_steps.common.hashing import sha256_file
from pipeline_steps.common.schemas import (
    FramePolicy,
    ShardEntry,
    ShardsManifest,
    SplitEntry,
    TokensEntry,
    TokensManifest,
    TokensSplit,
)
from pipeline_steps.streaming.collate import Collator
from pipeline_steps.streaming.dataset import TokenizedShards
from pipeline_steps.streaming.loader import Loader, plan_stage

SIZE, NUM_FRAMES, NUM_TOKENS, BATCH = 224, 8, 120, 16
ROUNDS = 7
RATIOS = (
    ("pixels", "raw"),
    ("pixels", "raw_batches"),
    ("loader", "normalised"),
    ("loader", "raw"),
    ("pixels", "webdataset"),
    ("loader", "webdataset"),
)
MIB = 2**20


# ---------------------------------------------------------------- data


def write_clips(root: Path, num_clips: int, clips_per_shard: int) -> None:
    """Writes packed clips of smooth random images, about 12 kB per frame as in real videos."""
    rng = np.random.default_rng(0)
    shards, tokens = [], []
    for folder in ("shards", "tokens"):
        (root / folder / "train").mkdir(parents=True)
    for number, start in enumerate(range(0, num_clips, clips_per_shard)):
        path, rows = root / f"shards/train/{number:06d}.tar", []
        with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
            for clip in range(start, min(start + clips_per_shard, num_clips)):
                places = [add(tar, f"clip-{clip}.{frame:03d}.jpg", picture(rng)) for frame in range(NUM_FRAMES)]
                rows.append(row(clip, places, add(tar, f"clip-{clip}.json", b"{}")))
        tokens_path = root / f"tokens/train/{number:06d}.arrow"
        sidecar.write(tokens_path, rows)
        shards.append(shard_entry(number, len(rows), path))
        tokens.append(tokens_entry(number, len(rows), tokens_path, shards[-1]))
    write_manifests(root, shards, tokens)


def picture(rng: np.random.Generator) -> bytes:
    small = rng.integers(0, 256, (28, 28, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> tuple[int, int]:
    member = tarfile.TarInfo(name)
    member.size, offset = len(content), tar.offset + tarfile.BLOCKSIZE
    tar.addfile(member, io.BytesIO(content))
    return offset, len(content)


def row(number: int, places: list[tuple[int, int]], sample: tuple[int, int], **columns) -> dict:
    answer = [at >= NUM_TOKENS - 20 for at in range(NUM_TOKENS)]
    return dict.fromkeys(sidecar.SCHEMA.names) | {
        "key": f"clip-{number}",
        "item": 0,
        "source": "clips",
        "task": "caption",
        "kind": "video",
        "num_frames": NUM_FRAMES,
        "frame_times": [0.5 * frame for frame in range(NUM_FRAMES)],
        "frame_offsets": [offset for offset, _ in places],
        "frame_sizes": [size for _, size in places],
        "sample_offset": sample[0],
        "sample_size": sample[1],
        "input_ids": [(number + at) % 40_000 for at in range(NUM_TOKENS)],
        "visual_position": 30,
        "answer_mask": answer,
        "score_mask": answer,
        "truncated_turns": 0,
        "answer": "a caption of some words, as long as they are",
        "cue": "",
        **columns,
    }


def shard_entry(number: int, num_samples: int, tar: Path | None) -> ShardEntry:
    """tar: None where there is none, as for measurements of the index."""
    counts = {"num_samples": num_samples, "num_frames": num_samples * NUM_FRAMES, "seconds": 4.0 * num_samples}
    size, sha256 = (tar.stat().st_size, sha256_file(tar)) if tar else (1, str(number))
    return ShardEntry(name=f"{number:06d}.tar", **counts, bytes=size, sha256=sha256)


def tokens_entry(number: int, num_items: int, path: Path, shard: ShardEntry) -> TokensEntry:
    counts = {"num_items": num_items, "num_tokens": num_items * NUM_TOKENS}
    return TokensEntry(name=path.name, **counts, shard_sha256=shard.sha256, sha256=sha256_file(path))


def write_manifests(root: Path, shards: list[ShardEntry], tokens: list[TokensEntry]) -> None:
    totals = {name: sum(getattr(s, name) for s in shards) for name in ("num_samples", "num_frames", "seconds", "bytes")}
    items = {name: sum(getattr(t, name) for t in tokens) for name in ("num_items", "num_tokens")}
    count = items["num_items"]
    policy = FramePolicy(image_size=SIZE, resize_mode="crop", fps=2.0, max_frames=NUM_FRAMES, jpeg_quality=90)
    packed = ShardsManifest(
        splits={"train": SplitEntry(shards=tuple(shards), **totals)},
        seen=totals["num_samples"],
        packed=totals["num_samples"],
        quarantined=(),
        sources={},
        frames=policy,
    )
    write_json(root / "shards/manifest.json", packed)
    made = TokensManifest(
        splits={"train": TokensSplit(shards=tuple(tokens), **items)},
        seen=count,
        kept=count,
        dropped=(),
        truncated=(),
        tasks={},
        sources={"clips": {"seen": count, "kept": count, "truncated": 0, "dropped": 0, "tokens": 0}},
        tokenizer_sha256="",
        vocabulary_size=49_152,
        max_tokens=NUM_TOKENS,
        system="",
    )
    write_json(root / "tokens/manifest.json", made)


# ---------------------------------------------------------------- speed


def sections(num_workers: int) -> tuple[SimpleNamespace, SimpleNamespace, SimpleNamespace]:
    """The sections `streaming`, `runtime` and `training.<stage>` of a run over all clips."""
    batching = SimpleNamespace(by="samples", budget=None, bucket_samples=0)
    streaming = SimpleNamespace(image_replication=1, batching=batching, max_quarantined=0.0)
    runtime = SimpleNamespace(num_workers=num_workers, prefetch_megabytes=512)
    entry = SimpleNamespace(source="*", task="*", weight=1.0)
    return streaming, runtime, SimpleNamespace(mixture=(entry,), text_share=0.0, text_source="*", num_samples=0)


def ours(dataset: TokenizedShards, num_workers: int, collate) -> int:
    """Runs one epoch of our loader; returns the number of samples."""
    streaming, runtime, stage = sections(num_workers)
    stage.num_samples = len(dataset)
    sizes = {"batch_size": BATCH, "tokens_per_frame": 1}
    served = plan_stage(dataset, stage, streaming, stage="stage1", seed=0, **sizes)
    return sum(len(batch.keys) for batch in Loader(dataset, served, collate, streaming, runtime))


class PixelsOnly:
    """Stands in for a collator and returns the decoded frames unchanged."""

    tokens_per_frame = 1

    def __call__(self, items: list[dict]) -> SimpleNamespace:
        return SimpleNamespace(keys=[item["key"] for item in items], frames=[item["frames"] for item in items])


def decode_clip(jpegs: list[bytes]) -> np.ndarray:
    pixels = []
    for content in jpegs:
        with Image.open(io.BytesIO(content)) as picture:
            pixels.append(np.asarray(picture))
    return np.stack(pixels)


def raw(clips: list[list[bytes]], num_workers: int, then=lambda pixels: pixels) -> int:
    """Decodes clips from memory with Pillow; returns the number of samples."""
    with ThreadPoolExecutor(num_workers) as pool:
        return sum(1 for _ in pool.map(lambda jpegs: then(decode_clip(jpegs)).shape, clips))


def raw_batches(clips: list[list[bytes]], num_workers: int) -> int:
    """`raw`, but keeps the pixels of a batch as the loader does; they exceed the CPU caches."""
    batches = [clips[start : start + BATCH] for start in range(0, len(clips), BATCH)]
    with ThreadPoolExecutor(num_workers) as pool:
        return sum(pool.map(lambda batch: len([decode_clip(jpegs) for jpegs in batch]), batches))


def plain_webdataset(root: Path, num_workers: int) -> int:
    import webdataset
    from torch.utils.data import DataLoader

    urls = sorted(map(str, (root / "shards/train").glob("*.tar")))
    samples = webdataset.WebDataset(urls, shardshuffle=len(urls)).shuffle(100).decode("pil")
    return sum(1 for _ in DataLoader(samples, batch_size=None, num_workers=num_workers))


def measure_speed(root: Path, num_clips: int, num_workers: int, rounds: int) -> dict:
    """Samples per second and ratios, medians of the rounds."""
    write_clips(root, num_clips, max(num_clips // 8, 1))
    dataset = TokenizedShards(root / "shards", root / "tokens", "train")
    clips = [dataset.read(number).jpegs for number in range(len(dataset))]
    options = {"layout": "question_first", "loss": "answer_only", "image_replication": 1}
    collate = Collator(**options, tokens_per_frame=1, visual_id=49_152, bos_id=1, pad_id=0)
    runs = {
        "raw": lambda: raw(clips, num_workers),
        "raw_batches": lambda: raw_batches(clips, num_workers),
        "pixels": lambda: ours(dataset, num_workers, PixelsOnly()),
        "normalised": lambda: raw(clips, num_workers, normalise),
        "loader": lambda: ours(dataset, num_workers, collate),
        "webdataset": lambda: plain_webdataset(root, num_workers),
    }
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}  # (per second, per CPU second)
    for _ in range(rounds + 1):
        for name, run in runs.items():
            started, cpu = time.perf_counter(), cpu_seconds()
            count = run()
            assert count == num_clips, f"{name} gave {count} of {num_clips} clips"
            rates[name].append((count / (time.perf_counter() - started), count / (cpu_seconds() - cpu)))
    rates = {name: values[1:] for name, values in rates.items()}  # the first round warms up
    result = {"frame_bytes": round(statistics.mean(len(jpeg) for jpegs in clips for jpeg in jpegs))}
    for at, unit in enumerate(("second", "cpu_second")):
        one = {name: [pair[at] for pair in values] for name, values in rates.items()}
        result[f"samples_per_{unit}"] = {name: statistics.median(values) for name, values in one.items()}
        result[f"ratio_per_{unit}"] = {
            f"{name}_to_{other}": statistics.median(a / b for a, b in zip(one[name], one[other], strict=True))
            for name, other in RATIOS
        }
    return result


def cpu_seconds() -> float:
    """CPU time of this process and of its finished children; other processes do not affect it."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


# ---------------------------------------------------------------- index


def write_index(root: Path, num_items: int, items_per_shard: int = 1_000) -> None:
    """Writes sidecars and manifests without tars. Keys and lengths differ between shards, token ids do not."""
    rng = np.random.default_rng(0)
    for folder in ("shards", "tokens"):
        (root / folder / "train").mkdir(parents=True)
    shards, tokens = [], []
    places = [(512 * (2 * frame + 1), 9_000) for frame in range(NUM_FRAMES)]
    names = [("openvid", "caption"), ("llava-video", "question"), ("cauldron", "chart"), ("smoltalk", "chat")]
    rows = []
    for number in range(min(items_per_shard, num_items)):
        source, task = names[number % 4]
        rows.append(row(number, places, (99_000, 700), source=source, task=task))
    table = pa.Table.from_pylist(rows, schema=sidecar.SCHEMA)
    for number in range(-(-num_items // items_per_shard)):
        count = min(items_per_shard, num_items - number * items_per_shard)
        keys = pa.array([f"clip-{number * items_per_shard + at:08d}" for at in range(count)])
        frames = pa.array(rng.integers(1, 65, count), pa.int32())
        own = table.slice(0, count).set_column(0, "key", keys)
        own = own.set_column(sidecar.SCHEMA.get_field_index("num_frames"), "num_frames", frames).combine_chunks()
        path = root / f"tokens/train/{number:06d}.arrow"
        with pa.ipc.new_file(str(path), sidecar.SCHEMA) as writer:
            writer.write_table(own)
        shards.append(shard_entry(number, count, None))
        tokens.append(tokens_entry(number, count, path, shards[-1]))
    write_manifests(root, shards, tokens)


def memory() -> dict[str, float]:
    """MiB of this process: `own` memory, and `mapped` file pages, which the system can reclaim."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(status[field].split()[0]) / 1024 for name, field in (("own", "RssAnon"), ("mapped", "RssFile"))}


class Peak(threading.Thread):
    """Context manager: peak of `own` memory inside the block, sampled every 5 ms."""

    def __enter__(self):
        self.own, self.ended = memory()["own"], threading.Event()
        self.start()
        return self

    def run(self):
        while not self.ended.wait(0.005):
            self.own = max(self.own, memory()["own"])

    def __exit__(self, *problem):
        self.ended.set()
        self.join()


def open_index(root: Path) -> dict:
    """Opens the index and plans a stage in this process; returns times and memory."""
    before, started = memory(), time.perf_counter()
    with Peak() as opening:
        dataset = TokenizedShards(root / "shards", root / "tokens", "train", with_frames=False)
    opened, after = time.perf_counter() - started, memory()
    streaming, _, stage = sections(0)
    stage.num_samples = len(dataset)
    started = time.perf_counter()
    with Peak() as planning:
        plan_stage(dataset, stage, streaming, stage="stage1", seed=0, batch_size=BATCH, tokens_per_frame=1)
    planned = time.perf_counter() - started
    numbers = np.random.default_rng(0).integers(0, len(dataset), 20_000).tolist()
    started = time.perf_counter()
    for number in numbers:
        dataset.rows[number]
    rows = len(numbers) / (time.perf_counter() - started)
    columns = sum(array.nbytes for array in vars(dataset.index).values() if isinstance(array, np.ndarray))
    return {
        "items": len(dataset),
        "shards": len(dataset.shards),
        "open_seconds": opened,
        "open_own_mib": after["own"] - before["own"],
        "open_own_peak_mib": opening.own - before["own"],
        "open_mapped_mib": after["mapped"] - before["mapped"],
        "column_bytes_per_item": columns / len(dataset),
        "plan_seconds": planned,
        "plan_own_peak_mib": planning.own - before["own"],
        "random_rows_per_second": rows,
    }


def measure_index(root: Path, num_items: int) -> dict:
    """`open_index` in a new process, on newly written files."""
    write_index(root, num_items)
    size = sum(path.stat().st_size for path in root.rglob("*.arrow"))
    call = [sys.executable, "-m", "benchmarks.loader", "--open", str(root)]
    done = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True, cwd=params.ROOT)
    return {**json.loads(done.stdout), "sidecars_mib": size / MIB}


# ---------------------------------------------------------------- command


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Speed of the loader, time and memory of its index.")
    parser.add_argument("--only", choices=("speed", "index"))
    parser.add_argument("--clips", type=int, default=256)
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--items", type=int, default=4_500_000)
    parser.add_argument("--folder", type=Path, help="parent of the temporary folder (default: the system's)")
    parser.add_argument("--output", type=Path, help="also write the numbers to this JSON file")
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)  # the process that `index` starts
    return parser.parse_args()


def main() -> None:
    arguments = read_arguments()
    if arguments.open:
        print(json.dumps(open_index(arguments.open)))
        return
    result = {}
    for name in ("speed", "index"):
        if arguments.only not in (None, name):
            continue
        root = Path(tempfile.mkdtemp(dir=arguments.folder))
        try:
            result[name] = (
                measure_speed(root, arguments.clips, arguments.num_workers, arguments.rounds)
                if name == "speed"
                else measure_index(root, arguments.items)
            )
        finally:
            shutil.rmtree(root)
        print(table(name, result[name]))
    if arguments.output:
        write_json(arguments.output, result)


def table(name: str, values: dict) -> str:
    lines = [name]
    for key, value in values.items():
        for inner, number in value.items() if isinstance(value, dict) else [("", value)]:
            label = f"{key} {inner}".replace("_", " ")
            lines.append(
                f"  {label:<36}{number:>14,.2f}" if isinstance(number, float) else f"  {label:<36}{number:>14,}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
