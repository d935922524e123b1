"""Where the tokens of a batch are, computed on the CPU before the batch reaches the device.

The language model reads a batch without padding: real tokens are the rows of one matrix. All indices that this needs
follow from the token ids, so the collator computes them, and a forward pass on a GPU neither waits for the host nor
starts work to find them. The text before the frames does not depend on the frames, so it is read once for all passes.

Order of the N rows: the text before the frames of the B' samples that have frames (M rows), the samples without frames
(A rows in both parts), then, for every sample with frames, its visual tokens and the text after them (R rows).

Shapes: B samples, S sequence, F frames of the whole batch, P visual tokens per frame, L labelled tokens.
"""

import numpy as np
import torch
from torch import Tensor

from .constants import IGNORE_INDEX


class Packing:
    """Rows of several sequences, each of which reads itself. All int64.

    positions [rows]: position of every row in its sequence. starts [sequences + 1]: where every sequence starts among
    the rows sequence by sequence, and the end. order [rows]: these rows; places [rows]: of every row among them. padded
    [sequences, longest]: row of every place of the padded sequences; padding repeats a row. unpadded [rows]: place of
    every row in the flattened padded sequences.
    """

    names = ("positions", "starts", "order", "places", "padded", "unpadded")

    def __init__(
        self, positions: Tensor, starts: Tensor, order: Tensor, places: Tensor, padded: Tensor, unpadded: Tensor
    ):
        self.positions, self.starts, self.order, self.places = positions, starts, order, places
        self.padded, self.unpadded = padded, unpadded


class Continuation(Packing):
    """Rows that also read earlier ones: the M rows of text before the frames, which come first among the keys.

    The rows are in the order of their sequences. before [B']: earlier rows of every sequence; positions count them.
    key_starts, key_padded, key_unpadded, key_order, key_places: the same indices for the M + rows keys, earlier ones
    followed by own ones.
    """

    names = (*Packing.names, "before", "key_starts", "key_padded", "key_unpadded", "key_order", "key_places")

    def __init__(
        self,
        positions: Tensor,
        starts: Tensor,
        order: Tensor,
        places: Tensor,
        padded: Tensor,
        unpadded: Tensor,
        before: Tensor,
        key_starts: Tensor,
        key_padded: Tensor,
        key_unpadded: Tensor,
        key_order: Tensor,
        key_places: Tensor,
    ):
        super().__init__(positions, starts, order, places, padded, unpadded)
        self.before, self.key_starts, self.key_padded = before, key_starts, key_padded
        self.key_unpadded, self.key_order, self.key_places = key_unpadded, key_order, key_places


PARTS = {"whole": Packing, "opening": Packing, "rest": Continuation, "frames": Continuation}


