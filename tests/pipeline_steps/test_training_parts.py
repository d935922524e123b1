"""Learning-rate schedule, parameter groups and the state file."""

from types import SimpleNamespace

import pytest
import torch

from pipeline_steps.params import UserError
from pipeline_steps.training.__main__ import choose_device
from pipeline_steps.training.engine import Run, train_step
from pipeline_steps.training.parameters import GROUPS, group_of, trainable_parameters
from pipeline_steps.training.schedule import learning_rate_factor
from pipeline_steps.training.state import load_state, save_state
from tests.model.tiny import make_batch, make_model

RATES = {"connector": 3e-3, "vision": 4e-4, "language": 9e-4}


def test_schedule_warms_up_and_ends_at_the_floor():
    factors = [learning_rate_factor(step, 100, 0.1, 0.2) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == 1.0
    assert factors[99] == pytest.approx(0.2)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert learning_rate_factor(0, 1, 0.0, 0.1) == 1.0


def test_every_parameter_is_in_exactly_one_group_and_only_backbones_are_not_connector():
    model = make_model(attention="shallow", tie_first_query=False)
    groups, table = trainable_parameters(model, RATES, weight_decay=0.01)
    members = [id(p) for group in groups for p in group["params"]]
    assert sorted(members) == sorted(id(p) for p in model.parameters())
    assert sum(row["trainable"] for row in table) == sum(p.numel() for p in model.parameters())
    connector = {name.split(".")[0] for name, _ in model.named_parameters() if group_of(name) == "connector"}
    assert connector == {
        "connector", "static_query", "first_query", "query_projection", "planner", "shallow_attention"
    }  # fmt: skip
    assert all(group["weight_decay"] == 0 for group in groups for p in group["params"] if p.ndim < 2)


@pytest.mark.parametrize("frozen", GROUPS)
def test_rate_zero_freezes_a_group(frozen):
    model = make_model()
    groups, table = trainable_parameters(model, RATES | {frozen: 0.0}, weight_decay=0.01)
    assert frozen not in {group["name"] for group in groups}
    assert all(p.requires_grad == (group_of(name) != frozen) for name, p in model.named_parameters())
    assert next(row["trainable"] for row in table if row["group"] == frozen) == 0


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="all learning rates are 0"):
        trainable_parameters(make_model(), dict.fromkeys(GROUPS, 0.0), 0.0)


def test_state_is_replaced_whole(tmp_path):
    assert load_state(tmp_path) is None
    save_state(tmp_path, {"step": 1, "model": {"w": torch.ones(3)}})
    save_state(tmp_path, {"step": 2, "model": {"w": torch.zeros(3)}})
    (tmp_path / "state.partial").write_bytes(b"a kill during the next write leaves this")
    state = load_state(tmp_path)
    assert state["step"] == 2
    assert torch.equal(state["model"]["w"], torch.zeros(3))


def test_a_step_with_sampled_queries_is_a_function_of_its_number(tmp_path):
    """Whatever was drawn before: so a resumed run draws the same."""
    settings = SimpleNamespace(num_samples=8, warmup_share=0.0, final_learning_rate=1.0, learning_rate=RATES)
    common = SimpleNamespace(batch_size=4, clip_norm=1.0, precision="fp32", weight_decay=0.0, betas=(0.9, 0.98))
    losses = {}
    for step in (0, 1, 0):
        model = make_model(query_source="random", hard_attention="gumbel")
        run = Run("stage1", model, None, None, 1, common, settings, None, tmp_path)
        run.loader = SimpleNamespace(num_steps=2, samples_seen=lambda num_steps: 4 * num_steps)
        groups, _ = trainable_parameters(model, RATES, 0.0)
        torch.rand(step + 5)
        row = train_step(run, torch.optim.AdamW(groups), make_batch() | {"keys": list("abcd")}, step)
        losses.setdefault(step, set()).add(row["loss"])
    assert len(losses[0]) == 1
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    ("wanted", "there", "device"), [("auto", False, "cpu"), ("auto", True, "cuda"), ("cpu", True, "cpu")]
)
def test_the_device_is_chosen(monkeypatch, wanted, there, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert choose_device(wanted) == device


def test_a_gpu_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"training\.common\.device is cuda"):
        choose_device("cuda")
