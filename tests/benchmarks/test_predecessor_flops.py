"""The earlier code base's FLOP count, with numbers counted by hand or published."""

from itertools import pairwise

import pytest

from benchmarks import predecessor_flops
from pipeline_steps.common import flop_formulas as formulas
from pipeline_steps.common import params
from pipeline_steps.flops import __main__ as flops
from pipeline_steps.flops import iso, scales
from tests.objectives import section

OBJECTIVE = section(second_pass_probability=0.5)


def our_count(config):
    return formulas.training_step(config, iso.BUDGET_SAMPLE, OBJECTIVE)


@pytest.fixture(scope="module")
def arms():
    parameters = params.read(params.ROOT / "params.yaml", *flops.PARAMS)
    return flops.scaled_arms(list(scales.LANGUAGE_MODELS), parameters)


def test_published_plan_is_reproduced_exactly(arms):
    for budget, entries in predecessor_flops.PLANNED.items():
        for scale, expected in entries.items():
            assert tuple(predecessor_flops.num_samples(config, budget) for config in arms[scale].values()) == expected


def test_forward_count_by_hand(arms):
    """135M: encoder 8 x 12 x (12 x 257 x 384^2 + 2 x 257^2 x 384) = 48526073856; queries 2 x 8 x 12 x (4 x 384^2 +
    2 x 257 x 384) = 151142400; projection 2 x 8 x 384 x 576 = 3538944; language model 2 x 30 x (12 x 136 x 576^2 +
    2 x 136^2 x 576) = 33765949440."""
    expected = 48526073856 + 151142400 + 3538944 + 33765949440
    assert predecessor_flops.forward(arms["135M"]["foveated"]) == expected


def test_vocabulary_projection_adds_a_fifth_to_the_smallest_model():
    """The earlier count leaves out 136 positions x 576 x 49152, 23 % of its language-model pass."""
    text = scales.language_config("135M")
    added = formulas.linear(136, text.hidden_size, text.vocab_size) / 2
    assert added / predecessor_flops.language_pass(text, 136) == pytest.approx(0.228, abs=0.001)


@pytest.mark.parametrize("scale", list(scales.LANGUAGE_MODELS))
def test_corrections_lead_to_our_count(arms, scale):
    for config in arms[scale].values():
        steps = predecessor_flops.corrections(config, OBJECTIVE)
        assert steps[0].flops_per_sample == predecessor_flops.training_sample(config)
        assert steps[1].flops_per_sample == 2 * steps[0].flops_per_sample
        assert steps[-1].flops_per_sample == formulas.training_step(config, iso.BUDGET_SAMPLE, OBJECTIVE)
        assert len({step.reason for step in steps}) == len(steps)


def test_corrections_of_the_language_model_by_hand(arms):
    """1.7B has as many key-value heads as heads, and a gated feed-forward of 8192: 3 x 8192 x 2048 in place of
    8 x 2048^2, so 2 x 3 x 256 positions x 24 layers x 2048 x (24576 - 16384) for sixteen tokens a frame."""
    steps = {
        step.reason: step.flops_per_sample
        for step in predecessor_flops.corrections(arms["1.7B"]["B1_16_tokens"], OBJECTIVE)
    }
    names = list(steps)
    changes = {name: steps[name] - steps[before] for before, name in pairwise(names)}
    assert changes["grouped-query attention"] == 0
    assert changes["gated feed-forward"] == 6 * 256 * 24 * 2048 * 8192
    assert changes["vocabulary projection"] == 6 * 127 * 2048 * 49152


def test_earlier_count_orders_the_arms_wrongly(arms):
    """Sixteen tokens are cheaper by the earlier count; one token is cheaper by ours, at every size."""
    for entries in arms.values():
        one, sixteen = entries.values()
        assert predecessor_flops.training_sample(one) > predecessor_flops.training_sample(sixteen)
        assert our_count(one) < our_count(sixteen)


def test_command_prints_both_counts_and_the_corrections(monkeypatch, capsys):
    path = str(params.ROOT / "params.yaml")
    monkeypatch.setattr("sys.argv", ["predecessor_flops", "--params", path, "--scale", "135M"])
    predecessor_flops.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[3:] for line in lines[2:4]] == [["40,554", "64,688", "0.63"], ["32,559", "65,523", "0.50"]]
    start = lines.index("135M foveated, GFLOP per training sample")
    rows = [float(line.split()[-1]) for line in lines[start + 1 :][: lines[start:].index("") - 1]]
    assert (rows[0], rows[-1]) == (247.3, 394.5)
    assert sum(rows[:-1]) == pytest.approx(rows[-1], abs=0.5)
