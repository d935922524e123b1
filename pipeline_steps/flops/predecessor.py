"""The predecessor's count of compute, and why it was wrong. A research code base of early 2026 planned its scaling runs
with it: samples = budget / (3 x its count of a forward pass).

It counted multiply-accumulates as FLOPs, took the language model for one with as many key-value heads as heads and with
an ungated feed-forward of four times its width, left out the projection to the vocabulary, the queries' feed-forward
and the patches' embedding, counted a coarse pass over the whole text, and did so for 8 frames and 128 text tokens
whatever the data held.
"""

import math

from pipeline_steps.common import flop_formulas as formulas
from pipeline_steps.common.flop_formulas import Sample
from pipeline_steps.common.metrics import CountStep

NUM_FRAMES, NUM_TEXT_TOKENS, NUM_PATCH_ROWS = 8, 128, 257
# Its sample in our terms: a token before the frames, loss on all text after it.
SAMPLE = Sample(NUM_FRAMES, NUM_TEXT_TOKENS, num_tokens_before=1, num_labels=NUM_TEXT_TOKENS - 1)
BACKWARD = 3  # its factor from a forward pass to a training sample
# What it planned: {budget: {scale: (foveated samples, sixteen-token samples)}}. `num_samples` reproduces every number.
PLANNED = {
    1.6e16: {"135M": (64_688, 65_523), "360M": (36_228, 37_244), "1.7B": (14_002, 14_639)},
    5.6e16: {"135M": (226_408, 229_332), "360M": (126_798, 130_356), "1.7B": (49_007, 51_238)},
    1.6e17: {"135M": (646_882, 655_234), "360M": (362_281, 372_447), "1.7B": (140_022, 146_396)},
    3.1e17: {"135M": (1_253_334, 1_269_516), "360M": (701_920, 721_617), "1.7B": (271_293, 283_643)},
}


def forward(config):
    """Its count of a forward pass: L (12 N D^2 + 2 N^2 D) per frame, L (4 D^2 + 2 N D) per query and pass, T D E per
    visual token and pass, l (12 S E^2 + 2 S^2 E) per pass of the language model; two passes of a foveated network, one
    of one with ordinary tokens."""
    vision, text = config.vision_config, config.text_config
    width, rows, layers = vision.hidden_size, NUM_PATCH_ROWS, vision.num_hidden_layers
    passes = 1 if config.architecture == "multi_token" else 2
    encoder = NUM_FRAMES * layers * (12 * rows * width**2 + 2 * rows**2 * width)
    tokens = NUM_FRAMES * config.tokens_per_frame
    projection = passes * tokens * width * text.hidden_size
    queries = 0 if passes == 1 else passes * NUM_FRAMES * layers * (4 * width**2 + 2 * rows * width)
    return encoder + queries + projection + passes * language_pass(text, NUM_TEXT_TOKENS + tokens)


def language_pass(text, positions):
    """Its count of one pass over `positions`."""
    width = text.hidden_size
    return text.num_hidden_layers * (12 * positions * width**2 + 2 * positions**2 * width)


def training_sample(config):
    return BACKWARD * forward(config)


def num_samples(config, budget):
    return math.floor(budget / training_sample(config))


def corrections(config, objective):
    """[`CountStep`]: from its count of a training sample to ours, one reason at a time; the last step is ours exactly.

    config: a foveated network with one query or one with ordinary tokens, at its frame size and lengths. objective:
    section training.<stage>.objective.
    """
    text, scale = config.text_config, 2 * BACKWARD
    length = NUM_TEXT_TOKENS + NUM_FRAMES * config.tokens_per_frame
    foveated = config.architecture != "multi_token"
    passes = 2 if foveated else 1
    single = formulas.forward(config, SAMPLE, "fine", config.num_passes)
    ours = formulas.training_step(config, SAMPLE, objective)
    width, layers = text.hidden_size, text.num_hidden_layers
    key_width = text.num_key_value_heads * formulas.head_width(text)
    read_until = SAMPLE.num_tokens_before + NUM_FRAMES * config.tokens_per_frame
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
        walk = single.num_query_passes * NUM_FRAMES * formulas.query_pass_flops(config) - 2 * NUM_FRAMES * counted
        changes.append(("planning reads no text behind the frames", BACKWARD * (short_pass - full_pass)))
        changes.append(("queries: feed-forward and projection", BACKWARD * walk))
    value = training_sample(config)
    steps = [CountStep(reason="the predecessor's count", flops_per_sample=value)]
    for reason, change in changes:
        value += change
        steps.append(CountStep(reason=reason, flops_per_sample=value))
    once = single.total + single.backward
    rest = "patch embedding, last vision layer, planner, no gradient of the pixels"
    steps.append(CountStep(reason=rest, flops_per_sample=once))
    if ours != once:
        reason = f"a second plan in {objective.second_pass_probability:.0%} of the steps"
        reason += ", and a coarse loss" if objective.coarse.weight > 0 else ""
        steps.append(CountStep(reason=reason, flops_per_sample=ours))
    return steps
