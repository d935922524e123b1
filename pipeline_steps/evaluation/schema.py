"""Parameters of the `evaluation` stage (section `evaluation` of params.yaml)."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from pipeline_steps.common.params import StrictModel


class Section(StrictModel):
    split: Literal["validation", "test"]
    batch_size: PositiveInt
    max_items_per_task: PositiveInt  # a seeded sample of larger tasks is scored
    max_control_items_per_task: NonNegativeInt  # of those, for the controls in `modes.CONTROLS`; 0: none
    max_temporal_clips_per_task: NonNegativeInt  # of those, shown in part (`modes.VIEWS`); 0: none
    max_diagnostic_clips: NonNegativeInt  # for the automated checks, of all tasks as many; 0: none
    max_answers_per_task: NonNegativeInt  # greedy answers written out, autoregressive mode; 0: none
    max_answer_tokens: PositiveInt
    max_captions_per_task: NonNegativeInt  # free answers compared with the true ones, in several modes; 0: none
    caption_min_words: Annotated[int, Field(ge=2)]  # in the true answer, for other tasks than `caption`
    bootstrap_samples: PositiveInt
    seed: NonNegativeInt  # of the samples of items, the random queries, the shuffled frames and the bootstrap
    num_threads: PositiveInt
