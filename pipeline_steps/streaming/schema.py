"""Parameters of the `streaming` loader (section `streaming` of params.yaml)."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from pipeline_steps.common.params import StrictModel


class Batching(StrictModel):
    by: Literal["samples", "frames", "tokens"]  # samples: training.common.batch_size of them
    budget: PositiveInt | None  # of one batch in frames (stills as often as they are shown) or tokens (text and visual)
    bucket_samples: NonNegativeInt  # samples at a time that are sorted by length into batches; 0: none

    @model_validator(mode="after")
    def _a_budget_belongs_to_a_unit(self):
        if (self.by == "samples") != (self.budget is None):
            raise ValueError("'budget' is null for samples, and a number for frames and tokens")
        return self


class Section(StrictModel):
    image_replication: PositiveInt  # frames that a still becomes, in training and in evaluation
    batching: Batching  # of the optimizer steps
    num_workers: NonNegativeInt  # threads that read, decode and make batches; 0: none
    prefetch_megabytes: PositiveInt  # that prepared batches hold at most
    max_quarantined: float = Field(ge=0, le=1)  # share of a stage's samples that may be unreadable
    reader: Literal["local", "webdataset"]  # of the training split: data/shards at random, or tars of `url` in sequence
    url: str | None  # of a folder that holds shards/ and tokens/ (docs/data.md)
    shuffle_samples: PositiveInt  # reader webdataset: items of a group among which the next one is drawn
    retries: NonNegativeInt  # reader webdataset: of a broken connection

    @model_validator(mode="after")
    def _a_url_belongs_to_the_web(self):
        if (self.reader == "local") != (self.url is None):
            raise ValueError("'url' is null for the reader local, and needed for webdataset")
        return self