class BatchPlaces:
    """Indices of a batch, all int64.

    ids [N]: token ids, 0 at visual placeholders. index [N]: place in the flattened [B, S]. whole: `Packing` of all
    rows. opening: of the A first rows followed by the visual tokens, what planning reads first. rest: `Continuation` of
    the R other rows; visual [F * P]: the visual ones among them. frames: `Continuation` of the visual tokens alone,
    what planning reads later. sample_of_frame [F]: among the samples with frames.
    time_of_frame [F]: index in the sample. states [L]: rows whose hidden state predicts a label; targets [L]: the
    labels; label_index [L]: their place in the flattened [B, S]; label_sample [L]: their sample.
    """

    names = (
        "ids",
        "index",
        "visual",
        "sample_of_frame",
        "time_of_frame",
        "states",
        "targets",
        "label_index",
        "label_sample",
        *(f"{part}_{name}" for part, kind in PARTS.items() for name in kind.names),
    )

    def __init__(
        self,
        buffer: Tensor,
        shapes: list[tuple[int, ...]],
        shape: tuple[int, int],
        counts: np.ndarray,
        visual_id: int,
        has_labels: bool,
    ):
        """buffer: all indices in the order of `names`, in one tensor, so that they move to a device in one copy.

        shapes: of the indices. shape: (B, S). counts [B]: frames of every sample. visual_id: of the placeholder.
        """
        self._buffer, self._shapes, self.shape = buffer, shapes, shape
        self.counts, self.visual_id, self.has_labels = counts, visual_id, has_labels
        parts = buffer.split([int(np.prod(own)) for own in shapes])
        found = {name: part.view(own) for name, part, own in zip(self.names, parts, shapes, strict=True)}
        self.ids, self.index, self.visual = (found[name] for name in ("ids", "index", "visual"))
        self.sample_of_frame, self.time_of_frame = found["sample_of_frame"], found["time_of_frame"]
        self.states, self.targets = found["states"], found["targets"]
        self.label_index, self.label_sample = found["label_index"], found["label_sample"]
        self.whole, self.opening, self.rest, self.frames = (
            kind(*(found[f"{part}_{name}"] for name in kind.names)) for part, kind in PARTS.items()
        )

    @property
    def longest_clip(self) -> int:
        """Most frames of a sample."""
        return int(self.counts.max(initial=0))

    @property
    def num_bytes(self) -> int:
        return self._buffer.numel() * self._buffer.element_size()

    @property
    def num_before(self) -> int:
        """M, rows of text before frames."""
        return len(self.rest.key_order) - len(self.rest.positions)

    @property
    def num_first(self) -> int:
        """A, rows of text before frames and of samples without frames."""
        return len(self.ids) - len(self.rest.positions)

    @classmethod
    def of(
        cls,
        input_ids: Tensor,
        attention_mask: Tensor,
        num_frames: Tensor | None,
        labels: Tensor | None,
        *,
        visual_id: int,
    ) -> "BatchPlaces":
        """The indices of a batch: input_ids, attention_mask, labels [B, S], num_frames [B] as in the network's
        `forward`, whose checks they must pass. On the device of `input_ids`."""
        device = input_ids.device
        ids, real = (value.detach().cpu().numpy() for value in (input_ids, attention_mask.bool()))
        counts = np.zeros(len(ids), np.int64) if num_frames is None else num_frames.cpu().numpy().astype(np.int64)
        is_visual = real & (ids == visual_id)
        shown = is_visual.any(1)
        later = np.maximum.accumulate(is_visual, axis=1) & real  # visual tokens and the text after them
        groups = [shown[:, None] & real & ~later, ~shown[:, None] & real, later]
        places = [np.nonzero(group) for group in groups]  # (samples, columns) of the three kinds of rows, in order
        samples, columns = (np.concatenate([place[axis] for place in places]) for axis in (0, 1))
        row_of_place = np.zeros(ids.shape, np.int64)
        row_of_place[samples, columns] = np.arange(len(samples))
        before, alone, after = (group.sum(1) for group in groups)
        before, after, frames = before[shown], after[shown], counts[shown]
        alone, visual = alone[~shown], is_visual[places[2]]
        num_visual = is_visual.sum(1)[shown]
        parts = {
            "whole": packing([before, alone], [after, np.zeros_like(alone)]),
            "opening": packing([before, alone], [num_visual, np.zeros_like(alone)]),
            "rest": continuation(before, after),
            "frames": continuation(before, num_visual),
        }
        found = {
            "ids": np.where(is_visual[samples, columns], 0, ids[samples, columns]),
            "index": samples * ids.shape[1] + columns,
            "visual": np.flatnonzero(visual),
            "sample_of_frame": np.repeat(np.arange(len(frames)), frames),
            "time_of_frame": np.arange(frames.sum()) - np.repeat(frames.cumsum() - frames, frames),
            **_labels(labels, real, row_of_place),
            **{f"{part}_{name}": value for part, own in parts.items() for name, value in own.items()},
        }
        arrays = [np.ascontiguousarray(found[name], np.int64) for name in cls.names]
        buffer = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
        shapes = [array.shape for array in arrays]
        return cls(buffer.to(device), shapes, tuple(ids.shape), counts, visual_id, labels is not None)

    def of_rows(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, start: int) -> "BatchPlaces":
        """The indices of some samples of this batch: their tensors [b, S'], the first of which is sample `start`."""
        counts = torch.from_numpy(self.counts[start : start + len(input_ids)])
        return BatchPlaces.of(input_ids, attention_mask, counts, labels, visual_id=self.visual_id)

    def to(self, device) -> "BatchPlaces":
        """A copy on another device."""
        return self._with(self._buffer.to(device, non_blocking=True))

    def pin_memory(self) -> "BatchPlaces":
        """A copy in pinned memory, from which a GPU reads while the host goes on."""
        return self._with(self._buffer.pin_memory())

    def _with(self, buffer: Tensor) -> "BatchPlaces":
        return BatchPlaces(buffer, self._shapes, self.shape, self.counts, self.visual_id, self.has_labels)

    def spread(self, values: Tensor, index: Tensor) -> Tensor:
        """values [n, ...] at the places `index` [n] of [B, S, ...], zeros elsewhere."""
        flat = values.new_zeros(self.shape[0] * self.shape[1], *values.shape[1:])
        return flat.index_copy(0, index, values).unflatten(0, self.shape)


