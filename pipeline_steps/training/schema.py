"""Parameters of the `training` stages (section `training` of params.yaml)."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from pipeline_steps.common.params import StrictModel
from pipeline_steps.training import objectives

Momentum = Annotated[float, Field(ge=0, lt=1)]


class Common(StrictModel):
    batch_size: PositiveInt
    """Samples per step, all devices."""
    micro_batch_size: PositiveInt | Literal["auto"] | None
    """Samples per device and pass; null: its share; `auto`: halved until it fits."""
    optimizer: Literal["adamw", "muon"]
    """`muon` for linear layers, AdamW for others."""
    weight_decay: NonNegativeFloat
    """Applied to matrices only."""
    betas: tuple[Momentum, Momentum]
    """AdamW betas."""
    clip_norm: PositiveFloat
    """Limit of the gradient norm."""
    ema_decay: Momentum | None
    """Decay of the published EMA."""
    device: Literal["auto", "cpu", "cuda"]
    """`auto` prefers a GPU."""
    precision: Literal["fp32", "bf16"]
    """Autocast precision; all else is fp32."""
    num_threads: PositiveInt
    """CPU threads; affects rounding."""
    activation_checkpointing: bool
    """Recompute layers to save memory."""
    compile: bool
    """`torch.compile` for backbone layers."""
    sharding: Literal["ddp", "fsdp"]
    """Replicas or FSDP2."""
    record_every: PositiveInt
    """Steps between rows of the curve."""
    validate_every: PositiveInt
    """Steps between validations."""
    max_validation_items: PositiveInt
    """Items per source and task."""
    publish: Literal["last", "best"]
    """Last weights, or lowest validation loss."""
    plateau_validations: PositiveInt
    """Validations without progress before a plateau warning."""
    plateau_progress: PositiveFloat
    """Relative drop that is progress."""


class LearningRate(StrictModel):
    """Learning rates of the three groups."""

    connector: NonNegativeFloat
    """Peak rate of all other weights."""
    vision: NonNegativeFloat
    """Peak rate of the backbone."""
    language: NonNegativeFloat
    """Peak rate of the backbone."""


class MixtureEntry(StrictModel):
    """A share of the items with frames. Each item goes to the most specific matching entry: source and task, else
    source, else task, else `*`."""

    source: str
    """Source and task; `*`: any."""
    task: str
    """Source and task; `*`: any."""
    weight: PositiveFloat
    """Relative share of samples."""


class Stage(StrictModel):
    num_samples: PositiveInt
    """Training samples."""
    mixture: tuple[MixtureEntry, ...] = Field(min_length=1)
    """[Shares](data.md#reading-which-item-when-in-which-batch) of items with frames."""
    text_share: float = Field(ge=0, lt=1)
    """Share of text-only samples."""
    text_source: str
    """Their source, or `*`."""
    loss: Literal["all_text", "answer_only", "preference"]
    """Labels: all tokens or answers; or DPO."""
    objective: objectives.section()
    """Parameters of the objectives."""
    freeze_vision: bool
    """Freeze the backbone."""
    freeze_language: bool
    """Freeze the backbone."""
    learning_rate: LearningRate
    """Peak learning rates; 0 freezes a group."""
    schedule: Literal["cosine", "constant", "wsd", "converging"]
    """`wsd`: constant, then linear; `converging`: cosine to each group's end."""
    warmup_ratio: float = Field(ge=0, lt=1)
    """Share of steps with linear warm-up."""
    min_lr_ratio: float = Field(ge=0, le=1)
    """Floor of `cosine` and `wsd`."""
    decay_share: float = Field(ge=0, le=1)
    """Share of steps in which `wsd` decays."""
    converged_learning_rate: LearningRate | None
    """End rates of `converging`."""

    @model_validator(mode="after")
    def _something_is_trained(self):
        frozen = {"vision": self.freeze_vision, "language": self.freeze_language}
        if not any(getattr(self.learning_rate, name) and not frozen.get(name) for name in LearningRate.model_fields):
            raise ValueError("all learning rates are 0 or their groups frozen: nothing would be trained")
        if self.schedule == "converging" and self.converged_learning_rate is None:
            raise ValueError(
                "the schedule converging needs converged_learning_rate: {connector: , vision: , language: }"
            )
        if self.schedule == "wsd" and self.warmup_ratio + self.decay_share > 1:
            raise ValueError(
                f"warmup_ratio {self.warmup_ratio:g} and decay_share {self.decay_share:g} of the schedule wsd overlap: "
                "lower them to a sum of at most 1"
            )
        if self.loss == "preference" and self.text_share:
            raise ValueError(
                f"text_share is {self.text_share}, but preference trains on pairs of answers only: set it to 0"
            )
        return self


class Section(StrictModel):
    init_from: str = Field(min_length=1)
    """Backbones, or a checkpoint to fine-tune."""
    common: Common
    """Settings of all stages."""
    stage1: Stage
    """Alignment."""
    stage2: Stage
    """Instruction tuning."""
    stage3: Stage
    """Final instruction tuning, or DPO."""
