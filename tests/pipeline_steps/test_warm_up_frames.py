"""Frames for the warm-up of the embedded vision encoder: what they show, and that their labels say so."""

import pytest
import torch
from torch.utils.data import DataLoader

from pipeline_steps.backbones.frames import Frames
from pipeline_steps.world import digits as world


@pytest.mark.parametrize("num_crowded", [0, 1])
def test_larger_frames_show_the_same_scene_with_labels_per_patch(num_crowded):
    small = Frames("train", 1, 8, seed=0, num_crowded=num_crowded)[0]
    large = Frames("train", 1, 8, seed=0, num_crowded=num_crowded, size=112, grid=16)[0]
    shrunk = large["frames"].unflatten(2, (56, 2)).unflatten(1, (56, 2)).float().mean((2, 4))
    assert (shrunk - small["frames"].float()).abs().mean() < 1  # but for clipping and rounding
    for name in ("patch_digit", "patch_colour"):
        fine, coarse = large[name].reshape(8, 16, 16), small[name].reshape(8, 4, 4)
        assert all(fine[:, y::4, x::4].equal(coarse) for y in range(4) for x in range(4))


@pytest.mark.parametrize("num_crowded", [0, 1])
def test_training_frames_show_training_digits_only(monkeypatch, num_crowded):
    drawn, render = [], world.render
    monkeypatch.setattr(world, "render", lambda scene, *rest: drawn.append(scene) or render(scene, *rest))
    frames = Frames("train", 1, 64, seed=0, num_crowded=num_crowded)
    frames[0]
    shown = {image for scene in drawn for item in scene.objects for image in item.digit_images}
    assert len(shown) > 50
    assert shown <= set(frames.digits.splits["train"].tolist())


@pytest.mark.parametrize("num_crowded", [0, 1])
def test_patch_labels_match_the_pixels(num_crowded):
    batch = Frames("train", 1, 32, seed=0, num_crowded=num_crowded)[0]
    side = world.PATCH
    patches = batch["frames"].unflatten(1, (-1, side)).unflatten(3, (-1, side)).transpose(2, 3).flatten(1, 2)
    pixels = patches.flatten(2, 3).float()  # [B, N, side * side, 3]
    palette = torch.tensor(list(world.COLOURS.values())).float()
    distance = (pixels[..., None, :] - palette).abs().sum(-1).amin(2)  # [B, N, 6]: nearest pixel to each colour
    labelled = batch["patch_colour"] != world.NO_COLOUR
    assert (labelled == (batch["patch_digit"] != world.NO_DIGIT)).all()
    right = distance.argmin(-1)[labelled] == batch["patch_colour"][labelled]
    assert right.float().mean() > 0.9
    assert labelled.float().mean() > 0.7 if num_crowded else labelled.float().mean() < 0.3


def test_data_loader_workers_give_the_same_frames():
    frames = Frames("train", 4, 2, seed=1, num_crowded=2)
    for drawn, batch in zip(
        DataLoader(frames, batch_size=None, num_workers=1), map(frames.__getitem__, range(4)), strict=True
    ):
        assert drawn.keys() == batch.keys()
        assert all(torch.equal(drawn[name], batch[name]) for name in batch)
