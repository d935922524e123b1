"""Parameters of the `training` stages (section `training` of params.yaml)."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from pipeline_steps.common.params import StrictModel
from pipeline_steps.training import objectives

Momentum = Annotated[float, Field(ge=0, lt=1)]


class Common(StrictModel):
    batch_size: PositiveInt
    """Samples per optimizer step over all devices."""
    micro_batch_size: PositiveInt | Literal["auto"] | None
    """Samples per forward pass of one device; null: its whole share; `auto`: the largest of the share, its half, its
    quarter ... that fits the GPU's memory, found before the first step."""
    optimizer: Literal["adamw", "muon"]
    """`muon`: orthogonalized momentum for weight matrices of linear layers, AdamW for the rest; updates are scaled
    to AdamW's size, so learning rates keep their meaning."""
    weight_decay: NonNegativeFloat
    """Applied to matrices only."""
    betas: tuple[Momentum, Momentum]
    """AdamW betas."""
    clip_norm: PositiveFloat
    """Gradient norm limit, all groups together."""
    ema_decay: Momentum | None
    """Decay per step of an EMA that is validated and published instead; null: none."""
    device: Literal["auto", "cpu", "cuda"]
    """`auto` uses a GPU if there is one."""
    precision: Literal["fp32", "bf16"]
    """Autocast precision; weights, optimizer and validation stay fp32."""
    num_threads: PositiveInt
    """CPU threads of torch; results are exact for a given number."""
    activation_checkpointing: bool
    """Recompute layers in the backward pass: less memory, about a fifth more time."""
    compile: bool
    """Torch.compile of every layer of both backbones."""
    sharding: Literal["ddp", "fsdp"]
    """Several processes: `ddp` (full replicas) or `fsdp` (sharded, FSDP2)."""
    record_every: PositiveInt
    """Steps between training rows of the curve (outputs/metrics/<stage>.csv)."""
    validate_every: PositiveInt
    """Steps between validations."""
    max_validation_items: PositiveInt
    """Validation items per source and task."""
    publish: Literal["last", "best"]
    """Weights to publish: of the last step, or of the validation with the lowest mean loss."""
    plateau_validations: PositiveInt
    """Validations without progress that count as a plateau; the curve then gets a row `warning`."""
    plateau_progress: PositiveFloat
    """Relative drop of the best loss that counts as progress."""


class LearningRate(StrictModel):
    """Learning rates of the three groups."""

    connector: NonNegativeFloat
    """Everything that is not a pretrained backbone weight."""
    vision: NonNegativeFloat
    """Vision encoder."""
    language: NonNegativeFloat
    """Language model."""


class MixtureEntry(StrictModel):
    """Items with frames, each of which belongs to the one entry that names it best: source and task, else the
    source, else the task, else neither."""

    source: str
    """Source, or `*`."""
    task: str
    """Task, or `*`: its tasks in proportion to their items."""
    weight: PositiveFloat
    """Relative share of samples."""


class Stage(StrictModel):
    num_samples: PositiveInt
    """Training budget in samples, served exactly."""
    mixture: tuple[MixtureEntry, ...] = Field(min_length=1)
    """Sources and tasks of items with frames; each item goes to the most specific matching entry."""
    text_share: float = Field(ge=0, lt=1)
    """Share of text-only samples."""
    text_source: str
    """Source of the text-only samples, or `*`."""
    loss: Literal["all_text", "answer_only", "preference"]
    """`all_text`: every token of the chat; `answer_only`: answers with end-of-turn tokens; `preference`: DPO against
    the initial weights."""
    objective: objectives.section()
    """Parameters of the objectives."""
    freeze_vision: bool
    """Freeze the vision encoder."""
    freeze_language: bool
    """Freeze the language model."""
    learning_rate: LearningRate
    """Peak learning rates; 0 freezes a group."""
    schedule: Literal["cosine", "constant", "wsd", "converging"]
    """After the warm-up: `cosine` to the floor, `constant`, `wsd` (constant, then linear to the floor), `converging`
    (half a cosine to each group's own end)."""
    warmup_ratio: float = Field(ge=0, lt=1)
    """Share of steps with linear warm-up."""
    min_lr_ratio: float = Field(ge=0, le=1)
    """Floor of `cosine` and `wsd` as a share of the peak."""
    decay_share: float = Field(ge=0, le=1)
    """Share of steps in which `wsd` decays."""
    converged_learning_rate: LearningRate | None
    """End points of `converging`, else null."""

    @model_validator(mode="after")
    def _something_is_trained(self):
        frozen = {"vision": self.freeze_vision, "language": self.freeze_language}
        if not any(getattr(self.learning_rate, name) and not frozen.get(name) for name in LearningRate.model_fields):
            raise ValueError("all learning rates are 0 or their groups frozen: nothing would be trained")
        if self.schedule == "converging" and self.converged_learning_rate is None:
            raise ValueError(
                "the schedule converging needs converged_learning_rate: {connector: , vision: , language: }"
            )
        if self.loss == "preference" and self.text_share:
            raise ValueError(
                f"text_share is {self.text_share}, but preference trains on pairs of answers only: set it to 0"
            )
        return self


class Section(StrictModel):
    common: Common
    """Settings of all stages."""
    stage1: Stage
    """Alignment."""
    stage2: Stage
    """Instruction tuning."""
    stage3: Stage
    """Final instruction tuning, or DPO."""
