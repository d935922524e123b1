"""The batch passed from the collator to the network in training, validation, evaluation and inference.

Shapes: B samples, S sequence, F frames of the whole batch (sample by sample, never padded), N patches.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from functools import cache

import torch
from torch import Tensor

from model.image_processing_foveated_vlm import IMAGE_MEAN, IMAGE_STD
from model.packing import BatchPlaces

TEXT_TENSORS = ("input_ids", "attention_mask", "labels", "score_mask")
PER_FRAME = {"axis": "frame"}  # metadata of fields whose first axis is F; all others have B


@dataclass(kw_only=True)
class Text:
    """Token sequences. `score_mask` marks the tokens that evaluation scores; `places`: indices for the network."""

    input_ids: Tensor  # int64 [B, S]
    attention_mask: Tensor  # int64 [B, S], 1 = real token
    labels: Tensor  # int64 [B, S], IGNORE_INDEX at positions without loss
    score_mask: Tensor  # bool [B, S]
    places: BatchPlaces

    def to(self, device):
        """Return a copy on another device."""
        return self._each(lambda value: value.to(device, non_blocking=True), lambda value: value.to(device))

    def pin_memory(self):
        """Return a copy in pinned memory, from which a GPU reads while the host goes on."""
        return self._each(torch.Tensor.pin_memory, lambda value: value.pin_memory())

    def _each(self, of_tensor, of_other):
        """Return a copy with of_tensor(tensor) for every tensor, and of_other(value) for places and nested texts."""
        changed = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if torch.is_tensor(value):
                changed[entry.name] = of_tensor(value)
            elif isinstance(value, Text | BatchPlaces):
                changed[entry.name] = of_other(value)
        return replace(self, **changed)

    def text_rows(self, start: int, stop: int) -> dict[str, Tensor]:
        """Return {field: rows start to stop - 1}, without right padding common to these rows. On the CPU only."""
        length = int(self.attention_mask[start:stop].sum(1).max())
        rows = {name: getattr(self, name)[start:stop, :length] for name in TEXT_TENSORS}
        places = self.places.of_rows(rows["input_ids"], rows["attention_mask"], rows["labels"], start)
        return rows | {"places": places}

    def answer(self) -> dict[str, Tensor]:
        """Return the arguments of the network's `preference_log_probs` for one answer."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask, "labels": self.labels}


@dataclass(kw_only=True)
class Batch(Text):
    """B samples with their frames. `rejected`: the same chats with the rejected answers, for preference training."""

    keys: list[str]
    num_frames: Tensor  # int64 [B]
    # [F, 3, height, width]: uint8 as collated, a quarter of the bytes to move; normalised float32 after `to`
    pixel_values: Tensor = field(metadata=PER_FRAME)
    frame_times: Tensor = field(metadata=PER_FRAME)  # float32 [F], seconds from the start of the clip
    target_patches: Tensor | None = field(default=None, metadata=PER_FRAME)  # bool [F, N]; None: unknown
    rejected: Text | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device) -> "Batch":
        """Return a copy on another device, with normalised frames."""
        moved = super().to(device)
        return replace(moved, pixel_values=normalise(moved.pixel_values))

    def inputs(self) -> dict[str, Tensor]:
        """Return the network's arguments: text without labels, and frames."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "pixel_values": normalise(self.pixel_values),
            "num_frames": self.num_frames,
            "frame_times": self.frame_times,
        }

    def counts(self) -> dict[str, int]:
        """Return the denominators of losses (labelled tokens, frames, samples) and the non-padding positions."""
        return {
            "tokens": len(self.places.states),
            "frames": len(self.pixel_values),
            "samples": len(self),
            "positions": len(self.places.ids),
        }

    def split(self, micro_batch_size: int | None) -> Iterator["Batch"]:
        """Yield micro-batches of at most `micro_batch_size` samples (None: one), each with its own padding."""
        if micro_batch_size is None or micro_batch_size >= len(self):
            yield self
            return
        ends = self.num_frames.cumsum(0).tolist()
        for start in range(0, len(self), micro_batch_size):
            stop = min(start + micro_batch_size, len(self))
            frames = slice(ends[start - 1] if start else 0, ends[stop - 1])
            piece = self.text_rows(start, stop)
            for entry in fields(self):
                value = getattr(self, entry.name)
                if value is None or entry.name in piece:
                    continue
                if isinstance(value, Text):
                    piece[entry.name] = Text(**value.text_rows(start, stop))
                else:
                    piece[entry.name] = value[frames if entry.metadata == PER_FRAME else slice(start, stop)]
            own = Batch(**piece)
            yield own.pin_memory() if self.input_ids.is_pinned() else own  # slices of rows are not

    def reorder_frames(self, index: Tensor) -> "Batch":
        """Return a batch whose frame i is frame `index[i]` (int64 [F]). Frame times keep their order."""
        targets = None if self.target_patches is None else self.target_patches[index]
        return replace(self, pixel_values=self.pixel_values[index], target_patches=targets)

    def tensors(self) -> dict[str, Tensor]:
        """Return {name: tensor} of all fields; those of the rejected answers are named rejected_<name>."""
        own = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        found = {name: value for name, value in own.items() if torch.is_tensor(value)}
        if self.rejected is not None:
            found |= {f"rejected_{name}": getattr(self.rejected, name) for name in TEXT_TENSORS}
        return found


def normalise(pixels: Tensor) -> Tensor:
    """uint8 [F, 3, height, width], in any memory format -> contiguous float32, normalised as the processor does, on the
    device of the pixels. Floats are normalised already."""
    if pixels.is_floating_point():
        return pixels
    mean, std = _statistics(pixels.device)
    floats = pixels.to(torch.float32, memory_format=torch.contiguous_format)
    return floats.mul_(1 / 255).sub_(mean).div_(std)


@cache
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the colour channels, each [3, 1, 1]."""
    return tuple(torch.from_numpy(value[:, None, None]).to(device) for value in (IMAGE_MEAN, IMAGE_STD))
