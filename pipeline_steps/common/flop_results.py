"""Schemas of `outputs/metrics/flops.json`; the file itself is read and written by metrics.py."""

from pydantic import Field

from pipeline_steps.common.result import Result, Share


class Components(Result):
    """FLOPs per sample (2 per multiply-accumulate)."""

    vision_encoder: float
    """Patches through the encoder."""
    query_passes: float
    """Queries through the encoder."""
    connector: float
    """Projections between the backbones."""
    planner: float
    """Hidden states to queries."""
    language_model: float
    """All passes of the language model."""
    vocabulary_projection: float
    """Logits of labelled positions."""


class ModeFlops(Result):
    components: Components
    """One forward pass with loss."""
    language_passes: list[float]
    """FLOPs and positions of each language-model pass."""
    language_positions: list[float]
    """FLOPs and positions of each language-model pass."""
    num_query_passes: float
    """Query passes per frame."""
    total: float
    """Sum of the components."""
    backward: float
    """Backward pass, all weights trained."""


class AnswerCost(Result):
    """An answer in autoregressive mode, at the mean lengths (pipeline_steps/flops/serving.py)."""

    num_prompt_tokens: int
    """Lengths, visual tokens included."""
    num_answer_tokens: int = Field(ge=1)
    """Lengths, visual tokens included."""
    prefill: float
    """FLOPs of the first token."""
    first_decoded_token: float
    """FLOPs of the second token."""
    per_decoded_token: float
    """Mean FLOPs of later tokens."""
    total: float
    """FLOPs of the answer."""
    key_value_bytes: int
    """Final caches of language model and frames."""
    vision_bytes: int
    """Final caches of language model and frames."""


class TrainingMemory(Result):
    """Bytes of the activations of one training sample: an estimate (pipeline_steps/flops/serving.py)."""

    vision_bytes: int
    """Bytes by part."""
    query_bytes: int
    """Bytes by part."""
    language_bytes: int
    """Bytes by part."""
    vocabulary_bytes: int
    """Bytes by part."""


class BudgetSamples(Result):
    """Training samples that a compute budget pays for."""

    budget: float
    """FLOPs."""
    scale: str
    """Language model."""
    arm: str
    """Network."""
    flops_per_sample: float
    """FLOPs per training sample."""
    num_samples: int
    """Samples within the budget."""


class Frontier(Result):
    """Cost over the number of frames for one size of language model."""

    num_frames: list[int]
    """Frames per clip."""
    foveated: list[float]
    """Forward pass, autoregressive."""
    multi_token: list[float]
    """Forward pass, autoregressive."""
    foveated_training: list[float]
    """Training sample."""
    multi_token_training: list[float]
    """Training sample."""
    vision_share: list[Share]
    """Encoder's and queries' share."""
    cheaper_from: int | None
    """Frames from which foveated is cheaper; null: at none up to the last of `num_frames`."""
    cheaper_training_from: int | None
    """Frames from which foveated is cheaper; null: at none up to the last of `num_frames`."""


class Crossover(Result):
    """From how many frames on foveated is cheaper, at one length of the text, for one size of language model."""

    num_tokens_before: int
    """Text tokens before the first frame."""
    num_text_tokens: int
    """Text tokens per sample."""
    max_num_frames: int = Field(ge=1)
    """Frames up to which costs are compared, from 1."""
    inference: int | None
    """Frames from which foveated is cheaper; null: at none up to `max_num_frames`."""
    training: int | None
    """Frames from which foveated is cheaper; null: at none up to `max_num_frames`."""


class FlopsResult(Result):
    modes: dict[str, ModeFlops]
    """This network, by mode."""
    arms: dict[str, ModeFlops]
    """Trained networks, autoregressive."""
    training_sample: float
    """Training sample, forward and backward."""
    training: dict[str, float]
    """The same, by arm."""
    curves: dict[str, list[float]]
    """Totals over `num_frames` by arm."""
    answers: dict[str, AnswerCost]
    """By arm."""
    memory: dict[str, TrainingMemory]
    """By arm."""
    budgets: list[BudgetSamples]
    """Iso-FLOP sample counts."""
    frontier: dict[str, Frontier]
    """By language model."""
    crossovers: dict[str, list[Crossover]]
    """By language model and length of the text before the frames."""
    per: str
    """Unit of the counts."""
    assumptions: dict
    """Mean lengths; what is not counted."""
