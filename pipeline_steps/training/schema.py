"""Parameters of the `training` stages (section `training` of params.yaml)."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from pipeline_steps.common.params import StrictModel

Momentum = Annotated[float, Field(ge=0, lt=1)]


class Watch(StrictModel):
    """How a run is watched while it goes on; nothing here changes what is trained."""

    log_every: PositiveInt  # steps between rows of the metrics table
    tensorboard: bool  # curves in outputs/live/<stage>/tensorboard
    dvclive: bool  # curves in outputs/live/<stage>/dvclive
    wandb_project: str | None  # also to Weights & Biases, which has to be installed and logged in
    heatmaps_every: PositiveInt | None  # steps between pictures of where the fixed validation clips are looked at
    num_heatmap_clips: PositiveInt
    peak_tflops: PositiveFloat | None  # of one device, for the MFU; null: the published one of a known GPU, else no MFU
    warn_above_epochs: PositiveFloat  # more repeats of a group of the mixture than this are warned of
    plateau_validations: PositiveInt  # validations in a row without progress that are called a plateau
    plateau_progress: PositiveFloat  # share of the loss by which they have to progress


class Common(StrictModel):
    batch_size: PositiveInt  # samples per optimizer step, of all devices together
    micro_batch_size: PositiveInt | Literal["auto"] | None  # samples per forward pass of one device; null: all of them;
    # auto: as many as the GPU's memory takes, found before the first step
    optimizer: Literal["adamw", "muon"]  # muon: for the weight matrices of linear maps, AdamW for the rest
    weight_decay: NonNegativeFloat  # on matrices only
    betas: tuple[Momentum, Momentum]  # AdamW
    clip_norm: PositiveFloat  # of the gradient
    ema_decay: Momentum | None  # per step, of averaged weights that are validated and published instead; null: none
    device: Literal["auto", "cpu", "cuda"]  # auto: cuda where there is one
    precision: Literal["fp32", "bf16"]  # of the forward pass (autocast); weights and optimizer are fp32
    num_threads: PositiveInt  # of torch on the CPU; results are exact for a given number
    activation_checkpointing: bool  # less memory for a fifth more time: layers are computed again in the backward pass
    compile: bool  # torch.compile of the hot paths
    sharding: Literal["ddp", "fsdp"]  # of several processes: whole copies, or weights and optimizer in parts (FSDP2)
    checkpoint_every: PositiveInt  # steps
    keep_checkpoints: PositiveInt  # the last ones
    validate_every: PositiveInt  # steps
    max_validation_items: PositiveInt  # per task
    publish: Literal["last", "best"]  # weights of the last step, or of the validation with the lowest mean loss
    watch: Watch


class LearningRate(StrictModel):
    """Learning rates of the three groups."""

    connector: NonNegativeFloat
    vision: NonNegativeFloat
    language: NonNegativeFloat


class MixtureEntry(StrictModel):
    """Items with frames, each of which belongs to the one entry that names it best: source and task, else the
    source, else the task, else neither."""

    source: str  # or "*": all that no other entry names
    task: str  # or "*": the same, each task in proportion to its items
    weight: PositiveFloat


class Stage(StrictModel):
    num_samples: PositiveInt
    mixture: tuple[MixtureEntry, ...] = Field(min_length=1)
    text_share: float = Field(ge=0, lt=1)  # share of text-only samples
    text_source: str  # where they are from, or "*": any source
    loss: Literal[
        "all_text", "answer_only", "preference"
    ]  # preference: DPO against the weights that the stage began with
    freeze_vision: bool
    freeze_language: bool
    learning_rate: LearningRate  # peaks; 0 freezes a group as well
    schedule: Literal["cosine", "constant", "wsd", "converging"]  # after the warm-up: see schedule.py
    warmup_ratio: float = Field(ge=0, lt=1)  # of the steps, linear
    min_lr_ratio: float = Field(ge=0, le=1)  # at the end of cosine and wsd, as a share of the peak
    decay_share: float = Field(ge=0, le=1)  # of the steps, at the end of wsd
    converged_learning_rate: LearningRate | None  # at the end of converging

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
    stage1: Stage
    stage2: Stage
    stage3: Stage
