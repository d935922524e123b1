"""`benchmarks.gpu`: what a machine with torch and transformers alone can run, and what it does without a GPU."""

import json
import re
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch

from benchmarks import gpu
from pipeline_steps.common.params import ROOT
from tests.pipeline import environment
from tests.test_bare_machine import missing

# what benchmarks.gpu says it needs, and pytest; pydantic, which some versions of transformers require, is hidden too
HIDDEN = {*missing(("torch", "transformers", "pillow", "pytest")), "pydantic"}
BARE = f"""
import runpy, sys
from importlib.machinery import PathFinder

class Hide:
    hidden, found = {HIDDEN!r}, PathFinder.find_spec
    def find_spec(self, name, *rest):
        return None if name.split(".")[0] in self.hidden else self.found(name, *rest)

PathFinder.find_spec = Hide().find_spec  # a bound method, as pytest's own import hook expects
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


VARIABLES = {"CUDA_VISIBLE_DEVICES": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # hydra brings a plugin for pytest


def bare(module: str, *arguments) -> subprocess.CompletedProcess:
    """`python -m module arguments` where nothing of HIDDEN can be imported, and without a GPU."""
    command = [sys.executable, "-c", BARE, module, *map(str, arguments)]
    settings = {"cwd": ROOT, "env": environment() | VARIABLES, "capture_output": True, "text": True}
    return subprocess.run(command, check=False, timeout=300, **settings)


def test_without_a_gpu_one_sentence_says_so(tmp_path):
    done = bare("benchmarks.gpu", "--output", tmp_path / "gpu.json")
    expected = "error: benchmarks.gpu needs a CUDA device and torch finds none: on a CPU run `make bench`.\n"
    assert (done.returncode, done.stderr, done.stdout) == (1, expected, "")
    assert not (tmp_path / "gpu.json").exists()


@pytest.mark.slow
def test_figures_are_measured_where_packages_are_missing(tmp_path):
    options = ("--only", "train", "--samples", 4, "--rounds", 1, "--output", tmp_path / "speed.json")
    done = bare("benchmarks.speed", *options)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "speed.json").read_text())["figures"]["train"]["4 x 1"]["ratio"] > 0


@pytest.mark.slow
def test_tests_of_the_gpu_are_collected_where_packages_are_missing():
    done = bare("pytest", *gpu.TESTS, "-v", "-rs", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout + done.stderr
    chosen = re.findall(r"^tests/gpu/test_network.py::(\w+)\[(.*)\] SKIPPED", done.stdout, re.MULTILINE)
    assert "test_steps_train_in_every_precision" in dict(chosen)
    assert all("cuda" in parameters and "cpu" not in parameters for _, parameters in chosen)
    assert "the parameters of the stages need pydantic" in done.stdout
    assert re.search(
        r"^tests/model/test_frame_step.py::test_a_cuda_graph_is_the_eager_step.* SKIPPED", done.stdout, re.M
    )


def test_processes_are_killed_at_their_time_limit():
    code, output = gpu.run_process([sys.executable, "-c", "print('begun', flush=True); import time; time.sleep(60)"], 3)
    assert (code, output) == (None, "begun\n")


def test_outcomes_of_tests_are_counted(monkeypatch):
    lines = "tests/gpu/test_a.py::test_x[cuda-a b] PASSED [ 50%]\ntests/gpu/test_a.py::test_y FAILED [100%]\nend\n"
    monkeypatch.setattr(gpu, "run_process", lambda command, seconds: (1, lines))
    found = gpu.run_tests(5.0)
    assert (found["ok"], found["passed"], found["failed"], found["output"]) == (False, 1, 1, lines)


@pytest.mark.slow
def test_everything_is_written_into_one_file(tmp_path, monkeypatch):
    """On the CPU, where the tests of the GPU are skipped."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "gpu.json"
    assert gpu.run_all(["tiny"], 9.0, path, device="cpu", parts=("train",), num_samples=4)
    written = json.loads(path.read_text())
    assert written["equality"]["ok"]
    assert max(written["equality"]["differences"].values()) < 1e-5
    assert written["tests"]["ok"]
    assert written["tests"]["skipped"] > 20
    assert not written["tests"]["failed"]
    assert list(written["sizes"]) == ["tiny"]
    assert written["sizes"]["tiny"]["figures"]["train"]
    assert written["torch"] == torch.__version__


def test_a_failed_step_fails_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "run_tests", lambda seconds: {"ok": True, "reasons": []})
    monkeypatch.setattr(gpu, "run_process", lambda command, seconds: (1, "Traceback: it broke"))
    assert not gpu.run_all(["tiny"], 1.0, tmp_path / "gpu.json", device="cpu")
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert list(written["sizes"]) == ["tiny", "tiny compiled"]
    for found in written["sizes"].values():
        assert found == {"ok": False, "exit_code": 1, "output": "Traceback: it broke"}


def test_a_check_that_breaks_fails_the_whole_and_the_rest_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "check_equality", Mock(side_effect=RuntimeError("CUDA error: no kernel")))
    monkeypatch.setattr(gpu, "run_tests", lambda seconds: {"ok": True, "reasons": []})
    monkeypatch.setattr(gpu, "measure_size", lambda *_: {"ok": True})
    assert not gpu.run_all(["tiny"], 1.0, tmp_path / "gpu.json", device="cpu")
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert (written["equality"]["ok"], written["equality"]["error"]) == (False, "RuntimeError: CUDA error: no kernel")
    assert list(written["sizes"]) == ["tiny", "tiny compiled"]


def test_every_process_gets_a_share_of_the_time_that_is_left(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(gpu, "run_tests", lambda seconds: {"ok": True, "reasons": []})
    monkeypatch.setattr(
        gpu, "measure_size", lambda size, seconds, parts, *_: seen.append((size, seconds, parts)) or {"ok": True}
    )
    assert gpu.run_all(list(gpu.SIZES), 8.0, tmp_path / "gpu.json", device="cpu")
    assert [(size, parts) for size, _, parts in seen[:3]] == [
        ("135M", ("train", "modes", "first_token")),
        ("135M", ("compiled",)),
        ("small_gpu", ("train", "modes", "first_token")),
    ]
    assert len(seen) == 6
    assert seen[0][1] < 8 * 60 * 4 / 13
    assert seen[-1][1] > 60  # nobody took time: the last one has all of it
