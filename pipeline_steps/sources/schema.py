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
from pipeline_steps.sources.actions.layouts import NAMES as LAYOUT_NAMES
from pipeline_steps.sources.hub.adapters import NAMES as ADAPTER_NAMES


class Mix(StrictModel):
    """Relative numbers of training clips by task."""

    @model_validator(mode="after")
    def _something_is_rendered(self):
        if not any(getattr(self, task) for task in type(self).model_fields):
            raise ValueError(
                "all tasks have weight 0, so no training clip would be rendered; give one a positive weight"
            )
        return self


class TrainMix(Mix):
    """Relative numbers of training clips whose first question is of this task."""

    card: NonNegativeFloat
    """Relative number of clips."""
    follow: NonNegativeFloat
    """Relative number of clips."""
    ask_colour: NonNegativeFloat
    """Relative number of clips."""
    ask_place: NonNegativeFloat
    """Relative number of clips."""
    caption: NonNegativeFloat
    """Relative number of clips."""
    gist: NonNegativeFloat
    """Relative number of clips."""
    image: NonNegativeFloat
    """Relative number of clips."""


class ObjectsMix(Mix):
    """Relative numbers of training clips whose first question is of this task."""

    become: NonNegativeFloat
    """Relative number of clips."""
    place: NonNegativeFloat
    """Relative number of clips."""
    meet: NonNegativeFloat
    """Relative number of clips."""
    small: NonNegativeFloat
    """Relative number of clips."""
    caption: NonNegativeFloat
    """Relative number of clips."""
    background: NonNegativeFloat
    """Relative number of clips."""
    still: NonNegativeFloat
    """Relative number of clips."""


class Objects(StrictModel):
    """The world of objects; read only when world is objects."""

    cutouts: str | None
    """[Cut-outs](world_objects.md)."""
    backgrounds: str | None
    """Folder of photographs; null: textures."""
    held_out_share: float = Field(ge=0, lt=0.5)
    """Held-out names, of each held-out split."""
    num_train_clips: PositiveInt
    """Training clips, with stills."""
    train_mix: ObjectsMix
    """Relative numbers of training clips by the task of their first question."""
    num_validation_clips: PositiveInt
    """Held-out clips per task, trained names."""
    num_test_clips: PositiveInt
    """Held-out clips per task, trained names."""
    num_new_clips: NonNegativeInt
    """Held-out clips per `*_new` task."""
    num_extra_items: NonNegativeInt
    """Most extra questions per clip."""
    frame_size: int = Field(ge=56, le=512, multiple_of=2)
    """Frame side."""
    num_frames: tuple[int, int]
    """Fewest (at least 6) and most frames."""

    @model_validator(mode="after")
    def _frames_are_a_range(self):
        fewest, most = self.num_frames
        if not 6 <= fewest <= most:
            raise ValueError(f"num_frames is [{fewest}, {most}], expected 6 <= fewest <= most")
        return self


class Procedural(StrictModel):
    """The rendered world; read only when collect lists procedural."""

    world: Literal["digits", "objects"]
    """Cut-outs take `objects.*`, `seed`, `fps` and `motion` only."""
    seed: NonNegativeInt
    """Seed of the clips."""
    num_train_clips: PositiveInt
    """Training clips, with stills."""
    train_mix: TrainMix
    """Relative numbers of training clips by the task of their first question."""
    num_validation_clips: PositiveInt
    """Held-out clips per task."""
    num_test_clips: PositiveInt
    """Held-out clips per task."""
    num_ask_items: NonNegativeInt
    """Extra `ask_*` questions per hopping clip."""
    frame_size: Literal[56, 112, 224]
    """Frame side."""
    fps: PositiveFloat
    """Frames per second."""
    num_frames: int = Field(ge=2)
    """Frames per clip."""
    noise: NonNegativeFloat
    """Standard deviation of grain."""
    motion: Literal["smooth", "abrupt"] | None
    """null: digits hop, objects do both."""
    num_objects_weights: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat, PositiveFloat]
    """Relative number of hopping training clips with 1 to 4 objects."""
    objects: Objects
    """The world of objects."""


class Chat(StrictModel):
    """Text-only questions or chats; read only when collect lists chat."""

    path: str | None
    """[Your own chats](data.md#the-procedural-world) instead, a `.jsonl`."""
    seed: NonNegativeInt
    """Seed of the questions."""
    num_train: int = Field(ge=1, le=100_000)
    """Training questions."""
    num_validation: PositiveInt
    """Held-out questions."""
    num_test: PositiveInt
    """Held-out questions."""


class Folder(StrictModel):
    """The user's own files; read only when collect lists folder."""

    path: str | None
    """[The folder](data.md#your-own-videos-and-images)."""
    name: str = Field(pattern=r"^[A-Za-z0-9_]+$")
    """Source name."""


