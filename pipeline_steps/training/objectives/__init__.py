"""Training objectives, one file each. Every module of this package is registered automatically.

`section()` is the schema of training.<stage>.objective, made of the parameters of all objectives. `build` creates the
objectives of a stage. `TrainingModel` (pipeline_steps/training/training_model.py) sums their terms.
"""

import importlib
import pkgutil
from pathlib import Path
from typing import Literal

from pydantic import Field, create_model

from pipeline_steps.common.errors import UserError
from pipeline_steps.common.params import StrictModel
from pipeline_steps.training.objectives.base import Needs, Objective, Outputs, Term

__all__ = [
    "Needs",
    "Objective",
    "Outputs",
    "Term",
    "build",
    "check",
    "input_files",
    "registry",
    "section",
    "term_names",
    "with_modules",
]


class Shared(StrictModel):
    second_pass_probability: float = Field(ge=0, le=1)
    """Share of steps with one more fine pass."""
    initial_modules: Literal["new", "previous"]
    """Start heads `new`, or from the `previous` stage."""


def registry() -> dict[str, type[Objective]]:
    """{name: class} of all objectives in this package."""
    found: dict[str, type[Objective]] = {}
    for entry in sorted(pkgutil.iter_modules(__path__), key=lambda entry: entry.name):
        module = importlib.import_module(f"{__name__}.{entry.name}")
        for value in vars(module).values():
            own = isinstance(value, type) and issubclass(value, Objective) and value.__module__ == module.__name__
            if not own or value is Objective:
                continue
            if found.setdefault(value.name, value) is not value:
                raise ValueError(
                    f"two objectives are named {value.name!r}: {found[value.name]} and {value}. Rename one."
                )
    return found


def section() -> type[StrictModel]:
    """The schema of training.<stage>.objective."""
    fields = {
        name: (objective.Parameters, Field(description=(objective.__doc__ or "").split("\n\n")[0]))
        for name, objective in registry().items()
        if objective.Parameters is not None
    }
    return create_model("Section", __base__=Shared, **fields)


def term_names() -> tuple[str, ...]:
    """Names of the terms of all objectives. They are columns of the metrics table."""
    return tuple(name for objective in registry().values() for name in objective.term_names)


def active(settings) -> dict[str, type[Objective]]:
    """{name: class} of the objectives that a stage uses. settings: training.<stage>."""
    return {name: objective for name, objective in registry().items() if objective.is_active(settings)}


def with_modules(settings) -> set[str]:
    """Names of the objectives of a stage that have a module of their own, such as a head."""
    return {name for name, own in active(settings).items() if own.make_module is not Objective.make_module}


def check(stage: str, settings, network) -> None:
    """UserError if no objective is active, or if one needs a planned pass and the network has none, or has options that
    do not fit. network: section `model`, or a FoveatedVLMConfig."""
    if not active(settings):
        raise UserError(
            f"training.{stage}.objective.text.weight is 0, and so is the weight of every other objective: nothing to "
            "train. Set one above 0."
        )
    for objective in active(settings).values():
        objective.check(stage, settings, network)
    if network.architecture == "multi_token":
        reason = "model.architecture is multi_token"
    elif network.coarse_only:
        reason = "model.coarse_only is true"
    else:
        return
    for name, objective in active(settings).items():
        if objective.needs.planned:
            raise UserError(
                f"training.{stage}.objective.{name}.weight is {getattr(settings.objective, name).weight:g}, but "
                f"{reason}. This network has a single pass, but the objective compares two. Set the weight to 0."
            )


def input_files(stage: str, settings) -> list[Path]:
    """Files of the stage's objectives besides params.yaml. UserError if one is missing."""
    return [path for objective in active(settings).values() for path in objective.input_files(stage, settings)]


def build(stage: str, settings, config) -> list[Objective]:
    """The objectives of a stage, for a network with this FoveatedVLMConfig. UserError as in `check`."""
    check(stage, settings, config)
    return [objective(getattr(settings.objective, name, None), config) for name, objective in active(settings).items()]
