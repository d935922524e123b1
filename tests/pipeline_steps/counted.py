"""What the tests of the report share: a `FlopsResult` of a SmolLM2-135M on two samples (seconds, once), a section."""

from functools import cache

from pipeline_steps.common import params
from pipeline_steps.common.flop_formulas import Sample
from pipeline_steps.flops import __main__ as flops
from pipeline_steps.report.schema import Section


def flops_config():
    """The configuration that `flops_result` counts."""
    parameters = params.read(params.ROOT / "params.yaml", *flops.PARAMS)
    return flops.scaled_arms(["135M"], parameters)["135M"]["foveated"]


@cache
def flops_result():
    parameters = params.read(params.ROOT / "params.yaml", *flops.PARAMS)
    return flops.count(flops_config(), [Sample(8, 100, 50, 20), Sample(4, 60, 30, 10)], parameters)


def report_section(title, tasks):
    """The section `report` of params.yaml with few resamples, and targets for these tasks."""
    targets = {"mean_accuracy": 0.75, "task_accuracy": 0.45, "card_loss": 0.7, "gap": 0.05, "blind_excess": 0.1}
    numbers = {"min_seeds": 3, "margin": 0.05, "bootstrap_samples": 200, "seed": 1}
    return Section(title=title, **numbers, targets={"tasks": list(tasks), **targets})
