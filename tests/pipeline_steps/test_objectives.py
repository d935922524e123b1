"""The objectives, their single sum, and micro-batches, which give the gradient of one batch."""

import math
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import text_loss
from model.constants import IGNORE_INDEX
from pipeline_steps.common.errors import UserError
from pipeline_steps.training import __main__ as training_stage
from pipeline_steps.training import checkpointing, objectives, train_loop
from pipeline_steps.training.checkpoint_io import load_state
from pipeline_steps.training.ema import EMA
from pipeline_steps.training.objectives.contrastive import contrastive_loss
from pipeline_steps.training.objectives.entropy import entropy_margin_loss
from pipeline_steps.training.parameters import trainable_parameters
from pipeline_steps.training.training_model import TrainingModel, sum_terms
from tests import objectives as made
from tests.model.tiny import LAYOUTS, as_batch, make_batch, make_model, preference_batch, rows_of
from tests.objectives import ALL, assert_same, frozen, step, training_model
from tests.pipeline_steps.test_golden_losses import make_run

# ---------------------------------------------------------------- each objective


def test_coarse_entropy_and_contrastive_losses_are_added_to_the_text_loss():
    model, batch = make_model(), as_batch(make_batch())
    weights = {"coarse": {"weight": 0.3}, "entropy": {"weight": 0.7, "margin": 1.0}}
    weights["contrastive"] = {"weight": 0.2, "margin": 0.0}
    values, _ = step(training_model(model, **weights), batch)
    options = {"output_attentions": True}
    coarse, fine = (model.eval()(**make_batch(), mode=mode, options=options) for mode in ("coarse", "fine"))
    assert values["loss_text"] == pytest.approx(fine.loss.item(), abs=1e-6)
    assert values["loss_coarse"] == pytest.approx(coarse.loss.item(), abs=1e-6)
    expected = entropy_margin_loss(fine.attention_weights, coarse.attention_weights, 1.0)
    assert values["loss_entropy"] == pytest.approx(expected.item(), abs=1e-6)
    expected = contrastive_loss(fine.visual_tokens, coarse.visual_tokens, 0.0)
    assert values["loss_contrastive"] == pytest.approx(expected.item(), abs=1e-6)
    parts = 0.3 * values["loss_coarse"] + 0.7 * values["loss_entropy"] + 0.2 * values["loss_contrastive"]
    assert values["loss"] == pytest.approx(values["loss_text"] + parts, abs=1e-6)
    for name, parameters in weights.items():
        _, gradients = step(training_model(make_model(), **{name: parameters}), batch)
        assert gradients["network.planner.weight"].abs().max() > 0


def test_entropy_margin_and_contrastive_values():
    uniform, sharp = torch.full((1, 1, 1, 1, 4), 0.25), torch.tensor([[[[[1.0, 0, 0, 0]]]]])
    assert entropy_margin_loss(sharp, uniform, 1.0).item() == 0
    assert entropy_margin_loss(sharp, uniform, 2.0).item() == pytest.approx(2 - math.log(4))
    assert entropy_margin_loss(uniform, uniform, 0.5).item() == pytest.approx(0.5)
    one, other = torch.tensor([[[1.0, 0]]]), torch.tensor([[[0, 2.0]]])
    assert contrastive_loss(one, one, 0.25).item() == pytest.approx(0.75)
    assert contrastive_loss(one, other, 0.25).item() == 0


@pytest.mark.parametrize(
    ("name", "change", "besides"),
    [
        ("coarse", {"weight": 0.5}, {}),
        ("entropy", {"weight": 0.5}, {}),
        ("entropy", {"weight": 0.5, "margin": 2.0}, {"weight": 0.5}),
        ("contrastive", {"weight": 0.5, "margin": -1.0}, {"margin": -1.0}),
        ("contrastive", {"weight": 0.5, "margin": -0.5}, {"weight": 0.5}),
    ],
)
def test_every_parameter_changes_the_loss(name, change, besides):
    batch = as_batch(make_batch())
    before, after = (step(training_model(make_model(), **{name: own}), batch)[0]["loss"] for own in (besides, change))
    assert before != pytest.approx(after, abs=1e-5)


