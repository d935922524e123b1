"""Model FLOPs of training steps, computed from batch shapes, and the peak FLOP/s of the device.

Model FLOPs utilisation (Chowdhery et al. 2022, "PaLM", appendix B) is the FLOPs per second that the model requires,
divided by the device's peak. Padding and recomputed layers do not count.
"""

import copy

import torch

from model.constants import IGNORE_INDEX
from pipeline_steps.common.flop_formulas import Sample, Trained, training_flops
from pipeline_steps.streaming.batch import Batch, Text
from pipeline_steps.training.parameters import group_of

# dense bf16 tensor-core TFLOP/s of NVIDIA's data sheets
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "L4": 121.0, "RTX 4090": 165.0}


def peak_flops(given: float | None, device: str, precision: str) -> float | None:
    """Peak FLOP/s of one device; None if unknown. given: TFLOP/s, overrides the table."""
    if given is not None:
        return given * 1e12
    if device == "cpu" or precision != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for known, tflops in PEAK_TFLOPS.items() if known in name), None)


class StepFlops:
    """Counts the forward and backward FLOPs of a network's training steps.

    A group of weights counts as trained if one of its parameters requires a gradient when this object is created.
    image_size: side of the frames in px. coarse_loss: whether the text loss of the coarse pass is trained on as well.
    """

    def __init__(self, model: torch.nn.Module, image_size: int, coarse_loss: bool = False):
        self.config, self.coarse_loss = copy.deepcopy(model.config), coarse_loss
        self.config.vision_config.image_size = image_size
        groups = {group_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.trained = Trained(**{group: group in groups for group in vars(Trained())})

    def of_batch(self, batch: Batch, num_plans: int) -> float:
        """FLOPs of a batch. With rejected answers both answers of each pair count."""
        rejected = [None] * len(batch)
        if batch.rejected is not None:
            rejected = samples_of(self.config, batch.rejected, batch.num_frames)
        pairs = zip(samples_of(self.config, batch, batch.num_frames), rejected, strict=True)
        return float(
            sum(
                training_flops(self.config, sample, num_plans, self.trained, pair, self.coarse_loss)
                for sample, pair in pairs
            )
        )


def samples_of(config, text: Text, num_frames: torch.Tensor) -> list[Sample]:
    """Lengths of the samples of a batch; padding is not counted."""
    ids, mask, labels = text.input_ids, text.attention_mask, text.labels
    is_text = mask.bool() & (ids != config.visual_token_id)  # [B, S]
    before = (is_text & ((ids == config.visual_token_id).cumsum(1) == 0)).sum(1) * (num_frames > 0)
    lengths = (num_frames, is_text.sum(1), before, (labels[:, 1:] != IGNORE_INDEX).sum(1))
    return [Sample(*numbers) for numbers in zip(*(values.tolist() for values in lengths), strict=True)]
