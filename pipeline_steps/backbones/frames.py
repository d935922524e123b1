"""Batches of single frames for the vision warm-up, rendered ahead of time by data loader workers.

Shapes: B frames, N patches.
"""

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from pipeline_steps.world import digits as world

JITTER = world.PATCH - world.GLYPH
CROWDED_FILL = 0.85  # share of a crowded frame's patches that hold a digit


class Frames(Dataset):
    """`num_crowded` batches of crowded frames, followed by batches of ordinary frames of the world.

    Item i does not depend on the process that renders it. It is {name: tensor} with the fields of `world.FrameBatch`; a
    crowded batch has only frames, patch_digit and patch_colour. Frames are `size` px wide and high. If `grid` is finer
    than the world's grid, every patch inherits the labels of the world patch that contains it.
    """

    def __init__(
        self,
        split: str,
        num_batches: int,
        batch_size: int,
        seed: int,
        num_crowded: int = 0,
        size: int = world.UNITS,
        grid: int = world.GRID,
    ):
        self.split, self.num_batches, self.batch_size, self.seed = split, num_batches, batch_size, seed
        self.num_crowded, self.size, self.grid = num_crowded, size, grid
        self.digits = world.Digits()

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([self.seed, world.SPLITS.index(self.split), index])
        if index < self.num_crowded:
            batch = crowded_batch(rng, self.digits, self.batch_size, self.split, self.size)
        else:
            batch = vars(world.render_batch(rng, self.digits, self.batch_size, self.split, size=self.size))
        refined = {name: refine(batch[name], self.grid) for name in ("patch_digit", "patch_colour")}
        return {name: torch.from_numpy(values) for name, values in {**batch, **refined}.items()}


def refine(labels: np.ndarray, grid: int) -> np.ndarray:
    """Upsample labels of the world's 4 x 4 patches [B, 16] to a finer grid: [B, grid * grid]."""
    times = grid // world.GRID
    square = labels.reshape(-1, world.GRID, world.GRID).repeat(times, 1).repeat(times, 2)
    return np.ascontiguousarray(square.reshape(len(labels), -1))


def crowded_batch(
    rng: np.random.Generator, digits: world.Digits, batch_size: int, split: str, size: int = world.UNITS
) -> dict[str, np.ndarray]:
    """Render frames with a digit in most patches, in any colours: about four times as many digits as usual.

    Returns {"frames": uint8 [B, size, size, 3], "patch_digit": int64 [B, 16], "patch_colour": int64 [B, 16]}.
    """
    frames = np.empty((batch_size, size, size, 3), np.uint8)
    patch_digit = np.full((batch_size, world.GRID**2), world.NO_DIGIT)
    patch_colour = np.full((batch_size, world.GRID**2), world.NO_COLOUR)
    for b in range(batch_size):
        empty = world.sample_scene(rng, "gist", split, digits, num_frames=1, num_objects=1)
        objects = []
        for patch in np.flatnonzero(rng.random(world.GRID**2) < CROWDED_FILL).tolist():
            digit, colour = int(rng.integers(world.NO_DIGIT)), int(rng.integers(world.NO_COLOUR))
            row, column = divmod(patch, world.GRID)
            x, y = world.PATCH * np.array([column, row]) + rng.integers(0, JITTER + 1, 2)
            objects.append(
                world.SceneObject(
                    colour=world.COLOUR_NAMES[colour],
                    place=world.PLACES[0],  # unused when a scene is rendered
                    digits=(digit,),
                    digit_images=(int(rng.choice(digits.pools[split][digit])),),
                    corners=((int(x), int(y)),),
                )
            )
            patch_digit[b, patch], patch_colour[b, patch] = digit, colour
        scene = world.Scene(
            kind="gist",
            split=split,
            background=empty.background,
            objects=tuple(objects),
            target=0,
            bars=empty.bars,
            slope=empty.slope,
            noise_seed=empty.noise_seed,
        )
        frames[b] = world.render(scene, digits, size)[0]
    return {"frames": frames, "patch_digit": patch_digit, "patch_colour": patch_colour}


def pixel_values(frames: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W], normalised for DINOv2 (ImageNet mean and standard deviation)."""
    mean, deviation = (torch.tensor(v, device=frames.device) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return ((frames / 255 - mean) / deviation).permute(0, 3, 1, 2)
