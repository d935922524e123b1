"""Parameters of the `flops` stage (section `flops` of params.yaml)."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from pipeline_steps.common.params import StrictModel


class Text(StrictModel):
    """Lengths of the text beside the frames, in tokens."""

    num_text_tokens: PositiveInt
    """Text tokens per sample."""
    num_tokens_before: NonNegativeInt
    """Text tokens before the first frame."""
    num_labels: PositiveInt
    """Text tokens with a loss."""


class Section(StrictModel):
    split: Literal["validation", "test"]
    """Split to count."""
    multi_tokens: PositiveInt
    """B1's tokens per frame."""
    scales: list[Literal["135M", "360M", "1.7B"]] = Field(min_length=1)
    """Language models."""
    budgets: list[PositiveFloat]
    """Training FLOPs."""
    frontier: Text
    """Text lengths of the curve of cost over the number of frames."""
    crossover_tokens_before: list[NonNegativeInt] = Field(min_length=1)
    """Text tokens before the first frame at which the crossover is found; the text after the frames is the curve's."""
    num_answer_tokens: PositiveInt
    """Length of the counted answer."""
    bytes_per_number: Literal[2, 4]
    """Bytes per cached number."""
