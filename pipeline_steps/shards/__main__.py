"""Shards: decode every raw sample once and pack its frames into WebDataset tars.

    python -m pipeline_steps.shards [--params params.yaml] [--raw data/raw] [--output data/shards]

Splits by video, plans the shards, lets Snakemake pack them (one job per shard; SNAKEMAKE_PROFILE chooses the profile)
in `.scratch/shards/<fingerprint>/`, where a killed run goes on, and publishes tars and manifest.json together. Damaged
media are quarantined with a reason; more than `max_quarantined` of them fail the stage. 4,000 six-frame clips: 30 s on
two cores.
"""

import argparse
import fcntl
import os
import shutil
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from pipeline_steps import params, records
from pipeline_steps.params import UserError
from pipeline_steps.records import SPLITS, FramePolicy, ShardsManifest, SplitEntry
from pipeline_steps.shards.fan_out import run_snakemake
from pipeline_steps.shards.pack import Settings, ShardReport
from pipeline_steps.shards.plan import plan_shards

PARAMS = ("shards",)
CODE = ("pipeline_steps/frames.py", "pipeline_steps/pictures.py", "pipeline_steps/records.py")
CODE += ("pipeline_steps/shards/pack.py", "pipeline_steps/shards/plan.py")
CODE += ("pipeline_steps/video.py", "workflow/Snakefile", "workflow/rules/shards.smk")
MAX_LISTED = 20  # quarantined samples shown in the terminal


def build(section, raw_dir, output):
    """The whole stage; returns the ShardsManifest that was published to `output`/manifest.json."""
    index = Path(raw_dir) / "index.jsonl"
    samples = records.read_samples(index)
    plan = plan_shards(samples, section.validation_share, section.test_share, section.seed, section.samples_per_shard)
    settings = Settings(
        raw_dir=str(Path(raw_dir).resolve()),
        frames=FramePolicy(
            image_size=section.image_size,
            fit=section.fit,
            fps=section.fps,
            max_frames=section.max_frames,
            jpeg_quality=section.jpeg_quality,
        ),
    )
    mark = records.fingerprint(
        section.model_dump(exclude={"max_quarantined"}),
        settings.raw_dir,
        index,
        [version(name) for name in ("av", "pillow")],
        *(params.ROOT / path for path in CODE),
    )
    with records.locked_scratch("shards", mark) as (scratch, lock_file):
        with records.replaced_folder(output) as published:
            write_plan(plan, settings, scratch)
            wait_for_jobs(scratch)
            paths = {place: scratch / "packed" / place[0] / place[1] for place in plan}
            progress = [path.with_suffix(".progress") for path in paths.values()]
            run_snakemake("shards", scratch, len(samples), progress, lock_file)
            reports = {
                place: records.read_record(ShardReport, path.with_suffix(".json"), "shards")
                for place, path in paths.items()
            }
            manifest = make_manifest(reports, len(samples), settings.frames)
            media = Counter(sample.source for sample in samples if sample.kind != "text")
            check_quarantine(manifest, media, section.max_quarantined)
            publish(manifest, scratch / "packed", published)
        shutil.rmtree(scratch)
    return manifest


def write_plan(plan, settings, scratch):
    """plan/<split>/<shard>.jsonl and settings.json, once: finished shards stay newer than their plan."""
    if (scratch / "settings.json").exists():
        return
    for (split, name), group in plan.items():
        records.write_jsonl(scratch / "plan" / split / f"{name}.jsonl", group)
    records.write_json(scratch / "settings.json", settings)  # last: says that the plan is complete


def wait_for_jobs(scratch):
    """Jobs of a killed run finish their shard: each holds a shared lock on settings.json meanwhile."""
    with open(scratch / "settings.json") as lock_file:
        fcntl.flock(lock_file, fcntl.LOCK_EX)


def make_manifest(reports, seen, frames):
    """One ShardsManifest of all reports {(split, name): ShardReport}; shards in which nothing was left are left out."""
    splits = {}
    for split in SPLITS:
        shards = tuple(r.shard for (where, _), r in sorted(reports.items()) if where == split and r.shard.num_samples)
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
        raise UserError(f"no training sample is left of {manifest.seen}, {len(bad)} of them damaged.\n{listing}")
    if bad:
        print(f"quarantined {len(bad)} of {manifest.seen} samples:\n{listing}", file=sys.stderr)


def publish(manifest, packed, folder):
    """Tars and manifest into `folder`, as hard links where the disk allows it."""
    for split, entry in manifest.splits.items():
        (folder / split).mkdir()
        for shard in entry.shards:
            _link_or_copy(packed / split / shard.name, folder / split / shard.name)
    records.write_json(folder / "manifest.json", manifest)


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
    params.run(main)
