"""Parameters of the `heatmaps` stage (section `heatmaps` of params.yaml)."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from pipeline_steps.common.params import StrictModel


class Section(StrictModel):
    split: Literal["train", "validation", "test"]
    """Split of the clips."""
    num_clips: PositiveInt
    """Random clips per task."""
    num_sheet_clips: NonNegativeInt
    """Clips on the contact sheet."""
    seed: NonNegativeInt
    """Seed of the random clips."""
    tile_pixels: int = Field(ge=64, le=1024)
    """Picture side."""
    frame_milliseconds: PositiveInt
    """Duration of a frame."""
    max_answer_tokens: PositiveInt
    """Longest generated answer."""
    num_threads: PositiveInt
    """CPU threads."""