def test_preference_and_other_terms_share_one_encoding_of_the_frames():
    """Not left out without a word: the entropy of the attention is trained on with preferences as well."""
    model, batch = make_model(), as_batch(preference_batch())
    training, encoded = training_model(model, "preference", entropy={"weight": 0.5}), []
    model.vision_encoder.encoder.layer[0].register_forward_hook(lambda *_: encoded.append(1))
    values, _ = step(training, batch, reference=frozen(make_model()))
    assert len(encoded) == 1
    assert values["loss_preference"] == pytest.approx(math.log(2), abs=1e-6)
    assert values["reward_margin"] == pytest.approx(0, abs=1e-5)
    assert values["loss"] == pytest.approx(values["loss_preference"] + 0.5 * values["loss_entropy"], abs=1e-6)
    assert "loss_text" not in values


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        ({"coarse_only": True}, "model.coarse_only is true"),
        ({"architecture": "multi_token", "num_visual_tokens_per_frame": 4}, "model.architecture is multi_token"),
    ],
)
@pytest.mark.parametrize("name", ["coarse", "entropy", "contrastive"])
def test_two_pass_objectives_are_rejected_for_single_pass_networks(network, reason, name):
    config = make_model(**network).config
    with pytest.raises(UserError, match=rf"training\.stage2\.objective\.{name}\.weight is 0\.5, but {reason}\. .*to 0"):
        objectives.check("stage2", made.settings(**{name: {"weight": 0.5}}), config)
    objectives.check("stage2", made.settings(), config)


# ---------------------------------------------------------------- the one sum


def test_a_term_is_weighted_by_its_share_of_the_steps_count():
    value = torch.tensor(3.0, requires_grad=True)
    terms = {
        "loss_a": objectives.Term(value, 0.5, "tokens"),
        "seen": objectives.Term(torch.tensor(math.inf), 0.0, "frames"),  # reported only
    }
    loss, values = sum_terms(terms, {"tokens": 2, "frames": 1}, {"tokens": 8, "frames": 4})
    assert loss.item() == pytest.approx(3 * 0.5 * 2 / 8)
    assert values["loss_a"].item() == pytest.approx(3 * 2 / 8)
    assert not values["loss_a"].requires_grad


def test_a_term_with_an_undeclared_name_is_an_error():
    training = training_model(make_model())
    training.objectives[0].term_names = ()
    with pytest.raises(ValueError, match=r"objective text: terms\(\) returned loss_text, which term_names lacks"):
        step(training, as_batch(make_batch()))


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("layout", ["question_first", "vision_first"])
@pytest.mark.parametrize("changes", [{}, ALL], ids=["text", "all losses"])
def test_micro_batches_add_up_to_the_whole_batch(size, layout, changes):
    """Four samples of 3, 0, 1 and 2 frames: tokens and frames are divided unevenly."""
    training = training_model(make_model(layout=layout, tie_first_query=False), **changes)
    arguments = make_batch(layout=layout)
    arguments["labels"][1, -6:] = IGNORE_INDEX  # and so are the labels
    batch = as_batch(arguments)
    rtol = 1e-4 if changes else 0.0  # entropies lose digits
    assert_same(step(training, batch, size), step(training, batch), rtol)


@pytest.mark.parametrize("size", [1, 3])
def test_preference_micro_batches_add_up_to_the_whole_batch(size):
    model, batch = make_model(tie_first_query=False), as_batch(preference_batch())
    reference, training = frozen(make_model(visual_scale=0.3)), training_model(model, "preference")
    assert_same(step(training, batch, size, reference=reference), step(training, batch, reference=reference))


