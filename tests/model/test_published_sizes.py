"""The published backbones, by their configurations: parameter counts on the meta device, nothing is downloaded."""

import pytest
import torch
from transformers import Dinov2Config, LlamaConfig

from model import FoveatedVLMConfig, FoveatedVLMForConditionalGeneration

DINOV2_SMALL = {
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "image_size": 518,
    "patch_size": 14,
    "layerscale_value": 1.0,
    "layer_norm_eps": 1e-6,
}
DINOV2_BASE = DINOV2_SMALL | {"hidden_size": 768, "num_attention_heads": 12}
SMOLLM2 = {
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
SMOLLM2_135M = SMOLLM2 | {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "rope_theta": 100_000,
}
SMOLLM2_360M = SMOLLM2 | {
    "hidden_size": 960,
    "intermediate_size": 2560,
    "num_hidden_layers": 32,
    "num_attention_heads": 15,
    "num_key_value_heads": 5,
    "rope_theta": 100_000,
}
SMOLLM2_1_7B = SMOLLM2 | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "rope_theta": 130_000,
}
# language model, vision encoder; parameters of each, and of everything else (connector, planner, queries)
SIZES = {
    "135M": (SMOLLM2_135M, DINOV2_SMALL, 134_515_008, 22_056_192, 591_168),
    "360M": (SMOLLM2_360M, DINOV2_SMALL, 361_821_120, 22_056_192, 886_464),
    "1.7B": (SMOLLM2_1_7B, DINOV2_SMALL, 1_711_376_384, 22_056_192, 1_723_136),
    "135M, base": (SMOLLM2_135M, DINOV2_BASE, 134_515_008, 86_579_712, 959_808),
}
# What the sizes are called: rounded names of the backbones added up, 135 + 22 + .6 and so on
NOMINAL = {"135M": 157.6e6, "360M": 382.6e6, "1.7B": 1.73e9}


def count(module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", SIZES)
def test_parameters_of_the_published_sizes(name):
    language, vision, *expected = SIZES[name]
    text = LlamaConfig(**language)
    config = FoveatedVLMConfig(Dinov2Config(**vision), text, visual_scale=0.14, visual_token_id=text.vocab_size)
    with torch.device("meta"):
        model = FoveatedVLMForConditionalGeneration(config)
    assert all(p.is_meta for p in model.parameters())
    d, e, q = vision["hidden_size"], language["hidden_size"], config.query_dim
    assert expected[2] == (d * e + e) + (e * q + q) + q * d + q  # connector, planner, projection, static query
    parts = count(model.language_model), count(model.vision_encoder)
    assert [*parts, count(model) - sum(parts)] == expected
    if name in NOMINAL:
        assert count(model) == pytest.approx(NOMINAL[name], rel=0.01)
    rope = model.config.text_config.rope_parameters
    assert (rope["rope_theta"], text.head_dim) == (language["rope_theta"], 64)


def test_the_baseline_and_the_fixed_look_differ_by_the_query_path_alone():
    """So a comparison at this size is not one of sizes: below .5 % of the parameters."""
    sizes = {}
    for name, options in {
        "planned": {},
        "coarse only": {"coarse_only": True},
        "sixteen tokens": {"architecture": "multi_token", "num_visual_tokens_per_frame": 16},
    }.items():
        config = FoveatedVLMConfig(
            Dinov2Config(**DINOV2_SMALL),
            LlamaConfig(**SMOLLM2_135M),
            visual_scale=0.14,
            visual_token_id=49152,
            **options,
        )
        with torch.device("meta"):
            sizes[name] = count(FoveatedVLMForConditionalGeneration(config))
    assert sizes["planned"] - sizes["coarse only"] == 576 * 384 + 384  # the planner
    assert sizes["coarse only"] - sizes["sixteen tokens"] == 384 * 384 + 384  # projection and static query
    assert max(sizes.values()) < 1.005 * min(sizes.values())
