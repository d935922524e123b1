"""Entry points, training, evaluation and flops on a machine that has torch, transformers and little more."""

import subprocess
import sys

import pytest

from tests import pipeline

# what is not there: what makes and schedules data, draws, watches, and what only these need
MISSING = ("av", "datasets", "dvc", "dvclive", "hydra", "imagehash", "matplotlib", "omegaconf")
MISSING += ("snakemake", "tensorboard", "wandb", "webdataset")
START = f"""
import runpy, sys
from importlib.machinery import PathFinder
hidden, found = set({MISSING!r}), PathFinder.find_spec
PathFinder.find_spec = staticmethod(lambda name, *rest: None if name.split(".")[0] in hidden else found(name, *rest))
modules, sys.argv = sys.argv[1].split(), sys.argv[1:]
for module in modules:
    runpy.run_module(
        f"pipeline_steps.{{module}}", run_name="__main__" if len(sys.argv) > 1 else "imported", alter_sys=True
    )
"""


def bare(folder, modules, *arguments):
    """Run a module, with arguments, or import some, without them, where MISSING cannot be imported."""
    command = [sys.executable, "-c", START, modules, *map(str, arguments)]
    settings = {"cwd": folder, "env": pipeline.environment(), "capture_output": True, "text": True, "timeout": 600}
    return subprocess.run(command, check=False, **settings)


def test_entry_points_import_what_is_there(tmp_path):
    stages = ("backbones", "tokens", "training", "evaluation", "flops")
    done = bare(tmp_path, " ".join(f"{stage}.__main__" for stage in stages))
    assert done.returncode == 0, done.stderr


def test_the_test_hides_packages(tmp_path):
    """The stage `sources` draws videos: it cannot do without PyAV."""
    assert "No module named 'av'" in bare(tmp_path, "sources.__main__").stderr


@pytest.mark.slow
def test_a_stage_trains_and_is_evaluated(finished_run, tmp_path):
    """Data made elsewhere; curves that nobody can draw are a note."""
    (tmp_path / "data").symlink_to(finished_run / "data")
    pipeline.write_params(tmp_path, "training.stage1.num_samples=16")
    done = bare(tmp_path, "training", "--stage", "stage1", "--params", "params.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    for package in ("tensorboard", "dvclive"):
        assert (
            f"note: {package} is not installed, so there are no curves in outputs/live/stage1/{package}" in done.stderr
        )
    assert (tmp_path / "outputs/metrics/stage1.csv").read_text().count("train,") == 2
    assert not (tmp_path / "outputs/live").exists() or not list((tmp_path / "outputs/live").rglob("*tfevents*"))
    for module in ("evaluation", "flops"):
        done = bare(tmp_path, module, "--params", "params.yaml", "--checkpoint", tmp_path / "outputs/stage1")
        assert done.returncode == 0, f"{module}: {done.stderr[-3000:]}"
        assert (tmp_path / f"outputs/metrics/{module}.json").exists()