def test_a_micro_batch_is_padded_to_its_own_length():
    batch = as_batch(preference_batch())
    lengths, rejected = batch.attention_mask.sum(1), batch.rejected.attention_mask.sum(1)
    pieces = list(batch.split(1))
    assert [piece.input_ids.shape[1] for piece in pieces] == lengths.tolist()
    assert [piece.rejected.input_ids.shape[1] for piece in pieces] == rejected.tolist()
    assert [len(piece.pixel_values) for piece in pieces] == batch.num_frames.tolist()
    assert torch.equal(torch.cat([piece.pixel_values for piece in pieces]), batch.pixel_values)
    assert torch.equal(torch.cat([piece.frame_times for piece in pieces]), batch.frame_times)
    assert [key for piece in pieces for key in piece.keys] == list("abcd")
    counts = [piece.counts() for piece in pieces]
    assert {name: sum(own[name] for own in counts) for name in batch.counts()} == batch.counts()


@pytest.mark.parametrize("layout", sorted(set(LAYOUTS) - {"nothing in front"}))
def test_chunked_logits_give_the_same_losses_and_gradients(monkeypatch, layout):
    model = make_model(layout=layout)
    training, arguments = training_model(model), make_batch(layout=layout)
    options = {"return_logits": False}
    whole, expected, sizes = step(training, as_batch(arguments)), model(**arguments, options=options), []
    monkeypatch.setattr(text_loss, "LOGITS_AT_ONCE", 3 * model.config.text_config.vocab_size)
    model.language_model.lm_head.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    found = model(**arguments, options=options)
    assert sizes == [3] * 5 + [1]  # 16 labelled tokens, three at a time
    assert torch.equal(found.correct, expected.correct)
    torch.testing.assert_close(found.token_loss, expected.token_loss, atol=1e-6, rtol=0)
    assert_same(step(training, as_batch(arguments)), whole)
    assert max(sizes) == 3


def test_frame_times_reach_the_network():
    batch = as_batch(make_batch())
    model = make_model(frame_time_embedding="sinusoidal")
    torch.nn.init.normal_(model.time_projection.weight)
    losses = []
    for factor in (1.0, 7.0):
        batch.frame_times = batch.frame_times * factor
        losses.append(step(training_model(model), batch)[0]["loss"])
    assert losses[0] != pytest.approx(losses[1], abs=1e-4)


# ---------------------------------------------------------------- a new one: one file, one parameter


def test_a_new_objective_takes_one_file_and_one_parameter(toy, tmp_path):
    """It is found, in the row, in the gradient with its head, and the same in any micro-batches."""
    known = {"coarse", "contrastive", "entropy", "next_frame", "preference", "text"}
    assert {"frame_time"} == set(objectives.registry()) - known
    assert "loss_frame_time" in objectives.term_names()
    run, batch = make_run("stage2", "question_first", tmp_path, objective=toy), as_batch(make_batch())
    trainer = train_loop.prepare(run)
    head = run.training_model.objective["frame_time"]
    before = head.weight.detach().clone()
    row = train_loop.train_step(run, trainer, batch, 0)
    assert row["loss"] == pytest.approx(row["loss_text"] + 0.5 * row["loss_frame_time"], abs=1e-5)
    assert not torch.equal(head.weight, before)
    again = make_run("stage2", "question_first", tmp_path, objective=toy)  # drawn with the seed
    assert torch.equal(again.training_model.objective["frame_time"].weight, before)
    for size in (1, 3):
        assert_same(step(run.training_model, batch, size), step(run.training_model, batch), 1e-5)
    _, gradients = step(run.training_model, batch)
    own = {name: value for name, value in gradients.items() if name.startswith("objective.frame_time.")}
    assert len(own) == 2
    assert all(value.abs().max() > 0 for value in own.values())
    without = step(training_model(run.model, frame_time={"weight": 0.0}), batch)[1]
    assert not torch.equal(gradients["network.connector.weight"], without["network.connector.weight"])


