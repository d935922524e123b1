"""What `benchmarks.natural --dry-run` says before anything runs: jobs, cost, and what a bare machine needs.

Samples and FLOPs follow from the parameters: the lengths are those of EXAMPLES clips of every task and of the first
chats, drawn and tokenised as the stages do, and the FLOPs are those of `pipeline_steps.common.flop_formulas`, as in
runs.csv. Minutes are these FLOPs at a stated rate, an estimate.
"""

import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from packaging.requirements import Requirement
from transformers import AutoConfig

from benchmarks.natural_plan import FOLDERS, code_files, files_of
from model import FoveatedVLMConfig, FoveatedVLMForConditionalGeneration
from pipeline_steps.backbones import own_chats
from pipeline_steps.common import params
from pipeline_steps.common.params import ROOT, TRAINING_STAGES
from pipeline_steps.common.schemas import PackedSample
from pipeline_steps.flops.__main__ import measure
from pipeline_steps.monitoring.mfu import PEAK_TFLOPS, peak_flops
from pipeline_steps.report.training_flops import sample_flops, trained_groups
from pipeline_steps.sources import chat, object_clips
from pipeline_steps.streaming.index import KINDS, Index
from pipeline_steps.streaming.mixture import make_groups
from pipeline_steps.tokens.chat import ChatRenderer, load_tokenizer
from pipeline_steps.tokens.rows import tokenize_samples
from pipeline_steps.training.parameters import trainable_parameters

EXAMPLES = 8  # clips of every task
CHATS = 64
ASSUMED_GPU = "H100"  # where no GPU is found
UTILISATION = 0.06  # of the peak; an earlier version of this network reached 6.1 % of an H100 with 32 samples a step
CPU_FLOPS = 5.2e10  # of one core, FLOP/s: the CPU run in docs/experiment_log.md, 0.164 PFLOP in 3,125 s
GIVEN = ("torch", "transformers")  # what a bare machine has, with their own requirements
NEEDED = ("pydantic", "pyarrow", "pyyaml", "pandas", "pillow", "simplejpeg")  # by every stage
NEEDED += ("av", "imagehash", "scipy")  # to make data; imagehash needs scipy
NEEDED += ("matplotlib",)  # to draw heatmaps


@dataclass(frozen=True)
class Cost:
    """Of one job."""

    samples: int | None = None  # clips and chats, training samples, or scored items
    flops: float | None = None  # of training


def describe(plan, left, arguments, rate: float | None = None) -> str:
    """The text of --dry-run. left: jobs that are not done; rate: FLOP/s, by default that of `assumed_rate`."""
    costs = costs_of(plan, arguments)
    speed, reason = (rate, "--rate") if rate else assumed_rate(arguments.device)
    users = {}  # (stage, key): names of the runs that need the job
    for run in plan.runs:
        for stage, key in run.jobs.items():
            users.setdefault((stage, key), []).append(run.name)
    waiting = {(job.stage, job.key) for job in left}
    lines = [f"{'job':<30}{'state':<8}{'samples':>9}{'PFLOP':>9}{'minutes':>9}  for"]
    for key in plan.jobs:
        cost = costs[key]
        shown = ["-" if cost.samples is None else f"{cost.samples:,}"]
        shown += ["-", "-"] if cost.flops is None else [f"{cost.flops / 1e15:.3g}", f"{cost.flops / speed / 60:.1f}"]
        cells = "".join(cell.rjust(9) for cell in shown)
        runs = users[key]
        state = "to do" if key in waiting else "done"
        lines.append(
            f"{' '.join(key):<30}{state:<8}{cells}  {'all' if len(runs) == len(plan.runs) else ', '.join(runs)}"
        )
    total = sum(costs[key].flops or 0 for key in waiting)
    lines += [
        "",
        f"Estimate: {total / 1e15:.3g} PFLOP of training to do, {total / speed / 60:.0f} minutes at "
        f"{speed / 1e9:,.0f} GFLOP/s ({reason}), one job after the other. Making data, validation, evaluation and "
        "heatmaps come on top.",
        "",
        *what_to_copy(arguments),
    ]
    return "\n".join(lines)


def assumed_rate(device: str) -> tuple[float, str]:
    """(FLOP/s of training, where the number comes from) of a device."""
    if device == "cpu":
        return CPU_FLOPS, "one core in an earlier run"
    peak, name = None, ASSUMED_GPU
    if torch.cuda.is_available():
        peak, name = peak_flops(None, device, "bf16"), torch.cuda.get_device_name(device)
    if peak is None:
        peak, name = PEAK_TFLOPS[ASSUMED_GPU] * 1e12, ASSUMED_GPU
    return UTILISATION * peak, f"{UTILISATION:.0%} of the peak of an {name}; --rate sets another"


