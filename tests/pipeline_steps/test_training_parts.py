"""Learning rates, parameter groups, averages, guards and the files of a state."""

import itertools
import json
import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import distributed

from pipeline_steps.common import files
from pipeline_steps.common.errors import UserError
from pipeline_steps.monitoring.metrics_logger import start_loggers
from pipeline_steps.streaming.loader import plan_stage
from pipeline_steps.training import checkpoint_io, checks, train_loop, validation
from pipeline_steps.training.__main__ import by_task
from pipeline_steps.training.distributed import SINGLE_PROCESS, DistributedContext
from pipeline_steps.training.ema import EMA
from pipeline_steps.training.optimizers import MOMENTUM, Muon, Optimizer
from pipeline_steps.training.parameters import GROUPS, group_of, trainable_parameters
from pipeline_steps.training.schedule import learning_rate
from pipeline_steps.training.schema import MixtureEntry, Stage
from pipeline_steps.training.validation import log_attention_maps, validate
from tests.model.tiny import as_batch, make_batch, make_model, rows_of
from tests.objectives import training_model
from tests.pipeline_steps import packed
from tests.pipeline_steps.test_evaluation import Data
from tests.pipeline_steps.test_golden_losses import make_run

POINTS = SimpleNamespace(patch_size=packed.SIZE // 4)
RATES = {"connector": 3e-3, "vision": 4e-4, "language": 9e-4}


def settings(**options):
    rates = SimpleNamespace(**(RATES | options.pop("rates", {})))
    defaults = {"freeze_vision": False, "freeze_language": False, "schedule": "cosine", "warmup_ratio": 0.1}
    defaults |= {"min_lr_ratio": 0.2, "decay_share": 0.25, "converged_learning_rate": None}
    return SimpleNamespace(learning_rate=rates, **(defaults | options))


def rates_of(schedule, group="connector", peak=1.0, **options):
    return [learning_rate(step, 100, peak, group, settings(schedule=schedule, **options)) for step in range(100)]


def test_cosine_warms_up_and_decays_to_min_lr():
    rates = rates_of("cosine")
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[99] == pytest.approx(0.2)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(0, 1, 2.0, "vision", settings(warmup_ratio=0.0)) == 2.0


def test_constant_schedule_stays_at_peak_after_warm_up():
    assert set(rates_of("constant")[9:]) == {1.0}


def test_wsd_is_constant_and_then_decays_linearly():
    rates = rates_of("wsd")
    assert set(rates[9:75]) == {1.0}
    steps = [before - after for before, after in itertools.pairwise(rates[74:])]
    assert steps == pytest.approx([0.8 / 25] * 25)
    assert rates[99] == pytest.approx(0.2)


def test_a_warm_up_that_overlaps_the_decay_is_refused():
    wsd = packed.stage().model_dump() | {"schedule": "wsd", "warmup_ratio": 0.5, "decay_share": 0.5}
    Stage.model_validate(wsd)
    for changes in ({"decay_share": 0.8}, {"warmup_ratio": 0.6}):
        with pytest.raises(ValidationError, match=r"warmup_ratio 0\.[56] and decay_share 0\.[58] .*wsd overlap"):
            Stage.model_validate(wsd | changes)
    Stage.model_validate(wsd | {"schedule": "cosine", "decay_share": 0.8})


def test_converging_groups_reach_their_final_rate_from_above_and_below():
    end = SimpleNamespace(connector=3e-5, vision=3e-5, language=3e-5)
    options = {"converged_learning_rate": end, "warmup_ratio": 0.0}
    connector = rates_of("converging", "connector", 1e-3, **options)
    vision = rates_of("converging", "vision", 1e-5, **options)
    frozen_at_first = rates_of("converging", "language", 0.0, **options)
    assert (connector[0], vision[0], frozen_at_first[0]) == pytest.approx((1e-3, 1e-5, 0.0))
    assert connector == sorted(connector, reverse=True)
    assert vision == sorted(vision)
    for rates in (connector, vision, frozen_at_first):
        assert rates[99] == pytest.approx(3e-5)
    assert connector[0] / vision[0] == pytest.approx(100)  # 100:1 converges to 1:1


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_is_in_exactly_one_group_and_only_backbones_are_not_connector(optimizer):
    model = make_model(attention="shallow", tie_first_query=False)
    groups, table = trainable_parameters(model, settings(), 0.01, optimizer)
    members = [id(p) for group in groups for p in group["params"]]
    assert sorted(members) == sorted(id(p) for p in model.parameters())
    assert sum(row["trainable"] for row in table) == sum(p.numel() for p in model.parameters())
    for name in ("adamw", "muon"):
        own = sum(p.numel() for group in groups if group["optimizer"] == name for p in group["params"])
        assert sum(row[name] for row in table) == own
    connector = {name.split(".")[0] for name, _ in model.named_parameters() if group_of(name) == "connector"}
    assert connector == {
        "connector", "static_query", "first_query", "query_projection", "planner", "shallow_attention"
    }  # fmt: skip
    assert all(group["weight_decay"] == 0 for group in groups for p in group["params"] if p.ndim < 2)
    assert all(group["weight_decay"] == 0.01 for group in groups for p in group["params"] if p.ndim >= 2)


@pytest.mark.parametrize(
    ("options", "frozen"),
    [({"rates": {group: 0.0}}, {group}) for group in GROUPS]
    + [
        ({"freeze_vision": True}, {"vision"}),
        ({"freeze_language": True}, {"language"}),
        ({"freeze_vision": True, "freeze_language": True}, {"vision", "language"}),
    ],
)
def test_frozen_groups_are_not_trained(options, frozen):
    model = make_model()
    groups, table = trainable_parameters(model, settings(**options), 0.01, "muon")
    assert {group["name"] for group in groups} == set(GROUPS) - frozen
    assert all(p.requires_grad == (group_of(name) not in frozen) for name, p in model.named_parameters())
    assert {row["group"] for row in table if not row["trainable"]} == frozen
    assert {row["group"] for row in table if not row["learning_rate"]} == frozen
    assert all(row["muon"] + row["adamw"] == row["trainable"] for row in table)


def muon_names(model):
    groups, _ = trainable_parameters(model, settings(), 0.01, "muon")
    own = {id(p) for group in groups if group["optimizer"] == "muon" for p in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in own}


def test_muon_trains_matrices_of_linear_layers_only():
    """Table of the parts: what is left to AdamW has no two dimensions or no rows that are summed over."""
    model = make_model(num_visual_tokens_per_frame=2, token_aggregation="weighted", tie_first_query=False)
    names = muon_names(model)
    left = {name for name, parameter in model.named_parameters() if parameter.ndim >= 2} - names
    assert left == {
        "static_query", "first_query", "aggregation_score.weight", "language_model.model.embed_tokens.weight",
        "vision_encoder.embeddings.cls_token", "vision_encoder.embeddings.position_embeddings",
        "vision_encoder.embeddings.patch_embeddings.projection.weight",
    }  # fmt: skip
    assert {"connector.weight", "planner.weight", "query_projection.weight"} <= names
    assert {name.split(".")[0] for name in names} == {
        "connector", "planner", "query_projection", "vision_encoder", "language_model"
    }  # fmt: skip
    assert all(model.get_parameter(name).ndim == 2 for name in names)


def test_muon_excludes_an_untied_output_layer():
    model = make_model()
    head = model.language_model.lm_head
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    assert "language_model.lm_head.weight" in dict(model.named_parameters())
    assert "language_model.lm_head.weight" not in muon_names(model)


def test_a_rate_that_rises_from_zero_does_not_freeze_the_group():
    rising = settings(
        schedule="converging",
        rates={"vision": 0.0},
        converged_learning_rate=SimpleNamespace(connector=1e-3, vision=1e-4, language=1e-4),
    )
    groups, _ = trainable_parameters(make_model(), rising, 0.0, "adamw")
    assert "vision" in {group["name"] for group in groups}


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="nothing to train: every parameter group is frozen or has learning rate 0"):
        trainable_parameters(make_model(), settings(rates=dict.fromkeys(GROUPS, 0.0)), 0.0, "adamw")


