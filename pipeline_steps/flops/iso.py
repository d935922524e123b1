"""Equal compute: training samples per budget, and the number of frames from which one token per frame is cheaper."""

import math

from pipeline_steps.common import flop_formulas as formulas
from pipeline_steps.common.flop_formulas import Sample
from pipeline_steps.common.metrics import BudgetSamples, Frontier
from pipeline_steps.flops import predecessor


def budget_samples(budgets, configs, sample, objective):
    """[`BudgetSamples`] of budgets in FLOPs, configs {scale: {arm: configuration}} and the lengths `sample`. objective:
    section training.<stage>.objective.

    The predecessor's numbers always use its own lengths (`predecessor.SAMPLE`).
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
                        predecessor_flops_per_sample=predecessor.training_sample(config),
                        predecessor_num_samples=predecessor.num_samples(config, budget),
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
