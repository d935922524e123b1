"""Small packed data sets, written directly: shards, sidecars and their manifests, for the tests of the loader."""

import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline_steps.common import params, sidecar
from pipeline_steps.common.files import to_json, write_json
from pipeline_steps.common.hashing import sha256_file
from pipeline_steps.common.schemas import (
    FramePolicy,
    PackedSample,
    ShardEntry,
    ShardsManifest,
    SplitEntry,
    TokensEntry,
    TokensManifest,
    TokensSplit,
)
from pipeline_steps.streaming import index
from pipeline_steps.streaming.collate import Collator
from pipeline_steps.streaming.dataset import TokenizedShards

SIZE = 16  # px
POLICY = FramePolicy(image_size=SIZE, resize_mode="crop", fps=2.0, max_frames=8, jpeg_quality=90)
SETTINGS = params.read(params.ROOT / "params.yaml", "streaming", "training")


@dataclass
class Clip:
    """One packed sample; item i asks a question of the task `tasks[i]`."""

    key: str
    kind: str = "video"
    num_frames: int = 2
    num_tokens: int = 8
    source: str = "world"
    tasks: tuple[str, ...] = ("card",)


def clips(num_samples: int, text_every: int = 0) -> list[Clip]:
    """Videos of three tasks and two sources with different lengths; every `text_every`-th sample is a chat."""
    made = []
    for n in range(num_samples):
        if text_every and n % text_every == 0:
            made.append(Clip(f"chat-{n:04d}", "text", 0, 6 + n % 5, "chat", ("text",)))
        else:
            kind = "image" if n % 7 == 3 else "video"
            frames = 1 if kind == "image" else 1 + n % 4
            source = ("world", "films")[n % 3 == 1]
            made.append(Clip(f"{source}-{n:04d}", kind, frames, 8 + n % 9, source, (("card", "gist", "image")[n % 3],)))
    return made


def row(clip: Clip, item: int = 0, number: int = 0) -> dict:
    """A sidecar row; the tokens tell the sample's number."""
    length = clip.num_tokens
    answer = [at >= length - 3 for at in range(length)]
    return dict.fromkeys(sidecar.SCHEMA.names) | {
        "key": clip.key,
        "item": item,
        "source": clip.source,
        "task": clip.tasks[item],
        "kind": clip.kind,
        "num_frames": clip.num_frames,
        "frame_times": [frame / 2 for frame in range(clip.num_frames)],
        "frame_offsets": [],
        "frame_sizes": [],
        "sample_offset": 0,
        "sample_size": 0,
        "input_ids": [(number + at) % 90 + 3 for at in range(length)],
        "visual_position": length - 4,
        "answer_mask": answer,
        "score_mask": [*answer[:-1], False],
        "truncated_turns": 0,
        "answer": "a",
        "cue": "",
    }


