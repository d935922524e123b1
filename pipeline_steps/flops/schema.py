"""Parameters of the `flops` stage (section `flops` of params.yaml)."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from pipeline_steps.common.params import StrictModel


class Text(StrictModel):
    """Lengths of the text beside the frames, in tokens."""

    num_text_tokens: PositiveInt
    num_tokens_before: NonNegativeInt  # of these, before the first frame
    num_labels: PositiveInt  # of these, with a loss


class Section(StrictModel):
    split: Literal["validation", "test"]  # its mean frame and token counts are used
    multi_tokens: PositiveInt  # visual tokens per frame of the multi-token baseline
    scales: list[Literal["135M", "360M", "1.7B"]] = Field(min_length=1)  # language models (flops/scales.py)
    budgets: list[PositiveFloat]  # training FLOPs; the samples per budget are reported for every scale
    frontier: Text  # text lengths for the cost over the number of frames
    num_answer_tokens: PositiveInt  # length of the answer for the inference cost
    bytes_per_number: Literal[2, 4]  # of caches and activations: 4 = fp32, 2 = bf16
