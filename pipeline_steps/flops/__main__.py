"""FLOPs per sample at the lengths of the real data, and the number of training samples per compute budget.

    python -m pipeline_steps.flops
    python -m pipeline_steps.flops --budget 1.6e16 5.6e16 --scale 135M 360M 1.7B       prints a table only

The first form reads params.yaml, outputs/stage3/config.json, data/shards/manifest.json and data/tokens; writes
outputs/metrics/flops.json (docs/metrics.md). Every item of the split is counted with its own number of frames and
tokens, and the mean is reported. The second form needs params.yaml only; --frames, --text-tokens, --tokens-before and
--labels set the lengths of its samples. Cost: seconds.
"""

import argparse
import copy
from dataclasses import asdict
from pathlib import Path

import numpy as np

from model import FoveatedVLMConfig
from pipeline_steps.common import flop_formulas as formulas
from pipeline_steps.common import metrics, params
from pipeline_steps.common.errors import UserError, run_main
from pipeline_steps.common.files import read_record
from pipeline_steps.common.flop_formulas import Sample
from pipeline_steps.common.flop_results import FlopsResult, ModeFlops
from pipeline_steps.common.schemas import ShardsManifest
from pipeline_steps.flops import iso, scales, serving
from pipeline_steps.streaming.dataset import TokenizedShards

PARAMS = ("flops", "model", "streaming.image_replication", "training.stage3.objective")
CURVE_FRAMES = (1, 2, 4, 8, 16, 32, 64)
FRONTIER_FRAMES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
NOT_COUNTED = (
    "norms, softmax, activations, residual additions, rotary embeddings, the loss, "
    "attention weights recomputed for heatmaps or for the entropy-margin loss"
)


def main():
    arguments = read_arguments()
    parameters = params.read(arguments.params, *PARAMS)
    settings = parameters.flops
    if arguments.budget:
        print_budgets(arguments, parameters)
        return
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
            f"{arguments.tokens}: split '{settings.split}' has 0 samples with frames, nothing to count. "
            "Change flops.split."
        )
    result = count(config, samples, parameters)
    metrics.write_json(arguments.metrics / "flops.json", result)
    for mode, flops in {**result.modes, **result.arms}.items():
        print(f"{mode:<16}{flops.total / 1e6:12.2f} MFLOP per sample")


def read_arguments():
    parser = argparse.ArgumentParser(description="Count floating-point operations.")
    parser.add_argument("--params", default="params.yaml")
    parser.add_argument("--checkpoint", type=Path, default=Path("outputs/stage3"))
    parser.add_argument("--shards", type=Path, default=Path("data/shards"))
    parser.add_argument("--tokens", type=Path, default=Path("data/tokens"))
    parser.add_argument("--metrics", type=Path, default=Path("outputs/metrics"))
    budget = parser.add_argument_group("samples that a budget pays for")
    budget.add_argument("--budget", type=float, nargs="+", metavar="FLOPS", help="training compute")
    budget.add_argument("--scale", nargs="+", choices=list(scales.LANGUAGE_MODELS), help="default: flops.scales")
    defaults = iso.BUDGET_SAMPLE
    budget.add_argument("--frames", type=int, default=defaults.num_frames)
    budget.add_argument("--text-tokens", type=int, default=defaults.num_text_tokens)
    budget.add_argument("--tokens-before", type=int, default=defaults.num_tokens_before)
    budget.add_argument("--labels", type=int, default=defaults.num_labels)
    return parser.parse_args()


def print_budgets(arguments, parameters):
    """Prints the table of the second form."""
    lengths = (arguments.frames, arguments.text_tokens, arguments.tokens_before, arguments.labels)
    if min(arguments.budget) <= 0 or min(lengths) < 0 or max(lengths[2:]) > arguments.text_tokens:
        raise UserError(
            f"--budget {arguments.budget}, --frames {lengths[0]}, --text-tokens {lengths[1]}, --tokens-before "
            f"{lengths[2]}, --labels {lengths[3]}: budgets must be positive, lengths must not be negative, and "
            "--tokens-before and --labels must not exceed --text-tokens"
        )
    names = arguments.scale or parameters.flops.scales
    objective = parameters.training.stage3.objective
    rows = iso.budget_samples(arguments.budget, scaled_arms(names, parameters), Sample(*lengths), objective)
    print(f"Training samples of {lengths[0]} frames and {lengths[1]} text tokens ({lengths[3]} with a loss)")
    print(f"{'budget':>9} {'scale':>6} {'arm':<14}{'GFLOP each':>11}{'samples':>12}")
    for row in rows:
        print(f"{row.budget:9.1e} {row.scale:>6} {row.arm:<14}{row.flops_per_sample / 1e9:11.1f}{row.num_samples:12,}")


