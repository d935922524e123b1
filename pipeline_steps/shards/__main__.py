"""Shards: decode every raw sample once and pack its frames into WebDataset tars.

    python -m pipeline_steps.shards [--params params.yaml] [--raw data/raw] [--output data/shards]

Assigns videos to splits, plans the shards, runs Snakemake to pack them in `.scratch/shards/<fingerprint>/` (one job per
shard; SNAKEMAKE_PROFILE selects the profile), checks for leaks between splits, and publishes tars and manifest.json
together. The scratch folder keeps packed shards: a killed run resumes, and only shards whose samples changed are
repacked. Damaged media are quarantined with a reason; the stage fails if their share exceeds `max_quarantined`.
4,600 six-frame clips take 30 s on two cores.
"""

import argparse
import os
import shutil
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from pipeline_steps.common import params
from pipeline_steps.common.errors import UserError, listing, run_main
from pipeline_steps.common.files import locked_scratch, replaced_folder, writable, write_json
from pipeline_steps.common.hashing import fingerprint
from pipeline_steps.common.schemas import SPLITS, FramePolicy, ShardsManifest, SplitEntry
from pipeline_steps.common.snakemake import cancel_leftover_jobs
from pipeline_steps.shards import leaks, scratch
from pipeline_steps.shards.fan_out import run_pool, run_snakemake
from pipeline_steps.shards.index import read_index
from pipeline_steps.shards.pack import Settings
from pipeline_steps.shards.plan import assign_splits, plan_shards

PARAMS = ("shards",)
CODE = ("model/frames.py", "model/hdr.py", "model/pictures.py", "model/video.py", "model/video_container.py")
CODE += ("pipeline_steps/common/hashing.py", "pipeline_steps/common/schemas.py")
CODE += ("pipeline_steps/shards/hashes.py", "pipeline_steps/shards/pack.py")
CODE += ("workflow/Snakefile", "workflow/rules/shards.smk")
LIBRARIES = (
    "av",
    "imagehash",
    "numpy",
    "pillow",
    "scipy",
)  # they determine the bytes of shards or the hashes of frames
MAX_LISTED = 20  # quarantined samples shown in the terminal
AGAIN = "`dvc repro --force sources` and `dvc repro`"  # DVC does not track the user's files
REPAIR = f"Repair these files, or remove them and their rows of metadata, and run {AGAIN}"


def build(section, raw_dir, output, num_processes=None):
    """Run the stage on `raw_dir`/index.jsonl. Returns the ShardsManifest written to `output`/manifest.json.

    num_processes: as of `pack`. Raises UserError for an invalid index, leaks between splits, too many damaged media or
    failed jobs.
    """
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
                leaks.check(leaks.text_leaks(index, splits), index, folder / "leaks.jsonl")
            reports = pack(index, plan, settings, folder, lock_file, num_processes)
            manifest = make_manifest(reports, len(index), settings.frames)
            check_quarantine(manifest, reports, index.num_media(), section.max_quarantined)
            if section.max_hash_distance is not None:
                check_frames(reports, index, folder, section.max_hash_distance)
            publish(manifest, folder / "packed", published, non_empty_shards(reports))
        shutil.rmtree(folder / ".snakemake", ignore_errors=True)
        (folder / "finished").touch()
        scratch.remove_outdated_folders(folder, settings.raw_dir)
    return manifest


def make_settings(section, raw_dir):
    """Return the pack.Settings of all jobs."""
    frames = FramePolicy(
        image_size=section.image_size,
        resize_mode=section.resize_mode,
        hdr=section.hdr,
        fps=section.fps,
        max_frames=section.max_frames,
        jpeg_quality=section.jpeg_quality,
    )
    return Settings(raw_dir=str(Path(raw_dir).resolve()), frames=frames)


def pack(index, plan, settings, folder, lock_file, num_processes=None):
    """Pack the shards that `folder` lacks. Returns {(split, name): ShardReport} for the whole plan.

    num_processes: of this machine, without Snakemake; None: Snakemake's jobs.
    """
    with writable(folder):
        cancel_leftover_jobs(folder)
        scratch.wait_for_jobs(folder)
        plan_hashes = scratch.write_plans(index, plan, settings, folder)
        scratch.prune(folder, plan)
        missing = scratch.drop_stale(folder, plan_hashes)
    if missing:
        progress = {folder / "packed" / split / f"{name}.progress": len(plan[split, name]) for split, name in missing}
        if num_processes is None:
            run_snakemake("shards", folder, progress, lock_file)
        else:
            run_pool(missing, folder, num_processes)
    print(f"{len(missing)} shards packed, {len(plan) - len(missing)} reused from an earlier run", file=sys.stderr)
    return scratch.read_reports(folder, plan_hashes)


