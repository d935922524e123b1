"""Parameters of the `streaming` loader (section `streaming` of params.yaml)."""

from pydantic import NonNegativeInt, PositiveInt

from pipeline_steps.params import StrictModel


class Section(StrictModel):
    image_replication: PositiveInt  # frames that a still becomes, in training and in evaluation
    prefetch_batches: NonNegativeInt  # batches prepared ahead in the background
