"""Compute budgets and the number of frames at which one token per frame becomes cheaper, checked by hand."""

import itertools
from dataclasses import replace

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


def searched(arms, sample, last, costs):
    """The smallest number of frames up to `last` from which the first of two networks costs less at every number, or
    None. costs: FLOPs of (configuration, Sample)."""
    one, several = arms.values()
    found = None
    for count in range(last, 0, -1):
        lengths = replace(sample, num_frames=count)
        if costs(one, lengths) >= costs(several, lengths):
            break
        found = count
    return found


def inference(config, sample):
    return formulas.forward(config, sample, "autoregressive").total


def training(config, sample):
    return formulas.training_step(config, sample, OBJECTIVE)


@pytest.mark.parametrize("scale", scales.LANGUAGE_MODELS)
def test_crossovers_are_those_of_a_search_over_the_frames_and_grow_with_the_text(arms, scale):
    lengths = (0, 64, 200, 500)
    found = iso.crossovers(*arms[scale].values(), Sample(0, 100, 60, 30), lengths, 40, OBJECTIVE)
    for before, entry in zip(lengths, found, strict=True):
        sample = Sample(0, before + 40, before, 30)
        assert (entry.num_tokens_before, entry.num_text_tokens) == (before, before + 40)
        assert entry.inference == searched(arms[scale], sample, 40, inference)
        assert entry.training == searched(arms[scale], sample, 40, training)
    use = [entry.inference for entry in found]
    assert all(one < other for one, other in itertools.pairwise(use))
    assert [entry.training for entry in found] == [1] * 4


def test_an_independent_count_gives_these_crossovers(arms):
    found = iso.crossovers(*arms["135M"].values(), Sample(0, 128, 64, 64), (64, 500), 64, OBJECTIVE)
    assert [entry.inference for entry in found] == [4, 24]


def test_a_crossover_beyond_the_last_number_of_frames_is_none(arms):
    text = Sample(0, 564, 500, 64)
    cases = {last: iso.crossover(*arms["135M"].values(), text, last, OBJECTIVE).inference for last in (23, 24)}
    assert cases == {23: None, 24: 24}


def test_an_arm_that_is_cheaper_with_few_frames_only_has_no_crossover(parameters):
    pair = flops.arms_of(scales.scaled("1.7B", parameters.model.model_dump()), 2)
    del pair["A6_coarse_only"]
    text = Sample(0, 576, 512, 64)
    one, several = (training(config, replace(text, num_frames=1)) for config in pair.values())
    assert one < several
    found = iso.crossover(*pair.values(), text, 16, OBJECTIVE)
    assert (found.inference, found.training) == (None, None)


def test_the_curve_starts_to_save_between_its_numbers_of_frames(arms):
    found = iso.frontier(*arms["1.7B"].values(), Sample(0, 128, 64, 64), (1, 4, 6, 12), OBJECTIVE)
    assert found.cheaper_from == 5


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
