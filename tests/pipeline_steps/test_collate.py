"""Collation: placeholders per layout, labels per loss, frames without padding."""

import numpy as np
import pytest
import torch

from model.constants import IGNORE_INDEX
from model.processing_foveated_vlm import normalise
from pipeline_steps.streaming.batch import Batch
from pipeline_steps.streaming.collate import Collator

VISUAL, BOS, PAD = 99, 1, 2


def make_item(kind: str, num_frames: int, answer: list[int]) -> dict:
    """Ids: 1 10 11 (question) | 20 (between) | answer; the frames go after the question in question_first."""
    ids = [1, 10, 11, 20, *answer]
    return {
        "key": f"{kind}-{num_frames}",
        "kind": kind,
        "input_ids": ids,
        "visual_position": 3,
        "answer_mask": [False] * 4 + [True] * len(answer),
        "score_mask": [False] * 5 + [True] * (len(answer) - 1),
        "frame_times": [0.5 * frame for frame in range(num_frames)],
        "frames": np.full((num_frames, 14, 14, 3), 10 * num_frames, np.uint8),
    }


ITEMS = [make_item("video", 3, [30, 31, 2]), make_item("text", 0, [32, 2]), make_item("image", 1, [33, 2])]


def make_collator(layout: str = "question_first", loss: str = "answer_only", tokens_per_frame: int = 1) -> Collator:
    return Collator(
        layout=layout,
        loss=loss,
        image_replication=4,
        tokens_per_frame=tokens_per_frame,
        visual_id=VISUAL,
        bos_id=BOS,
        pad_id=PAD,
    )


def rows_of(batch: Batch, name: str) -> list[list[int]]:
    lengths = batch.attention_mask.sum(1)
    return [row[:length].tolist() for row, length in zip(getattr(batch, name), lengths, strict=True)]


def test_question_first_inserts_the_frames_after_the_question():
    batch = make_collator()(ITEMS)
    assert rows_of(batch, "input_ids") == [
        [1, 10, 11, VISUAL, VISUAL, VISUAL, 20, 30, 31, 2],
        [1, 10, 11, 20, 32, 2],
        [1, 10, 11, VISUAL, VISUAL, VISUAL, VISUAL, 20, 33, 2],
    ]
    assert rows_of(batch, "labels")[0] == [IGNORE_INDEX] * 7 + [30, 31, 2]
    assert rows_of(batch, "score_mask")[0] == [False] * 8 + [True, True]
    assert batch.num_frames.tolist() == [3, 0, 4]  # the still is shown four times
    assert batch.pixel_values.shape == (7, 3, 14, 14)
    assert (batch.input_ids[1, 6:] == PAD).all()
    assert (batch.labels[1, 6:] == IGNORE_INDEX).all()


def test_vision_first_inserts_bos_and_frames_at_the_start():
    batch = make_collator("vision_first")(ITEMS)
    assert rows_of(batch, "input_ids")[0] == [BOS, VISUAL, VISUAL, VISUAL, 1, 10, 11, 20, 30, 31, 2]
    assert rows_of(batch, "input_ids")[1] == [1, 10, 11, 20, 32, 2]  # text only: as in the other layout


@pytest.mark.parametrize("layout", ["question_first", "vision_first"])
def test_the_same_tokens_are_labelled_in_every_layout(layout):
    for loss in ("answer_only", "all_text"):
        labels = rows_of(make_collator(layout, loss, tokens_per_frame=2)(ITEMS), "labels")
        asked = [[token for token in row if token != IGNORE_INDEX] for row in labels]
        expected = [30, 31, 2] if loss == "answer_only" else [10, 11, 20, 30, 31, 2]
        assert asked[0] == expected
        assert all(VISUAL not in row for row in labels)


def test_target_patches_are_repeated_like_the_frames():
    items = [item | {"target_patches": np.eye(len(item["frames"]), 4, dtype=bool)} for item in ITEMS]
    batch = make_collator()(items)
    assert batch.target_patches.dtype == torch.bool
    assert batch.target_patches.int().argmax(1).tolist() == [0, 1, 2, 0, 0, 0, 0]  # the still's four times
    assert len(make_collator()([items[1]]).target_patches) == 0


def test_frame_times_are_repeated_like_the_frames():
    batch = make_collator()(ITEMS)
    assert batch.frame_times.dtype == torch.float32
    assert batch.frame_times.tolist() == [0, 0.5, 1, 0, 0, 0, 0]  # seconds; the still's four times
    assert make_collator()([ITEMS[1]]).frame_times.shape == (0,)


def test_left_padding_is_available_for_generation():
    left, right = make_collator()(ITEMS, padding_side="left"), make_collator()(ITEMS)
    assert left.attention_mask[1].tolist() == [0] * 4 + [1] * 6
    assert left.input_ids[1].tolist() == [PAD] * 4 + right.input_ids[1, :6].tolist()
    assert torch.equal(left.pixel_values, right.pixel_values)


def test_to_and_split_cover_every_field_of_a_batch():
    items = [item | {"target_patches": np.eye(len(item["frames"]), 4, dtype=bool)} for item in ITEMS]
    items = [
        item | {"rejected_ids": [1, 10, 11, 20, 40, 2], "rejected_mask": [False] * 4 + [True] * 2} for item in items
    ]
    batch = make_collator(loss="preference")(items)
    assert {tensor.device.type for tensor in batch.to("meta").tensors().values()} == {"meta"}
    assert batch.to("meta").keys == batch.keys
    pieces = list(batch.split(2))
    assert [piece.keys for piece in pieces] == [batch.keys[:2], batch.keys[2:]]
    assert all(piece.tensors().keys() == batch.tensors().keys() for piece in pieces)
    for name in ("target_patches", "pixel_values", "frame_times", "num_frames"):
        assert torch.equal(torch.cat([getattr(piece, name) for piece in pieces]), getattr(batch, name)), name
    assert pieces[1].rejected.labels[0, -2:].tolist() == [40, 2]
    assert list(batch.split(None)) == [batch]


def test_several_tokens_per_frame_are_inserted():
    batch = make_collator(tokens_per_frame=2)(ITEMS)
    assert (batch.input_ids == VISUAL).sum(1).tolist() == [6, 0, 8]
    assert batch.num_frames.tolist() == [3, 0, 4]


def test_frames_are_copied_as_decoded_and_channels_first_on_the_device():
    """The network gets contiguous pixels, so its results do not depend on the memory format of the loader."""
    frames = np.random.default_rng(0).integers(0, 256, (3, 14, 14, 3), dtype=np.uint8)
    batch = make_collator()([ITEMS[0] | {"frames": frames}])
    assert torch.equal(batch.pixel_values, torch.from_numpy(frames).permute(0, 3, 1, 2))
    assert batch.pixel_values.is_contiguous(memory_format=torch.channels_last)
    moved = batch.to("cpu").pixel_values
    assert moved.is_contiguous()
    torch.testing.assert_close(moved, torch.from_numpy(normalise(frames)))
    assert torch.equal(batch.inputs()["pixel_values"], moved)


def test_batch_without_frames_is_supported():
    batch = make_collator()([ITEMS[1]])
    assert len(batch.pixel_values) == 0
    assert batch.num_frames.tolist() == [0]


def test_pixels_are_normalised_with_imagenet_statistics():
    frames = np.zeros((1, 2, 2, 3), np.uint8)
    frames[..., 0] = 255
    pixels = torch.from_numpy(normalise(frames))
    torch.testing.assert_close(pixels[0, :, 0, 0], torch.tensor([(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225]))
