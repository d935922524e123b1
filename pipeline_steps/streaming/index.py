"""An in-memory index of the items of a split: 22 bytes per item; rows are read on demand.

Numeric columns of millions of items fit into memory; the sidecars are memory-mapped, and a row becomes a dict only on
access. The number of an item is its position in the order of the shards.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

KINDS = ("video", "image", "text")


@dataclass(frozen=True)
class Index:
    """Columns over n items."""

    tasks: tuple[str, ...]  # names, in order of first appearance
    sources: tuple[str, ...]
    task: np.ndarray  # int32 [n], index into `tasks`
    source: np.ndarray  # int32 [n], index into `sources`
    kind: np.ndarray  # int8 [n], index into KINDS
    num_frames: np.ndarray  # int32 [n], packed frames of the item's sample
    num_tokens: np.ndarray  # int32 [n], tokens of the chat, without visual tokens
    num_rejected: np.ndarray  # int32 [n], tokens of the chat with the rejected answer, 0 if there is none
    truncated: np.ndarray  # bool [n], whether turns were dropped

    def __len__(self) -> int:
        return len(self.task)

    @property
    def is_text(self) -> np.ndarray:
        """bool [n]: whether the item's sample is text-only."""
        return self.kind == KINDS.index("text")

    def shown_frames(self, image_replication: int) -> np.ndarray:
        """int64 [n]: number of frames that the network sees, with stills replicated."""
        return self.num_frames.astype(np.int64) * np.where(self.kind == KINDS.index("image"), image_replication, 1)

    def take(self, numbers: np.ndarray) -> "Index":
        """Return the columns of these items."""
        columns = (self.task, self.source, self.kind, self.num_frames, self.num_tokens, self.num_rejected)
        return Index(self.tasks, self.sources, *(column[numbers] for column in (*columns, self.truncated)))

    def numbers_by(self, codes: np.ndarray, names: tuple[str, ...]) -> dict[str, np.ndarray]:
        """Return {name: item numbers, int64, ascending} for the names in `codes` [n], indices into `names`."""
        order = np.argsort(codes, kind="stable")
        bounds = np.searchsorted(codes[order], np.arange(len(names) + 1))
        groups = {name: order[bounds[code] : bounds[code + 1]] for code, name in enumerate(names)}
        return {name: numbers for name, numbers in groups.items() if len(numbers)}


def build(batches: Iterable[pa.RecordBatch]) -> Index:
    """Build the Index of the rows (sidecar.SCHEMA) of all record batches, in order."""
    tasks, sources = {}, {}
    parts = [_columns(batch, tasks, sources) for batch in batches]
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return Index(tuple(tasks), tuple(sources), *columns)


def _columns(batch: pa.RecordBatch, tasks: dict[str, int], sources: dict[str, int]) -> tuple[np.ndarray, ...]:
    """Return the index's columns of one record batch; new names are appended to `tasks` and `sources`."""
    return (
        _codes(batch.column("task"), tasks),
        _codes(batch.column("source"), sources),
        _codes(batch.column("kind"), {name: code for code, name in enumerate(KINDS)}).astype(np.int8),
        batch.column("num_frames").to_numpy().astype(np.int32),
        pc.list_value_length(batch.column("input_ids")).to_numpy().astype(np.int32),
        pc.list_value_length(batch.column("rejected_ids")).fill_null(0).to_numpy().astype(np.int32),
        batch.column("truncated_turns").to_numpy() > 0,
    )


def _codes(column: pa.Array, known: dict[str, int]) -> np.ndarray:
    encoded = column.dictionary_encode()
    codes = [known.setdefault(name, len(known)) for name in encoded.dictionary.to_pylist()]
    return np.array(codes, np.int32)[encoded.indices.to_numpy()]


class Rows(Sequence):
    """The rows of all sidecars, converted to dicts on access. For loops over many items use `Index`."""

    def __init__(self, batches: list[pa.RecordBatch]):
        self.batches = batches
        self.starts = np.concatenate([[0], np.cumsum([batch.num_rows for batch in batches], dtype=np.int64)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def place(self, number: int) -> tuple[int, int]:
        """Return (record batch, row in it) of an item. Raises IndexError."""
        if not 0 <= number < len(self):
            raise IndexError(f"item {number} of {len(self)}")
        batch = int(np.searchsorted(self.starts, number, side="right")) - 1
        return batch, int(number - self.starts[batch])

    def __getitem__(self, number: int) -> dict:
        batch, row = self.place(number)
        table = self.batches[batch]
        return {name: column[row].as_py() for name, column in zip(table.schema.names, table.columns, strict=True)}


def has_true(column: pa.ListArray) -> np.ndarray:
    """Return whether each list of bools contains True: bool [n]."""
    sums = np.concatenate([[0], np.cumsum(column.flatten().to_numpy(zero_copy_only=False))])
    ends = np.cumsum(pc.list_value_length(column).to_numpy())
    return sums[ends] > np.concatenate([sums[:1], sums[ends[:-1]]])


def scored_tokens(batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (row, position in the answers from 1, id) of every scored token of a record batch, as three arrays."""
    lengths = pc.list_value_length(batch.column("input_ids")).to_numpy()
    row_of = np.repeat(np.arange(batch.num_rows), lengths)
    ids, answer, scored = (
        batch.column(name).flatten().to_numpy(zero_copy_only=False)
        for name in ("input_ids", "answer_mask", "score_mask")
    )
    total = np.cumsum(answer)
    before = np.concatenate([[0], total])[np.cumsum(lengths) - lengths]  # answer tokens in earlier rows
    at = np.flatnonzero(scored)
    return row_of[at], total[at] - before[row_of[at]], ids[at]
