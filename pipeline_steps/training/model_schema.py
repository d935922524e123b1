"""Parameters of the network (section `model` of params.yaml): fields of `FoveatedVLMConfig`, explained there."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from pipeline_steps.common.params import StrictModel


class Section(StrictModel):
    architecture: Literal["foveated", "multi_token"]
    attention: Literal["deep", "shallow"]
    layout: Literal["question_first", "vision_first"]
    query_dim: PositiveInt
    query_init_std: PositiveFloat
    query_bias: bool
    tie_first_query: bool
    query_update: Literal["replace", "add"]
    query_source: Literal["planned", "static", "random", "fixed", "oracle"]
    attention_temperature: PositiveFloat
    learnable_temperature: bool
    hard_attention: Literal["none", "top_k", "gumbel"]
    attention_top_k: PositiveInt
    num_visual_tokens_per_frame: PositiveInt
    token_aggregation: Literal["none", "mean", "weighted"]
    num_passes: int = Field(ge=1, le=3)
    second_pass_probability: float = Field(ge=0, le=1)
    lambda_coarse: NonNegativeFloat
    lambda_entropy: NonNegativeFloat
    entropy_margin: float
    lambda_contrastive: NonNegativeFloat
    contrastive_margin: float = Field(ge=-1, le=1)
    coarse_only: bool
    blind: bool
    frame_time_embedding: Literal["none", "sinusoidal"]
    visual_scale: PositiveFloat | Literal["auto"]
    max_num_frames: PositiveInt
    dpo_beta: PositiveFloat
