"""Parameters of the `sources` stage (section `sources` of params.yaml)."""

import difflib
from typing import Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from pipeline_steps.common.params import StrictModel
from pipeline_steps.sources.hub.adapters import NAMES as ADAPTER_NAMES


class TrainMix(StrictModel):
    """Relative numbers of training clips whose first question is of this task."""

    card: NonNegativeFloat
    """Weight of task `card`."""
    follow: NonNegativeFloat
    """Weight of task `follow`."""
    ask_colour: NonNegativeFloat
    """Weight of task `ask_colour`."""
    ask_place: NonNegativeFloat
    """Weight of task `ask_place`."""
    caption: NonNegativeFloat
    """Weight of task `caption`."""
    gist: NonNegativeFloat
    """Weight of task `gist`."""
    image: NonNegativeFloat
    """Weight of task `image`."""

    @model_validator(mode="after")
    def _something_is_rendered(self):
        if not any(getattr(self, task) for task in type(self).model_fields):
            raise ValueError("all tasks have the weight 0: nothing would be rendered to train on")
        return self


class ObjectsMix(StrictModel):
    """Relative numbers of training clips whose first question is of this task."""

    become: NonNegativeFloat
    """Weight of task `become`."""
    place: NonNegativeFloat
    """Weight of task `place`."""
    meet: NonNegativeFloat
    """Weight of task `meet`."""
    small: NonNegativeFloat
    """Weight of task `small`."""
    caption: NonNegativeFloat
    """Weight of task `caption`."""
    background: NonNegativeFloat
    """Weight of task `background`."""
    still: NonNegativeFloat
    """Weight of task `still`."""

    @model_validator(mode="after")
    def _something_is_rendered(self):
        if not any(getattr(self, task) for task in type(self).model_fields):
            raise ValueError("all tasks have the weight 0: nothing would be rendered to train on")
        return self


class Objects(StrictModel):
    """The world of objects; read only when world is objects."""

    cutouts: str | None
    """Folder of pictures with transparency and a `metadata.jsonl` (`file_name`, `name`)."""
    backgrounds: str | None
    """Folder of photographs with a `metadata.jsonl` likewise; null: textures."""
    held_out_share: float = Field(ge=0, lt=0.5)
    """Share of the names for validation, and the same for test: never trained on."""
    num_train_clips: PositiveInt
    """Training clips and stills together."""
    train_mix: ObjectsMix
    """Relative numbers of training clips by the task of their first question."""
    num_validation_clips: PositiveInt
    """Validation clips per task: known names, held-out backgrounds."""
    num_test_clips: PositiveInt
    """Test clips per task, likewise."""
    num_new_clips: NonNegativeInt
    """Clips per `*_new` task in validation and in test: names that are never trained on."""
    num_extra_items: NonNegativeInt
    """Most further questions per training clip."""
    frame_size: int = Field(ge=56, le=512, multiple_of=2)
    """Side of the rendered frames in pixels."""
    num_frames: tuple[int, int]
    """Fewest and most frames per clip, at least 6."""

    @model_validator(mode="after")
    def _frames_are_a_range(self):
        fewest, most = self.num_frames
        if not 6 <= fewest <= most:
            raise ValueError(f"num_frames is [{fewest}, {most}], expected 6 <= fewest <= most")
        return self


class Procedural(StrictModel):
    """The rendered world; read only when collect lists procedural."""

    world: Literal["digits", "objects"]
    """`digits` hop between patches; `objects` are cut-outs of photographs, with section `objects` in place of the
    keys below other than `seed` and `fps`."""
    seed: NonNegativeInt
    """Seed of every clip, together with split, task and number."""
    num_train_clips: PositiveInt
    """Training clips and stills together."""
    train_mix: TrainMix
    """Relative numbers of training clips by the task of their first question."""
    num_validation_clips: PositiveInt
    """Validation clips per task."""
    num_test_clips: PositiveInt
    """Test clips per task."""
    num_ask_items: NonNegativeInt
    """Extra `ask_*` questions per training clip whose digits hop."""
    frame_size: Literal[56, 112, 224]
    """Side of the rendered frames in pixels."""
    fps: PositiveFloat
    """Frames per second of the rendered clips."""
    num_frames: int = Field(ge=2)
    """Frames per clip."""
    noise: NonNegativeFloat
    """Standard deviation of the brightness grain, 0 to 1."""
    num_objects_weights: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat, PositiveFloat]
    """Relative numbers of hopping training clips with 1, 2, 3 and 4 objects; held-out clips always have 4."""
    objects: Objects
    """The world of objects."""


