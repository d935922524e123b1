"""Counts what a network starts on a device, by a dispatch trace on the CPU."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Dinov2Config, LlamaConfig

from model import FoveatedVLMConfig, FoveatedVLMForConditionalGeneration


class Launches(TorchDispatchMode):
    """Counts the operations that start work on a device, and those for which the host waits."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")

    def __init__(self):
        super().__init__()
        self.count, self.waits = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        by_mask = name.startswith(("index", "_index_put")) and any(
            torch.is_tensor(index) and index.dtype == torch.bool
            for arg in args
            if isinstance(arg, list | tuple)
            for index in arg
        )
        if name in self.WAITS or by_mask:
            self.waits.append(name)
        views = function.is_view or name in ("_unsafe_view", "detach", "lift_fresh")
        self.count += not views
        return function(*args, **(kwargs or {}))


def true_depths(**options):
    """12 vision and 30 language layers with the head ratio of SmolLM2-135M, narrow."""
    vision = Dinov2Config(hidden_size=24, num_hidden_layers=12, num_attention_heads=2, image_size=28, patch_size=14)
    text = LlamaConfig(
        vocab_size=64,
        hidden_size=36,
        intermediate_size=48,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    config = FoveatedVLMConfig(vision, text, query_dim=24, visual_scale=0.1, visual_token_id=64, **options)
    return FoveatedVLMForConditionalGeneration(config).eval()
