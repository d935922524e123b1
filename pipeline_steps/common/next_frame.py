"""Targets and heads of the next-frame objective, shared by training and evaluation.

A pair is two consecutive frames of one sample: from the language model's state after the first, a head predicts
something about the second.

Shapes: F frames of the batch, n pairs, C latent channels, O channels of the target, h x w its grid, E language width,
K queries per frame, Q query width, P visual tokens per frame.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline_steps.common.autoencoder import FrameLatents, latent_channels, require, unit_range
from pipeline_steps.common.next_frame_schema import NextFrameSettings

NUM_BLOCKS = 2
FLOW_CHANNELS = 2  # right, down


def first_frames(counts: np.ndarray) -> np.ndarray:
    """Index in F of the first frame of every pair: int64 [n]. counts [B]: frames of every sample."""
    last = np.cumsum(counts)[counts > 0] - 1
    return np.delete(np.arange(int(counts.sum())), last)


@dataclass
class Targets:
    """What is known about n pairs of frames."""

    expected: Tensor  # [n, O, h, w]
    previous: Tensor | None  # latent of the first frame [n, C, h, w]; None: no autoencoder
    unchanged: Tensor  # [n, O, h, w]: the prediction that the next frame is this one

    @property
    def grid(self) -> tuple[int, int]:
        return tuple(self.expected.shape[-2:])


class TargetMaker:
    """Makes the `Targets` of a batch. It is frozen and no part of a head's weights."""

    def __init__(self, settings: NextFrameSettings, patch_size: int, key: str):
        """patch_size: of the vision encoder, the cells of a flow without latents. key: dotted name of the settings."""
        self.kind, self.patch_size = settings.target, patch_size
        self.latents = FrameLatents(settings.autoencoder, f"{key}.autoencoder") if settings.autoencoder else None
        if self.kind == "flow":
            require("cv2", f"{key}.target flow")

    def __call__(self, pixel_values: Tensor, firsts: Tensor) -> Targets:
        """pixel_values [F, 3, height, width], normalised; firsts: int64 [n], see `first_frames`."""
        latents = None if self.latents is None else self.latents(pixel_values)
        previous = None if latents is None else latents[firsts]
        if self.kind == "flow":
            size = (
                [side // self.patch_size for side in pixel_values.shape[-2:]] if latents is None else latents.shape[2:]
            )
            expected = optical_flow(pixel_values, firsts, tuple(size))
            return Targets(expected, previous, torch.zeros_like(expected))
        following = latents[firsts + 1]
        if self.kind == "latent":
            return Targets(following, previous, previous)
        return Targets(following - previous, previous, torch.zeros_like(previous))


def optical_flow(pixel_values: Tensor, firsts: Tensor, grid: tuple[int, int]) -> Tensor:
    """Dense flow of every pair by OpenCV's DIS (Kroeger et al. 2016, "Fast Optical Flow using Dense Inverse Search"),
    averaged over the cells of a grid, in cells per frame: [n, 2, *grid]. Computed on the CPU."""
    import cv2

    cv2.setNumThreads(torch.get_num_threads())
    colours = (unit_range(pixel_values.float()) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in colours]
    method = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    flows = [method.calc(grey[first], grey[first + 1], None) for first in firsts.tolist()]
    height, width = grey[0].shape
    dense = torch.from_numpy(np.stack(flows)).permute(0, 3, 1, 2)  # [n, 2, height, width], pixels
    cells = torch.tensor([grid[1] / width, grid[0] / height])[:, None, None]
    return (F.adaptive_avg_pool2d(dense, grid) * cells).to(pixel_values.device)


class FiLMBlock(nn.Module):
    """Residual convolutions whose features the condition scales and shifts (Perez et al. 2018, "FiLM: Visual Reasoning
    with a General Conditioning Layer")."""

    def __init__(self, width: int):
        super().__init__()
        self.film = nn.Linear(width, 2 * width)
        self.inner = nn.Conv2d(width, width, 3, padding=1)
        self.outer = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, features: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.film(condition)[..., None, None].chunk(2, dim=1)  # [n, width, 1, 1]
        return features + self.outer(F.silu(self.inner(F.silu(features)) * (1 + scale) + shift))


class FiLMHead(nn.Module):
    """Condition [n, S] and previous latent [n, C, h, w], if the head takes one -> prediction [n, O, h, w]."""

    def __init__(self, condition_width: int, in_channels: int, out_channels: int, width: int):
        super().__init__()
        self.condition = nn.Sequential(nn.LayerNorm(condition_width), nn.Linear(condition_width, width), nn.SiLU())
        self.stem = nn.Conv2d(in_channels + 2, width, 3, padding=1)  # two channels: the place in the grid
        self.blocks = nn.ModuleList([FiLMBlock(width) for _ in range(NUM_BLOCKS)])
        self.out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, condition: Tensor, previous: Tensor | None, grid: tuple[int, int]) -> Tensor:
        down, right = (torch.linspace(-1, 1, side, device=condition.device) for side in grid)
        place = torch.stack([right.expand(grid), down[:, None].expand(grid)]).expand(len(condition), -1, -1, -1)
        features = self.stem(place if previous is None else torch.cat([previous, place], dim=1))
        condition = self.condition(condition)
        for block in self.blocks:
            features = block(features, condition)
        return self.out(F.silu(features))


class NextFrameHeads(nn.Module):
    """The head of all passes, or one each of the coarse and the planned passes."""

    def __init__(self, settings: NextFrameSettings, config, key: str):
        """config: FoveatedVLMConfig. key: dotted name of the settings. UserError if the autoencoder is missing."""
        super().__init__()
        self.skips_query, self.takes_previous = settings.skip_query, settings.previous_latent != "none"
        folder, queries = settings.autoencoder, config.num_visual_tokens_per_frame * config.query_dim
        channels = latent_channels(folder, f"{key}.autoencoder") if folder else 0
        sizes = (
            config.text_config.hidden_size + (queries if self.skips_query else 0),
            channels if self.takes_previous else 0,
            FLOW_CHANNELS if settings.target == "flow" else channels,
            settings.head_width,
        )
        names = ("coarse", "fine") if settings.separate_heads else ("shared",)
        self.heads = nn.ModuleDict({name: FiLMHead(*sizes) for name in names})

    def forward(
        self, name: str, state: Tensor, queries: Tensor | None, previous: Tensor | None, grid: tuple[int, int]
    ) -> Tensor:
        """name: `coarse` or `fine` pass; state [n, E] after the first frame of every pair, queries [n, K, Q] of that
        frame, previous: its latent [n, C, h, w] -> prediction [n, O, h, w]."""
        head = self.heads["shared" if "shared" in self.heads else name]
        condition = torch.cat([state, queries.flatten(1)], dim=1) if self.skips_query else state
        return head(condition, previous if self.takes_previous else None, grid)


def pair_losses(predicted: Tensor, expected: Tensor, l1_weight: float = 0.0) -> Tensor:
    """Mean squared error of every pair, plus l1_weight times the mean absolute error: [n, O, h, w] x 2 -> [n], fp32."""
    errors = (predicted.float() - expected).flatten(1)
    losses = errors.square().mean(1)
    return losses + l1_weight * errors.abs().mean(1) if l1_weight else losses
