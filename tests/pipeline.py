"""The whole pipeline at a size of seconds, in a folder of its own."""

import os
import subprocess
import sys
from pathlib import Path

from pipeline_steps import params

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("backbones", "sources", "shards", "tokens", "stage1", "stage2", "stage3", "evaluation", "flops", "heatmaps")
SECONDS = (
    "backbones.embedded.vision_steps=4",
    "backbones.embedded.language_steps=4",
    "sources.procedural.num_train_clips=36",
    "sources.procedural.num_validation_clips=2",
    "sources.procedural.num_test_clips=3",
    "sources.chat.num_train=20",
    "sources.chat.num_validation=4",
    "sources.chat.num_test=4",
    "shards.samples_per_shard=30",
    "training.common.batch_size=8",
    "training.common.num_threads=1",
    "training.common.checkpoint_every=2",
    "training.common.validate_every=3",
    "training.common.max_validation_items=2",
    "training.stage1.num_samples=20",
    "training.stage2.num_samples=60",
    "training.stage3.num_samples=20",
    "evaluation.batch_size=16",
    "evaluation.max_answers_per_family=2",
    "evaluation.bootstrap_samples=50",
    "evaluation.num_threads=1",
    "heatmaps.num_clips=1",
)


def write_params(folder: Path, *overrides: str) -> None:
    (folder / "params.yaml").write_text(params.compose([*SECONDS, *overrides]))


def command(stage: str) -> list[str]:
    words = ["training", "--stage", stage] if stage.startswith("stage") else [stage]
    return [sys.executable, "-m", f"pipeline_steps.{words[0]}", *words[1:]]


def environment() -> dict:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RUN_SCRATCH": ""}


def run(folder: Path, stage: str) -> subprocess.CompletedProcess:
    """Run one stage's command in `folder`, as DVC would."""
    return subprocess.run(command(stage), cwd=folder, env=environment(), capture_output=True, text=True, timeout=600)


def run_all(folder: Path, *stages: str) -> None:
    for stage in stages:
        done = run(folder, stage)
        assert done.returncode == 0, f"{stage}: {done.stdout[-2000:]}\n{done.stderr[-4000:]}"
