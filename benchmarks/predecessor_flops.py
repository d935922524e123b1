"""Training FLOPs as an earlier code base counted them, beside ours, with the reasons for the difference.

    python -m benchmarks.predecessor_flops
    python -m benchmarks.predecessor_flops --scale 1.7B

A research code base of early 2026 planned its scaling runs with samples = budget / (3 x FLOPs of a forward pass). Its
count of a forward pass differs from ours (pipeline_steps/common/flop_formulas.py):

- It counts a multiply-accumulate as one FLOP.
- It assumes as many key-value heads as query heads, and a feed-forward without gate, four times as wide as the model.
- It leaves out the vocabulary projection, the feed-forward of the queries and the patch embedding.
- Its coarse pass of the language model reads the whole text.
- It assumes 8 frames and 128 text tokens, whatever the data contains.

The script reads params.yaml and prints two tables: the samples that each planned budget pays for by both counts, and
the corrections that lead from its count of a training sample to ours. Cost: seconds.
"""

import argparse
import math
from typing import NamedTuple

from pipeline_steps.common import flop_formulas as formulas
from pipeline_steps.common import params
from pipeline_steps.common.errors import run_main
from pipeline_steps.flops import __main__ as flops
from pipeline_steps.flops import iso, scales
from pipeline_steps.flops.iso import BUDGET_SAMPLE

NUM_FRAMES, NUM_TEXT_TOKENS, NUM_PATCH_ROWS = BUDGET_SAMPLE.num_frames, BUDGET_SAMPLE.num_text_tokens, 257
BACKWARD = 3  # its factor from a forward pass to a training sample
# Its plan: {budget: {scale: (foveated samples, sixteen-token samples)}}. `num_samples` reproduces every number.
PLANNED = {
    1.6e16: {"135M": (64_688, 65_523), "360M": (36_228, 37_244), "1.7B": (14_002, 14_639)},
    5.6e16: {"135M": (226_408, 229_332), "360M": (126_798, 130_356), "1.7B": (49_007, 51_238)},
    1.6e17: {"135M": (646_882, 655_234), "360M": (362_281, 372_447), "1.7B": (140_022, 146_396)},
    3.1e17: {"135M": (1_253_334, 1_269_516), "360M": (701_920, 721_617), "1.7B": (271_293, 283_643)},
}


class CountStep(NamedTuple):
    """The count of a training sample after one correction."""

    reason: str
    flops_per_sample: float


def forward(config):
    """Its count of a forward pass.

    L (12 N D^2 + 2 N^2 D) per frame, L (4 D^2 + 2 N D) per query and pass, T D E per visual token and pass, and
    l (12 S E^2 + 2 S^2 E) per pass of the language model. A foveated network takes two passes, a multi-token one takes
    one.
    """
    vision, text = config.vision_config, config.text_config
    width, rows, layers = vision.hidden_size, NUM_PATCH_ROWS, vision.num_hidden_layers
    passes = 1 if config.architecture == "multi_token" else 2
    encoder = NUM_FRAMES * layers * (12 * rows * width**2 + 2 * rows**2 * width)
    tokens = NUM_FRAMES * config.tokens_per_frame
    projection = passes * tokens * width * text.hidden_size
    queries = 0 if passes == 1 else passes * NUM_FRAMES * layers * (4 * width**2 + 2 * rows * width)
    return encoder + queries + projection + passes * language_pass(text, NUM_TEXT_TOKENS + tokens)


def language_pass(text, positions):
    """Its count of one pass of the language model over `positions` tokens."""
    width = text.hidden_size
    return text.num_hidden_layers * (12 * positions * width**2 + 2 * positions**2 * width)


def training_sample(config):
    """Its count of a training sample, forward and backward."""
    return BACKWARD * forward(config)


def num_samples(config, budget):
    """Training samples that a budget in FLOPs pays for by its count."""
    return math.floor(budget / training_sample(config))


