"""The package is installed from its repository only, and its command starts without the heavy libraries."""

import re
import shutil
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from model.constants import MODES
from pipeline_steps.inference import ask
from tests.pipeline import ROOT

HEAVY = ("torch", "transformers", "matplotlib", "pandas", "sklearn", "scipy")


def test_the_arguments_of_ask_are_read_without_the_heavy_libraries():
    code = f"import sys, pipeline_steps.inference.ask; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_ask_offers_the_modes_of_the_model():
    assert ask.MODES == MODES


def test_make_pretrained_installs_the_same_versions_everywhere():
    """The extra's packages are in the lock, which constrains them, or pinned."""
    locked = re.findall(r"^([\w.-]+)==", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["pretrained"]
    free = {canonicalize_name(entry.name): entry.specifier for entry in map(Requirement, extra)}
    free = {name: specifier for name, specifier in free.items() if name not in map(canonicalize_name, locked)}
    assert {"gguf", "ml-dtypes", "onnx"} <= free.keys()
    assert all(re.fullmatch(r"==[\d.]+", str(specifier)) for specifier in free.values()), free


@pytest.fixture
def sources(tmp_path):
    """What setuptools reads of the repository, where it may write."""
    for name in ("model", "pipeline_steps"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def install(sources, *options):
    target = sources / "installed"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index"]
    command += ["--target", target, *options, sources]
    done = subprocess.run(command, cwd=sources, capture_output=True, text=True, timeout=200)
    return done, sorted(path.name for path in target.glob("*")) if target.exists() else []


def test_an_install_without_the_repository_is_refused_with_the_reason(sources):
    done, installed = install(sources)
    assert done.returncode == 1
    assert "foveated-vlm is not installed without its repository" in done.stdout + done.stderr
    assert "pip install --editable ." in done.stdout + done.stderr
    assert installed == []


def test_an_editable_install_is_the_repository_and_its_command(sources):
    done, installed = install(sources, "--editable")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "bin" in installed
    assert (sources / "installed/bin/foveated-ask").exists()
