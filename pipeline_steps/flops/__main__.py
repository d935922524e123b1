"""Floating-point operations per sample, for the lengths that the data really has.

    python -m pipeline_steps.flops

Reads params.yaml, outputs/stage3/config.json, data/shards/manifest.json and data/tokens; writes
reports/metrics/flops.json (docs/metrics.md). Every item of the split is counted with its own number of frames and
tokens, and the mean is reported. Cost: seconds.
"""

import argparse
import copy
from pathlib import Path

import numpy as np

from model import FoveatedVLMConfig
from pipeline_steps import metrics, params
from pipeline_steps.flops import formulas
from pipeline_steps.flops.formulas import Sample
from pipeline_steps.params import UserError
from pipeline_steps.records import ShardsManifest, read_record
from pipeline_steps.streaming.dataset import TokenizedShards

PARAMS = ("flops", "streaming.image_replication")
CURVE_FRAMES = (1, 2, 4, 8, 16, 32, 64)
NOT_COUNTED = (
    "norms, softmax, activations, residual additions, rotary embeddings, the loss, "
    "attention weights recomputed for pictures or for the entropy-margin loss"
)


def main():
    arguments = read_arguments()
    parameters = params.read(arguments.params, *PARAMS)
    settings = parameters.flops
    if not (arguments.checkpoint / "config.json").exists():
        raise UserError(
            f"{arguments.checkpoint}/config.json does not exist: train the model first (`dvc repro stage3`)"
        )
    config = FoveatedVLMConfig.from_pretrained(arguments.checkpoint)
    config.vision_config.image_size = read_record(
        ShardsManifest, arguments.shards / "manifest.json", "shards"
    ).frames.image_size
    rows = TokenizedShards(arguments.shards, arguments.tokens, settings.split).rows
    samples = [
        measure(row, config.layout, parameters.streaming.image_replication) for row in rows if row["kind"] != "text"
    ]
    if not samples:
        raise UserError(
            f"{arguments.tokens}: split '{settings.split}' has no samples with frames, so there is nothing to count"
        )
    result = count(config, samples, settings)
    metrics.write_json(arguments.metrics / "flops.json", result)
    for mode, flops in {**result.modes, **result.arms}.items():
        print(f"{mode:<16}{flops.total / 1e6:12.2f} MFLOP per sample")


def read_arguments():
    parser = argparse.ArgumentParser(description="Count floating-point operations per sample.")
    parser.add_argument("--params", default="params.yaml")
    parser.add_argument("--checkpoint", type=Path, default=Path("outputs/stage3"))
    parser.add_argument("--shards", type=Path, default=Path("data/shards"))
    parser.add_argument("--tokens", type=Path, default=Path("data/tokens"))
    parser.add_argument("--metrics", type=Path, default=Path("reports/metrics"))
    return parser.parse_args()


def measure(row, layout, image_replication):
    """`Sample` of a token row; the loss is asked on the answer, its end-of-turn token included."""
    frames = row["num_frames"] * (image_replication if row["kind"] == "image" else 1)
    first = layout == "vision_first"
    return Sample(
        num_frames=frames,
        num_text_tokens=len(row["input_ids"]) + first,  # vision_first: a BOS token before the frames
        num_tokens_before=1 if first else row["visual_position"],
        num_labels=int(np.sum(row["answer_mask"])),
    )


def arms_of(config, multi_tokens):
    """The networks that a fair comparison trains separately: same backbones, another way of looking."""
    foveated, coarse, ordinary = (copy.deepcopy(config) for _ in range(3))
    foveated.architecture = coarse.architecture = "foveated"
    foveated.coarse_only, coarse.coarse_only = False, True
    ordinary.architecture, ordinary.coarse_only, ordinary.num_visual_tokens_per_frame = (
        "multi_token",
        False,
        multi_tokens,
    )
    return {"foveated": foveated, "A6_coarse_only": coarse, f"B1_{multi_tokens}_tokens": ordinary}


def count(config, samples, settings):
    """`FlopsResult` of this model, of the arms that it is compared with, and of both over the number of frames."""
    modes = ("coarse", "fine", "autoregressive")
    arms = arms_of(config, settings.multi_tokens)
    typical = {
        name: round(float(np.mean([getattr(sample, name) for sample in samples])))
        for name in Sample.__dataclass_fields__
    }
    curves = {
        name: [
            formulas.forward(arm, Sample(**{**typical, "num_frames": frames}), "autoregressive").total
            for frames in CURVE_FRAMES
        ]
        for name, arm in arms.items()
    }
    return metrics.FlopsResult(
        modes={mode: formulas.mean(formulas.forward(config, sample, mode) for sample in samples) for mode in modes},
        arms={
            name: formulas.mean(formulas.forward(arm, sample, "autoregressive") for sample in samples)
            for name, arm in arms.items()
        },
        training_sample=float(np.mean([formulas.training_step(config, sample) for sample in samples])),
        training={
            name: float(np.mean([formulas.training_step(arm, sample) for sample in samples]))
            for name, arm in arms.items()
        },
        curves={"num_frames": list(map(float, CURVE_FRAMES)), **curves},
        per="sample: one forward pass with the answer's loss; training: forward and backward, all weights trained",
        assumptions={
            "flop": "2 per multiply-accumulate",
            "not_counted": NOT_COUNTED,
            "split": settings.split,
            "num_samples": len(samples),
            "second_pass_probability": config.second_pass_probability,
            **{f"mean_{name}": float(np.mean([getattr(sample, name) for sample in samples])) for name in typical},
        },
    )


if __name__ == "__main__":
    params.run(main)
