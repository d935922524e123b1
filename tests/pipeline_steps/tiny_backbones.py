"""Parameters of backbones that are trained in seconds, for the tests of the stage."""

import pytest
import torch

from pipeline_steps.backbones import language_model, vision_encoder
from pipeline_steps.backbones.schema import Embedded

TINY = Embedded(
    seed=3,
    device="cpu",
    precision="fp32",
    num_threads=1,
    image_size=56,
    patch_size=14,
    vision_width=32,
    vision_layers=2,
    vision_heads=2,
    vision_steps=5,
    vision_batch_size=4,
    vision_learning_rate=1e-3,
    vision_queries="selecting",
    vision_downsampling=1,
    language_width=48,
    language_layers=2,
    language_heads=4,
    language_kv_heads=2,
    language_steps=3,
    language_batch_size=4,
    language_learning_rate=1e-3,
    autoencoder_steps=0,
    vocabulary_size=512,
    max_positions=64,
)


@pytest.fixture(autouse=True, scope="module")
def small_held_out_sets_and_torch_as_it_was():
    """Every test of a module that imports it has them."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vision_encoder, "NUM_HELD_OUT", 16)
        patch.setattr(language_model, "NUM_HELD_OUT", 32)
        yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
