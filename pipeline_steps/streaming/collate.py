"""Collate items into one batch of tensors, for training, evaluation and interactive questions.

Shapes: B batch, S sequence, F frames of the whole batch. The collator inserts the visual placeholders into the text, so
it determines the layout. Frames are concatenated, never padded.
"""

import numpy as np
import torch

from model.constants import IGNORE_INDEX
from model.packing import BatchPlaces
from model.processing_inputs import visual_places
from pipeline_steps.common.errors import UserError
from pipeline_steps.streaming.batch import Batch, Text
from pipeline_steps.streaming.buffer_pool import BufferPool

MAX_IDLE_BYTES = 256 * 2**20  # unused memory kept for the pixels of later batches


class Collator:
    """Collates items of `TokenizedShards` into a `Batch`.

    `loss`: `all_text` labels every text token except the first, `answer_only` the answers with their end-of-turn
    tokens, and `preference` the last answer, both in the chosen and in the rejected chat.
    """

    def __init__(
        self,
        *,
        layout: str,
        loss: str,
        image_replication: int,
        tokens_per_frame: int,
        visual_id: int,
        bos_id: int,
        pad_id: int,
    ):
        self.layout, self.loss, self.image_replication = layout, loss, image_replication
        self.tokens_per_frame, self.visual_id, self.bos_id, self.pad_id = tokens_per_frame, visual_id, bos_id, pad_id
        self._pool = BufferPool(MAX_IDLE_BYTES)

    @classmethod
    def for_model(cls, config, *, loss: str, image_replication: int) -> "Collator":
        """Return the collator for a FoveatedVLMConfig."""
        text = config.text_config
        return cls(
            layout=config.layout,
            loss=loss,
            image_replication=image_replication,
            tokens_per_frame=config.tokens_per_frame,
            visual_id=config.visual_token_id,
            bos_id=text.bos_token_id,
            pad_id=text.pad_token_id if text.pad_token_id is not None else text.eos_token_id,
        )

    def __call__(self, items: list[dict], padding_side: str = "right") -> Batch:
        """Collate a non-empty list of items. padding_side: `right`, or `left` for generation.

        Raises UserError if the loss is `preference` and an item has no rejected answer.
        """
        num_frames = [self._repeats(item) * len(item["frames"]) for item in items]
        text = self._padded(items, num_frames, padding_side)
        rejected = None
        if self.loss == "preference":
            rejected = Text(**self._padded([_rejected(item) for item in items], num_frames, padding_side))
        return Batch(
            **text,
            keys=[item["key"] for item in items],
            num_frames=torch.tensor(num_frames, dtype=torch.int64),
            pixel_values=torch.from_numpy(self._pixels(items, sum(num_frames))),
            frame_times=torch.from_numpy(self._per_frame(items, "frame_times", np.zeros(0, np.float32))),
            target_patches=torch.from_numpy(self._per_frame(items, "target_patches", np.zeros((0, 1), bool)))
            if "target_patches" in items[0]
            else None,
            rejected=rejected,
        )

    def sequence_length(self, row: dict) -> int:
        """Return the number of tokens of an item, visual tokens included, given its row of the sidecar."""
        return len(self._insert(row, self._repeats(row) * row["num_frames"])["ids"])

    def _per_frame(self, items: list[dict], name: str, nothing: np.ndarray) -> np.ndarray:
        """Concatenate a per-frame field, repeated like the frames. `nothing`: its value for a batch without frames."""
        rows = [np.repeat(np.asarray(item[name], nothing.dtype), self._repeats(item), axis=0) for item in items]
        return np.concatenate([own for own in rows if len(own)] or [nothing])

    def _repeats(self, item: dict) -> int:
        """Return how often each of the item's frames occurs in the batch (stills are replicated)."""
        return self.image_replication if item["kind"] == "image" else 1

    def _pixels(self, items: list[dict], num_frames: int) -> np.ndarray:
        """Concatenate the frames: uint8 [num_frames, 3, height, width], channels last in memory as decoded. `Batch.to`
        makes them channels first on the device: doing it here takes a tenth of the time of decoding."""
        shown = [item for item in items if len(item["frames"])]
        height, width = shown[0]["frames"].shape[1:3] if shown else (1, 1)
        pixels = self._pool.empty((num_frames, height, width, 3), np.uint8)
        start = 0
        for item in shown:
            count, repeats = len(item["frames"]), self._repeats(item)
            own = pixels[start : start + count * repeats].reshape(count, repeats, height, width, 3)
            own[:] = item["frames"][:, None]  # each frame several times in a row
            start += count * repeats
        return pixels.transpose(0, 3, 1, 2)

    def _padded(self, items: list[dict], num_frames: list[int], side: str) -> dict[str, torch.Tensor | BatchPlaces]:
        """Pad the sequences and return the fields of `Text`."""
        rows = [self._insert(item, count) for item, count in zip(items, num_frames, strict=True)]
        shape = (len(rows), max(len(row["ids"]) for row in rows))
        batch = {
            "input_ids": np.full(shape, self.pad_id, np.int64),
            "attention_mask": np.zeros(shape, np.int64),
            "labels": np.full(shape, IGNORE_INDEX, np.int64),
            "score_mask": np.zeros(shape, bool),
        }
        for number, row in enumerate(rows):
            size = len(row["ids"])
            own = slice(size) if side == "right" else slice(shape[1] - size, None)
            batch["input_ids"][number, own] = row["ids"]
            batch["attention_mask"][number, own] = 1
            batch["labels"][number, own] = row["labels"]
            batch["score_mask"][number, own] = row["scored"]
        tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
        inputs = (tensors["input_ids"], tensors["attention_mask"], torch.tensor(num_frames), tensors["labels"])
        return tensors | {"places": BatchPlaces.of(*inputs, visual_id=self.visual_id)}

    def _insert(self, item: dict, num_frames: int) -> dict:
        """Insert the visual placeholders. Returns the ids, the labels and the score mask, each [sequence]."""
        ids = np.asarray(item["input_ids"], np.int64)
        answer, scored = np.asarray(item["answer_mask"], bool), np.asarray(item["score_mask"], bool)
        if self.loss == "all_text":
            answer = np.ones(len(ids), bool)
            answer[0] = False
        labels = np.where(answer, ids, IGNORE_INDEX)
        num_places = num_frames * self.tokens_per_frame
        at, places = visual_places(self.layout, num_places, item["visual_position"], self.visual_id, self.bos_id)
        return {
            "ids": np.insert(ids, at, places),
            "labels": np.insert(labels, at, np.full(len(places), IGNORE_INDEX)),
            "scored": np.insert(scored, at, np.zeros(len(places), bool)),
        }


def _rejected(item: dict) -> dict:
    """Return the item with the rejected instead of the chosen answer. Raises UserError if it has none."""
    if item["rejected_ids"] is None:
        raise UserError(
            f"sample '{item['key']}' has no rejected answer, which the loss `preference` needs. "
            "Remove its source or task from the stage's mixture."
        )
    mask = item["rejected_mask"]
    return item | {"input_ids": item["rejected_ids"], "answer_mask": mask, "score_mask": mask}
