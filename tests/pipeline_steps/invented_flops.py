"""A `FlopsResult` with invented numbers, for the tests of the report."""

from pipeline_steps import metrics

ARMS = ("foveated", "A6_coarse_only", "B1_16_tokens")
SCALES = ("this network", "135M", "360M", "1.7B")
SIZES = dict.fromkeys(metrics.TrainingMemory.model_fields, 4096)


def flops_result():
    """Three arms, all modes alike; one token a frame costs half of sixteen from four frames on."""
    entry = metrics.ModeFlops(
        components=metrics.Components(**dict.fromkeys(metrics.Components.model_fields, 1e6)),
        language_passes=[4e5, 6e5],
        language_positions=[20.0, 40.0],
        num_looks=2.0,
        total=6e6,
        backward=12e6,
    )
    answer = metrics.AnswerCost(
        num_prompt_tokens=40,
        num_answer_tokens=8,
        prefill=5e6,
        first_decoded_token=1e5,
        per_decoded_token=1e5,
        total=6e6,
        key_value_bytes=40_960,
        vision_bytes=20_480,
    )
    frontier = metrics.Frontier(
        num_frames=[1, 4, 16],
        foveated=[2e6, 4e6, 9e6],
        multi_token=[1e6, 8e6, 40e6],
        foveated_training=[6e6, 12e6, 27e6],
        multi_token_training=[3e6, 24e6, 120e6],
        vision_share=[0.3, 0.4, 0.6],
        cheaper_from=4,
        cheaper_training_from=4,
    )
    steps = [metrics.CountStep(reason="the predecessor's count", flops_per_sample=1e10)]
    steps.append(metrics.CountStep(reason="the vocabulary projection", flops_per_sample=3e10))
    budget = {"budget": 1e15, "flops_per_sample": 3e10, "num_samples": 33_333}
    then = {"predecessor_flops_per_sample": 1e10, "predecessor_num_samples": 100_000}
    return metrics.FlopsResult(
        modes=dict.fromkeys(metrics.GAZE_MODES, entry),
        arms=dict.fromkeys(ARMS, entry),
        training_sample=18e6,
        training=dict.fromkeys(ARMS, 18e6),
        curves={"num_frames": [1, 2, 4], **{arm: [1e6, 2e6, 4e6] for arm in ARMS}},
        answers=dict.fromkeys(ARMS, answer),
        memory=dict.fromkeys(ARMS, metrics.TrainingMemory(**SIZES)),
        budgets=[metrics.BudgetSamples(scale="135M", arm=arm, **budget, **then) for arm in ARMS],
        corrections={"135M foveated": steps, "135M B1_16_tokens": steps},
        frontier=dict.fromkeys(SCALES, frontier),
        per="sample",
        assumptions={
            "flop": "2 per multiply-accumulate",
            "not_counted": "norms",
            "split": "test",
            "num_samples": 10,
            "bytes_per_number": 4,
            "predecessor_sample": {"num_frames": 8, "num_text_tokens": 64, "num_labels": 32},
            **dict.fromkeys(("mean_num_frames", "mean_num_text_tokens", "mean_num_labels"), 6.0),
        },
    )
