"""Parameters of the `streaming` loader (section `streaming` of params.yaml)."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from pipeline_steps.common.params import StrictModel


class Batching(StrictModel):
    by: Literal["samples", "frames", "tokens"]
    """Unit of a batch: `samples` (`training.common.batch_size` of them), or a `budget` of `frames` or `tokens`."""
    budget: PositiveInt | None
    """Frames (stills count replicated) or text and visual tokens (without padding) per batch."""
    bucket_samples: NonNegativeInt
    """Window of samples sorted by length into batches; 0 disables bucketing."""

    @model_validator(mode="after")
    def _a_budget_belongs_to_a_unit(self):
        if (self.by == "samples") != (self.budget is None):
            raise ValueError("set 'budget' to null for samples, and to a number for frames and tokens")
        return self


class Section(StrictModel):
    image_replication: PositiveInt
    """Frames a still becomes, in training and evaluation."""
    batching: Batching
    """How optimizer steps are batched."""
    max_quarantined: float = Field(ge=0, le=1)
    """Share of a stage's samples that may be unreadable before it fails."""
    reader: Literal["local", "webdataset"]
    """Reader of the training split: `local` (data/shards, random access) or `webdataset` (tars from `url`,
    sequential)."""
    url: str | None
    """Location of a folder with shards/ and tokens/ ([data.md](data.md#remote-shards))."""
    shuffle_samples: PositiveInt
    """Reader `webdataset`: size of each group's shuffle buffer."""

    @model_validator(mode="after")
    def _a_url_belongs_to_the_web(self):
        if (self.reader == "local") != (self.url is None):
            raise ValueError("set 'url' to null for the reader local, and to a URL for webdataset")
        return self
