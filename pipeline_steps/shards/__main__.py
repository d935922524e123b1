"""Shards: decode every raw sample once and pack its frames into WebDataset tars.

    python -m pipeline_steps.shards [--params params.yaml] [--raw data/raw] [--output data/shards]

Splits by video, plans the shards, lets Snakemake pack them (one job per shard; SNAKEMAKE_PROFILE chooses the profile)
in `.scratch/shards/<fingerprint>/`, checks for samples that leak between splits, and publishes tars and
manifest.json together. The scratch folder keeps the shards: a killed run resumes, and a changed set of samples
repacks only the shards that it changes. Damaged media are quarantined with a reason; more than `max_quarantined` of
them fail the stage. 4,600 six-frame clips: 30 s on two cores.
"""

import argparse
import os
import shutil
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from pipeline_steps.common import params
from pipeline_steps.common.errors import UserError, run_main
from pipeline_steps.common.files import locked_scratch, replaced_folder, writable, write_json
from pipeline_steps.common.hashing import fingerprint
from pipeline_steps.common.schemas import SPLITS, FramePolicy, ShardsManifest, SplitEntry
from pipeline_steps.common.snakemake import cancel_left_over
from pipeline_steps.shards import leaks, scratch
from pipeline_steps.shards.fan_out import run_snakemake
from pipeline_steps.shards.index import read_index
from pipeline_steps.shards.pack import Settings
from pipeline_steps.shards.plan import assign_splits, plan_shards

PARAMS = ("shards",)
CODE = ("model/frames.py", "model/pictures.py", "pipeline_steps/common/hashing.py", "pipeline_steps/common/schemas.py")
CODE += ("pipeline_steps/shards/hashes.py", "pipeline_steps/shards/pack.py", "model/video.py")
CODE += ("workflow/Snakefile", "workflow/rules/shards.smk")
LIBRARIES = ("av", "imagehash", "numpy", "pillow", "scipy")  # that bytes of a shard or hashes of its frames depend on
MAX_LISTED = 20  # quarantined samples shown in the terminal


def build(section, raw_dir, output):
    """The whole stage; returns the ShardsManifest that was published to `output`/manifest.json."""
    index = read_index(Path(raw_dir) / "index.jsonl", section.seed)
    splits = assign_splits(index, section.validation_share, section.test_share)
    plan = plan_shards(index, splits, section.samples_per_shard)
    settings = make_settings(section, raw_dir)
    work = fingerprint(
        settings.model_dump(), [version(name) for name in LIBRARIES], *(params.ROOT / path for path in CODE)
    )
    with locked_scratch("shards", work) as (folder, lock_file):
        (folder / "finished").unlink(missing_ok=True)
        with replaced_folder(output) as published:
            if section.max_hash_distance is not None:
                leaks.check(leaks.text_leaks(index, splits), folder / "leaks.jsonl")
            reports = pack(index, plan, settings, folder, lock_file)
            manifest = make_manifest(reports, len(index), settings.frames)
            check_quarantine(manifest, index.num_media(), section.max_quarantined)
            if section.max_hash_distance is not None:
                check_frames(reports, folder, section.max_hash_distance)
            publish(manifest, folder / "packed", published, filled(reports))
        shutil.rmtree(folder / ".snakemake", ignore_errors=True)
        (folder / "finished").touch()
        scratch.prune_others(folder, settings.raw_dir)
    return manifest


def make_settings(section, raw_dir):
    frames = FramePolicy(
        image_size=section.image_size,
        resize_mode=section.resize_mode,
        fps=section.fps,
        max_frames=section.max_frames,
        jpeg_quality=section.jpeg_quality,
    )
    return Settings(raw_dir=str(Path(raw_dir).resolve()), frames=frames)


def pack(index, plan, settings, folder, lock_file):
    """Packs what `folder` does not hold yet. Returns {place: ShardReport} of the whole plan."""
    with writable(folder):
        cancel_left_over(folder)
        scratch.wait_for_jobs(folder)
        plan_hashes = scratch.write_plans(index, plan, settings, folder)
        scratch.prune(folder, plan)
        missing = scratch.drop_stale(folder, plan_hashes)
    if missing:
        progress = {folder / "packed" / split / f"{name}.progress": len(plan[split, name]) for split, name in missing}
        run_snakemake("shards", folder, progress, lock_file)
    print(f"{len(missing)} shards packed, {len(plan) - len(missing)} kept from an earlier run", file=sys.stderr)
    return scratch.read_reports(folder, plan_hashes)