# ---------------------------------------------------------------- states


def test_only_the_last_states_are_kept(tmp_path):
    assert checkpoint_io.load_state(tmp_path) is None
    for step in (2, 4, 6):
        tensors = {"model": {"w": torch.full((3,), float(step))}, "optimizer": {"w/step": torch.tensor(float(step))}}
        checkpoint_io.save_state(tmp_path, step, tensors, {"history": [step]}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000006"]
    (tmp_path / ".step-00000008.partial").mkdir()  # a kill during the next write leaves this
    tensors, values = checkpoint_io.load_state(tmp_path)
    assert values["step"] == 6
    assert tensors["model"]["w"].tolist() == [6.0] * 3
    assert tensors["optimizer"]["w/step"].item() == 6.0


def test_tied_weights_are_written_once_and_restored(tmp_path):
    model = make_model()
    checkpoint_io.save_state(tmp_path, 1, {"model": model.state_dict()}, {}, keep=1)
    stored = load_file(tmp_path / "step-00000001" / "model.safetensors")
    assert len(stored) < len(model.state_dict())
    tensors, _ = checkpoint_io.load_state(tmp_path)
    assert tensors["model"].keys() == model.state_dict().keys()
    make_model().load_state_dict(tensors["model"])


def test_a_kill_during_a_deletion_leaves_no_half_of_a_state(tmp_path, monkeypatch):
    def killed(path, ignore_errors=False):
        for file in sorted(path.glob("**/state.json"))[:1]:
            file.unlink()
            raise KeyboardInterrupt

    run = tmp_path / "run"
    tensors = {"model": {"w": torch.ones(1)}}
    checkpoint_io.save_state(run, 1, tensors, {}, keep=1)
    with monkeypatch.context() as patched:
        patched.setattr(files.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint_io.save_state(run, 2, tensors, {}, keep=1)
    assert [path.name for path in run.iterdir() if not path.name.startswith(".")] == ["step-00000002"]
    checkpoint_io.save_state(run, 3, tensors, {}, keep=1)
    assert [path.name for path in run.iterdir()] == ["step-00000003"]
    with monkeypatch.context() as patched:
        patched.setattr(files.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            files.remove_folder(run)
    assert checkpoint_io.load_state(run) is None


def test_a_state_of_another_format_is_rejected(tmp_path):
    checkpoint_io.save_state(tmp_path, 1, {"model": {"w": torch.ones(1)}}, {}, keep=1)
    path = tmp_path / "step-00000001" / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(UserError, match=rf"state format 99, but this version reads {checkpoint_io.FORMAT}\. Delete"):
        checkpoint_io.load_state(tmp_path)


def test_a_damaged_state_is_named_in_the_error(tmp_path):
    checkpoint_io.save_state(tmp_path, 1, {"model": {"w": torch.ones(1)}}, {}, keep=1)
    (tmp_path / "step-00000001" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"step-00000001: cannot be read .* resume from the previous state"):
        checkpoint_io.load_state(tmp_path)


def test_a_failed_write_keeps_the_previous_state(tmp_path, monkeypatch):
    checkpoint_io.save_state(tmp_path, 1, {"model": {"w": torch.ones(1)}}, {}, keep=1)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_io.os, "rename", full)
    with pytest.raises(UserError, match=r"cannot be written .No space left on device"):
        checkpoint_io.save_state(tmp_path, 2, {"model": {"w": torch.zeros(1)}}, {}, keep=1)
    monkeypatch.undo()
    assert checkpoint_io.load_state(tmp_path)[1]["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_the_best_weights_survive_a_kill_between_two_renames(tmp_path):
    checkpoint_io.save_best(tmp_path, {"model": {"w": torch.ones(1)}}, {"step": 3, "loss": 1.0})
    (tmp_path / "best").rename(tmp_path / ".best.old")
    tensors, values = checkpoint_io.load_best(tmp_path)
    assert (tensors["model"]["w"].item(), values["step"]) == (1.0, 3)


def test_the_best_weights_survive_a_second_kill_while_the_next_are_written(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    checkpoint_io.save_best(tmp_path, {"model": {"w": torch.ones(1)}}, {"step": 3, "loss": 1.0})
    (tmp_path / "best").rename(tmp_path / ".best.old")
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_io, "_save_tensors", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint_io.save_best(tmp_path, {"model": {"w": torch.zeros(1)}}, {"step": 4, "loss": 0.9})
    assert checkpoint_io.load_best(tmp_path)[1]["step"] == 3


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_an_optimizer_resumes_from_its_state(tmp_path, name):
    def trained(steps, saved=None):
        model = make_model().train()
        groups, _ = trainable_parameters(model, settings(), 0.01, name)
        optimizer = Optimizer(groups, betas=(0.9, 0.98))
        names = {id(p): name for name, p in model.named_parameters()}
        if saved is not None:
            model.load_state_dict(saved[0]["model"])
            optimizer.restore(saved[0]["optimizer"], names)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"]
        for _ in range(steps):
            optimizer.zero_grad()
            model(**make_batch()).loss.backward()
            optimizer.step()
        return model, optimizer.tensors(names)

    expected, _ = trained(4)
    model, tensors = trained(2)
    kinds = {what for _, _, what in (key.rpartition("/") for key in tensors)}
    assert kinds == {"step", "exp_avg", "exp_avg_sq"} | ({"momentum_buffer"} if name == "muon" else set())
    checkpoint_io.save_state(tmp_path, 2, {"model": model.state_dict(), "optimizer": tensors}, {}, keep=1)
    again, _ = trained(2, checkpoint_io.load_state(tmp_path))
    for (name, one), other in zip(expected.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_muon_updates_are_orthogonal_and_as_large_as_adamws():
    """All singular values of an update are alike, at the root mean square 0.2 of the learning rate."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.nn.Parameter(torch.zeros(64, 16))
    matrix.grad = torch.randn(64, 16, generator=generator) @ torch.randn(16, 16, generator=generator)
    groups = [{"params": [matrix], "weight_decay": 0.0, "optimizer": "muon", "peak": 1e-3, "name": "connector"}]
    optimizer = Optimizer(groups, betas=(0.9, 0.98))
    optimizer.param_groups[0]["lr"] = 1e-3
    optimizer.step()
    spread = torch.linalg.svdvals(matrix.grad)
    assert spread[0] / spread[-1] > 20
    values = torch.linalg.svdvals(matrix.detach())
    assert values[0] / values[-1] < 2  # Newton-Schulz leaves them between about .7 and 1.2
    assert matrix.square().mean().sqrt().item() == pytest.approx(0.2 * 1e-3, rel=0.25)


def test_muon_is_torchs_own_but_iterates_in_fp32_on_the_cpu():
    """Equal to torch's bfloat16 iterations up to their rounding, and to those in double precision."""
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=generator) for shape in ((48, 16), (16, 48), (32, 32))]
    found = []
    for kind in (partial(torch.optim.Muon, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw"), Muon):
        matrices = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
        optimizer = kind([{"params": matrices, "lr": 1.0, "weight_decay": 0.0}])
        for matrix, gradient in zip(matrices, gradients, strict=True):
            matrix.grad = gradient.clone()
        optimizer.step()
        found.append([matrix.detach() for matrix in matrices])
    group = optimizer.param_groups[0]
    for gradient, torchs, own in zip(gradients, *found, strict=True):
        scale = 0.2 * max(gradient.shape) ** 0.5
        torch.testing.assert_close(own / scale, torchs / scale, atol=0.02, rtol=0)
        a, b, c = group["ns_coefficients"]
        exact = gradient.double() / gradient.double().norm()
        for _ in range(group["ns_steps"]):
            gram = exact @ exact.mT
            exact = a * exact + (b * gram + c * gram @ gram) @ exact
        torch.testing.assert_close(own / scale, -exact.float(), atol=1e-5, rtol=0)


# ---------------------------------------------------------------- averages and guards


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


@pytest.mark.parametrize(("fits", "found"), [(32, 32), (31, 16), (5, 4), (1, 1)])
def test_the_micro_batch_is_halved_until_it_fits(fits, found):
    tried = []

    def try_size(size):
        tried.append(size)
        if size > fits:
            raise torch.OutOfMemoryError("out of memory")

    assert checks.find_micro_batch_size(32, try_size) == found
    assert tried == [size for size in (32, 16, 8, 4, 2, 1) if size >= found]


@pytest.fixture
def auto_stage(tmp_path, monkeypatch):
    """A function of how many samples fit and of changes: (run on CUDA with `auto`, list of what is tried on it).

    The plan has the task gist only, in steps of four samples, and its largest item is damaged.
    """
    clips = [packed.Clip(f"world-{n}", num_frames=1 + n % 3, tasks=("gist",)) for n in range(8)]
    clips += [packed.Clip("world-large", num_frames=5, tasks=("gist",))]
    clips += [packed.Clip("world-other", num_frames=8, num_tokens=20, tasks=("card",))]
    dataset = packed.open_split(packed.write(tmp_path, clips, 20))
    with open(tmp_path / "shards/train" / dataset.shards[0].name, "r+b") as tar:
        tar.seek(dataset.rows[8]["frame_offsets"][0])
        tar.write(b"damaged")
    mixture = (MixtureEntry(source="*", task="gist", weight=1.0),)
    section = packed.stage(mixture=mixture, text_share=0.0, num_samples=9)
    sizes = {"batch_size": 4, "tokens_per_frame": 1}
    plan = plan_stage(dataset, section, packed.streaming(), stage="stage2", seed=1, **sizes)

    def make(fits, group=SINGLE_PROCESS):
        def try_micro_batch(run, batch, accumulates):
            tried.append((batch.keys, accumulates))
            if len(batch.keys) > fits:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        tried = []
        monkeypatch.setattr(train_loop, "try_micro_batch", try_micro_batch)
        return SimpleNamespace(
            stage="stage2", common=SimpleNamespace(micro_batch_size="auto"), device="cuda", stage_plan=plan,
            train=dataset, distributed=group, streaming=packed.streaming(),
            model=SimpleNamespace(config=SimpleNamespace(vision_config=POINTS)),
            loader=SimpleNamespace(collate=packed.collator()),
        ), tried  # fmt: skip

    return make


@pytest.mark.parametrize(("fits", "found"), [(4, 4), (3, 2), (1, 1)])
def test_auto_tries_the_largest_readable_items_of_the_stage_and_says_what_fits(auto_stage, fits, found, capsys):
    """Smaller micro-batches than the step's share accumulate gradients."""
    run, tried = auto_stage(fits)
    assert train_loop.choose_micro_batch_size(run) == found
    largest = ["world-2", "world-5", "world-1", "world-4"]
    assert tried == [(largest[:size], size < 4) for size in (4, 2, 1) if size >= found]
    said = capsys.readouterr()
    assert f"stage2: micro-batches of {found} samples fit into the memory of cuda" in said.out + said.err


@pytest.mark.parametrize(("own", "other", "found"), [(2, 1, 1), (1, 2, 1), (2, 2, 2)])
def test_with_several_ranks_auto_takes_what_fits_on_all_of_them(auto_stage, own, other, found, monkeypatch, capsys):
    """Each has half of a step, and one says it."""

    def all_reduce(value, operation=distributed.ReduceOp.SUM):
        assert operation == distributed.ReduceOp.MIN
        value.fill_(min(int(value), other))

    monkeypatch.setattr(distributed, "all_reduce", all_reduce)
    for rank in (0, 1):
        run, tried = auto_stage(own, DistributedContext(rank, world_size=2))
        assert train_loop.choose_micro_batch_size(run) == found
        assert [len(keys) for keys, _ in tried] == [size for size in (2, 1) if size >= own]
    said = capsys.readouterr()
    assert (said.out + said.err).count(f"micro-batches of {found} samples fit") == 1


def test_auto_with_a_sample_that_does_not_fit_says_what_to_change(auto_stage):
    run, tried = auto_stage(0)
    advice = "activation_checkpointing: true or .*precision: bf16, or lower shards.max_frames or tokens.max_tokens"
    with pytest.raises(UserError, match=f"a single sample does not fit into GPU memory .*{advice}"):
        train_loop.choose_micro_batch_size(run)
    assert tried[-1][0] == ["world-2"]


def auto_run(optimizer="adamw", **options):
    """A run as `try_micro_batch` sees it."""
    model = make_model().train()
    groups, _ = trainable_parameters(model, settings(freeze_vision=True), 0.01, optimizer)
    defaults = {"ema_decay": None, "precision": "fp32", "optimizer": optimizer}
    common = SimpleNamespace(**(defaults | options.pop("common", {})))
    run = {"distributed": DistributedContext(), "is_sharded": False, "device": "cpu"} | options
    return SimpleNamespace(
        model=model, training_model=training_model(model), reference=None, common=common, **run
    ), groups


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("decay", [None, 0.9])
def test_reserved_memory_equals_optimizer_state_and_ema(decay, name):
    run, groups = auto_run(name, common={"ema_decay": decay})
    reserved = sum(tensor.nbytes for tensor in train_loop.reserve_state(run))
    optimizer = Optimizer(groups, (0.9, 0.98))
    run.model(**make_batch()).loss.backward()
    optimizer.step()
    held = [value for part in optimizer.parts for state in part.state.values() for value in state.values()]
    held = [value for value in held if value.ndim or value.numel() > 1]  # without counters of steps
    if decay is not None:
        held += EMA(run.model, decay).values.values()
    assert reserved == sum(value.nbytes for value in held)
    parts, _ = auto_run(
        name, common={"ema_decay": decay}, is_sharded=True, distributed=DistributedContext(world_size=2)
    )
    assert sum(tensor.nbytes for tensor in train_loop.reserve_state(parts)) == pytest.approx(reserved / 2, rel=1e-3)


@pytest.mark.parametrize(
    ("accumulates", "options", "there"),
    [
        (True, {}, True),
        (False, {}, False),  # a whole step in one piece: gradients come while activations go
        (False, {"distributed": DistributedContext(world_size=2)}, True),  # buckets
        (False, {"distributed": DistributedContext(world_size=2), "is_sharded": True}, False),
    ],
)
def test_a_micro_batch_is_tried_with_gradient_memory_allocated(accumulates, options, there, monkeypatch):
    run, _ = auto_run(**options)
    trained = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    seen = []
    run.model.register_forward_pre_hook(lambda *_: seen.append({p.grad is not None for p in trained}))
    monkeypatch.setattr(train_loop, "reserve_state", lambda run: seen.append("state") or [])
    train_loop.try_micro_batch(run, as_batch(make_batch()), accumulates)
    assert seen == ["state", {there}]
    assert all(parameter.grad is None for parameter in run.model.parameters())


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
