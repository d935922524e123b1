"""The next-frame objective: targets, heads, options, and kinds of batches, with a stand-in for the autoencoder."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from model.constants import IGNORE_INDEX
from pipeline_steps.common import next_frame
from pipeline_steps.common.errors import UserError
from pipeline_steps.training import __main__ as training_stage
from pipeline_steps.training import checkpointing, objectives, train_loop
from pipeline_steps.training.checkpoint_io import load_state
from tests import objectives as made
from tests.model.tiny import BOS, VISUAL, as_batch, make_batch, make_model, rows_of
from tests.objectives import assert_same, settings, step, training_model
from tests.pipeline_steps.predicted import CHANNELS, SIDE, Pooled, losses, made_with, modes, objective, options
from tests.pipeline_steps.test_golden_losses import make_run

pytestmark = pytest.mark.usefixtures("pooled")


ON = {"next_frame": {"weight": 1.0}}


def test_pairs_stay_within_a_sample():
    assert next_frame.first_frames(np.array([3, 0, 1, 2])).tolist() == [0, 1, 4]
    assert next_frame.first_frames(np.array([0, 1])).tolist() == []
    training, batch = made_with(), as_batch(make_batch())
    assert training.counts(batch)["next_frames"] == 3


def test_targets_are_the_next_latent_its_difference_and_what_an_unchanged_frame_would_give():
    frames, firsts = as_batch(make_batch()).pixel_values, torch.tensor([0, 1, 4])
    latents = Pooled("", "")(frames)
    found = {}
    for target in ("latent", "delta"):
        own = made.section(**options(target=target)).next_frame
        found[target] = next_frame.TargetMaker(own, 14, "key")(frames, firsts)
    assert torch.equal(found["latent"].expected, latents[[1, 2, 5]])
    assert torch.equal(found["delta"].expected, latents[[1, 2, 5]] - latents[[0, 1, 4]])
    assert torch.equal(found["latent"].unchanged, latents[[0, 1, 4]])
    errors = [next_frame.pair_losses(own.unchanged, own.expected) for own in found.values()]
    torch.testing.assert_close(*errors)  # the same reference for both
    assert errors[0].min() > 0


def test_pair_losses_are_squared_errors_and_the_absolute_error_beside():
    errors = torch.tensor([[[[1.0, -3.0]]], [[[0.0, 2.0]]]])
    assert next_frame.pair_losses(errors, torch.zeros(2, 1, 1, 2)).tolist() == [5.0, 2.0]
    assert next_frame.pair_losses(errors, torch.zeros(2, 1, 1, 2), 0.5).tolist() == [6.0, 2.5]


def test_optical_flow_of_a_shift_is_its_distance_in_cells():
    pytest.importorskip("cv2")
    noise = F.avg_pool2d(torch.rand(1, 3, 66, 66, generator=torch.Generator().manual_seed(0)), 5, stride=1, padding=2)
    frames = torch.cat([noise[..., 5:61, 8:64], noise[..., 5:61, 4:60], noise[..., 5:61, 4:60]])  # 4 px right, 0
    normalised = (frames - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / 0.225
    flow = next_frame.optical_flow(normalised, torch.tensor([0, 1]), (4, 4))
    assert flow.shape == (2, 2, 4, 4)
    assert flow[0, 0].mean() == pytest.approx(4 / 14, abs=0.05)
    assert flow[0, 1].abs().mean() < 0.05
    assert flow[1].abs().max() < 0.02


def test_the_loss_is_that_of_a_head_on_the_state_after_each_frame():
    """Recomputed by hand from the network's own hidden states, fine and coarse."""
    training, arguments = made_with(coarse_weight=0.25), make_batch()
    batch, network = as_batch(arguments), training.network
    found = losses(training, batch)
    firsts, latents = torch.tensor([0, 1, 4]), Pooled("", "")(batch.pixel_values)
    visual = (batch.input_ids == VISUAL).nonzero()[firsts]
    for term, mode in (("loss_next_frame", "fine"), ("loss_next_frame_coarse", "coarse")):
        state = network(**arguments, mode=mode).last_hidden_state[visual[:, 0], visual[:, 1]]
        predicted = training.objective["next_frame"](mode, state, None, latents[firsts], (SIDE, SIDE))
        expected = (predicted - latents[firsts + 1]).square().mean().item()
        assert found[term] == pytest.approx(expected, abs=1e-5)
    both = found["loss_next_frame"] + 0.25 * found["loss_next_frame_coarse"]
    assert found["loss"] == pytest.approx(found["loss_text"] + both, abs=1e-5)


