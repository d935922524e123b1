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
    follow: NonNegativeFloat
    ask_colour: NonNegativeFloat
    ask_place: NonNegativeFloat
    caption: NonNegativeFloat
    gist: NonNegativeFloat
    image: NonNegativeFloat

    @model_validator(mode="after")
    def _something_is_rendered(self):
        if not any(getattr(self, task) for task in type(self).model_fields):
            raise ValueError("all tasks have the weight 0: nothing would be rendered to train on")
        return self


class Procedural(StrictModel):
    """The rendered world; read only when collect lists procedural."""

    seed: NonNegativeInt
    num_train_clips: PositiveInt  # video clips and stills together
    train_mix: TrainMix
    num_validation_clips: PositiveInt  # of each task
    num_test_clips: PositiveInt  # of each task
    num_ask_items: NonNegativeInt  # more ask_* questions on each training clip whose digits hop
    frame_size: Literal[56, 112, 224]  # px
    fps: PositiveFloat
    num_frames: int = Field(ge=2)
    noise: NonNegativeFloat  # standard deviation of the grain, 0..1
    num_objects_weights: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat, PositiveFloat]
    # relative numbers of those training clips with 1, 2, 3 and 4 objects; held-out ones always have 4


class Chat(StrictModel):
    """Text-only questions; read only when collect lists chat."""

    seed: NonNegativeInt
    num_train: int = Field(ge=1, le=100_000)  # no question is asked twice
    num_validation: PositiveInt
    num_test: PositiveInt


class Folder(StrictModel):
    """The user's own files; read only when collect lists folder."""

    path: str | None
    name: str = Field(pattern=r"^[A-Za-z0-9_]+$")  # the name of this source in keys and reports


class Tars(StrictModel):
    """Existing WebDataset archives; read only when collect lists tars."""

    path: str = Field(min_length=1)  # a folder (all .tar in it and below), a pattern with * or one file
    name: str = Field(pattern=r"^[A-Za-z0-9_]{1,30}$")  # begins keys; the source of samples that name none
    picture_fps: PositiveFloat  # of videos that are stored as pictures: at how many per second they were taken
    tokenizer: str | None  # folder of the tokenizer that made `token_ids`, where a sample has these in place of text
    split: Literal["train", "validation", "test"] | None  # null: the stage `shards` decides
    max_quarantined: float = Field(ge=0, le=1)  # share of the samples


class HubEntry(StrictModel):
    """One published data set."""

    dataset: Literal[ADAPTER_NAMES]  # a module of sources/hub/adapters/
    path: str | None  # null: the data set's id on the Hub; or another id, or a local file or folder
    revision: str | None = Field(pattern=r"^[0-9a-f]{40}$")  # commit on the Hub; null: the one that is pinned here
    subsets: list[str] | None = Field(min_length=1)  # null: all
    media_dir: str | None  # folder with the extracted videos; null where the pictures are in the rows
    max_samples: PositiveInt | None  # a random choice of so many, which a larger number extends; null: all
    max_missing: float = Field(ge=0, le=1)  # share of the samples whose media may be missing

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
    procedural: Procedural
    chat: Chat
    folder: Folder
    tars: list[Tars]
    hub: list[HubEntry]  # read only when collect lists hub

    @model_validator(mode="after")
    def _names_differ(self):
        names = ["procedural", "chat", self.folder.name, *(entry.name for entry in self.tars)]
        names += sorted({entry.dataset for entry in self.hub})
        repeated = [name for name in names if names.count(name) > 1]
        if repeated:
            raise ValueError(f"two sources have the name '{repeated[0]}'")
        return self
