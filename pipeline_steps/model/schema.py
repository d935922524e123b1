"""Parameters of the network (section `model` of params.yaml): fields of `FoveatedVLMConfig`, explained there."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from pipeline_steps.params import StrictModel


class Section(StrictModel):
    architecture: Literal["foveated", "multi_token"]
    attention: Literal["deep", "shallow"]
    layout: Literal["question_first", "vision_first"]
    query_dim: PositiveInt
    query_init_std: PositiveFloat
    query_bias: bool
    tie_first_query: bool
    num_visual_tokens_per_frame: PositiveInt
    coarse_only: bool
    second_pass_probability: float = Field(ge=0, le=1)
    lambda_coarse: float = Field(ge=0)
    visual_scale: PositiveFloat | Literal["auto"]
