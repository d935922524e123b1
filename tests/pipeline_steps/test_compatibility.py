"""Data that a network cannot take are named before any work begins."""

import pytest

from pipeline_steps.common.errors import UserError
from pipeline_steps.streaming.compatibility import check_compatibility
from tests.model.tiny import make_model
from tests.pipeline_steps.packed import Clip, columns_only


def row(key, kind, num_frames, num_tokens):
    return Clip(key, kind, num_frames, num_tokens)


def data(*rows, image_size=56):
    rows = [row("clip-a", "video", 6, 30), row("still-a", "image", 1, 30), row("chat-a", "text", 0, 30), *rows]
    found = columns_only(rows)
    found.image_size = image_size
    return found


def test_compatible_data_are_accepted():
    check_compatibility(make_model(max_num_frames=6).config, data(row("full", "video", 6, 122)), 4)  # 128 positions


@pytest.mark.parametrize(
    ("options", "rows", "image_size", "message"),
    [
        ({"max_num_frames": 5}, (), 56, "'clip-a' has 6 frames.*at most 5.*shards.max_frames"),
        ({"max_num_frames": 6}, (row("clip-b", "video", 7, 9),), 56, "'clip-b' has 7 frames"),
        ({}, (row("long", "video", 6, 123),), 56, r"'long' has 129 tokens \(6 of them visual\).*at most 128"),
        ({"layout": "vision_first"}, (row("long", "video", 6, 122),), 56, "'long' has 129 tokens"),
        ({}, (row("chat-b", "text", 0, 129),), 56, r"'chat-b' has 129 tokens \(0 of them visual\)"),
        ({"num_visual_tokens_per_frame": 16}, (row("wide", "video", 6, 33),), 56, "'wide' has 129 tokens"),
        ({}, (), 50, "frames have 50 px, not a multiple.*14 px. Set shards.image_size to 42"),
        (
            {"architecture": "multi_token", "num_visual_tokens_per_frame": 25},
            (),
            56,
            "is 25.*at most 16",
        ),
        ({"frame_downsampling": 3}, (), 56, "56 px, model.frame_downsampling 3 needs a multiple of 42 px. Change"),
        ({"frame_downsampling": 2, "fovea_size": 5}, (), 56, "4 patches a side, fewer than model.fovea_size 5. Lower"),
        (
            {"architecture": "multi_token", "num_visual_tokens_per_frame": 16, "frame_downsampling": 2},
            (),
            56,
            "is 16.*at most 4",
        ),
        (
            {"hard_attention": "top_k", "attention_top_k": 17},
            (),
            56,
            "frames of 56 px, model.attention_top_k=17 .* 17 positions, .*at most 16, or set hard_attention to 'none'",
        ),
    ],
)
def test_incompatible_data_are_rejected_with_the_sample(options, rows, image_size, message):
    with pytest.raises(UserError, match=message):
        check_compatibility(make_model(**options).config, data(*rows, image_size=image_size), 4)


@pytest.mark.parametrize("options", [{"hard_attention": "top_k", "attention_top_k": 16}, {"attention_top_k": 500}])
def test_top_k_of_all_but_one_position_and_an_unused_one_are_accepted(options):
    check_compatibility(make_model(**options).config, data(), 4)


def test_replicated_stills_count_as_several_frames():
    with pytest.raises(UserError, match=r"'still-a' has 8 frames.*at most 6.*streaming.image_replication"):
        check_compatibility(make_model(max_num_frames=6).config, data(), 8)
