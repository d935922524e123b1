"""Parameters of the `heatmaps` stage (section `heatmaps` of params.yaml)."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from pipeline_steps.common.params import StrictModel


class Section(StrictModel):
    split: Literal["validation", "test"]
    num_clips: PositiveInt  # per task: the first ones by key, to avoid cherry-picking
    num_sheet_clips: NonNegativeInt  # on the sheet of best, worst and random clips by loss; 0: no sheet
    seed: NonNegativeInt  # of the sheet's random clips
    tile_pixels: int = Field(ge=64, le=1024)  # side of one picture
    frame_milliseconds: PositiveInt  # of the animations
    max_answer_tokens: PositiveInt
    num_threads: PositiveInt
