"""Schemas of what the data stages write and read.

A *sample* is one media file (or one text-only chat) with its items; an *item* is one question and its answer.
Keys: `{source}-{anything}` of letters, digits, `_` and `-`, unique over all sources, no dot (WebDataset splits a name
at its first dot). Splits are `train`, `validation` and `test`. docs/data.md shows which files hold them.
"""

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline_steps.common.errors import UserError
from pipeline_steps.common.files import parse, read_text

SPLITS = ("train", "validation", "test")
Split = Literal["train", "validation", "test"]
Kind = Literal["video", "image", "text"]
Key = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", max_length=200)]
Count = Annotated[int, Field(ge=0)]


class Record(BaseModel):
    """Base of all records: unknown keys are errors, NaN is an error, read-only."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


# ---------------------------------------------------------------- samples: data/raw/index.jsonl, {key}.json in a shard


class Message(Record):
    role: Literal["system", "user", "assistant"]
    content: str


class Item(Record):
    """One question and its answer, one chat of several turns (`messages`), or one question with `options`."""

    user: str | None = None  # None: the prompt of the sample's source, in the tokens section
    assistant: str | None = None  # None only with `messages` or `options`
    task: str
    cue: str = ""  # the part at the start of the answer that names the cue; "" if there is none
    target: Count | None = None  # index into the sample's objects
    messages: tuple[Message, ...] | None = None
    rejected: str | None = None  # preferences: the worse answer in place of `assistant` or of the last message
    options: tuple[str, ...] | None = None  # texts to choose from, without letters
    correct_option: Count | None = None  # index into `options`

    @model_validator(mode="after")
    def _one_form(self):
        if [self.messages, self.assistant, self.options].count(None) != 2:
            raise ValueError("an item has one of 'assistant' (with 'user'), 'messages' and 'options' (with 'user')")
        if self.messages is not None and (self.user is not None or self.cue):
            raise ValueError("an item with 'messages' has neither 'user' nor 'cue'")
        if self.cue and (self.assistant is None or not self.assistant.startswith(self.cue)):
            raise ValueError(f"the answer {self.assistant!r} does not start with the cue {self.cue!r}")
        if (self.options is None) != (self.correct_option is None):
            raise ValueError("'options' and 'correct_option' belong together")
        if self.options is not None and (self.user is None or self.rejected is not None):
            raise ValueError("an item with 'options' has a 'user' and no 'rejected'")
        if self.options is not None and not (len(self.options) >= 2 and self.correct_option < len(self.options)):
            raise ValueError(f"option {self.correct_option} of {len(self.options)}")
        return self


class SceneObject(Record):
    """Ground truth of one object in the SOURCE frames: digit and box in every frame."""

    colour: str
    place: str
    digits: tuple[int, ...]  # one per source frame
    boxes: tuple[tuple[float, float, float, float], ...]  # x0, y0, x1, y1 per source frame, 0..1 of the frame


class RawSample(Record):
    """One row of data/raw/index.jsonl."""

    key: Key
    source: str
    split: Split | None = None  # None: the shards stage decides, by video_id
    video_id: str = Field(min_length=1)  # samples of one video never end up in two splits
    path: str | None = None  # relative to data/raw, or absolute (user's own files); None for text
    parts: tuple[tuple[Count, Count], ...] = ()  # (offset, bytes) of every medium within the file at `path`, such as
    # a tar: the pictures of a still, the frames of a video, or one video file. (): all of `path`, which is one file or
    # a folder of pictures, taken in the order of their names
    kind: Kind
    sha256: str | None = None  # of the media (`media_sha256`); None for text
    size: Count = 0  # bytes
    picture_fps: Annotated[float, Field(gt=0)] | None = None  # of a video given as pictures: frames per second
    segment: tuple[float, float] | None = None  # seconds from the start: only this piece of the video is meant
    items: tuple[Item, ...] = Field(min_length=1)
    objects: tuple[SceneObject, ...] | None = None
    num_source_frames: Count | None = None

    @model_validator(mode="after")
    def _media(self):
        if (self.kind == "text") != (self.path is None):
            raise ValueError(f"a sample of kind '{self.kind}' has path {self.path!r}")
        if self.kind != "text" and self.sha256 is None:
            raise ValueError("a media file needs its sha256")
        if self.segment is not None and not 0 <= self.segment[0] < self.segment[1]:
            raise ValueError(f"the segment {self.segment} does not go from an earlier to a later second")
        for item in self.items:
            if item.target is not None and item.target >= len(self.objects or ()):
                raise ValueError(f"target {item.target} of {len(self.objects or ())} objects")
        return self


class PackedSample(RawSample):
    """`{key}.json` in a shard: the raw sample and what was made of its media."""

    split: Split
    frame_count: Count  # number of {key}.000.jpg ... (video, several stills), 1 ({key}.jpg, one still) or 0 (text)
    timestamps: tuple[float, ...]  # seconds from the first frame, one per packed frame
    duration: float  # of the video, or of its segment, in seconds; 0 for stills and text
    width: Count  # of the source media (its first picture), px
    height: Count


# ---------------------------------------------------------------- manifests


class Quarantined(Record):
    key: str
    source: str
    path: str
    reason: str


class ShardEntry(Record):
    name: str  # 000000.tar
    num_samples: Count
    num_frames: Count
    seconds: float  # of video
    bytes: Count
    sha256: str


class SplitEntry(Record):
    shards: tuple[ShardEntry, ...]
    num_samples: Count
    num_frames: Count
    seconds: float
    bytes: Count


class FramePolicy(Record):
    """How packed frames were made of the media, and so how a question's video has to be prepared."""

    image_size: Count  # px, packed frames are square
    resize_mode: Literal[
        "crop", "letterbox"
    ]  # shorter side to image_size and centre crop, or longer side and black bars
    fps: float  # frames per second taken of a video
    max_frames: Count  # of one video
    jpeg_quality: Count  # 1 to 100
    hdr: Literal["refuse", "tone_map"] = "refuse"  # media with PQ or HLG


