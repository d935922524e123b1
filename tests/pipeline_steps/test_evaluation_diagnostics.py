"""Automated checks: known numbers on arrays, and networks that are broken in one known way each."""

import types

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from tqdm import tqdm

from pipeline_steps.common.diagnostic_results import Diagnostics
from pipeline_steps.evaluation import attention_probes, diagnostics, subset_evals
from tests.model import tiny
from tests.pipeline_steps.evaluated import clip

CONTROLS_MISSING = pd.DataFrame({"task": ["x"], "mode": ["coarse"], "key": ["a"], "item": [0]}).assign(
    num_tokens=1, loss_sum=1.0
)


def observe(model):
    """Two clips of three and two frames and a still."""
    batch = tiny.as_batch(tiny.rows_of(tiny.make_batch(model.config.tokens_per_frame), [0, 2, 3]))
    items = [clip(key, [0]) for key in "abc"]
    return attention_probes.observe(model, [("made", items, batch, [None] * 3)], 1, tqdm(disable=True))


def diagnose(model, table=CONTROLS_MISSING, rows=()):
    return diagnostics.diagnose(model, observe(model), table, rows)


def verdicts(model):
    return {name: check.verdict for name, check in diagnose(model).checks.items()}


# ---------------------------------------------------------------- arrays


def test_even_attention_has_the_greatest_entropy():
    entropy, peak, focus = attention_probes.sharpness(np.full((2, 3, 4, 1, 17), 1 / 17))
    assert entropy == pytest.approx(np.ones((2, 4)))
    assert peak == pytest.approx(np.full((2, 4), 1 / 17))
    assert focus == pytest.approx(1.0)


def test_sharp_attention_of_one_head():
    weights = np.full((1, 2, 2, 1, 17), 1 / 17)
    weights[:, :, 1] = 0
    weights[:, :, 1, :, 5] = 1
    entropy, peak, focus = attention_probes.sharpness(weights)
    assert entropy[0] == pytest.approx([1, 0], abs=1e-9)
    assert peak[0] == pytest.approx([1 / 17, 1])
    mean = (1 + 16 / 17) / 16
    assert focus == pytest.approx((1 + 1 / 17) / mean)


def test_relative_standard_deviation_of_queries():
    assert diagnostics.relative_std(np.tile([[1.0, 2.0]], (5, 1))) == 0
    assert diagnostics.relative_std(np.array([[3.0, 0.0], [-3.0, 0.0]])) == pytest.approx(1.0)
    assert diagnostics.relative_std(np.array([[5.0], [3.0]])) == pytest.approx(1 / 17**0.5)


def test_similarity_follows_the_frames_of_a_clip():
    queries = np.array([[9.0, 9.0], [1.0, 0.0], [0.0, 1.0], [9.0, 9.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    planned = np.array([False, True, True, False, True, True, True])
    assert diagnostics.similarity_in_order(queries, planned) == pytest.approx((0 + 1 + 1) / 3)
    assert diagnostics.similarity_in_order(queries[:2], planned[:2]) == diagnostics.SHORT


def test_similarity_within_clips_ignores_other_clips():
    tokens = np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 0.0], [3.0, 0.0]])
    assert diagnostics.similarity_within(tokens, np.array([0, 0, 1, 1])) == pytest.approx((0 + 1) / 2)
    assert isinstance(diagnostics.similarity_within(tokens, np.arange(4)), str)


def test_correlation_does_not_see_level_and_scale():
    a = np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1.0, 0.0, -1.0]])
    b = np.array([[15.0, 25.0, 35.0], [3.0, 2.0, 1.0], [1.0, -2.0, 1.0]])
    assert diagnostics.correlation(a, b) == pytest.approx([1, -1, 0])


@pytest.mark.parametrize(("weight", "bias", "expected"), [(1.0, 0.0, 1.0), (3.0, 0.0, 1.0), (0.0, 1.0, 0.0)])
def test_sensitivity_of_a_known_planner(weight, bias, expected):
    planner = nn.Linear(8, 8)
    nn.init.eye_(planner.weight).data.mul_(weight)
    nn.init.constant_(planner.bias, bias)
    hidden = torch.randn(5, 1, 8, generator=torch.Generator().manual_seed(0))
    found = attention_probes.sensitivity(planner, hidden, torch.Generator().manual_seed(1))
    assert found == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("value", "verdict"), [(2.9, "suspicious"), (3.0, "ok"), (5.0, "ok"), (5.1, "suspicious"), ("why", None)]
)
def test_bounds(value, verdict):
    check = diagnostics.check(diagnostics.Rule("what", 3.0, 5.0, "broken"), value)
    assert check.verdict == (verdict or "not applicable")
    assert (check.value, check.reason) == ((None, "why") if verdict is None else (value, "broken"))


def test_collapse_takes_the_last_row_that_training_wrote():
    rows = [{"token_similarity": "0.5"}, {"token_similarity": "0.99"}, {"token_similarity": ""}, {}]
    assert diagnostics.collapse(rows) == 0.99
    assert diagnostics.collapse([{"loss": "1"}]) == "the training metrics have no diagnostics rows"
    assert diagnose(tiny.make_model(), rows=rows).checks["collapse_in_training"].verdict == "suspicious"


