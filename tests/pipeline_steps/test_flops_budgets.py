"""Compute budgets and the number of frames at which one token per frame becomes cheaper, checked by hand."""

import pytest

from pipeline_steps.common import flop_formulas as formulas
from pipeline_steps.common import params
from pipeline_steps.common.errors import UserError
from pipeline_steps.common.flop_formulas import Sample
from pipeline_steps.flops import __main__ as flops
from pipeline_steps.flops import iso, scales
from tests.objectives import section

OBJECTIVE = section(second_pass_probability=0.5)


@pytest.fixture(scope="module")
def parameters():
    return params.read(params.ROOT / "params.yaml", *flops.PARAMS)


@pytest.fixture(scope="module")
def arms(parameters):
    return flops.scaled_arms(list(scales.LANGUAGE_MODELS), parameters)


def test_samples_of_a_budget_by_hand(arms):
    config = arms["135M"]["foveated"]
    each = formulas.training_step(config, iso.BUDGET_SAMPLE, OBJECTIVE)
    row = iso.budget_samples([10.5 * each], {"135M": {"foveated": config}}, iso.BUDGET_SAMPLE, OBJECTIVE)[0]
    assert (row.num_samples, row.flops_per_sample) == (10, each)


def test_one_token_saves_more_with_more_frames_and_a_larger_language_model(arms):
    text, frames = Sample(0, 128, 64, 64), (1, 4, 16, 64)
    found = {scale: iso.frontier(*entries.values(), text, frames, OBJECTIVE) for scale, entries in arms.items()}
    at_most = [curve.foveated[-1] / curve.multi_token[-1] for curve in found.values()]
    assert at_most == sorted(at_most, reverse=True)
    for curve in found.values():
        ratios = [one / many for one, many in zip(curve.foveated, curve.multi_token, strict=True)]
        assert ratios == sorted(ratios, reverse=True)
        assert curve.vision_share == sorted(curve.vision_share)
    assert found["135M"].vision_share[-1] > 0.5 > found["1.7B"].vision_share[0]


def test_cheaper_from_holds_to_the_end_of_the_curve():
    assert iso.cheaper_from((1, 2, 4), (1, 3, 1), (2, 2, 2)) == 4
    assert iso.cheaper_from((1, 2, 4), (1, 1, 1), (2, 2, 2)) == 1
    assert iso.cheaper_from((1, 2), (1, 2), (2, 2)) is None


def test_foveated_arms_of_a_multi_token_network_have_one_query(parameters):
    ordinary = scales.scaled(
        "135M",
        {**parameters.model.model_dump(), "architecture": "multi_token", "num_visual_tokens_per_frame": 49},
    )
    found = flops.arms_of(ordinary, 16)
    assert {name: arm.tokens_per_frame for name, arm in found.items()} == {
        "foveated": 1,
        "A6_coarse_only": 1,
        "B1_16_tokens": 16,
    }


def test_command_prints_the_samples_of_a_budget(monkeypatch, capsys):
    path = str(params.ROOT / "params.yaml")
    monkeypatch.setattr("sys.argv", ["flops", "--params", path, "--budget", "1.6e16", "--scale", "135M"])
    flops.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[2:4]] == ["40,554", "32,559"]


@pytest.mark.parametrize("flags", [["--budget", "0"], ["--budget", "1e16", "--labels", "500"]])
def test_command_rejects_impossible_budgets_and_lengths(monkeypatch, flags):
    monkeypatch.setattr("sys.argv", ["flops", "--params", str(params.ROOT / "params.yaml"), *flags])
    with pytest.raises(UserError, match="budgets must be positive"):
        flops.main()