def picture(number: int, frame: int) -> bytes:
    pixels = np.full((SIZE, SIZE, 3), (number * 37 % 256, frame * 60 % 256, 128), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def write_shard(path: Path, samples: list[tuple[int, Clip]]) -> list[dict]:
    """The tar of these samples, and the rows of its sidecar."""
    rows = []
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for number, clip in samples:
            places = []
            for frame in range(clip.num_frames):
                name = f"{clip.key}.jpg" if clip.kind == "image" else f"{clip.key}.{frame:03d}.jpg"
                places.append(add(tar, name, picture(number, frame)))
            record = add(tar, f"{clip.key}.json", to_json(packed_sample(clip)).encode())
            where = {"frame_offsets": [offset for offset, _ in places], "frame_sizes": [size for _, size in places]}
            where |= {"sample_offset": record[0], "sample_size": record[1]}
            rows += [row(clip, item, number) | where for item in range(len(clip.tasks))]
    return rows


def add(tar: tarfile.TarFile, name: str, content: bytes) -> tuple[int, int]:
    """(offset, size) of the new member's content."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    offset = tar.offset + 512
    tar.addfile(member, io.BytesIO(content))
    return offset, len(content)


def packed_sample(clip: Clip) -> PackedSample:
    media = {} if clip.kind == "text" else {"path": "x", "sha256": "x"}
    items = tuple({"user": "What?", "assistant": "a", "task": task} for task in clip.tasks)
    options = {"timestamps": (0.0,) * clip.num_frames, "duration": 1.0, "width": SIZE, "height": SIZE}
    return PackedSample(
        key=clip.key,
        source=clip.source,
        split="train",
        video_id=clip.key,
        kind=clip.kind,
        items=items,
        frame_count=clip.num_frames,
        **media,
        **options,
    )


def write(root: Path, samples: list[Clip], samples_per_shard: int, split: str = "train") -> Path:
    """root/shards and root/tokens with one split; returns root."""
    for folder in ("shards", "tokens"):
        (root / folder / split).mkdir(parents=True)
    shards, tokens = [], []
    for start in range(0, len(samples), samples_per_shard):
        tar = root / "shards" / split / f"{start // samples_per_shard:06d}.tar"
        part = list(enumerate(samples))[start : start + samples_per_shard]
        rows = write_shard(tar, part)
        path = root / "tokens" / split / f"{tar.stem}.arrow"
        sidecar.write(path, rows)
        frames = sum(clip.num_frames for _, clip in part)
        sha256 = sha256_file(tar)
        entry = {"name": tar.name, "num_samples": len(part), "num_frames": frames, "seconds": 1.0}
        shards.append(ShardEntry(**entry, bytes=tar.stat().st_size, sha256=sha256))
        counts = {"num_items": len(rows), "num_tokens": sum(len(entry["input_ids"]) for entry in rows)}
        tokens.append(TokensEntry(name=path.name, **counts, shard_sha256=sha256, sha256=sha256_file(path)))
    write_manifests(root, split, shards, tokens)
    return root


def write_manifests(root: Path, split: str, shards: list[ShardEntry], tokens: list[TokensEntry]) -> None:
    num_samples, num_items = sum(s.num_samples for s in shards), sum(t.num_items for t in tokens)
    totals = {name: sum(getattr(s, name) for s in shards) for name in ("num_frames", "seconds", "bytes")}
    entry = SplitEntry(shards=tuple(shards), num_samples=num_samples, **totals)
    manifest = ShardsManifest(
        splits={split: entry}, seen=num_samples, packed=num_samples, quarantined=(), sources={}, frames=POLICY
    )
    write_json(root / "shards/manifest.json", manifest)
    counts = {"num_items": num_items, "num_tokens": sum(t.num_tokens for t in tokens)}
    manifest = TokensManifest(
        splits={split: TokensSplit(shards=tuple(tokens), **counts)},
        seen=num_items,
        kept=num_items,
        dropped=(),
        truncated=(),
        tasks={},
        sources={"all": {"seen": num_items, "kept": num_items, "truncated": 0, "dropped": 0, "tokens": 0}},
        tokenizer_sha256="x",
        vocabulary_size=100,
        max_tokens=64,
        system="",
    )
    write_json(root / "tokens/manifest.json", manifest)


def rewrite_hashes(root: Path, split: str = "train") -> None:
    """Makes the manifests name the hashes that the tars have now."""
    shards, tokens = (json.loads((root / name / "manifest.json").read_text()) for name in ("shards", "tokens"))
    for tar, arrow in zip(shards["splits"][split]["shards"], tokens["splits"][split]["shards"], strict=True):
        tar["sha256"] = arrow["shard_sha256"] = sha256_file(root / "shards" / split / tar["name"])
    write_json(root / "shards/manifest.json", shards)
    write_json(root / "tokens/manifest.json", tokens)


def open_split(root: Path, **options) -> TokenizedShards:
    return TokenizedShards(root / "shards", root / "tokens", "train", **options)


def columns_only(samples: list[Clip]) -> SimpleNamespace:
    """What planning needs of a `TokenizedShards`, without any file: `index` and `rows`, one item per task."""
    rows = [row(clip, item, number) for number, clip in enumerate(samples) for item in range(len(clip.tasks))]
    table = pa.RecordBatch.from_pylist(rows, schema=sidecar.SCHEMA)
    names = {"tokens_dir": "tokens", "shards_dir": "shards", "split": "train", "sequential": False}
    return SimpleNamespace(index=index.build([table]), rows=index.Rows([table]), **names)


def collator(image_replication: int = 2) -> Collator:
    return Collator(
        layout="question_first",
        loss="answer_only",
        image_replication=image_replication,
        tokens_per_frame=1,
        visual_id=99,
        bos_id=1,
        pad_id=0,
    )


def streaming(**changes):
    """The section `streaming` of params.yaml with changes; `batching` as a dict of its keys that differ."""
    batching = SETTINGS.streaming.batching.model_copy(update=changes.pop("batching", {}))
    return SETTINGS.streaming.model_copy(update={"image_replication": 2, "batching": batching, **changes})


def runtime(**changes):
    """The section `runtime` of params.yaml with changes."""
    return SETTINGS.runtime.model_copy(update=changes)


def stage(name: str = "stage2", **changes):
    """The section of a training stage of params.yaml with changes."""
    return getattr(SETTINGS.training, name).model_copy(update=changes)
