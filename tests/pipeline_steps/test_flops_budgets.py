"""Budgets and the predecessor's count, with numbers counted by hand or published."""

from itertools import pairwise

import pytest

from pipeline_steps.common import flop_formulas as formulas
from pipeline_steps.common import params
from pipeline_steps.common.errors import UserError
from pipeline_steps.common.flop_formulas import Sample
from pipeline_steps.flops import __main__ as flops
from pipeline_steps.flops import iso, predecessor, scales
from tests.objectives import section

OBJECTIVE = section(second_pass_probability=0.5)


def our_count(config):
    return formulas.training_step(config, predecessor.SAMPLE, OBJECTIVE)


@pytest.fixture(scope="module")
def parameters():
    return params.read(params.ROOT / "params.yaml", *flops.PARAMS)


@pytest.fixture(scope="module")
def arms(parameters):
    return flops.scaled_arms(list(scales.LANGUAGE_MODELS), parameters)


def test_the_predecessors_plan_is_reproduced_to_the_sample(arms):
    for budget, entries in predecessor.PLANNED.items():
        for scale, expected in entries.items():
            assert tuple(predecessor.num_samples(config, budget) for config in arms[scale].values()) == expected


def test_the_predecessors_count_by_hand(arms):
    """135M: encoder 8 x 12 x (12 x 257 x 384^2 + 2 x 257^2 x 384) = 48526073856; queries 2 x 8 x 12 x (4 x 384^2 +
    2 x 257 x 384) = 151142400; projection 2 x 8 x 384 x 576 = 3538944; language model 2 x 30 x (12 x 136 x 576^2 +
    2 x 136^2 x 576) = 33765949440."""
    expected = 48526073856 + 151142400 + 3538944 + 33765949440
    assert predecessor.forward(arms["135M"]["foveated"]) == expected


def test_the_vocabulary_adds_a_fifth_to_the_smallest_model():
    """What the predecessor left out: 136 positions x 576 x 49152 against its count of a pass of the language model."""
    text = scales.language_config("135M")
    added = formulas.linear(136, text.hidden_size, text.vocab_size) / 2
    assert added / predecessor.language_pass(text, 136) == pytest.approx(0.228, abs=0.001)


@pytest.mark.parametrize("scale", list(scales.LANGUAGE_MODELS))
def test_corrections_lead_from_its_count_to_ours(arms, scale):
    for config in arms[scale].values():
        steps = predecessor.corrections(config, OBJECTIVE)
        assert steps[0].flops_per_sample == predecessor.training_sample(config)
        assert steps[1].flops_per_sample == 2 * steps[0].flops_per_sample
        assert steps[-1].flops_per_sample == formulas.training_step(config, predecessor.SAMPLE, OBJECTIVE)
        assert len({step.reason for step in steps}) == len(steps)


def test_corrections_of_the_language_model_by_hand(arms):
    """1.7B has as many key-value heads as heads, and a gated feed-forward of 8192: 3 x 8192 x 2048 in place of
    8 x 2048^2, so 2 x 3 x 256 positions x 24 layers x 2048 x (24576 - 16384) for sixteen tokens a frame."""
    steps = {
        step.reason: step.flops_per_sample for step in predecessor.corrections(arms["1.7B"]["B1_16_tokens"], OBJECTIVE)
    }
    names = list(steps)
    changes = {name: steps[name] - steps[before] for before, name in pairwise(names)}
    assert changes["grouped-query attention"] == 0
    assert changes["gated feed-forward"] == 6 * 256 * 24 * 2048 * 8192
    assert changes["vocabulary projection"] == 6 * 127 * 2048 * 49152


def test_samples_of_a_budget_by_hand(arms):
    config = arms["135M"]["foveated"]
    each = formulas.training_step(config, predecessor.SAMPLE, OBJECTIVE)
    row = iso.budget_samples([10.5 * each], {"135M": {"foveated": config}}, predecessor.SAMPLE, OBJECTIVE)[0]
    assert (row.num_samples, row.flops_per_sample) == (10, each)


def test_the_order_of_the_arms_was_wrong(arms):
    """By its count sixteen tokens are the cheaper arm; counted rightly, one token is, at every size."""
    for entries in arms.values():
        one, sixteen = entries.values()
        assert predecessor.training_sample(one) > predecessor.training_sample(sixteen)
        assert our_count(one) < our_count(sixteen)


def test_one_token_saves_more_with_frames_and_with_the_language_model(arms):
    text, frames = Sample(0, 128, 64, 64), (1, 4, 16, 64)
    found = {scale: iso.frontier(*entries.values(), text, frames, OBJECTIVE) for scale, entries in arms.items()}
    at_most = [curve.foveated[-1] / curve.multi_token[-1] for curve in found.values()]
    assert at_most == sorted(at_most, reverse=True)
    for curve in found.values():
        ratios = [one / many for one, many in zip(curve.foveated, curve.multi_token, strict=True)]
        assert ratios == sorted(ratios, reverse=True)
        assert curve.vision_share == sorted(curve.vision_share)
    assert found["135M"].vision_share[-1] > 0.5 > found["1.7B"].vision_share[0]


def test_cheaper_from_is_to_the_end_of_the_curve():
    assert iso.cheaper_from((1, 2, 4), (1, 3, 1), (2, 2, 2)) == 4
    assert iso.cheaper_from((1, 2, 4), (1, 1, 1), (2, 2, 2)) == 1
    assert iso.cheaper_from((1, 2), (1, 2), (2, 2)) is None


def test_arms_of_an_ordinary_network_have_one_query(parameters):
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


def test_the_calculator_prints_both_counts(monkeypatch, capsys):
    path = str(params.ROOT / "params.yaml")
    monkeypatch.setattr("sys.argv", ["flops", "--params", path, "--budget", "1.6e16", "--scale", "135M"])
    flops.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[2:4]] == ["64,688", "65,523"]


@pytest.mark.parametrize("flags", [["--budget", "0"], ["--budget", "1e16", "--labels", "500"]])
def test_the_calculator_refuses_what_cannot_be(monkeypatch, flags):
    monkeypatch.setattr("sys.argv", ["flops", "--params", str(params.ROOT / "params.yaml"), *flags])
    with pytest.raises(UserError, match="budgets must be positive"):
        flops.main()
