"""Tokenise one shard: check the tar, tokenise its items, write the sidecar. Shards are independent jobs."""

import tarfile
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from pipeline_steps.common import sidecar
from pipeline_steps.common.errors import UserError
from pipeline_steps.common.files import parse
from pipeline_steps.common.hashing import sha256_file
from pipeline_steps.common.processes import map_in_processes
from pipeline_steps.common.schemas import Dropped, PackedSample, ShardEntry, TokensEntry
from pipeline_steps.tokens.chat import ChatRenderer, load_tokenizer
from pipeline_steps.tokens.rows import tokenize_samples

RERUN = "Run `dvc repro shards`."
COUNTS = ("seen", "kept", "truncated", "dropped", "tokens")  # of SourceCounts


@dataclass(frozen=True)
class Job:
    """A shard to tokenise and the path of its sidecar."""

    split: str
    tar: Path
    entry: ShardEntry
    output: Path
    max_tokens: int


@dataclass
class Report:
    """The result of tokenising one shard."""

    split: str
    entry: TokensEntry
    dropped: list[Dropped]
    truncated: list[Dropped]
    tasks: Counter
    sources: dict[str, Counter] = field(default_factory=dict)  # source -> COUNTS
    num_scorable: int = 0  # items with frames and a scored token


def tokenize_shard(job, renderer):
    """Write the sidecar and return the Report. Raises UserError if the tar contradicts the manifest or its records."""
    samples, places = read_shard(job.tar, job.entry)
    outcome = tokenize_samples(samples, renderer, job.max_tokens)
    rows = [row | places[row["key"]] for row in outcome.rows]
    sidecar.write(job.output, rows)
    entry = TokensEntry(
        name=job.output.name,
        num_items=len(rows),
        num_tokens=sum(len(row["input_ids"]) for row in rows),
        shard_sha256=job.entry.sha256,
        sha256=sha256_file(job.output),
    )
    return Report(
        split=job.split,
        entry=entry,
        dropped=outcome.dropped,
        truncated=outcome.truncated,
        tasks=Counter(row["task"] for row in rows),
        sources=_count(samples, outcome),
        num_scorable=sum(row["kind"] != "text" and any(row["score_mask"]) for row in rows),
    )


def _count(samples, outcome):
    source_of = {sample.key: sample.source for sample in samples}
    counts = {source: Counter(dict.fromkeys(COUNTS, 0)) for source in sorted(set(source_of.values()))}
    for sample in samples:
        counts[sample.source]["seen"] += len(sample.items)
    for row in outcome.rows:
        counts[row["source"]]["kept"] += 1
        counts[row["source"]]["tokens"] += len(row["input_ids"])
    for name in ("dropped", "truncated"):
        for item in getattr(outcome, name):
            counts[source_of[item.key]][name] += 1
    return counts


def read_shard(path, entry):
    """Read one tar. Returns (its PackedSamples in order, {key: offsets and sizes of its members}).

    Raises UserError if the tar contradicts the manifest, or its frames contradict its records.
    """
    try:
        found = sha256_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: missing, but listed in manifest.json. {RERUN}") from None
    if found != entry.sha256:
        raise UserError(f"{path}: sha256 is {found[:12]}..., expected {entry.sha256[:12]}... (manifest.json). {RERUN}")
    samples, places, frames = [], {}, []
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                if not member.name.endswith(".json"):
                    frames.append(member)
                    continue
                sample = parse(PackedSample, tar.extractfile(member).read(), f"{path}: {member.name}")
                places[sample.key] = _place(path, sample, frames, member, sample.key in places)
                samples.append(sample)
                frames = []
    except tarfile.TarError as error:
        raise UserError(f"{path}: damaged after {len(samples)} samples ({error}). {RERUN}") from None
    if frames:
        raise UserError(
            f"{path}: {frames[0].name} and {len(frames) - 1} more frames have no record after them. {RERUN}"
        )
    if len(samples) != entry.num_samples:
        raise UserError(f"{path}: found {len(samples)} samples, expected {entry.num_samples} (manifest.json). {RERUN}")
    return samples, places


def _place(path, sample, frames, member, known):
    """Return the offsets and sizes of a sample. Raises UserError if its members have wrong names or a wrong number."""
    where = f"{path}: {member.name}"
    if member.name != f"{sample.key}.json":
        raise UserError(f"{where}: the record has another key, '{sample.key}'. {RERUN}")
    if known:
        raise UserError(f"{where}: the key '{sample.key}' occurs twice. {RERUN}")
    if len(frames) != sample.frame_count:
        raise UserError(f"{where}: frame_count is {sample.frame_count}, but {len(frames)} frames precede it. {RERUN}")
    one = sample.kind == "image" and sample.frame_count == 1
    names = [f"{sample.key}.jpg" if one else f"{sample.key}.{number:03d}.jpg" for number in range(len(frames))]
    for frame, name in zip(frames, names, strict=True):
        if frame.name != name or not frame.isfile():
            raise UserError(f"{where}: the frame before it is {frame.name}, expected the file {name}. {RERUN}")
    return {
        "frame_offsets": [frame.offset_data for frame in frames],
        "frame_sizes": [frame.size for frame in frames],
        "sample_offset": member.offset_data,
        "sample_size": member.size,
    }


def tokenize_shards(jobs, section, tokenizer_dir, num_processes):
    """Yield the Report of every job, in the order of the jobs."""
    advice = "Use fewer processes (--num-processes) or smaller shards (shards.samples_per_shard)."
    return map_in_processes(_work, jobs, num_processes, advice, partial(_start, tokenizer_dir, section))


_worker = {}  # the renderer of this process


def _start(tokenizer_dir, section):
    _worker["renderer"] = ChatRenderer(load_tokenizer(tokenizer_dir), section)


def _work(job):
    return tokenize_shard(job, _worker["renderer"])
