"""Parameters of the `training` stages (section `training` of params.yaml)."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from pipeline_steps.params import StrictModel

Momentum = Annotated[float, Field(ge=0, lt=1)]


class Common(StrictModel):
    batch_size: PositiveInt  # samples per optimizer step
    weight_decay: NonNegativeFloat  # on matrices only
    betas: tuple[Momentum, Momentum]  # AdamW
    clip_norm: PositiveFloat  # of the gradient
    device: Literal["auto", "cpu", "cuda"]  # auto: cuda where there is one
    precision: Literal["fp32", "bf16"]  # of the forward pass (autocast); weights and optimizer are fp32
    num_threads: PositiveInt  # of torch on the CPU; results are exact for a given number
    checkpoint_every: PositiveInt  # steps
    validate_every: PositiveInt  # steps
    max_validation_items: PositiveInt  # per family


class LearningRate(StrictModel):
    """Peak learning rates of the three groups; 0 freezes a group."""

    connector: NonNegativeFloat
    vision: NonNegativeFloat
    language: NonNegativeFloat

    @model_validator(mode="after")
    def _something_is_trained(self):
        if not (self.connector or self.vision or self.language):
            raise ValueError("all learning rates are 0: nothing would be trained")
        return self


class MixtureEntry(StrictModel):
    """Items with frames, each of which belongs to the one entry that names it best: source and family, else the
    source, else the family, else neither."""

    source: str  # or "*": all that no other entry names
    family: str  # or "*": the same, each family in proportion to its items
    weight: PositiveFloat


class Stage(StrictModel):
    num_samples: PositiveInt
    mixture: tuple[MixtureEntry, ...] = Field(min_length=1)
    text_share: float = Field(ge=0, lt=1)  # share of text-only samples
    text_source: str  # where they are from, or "*": any source
    loss: Literal["all_text", "answer_only"]
    learning_rate: LearningRate
    warmup_share: float = Field(ge=0, lt=1)  # of the steps, linear
    final_learning_rate: float = Field(ge=0, le=1)  # floor of the cosine, as a share of the peak


class Section(StrictModel):
    common: Common
    stage1: Stage
    stage2: Stage
    stage3: Stage
