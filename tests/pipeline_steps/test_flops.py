"""FLOP formulas against the counter of PyTorch on the real network."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Dinov2Config, LlamaConfig

from model.configuration_foveated_vlm import FoveatedVLMConfig
from model.modeling_foveated_vlm import FoveatedVLMForConditionalGeneration
from pipeline_steps.flops import formulas
from pipeline_steps.flops.formulas import Sample

VISUAL = 128
SAMPLE = Sample(num_frames=5, num_text_tokens=23, num_tokens_before=9, num_labels=7)


def make_config(**options):
    vision = Dinov2Config(image_size=56, patch_size=14, hidden_size=32, num_hidden_layers=3, num_attention_heads=4)
    text = LlamaConfig(
        vocab_size=128,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
    )
    options = {"query_dim": 24, "visual_scale": 0.1, "visual_token_id": VISUAL, **options}
    return FoveatedVLMConfig(vision, text, **options)


def batch_of(config, sample):
    k = config.tokens_per_frame
    after = sample.num_text_tokens - sample.num_tokens_before
    ids = [5] * sample.num_tokens_before + [VISUAL] * (sample.num_frames * k) + [7] * after
    labels = [-100] * (len(ids) - sample.num_labels) + [7] * sample.num_labels
    return {
        "input_ids": torch.tensor([ids]),
        "labels": torch.tensor([labels]),
        "pixel_values": torch.randn(sample.num_frames, 3, 56, 56),
        "num_frames": torch.tensor([sample.num_frames]),
    }


def counted(config, sample, backward=False, **options):
    torch.manual_seed(0)
    network = FoveatedVLMForConditionalGeneration(config).train(backward)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):  # the fused CPU kernel is unknown to the counter
        loss = network(**batch_of(config, sample), **options).loss
        if backward:
            loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("mode", ["coarse", "fine", "autoregressive"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention": "shallow"},
        {"coarse_only": True},
        {"architecture": "multi_token", "num_visual_tokens_per_frame": 16},
        {"num_visual_tokens_per_frame": 3},
        {"num_visual_tokens_per_frame": 3, "token_aggregation": "weighted", "frame_time_embedding": "sinusoidal"},
        {"num_passes": 2, "attention_temperature": 0.5, "hard_attention": "top_k"},
    ],
    ids=["deep", "shallow", "coarse_only", "multi_token", "three_queries", "aggregated", "passes"],
)
def test_forward_agrees_with_the_counter(mode, options):
    config = make_config(**options)
    expected = counted(config, SAMPLE, mode=mode)
    assert formulas.forward(config, SAMPLE, mode).total == pytest.approx(expected, rel=1e-6)


def test_second_plan_agrees_with_the_counter():
    config = make_config()
    assert formulas.forward(config, SAMPLE, "fine", 2).total == pytest.approx(
        counted(config, SAMPLE, mode="fine", num_plans=2), rel=1e-6
    )


@pytest.mark.parametrize("num_plans", [1, 2])
def test_training_agrees_with_the_counter(num_plans):
    config = make_config(second_pass_probability=num_plans - 1.0)
    expected = counted(config, SAMPLE, backward=True, mode="fine", num_plans=num_plans)
    assert formulas.training_step(config, SAMPLE) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "options", [{"coarse_only": True}, {"architecture": "multi_token", "num_visual_tokens_per_frame": 16}]
)
def test_training_of_single_pass_arms_agrees_with_the_counter(options):
    config = make_config(**options)
    expected = counted(config, SAMPLE, backward=True, mode="fine")
    assert formulas.training_step(config, SAMPLE) == pytest.approx(expected, rel=1e-6)
