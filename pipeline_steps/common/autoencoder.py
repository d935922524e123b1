"""A frozen autoencoder of frames in diffusers' `AutoencoderKL` format (Rombach et al. 2022, "High-Resolution Image
Synthesis with Latent Diffusion Models"). Needs the extra `latents`.

Shapes: F frames, C latent channels, h x w latent grid.
"""

import json
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from model.image_processing_foveated_vlm import IMAGE_MEAN, IMAGE_STD
from pipeline_steps.common.errors import UserError

WEIGHTS = "diffusion_pytorch_model.safetensors"
FRAMES_AT_ONCE = 256
MAX_NAMED = 3  # tensors in a message
COPY_AGAIN = f"Copy config.json and {WEIGHTS} again from the same model."


def require(package: str, key: str, extra: str = "latents") -> None:
    """UserError if a package of an extra is not installed. key: the parameter that needs it."""
    if find_spec(package) is None:
        raise UserError(f"{key} needs the package {package}, which is not installed: pip install '.[{extra}]'")


def latent_channels(folder: str | Path, key: str) -> int:
    """C of an autoencoder. UserError unless the folder has one. key: the parameter that names the folder."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        found, channels = config.get("_class_name"), config.get("latent_channels")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{path}: missing, but {key} names this folder. Name the folder of an AutoencoderKL in diffusers' format, "
            "or train a small one: backbones.embedded.autoencoder_steps=1000 and `dvc repro backbones`."
        ) from None
    except (ValueError, AttributeError):
        raise UserError(f"{path}: not a valid configuration. {key} has to name an AutoencoderKL.") from None
    if found != "AutoencoderKL" or not (path.parent / WEIGHTS).exists():
        lacking = f"_class_name is {found!r}, expected 'AutoencoderKL'" if found != "AutoencoderKL" else "no " + WEIGHTS
        raise UserError(f"{path.parent}: {lacking}. {key} has to name an AutoencoderKL in diffusers' format.")
    if type(channels) is not int or channels < 1:
        raise UserError(
            f"{path}: latent_channels is {channels!r}, expected a positive integer. Copy config.json again from where "
            f"the autoencoder of {key} comes from."
        )
    return channels


class FrameLatents:
    """Frames -> latents of a frozen autoencoder, scaled to about unit variance as diffusion models use them."""

    def __init__(self, folder: str | Path, key: str):
        """folder, key: as in `latent_channels`. UserError if it cannot be loaded."""
        self.channels = latent_channels(folder, key)
        require("diffusers", key)
        from diffusers import AutoencoderKL

        with torch.random.fork_rng(devices=[]):  # loading must not shift the random numbers of a resumed run
            try:
                network, report = AutoencoderKL.from_pretrained(
                    folder,
                    local_files_only=True,
                    use_safetensors=True,
                    low_cpu_mem_usage=False,
                    ignore_mismatched_sizes=True,  # reported, and refused below
                    output_loading_info=True,
                )
            except (OSError, ValueError, RuntimeError, TypeError, LookupError) as error:  # what its classes raise
                problem = " ".join(str(error).split()).rstrip(".")
                raise UserError(f"{folder} ({key}) cannot be loaded: {problem}. {COPY_AGAIN}") from None
        check_weights(report, f"{folder} ({key})")
        self.network = network.float().eval().requires_grad_(False)
        self.scale, self.shift = network.config.scaling_factor, network.config.shift_factor or 0.0

    @torch.no_grad()
    def __call__(self, pixel_values: Tensor) -> Tensor:
        """Normalised frames [F, 3, height, width] -> the means of their latents [F, C, h, w], fp32."""
        device = pixel_values.device
        self.network.to(device)
        with torch.autocast(device.type, enabled=False):
            parts = [
                self.network.encode(unit_range(part) * 2 - 1).latent_dist.mean
                for part in pixel_values.float().split(FRAMES_AT_ONCE)
            ]
        return (torch.cat(parts) - self.shift) * self.scale


def check_weights(report: dict[str, list], source: str) -> None:
    """UserError unless the file's tensors are those of the configuration; diffusers would draw missing ones and those
    of another shape at random. report: diffusers' own."""
    shapes = [f"{name} {list(found)} instead of {list(wanted)}" for name, found, wanted in report["mismatched_keys"]]
    kinds = {
        "are missing": report["missing_keys"],
        "are not of such a network": report["unexpected_keys"],
        "have another shape": shapes,
    }
    problems = [f"{len(names)} tensors {words} ({_some(names)})" for words, names in kinds.items() if names]
    if problems:
        raise UserError(f"{source}: {WEIGHTS} does not fit config.json: {', '.join(problems)}. {COPY_AGAIN}")


def _some(names: list[str]) -> str:
    return ", ".join(sorted(names)[:MAX_NAMED]) + (" ..." if len(names) > MAX_NAMED else "")


def unit_range(pixel_values: Tensor) -> Tensor:
    """Frames normalised by the processor -> colours in 0..1."""
    mean, std = (torch.as_tensor(value, device=pixel_values.device)[:, None, None] for value in (IMAGE_MEAN, IMAGE_STD))
    return (pixel_values * std + mean).clamp(0, 1)
