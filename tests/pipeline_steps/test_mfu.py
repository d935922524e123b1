"""FLOPs of training steps against the counter of PyTorch on the real network; what the MFU is made of."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline_steps.monitoring import mfu
from pipeline_steps.monitoring.metrics_logger import MetricsLogger
from pipeline_steps.monitoring.mfu import StepFlops, peak_flops
from pipeline_steps.training import train_loop
from pipeline_steps.training.distributed import DistributedContext
from pipeline_steps.training.parameters import GROUPS, group_of
from tests.model.tiny import as_batch, make_batch, make_model, one_sample, preference_batch, rows_of
from tests.objectives import frozen, training_model
from tests.pipeline_steps.test_golden_losses import make_run

pytestmark = pytest.mark.usefixtures("separate_projections")


def make_trained(groups=GROUPS, **options):
    model = make_model(**options).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(group_of(name) in groups)
    return model


def flops_of(model, arguments, num_plans, image_size=56, coarse=0.0):
    return StepFlops(model, image_size, coarse > 0).of_batch(as_batch(arguments), num_plans)


def counted(model, arguments, num_plans, coarse=0.0):
    """By the counter. The patches of a frozen vision encoder are encoded by themselves here: they need no gradient."""
    if not any(parameter.requires_grad for parameter in model.vision_encoder.parameters()):

        def encode_apart(pixel_values, times, queries, query_attention, output_attentions):
            encoded = model.vision_encoder.encode(pixel_values, need_patch_features=model.config.attention == "shallow")
            encoded = model.shallow_attention.prepare(encoded) if model.config.attention == "shallow" else encoded
            if queries is None:
                return encoded, None
            return encoded, model._attend(queries, encoded, times, query_attention, output_attentions)

        if model.config.architecture == "foveated":
            model._encode = encode_apart
    loss = "preference" if "rejected_input_ids" in arguments else "answer_only"
    batch, training = as_batch(arguments), training_model(model, loss, coarse={"weight": coarse})
    reference = frozen(model) if loss == "preference" else None
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):  # the fused CPU kernel is unknown to the counter
        loss, _ = training(batch, num_plans, training.counts(batch), reference)
        if loss.requires_grad:
            loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("groups", [g for n in (1, 2, 3) for g in itertools.combinations(GROUPS, n)], ids=" ".join)
@pytest.mark.parametrize("options", [{}, {"coarse": 0.5}, {"num_visual_tokens_per_frame": 3}], ids=str)
def test_step_flops_agree_with_the_counter_for_every_set_of_frozen_weights(groups, options):
    """Samples of 3, 0, 1 and 2 frames, each by itself, so that nothing is padding."""
    coarse, options = options.get("coarse", 0.0), {name: options[name] for name in options if name != "coarse"}
    model = make_trained(groups, **options)
    batch = make_batch(model.config.tokens_per_frame)
    for row, num_plans in itertools.product(range(4), (1, 2)):
        sample = one_sample(batch, row)
        expected = counted(model, sample, num_plans, coarse)
        assert flops_of(model, sample, num_plans, coarse=coarse) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "groups", [GROUPS, ("connector",), ("connector", "language"), ("vision", "connector")], ids=" ".join
)
@pytest.mark.parametrize(
    "options",
    [
        {"attention": "shallow"},
        {"coarse_only": True},
        {"architecture": "multi_token", "num_visual_tokens_per_frame": 4},
        {"num_visual_tokens_per_frame": 3, "token_aggregation": "weighted", "frame_time_embedding": "sinusoidal"},
        {"query_source": "static"},
        {"query_source": "static", "coarse": 0.5},
    ],
    ids=str,
)
def test_step_flops_agree_with_the_counter_for_every_architecture(options, groups):
    coarse, options = options.get("coarse", 0.0), {name: options[name] for name in options if name != "coarse"}
    model = make_trained(groups, **options)
    sample = one_sample(make_batch(model.config.tokens_per_frame), 0)
    expected = counted(model, sample, 2, coarse)
    assert flops_of(model, sample, 2, coarse=coarse) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("layout", ["question_first", "vision_first"])
@pytest.mark.parametrize("groups", [GROUPS, ("connector",)], ids=" ".join)
def test_a_preference_counts_both_answers_and_the_reference(layout, groups):
    model = make_trained(groups)
    for row in (0, 1, 3):
        pair = rows_of(preference_batch(layout), [row])
        for prefix in ("", "rejected_"):
            names = [f"{prefix}{name}" for name in ("input_ids", "attention_mask", "labels")]
            size = int(pair[names[1]].sum())
            pair |= {name: pair[name][:, :size] for name in names}
        if not int(pair["num_frames"]) and groups != GROUPS:
            continue  # nothing that reads text is trained
        expected = counted(model, pair, 1)
        assert flops_of(model, pair, 1) == pytest.approx(expected, rel=1e-6)


def test_frames_count_at_their_actual_size():
    model = make_trained()
    sample = one_sample(make_batch(), 0)
    sample["pixel_values"] = torch.randn(3, 3, 84, 84)
    assert flops_of(model, sample, 1, 84) == pytest.approx(counted(model, sample, 1), rel=1e-6)
    assert model.config.vision_config.image_size == 56


def test_padding_is_not_counted():
    model, batch = make_trained(), make_batch()
    apart = sum(flops_of(model, one_sample(batch, row), 2) for row in range(4))
    assert flops_of(model, batch, 2) == apart
    assert flops_of(model, rows_of(batch, [0, 1, 2, 3], right=9), 2) == apart


def test_a_frozen_vision_encoder_costs_less_than_a_trained_one():
    sample = one_sample(make_batch(), 0)
    all_of_it = flops_of(make_trained(), sample, 1)
    for groups, share in ((("connector", "language"), 0.75), (("connector",), 0.75)):
        assert flops_of(make_trained(groups), sample, 1) < share * all_of_it


@pytest.mark.parametrize("stage", ["stage1", "stage3"])
def test_every_step_counts_its_own_batch(stage, tmp_path):
    """Not the first one's again and again; and no layer twice where activations are checkpointed."""
    found = {}
    batch = preference_batch() if stage == "stage3" else make_batch()
    steps = [as_batch(rows_of(batch, rows)) for rows in ([1], [0, 1, 2, 3], [0, 0, 0])]
    for checkpointed in (False, True):
        run = make_run(stage, "question_first", tmp_path)
        run.common.activation_checkpointing, run.train.image_size = checkpointed, 56
        seen = found[checkpointed] = []
        run.logger = SimpleNamespace(peak=1.0, step=lambda *_, seen=seen, **counts: seen.append(counts["flops"]))
        trainer = train_loop.prepare(run)
        rows = [train_loop.train_step(run, trainer, batch, step) for step, batch in enumerate(steps)]
        expected = [run.step_flops.of_batch(batch, row["num_plans"]) for batch, row in zip(steps, rows, strict=True)]
        assert seen == expected
    assert found[True] == found[False]
    assert 0 < found[True][0] < found[True][1]


# ---------------------------------------------------------------- the share of the peak


def make_watch(tmp_path, device="cpu", precision="fp32", **options):
    settings = SimpleNamespace(peak_tflops=None, tensorboard=False, dvclive=False, wandb_project=None)
    settings.__dict__.update(options)
    return MetricsLogger(settings, "stage1", 4, tmp_path, DistributedContext(device=device), precision)


def test_mfu_is_total_flops_over_time_and_peak(tmp_path, monkeypatch):
    watch = make_watch(tmp_path, peak_tflops=2.0)
    for flops in (1e12, 5e12, 6e12):
        watch.step({}, False, num_samples=4, num_positions=80, flops=flops)
    monkeypatch.setattr("time.monotonic", lambda: watch.started + 30)
    assert watch.speed()["speed/mfu"] == pytest.approx(12 / 30 / 2)


def test_no_mfu_if_the_peak_is_unknown(tmp_path, monkeypatch):
    assert "speed/mfu" not in make_watch(tmp_path).speed()
    for name, precision, expected in (
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 80GB HBM3", "fp32", None),
        ("Quadro P400", "bf16", None),
    ):
        monkeypatch.setattr(mfu.torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(None, "cuda", precision) == expected