def test_a_few_steps_lower_the_loss():
    training, batch = made_with(), as_batch(make_batch())
    optimizer = torch.optim.AdamW(training.parameters(), 3e-3)
    first = losses(training, batch)
    for _ in range(60):
        last = losses(training, batch)
        optimizer.step()
    assert last["loss_next_frame"] < 0.5 * first["loss_next_frame"]
    assert last["loss_next_frame_coarse"] < 0.5 * first["loss_next_frame_coarse"]


@pytest.mark.parametrize("skip_query", [False, True])
def test_gradients_reach_the_state_and_the_query(skip_query):
    """Without text loss: everything comes from the head. The coarse pass alone has no planned query."""
    torch.manual_seed(5)
    training = training_model(make_model(), text={"weight": 0.0}, **options(skip_query=skip_query, coarse_weight=0.0))
    _, gradients = step(training, as_batch(make_batch()))
    for name in ("planner.weight", "connector.weight", "language_model.model.layers.0.self_attn.q_proj.weight"):
        assert gradients[f"network.{name}"].abs().max() > 0
    assert gradients["network.static_query"].abs().max() > 0


def test_the_skip_is_a_path_from_the_query_to_the_prediction_past_the_state():
    training = made_with(skip_query=True)
    head, state = training.objective["next_frame"], torch.randn(3, 48)
    queries = torch.randn(3, 1, 24, requires_grad=True)
    head("fine", state, queries, torch.randn(3, CHANNELS, SIDE, SIDE), (SIDE, SIDE)).square().sum().backward()
    assert queries.grad.abs().max() > 0


def test_enough_planned_passes_give_the_losses_of_the_autoregressive_mode():
    """Clips have three frames at most, so two planned passes settle every query."""
    training, batch = made_with(), as_batch(make_batch())
    network, own = training.network, objective(training)
    found = {}
    with torch.no_grad():
        for mode in ("fine", "autoregressive"):
            text = network.packed_text(batch.input_ids, batch.attention_mask, places=batch.places)
            given = objectives.base.Outputs(network, mode, SimpleNamespace(text=text), text=object())
            given.passes = network.encode_frames(**batch.inputs(), mode=mode, options={"num_plans": 2, "text": text})
            given.passes = given.passes[-1:] * 2  # both names for the last pass
            found[mode] = own.terms(given, batch)["loss_next_frame"].value.item()
    assert found["fine"] == pytest.approx(found["autoregressive"], abs=1e-5)


def test_a_network_with_one_pass_has_one_term():
    for network in ({"coarse_only": True}, {"architecture": "multi_token", "num_visual_tokens_per_frame": 4}):
        model = make_model(**network)
        found = losses(made_with(model), as_batch(make_batch(model.config.tokens_per_frame)))
        assert {"loss_next_frame"} == {name for name in found if "next_frame" in name}


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("changes", [{}, {"previous_latent": "noise"}, {"previous_latent": "drop", "skip_query": True}])
def test_micro_batches_add_up_to_the_whole_batch(size, changes):
    training, batch = made_with(**changes), as_batch(make_batch())
    assert_same(step(training, batch, size), step(training, batch), 1e-4)


@pytest.mark.parametrize(
    ("change", "besides"),
    [
        ({"target": "delta"}, {}),
        ({"weight": 0.5}, {}),
        ({"coarse_weight": 0.5}, {}),
        ({"l1_weight": 0.5}, {}),
        ({"previous_latent": "none"}, {}),
        ({"previous_latent": "drop", "drop_probability": 1.0}, {}),
        ({"drop_probability": 0.0}, {"previous_latent": "drop", "drop_probability": 1.0}),
        ({"noise_std": 1.0}, {"previous_latent": "noise", "noise_std": 0.1}),
        ({"skip_query": True}, {}),
        ({"separate_heads": True}, {}),
        ({"head_width": 16}, {}),
    ],
    ids=str,
)
def test_every_option_changes_the_loss(change, besides):
    before, after = (losses(made_with(**besides | own))["loss"] for own in ({}, change))
    assert before != pytest.approx(after, abs=1e-6)


def test_the_previous_latent_is_changed_in_training_only_and_not_at_all_without_it():
    batch = as_batch(make_batch())
    for kind in ("drop", "noise", "none"):
        training = made_with(previous_latent=kind, drop_probability=1.0, noise_std=3.0)
        torch.manual_seed(1)
        trained = losses(training, batch)["loss_next_frame"]
        torch.manual_seed(2)
        again = losses(training, batch)["loss_next_frame"]
        training.eval()
        evaluated = losses(training, batch)["loss_next_frame"]
        assert (trained != pytest.approx(evaluated, abs=1e-6)) == (kind != "none"), kind
        assert (trained != pytest.approx(again, abs=1e-6)) == (kind == "noise"), kind
    head = training.objective["next_frame"]
    given = torch.randn(3, 48), None
    one, other = (head("fine", *given, value, (SIDE, SIDE)) for value in (None, torch.randn(3, CHANNELS, SIDE, SIDE)))
    assert torch.equal(one, other)


