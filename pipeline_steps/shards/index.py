"""Read data/raw/index.jsonl into numeric columns for planning: about 80 bytes per row, whatever the row's length.

Every row is validated and then discarded; `Index.read_row` reads a row again from its offset in the file.
Takes about 25 us per row.
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
NO_BYTES = hashlib.sha256().hexdigest()  # sha256 of an empty file


@dataclass(frozen=True)
class Index:
    """Columns with one entry per row, in file order. Texts are stored as hashes."""

    path: Path
    seed: int
    starts: np.ndarray  # uint64: byte offset of the row
    sizes: np.ndarray  # uint32: bytes of the row
    order: np.ndarray  # uint64: uniform(seed, key) * 2**48
    keys: np.ndarray  # uint64: hash of the key
    videos: np.ndarray  # uint64: hash of video_id
    video_order: np.ndarray  # uint64: uniform(seed, video_id) * 2**48
    contents: np.ndarray  # uint64: sha256 of the media; 0 for text
    splits: np.ndarray  # int8: index into SPLITS, or UNDECIDED
    sources: np.ndarray  # int16: index into source_names
    source_names: tuple
    text_rows: np.ndarray  # uint32: row of every item of text-only samples
    texts: np.ndarray  # uint64: hash of that item's normalised text

    def __len__(self):
        return len(self.starts)

    def read_row(self, row):
        """Read the RawSample of one row."""
        with open(self.path, "rb") as file:
            file.seek(int(self.starts[row]))
            return RawSample.model_validate_json(file.read(int(self.sizes[row])))

    def paths(self, keys):
        """Return {key: path of the media, None for text} of these keys."""
        wanted = np.array([_numbers(self.seed, key)[1] for key in keys], np.uint64)
        samples = (self.read_row(row) for row in np.flatnonzero(np.isin(self.keys, wanted)))
        return {sample.key: sample.path for sample in samples}

    def rows_with_content(self):
        """Return the rows with media that are not empty."""
        return np.flatnonzero((self.contents != 0) & (self.contents != _number(NO_BYTES)))

    def num_media(self):
        """Return {source: number of rows with media}."""
        counts = np.bincount(self.sources[self.contents != 0], minlength=len(self.source_names))
        return dict(zip(self.source_names, counts.tolist(), strict=True))


def read_index(path, seed):
    """Read a file of RawSample rows. Raises UserError if it is missing, is empty or has invalid or duplicate rows."""
    path = Path(path)
    names = ("starts", "order", "keys", "videos", "video_order", "contents", "texts")
    columns = {name: array("Q") for name in names} | {"sizes": array("I"), "text_rows": array("I")}
    columns |= {"splits": array("b"), "sources": array("h")}
    sources = {}
    for number, start, line in _lines(path):
        try:
            sample = parse(RawSample, line, f"{path} line {number}")
        except UserError as error:
            raise UserError(f"{error}. Run `dvc repro sources`.") from None
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
        raise UserError(f"{path}: no samples. Run `dvc repro sources`.")
    arrays = {name: np.frombuffer(column, column.typecode) for name, column in columns.items()}
    index = Index(path=path, seed=seed, source_names=tuple(sources), **arrays)
    _check_keys(index)
    return index


def uniform(seed, name):
    """Return a pseudo-random number in [0, 1) that depends only on the arguments."""
    return _numbers(seed, name)[0] / 2**48


def _numbers(seed, name):
    """Return uniform(seed, name) * 2**48, and a 64-bit hash of the name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:6]), int.from_bytes(digest[8:16])


def _number(text):
    """Return a 64-bit hash of the text, never 0."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) | 1


def _normalised(item):
    """Return all texts of an item, ignoring case, character width and spacing, to compare chats."""
    turns = [message.content for message in item.messages or ()]
    texts = [item.user or "", *turns, item.assistant or "", *(item.options or ())]
    return json.dumps([" ".join(unicodedata.normalize("NFKC", text).casefold().split()) for text in texts])


def _lines(path):
    """Yield (number from 1, byte offset, bytes) of every non-empty line."""
    try:
        with open(path, "rb") as file:
            start = 0
            for number, line in enumerate(file, 1):
                if line.rstrip(b"\r\n"):
                    yield number, start, line
                start += len(line)
    except FileNotFoundError:
        raise UserError(f"{path}: missing. Run `dvc repro sources`.") from None


def _check_keys(index):
    order = np.argsort(index.keys, kind="stable")
    same = np.flatnonzero(index.keys[order[1:]] == index.keys[order[:-1]])
    if len(same):
        rows = sorted(order[same[0] : same[0] + 2].tolist())
        key = index.read_row(rows[0]).key
        numbers = {start: number for number, start, _ in _lines(index.path)}
        first, second = (numbers[int(index.starts[row])] for row in rows)
        raise UserError(f"{index.path}: key '{key}' occurs in lines {first} and {second}. Rerun the stage sources.")
