"""A tiny random network and a batch for it, shared by the tests of the model."""

from dataclasses import fields

import torch
from torch.nn import functional as F
from transformers import Dinov2Config, LlamaConfig

from model import FoveatedVLMConfig, FoveatedVLMForConditionalGeneration, FoveationOptions
from model.constants import IGNORE_INDEX
from model.packing import BatchPlaces
from pipeline_steps.streaming.batch import Batch, Text

VISUAL, PAD = 64, 2
MODES = ("coarse", "fine", "autoregressive")
NUM_FRAMES = (3, 0, 1, 2)
LENGTHS = (20, 15, 12, 18)  # tokens of each sample, placeholders not counted
FIRST_VISUAL = (4, 0, 6, 2)  # where the placeholders of each sample go
LAYOUTS = {"question_first": FIRST_VISUAL, "vision_first": (1, 0, 1, 1), "nothing in front": (0, 0, 0, 0)}
BOS = 1


def make_model(
    vocab_size: int = VISUAL, max_positions: int = 128, language_width: int = 48, **options
) -> FoveatedVLMForConditionalGeneration:
    """Random weights, the same at every call; the placeholder is the first id after the vocabulary."""
    torch.manual_seed(0)
    vision = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=56, patch_size=14)
    text = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=language_width,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_positions,
        tie_word_embeddings=True,
        eos_token_id=PAD,
        pad_token_id=PAD,
    )
    defaults = {"query_dim": 24, "visual_scale": 0.1, "visual_token_id": vocab_size}
    return FoveatedVLMForConditionalGeneration(FoveatedVLMConfig(vision, text, **(defaults | options))).eval()


def make_batch(tokens_per_frame: int = 1, layout: str = "question_first") -> dict:
    """Four samples of 3, 0, 1 and 2 frames and different lengths, right-padded."""
    generator = torch.Generator().manual_seed(1)
    sizes = [length + n * tokens_per_frame for length, n in zip(LENGTHS, NUM_FRAMES, strict=True)]
    ids = torch.randint(3, 64, (4, max(sizes)), generator=generator)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE_INDEX)
    for row, (size, n, at) in enumerate(zip(sizes, NUM_FRAMES, LAYOUTS[layout], strict=True)):
        if layout == "vision_first":
            ids[row, 0] = BOS
        ids[row, at : at + n * tokens_per_frame] = VISUAL
        mask[row, :size] = 1
        ids[row, size:] = PAD
        labels[row, size - 4 : size] = ids[row, size - 4 : size]
    pixels = torch.randn(sum(NUM_FRAMES), 3, 56, 56, generator=generator)
    names = ("input_ids", "attention_mask", "labels", "pixel_values", "num_frames")
    return dict(zip(names, (ids, mask, labels, pixels, torch.tensor(NUM_FRAMES)), strict=True))


def one_sample(batch: dict, row: int) -> dict:
    """The sample alone, without its padding."""
    size = int(batch["attention_mask"][row].sum())
    start = int(batch["num_frames"][:row].sum())
    frames = int(batch["num_frames"][row])
    text = {name: batch[name][row : row + 1, :size] for name in ("input_ids", "attention_mask", "labels")}
    return {
        **text,
        "pixel_values": batch["pixel_values"][start : start + frames],
        "num_frames": batch["num_frames"][row : row + 1],
    }


def rows_of(batch: dict, rows: list[int], left: int = 0, right: int = 0) -> dict:
    """These samples of a batch in this order, with so many more padding places on either side."""
    starts = batch["num_frames"].cumsum(0) - batch["num_frames"]
    frames = [batch["pixel_values"][starts[row] : starts[row] + batch["num_frames"][row]] for row in rows]
    padding = {"input_ids": PAD, "attention_mask": 0, "labels": IGNORE_INDEX}
    text = {name: F.pad(batch[name][rows], (left, right), value=value) for name, value in padding.items()}
    shown = {**text, "pixel_values": torch.cat(frames), "num_frames": batch["num_frames"][rows]}
    return shown | {name: batch[name][rows] for name in batch if name.startswith("rejected_")}


def preference_batch(layout: str = "question_first"):
    """`make_batch` with other, shorter answers as the rejected ones."""
    batch = make_batch(layout=layout)
    rejected = {name: batch[name].clone() for name in ("input_ids", "attention_mask", "labels")}
    for row in range(4):
        asked = (rejected["labels"][row] != IGNORE_INDEX).nonzero()[:, 0]
        rejected["input_ids"][row, asked] = (rejected["input_ids"][row, asked] + 7) % 60 + 3
        rejected["labels"][row, asked] = rejected["input_ids"][row, asked]
        rejected["labels"][row, asked[-1]] = IGNORE_INDEX
        rejected["attention_mask"][row, asked[-1]] = 0
        rejected["input_ids"][row, asked[-1]] = PAD
    return batch | {f"rejected_{name}": value for name, value in rejected.items()}


def with_options(arguments: dict) -> dict:
    """Arguments of `forward` in which fields of FoveationOptions stand by themselves, as it takes them."""
    names = {field.name for field in fields(FoveationOptions)} & arguments.keys()
    if not names:
        return arguments
    options = {name: arguments[name] for name in names}
    return {name: value for name, value in arguments.items() if name not in names} | {"options": options}


def as_batch(arguments: dict, visual_id: int = VISUAL) -> Batch:
    """The `Batch` of arguments of `forward` and, prefixed rejected_, of rejected answers. Frames are 1 s apart."""
    num_samples, num_frames = len(arguments["input_ids"]), arguments["num_frames"]
    texts = [
        {name: arguments[f"{prefix}{name}"] for name in ("input_ids", "attention_mask", "labels")}
        for prefix in ("", *(("rejected_",) if "rejected_input_ids" in arguments else ()))
    ]
    for text in texts:
        inputs = (text["input_ids"], text["attention_mask"], num_frames, text["labels"])
        text["places"] = BatchPlaces.of(*inputs, visual_id=visual_id)
        text["score_mask"] = text["labels"] != IGNORE_INDEX
    own, *rejected = texts
    return Batch(
        **own,
        keys=list("abcdefgh")[:num_samples],
        num_frames=num_frames,
        pixel_values=arguments["pixel_values"],
        frame_times=torch.cat([torch.arange(count) for count in num_frames.tolist()]).float(),
        target_patches=arguments.get("target_patches"),
        rejected=Text(**rejected[0]) if rejected else None,
    )


def fine(model, **changes):
    """The output for `make_batch` in fine mode, with changed arguments or options."""
    return model(**with_options(make_batch(model.config.tokens_per_frame) | {"mode": "fine"} | changes))
