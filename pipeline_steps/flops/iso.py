"""Equal compute: training samples per budget, and the number of frames from which one token per frame is cheaper."""

import math
from dataclasses import replace

from pipeline_steps.common import flop_formulas as formulas
from pipeline_steps.common.flop_formulas import Sample
from pipeline_steps.common.flop_results import BudgetSamples, Crossover, Frontier

# Lengths of the samples that the budgets are counted in: one token before the frames, a loss on all text after them.
BUDGET_SAMPLE = Sample(num_frames=8, num_text_tokens=128, num_tokens_before=1, num_labels=127)


def budget_samples(budgets, configs, sample, objective):
    """[`BudgetSamples`]: how many training samples with the lengths of `sample` each budget (FLOPs) pays for.

    configs: {scale: {arm: configuration}}. objective: section training.<stage>.objective.
    """
    rows = []
    for budget in budgets:
        for scale, arms in configs.items():
            for arm, config in arms.items():
                ours = formulas.training_step(config, sample, objective)
                rows.append(
                    BudgetSamples(
                        budget=budget,
                        scale=scale,
                        arm=arm,
                        flops_per_sample=ours,
                        num_samples=math.floor(budget / ours),
                    )
                )
    return rows


def frontier(foveated, multi_token, text, frames, objective):
    """`Frontier` of the two arms of one language model over the numbers of frames `frames`. text: a Sample; its number
    of frames is replaced."""
    samples = [replace(text, num_frames=count) for count in frames]
    results = [formulas.forward(foveated, sample, "autoregressive") for sample in samples]
    found = crossover(foveated, multi_token, text, frames[-1], objective)
    return Frontier(
        num_frames=list(frames),
        **curves(foveated, multi_token, samples, objective),
        vision_share=[
            (result.components.vision_encoder + result.components.query_passes) / result.total for result in results
        ],
        cheaper_from=found.inference,
        cheaper_training_from=found.training,
    )


def crossovers(foveated, multi_token, text, lengths, max_num_frames, objective):
    """[`Crossover`] of the two arms of one language model, for each of `lengths`, the numbers of text tokens before the
    first frame. text: a Sample, whose text after the frames is kept."""
    after = text.num_text_tokens - text.num_tokens_before
    samples = [replace(text, num_text_tokens=before + after, num_tokens_before=before) for before in lengths]
    return [crossover(foveated, multi_token, sample, max_num_frames, objective) for sample in samples]


def crossover(foveated, multi_token, text, max_num_frames, objective):
    """`Crossover` of the two arms of one language model with the text of a Sample. Every number of frames is counted,
    as with few tokens per frame the difference of the costs can change its sign in the other direction."""
    frames = range(1, max_num_frames + 1)
    costs = curves(foveated, multi_token, [replace(text, num_frames=count) for count in frames], objective)
    return Crossover(
        num_tokens_before=text.num_tokens_before,
        num_text_tokens=text.num_text_tokens,
        max_num_frames=max_num_frames,
        inference=cheaper_from(frames, costs["foveated"], costs["multi_token"]),
        training=cheaper_from(frames, costs["foveated_training"], costs["multi_token_training"]),
    )


def curves(foveated, multi_token, samples, objective):
    """The costs of the two arms for each of the samples, named as in `Frontier`."""
    arms = {"foveated": foveated, "multi_token": multi_token}
    inference = {
        name: [formulas.forward(config, sample, "autoregressive").total for sample in samples]
        for name, config in arms.items()
    }
    training = {
        f"{name}_training": [formulas.training_step(config, sample, objective) for sample in samples]
        for name, config in arms.items()
    }
    return inference | training


def cheaper_from(frames, one, other):
    """The smallest of `frames` from which `one` stays cheaper than `other`, or None."""
    cheaper = [own < theirs for own, theirs in zip(one, other, strict=True)]
    for index, count in enumerate(frames):
        if all(cheaper[index:]):
            return count
    return None