def test_a_head_is_in_the_connector_group_the_ema_and_the_states(toy, tmp_path):
    run = make_run("stage2", "question_first", tmp_path, objective=toy)
    run.common.ema_decay, run.runtime.keep_checkpoints = 0.9, 1
    trainer = train_loop.prepare(run)
    head = run.training_model.objective["frame_time"]
    options = (run.settings, 0.01, "muon")
    (with_head, *_), (without, *_) = (trainable_parameters(run.model, *options, own)[1] for own in (head, None))
    assert with_head["trainable"] == without["trainable"] + 49
    assert {"objective.frame_time.weight", "objective.frame_time.bias"} <= trainer.ema.values.keys()
    train_loop.train_step(run, trainer, as_batch(make_batch()), 0)
    run.loader.state_dict, run.loader.quarantined, run.loader.check_quarantined = dict, {}, lambda found: None
    checkpointing.save_state(run, trainer, 1)
    tensors, _ = load_state(tmp_path)
    assert torch.equal(tensors["objective"]["frame_time.weight"], head.weight)
    assert "objective.frame_time.weight/exp_avg" in tensors["optimizer"]
    again = make_run("stage2", "question_first", tmp_path, objective=toy)
    checkpointing.load_weights(again, tensors)
    assert torch.equal(again.training_model.objective["frame_time"].weight, head.weight)
    assert isinstance(trainer.ema, EMA)


def test_a_head_is_published_and_the_next_stage_can_load_it(toy, tmp_path):
    run = make_run("stage2", "question_first", tmp_path, objective=toy)
    run.common.publish = "last"
    trainer = train_loop.prepare(run)
    checkpointing.publish_weights(run, trainer)
    assert run.published_heads.keys() == {"frame_time.weight", "frame_time.bias"}
    (tmp_path / "stage2").mkdir()
    save_file(run.published_heads, training_stage.heads_of(tmp_path / "stage2"))
    (tmp_path / "stage2/config.json").write_text("{}")
    expected = load_file(tmp_path / "stage2/objective.safetensors")["frame_time.weight"]
    for start in ("new", "previous"):
        changes = toy | {"initial_modules": start}
        following = make_run("stage3", "question_first", tmp_path, objective=changes)
        torch.nn.init.zeros_(following.training_model.objective["frame_time"].weight)
        training_stage.load_heads(tmp_path / "stage2", following)
        found = following.training_model.objective["frame_time"].weight
        assert torch.equal(found, expected) == (start == "previous")
    headless = {"frame_time": {"weight": 0.0}, "initial_modules": "previous"}
    other = make_run("stage3", "question_first", tmp_path, objective=headless)
    with pytest.raises(UserError, match="initial_modules is previous, but no objective of this stage has modules"):
        training_stage.load_heads(tmp_path / "stage2", other)


def test_a_head_can_be_trained_with_preferences(toy, tmp_path):
    run = make_run("stage3", "question_first", tmp_path, objective=toy)
    row = train_loop.train_step(run, train_loop.prepare(run), as_batch(preference_batch()), 0)
    assert row["loss"] == pytest.approx(row["loss_preference"] + 0.5 * row["loss_frame_time"], abs=1e-5)


def test_two_objectives_with_one_name_are_rejected(toy, tmp_path):
    first = (tmp_path / "package/frame_time.py").read_text()
    (tmp_path / "package/other.py").write_text(first.replace("FrameTime", "Other"))
    with pytest.raises(ValueError, match="two objectives are named 'frame_time'"):
        objectives.registry()
    sys.modules.pop("pipeline_steps.training.objectives.other")


def test_a_text_only_micro_batch_lacks_only_the_terms_of_frames():
    training = training_model(make_model(), **ALL)
    values, _ = step(training, as_batch(rows_of(make_batch(), [1, 1])))
    assert values.keys() == {"loss", "loss_text", "loss_coarse"}
    assert values["loss_coarse"] == values["loss_text"]
    assert isinstance(training, TrainingModel)
