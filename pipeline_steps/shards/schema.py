"""Parameters of the `shards` stage (section `shards` of params.yaml)."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from pipeline_steps.common.params import StrictModel


class Section(StrictModel):
    image_size: PositiveInt
    """Frame side."""
    resize_mode: Literal["crop", "letterbox"]
    """Centre crop or black bars."""
    hdr: Literal["refuse", "tone_map"]
    """PQ and HLG: quarantine, or convert to SDR."""
    fps: PositiveFloat
    """Sampled frames per second."""
    max_frames: PositiveInt
    """Most frames per clip."""
    jpeg_quality: int = Field(ge=1, le=100)
    """JPEG quality."""
    samples_per_shard: PositiveInt
    """Largest number of samples per shard; most shards hold about half as many or more."""
    validation_share: float = Field(ge=0, lt=1)
    """Share of videos without split."""
    test_share: float = Field(ge=0, lt=1)
    """Share of videos without split."""
    max_quarantined: float = Field(ge=0, le=1)
    """Damaged share of a source."""
    max_hash_distance: int | None = Field(ge=0, le=31)
    """Bits in which near-duplicates may differ; null: no leak check."""
    seed: NonNegativeInt
    """Seed of order and split."""

    @model_validator(mode="after")
    def _something_to_train_on(self):
        total = self.validation_share + self.test_share
        if total >= 1:
            raise ValueError(
                f"validation_share and test_share add up to {total:g}, which leaves no training data; lower one"
            )
        return self
