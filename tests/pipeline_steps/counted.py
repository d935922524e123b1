"""A whole `FlopsResult` for tests of its readers: a SmolLM2-135M counted on two samples (milliseconds, no weights)."""

from pipeline_steps import params
from pipeline_steps.flops import __main__ as flops
from pipeline_steps.flops.formulas import Sample


def flops_result():
    parameters = params.read(params.ROOT / "params.yaml", *flops.PARAMS)
    config = flops.scaled_arms(["135M"], parameters)["135M"]["foveated"]
    return flops.count(config, [Sample(8, 100, 50, 20), Sample(4, 60, 30, 10)], parameters)
