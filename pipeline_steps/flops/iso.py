"""Equal compute: training samples per budget, and the number of frames from which one token per frame is cheaper."""

import math

from pipeline_steps.common import flop_formulas as formulas
from pipeline_steps.common.flop_formulas import Sample
from pipeline_steps.common.flop_results import BudgetSamples, Frontier

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
    samples = [Sample(**{**vars(text), "num_frames": count}) for count in frames]
    results = [formulas.forward(foveated, sample, "autoregressive") for sample in samples]
    curves = {
        "foveated": [result.total for result in results],
        "multi_token": [formulas.forward(multi_token, sample, "autoregressive").total for sample in samples],
        "foveated_training": [formulas.training_step(foveated, sample, objective) for sample in samples],
        "multi_token_training": [formulas.training_step(multi_token, sample, objective) for sample in samples],
    }
    return Frontier(
        num_frames=list(frames),
        **curves,
        vision_share=[
            (result.components.vision_encoder + result.components.query_passes) / result.total for result in results
        ],
        cheaper_from=cheaper_from(frames, curves["foveated"], curves["multi_token"]),
        cheaper_training_from=cheaper_from(frames, curves["foveated_training"], curves["multi_token_training"]),
    )


def cheaper_from(frames, one, other):
    """The smallest of `frames` from which `one` stays cheaper than `other`, or None."""
    cheaper = [own < theirs for own, theirs in zip(one, other, strict=True)]
    for index, count in enumerate(frames):
        if all(cheaper[index:]):
            return count
    return None