class Chat(StrictModel):
    """Text-only questions; read only when collect lists chat."""

    seed: NonNegativeInt
    """Seed of the questions."""
    num_train: int = Field(ge=1, le=100_000)
    """Training questions; none occurs twice."""
    num_validation: PositiveInt
    """Validation questions."""
    num_test: PositiveInt
    """Test questions."""


class Folder(StrictModel):
    """The user's own files; read only when collect lists folder."""

    path: str | None
    """The folder, with `metadata.jsonl`, `.csv` or `.parquet` at its top."""
    name: str = Field(pattern=r"^[A-Za-z0-9_]+$")
    """Name of the source in keys and reports."""


class Tars(StrictModel):
    """Existing WebDataset archives; read only when collect lists tars."""

    path: str = Field(min_length=1)
    """A folder (every .tar below it), a pattern with `*`, or one file."""
    name: str = Field(pattern=r"^[A-Za-z0-9_]{1,30}$")
    """Prefix of keys, and the source of samples that name none."""
    picture_fps: PositiveFloat
    """Frames per second of videos stored as pictures."""
    tokenizer: str | None
    """Folder of the tokenizer that made `token_ids`, for samples without text."""
    split: Literal["train", "validation", "test"] | None
    """Split of all samples; null lets the stage `shards` decide."""
    max_quarantined: float = Field(ge=0, le=1)
    """Share of samples that may be quarantined before the stage fails."""


class HubEntry(StrictModel):
    """One published data set."""

    dataset: Literal[ADAPTER_NAMES]
    """Adapter name ([data.md](data.md#data-sets-from-the-hub-source-hub))."""
    path: str | None
    """Null: the data set's id on the Hub; or another id with the same columns, a local folder or one file."""
    revision: str | None = Field(pattern=r"^[0-9a-f]{40}$")
    """Commit on the Hub (40 hex digits); null: the pinned one."""
    subsets: list[str] | None = Field(min_length=1)
    """Subsets to read; null: all."""
    media_dir: str | None
    """Folder of the extracted videos; null if the rows hold the pictures."""
    max_samples: PositiveInt | None
    """Random subset by key hash; a larger number keeps what a smaller one takes. null: all."""
    max_missing: float = Field(ge=0, le=1)
    """Share of samples whose media may be missing before the stage fails."""

    @field_validator("dataset", mode="before")
    @classmethod
    def _dataset_has_an_adapter(cls, name):
        if name not in ADAPTER_NAMES:
            close = difflib.get_close_matches(str(name), ADAPTER_NAMES, 1, 0.6)
            guess = f"did you mean '{close[0]}'? " if close else ""
            raise ValueError(f"no adapter has this name ({guess}Data sets: {', '.join(ADAPTER_NAMES)})")
        return name


class Section(StrictModel):
    collect: list[Literal["procedural", "chat", "folder", "tars", "hub"]] = Field(min_length=1)
    """Sources to collect."""
    procedural: Procedural
    """The rendered world."""
    chat: Chat
    """Text-only questions."""
    folder: Folder
    """Your own files."""
    tars: list[Tars]
    """Existing WebDataset archives."""
    hub: list[HubEntry]
    """Published data sets."""

    @model_validator(mode="after")
    def _names_differ(self):
        names = ["procedural", "chat", self.folder.name, *(entry.name for entry in self.tars)]
        names += sorted({entry.dataset for entry in self.hub})
        repeated = [name for name in names if names.count(name) > 1]
        if repeated:
            raise ValueError(f"two sources have the name '{repeated[0]}'")
        return self
