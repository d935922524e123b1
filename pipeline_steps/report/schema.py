"""Parameters of the `report` stage (section `report` of params.yaml)."""

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from pipeline_steps.common.params import StrictModel


class Targets(StrictModel):
    """What a run on the embedded world is expected to reach, in autoregressive mode; judged when the split has all
    of `tasks`."""

    tasks: list[str]
    """Tasks with targets."""
    mean_accuracy: float = Field(ge=0, le=1)
    """Lowest mean accuracy."""
    task_accuracy: float = Field(ge=0, le=1)
    """Lowest accuracy of each task."""
    card_loss: PositiveFloat
    """Highest loss of task `card`."""
    gap: NonNegativeFloat
    """Highest autoregressive / fine loss, minus 1."""
    blind_excess: float = Field(ge=0, le=1)
    """Highest blind accuracy above chance, per task."""


class Section(StrictModel):
    title: str
    """Title."""
    min_seeds: PositiveInt
    """Seeds that a verdict requires."""
    margin: PositiveFloat
    """Loss ratios within 1 +- margin are equal."""
    bootstrap_samples: PositiveInt
    """Resamples per interval."""
    seed: NonNegativeInt
    """Bootstrap seed."""
    targets: Targets
    """Expected results on the embedded world."""
