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
    """Items scored per task, sampled with `seed`."""
    max_control_items_per_task: NonNegativeInt
    """Of those, with controls; 0: none."""
    max_temporal_clips_per_task: NonNegativeInt
    """Of those, with temporal views; 0: none."""
    max_diagnostic_clips: NonNegativeInt
    """Clips for diagnostics; 0: none."""
    max_answers_per_task: NonNegativeInt
    """Greedy answers per task; 0: none."""
    max_answer_tokens: PositiveInt
    """Longest generated answer."""
    max_captions_per_task: NonNegativeInt
    """Free answers scored per task; 0: none."""
    caption_min_words: Annotated[int, Field(ge=2)]
    """Shortest reference of a free answer outside task `caption`."""
    bootstrap_samples: PositiveInt
    """Bootstrap resamples per interval."""
    seed: NonNegativeInt
    """Seed of sampling, controls and bootstrap."""
    num_threads: PositiveInt
    """CPU threads."""
