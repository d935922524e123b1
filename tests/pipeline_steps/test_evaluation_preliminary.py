"""The five preliminary diagnostics: known numbers on arrays and heads, and tiny networks."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from tqdm import tqdm

from pipeline_steps.common.diagnostic_results import NextFrameResult, NextFrameScore, PreliminaryDiagnostics
from pipeline_steps.evaluation import attention_probes, preliminary, scoring, temperature_sweep
from pipeline_steps.evaluation import next_frame as evaluation
from pipeline_steps.evaluation.diagnostics import NO_PLAN, NO_QUERIES, SHORT
from tests.model import tiny
from tests.model.test_frame_step import captured  # noqa: F401 - a fixture
from tests.pipeline_steps.evaluated import clip


def loaded(model):
    """A batch with clips of three and two frames and a still."""
    batch = tiny.as_batch(tiny.rows_of(tiny.make_batch(model.config.tokens_per_frame), [0, 2, 3]))
    return [("made", [clip(key, [0]) for key in "abc"], batch, [None] * 3)]


def collect(model, next_frame=None):
    observed = attention_probes.observe(model, loaded(model), 1, tqdm(disable=True))
    return preliminary.collect(model, observed, temperature_sweep.measure(model, loaded(model)), next_frame)


# ---------------------------------------------------------------- temperature


def test_the_strongest_tenth_of_the_places():
    weights = np.full((1, 1, 1, 1, 20), 0.01)
    weights[..., [3, 7]] = 0.5, 0.32
    assert temperature_sweep.top_share(weights) == pytest.approx(0.82)
    assert temperature_sweep.top_share(weights[..., :17]) == pytest.approx(0.82)  # two of 17


def test_batches_weigh_by_tokens_and_frames():
    sums = np.array([3.0, 2, 4, 0.5, 1.0, 2.0, 2]) + np.array([1.0, 1, 4, 1.0, 1.0, 2.0, 2])
    found = temperature_sweep.score(0.5, sums)
    assert (found.loss, found.accuracy) == (0.5, 0.375)
    assert (found.entropy, found.peak, found.top_tenth) == (0.375, 0.5, 1.0)


@pytest.mark.parametrize("options", [{}, {"learnable_temperature": True}, {"attention": "shallow"}], ids=str)
def test_a_scaled_temperature_is_that_of_a_network_made_with_it(options):
    """Equal weights, half the temperature: by the sweep and by the configuration."""
    model = tiny.make_model(attention_temperature=0.2, **options)
    other = tiny.make_model(attention_temperature=0.1, **options)
    weights = {name: value for name, value in model.state_dict().items() if name != "log_temperature"}
    other.load_state_dict(weights, strict=False)
    ((_, _, batch, _),) = loaded(model)
    plain = scoring.forward(model, batch, "autoregressive").token_loss
    with temperature_sweep.scaled_temperature(model, 0.5):
        half = scoring.forward(model, batch, "autoregressive").token_loss
    torch.testing.assert_close(half, scoring.forward(other, batch, "autoregressive").token_loss)
    assert not torch.allclose(half, plain, atol=1e-6)
    with pytest.raises(RuntimeError), temperature_sweep.scaled_temperature(model, 0.5):
        raise RuntimeError
    assert torch.equal(scoring.forward(model, batch, "autoregressive").token_loss, plain)


def test_the_sweep_of_a_network():
    model = tiny.make_model(attention_temperature=0.1)
    found = temperature_sweep.measure(model, loaded(model))
    assert [score.factor for score in found] == list(temperature_sweep.FACTORS)
    ((_, _, batch, _),) = loaded(model)
    output = scoring.forward(model, batch, "autoregressive")
    scored = batch.score_mask
    trained = next(score for score in found if score.factor == 1)
    assert trained.loss == pytest.approx(output.token_loss[scored].mean().item(), rel=1e-5)
    assert trained.accuracy == pytest.approx(output.correct[scored].double().mean().item())
    assert found[0].entropy < trained.entropy < found[-1].entropy
    assert found[0].peak > trained.peak > found[-1].peak
    assert all(score.top_tenth >= score.peak for score in found)


@pytest.mark.parametrize("options", [{}, {"learnable_temperature": True}], ids=str)
def test_a_sweep_captures_no_step_per_temperature(options, captured):  # noqa: F811
    """Of the trained temperature 1: that step, which other passes use, and one for all others."""
    model = tiny.make_model(**options)
    found = temperature_sweep.measure(model, 2 * loaded(model))
    assert len(captured) == (1 if options else 2)
    assert len({score.entropy for score in found}) == len(temperature_sweep.FACTORS)


def test_no_clips_or_queries_have_no_sweep():
    assert temperature_sweep.measure(tiny.make_model(), []) == []
    ordinary = tiny.make_model(architecture="multi_token", num_visual_tokens_per_frame=4)
    assert temperature_sweep.measure(ordinary, loaded(ordinary)) == []


# ---------------------------------------------------------------- tokens and queries


def seen(**modes):
    """`ProbeResults` of a clip of two frames and one of one; modes: tokens (which are the queries too) by name."""
    probes = {
        name: SimpleNamespace(tokens=np.array(values, float), queries=np.array(values, float))
        for name, values in modes.items()
    }
    return attention_probes.ProbeResults(probes, [2, 1], 5, None)


def test_similarity_is_of_frames_with_a_planned_query():
    observed = seen(
        coarse=[[9, 9], [1, 0], [9, 9]], fine=[[1, 0], [3, 0], [0, 1]], random_query=[[1, 0], [0, 1], [0, 1]]
    )
    config = SimpleNamespace(architecture="foveated", coarse_only=False)
    found = preliminary.feature_similarity(config, observed)
    assert found == pytest.approx(
        {
            "cosine static / planned": 1,
            "distance static / planned": 2 / 2,
            "cosine static / random": 0,
            "distance static / random": 2**0.5,
        }
    )
    config.coarse_only = True
    assert list(preliminary.feature_similarity(config, observed)) == [
        "cosine static / random",
        "distance static / random",
    ]
    stills = attention_probes.ProbeResults(observed.modes, [1, 1, 1], 5, None)
    assert preliminary.feature_similarity(config, stills) == SHORT


def test_a_projection_can_make_queries_alike():
    config = SimpleNamespace(architecture="foveated", coarse_only=False, query_dim=2)
    projection = nn.Linear(2, 2, bias=False)
    projection.weight.data = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    observed = seen(coarse=[[9, 9], [1, 0], [9, 9]], fine=[[1, 0], [1, 1], [0, 1]])
    found = preliminary.query_projection(SimpleNamespace(config=config, query_projection=projection), observed)
    assert found == pytest.approx({"before": 0.5**0.5, "after": 1})


# ---------------------------------------------------------------- next-frame head


def heads(weight_state, weight_previous):
    """A head that adds its inputs."""

    def predict(name, state, queries, previous, grid):
        return (weight_state * state + weight_previous * previous.flatten(1)).reshape(-1, 1, *grid)

    predict.takes_previous = True
    return SimpleNamespace(heads=predict)


@pytest.mark.parametrize(("weights", "expected"), [((2, 0), (1, 0)), ((0, 3), (0, 1)), ((1, 1), (0.5, 0.5))])
def test_sensitivity_of_known_heads(weights, expected):
    values = torch.tensor([[1.0, 2, 3, 4], [-1, 0, 2, 5]])
    previous = values.reshape(-1, 1, 2, 2)
    targets = SimpleNamespace(previous=previous, expected=torch.zeros(2, 1, 2, 2), grid=(2, 2))
    found = evaluation.sensitivities(heads(*weights), "fine", values, None, targets)
    assert found["state_sensitivity"].tolist() == pytest.approx([expected[0]] * 2, abs=1e-5)
    assert found["previous_sensitivity"].tolist() == pytest.approx([expected[1]] * 2, abs=1e-5)
    assert found["no_state"].tolist() == pytest.approx([weights[1] ** 2 * 30 / 4, weights[1] ** 2 * 30 / 4])


def next_frame(**changes):
    losses = {"coarse": 3.0, "fine_1": 2.0, "no_previous": 5.0, "shuffled_state": 4.0}
    fields = {"loss": losses, "no_state": 6.0, "state_sensitivity": 0.5, "previous_sensitivity": 0.1} | changes
    videos = NextFrameScore(**fields, per_frame={}, num_clips=1, num_pairs=1)
    still = videos.model_copy(update={"loss": {"coarse": 9.0}})
    return NextFrameResult(settings={}, groups={"image": still, "videos": videos}, passes={})


def test_the_head_is_that_of_the_planned_pass_of_clips():
    found = collect(tiny.make_model(), next_frame())
    assert found.previous_latent == {"loss": 2.0, "no_previous": 5.0, "no_state": 6.0, "shuffled_state": 4.0}
    assert found.head_sensitivity == {"state": 0.5, "previous": 0.1}
    assert found.not_measured == {}
    assert PreliminaryDiagnostics.model_validate(found.model_dump()) == found
    without = collect(tiny.make_model(coarse_only=True), next_frame(loss={"coarse": 3.0}, previous_sensitivity=None))
    assert without.previous_latent == {"loss": 3.0, "no_state": 6.0}
    assert without.head_sensitivity == {"state": 0.5}


def test_the_head_is_not_measured_on_stills():
    stills = next_frame()
    del stills.groups["videos"]
    found = collect(tiny.make_model(), stills)
    assert found.previous_latent is found.head_sensitivity is None
    assert set(found.not_measured.values()) == {preliminary.NO_VIDEOS}


def test_what_was_not_measured_has_a_reason():
    found = collect(tiny.make_model())
    not_trained = dict.fromkeys(("previous_latent", "head_sensitivity"), preliminary.NOT_TRAINED)
    assert found.not_measured == not_trained
    assert found.previous_latent is found.head_sensitivity is None
    assert -1 <= found.query_projection["after"] <= 1
    assert (found.num_items, len(found.temperature)) == (3, len(temperature_sweep.FACTORS))
    coarse = collect(tiny.make_model(coarse_only=True))
    assert coarse.not_measured == not_trained | {"query_projection": NO_PLAN}
    ordinary = collect(tiny.make_model(architecture="multi_token", num_visual_tokens_per_frame=4))
    assert ordinary.temperature == []
    assert ordinary.not_measured == not_trained | dict.fromkeys(
        ("feature_similarity", "temperature", "query_projection"), NO_QUERIES
    )
    assert preliminary.collect(tiny.make_model(), None, [], None) is None


@pytest.mark.parametrize(
    "options",
    [
        {"num_visual_tokens_per_frame": 4},
        {"hard_attention": "gumbel"},
        {"query_source": "random"},
        {"num_passes": 2, "query_update": "add", "layout": "vision_first"},
    ],
    ids=str,
)
def test_every_kind_of_network_has_them(options):
    assert set(collect(tiny.make_model(**options)).not_measured) == {"previous_latent", "head_sensitivity"}
