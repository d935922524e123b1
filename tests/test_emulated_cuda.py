"""The tests marked `gpu`, on a CUDA device that host memory and the CPU's kernels stand in for."""

import re
import shutil
import subprocess
import sys

import pytest
import torch

from benchmarks.gpu import TESTS
from pipeline_steps.common.params import ROOT


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built with CUDA")
@pytest.mark.skipif(shutil.which("g++") is None, reason="the device is compiled with g++")
def test_the_gpu_tests_pass_on_an_emulated_device():
    command = [sys.executable, "-m", "pytest", "-p", "tests.emulated_cuda", "-p", "no:cacheprovider", *TESTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed, skipped = re.search(r"(\d+) passed, (\d+) skipped", done.stdout).groups()
    assert int(passed) >= 122
    assert int(skipped) <= 13
