"""Parameters of the `streaming` loader (section `streaming` of params.yaml)."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from pipeline_steps.common.params import StrictModel


class Batching(StrictModel):
    by: Literal["samples", "frames", "tokens"]
    """Batch of `training.common.batch_size` samples, or `budget` frames or tokens."""
    budget: PositiveInt | None
    """Frames or unpadded tokens."""
    bucket_samples: NonNegativeInt
    """Samples sorted by length together."""

    @model_validator(mode="after")
    def _a_budget_belongs_to_a_unit(self):
        if (self.by == "samples") != (self.budget is None):
            raise ValueError("set 'budget' to null for samples, and to a number for frames and tokens")
        return self


class Section(StrictModel):
    image_replication: PositiveInt
    """Frames a still becomes."""
    batching: Batching
    """How optimizer steps are batched."""
    max_quarantined: float = Field(ge=0, le=1)
    """Unreadable share of samples; none with FSDP."""
    reader: Literal["local", "webdataset"]
    """Training data from data/shards or `url`."""
    url: str | None
    """[Remote folder](data.md#remote-shards)."""
    shuffle_samples: PositiveInt
    """Shuffle buffer per group (`webdataset`)."""

    @model_validator(mode="after")
    def _a_url_belongs_to_the_web(self):
        if (self.reader == "local") != (self.url is None):
            raise ValueError("set 'url' to null for the reader local, and to a URL for webdataset")
        return self