# ---------------------------------------------------------------- cost


def costs_of(plan, arguments) -> dict[tuple[str, str], Cost]:
    """{(stage, key): `Cost`} of every job of the plan."""
    found, examples = {}, {}
    for run in plan.runs:
        document = params.check("plan.json", with_inputs(run.parameters, arguments))
        data = run.jobs["tokens"]
        if data not in examples:
            examples[data] = example_rows(document, arguments)
        clips = object_clips.plan(document.sources.procedural)
        counts = {"sources": num_samples(clips, arguments), "evaluation": num_scored(document, clips)}
        counts["shards"] = counts["tokens"] = counts["sources"]
        for stage, key in run.jobs.items():
            if stage in TRAINING_STAGES:
                settings = getattr(document.training, stage)
                flops = training_flops(document, settings, examples[data], arguments.pretrained)
                found[stage, key] = Cost(settings.num_samples, flops)
            else:
                found[stage, key] = Cost(counts.get(stage))
    return found


def with_inputs(parameters: dict, arguments) -> dict:
    """The parameters of a run with the inputs where they are now, not as seen from a job's folder."""
    sources = parameters["sources"]
    objects = sources["procedural"]["objects"] | {"cutouts": str(arguments.cutouts)}
    if arguments.backgrounds is not None:
        objects["backgrounds"] = str(arguments.backgrounds)
    given = {"procedural": sources["procedural"] | {"objects": objects}}
    if arguments.chats is not None:
        given["chat"] = sources["chat"] | {"path": str(arguments.chats)}
    return parameters | {"sources": sources | given}


def num_samples(clips: list, arguments) -> int:
    """Clips and text-only samples that the stage `sources` makes."""
    if arguments.chats is None:  # the language model's own, not made yet
        return len(clips) + len(own_chats.questions(None))
    with open(arguments.chats, "rb") as file:
        return len(clips) + sum(1 for line in file if line.strip())


def num_scored(document, clips: list) -> int:
    """Clips that the stage `evaluation` scores, in every mode; held-out clips have one item."""
    counts = {}
    for split, kind, _, is_new in clips:
        if split == document.evaluation.split:
            counts[kind, is_new] = counts.get((kind, is_new), 0) + 1
    return sum(min(count, document.evaluation.max_items_per_task) for count in counts.values())


def example_rows(document, arguments) -> list[dict]:
    """Rows as of the stage `tokens`: EXAMPLES training clips of every task, and up to CHATS chats."""
    section, frames = document.sources.procedural, document.shards
    renderer = ChatRenderer(load_tokenizer(arguments.pretrained / FOLDERS["language"]), document.tokens)
    pictures = object_clips.Pictures(section)
    fixed = {"split": "train", "timestamps": (), "width": 1, "height": 1}
    unread = {"path": "none", "sha256": "0" * 64}  # no media are made
    samples = []
    for kind in dict.fromkeys(kind for split, kind, *_ in object_clips.plan(section) if split == "train"):
        for number in range(EXAMPLES):
            scene, items = object_clips.sample_clip(section, pictures, "train", kind, number, False)
            seconds = scene.num_frames / section.fps
            is_still = kind == "still"
            count = 1 if is_still else min(scene.num_frames, frames.max_frames, max(1, round(seconds * frames.fps)))
            samples.append(
                PackedSample(
                    key=f"{kind}-{number}",
                    source="objects",
                    video_id=f"{kind}-{number}",
                    kind="image" if is_still else "video",
                    items=tuple({name: item[name] for name in ("user", "assistant", "task")} for item in items[:1]),
                    frame_count=count,
                    duration=seconds,
                    **unread,
                    **fixed,
                )
            )
    for sample in islice(chat.collect(document.sources.chat), CHATS):
        content = sample.model_dump(exclude={"split"}) | fixed | {"frame_count": 0, "duration": 0.0}
        samples.append(PackedSample(**content))
    return tokenize_samples(samples, renderer, document.tokens.max_tokens).rows


