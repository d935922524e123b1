"""The batch passed from the collator to the network in training, validation, evaluation and inference.

Shapes: B samples, S sequence, F frames of the whole batch (sample by sample, never padded), N patches.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from model.constants import IGNORE_INDEX

PER_FRAME = {"axis": "frame"}  # metadata of fields whose first axis is F; all others have B


@dataclass(kw_only=True)
class Text:
    """Token sequences. `score_mask` marks the tokens that evaluation scores."""

    input_ids: Tensor  # int64 [B, S]
    attention_mask: Tensor  # int64 [B, S], 1 = real token
    labels: Tensor  # int64 [B, S], IGNORE_INDEX at positions without loss
    score_mask: Tensor  # bool [B, S]

    def to(self, device):
        """Return a copy on another device."""
        moved = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if torch.is_tensor(value):
                moved[entry.name] = value.to(device, non_blocking=True)
            elif isinstance(value, Text):
                moved[entry.name] = value.to(device)
        return replace(self, **moved)

    def text_rows(self, start: int, stop: int) -> dict[str, Tensor]:
        """Return {field: rows start to stop - 1}, without right padding common to these rows."""
        length = int(self.attention_mask[start:stop].sum(1).max())
        return {entry.name: getattr(self, entry.name)[start:stop, :length] for entry in fields(Text)}

    def answer(self) -> dict[str, Tensor]:
        """Return the arguments of the network's `preference_log_probs` for one answer."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask, "labels": self.labels}


@dataclass(kw_only=True)
class Batch(Text):
    """B samples with their frames. `rejected`: the same chats with the rejected answers, for preference training."""

    keys: list[str]
    num_frames: Tensor  # int64 [B]
    pixel_values: Tensor = field(metadata=PER_FRAME)  # float32 [F, 3, height, width]
    frame_times: Tensor = field(metadata=PER_FRAME)  # float32 [F], seconds from the start of the clip
    target_patches: Tensor | None = field(default=None, metadata=PER_FRAME)  # bool [F, N]; None: unknown
    rejected: Text | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def inputs(self) -> dict[str, Tensor]:
        """Return the network's arguments: text without labels, and frames."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "pixel_values": self.pixel_values,
            "num_frames": self.num_frames,
            "frame_times": self.frame_times,
        }

    def counts(self) -> dict[str, int]:
        """Return the denominators of losses (labelled tokens, frames, samples) and the non-padding positions."""
        # the first token of a sequence is never predicted
        return {
            "tokens": int((self.labels[:, 1:] != IGNORE_INDEX).sum()),
            "frames": int(self.num_frames.sum()),
            "samples": len(self),
            "positions": int(self.attention_mask.sum()),
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
            yield Batch(**piece)

    def reorder_frames(self, index: Tensor) -> "Batch":
        """Return a batch whose frame i is frame `index[i]` (int64 [F]). Frame times keep their order."""
        targets = None if self.target_patches is None else self.target_patches[index]
        return replace(self, pixel_values=self.pixel_values[index], target_patches=targets)

    def tensors(self) -> dict[str, Tensor]:
        """Return {name: tensor} of all fields; those of the rejected answers are named rejected_<name>."""
        own = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        found = {name: value for name, value in own.items() if torch.is_tensor(value)}
        if self.rejected is not None:
            found |= {f"rejected_{entry.name}": getattr(self.rejected, entry.name) for entry in fields(Text)}
        return found
