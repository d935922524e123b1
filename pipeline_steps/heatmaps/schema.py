"""Parameters of the `heatmaps` stage (section `heatmaps` of params.yaml)."""

from typing import Literal

from pydantic import Field, PositiveInt

from pipeline_steps.params import StrictModel


class Section(StrictModel):
    split: Literal["validation", "test"]
    num_clips: PositiveInt  # per family: the first ones by key, so that nobody picks
    tile_pixels: int = Field(ge=64, le=1024)  # side of one picture
    frame_milliseconds: PositiveInt  # of the animations
    max_answer_tokens: PositiveInt
    num_threads: PositiveInt
