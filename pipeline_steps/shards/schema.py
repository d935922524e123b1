"""Parameters of the `shards` stage (section `shards` of params.yaml)."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from pipeline_steps.common.params import StrictModel


class Section(StrictModel):
    image_size: PositiveInt
    """Side of the packed square frames in pixels."""
    resize_mode: Literal["crop", "letterbox"]
    """`crop`: shorter side to `image_size`, centre crop; `letterbox`: longer side to `image_size`, black bars."""
    fps: PositiveFloat
    """Frames sampled per second, uniformly over the whole clip."""
    max_frames: PositiveInt
    """Upper limit of frames per clip."""
    jpeg_quality: int = Field(ge=1, le=100)
    """Quality of the packed JPEG frames."""
    samples_per_shard: PositiveInt
    """Upper limit of samples per shard; shards hold between half of it and all of it."""
    validation_share: float = Field(ge=0, lt=1)
    """Share of videos without a given split that go to validation."""
    test_share: float = Field(ge=0, lt=1)
    """The same for test."""
    max_quarantined: float = Field(ge=0, le=1)
    """Share of a source's media files that may be damaged before the stage fails."""
    max_hash_distance: int | None = Field(ge=0, le=31)
    """Near-duplicate check between splits: frames match if their 256-bit perceptual hashes differ in at most this
    many bits. null disables the comparison of frames and of chats."""
    seed: NonNegativeInt
    """Seed of the order of samples and of the split."""

    @model_validator(mode="after")
    def _something_to_train_on(self):
        total = self.validation_share + self.test_share
        if total >= 1:
            raise ValueError(
                f"validation_share and test_share add up to {total:g}, which leaves no training data; lower one"
            )
        return self
