"""The device that a stage computes on."""

import torch

from pipeline_steps.common.errors import UserError


def choose_device(wanted: str = "auto", key: str = "device") -> str:
    """`cpu` or `cuda` for the parameter `key`, which is auto (cuda where there is one), cpu or cuda. UserError if
    torch finds no GPU."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"{key} is cuda, but torch finds no such GPU here. Set it to auto or cpu, or install the driver and a "
            "torch that is built for it."
        )
    return "cpu" if wanted == "cpu" or not torch.cuda.is_available() else "cuda"
