"""Parameters of the `shards` stage (section `shards` of params.yaml)."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from pipeline_steps.common.params import StrictModel


class Section(StrictModel):
    image_size: PositiveInt  # px
    resize_mode: Literal[
        "crop", "letterbox"
    ]  # shorter side to image_size and centre crop, or longer side and black bars
    fps: PositiveFloat
    max_frames: PositiveInt
    jpeg_quality: int = Field(ge=1, le=100)
    samples_per_shard: PositiveInt
    validation_share: float = Field(ge=0, lt=1)
    test_share: float = Field(ge=0, lt=1)
    max_quarantined: float = Field(ge=0, le=1)  # share of a source's media files
    max_hash_distance: int | None = Field(ge=0, le=31)  # bits of 256 in which near-duplicate frames of two splits
    # differ at most; null: neither frames nor chats are compared
    seed: NonNegativeInt

    @model_validator(mode="after")
    def _something_to_train_on(self):
        total = self.validation_share + self.test_share
        if total >= 1:
            raise ValueError(f"validation_share and test_share add up to {total:g}, nothing is left to train on")
        return self
