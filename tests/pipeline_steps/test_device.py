"""Where a stage computes."""

import pytest
import torch

from pipeline_steps.common.device import choose_device
from pipeline_steps.common.errors import UserError


@pytest.mark.parametrize(
    ("wanted", "there", "device"), [("auto", False, "cpu"), ("auto", True, "cuda"), ("cpu", True, "cpu")]
)
def test_the_device_is_chosen(monkeypatch, wanted, there, device):
    allowed = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", allowed.append)
    assert choose_device(wanted, "training.common.device") == device
    assert allowed == ([False] if device == "cuda" else [])  # it would plan anew for every length


def test_a_gpu_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"training\.common\.device is cuda"):
        choose_device("cuda", "training.common.device")
