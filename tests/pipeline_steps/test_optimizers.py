"""Learning-rate schedules and groups, and the optimizers."""

import itertools
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError

from pipeline_steps.training import checkpoint_io
from pipeline_steps.training.optimizers import MOMENTUM, Muon, Optimizer
from pipeline_steps.training.parameters import GROUPS, group_of, trainable_parameters
from pipeline_steps.training.schedule import learning_rate
from pipeline_steps.training.schema import Stage
from tests.model.tiny import make_batch, make_model
from tests.pipeline_steps import packed
from tests.pipeline_steps.training_runs import settings


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
