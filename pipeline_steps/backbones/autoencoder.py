"""A small autoencoder of frames in diffusers' `AutoencoderKL` format, for the next-frame objective (extra `latents`).

    python -m pipeline_steps.backbones.autoencoder --shards data/shards --out data/autoencoder

Trains it on the frames of packed shards, for any data. Without --shards it learns frames of the digit world, as in the
stage `backbones`, which trains it where kind is embedded and `autoencoder_steps` is above 0. 1,000 steps of frames of
56 px take about five minutes on one core.

Shapes: B frames.
"""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from pipeline_steps.common import params
from pipeline_steps.common.autoencoder import require
from pipeline_steps.common.device import choose_device
from pipeline_steps.common.errors import UserError, run_main
from pipeline_steps.common.files import check_outputs, replaced_folder

from .frames import Frames
from .packed_frames import PackedFrames
from .schema import Embedded
from .warm_up import optimise

KEY = "backbones.embedded.autoencoder_steps"
CHANNELS = {True: (16, 32, 32), False: (16, 32, 32, 32)}  # frames below 224 px: 4 px a latent; others: 8
LATENT_CHANNELS, GROUPS = 4, 4  # few groups: a group of one channel would normalise a frame's colour away
BATCH_SIZE, LEARNING_RATE, KL_WEIGHT = 32, 3e-3, 1e-6
NUM_HELD_OUT = 256  # frames
SPLITS = ("train", "validation")


def build_autoencoder(image_size: int):
    """A randomly initialised AutoencoderKL."""
    from diffusers import AutoencoderKL

    channels = CHANNELS[image_size < 224]
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=GROUPS,
        sample_size=image_size,
    )


@dataclass
class FrameSource:
    """What an autoencoder learns from. Frames are uint8 [B, size, size, 3]."""

    size: int  # px
    batches: Iterator[Tensor]  # of BATCH_SIZE training frames
    sample: dict[str, Tensor]  # {split: up to NUM_HELD_OUT frames}, of train to normalise, of validation to measure


def rendered(options: Embedded, num_workers: int) -> FrameSource:
    """Frames of the digit world, rendered ahead of time by `num_workers` processes."""
    size, seed = options.image_size, options.seed
    frames = Frames("train", options.autoencoder_steps, BATCH_SIZE, seed, size=size)

    def batches():  # the loader's iterator draws a random number, so it must not be made before the seed is set
        for batch in DataLoader(frames, batch_size=None, num_workers=num_workers, prefetch_factor=8):
            yield batch["frames"]

    sample = {split: Frames(split, 1, NUM_HELD_OUT, seed, size=size)[0]["frames"] for split in SPLITS}
    return FrameSource(size, batches(), sample)


def packed(shards: Path, seed: int) -> FrameSource:
    """Frames of the stage `shards`. UserError as of `PackedFrames`."""
    frames = {split: PackedFrames(shards, split) for split in SPLITS}
    sample = {split: next(own.batches(NUM_HELD_OUT, seed)) for split, own in frames.items()}
    return FrameSource(frames["train"].size, frames["train"].batches(BATCH_SIZE, seed), sample)


def train_autoencoder(options: Embedded, folder: Path, source: FrameSource) -> dict[str, float]:
    """Trains `autoencoder_steps` steps and writes the folder. Returns {"num_parameters", "loss", "psnr" of held-out
    frames in dB}."""
    torch.manual_seed(options.seed)
    network, steps = build_autoencoder(source.size), options.autoencoder_steps
    device = choose_device(options.device, "backbones.embedded.device")
    network.to(device).train()
    loss = optimise(
        list(network.parameters()),
        lambda step: batch_loss(network, signed(next(source.batches).to(device))),
        num_steps=steps,
        learning_rate=LEARNING_RATE,
        precision="fp32",
        title="autoencoder",
    )
    network.to("cpu").eval()
    metrics = {"num_parameters": sum(p.numel() for p in network.parameters()), "loss": loss}
    normalise_latents(network, source.sample["train"])
    network.save_pretrained(folder)
    return metrics | {"psnr": held_out_psnr(network, source.sample["validation"])}


def signed(frames: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in -1..1."""
    return (frames.float() / 127.5 - 1).permute(0, 3, 1, 2).contiguous()


def batch_loss(network, frames: Tensor) -> Tensor:
    """Squared error of the reconstruction plus the weighted divergence of the latents from a unit Gaussian."""
    latents = network.encode(frames).latent_dist
    return F.mse_loss(network.decode(latents.sample()).sample, frames) + KL_WEIGHT * latents.kl().mean()


@torch.no_grad()
def normalise_latents(network, frames: Tensor) -> None:
    """Sets the configuration's shift and scale so that the latents of these frames have mean 0 and variance 1."""
    latents = torch.cat([network.encode(signed(part)).latent_dist.mean for part in frames.split(BATCH_SIZE)])
    network.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())


@torch.no_grad()
def held_out_psnr(network, frames: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of the reconstructed frames."""
    errors = [F.mse_loss(network(signed(part)).sample, signed(part)).item() for part in frames.split(BATCH_SIZE)]
    return 10 * math.log10(4 / (sum(errors) / len(errors)))  # the colours span 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", default="params.yaml")
    parser.add_argument("--shards", type=Path, help="folder of the stage shards (default: the digit world)")
    parser.add_argument("--steps", type=int, help=f"of training (default: {KEY})")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    parameters = params.read(arguments.params, "backbones")
    options = parameters.backbones.embedded
    if arguments.steps is not None:
        options = options.model_copy(update={"autoencoder_steps": arguments.steps})
    if options.autoencoder_steps < 1:
        raise UserError(f"--steps or {KEY} is {options.autoencoder_steps}: expected at least 1, for example 1000.")
    check_outputs(folders=[arguments.out])
    require("diffusers", KEY)
    torch.set_num_threads(options.num_threads)
    workers = parameters.runtime.backbone_workers
    source = packed(arguments.shards, options.seed) if arguments.shards else rendered(options, workers)
    with replaced_folder(arguments.out) as folder:
        metrics = train_autoencoder(options, folder, source)
    print(f"{arguments.out}: {json.dumps(metrics)}")


if __name__ == "__main__":
    run_main(main)
