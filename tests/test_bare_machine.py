"""Entry points, training, evaluation and flops on a machine that has torch, transformers and little more."""

import subprocess
import sys
from importlib.metadata import packages_distributions

import pytest

from benchmarks.natural_cost import normalised, requirements_of
from tests import pipeline

# what is there, with what these require: the list in docs/training.md
GIVEN = ("torch", "transformers", "pillow", "pyarrow", "pydantic", "pyyaml", "simplejpeg", "pandas")


def missing(given) -> list[str]:
    """The modules of all other installed packages, but for this project's."""
    there = requirements_of(given) | {"foveated-vlm"}
    return sorted(name for name, owners in packages_distributions().items() if not there & set(map(normalised, owners)))


MISSING = missing(GIVEN)
START = f"""
import runpy, sys
from importlib.machinery import PathFinder
hidden, found = set({MISSING!r}), PathFinder.find_spec
PathFinder.find_spec = staticmethod(lambda name, *rest: None if name.split(".")[0] in hidden else found(name, *rest))
modules, sys.argv = sys.argv[1].split(), sys.argv[1:]
for module in modules:
    runpy.run_module(module, run_name="__main__" if len(sys.argv) > 1 else "imported", alter_sys=True)
"""


def bare(folder, modules, *arguments):
    """Run a module, with arguments, or import some, without them, where MISSING cannot be imported."""
    command = [sys.executable, "-c", START, modules, *map(str, arguments)]
    settings = {"cwd": folder, "env": pipeline.environment(), "capture_output": True, "text": True, "timeout": 600}
    return subprocess.run(command, check=False, **settings)


def test_entry_points_import_what_is_there(tmp_path):
    stages = ("backbones", "tokens", "training", "evaluation", "flops")
    modules = [f"pipeline_steps.{stage}.__main__" for stage in stages]
    done = bare(tmp_path, " ".join([*modules, "benchmarks.natural"]))
    assert done.returncode == 0, done.stderr


def test_the_test_hides_packages(tmp_path):
    """The stage `sources` draws videos: it cannot do without PyAV."""
    assert "No module named 'av'" in bare(tmp_path, "pipeline_steps.sources.__main__").stderr
    assert {"av", "nltk", "sacrebleu", "scipy", "sklearn", "matplotlib", "dvc", "snakemake", "hydra"} <= {*MISSING}
    assert not {"torch", "PIL", "numpy", "pyarrow", "pydantic", "yaml", "tqdm", "pandas"} & {*MISSING}


@pytest.mark.slow
def test_a_stage_trains_and_is_evaluated(finished_run, tmp_path):
    """Data made elsewhere; curves that nobody can draw are a note, captions that nothing can score an error."""
    (tmp_path / "data").symlink_to(finished_run / "data")
    pipeline.write_params(tmp_path, "training.stage1.num_samples=16")
    done = bare(tmp_path, "pipeline_steps.training", "--stage", "stage1", "--params", "params.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    for package in ("tensorboard", "dvclive"):
        assert (
            f"note: {package} is not installed, so there are no curves in outputs/live/stage1/{package}" in done.stderr
        )
    assert (tmp_path / "outputs/metrics/stage1.csv").read_text().count("train,") == 2
    assert not (tmp_path / "outputs/live").exists() or not list((tmp_path / "outputs/live").rglob("*tfevents*"))
    options = ("--params", "params.yaml", "--checkpoint", tmp_path / "outputs/stage1")
    done = bare(tmp_path, "pipeline_steps.evaluation", *options)
    assert done.returncode == 1
    assert "without nltk and sacrebleu. Run `python -m pip install nltk sacrebleu`, or set it to 0." in done.stderr
    assert "evaluation:" not in done.stderr  # the bar of what is scored
    pipeline.write_params(tmp_path, "evaluation.max_captions_per_task=0")
    for module in ("evaluation", "flops"):
        done = bare(tmp_path, f"pipeline_steps.{module}", *options)
        assert done.returncode == 0, f"{module}: {done.stderr[-3000:]}"
        assert (tmp_path / f"outputs/metrics/{module}.json").exists()
