"""Parameters of the network (section `model` of params.yaml): fields of `FoveatedVLMConfig`, explained there."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from pipeline_steps.common.params import StrictModel


class Section(StrictModel):
    architecture: Literal["foveated", "multi_token"]
    """`multi_token`: the baseline, average-pooled patches."""
    attention: Literal["deep", "shallow"]
    """Queries pass through all vision layers, or attend to the last."""
    layout: Literal["question_first", "vision_first"]
    """Frames after the user's text, or after BOS."""
    query_dim: PositiveInt
    """Query width."""
    query_init_std: PositiveFloat
    """Initial standard deviation of learned queries."""
    query_bias: bool
    """Bias in the query projection."""
    tie_first_query: bool
    """Fine passes start with the static query."""
    query_update: Literal["replace", "add", "gated"]
    """The planner's output replaces the query, is added to it or, `gated`, to a learned part of it."""
    query_source: Literal["planned", "static", "random", "fixed", "oracle"]
    """`random`: per frame; `fixed`: random, per batch; `oracle`: planned, limited to the target's patches."""
    attention_temperature: float = Field(ge=1e-3)
    """Divides query-attention logits; below 1 is sharper."""
    learnable_temperature: bool
    """Each layer learns its temperature."""
    hard_attention: Literal["none", "top_k", "gumbel"]
    """Per head: keep the strongest positions, or sample one."""
    attention_top_k: PositiveInt
    """Positions that `top_k` keeps."""
    num_visual_tokens_per_frame: PositiveInt
    """Queries per frame; a square number for `multi_token`."""
    token_aggregation: Literal["none", "mean", "weighted"]
    """One token per query, their mean, or a learned weighting."""
    num_passes: int = Field(ge=1, le=3)
    """Fine passes, each planned from the previous one."""
    frame_downsampling: PositiveInt
    """The vision encoder sees frames reduced by this factor."""
    fovea_size: NonNegativeInt
    """Side in patches of the full-resolution window where a planned query looks; 0: none."""
    coarse_only: bool
    """Static query only (ablation A6)."""
    blind: bool
    """Every frame in the mean colour (control)."""
    frame_time_embedding: Literal["none", "sinusoidal"]
    """Frame times added to visual tokens."""
    visual_scale: PositiveFloat | Literal["auto"]
    """Initial standard deviation of visual tokens; `auto`: the embeddings'."""
    max_num_frames: PositiveInt
    """Most frames per sample; more is an error."""
