"""data/raw/index.jsonl as columns of numbers: what planning needs of a row, about 80 bytes, whatever the row's length.

Every row is checked in full and then forgotten; `Index.read_row` reads one again, from its place in the file.
About 25 us a row.
"""

import hashlib
import json
import unicodedata
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline_steps.common.errors import UserError
from pipeline_steps.common.files import parse
from pipeline_steps.common.schemas import SPLITS, RawSample

UNDECIDED = -1


@dataclass(frozen=True)
class Index:
    """One entry per row, in the order of the file. Equal numbers mean equal texts."""

    path: Path
    starts: np.ndarray  # uint64: offset of the row in the file
    sizes: np.ndarray  # uint32: its bytes
    order: np.ndarray  # uint64: uniform(seed, key) * 2**48
    keys: np.ndarray  # uint64
    videos: np.ndarray  # uint64: video_id
    video_order: np.ndarray  # uint64: uniform(seed, video_id) * 2**48
    contents: np.ndarray  # uint64: sha256 of the media; 0 for text
    splits: np.ndarray  # int8: into SPLITS, or UNDECIDED
    sources: np.ndarray  # int16: into source_names
    source_names: tuple
    text_rows: np.ndarray  # uint32: rows of text-only samples, once per item,
    texts: np.ndarray  # uint64: and the item's normalised text

    def __len__(self):
        return len(self.starts)

    def read_row(self, row):
        """The RawSample of one row."""
        with open(self.path, "rb") as file:
            file.seek(int(self.starts[row]))
            return RawSample.model_validate_json(file.read(int(self.sizes[row])))

    def num_media(self):
        """{source: number of its rows that are no text}."""
        counts = np.bincount(self.sources[self.contents != 0], minlength=len(self.source_names))
        return dict(zip(self.source_names, counts.tolist(), strict=True))


def read_index(path, seed):
    """The Index of a file of RawSample rows. UserError: missing file, bad row, repeated key, no row."""
    path = Path(path)
    names = ("starts", "order", "keys", "videos", "video_order", "contents", "texts")
    columns = {name: array("Q") for name in names} | {"sizes": array("I"), "text_rows": array("I")}
    columns |= {"splits": array("b"), "sources": array("h")}
    sources = {}
    for number, start, line in _lines(path):
        try:
            sample = parse(RawSample, line, f"{path} line {number}")
        except UserError as error:
            raise UserError(f"{error}. Rerun `python -m pipeline_steps.sources`.") from None
        order, key = _numbers(seed, sample.key)
        video_order, video = (order, key) if sample.video_id == sample.key else _numbers(seed, sample.video_id)
        if sample.kind == "text":
            columns["texts"].extend(_number(_normalised(item)) for item in sample.items)
            columns["text_rows"].extend([len(columns["starts"])] * len(sample.items))
        columns["contents"].append(_number(sample.sha256) if sample.kind != "text" else 0)
        columns["splits"].append(SPLITS.index(sample.split) if sample.split else UNDECIDED)
        columns["sources"].append(sources.setdefault(sample.source, len(sources)))
        values = {"starts": start, "sizes": len(line), "order": order, "keys": key}
        for name, value in (values | {"videos": video, "video_order": video_order}).items():
            columns[name].append(value)
    if not columns["starts"]:
        raise UserError(f"{path}: no samples. Rerun the stage with `python -m pipeline_steps.sources`.")
    arrays = {name: np.frombuffer(column, column.typecode) for name, column in columns.items()}
    index = Index(path=path, source_names=tuple(sources), **arrays)
    _check_keys(index)
    return index


def uniform(seed, name):
    """A number in [0, 1) that depends on nothing but the two arguments."""
    return _numbers(seed, name)[0] / 2**48


def _numbers(seed, name):
    """uniform(seed, name) * 2**48, and 64 bits that tell the name from any other."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:6]), int.from_bytes(digest[8:16])


def _number(text):
    """64 bits of the text's hash, never 0."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) | 1


def _normalised(item):
    """What makes two chats the same: all their texts, without regard to case, width and spacing."""
    turns = [message.content for message in item.messages or ()]
    texts = [item.user or "", *turns, item.assistant or "", *(item.options or ())]
    return json.dumps([" ".join(unicodedata.normalize("NFKC", text).casefold().split()) for text in texts])


def _lines(path):
    """(number from 1, offset, bytes) of every line that is not empty."""
    try:
        with open(path, "rb") as file:
            start = 0
            for number, line in enumerate(file, 1):
                if line.rstrip(b"\r\n"):
                    yield number, start, line
                start += len(line)
    except FileNotFoundError:
        raise UserError(f"{path}: missing. It is written by `python -m pipeline_steps.sources`.") from None


def _check_keys(index):
    order = np.argsort(index.keys, kind="stable")
    same = np.flatnonzero(index.keys[order[1:]] == index.keys[order[:-1]])
    if len(same):
        rows = sorted(order[same[0] : same[0] + 2].tolist())
        key = index.read_row(rows[0]).key
        numbers = {start: number for number, start, _ in _lines(index.path)}
        first, second = (numbers[int(index.starts[row])] for row in rows)
        raise UserError(f"{index.path}: key '{key}' is in line {first} and in line {second}")
