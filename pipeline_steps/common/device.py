"""Choice of the device of a stage."""

import torch

from pipeline_steps.common.errors import UserError


def choose_device(wanted: str = "auto", key: str = "device") -> str:
    """`cpu` or `cuda` for the value `wanted` of parameter `key`: auto (cuda if available), cpu or cuda. UserError for
    cuda if torch finds no GPU. Before `cuda` is returned, cuDNN's attention is switched off for this process."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"{key} is cuda, but torch finds no CUDA GPU. Set it to auto or cpu, or install the driver and a torch "
            "build with CUDA."
        )
    if wanted == "cpu" or not torch.cuda.is_available():
        return "cpu"
    # cuDNN's attention builds a plan, in up to a second, for every new shape, and clips differ in length. Flash and
    # memory-efficient kernels do not.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return "cuda"
