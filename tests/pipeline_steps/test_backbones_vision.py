"""The vision encoder's warm-up: its frames, its queries, and patches of other sizes."""

import pytest
import torch

from pipeline_steps.backbones import vision_encoder
from pipeline_steps.backbones.frames import Frames
from pipeline_steps.common import params
from pipeline_steps.common.errors import UserError
from tests.pipeline_steps.tiny_backbones import TINY, small_held_out_sets_and_torch_as_it_was  # noqa: F401 - a fixture


def test_vision_warm_up_learns():
    options = TINY.model_copy(update={"vision_steps": 50, "vision_batch_size": 12, "vision_learning_rate": 5e-3})
    torch.manual_seed(0)
    metrics = vision_encoder.warm_up_vision_encoder(vision_encoder.build_vision_encoder(options), options, 1)
    assert metrics["patch_colour_accuracy"] > 0.6  # a sixth by chance


@pytest.mark.parametrize(("vision_queries", "num_queries"), [("selecting", 10), ("reading", 1)])
def test_query_loss_trains_the_encoder(vision_queries, num_queries):
    options = TINY.model_copy(update={"vision_steps": 1})
    encoder = vision_encoder.build_vision_encoder(options)
    heads = vision_encoder.Heads(options.vision_width, vision_queries)
    assert len(heads.queries) == num_queries
    assert heads.query_logits(torch.randn(3, num_queries, options.vision_width)).shape == (3, 10, 11)
    vision_encoder.batch_loss(encoder, heads, Frames("train", 1, 4, seed=0)[0]).backward()
    assert heads.queries.grad.abs().sum(1).gt(0).all()
    missing = [name for name, parameter in encoder.named_parameters() if parameter.grad is None]
    assert missing == []


def test_warm_up_without_queries_leaves_the_task_of_queries_out():
    options = TINY.model_copy(update={"vision_steps": 2, "vision_queries": "none"})
    encoder = vision_encoder.build_vision_encoder(options)
    metrics = vision_encoder.warm_up_vision_encoder(encoder, options, 1)
    assert set(metrics) == {"loss", "patch_digit_accuracy", "patch_colour_accuracy"}
    batch, heads = Frames("train", 1, 4, seed=0)[0], vision_encoder.Heads(options.vision_width, "none")
    vision_encoder.batch_loss(encoder, heads, batch).backward()
    assert heads.query_digit.weight.grad is None


def test_one_reading_query_can_report_every_digit():
    torch.manual_seed(0)
    encoder, heads = vision_encoder.build_vision_encoder(TINY), vision_encoder.Heads(TINY.vision_width, "reading")
    batch = Frames("train", 1, 8, seed=0)[0]
    optimizer = torch.optim.AdamW([*encoder.parameters(), *heads.parameters()], lr=5e-3)
    for _ in range(60):  # the same frames again and again
        optimizer.zero_grad()
        vision_encoder.batch_loss(encoder, heads, batch).backward()
        optimizer.step()
    encoded = vision_encoder.encode_with_queries(encoder, heads, batch)
    found = heads.query_logits(encoded.query_output).argmax(-1)
    asked, empty = vision_encoder.query_labels(batch), vision_encoder.NUM_DIGITS
    assert found[asked != empty].eq(asked[asked != empty]).float().mean() > 0.5  # a tenth by chance


@pytest.mark.parametrize(
    ("image_size", "patch_size", "downsampling", "message"),
    [
        (84, 14, 1, r"image_size is 84, expected one of 56, 112, 224"),
        (112, 16, 1, r"image_size is 112 and patch_size 16, expected a patch_size that divides 28"),
        (56, 28, 1, r"expected a patch_size that divides 14"),
        (112, 7, 8, r"vision_downsampling is 8, expected a divisor of 4"),
    ],
)
def test_patches_that_do_not_subdivide_the_worlds_are_refused_with_the_parameters(
    image_size, patch_size, downsampling, message
):
    content = params.load(params.ROOT / "params.yaml")
    sizes = {"image_size": image_size, "patch_size": patch_size, "vision_downsampling": downsampling}
    content["backbones"]["embedded"] |= sizes
    with pytest.raises(UserError, match=message):
        params.check("params.yaml", content)
    content["backbones"]["kind"] = "local"  # no warm-up
    params.check("params.yaml", content)


def test_warm_up_supports_larger_frames_and_finer_patches():
    options = TINY.model_copy(update={"image_size": 112, "patch_size": 7, "vision_steps": 3})
    encoder = vision_encoder.build_vision_encoder(options)
    assert encoder.embeddings.position_embeddings.shape == (1, 257, 32)
    assert 0 <= vision_encoder.warm_up_vision_encoder(encoder, options, 2)["query_digit_accuracy"] <= 1


def test_reduced_frames_keep_the_labels_of_their_patches():
    frames = Frames("train", 1, 3, 0, size=112, grid=16)[0]
    small = vision_encoder.reduced(frames, 4)
    assert small["frames"].shape == (3, 28, 28, 3)
    torch.testing.assert_close(small["frames"][0, 0, 0], frames["frames"][0, :4, :4].float().mean((0, 1)))
    same = Frames("train", 1, 3, 0)[0]  # one patch for each of the world's cells
    for name in ("patch_digit", "patch_colour"):
        assert torch.equal(small[name], same[name])
    assert vision_encoder.reduced(frames, 1) is frames


def test_warm_up_at_two_resolutions_helps_reduced_frames():
    """A loss on reduced frames after the same number of steps, half of them reduced, against none."""
    frames = vision_encoder.reduced(Frames("validation", 1, 64, 0, size=112, grid=16)[0], 4)
    losses = []
    for factor in (1, 4):
        options = TINY.model_copy(
            update={"image_size": 112, "patch_size": 7, "vision_steps": 24, "vision_downsampling": factor}
        )
        torch.manual_seed(0)
        encoder = vision_encoder.build_vision_encoder(options)
        heads = None

        class Kept(vision_encoder.Heads):
            def __init__(self, *arguments):
                nonlocal heads
                super().__init__(*arguments)
                heads = self

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(vision_encoder, "Heads", Kept)
            vision_encoder.warm_up_vision_encoder(encoder, options, 1)
        with torch.no_grad():
            losses.append(vision_encoder.batch_loss(encoder, heads, frames).item())
    assert losses[1] < losses[0]