def check_frames(reports, folder, max_distance):
    """UserError if held-out frames are nearly those of another split."""
    files = {split: [] for split in SPLITS}
    for split, name in sorted(reports):
        files[split].append(folder / "packed" / split / f"{name}.npz")
    leaks.check(leaks.frame_leaks(files, max_distance), folder / "leaks.jsonl")


def filled(reports):
    """{split: [ShardEntry]} in the order of their names in scratch, without shards in which nothing was left."""
    entries = {split: [] for split in SPLITS}
    for (split, _), report in sorted(reports.items()):
        if report.shard.num_samples:
            entries[split].append(report.shard)
    return entries


def make_manifest(reports, seen, frames):
    """One ShardsManifest of all reports {(split, name): ShardReport}, the shards numbered in the order of their names;
    shards in which nothing was left are left out."""
    splits = {}
    for split, entries in filled(reports).items():
        shards = tuple(entry.model_copy(update={"name": f"{i:06d}.tar"}) for i, entry in enumerate(entries))
        splits[split] = SplitEntry(
            shards=shards,
            num_samples=sum(shard.num_samples for shard in shards),
            num_frames=sum(shard.num_frames for shard in shards),
            seconds=round(sum(shard.seconds for shard in shards), 4),
            bytes=sum(shard.bytes for shard in shards),
        )
    sources = sum((Counter(report.sources) for report in reports.values()), Counter())
    quarantined = sorted((q for report in reports.values() for q in report.quarantined), key=lambda q: q.key)
    return ShardsManifest(
        splits=splits,
        seen=seen,
        packed=sources.total(),
        quarantined=tuple(quarantined),
        sources=dict(sorted(sources.items())),
        frames=frames,
    )


def check_quarantine(manifest, media, max_quarantined):
    """Lists the quarantined samples; UserError if they are too many of a source's `media` files, or if none is left."""
    bad = manifest.quarantined
    lines = [f"  {q.key} ({q.path}): {q.reason}" for q in bad[:MAX_LISTED]]
    if len(bad) > MAX_LISTED:
        lines.append(f"  ... and {len(bad) - MAX_LISTED} more")
    listing = "\n".join(lines)
    for source, count in Counter(q.source for q in bad).items():
        if count > max_quarantined * media[source]:
            raise UserError(
                f"{count} of {media[source]} media files of '{source}' are damaged ({count / media[source]:.1%}), more "
                f"than shards.max_quarantined allows ({max_quarantined:.1%}):\n{listing}\n"
                "Repair or remove these files, or raise shards.max_quarantined."
            )
    if manifest.splits["train"].num_samples == 0:
        raise UserError(
            f"no training sample is left of {manifest.seen} samples, {len(bad)} of them damaged.\n{listing}"
        )
    if bad:
        print(f"quarantined {len(bad)} of {manifest.seen} samples:\n{listing}", file=sys.stderr)


def publish(manifest, packed, folder, sources=None):
    """Tars and manifest into `folder`, as hard links where the disk allows it.

    sources: {split: [ShardEntry]} of the tars in `packed`, in the manifest's order; None: they have its names.
    """
    for split, entry in manifest.splits.items():
        (folder / split).mkdir()
        for source, shard in zip(sources[split] if sources else entry.shards, entry.shards, strict=True):
            _link_or_copy(packed / split / source.name, folder / split / shard.name)
    write_json(folder / "manifest.json", manifest)


def _link_or_copy(source, target):
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without hard links
        shutil.copyfile(source, target)


def main():
    parser = argparse.ArgumentParser(description="Decode raw samples and pack their frames into WebDataset shards.")
    parser.add_argument("--params", default="params.yaml")
    parser.add_argument("--raw", default="data/raw")
    parser.add_argument("--output", default="data/shards")
    arguments = parser.parse_args()
    section = params.read(arguments.params, *PARAMS).shards
    manifest = build(section, arguments.raw, arguments.output)
    counts = ", ".join(f"{split} {e.num_samples} in {len(e.shards)}" for split, e in manifest.splits.items())
    print(f"{arguments.output}: {manifest.packed} of {manifest.seen} samples packed (samples in shards: {counts})")


if __name__ == "__main__":
    run_main(main)