def training_flops(document, settings, rows: list[dict], pretrained: Path) -> float:
    """FLOPs of a training stage: the mean of the examples of each of its groups of items, in the mixture's shares."""
    vision, text = (AutoConfig.from_pretrained(pretrained / FOLDERS[name]) for name in ("vision", "language"))
    options = document.model.model_dump() | {"visual_token_id": text.vocab_size, "visual_scale": 1.0}
    config = FoveatedVLMConfig(vision, text, **options)
    with torch.device("meta"):
        network = FoveatedVLMForConditionalGeneration(config)
    _, table = trainable_parameters(network, settings, 0.0, document.training.common.optimizer)
    trained = trained_groups({"parameters": [row | {"trainable": bool(row["trainable"])} for row in table]})
    config.vision_config.image_size = document.shards.image_size
    groups = make_groups(SimpleNamespace(index=index_of(rows), tokens_dir="the plan", split="train"), settings)
    total = 0.0
    for name, share in groups.weights.items():
        lengths = [measure(rows[n], config.layout, document.streaming.image_replication) for n in groups.items[name]]
        total += share * float(np.mean([sample_flops(config, sample, trained, settings) for sample in lengths]))
    return settings.num_samples * total


def index_of(rows: list[dict]) -> Index:
    """The `Index` of rows in memory."""
    tasks, sources = (tuple(dict.fromkeys(row[name] for row in rows)) for name in ("task", "source"))
    columns = [
        [tasks.index(row["task"]) for row in rows],
        [sources.index(row["source"]) for row in rows],
        [KINDS.index(row["kind"]) for row in rows],
        [row["num_frames"] for row in rows],
        [len(row["input_ids"]) for row in rows],
        [0] * len(rows),
        [False] * len(rows),
    ]
    return Index(tasks, sources, *map(np.array, columns))


# ---------------------------------------------------------------- what a bare machine needs


def what_to_copy(arguments) -> list[str]:
    """Lines: what to copy to a machine with torch and transformers only, with sizes."""
    inputs = {"--pretrained": arguments.pretrained, "--cutouts": arguments.cutouts}
    inputs |= {"--backgrounds": arguments.backgrounds, "--chats": arguments.chats}
    lines = ["To copy to a machine with Python, torch and transformers only:"]
    code = [ROOT / path for path in code_files()] + [*(ROOT / "benchmarks").glob("*.py"), ROOT / "dvc.yaml"]
    lines.append(f"  {megabytes(code):>9}  this checkout (its code; git archive HEAD has the rest)")
    lines.append(
        f"  {megabytes([arguments.output / 'plan.json']):>9}  {arguments.output}/plan.json, into --output there"
    )
    for option, path in inputs.items():
        if path is not None:
            files = files_of(path) if path.is_dir() else [path]
            lines.append(f"  {megabytes(files):>9}  {path}, as {option}")
    wheels = wheels_of(NEEDED, GIVEN, locked_versions())
    size = sum(entry["bytes"] for entry in wheels.values())
    lines.append(f"  {size / 1e6:>6.0f} MB  wheels of its version of Python that it lacks (sizes are unpacked):")
    for name, entry in wheels.items():
        lines.append(f"  {entry['bytes'] / 1e6:>9.1f} MB  {name}=={entry['version']}")
    names = " ".join(f"{name}=={entry['version']}" for name, entry in wheels.items())
    lines.append(f"  python -m pip download --only-binary=:all: --no-deps --python-version 3.12 --dest wheels {names}")
    return lines


def megabytes(files) -> str:
    return f"{sum(file.stat().st_size for file in files) / 1e6:.1f} MB"


def locked_versions(path: Path = ROOT / "requirements.lock") -> dict[str, str]:
    """{normalised name: version} of requirements.lock."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {normalised(name): version for name, version in found}


def wheels_of(needed, given, locked: dict[str, str]) -> dict[str, dict]:
    """{name: {version, bytes installed here}} of `needed` and their requirements, however distant, without `given` and
    what these require themselves."""
    there, found = requirements_of(given, depth=1), {}
    for name in sorted(requirements_of(needed) - there):
        installed = distribution(name)
        sizes = [file.locate().stat().st_size for file in installed.files or () if file.locate().is_file()]
        found[name] = {"version": locked.get(name, installed.version), "bytes": sum(sizes)}
    return found


def requirements_of(names, depth: int | None = None) -> set[str]:
    """Normalised names of installed distributions: `names` and, without extras, what they require, over `depth` steps
    (None: all)."""
    found, left = set(), {normalised(name) for name in names}
    while left:
        found |= left
        if depth is not None and (depth := depth - 1) < 0:
            break
        parsed = [Requirement(text) for name in left for text in distribution(name).requires or ()]
        asked = {normalised(entry.name) for entry in parsed if not entry.marker or entry.marker.evaluate({"extra": ""})}
        left = {name for name in asked - found if is_installed(name)}  # others are for another platform
    return found


def is_installed(name: str) -> bool:
    try:
        return bool(distribution(name))
    except PackageNotFoundError:
        return False


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