def packing(*parts: list[np.ndarray]) -> dict[str, np.ndarray]:
    """{name: index} of the `Packing` of sequences in parts: the rows are the first part of every sequence, then the
    second of every sequence, and so on. parts: the lengths of each, in lists that are joined."""
    lengths = np.stack([np.concatenate(part) for part in parts])  # [parts, sequences]
    total, num_rows = lengths.sum(0), int(lengths.sum())
    firsts = (np.cumsum(lengths.ravel()) - lengths.ravel()).reshape(lengths.shape)  # first row of every piece
    pieces = lengths.T.ravel()  # sequence by sequence
    within = np.arange(num_rows) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    order = np.repeat(firsts.T.ravel(), pieces) + within
    starts = np.concatenate([[0], np.cumsum(total)])
    places = np.empty(num_rows, np.int64)
    places[order] = np.arange(num_rows)
    positions = np.arange(num_rows) - np.repeat(starts[:-1], total)
    longest = int(total.max(initial=0))
    padded = starts[:-1, None] + np.minimum(np.arange(longest), total[:, None] - 1)
    padded = np.clip(padded, 0, max(num_rows - 1, 0))  # an empty sequence repeats a row of another one
    unpadded = np.repeat(np.arange(len(total)) * longest, total) + positions
    return {
        "positions": positions[places],
        "starts": starts,
        "order": order,
        "places": places,
        "padded": order[padded] if num_rows else padded,
        "unpadded": unpadded[places],
    }


def continuation(before: np.ndarray, lengths: np.ndarray) -> dict[str, np.ndarray]:
    """{name: index} of the `Continuation` of sequences with these lengths after so many earlier rows."""
    own, keys = packing([lengths]), packing([before], [lengths])
    return own | {
        "positions": own["positions"] + np.repeat(before, lengths),
        "before": before,
        **{f"key_{name}": keys[name] for name in ("starts", "padded", "unpadded", "order", "places")},
    }


def _labels(labels: Tensor | None, real: np.ndarray, row_of_place: np.ndarray) -> dict[str, np.ndarray]:
    """The indices of labelled tokens. A label at place s is predicted by the state of the last real token before s."""
    names = ("states", "targets", "label_index", "label_sample")
    if labels is None:
        return dict.fromkeys(names, np.zeros(0, np.int64))
    labels = labels.detach().cpu().numpy()
    last = np.maximum.accumulate(np.where(real, np.arange(real.shape[1]), -1), axis=1)  # [B, S]
    samples, columns = np.nonzero((labels[:, 1:] != IGNORE_INDEX) & (last[:, :-1] >= 0))
    states = row_of_place[samples, last[samples, columns]]
    values = (states, labels[samples, columns + 1], samples * labels.shape[1] + columns + 1, samples)
    return dict(zip(names, values, strict=True))