def corrections(config, objective):
    """[`CountStep`] from its count of a training sample to ours, one reason at a time. The last step equals ours.

    config: a foveated network with one query per frame, or a multi-token one, on frames of 224 px. objective: section
    training.<stage>.objective.
    """
    text, scale = config.text_config, 2 * BACKWARD
    length = NUM_TEXT_TOKENS + NUM_FRAMES * config.tokens_per_frame
    foveated = config.architecture != "multi_token"
    passes = 2 if foveated else 1
    single = formulas.forward(config, BUDGET_SAMPLE, "fine", config.num_passes)
    ours = formulas.training_step(config, BUDGET_SAMPLE, objective)
    width, layers = text.hidden_size, text.num_hidden_layers
    key_width = text.num_key_value_heads * formulas.head_width(text)
    read_until = BUDGET_SAMPLE.num_tokens_before + NUM_FRAMES * config.tokens_per_frame
    full_pass, short_pass = (formulas.language_pass(text, rows, rows) for rows in (length, read_until))
    changes = [
        ("a multiply-accumulate is two operations", BACKWARD * forward(config)),
        ("grouped-query attention", scale * passes * length * layers * 2 * width * (key_width - width)),
        ("gated feed-forward", scale * passes * length * layers * (3 * text.intermediate_size - 8 * width) * width),
        ("vocabulary projection", BACKWARD * single.components.vocabulary_projection),
    ]
    if foveated:
        vision = config.vision_config
        counted = 2 * vision.num_hidden_layers * (4 * vision.hidden_size**2 + 2 * NUM_PATCH_ROWS * vision.hidden_size)
        queries = single.num_query_passes * NUM_FRAMES * formulas.query_pass_flops(config) - 2 * NUM_FRAMES * counted
        changes.append(("the planning pass stops at the last frame", BACKWARD * (short_pass - full_pass)))
        changes.append(("queries: feed-forward and projection", BACKWARD * queries))
    value = training_sample(config)
    steps = [CountStep("the earlier count", value)]
    for reason, change in changes:
        value += change
        steps.append(CountStep(reason, value))
    once = single.total + single.backward
    steps.append(CountStep("patch embedding, last vision layer, planner, no gradient of the pixels", once))
    if ours != once:
        reason = f"a second planning pass in {objective.second_pass_probability:.0%} of the steps"
        reason += ", and a coarse loss" if objective.coarse.weight > 0 else ""
        steps.append(CountStep(reason, ours))
    return steps


def print_budgets(configs, objective):
    """Samples that every budget of PLANNED pays for, by both counts. configs: {scale: {arm: configuration}}."""
    print(f"Training samples of {NUM_FRAMES} frames and {NUM_TEXT_TOKENS} text tokens")
    print(f"{'budget':>9} {'scale':>6} {'arm':<14}{'ours':>12}{'earlier':>12}{'ratio':>7}")
    for row in iso.budget_samples(PLANNED, configs, BUDGET_SAMPLE, objective):
        earlier = num_samples(configs[row.scale][row.arm], row.budget)
        ratio = row.num_samples / earlier
        print(f"{row.budget:9.1e} {row.scale:>6} {row.arm:<14}{row.num_samples:12,}{earlier:12,}{ratio:7.2f}")


def print_corrections(configs, objective):
    """The corrections of every network, in GFLOP of a training sample. configs: {scale: {arm: configuration}}."""
    for scale, arms in configs.items():
        for arm, config in arms.items():
            steps = corrections(config, objective)
            print(f"\n{scale} {arm}, GFLOP per training sample")
            before = 0.0
            for step in steps:
                change = (step.flops_per_sample - before) / 1e9
                print(f"  {step.reason:<70}{change:{'+' if before else ''}10.1f}")
                before = step.flops_per_sample
            print(f"  {'our count':<70}{before / 1e9:10.1f}")


def main():
    parser = argparse.ArgumentParser(description="Compare training FLOPs with the count of an earlier code base.")
    parser.add_argument("--params", default="params.yaml")
    parser.add_argument(
        "--scale", nargs="+", choices=list(scales.LANGUAGE_MODELS), default=list(scales.LANGUAGE_MODELS)
    )
    arguments = parser.parse_args()
    parameters = params.read(arguments.params, *flops.PARAMS)
    configs, objective = flops.scaled_arms(arguments.scale, parameters), parameters.training.stage3.objective
    print_budgets(configs, objective)
    print_corrections(configs, objective)


if __name__ == "__main__":
    run_main(main)