def test_paths_that_disagree_are_found():
    rows = [("a", "coarse", 2.0), ("a", "static_query", 2.0001), ("b", "coarse", 1.0), ("b", "static_query", 1.5)]
    table = pd.DataFrame(rows, columns=["key", "mode", "loss_sum"]).assign(task="made", item=0, num_tokens=2)
    config = tiny.make_model().config
    assert diagnostics.path_agreement(config, table) == pytest.approx(0.25)
    assert diagnostics.path_agreement(config, table[:2]) == pytest.approx(0.00005)
    assert diagnostics.path_agreement(config, CONTROLS_MISSING) == "the controls were not measured"
    fovea = tiny.make_model(frame_downsampling=2, fovea_size=2).config
    assert "the coarse pass has no window" in diagnostics.path_agreement(fovea, table)


# ---------------------------------------------------------------- networks


def test_a_sound_network_fails_no_check_that_its_weights_can_pass():
    found = verdicts(tiny.make_model())
    assert set(found) == set(diagnostics.RULES)
    assert {name for name, verdict in found.items() if verdict == "not applicable"} == {
        "collapse_in_training",
        "path_agreement",
    }
    untrained = {"attention_entropy", "max_attention", "focus_ratio"}  # random keys prefer nothing
    assert {name for name, verdict in found.items() if verdict == "suspicious"} <= untrained


def fix_plan(model):
    model.planner.weight.data.zero_()
    model.planner.bias.data.fill_(1.0)


def ignore_queries(model):
    model.query_projection.weight.data.zero_()


def drown_queries(model):
    model.query_projection.bias.data.normal_(std=1000, generator=torch.Generator().manual_seed(0))


def collapse_tokens(model):
    model.connector.weight.data.zero_()
    model.connector.bias.data.normal_(generator=torch.Generator().manual_seed(0))


def even_attention(model):
    for layer in model.vision_encoder.encoder.layer:
        layer.attention.attention.query.weight.data.zero_()
        layer.attention.attention.query.bias.data.zero_()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (fix_plan, {"query_spread", "query_similarity", "plan_sensitivity"}),
        (ignore_queries, {"output_correlation", "fine_coarse_cosine"}),
        (drown_queries, {"projection_bias", "output_correlation"}),
        (collapse_tokens, {"token_similarity", "output_correlation", "fine_coarse_cosine"}),
        (even_attention, {"attention_entropy", "max_attention", "focus_ratio"}),
    ],
)
def test_each_damage_is_found(damage, expected):
    model = tiny.make_model(query_bias=True)
    before = verdicts(model)
    damage(model)
    found = verdicts(model)
    assert expected <= {name for name, verdict in found.items() if verdict == "suspicious"}
    if damage is not even_attention:  # which random weights have as well
        assert all(before[name] == "ok" for name in expected)


def test_a_projection_without_bias_has_no_share():
    assert diagnose(tiny.make_model()).checks["projection_bias"].value == 0


def test_sharp_attention_passes():
    model = tiny.make_model(attention_temperature=0.02)
    found = verdicts(model)
    assert {found[name] for name in ("attention_entropy", "max_attention", "focus_ratio")} == {"ok"}


def test_networks_without_plans_or_queries():
    coarse = diagnose(tiny.make_model(coarse_only=True)).checks
    assert coarse["query_spread"].reason == coarse["plan_sensitivity"].reason == diagnostics.NO_PLAN
    assert coarse["attention_entropy"].value is not None
    ordinary = diagnose(tiny.make_model(architecture="multi_token", num_visual_tokens_per_frame=4))
    assert {name for name, check in ordinary.checks.items() if check.value is not None} == {"token_similarity"}
    assert ordinary.checks["attention_entropy"].reason == diagnostics.NO_QUERIES
    assert ordinary.entropy == {}


@pytest.mark.parametrize(
    "options",
    [
        {"attention": "shallow"},
        {"num_visual_tokens_per_frame": 4},
        {"num_visual_tokens_per_frame": 4, "token_aggregation": "weighted"},
        {"hard_attention": "gumbel"},
        {"query_source": "random"},
        {"blind": True},
        {"num_passes": 2, "query_update": "add", "layout": "vision_first"},
    ],
    ids=str,
)
def test_every_kind_of_network_has_all_checks(options):
    checks = diagnose(tiny.make_model(**options)).checks
    assert {name for name, check in checks.items() if check.value is None} == {"collapse_in_training", "path_agreement"}


def test_failed_checks_are_printed_with_their_bound(capsys):
    model = tiny.make_model(query_bias=True)
    fix_plan(model)
    drown_queries(model)
    subset_evals.print_checks(types.SimpleNamespace(diagnostics=diagnose(model)))
    lines = capsys.readouterr().out
    assert "suspicious: query_spread" in lines
    assert "is below 0.05: every frame of every clip gets nearly the same query" in lines
    assert "is above 0.35: the bias dominates, so that all queries are nearly the same" in lines
    assert "path_agreement" not in lines  # does not apply
    subset_evals.print_checks(types.SimpleNamespace(diagnostics=None))
    assert capsys.readouterr().out == ""


def test_tables_of_layers_and_heads():
    result = diagnose(tiny.make_model())
    assert set(result.entropy) == {"coarse", "fine", "autoregressive", "random_query"}
    assert np.shape(result.entropy["fine"]) == np.shape(result.peak["fine"]) == (2, 4)  # layers, heads
    assert (result.num_items, result.num_frames) == (3, 6)
    assert Diagnostics.model_validate(result.model_dump()) == result


def test_no_clips_no_diagnostics():
    nothing = attention_probes.observe(tiny.make_model(), [], 1, tqdm(disable=True))
    assert diagnostics.diagnose(tiny.make_model(), nothing, CONTROLS_MISSING, []) is None
