"""Parameters of the `evaluation` stage (section `evaluation` of params.yaml)."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from pipeline_steps.common.params import StrictModel


class Section(StrictModel):
    split: Literal["train", "validation", "test"]
    """Split to score."""
    batch_size: PositiveInt
    """Items per forward pass; affects rounding."""
    max_items_per_task: PositiveInt
    """Items scored per task."""
    max_control_items_per_task: NonNegativeInt
    """Of those, with controls or temporal views."""
    max_temporal_clips_per_task: NonNegativeInt
    """Of those, with controls or temporal views."""
    max_diagnostic_clips: NonNegativeInt
    """Clips for diagnostics, of all tasks."""
    max_answers_per_task: NonNegativeInt
    """Greedy answers, or scored free answers, per task."""
    max_answer_tokens: PositiveInt
    """Longest generated answer."""
    max_captions_per_task: NonNegativeInt
    """Greedy answers, or scored free answers, per task."""
    caption_min_words: Annotated[int, Field(ge=2)]
    """Shortest reference outside task `caption`."""
    bootstrap_samples: PositiveInt
    """Resamples per interval."""
    seed: NonNegativeInt
    """Seed of sampling, controls and bootstrap."""
    num_threads: PositiveInt
    """CPU threads."""
