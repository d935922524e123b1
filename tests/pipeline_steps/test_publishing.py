"""Which weights a stage publishes: those of its best validation, the averaged ones or the last."""

from types import SimpleNamespace

import pytest
import torch

from pipeline_steps.training import train_loop
from tests.model.tiny import as_batch, make_batch
from tests.pipeline_steps.test_golden_losses import NUM_STEPS, make_run

# Of two sources after every step: the second step has the lowest mean, others have the lowest of one source
LOSSES = {1: (0.5, 3.5), 2: (1.0, 1.0), 3: (3.0, 0.4), 4: (1.1, 1.3)}


class Loader:
    """One batch for every step, with what the loop and a saved state ask of a loader."""

    num_steps, quarantined = NUM_STEPS, {}

    def __init__(self):
        self.step = 0

    def __iter__(self):
        while self.step < self.num_steps:
            self.step += 1
            yield as_batch(make_batch())

    def samples_seen(self, steps):
        return 4 * steps

    def check_quarantined(self, found):
        pass

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]


def whole_run(folder, objective, **common):
    """A stage of NUM_STEPS steps that `train` can run to its end, with a validation and a state after each."""
    run = make_run("stage2", "question_first", folder, objective=objective)
    run.common.__dict__.update(common, validate_every=1, plateau_validations=NUM_STEPS, plateau_progress=0.0)
    run.runtime.__dict__.update(warn_above_epochs=1.0, heatmaps_every=0, checkpoint_every=1, keep_checkpoints=1)
    run.stage_plan.mixture, run.stage_plan.groups = SimpleNamespace(statistics=dict), SimpleNamespace(unmatched=[])
    run.logger.progress, run.logger.rows = lambda batches, first: batches, lambda rows: None
    run.__dict__["loader"] = Loader()
    return run


def copied(run) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in run.training_model.state_dict().items()}


@pytest.fixture
def validated(monkeypatch) -> dict[int, dict[str, torch.Tensor]]:
    """{step: the weights that were validated}; the losses are LOSSES. None of a mode but `fine` counts."""
    seen = {}

    def validate(run, step, modes=("fine",)):
        seen[step] = copied(run)
        losses = {"fine": LOSSES[step], "autoregressive": (0.0, 0.0)}
        known = {"event": "validation", "step": step, "accuracy": 0.5}
        rows = [known | {"mode": mode, "loss": loss} for mode in modes for loss in losses[mode]]
        return [*rows, {"event": "diagnostics", "step": step}]

    monkeypatch.setattr(train_loop, "validate", validate)
    return seen


def assert_published(run, expected: dict[str, torch.Tensor]) -> None:
    """The network's weights and those of the objective's head are the expected ones, bit by bit."""
    found = {f"network.{name}": value for name, value in run.published.state_dict().items()}
    found |= {f"objective.{name}": value for name, value in run.published_heads.items()}
    assert found.keys() == expected.keys()
    assert "objective.frame_time.weight" in found
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("ema_decay", [None, 0.9])
@pytest.mark.parametrize(("publish", "step"), [("best", 2), ("last", NUM_STEPS)])
def test_a_stage_publishes_the_weights_of_its_best_or_its_last_validation(
    toy, publish, step, ema_decay, validated, tmp_path
):
    run = whole_run(tmp_path, toy, publish=publish, ema_decay=ema_decay)
    result = train_loop.train(run)
    assert result["best"] == ({"step": 2, "loss": 1.0} if publish == "best" else None)
    assert_published(run, validated[step])
    last = copied(run)
    assert not torch.equal(validated[2]["network.connector.weight"], validated[NUM_STEPS]["network.connector.weight"])
    for name in ("network.connector.weight", "objective.frame_time.weight"):  # the average is another one
        assert torch.equal(validated[NUM_STEPS][name], last[name]) == (ema_decay is None)


@pytest.mark.parametrize("ema_decay", [None, 0.9])
@pytest.mark.parametrize(("last_loss", "step"), [(1.2, 2), (0.9, NUM_STEPS)])
def test_the_best_weights_before_a_kill_are_published_unless_later_ones_are_better(
    toy, last_loss, step, ema_decay, validated, monkeypatch, tmp_path
):
    def killed(run, done):
        raise KeyboardInterrupt

    monkeypatch.setitem(LOSSES, NUM_STEPS, (last_loss, last_loss))
    options = {"publish": "best", "ema_decay": ema_decay}
    with monkeypatch.context() as patched:
        patched.setattr(train_loop, "warn_on_plateau", lambda run, done: done == 3 and killed(run, done))
        with pytest.raises(KeyboardInterrupt):
            train_loop.train(whole_run(tmp_path, toy, **options))
    before = dict(validated)
    validated.clear()
    run = whole_run(tmp_path, toy, **options)
    result = train_loop.train(run)
    assert (sorted(before), sorted(validated)) == ([1, 2, 3], [3, 4])  # resumed after step 2
    assert result["best"] == {"step": step, "loss": LOSSES[step][0]}
    assert_published(run, (before | validated)[step])