def measure(row, layout, image_replication):
    """`Sample` of a token row; the loss covers the answer, including its end-of-turn token."""
    frames = row["num_frames"] * (image_replication if row["kind"] == "image" else 1)
    first = layout == "vision_first"
    return Sample(
        num_frames=frames,
        num_text_tokens=len(row["input_ids"]) + first,  # vision_first: a BOS token before the frames
        num_tokens_before=1 if first else row["visual_position"],
        num_labels=int(np.sum(row["answer_mask"])),
    )


def arms_of(config, multi_tokens):
    """{arm: configuration} of the networks to compare: same backbones, different visual architectures."""
    foveated, coarse, ordinary = (copy.deepcopy(config) for _ in range(3))
    if config.architecture == "multi_token":  # its tokens per frame are not a number of queries
        foveated.num_visual_tokens_per_frame = coarse.num_visual_tokens_per_frame = 1
    foveated.architecture = coarse.architecture = "foveated"
    foveated.coarse_only, coarse.coarse_only = False, True
    ordinary.architecture, ordinary.coarse_only, ordinary.num_visual_tokens_per_frame = (
        "multi_token",
        False,
        multi_tokens,
    )
    return {"foveated": foveated, "A6_coarse_only": coarse, f"B1_{multi_tokens}_tokens": ordinary}


def scaled_arms(names, parameters):
    """{scale: {arm: configuration}} of the foveated and the multi-token network with pretrained backbones."""
    multi_tokens = parameters.flops.multi_tokens
    found = {}
    for name in names:
        arms = arms_of(scales.scaled(name, parameters.model.model_dump()), multi_tokens)
        found[name] = {arm: arms[arm] for arm in ("foveated", f"B1_{multi_tokens}_tokens")}
    return found


def count(config, samples, parameters):
    """`FlopsResult` of this model and of the arms, at the mean lengths and over the number of frames."""
    settings = parameters.flops
    modes = ("coarse", "fine", "autoregressive")
    arms, objective = arms_of(config, settings.multi_tokens), parameters.training.stage3.objective
    means = {
        name: float(np.mean([getattr(sample, name) for sample in samples])) for name in Sample.__dataclass_fields__
    }
    typical = Sample(**{name: round(value) for name, value in means.items()})
    size = settings.bytes_per_number
    return FlopsResult(
        modes={mode: mean_flops(config, samples, mode) for mode in modes},
        arms={name: mean_flops(arm, samples, "autoregressive") for name, arm in arms.items()},
        training_sample=training(config, samples, objective),
        training={name: training(arm, samples, objective) for name, arm in arms.items()},
        curves={"num_frames": list(map(float, CURVE_FRAMES)), **{n: curve(arm, typical) for n, arm in arms.items()}},
        answers={name: serving.answer(arm, typical, settings.num_answer_tokens, size) for name, arm in arms.items()},
        memory={name: serving.training_memory(arm, typical, size) for name, arm in arms.items()},
        **compare_scales(parameters, scaled_arms(settings.scales, parameters), arms),
        per="sample: one forward pass with the answer's loss; training: forward and backward, all weights trained",
        assumptions={
            "flop": "2 per multiply-accumulate",
            "not_counted": NOT_COUNTED,
            "split": settings.split,
            "num_samples": len(samples),
            "second_pass_probability": objective.second_pass_probability,
            "bytes_per_number": size,
            "frontier": settings.frontier.model_dump(),
            "budget_sample": vars(iso.BUDGET_SAMPLE),
            **{f"mean_{name}": value for name, value in means.items()},
        },
    )


def mean_flops(config, samples, mode):
    """FLOPs in `mode`: mean over the samples."""
    found = formulas.mean(formulas.forward(config, sample, mode) for sample in samples)
    return ModeFlops.model_validate(asdict(found))


def training(config, samples, objective):
    """Mean FLOPs of a training sample. objective: of the stage that made the checkpoint."""
    return float(np.mean([formulas.training_step(config, sample, objective) for sample in samples]))


def curve(config, typical):
    """Autoregressive cost over CURVE_FRAMES."""
    samples = [Sample(**{**vars(typical), "num_frames": frames}) for frames in CURVE_FRAMES]
    return [formulas.forward(config, sample, "autoregressive").total for sample in samples]


def compare_scales(parameters, scaled, arms):
    """The fields of `FlopsResult` for the pretrained backbones: `budgets`, and `frontier` and `crossovers`, whose first
    entry is this network."""
    settings = parameters.flops
    text = Sample(num_frames=0, **settings.frontier.model_dump())
    objective = parameters.training.stage3.objective
    own = {name: arms[name] for name in arms if name != "A6_coarse_only"}
    compared = {"this network": own, **scaled}
    return {
        "budgets": iso.budget_samples(settings.budgets, scaled, iso.BUDGET_SAMPLE, objective),
        "frontier": {
            name: iso.frontier(*entries.values(), text, FRONTIER_FRAMES, objective)
            for name, entries in compared.items()
        },
        "crossovers": {
            name: iso.crossovers(
                *entries.values(), text, settings.crossover_tokens_before, FRONTIER_FRAMES[-1], objective
            )
            for name, entries in compared.items()
        },
    }


if __name__ == "__main__":
    run_main(main)