def test_separate_heads_are_trained_by_their_own_pass():
    training = made_with(separate_heads=True)
    own = objective(training)
    own.parameters = own.parameters.model_copy(update={"coarse_weight": 0.0})
    _, gradients = step(training, as_batch(make_batch()))
    own = {name.split(".")[3] for name, value in gradients.items() if ".heads." in name and value.abs().max() > 0}
    assert own == {"fine"}


def test_without_text_loss_a_text_only_micro_batch_has_a_zero_loss_with_a_gradient():
    training = training_model(make_model(), text={"weight": 0.0}, **options())
    assert [own.name for own in training.objectives] == ["next_frame"]
    batch = as_batch(make_batch())
    assert_same(step(training, batch, 1), step(training, batch), 1e-4)
    values, _ = step(training, as_batch(rows_of(make_batch(), [1, 1])))
    assert values["loss"] == 0


def test_the_text_weight_scales_the_text_loss():
    batch = as_batch(make_batch())
    one, half = (losses(training_model(make_model(), text={"weight": weight}), batch) for weight in (1.0, 0.5))
    assert half["loss"] == pytest.approx(0.5 * one["loss"], rel=1e-6)
    assert half["loss_text"] == one["loss_text"]


@pytest.mark.parametrize("layout", ["question_first", "vision_first"])
def test_kinds_of_batches(layout):
    arguments = make_batch(layout=layout)
    batch, found, shown = as_batch(arguments), {}, {}
    conditioned = ("text_conditioned",) if layout == "question_first" else ()
    for kind in ("joint", "video_only", *conditioned, "captions"):
        training = made_with(make_model(layout=layout), **modes(**{"joint": 1e-9} | {kind: 1.0}))
        shown[kind] = training.prepare(batch, np.random.default_rng(0))
        found[kind] = losses(training, shown[kind])
    assert shown["joint"] is shown["captions"] is batch
    assert "loss_next_frame" not in found["captions"]
    assert found["captions"]["loss"] == found["captions"]["loss_text"] == found["joint"]["loss_text"]
    joint, alone = found["joint"]["loss_next_frame"], found["video_only"]
    assert "loss_text" not in alone  # nothing it is a mean of
    assert (abs(alone["loss_next_frame"] - joint) > 1e-5) == bool(conditioned)  # else no text is before the frames
    for kind in conditioned:
        assert found[kind]["loss_next_frame"] == pytest.approx(joint, abs=1e-5)
        assert "loss_text" not in found[kind]
    video = shown["video_only"]
    assert (video.labels == IGNORE_INDEX).all()
    rows = [row[mask.bool()].tolist() for row, mask in zip(video.input_ids, video.attention_mask, strict=True)]
    firsts = batch.input_ids[:, 0].tolist()
    assert rows == [[first] + [VISUAL] * count for first, count in zip(firsts, (3, 0, 1, 2), strict=True)]
    assert (layout == "vision_first") == (set(firsts) == {BOS})


def test_kinds_are_drawn_with_their_weights_from_the_step():
    training = made_with(**modes(video_only=0.6, text_conditioned=0.2, captions=0.2))
    own, batch = objective(training), as_batch(make_batch())
    drawn = []
    for seed in range(300):
        own.prepare(batch, np.random.default_rng([seed, 1]))
        drawn.append(own.mode)
    assert {name: drawn.count(name) / 300 for name in set(drawn)} == pytest.approx(
        {"video_only": 0.6, "text_conditioned": 0.2, "captions": 0.2}, abs=0.07
    )
    assert own.prepare(batch, np.random.default_rng([7, 1])) is not None
    assert own.mode == drawn[7]


def test_micro_batches_of_batches_without_text_add_up():
    training = made_with(**modes(video_only=1.0))
    batch = training.prepare(as_batch(make_batch()), np.random.default_rng(0))
    assert_same(step(training, batch, 1), step(training, batch), 1e-4)


