"""Training FLOPs of a run, from what its stages record: samples by task, trained weights, and lengths.

Every task of a stage is counted at its mean lengths, with the formulas that give the MFU of training steps
(`pipeline_steps.common.flop_formulas`): text-only samples cost the language model alone, frozen weights no gradient, a
second planning pass its probability. Not known by task are the tokens with a loss and those before the frames, so the
mean of the split that `flops.json` counted is taken. Modules that only an objective has are not counted.
tests/pipeline_steps/test_training_flops.py compares with the count of single training steps.
"""

from dataclasses import replace
from pathlib import Path

from model import FoveatedVLMConfig
from pipeline_steps.common.errors import UserError
from pipeline_steps.common.flop_formulas import Sample, Trained, training_flops
from pipeline_steps.common.params import TRAINING_STAGES
from pipeline_steps.report.budgets import Budget


def read_config(path, image_size):
    """The configuration of a checkpoint, with frames of `image_size` px; None if there is no such file. UserError if it
    is damaged."""
    path = Path(path)
    if not path.exists():
        return None
    try:
        config = FoveatedVLMConfig.from_pretrained(path.parent)
    except (OSError, ValueError, TypeError, AttributeError) as error:  # no JSON, no object, or values of other types
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(
            f"{path}: no configuration of the network ({reason}). Remove it and run `dvc repro stage3`, or the study, "
            "again."
        ) from None
    config.vision_config.image_size = image_size
    return config


def budget_of(stages, counted, flops, config, training):
    """`Budget` of a run; None if anything it needs is missing.

    stages: {stage: content of its json}; counted: `StreamingResult` or None; flops: `FlopsResult`; config: of the
    trained network, or None; training: section `training` of the parameters.
    """
    if set(stages) != set(TRAINING_STAGES) or any("mixture" not in values for values in stages.values()):
        return None
    if config is None or counted is None:
        return None
    num_samples, total = 0, 0.0
    for stage, values in stages.items():
        lengths, trained = lengths_of(counted.stages.get(stage), flops.assumptions), trained_groups(values)
        settings = getattr(training, stage)
        if trained is None or not values["mixture"].keys() <= lengths.keys():
            return None
        for task, entry in values["mixture"].items():
            num_samples += entry["num_samples"]
            total += entry["num_samples"] * sample_flops(config, lengths[task], trained, settings)
    return Budget(num_samples, total)


def trained_groups(values):
    """`Trained` of a stage's json: the groups with trainable weights; None if it does not say."""
    if "parameters" not in values:
        return None
    found = {entry["group"] for entry in values["parameters"] if entry["trainable"]}
    return Trained(**{group: group in found for group in vars(Trained())})


def lengths_of(counted, assumptions):
    """{task: mean `Sample`} of a `StageCounts`; assumptions: of a `FlopsResult`, with the means that it lacks."""
    sums = {}
    for tasks in counted.sources.values() if counted else ():
        for task, row in tasks.items():
            before = sums.setdefault(task, [0, 0, 0])
            sums[task] = [
                a + b for a, b in zip(before, (row.num_samples, row.num_frames, row.text_tokens), strict=True)
            ]
    labels = assumptions["mean_num_labels"]
    after = assumptions["mean_num_text_tokens"] - assumptions["mean_num_tokens_before"]  # the answer and its header
    found = {}
    for task, (count, frames, text) in sums.items():
        if count:
            text /= count
            before = max(text - after, 0) if frames else 0
            found[task] = Sample(frames / count, text, before, min(labels, text))
    return found


def sample_flops(config, sample, trained, settings):
    """FLOPs of a training sample, forward and backward. settings: section training.<stage>."""
    objective = settings.objective
    if settings.loss == "all_text":
        sample = replace(sample, num_labels=sample.num_text_tokens - 1)
    rejected = sample if settings.loss == "preference" else None

    def count(num_plans):
        return training_flops(config, sample, num_plans, trained, rejected, objective.coarse.weight > 0)

    once = count(config.num_passes)
    if not objective.second_pass_probability:
        return once
    return once + objective.second_pass_probability * (count(config.num_passes + 1) - once)
