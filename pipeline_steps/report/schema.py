"""Parameters of the `report` stage (section `report` of params.yaml)."""

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from pipeline_steps.common.params import StrictModel


class Targets(StrictModel):
    """What a run on the embedded world is expected to reach, in autoregressive mode; judged when the split has all
    of `tasks`."""

    tasks: list[str]
    """Tasks that the targets apply to."""
    mean_accuracy: float = Field(ge=0, le=1)
    """Lowest accepted mean accuracy."""
    task_accuracy: float = Field(ge=0, le=1)
    """Lowest accepted accuracy of each task."""
    card_loss: PositiveFloat
    """Upper limit of the loss of task `card`, nats per scored token."""
    gap: NonNegativeFloat
    """Autoregressive loss may be at most (1 + gap) times the fine loss, all tasks together."""
    blind_excess: float = Field(ge=0, le=1)
    """Blind accuracy may be at most chance plus this, each task."""


class Section(StrictModel):
    title: str
    """Title of the report."""
    min_seeds: PositiveInt
    """Seeds of both arms that a verdict requires."""
    margin: PositiveFloat
    """Loss ratios within 1 +- margin count as equal."""
    bootstrap_samples: PositiveInt
    """Bootstrap resamples of every interval."""
    seed: NonNegativeInt
    """Seed of the bootstrap."""
    targets: Targets
    """Expected results on the embedded world."""
