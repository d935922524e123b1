"""Pack one planned shard: the job that Snakemake runs, once per shard.

    python -m pipeline_steps.shards.pack --settings FILE --split train --plan plan/train/p01.jsonl \
        --output packed/train/p01

writes p01.tar (WebDataset: `{key}.000.jpg` ... or `{key}.jpg`, then `{key}.json`), p01.npz (perceptual hashes of
frames) and p01.json (counts, hashes and quarantined samples). The same plan always gives the same bytes. Takes about
5 ms per sample on one core, plus 0.5 s to start.
"""

import argparse
import fcntl
import io
import os
import socket
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np

from model.frames import Media, MediaError, read_media
from model.pictures import jpeg
from pipeline_steps.common.errors import UserError, run_main
from pipeline_steps.common.files import read_record, to_json, write_bytes, write_json
from pipeline_steps.common.hashing import media_sha256, sha256_file
from pipeline_steps.common.schemas import (
    SPLITS,
    FramePolicy,
    PackedSample,
    Quarantined,
    Record,
    ShardEntry,
    read_samples,
)
from pipeline_steps.shards.hashes import NUM_FRAMES, WORDS, hash_frames


class Settings(Record):
    """Settings shared by all jobs: settings.json in the scratch folder."""

    raw_dir: str  # absolute path
    frames: FramePolicy


class ShardReport(Record):
    """The result of packing one planned shard."""

    shard: ShardEntry
    quarantined: tuple[Quarantined, ...]
    sources: dict[str, int]  # packed samples per source
    plan_sha256: str | None  # of the plan file; None: packed without one


def pack_shard(samples, settings, output, plan_sha256=None):
    """Write `output`.tar, .npz, .json and .progress (one byte per finished sample). Returns the ShardReport.

    Files are written under temporary names and renamed into place, the report last. A file with its final name is
    therefore complete, and published hard links never change; the tar is read-only for the same reason. Raises
    UserError if a media file changed after indexing.
    """
    partial = output.with_name(f".{output.name}.{socket.gethostname()}.{os.getpid()}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    quarantined, sources, num_frames, seconds, hashes = [], Counter(), 0, 0.0, {}
    with (
        open(output.with_suffix(".progress"), "wb", buffering=0) as progress,
        tarfile.open(partial, "w", format=tarfile.GNU_FORMAT) as tar,
    ):
        for sample in samples:
            try:
                media = _load(sample, settings)
                _add_sample(tar, sample, media, settings.frames.jpeg_quality)
                sources[sample.source] += 1
                num_frames += len(media.frames)
                seconds += media.duration
                if media.frames:
                    hashes[sample.key] = hash_frames(media.frames)
            except MediaError as error:
                quarantined.append(
                    Quarantined(key=sample.key, source=sample.source, path=sample.path, reason=error.reason)
                )
            progress.write(b".")
    tar_path = output.with_suffix(".tar")
    entry = ShardEntry(
        name=tar_path.name,
        num_samples=sources.total(),
        num_frames=num_frames,
        seconds=round(seconds, 4),
        bytes=partial.stat().st_size,
        sha256=sha256_file(partial),
    )
    report = ShardReport(shard=entry, quarantined=tuple(quarantined), sources=dict(sources), plan_sha256=plan_sha256)
    _write_hashes(output.with_suffix(".npz"), hashes)
    partial.chmod(0o444)
    os.replace(partial, tar_path)
    write_json(output.with_suffix(".json"), report)
    return report


def _load(sample, settings):
    """Read the sample's Media (no frames for text). Raises UserError if the file changed after indexing."""
    if sample.kind == "text":
        return Media([], [], 0.0, 0, 0)
    path = Path(settings.raw_dir, sample.path)
    found = media_sha256(path, sample.parts) if path.exists() else "no file"
    if found != sample.sha256:
        raise UserError(
            f"{path} (sample '{sample.key}') changed after the index was written: sha256 was {sample.sha256[:12]}, "
            f"found {found[:12]}. Run `dvc repro --force sources`."
        )
    return read_media(
        path,
        sample.kind,
        fps=settings.frames.fps,
        max_frames=settings.frames.max_frames,
        image_size=settings.frames.image_size,
        resize_mode=settings.frames.resize_mode,
        hdr=settings.frames.hdr,
        parts=sample.parts,
        picture_fps=sample.picture_fps,
        segment=sample.segment,
    )


def _add_sample(tar, sample, media, jpeg_quality):
    one_still = sample.kind == "image" and len(media.frames) == 1
    for i, frame in enumerate(media.frames):
        name = f"{sample.key}.jpg" if one_still else f"{sample.key}.{i:03d}.jpg"
        _add_member(tar, name, jpeg(frame, jpeg_quality))
    packed = PackedSample(
        **dict(sample),
        frame_count=len(media.frames),
        timestamps=tuple(media.timestamps),
        duration=media.duration,
        width=media.width,
        height=media.height,
    )
    _add_member(tar, f"{sample.key}.json", to_json(packed).encode())


def _add_member(tar, name, content):
    member = tarfile.TarInfo(name)  # mtime, uid and gid are 0
    member.mode, member.size = 0o644, len(content)
    tar.addfile(member, io.BytesIO(content))


def _write_hashes(path, hashes):
    """Write `keys` [N] bytes and `hashes` uint64 [N, frames, words] of the samples with frames, in tar order."""
    buffer = io.BytesIO()
    values = np.array(list(hashes.values()), np.uint64).reshape(-1, NUM_FRAMES, WORDS)
    np.savez(buffer, keys=np.array([key.encode() for key in hashes], "S"), hashes=values)
    write_bytes(path, buffer.getvalue())


def pack_planned(scratch, shard):
    """Pack one planned shard, (split, name), of a scratch folder (plan/ -> packed/)."""
    split, name = shard
    plan, output = scratch / "plan" / split / f"{name}.jsonl", scratch / "packed" / split / name
    run_job(scratch / "settings.json", split, plan, output)


def run_job(settings_path, split, plan, output):
    """Pack the shard of the file `plan` into files that begin with `output`."""
    with open(settings_path) as lock_file:
        fcntl.flock(lock_file, fcntl.LOCK_SH)  # a job may outlive a killed stage; the next run waits for it
        settings = read_record(Settings, settings_path, "shards")
        plan_sha256 = sha256_file(plan)  # hashed before reading, so a plan replaced meanwhile counts as not packed
        samples = [sample.model_copy(update={"split": split}) for sample in read_samples(plan)]
        pack_shard(samples, settings, output, plan_sha256)


def main():
    parser = argparse.ArgumentParser(description="Pack one planned shard (a job of the shards stage).")
    parser.add_argument("--settings", required=True)
    parser.add_argument("--split", required=True, choices=SPLITS, help="split of all samples in the plan")
    parser.add_argument("--plan", required=True)
    parser.add_argument("--output", required=True, type=Path, help="path of the shard without its suffix")
    arguments = parser.parse_args()
    run_job(arguments.settings, arguments.split, arguments.plan, arguments.output)


if __name__ == "__main__":
    run_main(main)
