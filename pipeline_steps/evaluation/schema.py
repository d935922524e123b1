"""Parameters of the `evaluation` stage (section `evaluation` of params.yaml)."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from pipeline_steps.common.params import StrictModel


class Section(StrictModel):
    split: Literal["validation", "test"]
    batch_size: PositiveInt
    max_items_per_task: PositiveInt  # larger tasks are subsampled with `seed`
    max_control_items_per_task: NonNegativeInt  # scored items that also get the controls `modes.CONTROLS`; 0: none
    max_temporal_clips_per_task: NonNegativeInt  # scored clips that also get the views `modes.VIEWS`; 0: none
    max_diagnostic_clips: NonNegativeInt  # for the automated checks, split evenly over the tasks; 0: none
    max_answers_per_task: NonNegativeInt  # greedy answers in answers.jsonl, autoregressive mode; 0: none
    max_answer_tokens: PositiveInt
    max_captions_per_task: NonNegativeInt  # free-form answers scored against the true ones; 0: none
    caption_min_words: Annotated[int, Field(ge=2)]  # minimum length of the true answer, for tasks other than `caption`
    bootstrap_samples: PositiveInt
    seed: NonNegativeInt  # for subsampling, random queries, shuffled frames and the bootstrap
    num_threads: PositiveInt
