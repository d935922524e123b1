"""Every test here runs on both devices: on the CPU as any other test, on CUDA with the mark `gpu` where there is one.

python -m pytest tests/gpu --confcutdir=tests/gpu -m gpu        on a machine without pydantic, dvc, PyAV ...
"""

import pytest
import torch

from pipeline_steps.common.device import choose_device

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_CUDA])


@pytest.fixture(params=["cpu", CUDA])
def device(request) -> str:
    return request.param


@pytest.fixture(params=[CUDA])
def cuda(request) -> str:
    """For what a CPU does not have, or what would take minutes there."""
    return request.param


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """Convolutions in fp32, not in TF32, which differs from the CPU in the fourth digit; kernels as in the stages."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    choose_device()