def test_a_resumed_run_ends_with_the_same_weights(tmp_path):
    changes = options(previous_latent="noise", **modes(joint=1.0, video_only=1.0, captions=8.0))

    def started():
        run = make_run("stage2", "question_first", tmp_path, objective=changes)
        run.runtime.keep_checkpoints = 1
        run.loader.state_dict, run.loader.quarantined, run.loader.step = dict, {}, 0
        run.loader.load_state_dict = run.loader.check_quarantined = lambda values: None
        return run, train_loop.prepare(run)

    run, trainer = started()
    rows = [train_loop.train_step(run, trainer, as_batch(make_batch()), number) for number in range(4)]
    assert len({"loss_next_frame" in row for row in rows}) == 2  # another kind on some steps
    expected = {name: value.clone() for name, value in run.training_model.state_dict().items()}
    run, trainer = started()
    for number in range(2):
        train_loop.train_step(run, trainer, as_batch(make_batch()), number)
    checkpointing.save_state(run, trainer, 2)
    tensors, _ = load_state(tmp_path)
    assert any(name.startswith("next_frame.heads.shared.") for name in tensors["objective"])
    run, trainer = started()
    checkpointing.load_weights(run, tensors)
    trainer.optimizer.restore(tensors["optimizer"], trainer.names)
    torch.rand(7)
    for number in (2, 3):
        train_loop.train_step(run, trainer, as_batch(make_batch()), number)
    assert all(torch.equal(value, expected[name]) for name, value in run.training_model.state_dict().items())


@pytest.mark.parametrize("text", [0.0, 1.0])
def test_a_stage_without_two_frames_is_an_error(tmp_path, text):
    changes = options() | {"text": {"weight": text}}
    run = make_run("stage2", "question_first", tmp_path, objective=changes)
    run.train.index.shown_frames = lambda replication: np.array([replication, 0, replication, 9])
    run.stage_plan.plan.order = np.array([0, 1, 2, 1])  # three stills, a text
    words = r"stage2\.objective\.next_frame needs consecutive frames, .* streaming\.image_replication \(now 1\)"
    with pytest.raises(UserError, match=words):
        train_loop.prepare(run)
    run.streaming.image_replication = 2
    train_loop.prepare(run)
    run.streaming.image_replication, run.stage_plan.plan.order = 1, np.array([0, 1, 3])
    train_loop.prepare(run)


def test_the_curve_has_the_columns():
    assert {"loss_next_frame", "loss_next_frame_coarse"} <= set(training_stage.COLUMNS)


@pytest.mark.parametrize(
    ("changes", "network", "message"),
    [
        (
            {"skip_query": True},
            {"architecture": "multi_token"},
            "skip_query is true, but .* multi_token has no queries",
        ),
        ({"separate_heads": True}, {"coarse_only": True}, "separate_heads is true, but this network has a single pass"),
        (
            {"modes": {"joint": 0.5, "video_only": 0.0, "text_conditioned": 0.5, "captions": 0.0}},
            {"layout": "vision_first"},
            r"modes\.text_conditioned is 0\.5, but model\.layout vision_first has no text before the frames",
        ),
    ],
)
def test_options_that_do_not_fit_the_network_are_named(changes, network, message):
    config = make_model(**network, num_visual_tokens_per_frame=4 if "architecture" in network else 1).config
    with pytest.raises(UserError, match=rf"training\.stage2\.objective\.next_frame\.{message}"):
        objectives.check("stage2", settings(**options(**changes)), config)


def test_losses_that_would_be_none_are_errors():
    config = make_model().config
    with pytest.raises(UserError, match=r"training\.stage2\.objective\.text\.weight is 0, .* nothing to train"):
        objectives.check("stage2", settings(text={"weight": 0.0}), config)
    with pytest.raises(UserError, match=r"modes\.captions is 1, but training\.stage2\.objective\.text\.weight is 0"):
        objectives.check("stage2", settings(text={"weight": 0.0}, **options(**modes(joint=1.0, captions=1.0))), config)
    with pytest.raises(UserError, match=r"modes has video_only, but preference training"):
        objectives.check("stage3", settings("preference", **options(**modes(video_only=1.0))), config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"separate_heads": True, "coarse_weight": 0.0}, "separate_heads is true but coarse_weight is 0"),
        (modes(captions=1.0), "weight is 1 but all modes except captions are 0: nothing would be predicted"),
        ({"autoencoder": None}, "autoencoder is null, but target latent with previous_latent keep needs latents"),
        (modes(), "all weights are 0"),
    ],
)
def test_wrong_values_are_errors_of_the_schema(changes, message):
    with pytest.raises(ValueError, match=message):
        made.section(**options(**changes))
    if "modes" not in changes:
        made.section(next_frame={"weight": 0.0} | changes)  # unused
