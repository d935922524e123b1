"""Parameters of the `evaluation` stage (section `evaluation` of params.yaml)."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from pipeline_steps.common.params import StrictModel


class Section(StrictModel):
    split: Literal["validation", "test"]
    """The split that is scored."""
    batch_size: PositiveInt
    """Items per forward pass. Does not change scores beyond rounding."""
    max_items_per_task: PositiveInt
    """Items scored per task; larger tasks are sampled with `seed`."""
    max_control_items_per_task: NonNegativeInt
    """How many of those also run the controls; 0 disables them."""
    max_temporal_clips_per_task: NonNegativeInt
    """How many of those are also shown in part (temporal views); 0 disables it."""
    max_diagnostic_clips: NonNegativeInt
    """Clips for the automated checks, spread evenly over tasks; 0 disables them."""
    max_answers_per_task: NonNegativeInt
    """Greedy answers generated per task in autoregressive mode; 0 disables it."""
    max_answer_tokens: PositiveInt
    """Longest generated answer, in tokens."""
    max_captions_per_task: NonNegativeInt
    """Free answers compared with references in four modes; 0 disables it."""
    caption_min_words: Annotated[int, Field(ge=2)]
    """Shortest reference, in words, that counts as a free answer outside the task `caption`."""
    bootstrap_samples: PositiveInt
    """Bootstrap resamples of every interval."""
    seed: NonNegativeInt
    """Seed of item sampling, random queries, shuffled frames and the bootstrap."""
    num_threads: PositiveInt
    """CPU threads of torch."""
