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


SHAPES = {  # width, heads, layers, image size of the position embeddings
    "tiny": (48, 4, 3, 56),
    "small": (384, 6, 3, 518),
    "base": (768, 12, 2, 518),
    "no bias": (48, 3, 2, 70),
}


def make_pair(name: str):
    """(our walk, the library's model) with the same random weights."""
    torch.manual_seed(0)
    width, heads, layers, size = SHAPES[name]
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=size,
        patch_size=14,
        layerscale_value=0.5,
        qkv_bias=name != "no bias",
    )
    theirs = Dinov2Model(config).eval()
    for key, parameter in theirs.named_parameters():  # every part counts: biases and positions too
        mean = 1.0 if "norm" in key and key.endswith("weight") else 0.0
        torch.nn.init.normal_(parameter, mean, std=0.1 if width < 100 else 0.03)
    ours = FoveatedEncoder(config).eval()
    ours.load_state_dict({published(key): value for key, value in theirs.state_dict().items()})
    return ours, theirs


@pytest.fixture(scope="module")
def pair():
    return make_pair("tiny")


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_patch_features_equal_the_librarys(name):
    """At the size of the position embeddings, smaller, larger and not square; the shapes of dinov2-small and -base."""
    ours, theirs = make_pair(name)
    size = ours.config.image_size
    for height, width in {(size, size), (224, 224), (84, 56)}:
        frames = torch.randn(1 if size == height else 2, 3, height, width)
        encoded = ours.encode(frames, need_patch_features=True)
        expected = theirs(frames).last_hidden_state
        assert 0.5 < expected.std() < 2
        torch.testing.assert_close(encoded.patch_features, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["tiny", "base"])
@torch.no_grad()
def test_a_query_row_goes_the_way_of_the_librarys_own_rows(name):
    """A row that starts as the class token or a patch does attends to the same places, so it ends as that one."""
    ours, theirs = make_pair(name)
    frames = torch.randn(2, 3, 84, 84)
    queries = theirs.embeddings(frames)[:, [0, 3]]
    expected = theirs(frames).last_hidden_state[:, [0, 3]]
    torch.testing.assert_close(ours.encode(frames, queries).query_output, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.attend(queries, ours.encode(frames))[0], expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_queries_ride_along_without_changing_the_patches(pair):
    ours, _ = pair
    frames, queries = torch.randn(3, 3, 56, 56), torch.randn(3, 2, 48)
    alone = ours.encode(frames, need_patch_features=True)
    together = ours.encode(frames, queries, need_patch_features=True, output_attentions=True)
    short = ours.encode(frames, queries)  # skips the patches' own last layer
    torch.testing.assert_close(together.patch_features, alone.patch_features, atol=1e-6, rtol=0)
    torch.testing.assert_close(short.query_output, together.query_output, atol=1e-6, rtol=0)
    features, weights = ours.attend(queries, alone, output_attentions=True)
    torch.testing.assert_close(features, together.query_output, atol=1e-5, rtol=0)
    torch.testing.assert_close(weights, together.attention_weights, atol=1e-6, rtol=0)


def test_a_gated_feed_forward_is_refused():
    with pytest.raises(ValueError, match="not supported"):
        FoveatedEncoder(Dinov2Config(hidden_size=48, num_attention_heads=4, use_swiglu_ffn=True))
