"""Parameters of the network (section `model` of params.yaml): fields of `FoveatedVLMConfig`, explained there."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from pipeline_steps.common.params import StrictModel


class Section(StrictModel):
    architecture: Literal["foveated", "multi_token"]
    """`foveated`, or `multi_token`: the baseline with average-pooled patch tokens."""
    attention: Literal["deep", "shallow"]
    """`deep`: queries pass through every layer of the vision encoder; `shallow`: they attend to the last layer's
    patches only."""
    layout: Literal["question_first", "vision_first"]
    """Position of the frames: `question_first` (after the user's text) or `vision_first` (after BOS)."""
    query_dim: PositiveInt
    """Width of the queries between planner and vision encoder."""
    query_init_std: PositiveFloat
    """Initial standard deviation of the static and first query."""
    query_bias: bool
    """Adds a bias to the projection of queries into the vision encoder."""
    tie_first_query: bool
    """Frame 0 of the fine pass uses the static query instead of its own first query."""
    query_update: Literal["replace", "add"]
    """The planner's output replaces the query (`replace`) or is added to it (`add`)."""
    query_source: Literal["planned", "static", "random", "fixed", "oracle"]
    """Queries in place of the planned ones: `planned` (default), `static`, `random` (new per frame), `fixed` (one
    random query per batch) or `oracle` (planned, limited to the target's patches)."""
    attention_temperature: PositiveFloat
    """Divides the logits of query attention; below 1 is sharper."""
    learnable_temperature: bool
    """Each layer learns its temperature."""
    hard_attention: Literal["none", "top_k", "gumbel"]
    """`none`; `top_k` keeps the strongest positions of every head; `gumbel` samples one."""
    attention_top_k: PositiveInt
    """Positions that `top_k` keeps."""
    num_visual_tokens_per_frame: PositiveInt
    """Queries per frame, and tokens per frame unless aggregated; a square number for `multi_token`."""
    token_aggregation: Literal["none", "mean", "weighted"]
    """How several queries become tokens: `none` (one each), `mean`, or `weighted` (learned)."""
    num_passes: int = Field(ge=1, le=3)
    """Fine passes in parallel mode; each plans from the tokens of the previous one."""
    coarse_only: bool
    """Train and answer with the static query alone (ablation A6)."""
    blind: bool
    """Replace every frame by the mean colour (control)."""
    frame_time_embedding: Literal["none", "sinusoidal"]
    """`sinusoidal` adds a learned projection of each frame's time to its visual tokens."""
    visual_scale: PositiveFloat | Literal["auto"]
    """Initial standard deviation of visual tokens; `auto`: that of the token embeddings."""
    max_num_frames: PositiveInt
    """Upper limit of frames per sample; more is an error."""
