"""Parameters of the `heatmaps` stage (section `heatmaps` of params.yaml)."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from pipeline_steps.common.params import StrictModel


class Section(StrictModel):
    split: Literal["validation", "test"]
    """The split the clips come from."""
    num_clips: PositiveInt
    """Clips per task: the first by key, so nobody picks."""
    num_sheet_clips: NonNegativeInt
    """Clips on the contact sheet of best, worst and random clips by loss; 0 omits the sheet."""
    seed: NonNegativeInt
    """Seed of the sheet's random third."""
    tile_pixels: int = Field(ge=64, le=1024)
    """Side of one picture in pixels."""
    frame_milliseconds: PositiveInt
    """Time per frame of the animations."""
    max_answer_tokens: PositiveInt
    """Longest generated answer, in tokens."""
    num_threads: PositiveInt
    """CPU threads of torch."""