class ShardsManifest(Record):
    """data/shards/manifest.json. seen = packed + len(quarantined)."""

    splits: dict[Split, SplitEntry]
    seen: Count
    packed: Count
    quarantined: tuple[Quarantined, ...]
    sources: dict[str, Count]  # packed samples of each source
    frames: FramePolicy

    @model_validator(mode="after")
    def _all_accounted_for(self):
        total = sum(entry.num_samples for entry in self.splits.values())
        if self.seen != self.packed + len(self.quarantined) or total != self.packed:
            raise ValueError(
                f"seen {self.seen}, packed {self.packed} ({total} in the splits), quarantined {len(self.quarantined)}"
            )
        return self


class Dropped(Record):
    """A dropped item or, in `truncated`, one that lost its last turns."""

    key: str
    item: Count
    reason: str


class SourceCounts(Record):
    """Items of one source in data/tokens: seen = kept + dropped."""

    seen: Count
    kept: Count
    truncated: Count  # of the kept ones
    dropped: Count
    tokens: Count  # of the kept ones' chats, without visual tokens and rejected answers


class TokensEntry(Record):
    name: str  # 000000.arrow
    num_items: Count
    num_tokens: Count
    shard_sha256: str  # of the tar that this file is aligned with
    sha256: str


class TokensSplit(Record):
    shards: tuple[TokensEntry, ...]
    num_items: Count
    num_tokens: Count


class TokensManifest(Record):
    """data/tokens/manifest.json. seen = kept + len(dropped), counted in items."""

    splits: dict[Split, TokensSplit]
    seen: Count
    kept: Count
    dropped: tuple[Dropped, ...]
    truncated: tuple[Dropped, ...]  # chats that lost their last turns, whole ones, to tokens.max_tokens
    tasks: dict[str, Count]
    sources: dict[str, SourceCounts]
    tokenizer_sha256: str
    vocabulary_size: Count
    max_tokens: Count
    system: str  # the system line of the table's entry for all sources

    @model_validator(mode="after")
    def _all_accounted_for(self):
        total = sum(entry.num_items for entry in self.splits.values())
        if self.seen != self.kept + len(self.dropped) or total != self.kept:
            raise ValueError(f"seen {self.seen}, kept {self.kept} ({total} in the splits), dropped {len(self.dropped)}")
        whole = [self.seen, self.kept, len(self.truncated), len(self.dropped)]
        rows = [(c.seen, c.kept, c.truncated, c.dropped) for c in self.sources.values()]
        if [sum(column) for column in zip(*rows, strict=True)] != whole or any(r[0] != r[1] + r[3] for r in rows):
            raise ValueError(f"seen, kept, truncated, dropped are {whole}, but by source {rows}")
        return self


# ---------------------------------------------------------------- keys


def slug(text):
    """`text` as a part of a key: everything that is not a letter, digit, `_` or `-` becomes `-`."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-")[:150]


def read_samples(path):
    """data/raw/index.jsonl as a list of RawSample; UserError: missing file, bad row, repeated key."""
    samples, lines = [], {}
    for number, line in enumerate(read_text(path, "sources").split("\n"), 1):
        if not line:
            continue
        sample = parse(RawSample, line, f"{path} line {number}")
        if sample.key in lines:
            raise UserError(f"{path}: key '{sample.key}' is in line {lines[sample.key]} and in line {number}")
        lines[sample.key] = number
        samples.append(sample)
    if not samples:
        raise UserError(f"{path}: no samples. Run `dvc repro sources`.")
    return samples
