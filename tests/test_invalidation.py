"""What a change makes DVC run again, by `dvc status` in a copy of this repository whose outputs are tiny fake files."""

import os
import shutil
import subprocess
import sys
from contextlib import chdir, contextmanager
from pathlib import Path

import pytest
import yaml
from dvc.repo import Repo

from pipeline_steps.common import params
from pipeline_steps.common.params import ROOT
from pipeline_steps.training.checkpoint_io import run_fingerprint
from tests import repository

RUNTIME = yaml.safe_load((ROOT / "params.yaml").read_text())["runtime"]
WITHOUT_EFFECT = [f"pipeline_steps/common/{name}.py" for name in ("errors", "files", "params", "runtime_schema")]
WITHOUT_EFFECT += [f"pipeline_steps/monitoring/{name}.py" for name in ("metrics_logger", "mfu", "progress")]


def stages_that_list(path):
    return {name for name, stage in repository.STAGES.items() if path in repository.paths(stage["deps"])}


class Copy:
    """A repository in which nothing has to run."""

    def __init__(self, root):
        self.root = root

    def status(self):
        """Names of the stages that `dvc status` calls changed."""
        with chdir(self.root):
            return {name.split(":")[-1] for name in Repo().status()}

    @contextmanager
    def changed(self, path, edit):
        """The file has the text edit(text) inside the block."""
        text = (self.root / path).read_text()
        assert edit(text) != text
        (self.root / path).write_text(edit(text))
        yield
        (self.root / path).write_text(text)

    def parameter(self, key, value):
        """params.yaml has this value of the dotted key inside the block."""
        return self.changed("params.yaml", lambda text: with_value(text, key, value))


def with_value(text, key, value):
    content = yaml.safe_load(text)
    *sections, name = key.split(".")
    section = content
    for part in sections:
        section = section[part]
    section[name] = value
    return yaml.safe_dump(content, sort_keys=False)


def another(value):
    """Another valid value of a parameter of section `runtime`."""
    return not value if isinstance(value, bool) else 1 if value is None else value + 1


def line_more(text):
    return text + "\n# one line more\n"


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    root = tmp_path_factory.mktemp("repository")
    repository.copy_to(root)
    repository.write_fakes(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_SITE_CACHE_DIR", str(root / ".dvc/site"))
        with chdir(root):
            Repo().commit(force=True)
        yield Copy(root)


def test_nothing_has_to_run_at_first(copy):
    assert copy.status() == set()


@pytest.mark.parametrize("name", RUNTIME)
def test_a_runtime_parameter_reruns_nothing(copy, name):
    value = "project" if name == "wandb_project" else another(RUNTIME[name])
    with copy.parameter(f"runtime.{name}", value):
        params.read(copy.root / "params.yaml", "seed")  # it is a valid value
        assert copy.status() == set()


@pytest.mark.parametrize("path", WITHOUT_EFFECT)
def test_code_without_effect_on_results_reruns_nothing(copy, path):
    with copy.changed(path, line_more):
        assert copy.status() == set()


def test_a_parameter_of_one_stage_reruns_it_what_counts_it_and_what_prints_it(copy):
    with copy.parameter("training.stage2.num_samples", 3200):
        assert copy.status() == {"parameters", "streaming", "stage2", "report"}


@pytest.mark.parametrize(
    ("path", "listed"),
    [
        ("model/modeling_foveated_vlm.py", "model"),
        ("pipeline_steps/common/schemas.py", "pipeline_steps/common/schemas.py"),
    ],
)
def test_a_line_of_code_reruns_the_stages_that_list_it(copy, path, listed):
    expected = stages_that_list(listed)
    assert 5 < len(expected) < len(repository.STAGES)
    with copy.changed(path, line_more):
        assert copy.status() == expected


def test_another_content_of_the_checkpoint_to_start_from_reruns_stage1(copy, tmp_path):
    root, start = shutil.copytree(copy.root, tmp_path / "repository"), tmp_path / "checkpoint"
    start.mkdir()
    (start / "config.json").write_text("{}")
    (root / "params.yaml").write_text(with_value((root / "params.yaml").read_text(), "training.init_from", str(start)))
    assert Copy(root).status() == {"parameters", "stage1", "stage2", "stage3", "report"}
    with chdir(root):
        Repo().commit(force=True)
    assert Copy(root).status() == set()
    (start / "config.json").write_text("{ }")
    assert Copy(root).status() == {"stage1"}


# ---------------------------------------------------------------- checked before any stage starts


def dvc(root, *words):
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        [sys.executable, "-m", "dvc", *words],
        cwd=root,
        env=os.environ | {"PATH": places},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def started(output):
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage ")]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("training.stage3.num_samples", "abc", "training.stage3.num_samples: should be a valid integer"),
        ("model.attention", "depe", "model.attention: should be 'deep'"),
        ("ablation", "A66", "ablation is 'A66', but there is no conf/ablation/A66.yaml. Did you mean 'A6'?"),
        ("training.common.bach_size", 8, "training.common.bach_size: unknown key"),
    ],
)
def test_a_wrong_value_ends_before_any_stage_starts(copy, tmp_path, key, value, message):
    root = shutil.copytree(copy.root, tmp_path / "repository")
    text = with_value((root / "params.yaml").read_text(), key, value)
    (root / "params.yaml").write_text(with_value(text, "sources.procedural.seed", 2))  # something to do, were it valid
    done = dvc(root, "repro")
    assert done.returncode != 0
    assert message in done.stderr
    assert started(done.stdout) == ["parameters"]
    assert (root / "data/raw/fake.txt").exists()


def test_a_valid_change_reruns_nothing_but_its_own_stages(copy, tmp_path):
    root = shutil.copytree(copy.root, tmp_path / "repository")
    (root / "params.yaml").write_text(with_value((root / "params.yaml").read_text(), "training.stage3.num_samples", 99))
    done = dvc(root, "repro", "parameters")
    assert done.returncode == 0, done.stderr
    assert started(done.stdout) == ["parameters"]
    assert Copy(root).status() == {"streaming", "stage3", "report"}


# ---------------------------------------------------------------- states of killed runs


def fingerprint(path):
    read = params.read(path, "seed", "model", "streaming", "training.common", "training.stage2")
    return run_fingerprint("stage2", read.as_dict(), [])


def test_a_killed_run_goes_on_with_other_runtime_parameters_and_no_others(tmp_path):
    text, path = (ROOT / "params.yaml").read_text(), tmp_path / "params.yaml"
    before = fingerprint(ROOT / "params.yaml")
    for name, value in RUNTIME.items():
        path.write_text(with_value(text, f"runtime.{name}", "project" if name == "wandb_project" else another(value)))
        assert fingerprint(path) == before, name
    for key, value in (
        ("training.common.clip_norm", 2.0),
        ("training.common.record_every", 5),
        ("model.query_dim", 32),
    ):
        path.write_text(with_value(text, key, value))
        assert fingerprint(path) != before, key
