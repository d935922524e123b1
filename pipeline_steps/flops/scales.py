"""Shapes of the pretrained backbones that the budgets assume; needs no download and no weights.

Language models: SmolLM2-135M, -360M and -1.7B-Instruct (their published config.json). Vision encoder: DINOv2-small on
frames of 224 px, 16 x 16 patches.
"""

from transformers import Dinov2Config, LlamaConfig

from model import FoveatedVLMConfig

VOCABULARY = 49152
LANGUAGE_MODELS = {  # width, feed-forward width, layers, heads, key-value heads
    "135M": (576, 1536, 30, 9, 3),
    "360M": (960, 2560, 32, 15, 5),
    "1.7B": (2048, 8192, 24, 32, 32),
}


def vision_config():
    return Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, mlp_ratio=4, patch_size=14, image_size=224
    )


def language_config(scale):
    """The `LlamaConfig` of a scale, one of LANGUAGE_MODELS."""
    width, inner, layers, heads, key_value_heads = LANGUAGE_MODELS[scale]
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )


def scale_of(parameters):
    """Which of LANGUAGE_MODELS the parameters (a nested dict) take from the Hub, with the vision encoder and frames
    that are counted here; None: another network."""
    backbones, vision = parameters["backbones"], vision_config()
    if backbones["kind"] != "hub" or parameters["shards"]["image_size"] != vision.image_size:
        return None
    if not backbones["hub"]["vision"]["repository"].endswith("/dinov2-small"):
        return None
    repository = backbones["hub"]["language"]["repository"]
    return next((name for name in LANGUAGE_MODELS if repository.endswith(f"/SmolLM2-{name}-Instruct")), None)


def scaled(scale, options):
    """`FoveatedVLMConfig` of a scale with the parameters `options` (section `model`); `query_dim` is the vision
    encoder's width."""
    vision = vision_config()
    return FoveatedVLMConfig(vision, language_config(scale), **{**options, "query_dim": vision.hidden_size})
