"""Model FLOPs of training steps, computed from batch shapes, and the peak FLOP/s of the device.

Model FLOPs utilisation (Chowdhery et al. 2022, "PaLM", appendix B) is the FLOPs per second that the model requires,
divided by the device's peak. Padding and recomputed layers do not count.
"""

import copy

import torch

from pipeline_steps.common.flop_formulas import Sample, Trained, training_flops
from pipeline_steps.training.objective import IGNORE_INDEX
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
    image_size: side of the frames in px.
    """

    def __init__(self, model: torch.nn.Module, image_size: int):
        self.config = copy.deepcopy(model.config)
        self.config.vision_config.image_size = image_size
        groups = {group_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.trained = Trained(**{group: group in groups for group in vars(Trained())})

    def of_batch(self, batch: dict, num_plans: int) -> float:
        """FLOPs of a batch from `Collator`. A batch with rejected answers counts both answers of each pair."""
        pairs = samples_of(self.config, batch), [None] * len(batch["input_ids"])
        if "rejected_input_ids" in batch:
            pairs = pairs[0], samples_of(self.config, batch, "rejected_")
        return float(
            sum(
                training_flops(self.config, sample, num_plans, self.trained, rejected)
                for sample, rejected in zip(*pairs, strict=True)
            )
        )


def samples_of(config, batch: dict, prefix: str = "") -> list[Sample]:
    """Lengths of the samples of a batch from `Collator`; padding is not counted. prefix: of the answer's keys."""
    ids, mask, labels = (batch[f"{prefix}{name}"] for name in ("input_ids", "attention_mask", "labels"))
    num_frames = batch["num_frames"]
    is_text = mask.bool() & (ids != config.visual_token_id)  # [B, S]
    before = (is_text & ((ids == config.visual_token_id).cumsum(1) == 0)).sum(1) * (num_frames > 0)
    lengths = (num_frames, is_text.sum(1), before, (labels[:, 1:] != IGNORE_INDEX).sum(1))
    return [Sample(*numbers) for numbers in zip(*(values.tolist() for values in lengths), strict=True)]