def check_frames(reports, index, folder, max_distance):
    """Raise UserError if held-out samples have near-duplicate frames in another split."""
    files = {split: [] for split in SPLITS}
    for split, name in sorted(reports):
        files[split].append(folder / "packed" / split / f"{name}.npz")
    leaks.check(leaks.frame_leaks(files, max_distance), index, folder / "leaks.jsonl")


def non_empty_shards(reports):
    """Return {split: [ShardEntry]} of the non-empty shards, sorted by their names in the scratch folder."""
    entries = {split: [] for split in SPLITS}
    for (split, _), report in sorted(reports.items()):
        if report.shard.num_samples:
            entries[split].append(report.shard)
    return entries


def make_manifest(reports, seen, frames):
    """Merge the reports {(split, name): ShardReport} into a ShardsManifest and number the non-empty shards.

    seen: number of samples in the index. frames: the FramePolicy.
    """
    splits = {}
    for split, entries in non_empty_shards(reports).items():
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


def check_quarantine(manifest, reports, media, max_quarantined):
    """Print the quarantined samples. Raises UserError for too many in a source, if no training sample is left, or if
    all samples of another split are damaged.

    reports: {(split, name): ShardReport}. media: {source: number of media files}.
    """
    bad = manifest.quarantined
    listed = _listed(bad)
    for source, count in Counter(q.source for q in bad).items():
        if count > max_quarantined * media[source]:
            raise UserError(
                f"{count} of {media[source]} media files of '{source}' are damaged ({count / media[source]:.1%}), more "
                f"than shards.max_quarantined allows ({max_quarantined:.1%}):\n{listed}\n"
                f"{REPAIR}, or raise shards.max_quarantined."
            )
    if manifest.splits["train"].num_samples == 0:
        raise UserError(
            f"no training sample is left of {manifest.seen} samples, {len(bad)} of them damaged. Add samples to the "
            f"split train (sources), or lower shards.validation_share and shards.test_share.\n{listed}"
        )
    for split in (split for split in SPLITS if manifest.splits[split].num_samples == 0):
        lost = [q for (place, _), report in sorted(reports.items()) if place == split for q in report.quarantined]
        if lost:
            raise UserError(
                f"all {len(lost)} samples of the split {split} are damaged:\n{_listed(lost)}\n{REPAIR}, or add samples "
                "to the split (sources)."
            )
    if bad:
        advice = f"To use them, repair them and run {AGAIN}."
        print(f"quarantined {len(bad)} of {manifest.seen} samples:\n{listed}\n{advice}", file=sys.stderr)


def _listed(quarantined):
    return listing([f"{q.key} ({q.path}): {q.reason}" for q in quarantined[:MAX_LISTED]], len(quarantined))


def publish(manifest, packed, folder, sources=None):
    """Write the tars (as hard links if possible) and the manifest to `folder`.

    sources: {split: [ShardEntry]} of the tars in `packed`, in the manifest's order; None: the names are the manifest's.
    """
    for split, entry in manifest.splits.items():
        (folder / split).mkdir()
        for source, shard in zip(sources[split] if sources else entry.shards, entry.shards, strict=True):
            _link_or_copy(packed / split / source.name, folder / split / shard.name)
    write_json(folder / "manifest.json", manifest)


def _link_or_copy(source, target):
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def main():
    parser = argparse.ArgumentParser(description="Decode raw samples and pack their frames into WebDataset shards.")
    parser.add_argument("--params", default="params.yaml")
    parser.add_argument("--raw", default="data/raw")
    parser.add_argument("--output", default="data/shards")
    parser.add_argument("--processes", type=int, help="pack in this many processes of this machine, without Snakemake")
    arguments = parser.parse_args()
    if arguments.processes is not None and arguments.processes < 1:
        parser.error(f"--processes is {arguments.processes}, expected at least 1")
    section = params.read(arguments.params, *PARAMS).shards
    manifest = build(section, arguments.raw, arguments.output, arguments.processes)
    counts = ", ".join(
        f"{split}: {e.num_samples} samples in {len(e.shards)} shards" for split, e in manifest.splits.items()
    )
    print(f"{arguments.output}: {manifest.packed} of {manifest.seen} samples packed ({counts})")


if __name__ == "__main__":
    run_main(main)
