"""Parameters of the `report` stage (section `report` of params.yaml)."""

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from pipeline_steps.common.params import StrictModel


class Targets(StrictModel):
    """What a run on the embedded world is expected to reach, in autoregressive mode; judged when the split has all
    of `tasks`."""

    tasks: list[str]
    mean_accuracy: float = Field(ge=0, le=1)  # at least
    task_accuracy: float = Field(ge=0, le=1)  # at least, each task
    card_loss: PositiveFloat  # below, nats per scored answer token
    gap: NonNegativeFloat  # autoregressive loss at most (1 + gap) x fine loss, all tasks together
    blind_excess: float = Field(ge=0, le=1)  # blind accuracy at most chance + this, each task


class Section(StrictModel):
    title: str
    min_seeds: PositiveInt  # seeds of both arms that a verdict needs
    margin: PositiveFloat  # loss ratios within 1 +- margin count as equal
    bootstrap_samples: PositiveInt
    seed: NonNegativeInt
    targets: Targets
