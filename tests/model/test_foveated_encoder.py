"""The walk against the library's own DINOv2."""

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from model.foveated_encoder import FoveatedEncoder

RENAMED = {
    "q_proj": "attention.query",
    "k_proj": "attention.key",
    "v_proj": "attention.value",
    "o_proj": "output.dense",
}


def published(name: str) -> str:
    """Key names of newer library versions -> those of published checkpoints."""
    for new, old in RENAMED.items():
        name = name.replace(f"attention.{new}", f"attention.{old}")
    return name


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14, layerscale_value=0.5
    )
    theirs = Dinov2Model(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    ours = FoveatedEncoder(config).eval()
    ours.load_state_dict({published(name): value for name, value in theirs.state_dict().items()})
    return ours, theirs


@pytest.mark.parametrize("side", [56, 84])
@torch.no_grad()
def test_patch_features_equal_the_librarys(pair, side):
    ours, theirs = pair
    frames = torch.randn(3, 3, side, side)
    features = ours.walk(frames, need_patch_features=True).patch_features
    torch.testing.assert_close(features, theirs(frames).last_hidden_state, atol=1e-5, rtol=0)


@torch.no_grad()
def test_queries_ride_along_without_changing_the_patches(pair):
    ours, _ = pair
    frames, queries = torch.randn(3, 3, 56, 56), torch.randn(3, 2, 48)
    alone = ours.walk(frames, need_patch_features=True)
    together = ours.walk(frames, queries, need_patch_features=True, output_attentions=True)
    short = ours.walk(frames, queries)  # skips the patches' own last layer
    torch.testing.assert_close(together.patch_features, alone.patch_features, atol=1e-6, rtol=0)
    torch.testing.assert_close(short.query_output, together.query_output, atol=1e-6, rtol=0)
    features, weights = ours.attend(queries, alone, output_attentions=True)
    torch.testing.assert_close(features, together.query_output, atol=1e-5, rtol=0)
    torch.testing.assert_close(weights, together.attention_weights, atol=1e-6, rtol=0)


def test_a_gated_feed_forward_is_refused():
    with pytest.raises(ValueError, match="not supported"):
        FoveatedEncoder(Dinov2Config(hidden_size=48, num_attention_heads=4, use_swiglu_ffn=True))