class Tars(StrictModel):
    """Existing WebDataset archives; read only when collect lists tars."""

    path: str = Field(min_length=1)
    """Folder, glob or file."""
    name: str = Field(pattern=r"^[A-Za-z0-9_]{1,30}$")
    """Key prefix and default source."""
    picture_fps: PositiveFloat
    """Frame rate of videos stored as pictures."""
    tokenizer: str | None
    """Tokenizer of `token_ids`."""
    split: Literal["train", "validation", "test"] | None
    """Split of all samples; null: `shards` decides."""
    max_quarantined: float = Field(ge=0, le=1)
    """Quarantined share."""


class HubEntry(StrictModel):
    """One published data set."""

    dataset: Literal[ADAPTER_NAMES]
    """[Adapter](data.md#data-sets-from-the-hub-source-hub)."""
    path: str | None
    """Hub id or local copy; null: the adapter's."""
    revision: str | None = Field(pattern=r"^[0-9a-f]{40}$")
    """Commit; null: the adapter's."""
    subsets: list[str] | None = Field(min_length=1)
    """Subsets to read; null: all."""
    media_dir: str | None
    """Extracted videos; null: rows hold the pictures."""
    max_samples: PositiveInt | None
    """Random subset, nested as it grows; null: all."""
    max_missing: float = Field(ge=0, le=1)
    """Share with missing media."""

    @field_validator("dataset", mode="before")
    @classmethod
    def _dataset_has_an_adapter(cls, name):
        if name not in ADAPTER_NAMES:
            close = difflib.get_close_matches(str(name), ADAPTER_NAMES, 1, 0.6)
            guess = f"did you mean '{close[0]}'? " if close else ""
            raise ValueError(f"no adapter has this name ({guess}Data sets: {', '.join(ADAPTER_NAMES)})")
        return name


class SampleLimits(StrictModel):
    """Most samples by split, a random subset; null: all."""

    train: PositiveInt | None
    """Most samples of the split, nested as it grows; null: all."""
    validation: PositiveInt | None
    """Most samples of the split, nested as it grows; null: all."""
    test: PositiveInt | None
    """Most samples of the split, nested as it grows; null: all."""


class Actions(StrictModel):
    """One local folder of an action recognition data set."""

    layout: Literal[LAYOUT_NAMES]
    """Published layout of the folder ([data.md](data.md#action-recognition-source-actions))."""
    path: str = Field(min_length=1)
    """Folder of annotations and videos."""
    name: str = Field(pattern=r"^[A-Za-z0-9_]{1,30}$")
    """Source name, begins the keys."""
    fold: Literal[1, 2, 3] | None
    """UCF-101's list; null: other layouts."""
    validation_share: float = Field(ge=0, lt=1)
    """Share of training groups for validation, where no list is left for it."""
    num_options: int | None = Field(ge=2, le=26)
    """Options of `action_choice`; null: no such items."""
    max_samples: SampleLimits
    """Random subset by split."""
    seed: NonNegativeInt
    """Seed of subset, validation groups and options."""
    max_quarantined: float = Field(ge=0, le=1)
    """Highest share that is missing or unusable."""

    @model_validator(mode="after")
    def _fold_belongs_to_ucf101(self):
        if (self.layout == "ucf101") != (self.fold is not None):
            wanted = "expected 1, 2 or 3" if self.layout == "ucf101" else "expected null: only ucf101 has folds"
            raise ValueError(f"fold is {'null' if self.fold is None else self.fold}, {wanted}")
        return self


class Section(StrictModel):
    collect: list[Literal["procedural", "chat", "folder", "tars", "hub", "actions"]] = Field(min_length=1)
    """Sources to collect."""
    procedural: Procedural
    """The rendered world."""
    chat: Chat
    """Text-only questions."""
    folder: Folder
    """Your own files."""
    tars: list[Tars]
    """WebDataset archives."""
    hub: list[HubEntry]
    """Published data sets."""
    actions: list[Actions]
    """Local action recognition data sets."""

    @model_validator(mode="after")
    def _what_is_given_is_collected(self):
        given = (
            ("folder", "folder.path", self.folder.path),
            ("chat", "chat.path", self.chat.path),
            *((name, name, getattr(self, name)) for name in ("tars", "hub", "actions")),
        )
        for source, key, value in given:
            if value and source not in self.collect:
                raise ValueError(
                    f"{key} is set, but collect is [{', '.join(self.collect)}], so it would not be read: add {source} "
                    f"to collect, or set {key} to {'[]' if isinstance(value, list) else 'null'}"
                )
        return self

    @model_validator(mode="after")
    def _names_differ(self):
        names = ["procedural", "chat", self.folder.name, *(entry.name for entry in (*self.tars, *self.actions))]
        names += sorted({entry.dataset for entry in self.hub})
        repeated = [name for name in names if names.count(name) > 1]
        if repeated:
            raise ValueError(f"two sources have the name '{repeated[0]}'; rename one")
        return self
