"""Parts of training: averages, guards, warnings, scores, live curves."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline_steps.common.errors import UserError
from pipeline_steps.monitoring.metrics_logger import start_loggers
from pipeline_steps.training import checks, train_loop, validation
from pipeline_steps.training.__main__ import by_task
from pipeline_steps.training.ema import EMA
from pipeline_steps.training.validation import log_attention_maps, validate
from tests.model.tiny import as_batch, make_batch, make_model, rows_of
from tests.pipeline_steps.test_evaluation import Data
from tests.pipeline_steps.test_golden_losses import make_run


def test_ema_is_exponential_and_swaps_back():
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0.0)
    ema = EMA(model, decay=0.9)
    for value in (1.0, 2.0):
        model.weight.data.fill_(value)
        ema.update()
    assert ema.values["weight"].item() == pytest.approx(0.9 * (0.9 * 0 + 0.1 * 1) + 0.1 * 2)
    with ema.in_place():
        assert model.weight.item() == pytest.approx(0.29)
    assert model.weight.item() == 2.0


def test_a_skipped_step_moves_neither_weights_nor_average(tmp_path):
    """The average lags behind the weights, so an update without the guard would move it."""
    run = make_run("stage2", "question_first", tmp_path, "adamw")
    run.common.ema_decay = 0.9
    state, batch = train_loop.prepare(run), as_batch(make_batch())
    train_loop.launch_step(run, state, batch, 1)
    assert any(not torch.equal(state.ema.values[name], p) for name, p in state.ema.parameters.items())

    def values() -> list[torch.Tensor]:
        own = state.optimizer.tensors(state.names)
        return [v.clone() for v in (*state.ema.values.values(), *run.model.state_dict().values(), *own.values())]

    before = values()
    broken = replace(batch, pixel_values=torch.full_like(batch.pixel_values, math.nan))
    launched = train_loop.launch_step(run, state, broken, 2)
    assert not math.isfinite(launched.values[launched.names.index("loss")])
    assert all(map(torch.equal, values(), before))
    train_loop.launch_step(run, state, batch, 3)
    assert not all(map(torch.equal, values()[: len(state.ema.values)], before))


def test_a_non_finite_loss_stops_the_run_and_saves_the_batch(tmp_path):
    batch = as_batch(make_batch())
    checks.check_finite("stage2", 7, 1.0, 2.0, batch, tmp_path)
    with pytest.raises(UserError, match=r"stage2 step 7: loss nan, gradient norm 1\.0 on samples a, b, c, d"):
        checks.check_finite("stage2", 7, math.nan, 1.0, batch, tmp_path)
    kept = load_file(tmp_path / "non_finite-00000007-rank0.safetensors")
    assert torch.equal(kept["pixel_values"], batch.pixel_values)
    other = as_batch(rows_of(make_batch(), [0, 2]))
    with pytest.raises(UserError, match=r"on samples a, b \(rank 1\)\. The weights were not updated"):
        checks.check_finite("stage2", 7, math.nan, 1.0, other, tmp_path, rank=1)
    for rank, keys in enumerate((list("abcd"), ["a", "b"])):  # no rank overwrites another one's
        assert json.loads((tmp_path / f"non_finite-00000007-rank{rank}.json").read_text())["keys"] == keys


@pytest.mark.parametrize("options", [{"query_source": "random"}, {"query_source": "fixed"}])
def test_random_queries_in_validation_are_a_function_of_the_step_number(tmp_path, options):
    """Whatever was drawn before, as by attention maps or before a restart."""
    run = make_run("stage2", "question_first", tmp_path, **options)
    run.validation, run.streaming = Data(), SimpleNamespace(image_replication=1)
    run.common.max_validation_items, run.runtime.num_heatmap_clips = 10, 2
    drawn = []
    run.logger.pictures = lambda step, items, maps: drawn.append(maps)
    found = []
    for number in range(2):
        torch.rand(number + 3)
        found.append(validate(run, 5, ("fine", "autoregressive")))
        log_attention_maps(run, 5)
    assert found[0] == found[1]
    assert np.array_equal(*drawn)
    assert found[0] != [row | {"step": 5} for row in validate(run, 6, ("fine", "autoregressive"))]


def test_attention_to_the_class_token_only_is_a_black_map(tmp_path, monkeypatch):
    run = make_run("stage2", "question_first", tmp_path)
    run.validation, run.runtime.num_heatmap_clips, drawn = Data(), 1, []
    run.logger.pictures = lambda step, items, maps: drawn.append(maps)
    weights = torch.zeros(1, 2, 4, 1, 17)
    weights[..., 0] = 1
    monkeypatch.setattr(validation, "infer", lambda *_, **__: SimpleNamespace(attention_weights=weights))
    log_attention_maps(run, 5)
    assert np.array_equal(drawn, np.zeros((1, 2, 16)))


LEARNING, STUCK = [3.0, 2.0, 1.5, 1.2, 1.0], [3.0, 1.7, 1.7, 1.69, 1.7]
SELECTIVE = {"attention_uniformity": 0.6, "coarse_similarity": 0.3}


@pytest.mark.parametrize(
    ("losses", "accuracy", "diagnostics", "named"),
    [
        (LEARNING, 0.5, SELECTIVE, None),
        (STUCK, 0.35, SELECTIVE | {"attention_uniformity": 0.99}, "uniform attention"),
        (STUCK, 0.35, SELECTIVE | {"coarse_similarity": 0.99}, "coarse = fine"),
        (STUCK, 0.35, SELECTIVE, "multiset plateau"),
        (STUCK, 0.97, SELECTIVE, None),  # learned: a flat end is no failure
        (STUCK[:3], 0.35, SELECTIVE, None),  # too early to say
    ],
)
def test_a_plateau_warning_names_its_cause(losses, accuracy, diagnostics, named):
    found = checks.plateau(losses, [accuracy] * len(losses), diagnostics, validations=3, progress=0.02)
    assert (found is None) if named is None else (named in found)


def test_unselective_attention_is_measured_as_uniform():
    batch = make_batch()
    inputs = {name: batch[name] for name in batch if name != "labels"}
    found = {}
    for name, options in (("as built", {}), ("flat", {"attention_temperature": 1e6})):
        model = make_model(query_init_std=30.0, **options)
        fine, coarse = (model(**inputs, mode=mode, options={"output_attentions": True}) for mode in ("fine", "coarse"))
        found[name] = checks.attention_diagnostics(fine, coarse, batch["num_frames"])
        same = checks.attention_diagnostics(coarse, coarse, batch["num_frames"])
        assert same["coarse_similarity"] == pytest.approx(1.0)
    assert found["flat"]["attention_uniformity"] == pytest.approx(1.0, abs=1e-4)
    assert found["as built"]["attention_uniformity"] < 0.95
    assert found["flat"]["attention_entropy"] == pytest.approx(math.log(17), abs=1e-3)
    assert -1 <= found["as built"]["token_similarity"] <= 1


def test_repeated_items_cause_a_warning():
    mixture = {"card": {"epochs": 3.0}, "gist": {"epochs": 12.5}}
    assert checks.repeat_warnings("stage1", mixture, 20.0) == []
    (line,) = checks.repeat_warnings("stage1", mixture, 10.0)
    assert "12.5 epochs of 'gist'" in line


def test_scores_of_a_task_are_token_weighted_over_its_sources():
    row = {"event": "validation", "task": "caption", "mode": "fine"}
    rows = [
        row | {"source": "a", "tokens": 1, "loss": 1.0, "accuracy": 0.0},
        row | {"source": "b", "tokens": 3, "loss": 2.0, "accuracy": 1.0},
        {"event": "diagnostics", "attention_entropy": 1.0},
    ]
    assert by_task(rows) == {"caption": {"fine": {"loss": 1.75, "accuracy": 0.75}}}


@pytest.mark.parametrize("left", ["", '{"loss": 2.0, "ste'])
def test_live_curves_resume_after_dvclives_file_was_truncated(tmp_path, left):
    chosen = SimpleNamespace(tensorboard=False, dvclive=True, wandb_project=None)
    (tmp_path / "dvclive").mkdir()
    (tmp_path / "dvclive/metrics.json").write_text(left)
    (logger,) = start_loggers(chosen, "stage1", tmp_path)
    logger.scalars({"loss": 1.5}, 7)
    logger.close()
    assert json.loads((tmp_path / "dvclive/metrics.json").read_text()) == {"loss": 1.5, "step": 7}


def test_live_curves_resume_from_intact_values(tmp_path):
    chosen = SimpleNamespace(tensorboard=False, dvclive=True, wandb_project=None)
    (tmp_path / "dvclive").mkdir()
    (tmp_path / "dvclive/metrics.json").write_text('{"validation_loss": 2.0, "step": 6}')
    (logger,) = start_loggers(chosen, "stage1", tmp_path)
    logger.scalars({"loss": 1.5}, 7)
    logger.close()
    found = json.loads((tmp_path / "dvclive/metrics.json").read_text())
    assert found == {"validation_loss": 2.0, "loss": 1.5, "step": 7}
