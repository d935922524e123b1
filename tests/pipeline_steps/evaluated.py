"""Networks and clips whose scores are known beforehand, for the tests of the evaluation.

A clip of `Clips` is a list of numbers, one per frame: the frame's pixels all have that value.
"""

import types

import numpy as np
import torch
from torch import nn

from model.constants import IGNORE_INDEX
from model.outputs import FoveatedVLMOutput
from model.packing import BatchPlaces
from pipeline_steps.streaming.batch import Batch
from pipeline_steps.streaming.targets import GroundTruth

VOCABULARY, NUM_PATCHES = 64, 4  # frames of 2 x 2 patches of one pixel
NUM_SCORED = 2  # tokens of every answer


class Weighing(nn.Module):
    """Loss of every scored token: sum over frames of (t + 1) * value, plus 100 for static queries, minus the number of
    target patches for oracle ones. Its prediction is the sum of the values; right where that is 7."""

    def __init__(self, **options):
        super().__init__()
        self.config = types.SimpleNamespace(
            architecture="foveated", vision_config=types.SimpleNamespace(patch_size=1), query_source="planned"
        )
        self.config.__dict__.update(options)
        self.language_model = nn.Module()
        self.language_model.lm_head = nn.Linear(VOCABULARY, VOCABULARY, bias=False)
        nn.init.eye_(self.language_model.lm_head.weight)

    def forward(self, pixel_values, num_frames, labels, options, **others):
        values = pixel_values.mean((1, 2, 3)).split(num_frames.tolist())
        loss = torch.stack([(own * torch.arange(1, len(own) + 1)).sum() for own in values])
        if options.query_source == "static":
            loss = loss + 100
        if options.query_source == "oracle":
            targets = options.target_patches.split(num_frames.tolist())
            loss = loss - torch.stack([own.sum() for own in targets])
        answers = torch.stack([own.sum() for own in values]).long()
        asked = labels != IGNORE_INDEX
        states = nn.functional.one_hot(answers, VOCABULARY).float()[:, None].expand(*asked.shape, -1)
        self.language_model.lm_head(states[asked])
        return FoveatedVLMOutput(token_loss=loss[:, None] * asked, correct=(answers == 7)[:, None] & asked)


def clip(key, values, **fields):
    """An item as `TokenizedShards` gives it."""
    frames = np.array(values, np.float32)[:, None, None, None] * np.ones((1, 2, 2, 3), np.float32)
    fixed = {"key": key, "item": 0, "source": "made", "kind": "video", "per_frame": False}
    fixed["frame_times"] = [float(number) for number in range(len(values))]
    return fixed | {"num_frames": len(values), "frames": frames} | fields


def collate(items):
    shape = (len(items), 4)
    scored = torch.zeros(shape, dtype=torch.bool)
    scored[:, -NUM_SCORED:] = True
    ones = torch.ones(shape, dtype=torch.long)
    return Batch(
        input_ids=ones,
        attention_mask=ones,
        labels=ones,
        places=BatchPlaces.of(ones, ones, None, ones, visual_id=0),
        score_mask=scored,
        keys=[item["key"] for item in items],
        num_frames=torch.tensor([len(item["frames"]) for item in items]),
        pixel_values=torch.from_numpy(np.concatenate([item["frames"] for item in items])).permute(0, 3, 1, 2),
        frame_times=torch.from_numpy(np.concatenate([np.float32(item["frame_times"]) for item in items])),
    )


def loaded(items, truths=None, task="made"):
    """One batch as `scoring.batches` gives it."""
    return [(task, items, collate(items), truths or [None] * len(items))]


def truth_at(*patches):
    """The target fills one patch of every frame; None: it is not visible."""
    target = np.zeros((len(patches), NUM_PATCHES), bool)
    for t, patch in enumerate(patches):
        if patch is not None:
            target[t, patch] = True
    return GroundTruth(target, target, np.zeros((len(patches), 4)))
