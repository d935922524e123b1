"""How well the next frame is predicted: pairs, groups of clips, sensitivities, the command."""

import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from pipeline_steps.common import params
from pipeline_steps.common.diagnostic_results import NextFrameResult
from pipeline_steps.common.errors import UserError
from pipeline_steps.evaluation import next_frame as evaluation
from pipeline_steps.streaming.collate import Collator
from pipeline_steps.streaming.dataset import TokenizedShards
from pipeline_steps.training import __main__ as training_stage
from tests import checkpoints
from tests import objectives as made
from tests.model.tiny import as_batch, make_batch, make_model
from tests.objectives import settings, training_model
from tests.pipeline_steps.predicted import Pooled, losses, made_with, objective, options

pytestmark = pytest.mark.usefixtures("pooled")


def evaluated(training, arguments=None, **kinds):
    """`pair_table` of the tiny batch: clips of 3, 0, 1 and 2 frames."""
    training.eval()
    own, batch = objective(training), as_batch(arguments or make_batch())
    predictor = evaluation.NextFramePredictor.__new__(evaluation.NextFramePredictor)
    predictor.settings, predictor.targets, predictor.heads = own.parameters, own.targets, own.module
    items = [{"key": key, "item": 0, "kind": kinds.get(key, "video")} for key in batch.keys]
    return evaluation.pair_table(training.network, predictor, "made", items, batch, 2)


def test_the_evaluation_measures_what_training_minimises():
    training = made_with()
    table, trained = evaluated(training), losses(training)
    assert table["fine_1"].mean() == pytest.approx(trained["loss_next_frame"], abs=1e-5)
    assert table["coarse"].mean() == pytest.approx(trained["loss_next_frame_coarse"], abs=1e-5)
    assert table["frame"].tolist() == [1, 2, 1]
    assert table["key"].tolist() == ["a", "a", "d"]
    np.testing.assert_allclose(table["fine_2"], table["autoregressive"], atol=1e-5)
    np.testing.assert_allclose(table["fine_1"][[0, 2]], table["coarse"][[0, 2]], atol=1e-5)  # frame 0: no plan yet
    assert table["similarity"].isna().tolist() == [True, False, True]


def test_sensitivities_and_the_unchanged_frame():
    table = evaluated(made_with())
    frames = as_batch(make_batch()).pixel_values
    latents = Pooled("", "")(frames)
    expected = (latents[[0, 1, 4]] - latents[[1, 2, 5]]).square().flatten(1).mean(1)
    np.testing.assert_allclose(table["unchanged"], expected, rtol=1e-5)
    assert table["shuffled_state"].isna().tolist() == [False, True, False]  # no other clip has a third frame
    assert (table["shuffled_state"] - table["fine_1"]).abs()[[0, 2]].min() > 1e-6
    assert (table["no_previous"] - table["fine_1"]).abs().min() > 1e-6
    assert (table["no_state"] - table["fine_1"]).abs().min() > 1e-6
    assert table[["state_sensitivity", "previous_sensitivity"]].min().min() > 1e-3
    without = evaluated(made_with(previous_latent="none"))
    assert not {"no_previous", "previous_sensitivity"} & set(without)
    assert without["state_sensitivity"].min() > 1e-3
    assert not {"fine_1", "similarity"} & set(evaluated(made_with(make_model(coarse_only=True))))


def test_another_clip_is_never_an_item_of_the_same_one():
    times = np.array([0, 1, 0, 0, 1, 0])  # two items of a, two of b
    found = evaluation.other_clip(times, list("aaabbb"))
    for own, other in enumerate(found):
        assert times[own] == times[other]
        assert "aaabbb"[own] != "aaabbb"[other]
    assert evaluation.other_clip(times[:2], list("aa")).tolist() == [-1, -1]


def test_summary_of_a_pair_table():
    columns = {"task": "t", "item": 0, "kind": "video", "similarity": [np.nan, 0.5] * 5}
    keys, frames = ["a"] * 6 + ["b"] * 4, [*range(1, 7), *range(1, 5)]
    coarse = [9.0, 9, 1, 1, 1, 1, 2, 2, 2, 2]
    table = pd.DataFrame({"key": keys, "frame": frames, "coarse": coarse, "fine_1": [2.0] * 6 + [1.0] * 4} | columns)
    table = table.assign(no_state=[3.0] * 5 + [5.0] * 5, state_sensitivity=0.5)
    found = evaluation.summarise(table, "fine_1", SimpleNamespace(bootstrap_samples=20, seed=0))
    assert (found.no_state, found.state_sensitivity, found.previous_sensitivity) == (4.0, 0.5, None)
    assert found.loss == pytest.approx({"coarse": 3.0, "fine_1": 1.6})
    assert found.per_frame["coarse"] == pytest.approx([5.5, 5.5, 1.5, 1.5, 1.0, 1.0])
    assert found.ratio == pytest.approx(30 / 16)
    assert (found.wins, found.wins_last_frames) == (1.0, 0.5)  # clip a: 22 against 12, its last four 4 against 8
    assert (found.token_similarity, found.num_clips, found.num_pairs) == (0.5, 2, 10)


def test_moving_clips_are_a_group_and_are_also_measured_cut_to_their_first_frames(monkeypatch):
    """The losses of the stand-in tell how many frames and passes it was given."""

    def item(key, kind, count):
        frames = {"frames": np.zeros((count, 1)), "frame_times": np.arange(count), "num_frames": count}
        return {"key": key, "item": 0, "kind": kind} | frames

    by_task = {"card": [item("a", "video", 4), item("b", "video", 2)], "image": [item("c", "image", 4)]}

    def table_of(model, predictor, task, items, batch, max_passes):
        assert [own["num_frames"] for own in batch] == [own["num_frames"] for own in items]
        rows = [
            {"task": task, "key": own["key"], "item": 0, "kind": own["kind"], "frame": frame, "similarity": 0.5}
            | {"coarse": float(own["num_frames"]), "unchanged": 7.0}
            | {f"fine_{number}": own["num_frames"] / (1 + number) for number in range(1, max_passes + 1)}
            for own in items
            for frame in range(1, own["num_frames"])
        ]
        return pd.DataFrame(rows)

    class Collated(list):
        def to(self, device):
            return self

    monkeypatch.setattr(evaluation, "pair_table", table_of)
    monkeypatch.setattr(
        evaluation, "batches", lambda *_: ((task, own, Collated(own), None) for task, own in by_task.items())
    )
    predictor = SimpleNamespace(settings=SimpleNamespace(model_dump=lambda mode: {}))
    given = SimpleNamespace(max_items_per_task=9, seed=0, batch_size=4, bootstrap_samples=20)
    chosen = {"card": [0, 1], "image": [2]}
    found = evaluation.measure(make_model(), predictor, Collated, None, chosen, given, {}, (2, 3, 8), 2)
    assert list(found.groups) == ["videos", "card", "image"]
    assert {name: group.num_pairs for name, group in found.groups.items()} == {"videos": 4, "card": 4, "image": 3}
    assert found.groups["videos"].loss["coarse"] == pytest.approx((3 * 4 + 2) / 4)
    assert found.passes == {
        "all": pytest.approx({"coarse": 3.5, "fine_1": 1.75, "fine_2": 3.5 / 3}),
        "2": pytest.approx({"coarse": 2.0, "fine_1": 1.0, "fine_2": 2 / 3}),
        "3": pytest.approx({"coarse": 3.0, "fine_1": 1.5, "fine_2": 1.0}),  # of a, as b has two
    }
    by_task = {"image": [item("c", "image", 1)]}
    with pytest.raises(UserError, match="no clip of the chosen items has two frames"):
        evaluation.measure(make_model(), predictor, Collated, None, chosen, given, {}, (), 2)


@torch.no_grad()
def direct_losses(network, head, collate, items, num_passes, count=None):
    """{coarse, fine_1, ...: mean loss of all pairs of the items}, from the network's hidden states, one item at a time.
    count: of its first frames only."""
    found = {name: [] for name in ("coarse", *(f"fine_{number}" for number in range(1, num_passes + 1)))}
    for item in items:
        shown = {name: item[name][:count] for name in ("frames", "frame_times")}
        batch = collate([item | shown | {"num_frames": len(shown["frames"])}]).to("cpu")
        latents, given = Pooled("", "")(batch.pixel_values), (batch.input_ids, batch.attention_mask)
        pairs = {"pixel_values": batch.pixel_values, "num_frames": batch.num_frames, "frame_times": batch.frame_times}
        for name, values in found.items():
            mode, _, number = name.partition("_")
            states = network(*given, **pairs, mode=mode, options={"num_plans": int(number or 1)}).last_hidden_state
            states = states[batch.input_ids == network.config.visual_token_id][:-1]
            predicted = head(mode, states, None, latents[:-1], latents.shape[2:])
            values += (predicted - latents[1:]).square().mean((1, 2, 3)).tolist()
    return {name: pytest.approx(np.mean(values), abs=1e-5) for name, values in found.items()}


@pytest.mark.parametrize(
    ("words", "cuts", "num_passes"),
    [((), (), 3), (("--max-passes", "2", "--num-frames", "2", "3", "9"), (2, 3), 2)],  # clips have four frames
)
def test_the_command_measures_a_checkpoint_by_group_cut_and_pass(made, tmp_path, monkeypatch, words, cuts, num_passes):
    network, section = checkpoints.make_lively_model(), settings(**options(separate_heads=True)).objective
    training = training_model(network, **options(separate_heads=True)).eval()
    head = objective(training).module
    checkpoints.save(network, made, tmp_path, "")
    weights = {f"next_frame.{name}": value for name, value in head.state_dict().items()}
    save_file(weights, training_stage.heads_of(tmp_path), {"objective": section.model_dump_json()})
    places = {"params": params.ROOT / "params.yaml", "checkpoint": tmp_path, "shards": made.shards}
    places |= {"tokens": made.tokens, "out": tmp_path / "found.json"}
    arguments = (f"--{name}={place}" for name, place in places.items())
    monkeypatch.setattr("sys.argv", ["next_frame", *arguments, *words])
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    evaluation.main()
    found = NextFrameResult.model_validate_json(places["out"].read_text())

    replication = params.read(places["params"], "streaming.image_replication").streaming.image_replication
    data = TokenizedShards.for_model(network.config, made.shards, made.tokens, "test", replication)
    collate = Collator.for_model(network.config, loss="answer_only", image_replication=replication)
    items = [item for item in map(data.__getitem__, range(len(data))) if item["kind"] != "text"]
    videos = [item for item in items if item["kind"] == "video"]
    assert len(videos) == len(items) - 1  # a still
    direct = partial(direct_losses, network, head, collate, num_passes=num_passes)
    groups = {"videos": videos} | {item["task"]: [item] for item in items}
    assert found.groups.keys() == groups.keys()
    for name, own in groups.items():
        losses = found.groups[name].loss
        assert {variant: value for variant, value in losses.items() if variant[:4] in ("coar", "fine")} == direct(own)
        assert found.groups[name].num_clips == len(own)
    assert found.passes == {"all": direct(videos)} | {str(count): direct(videos, count=count) for count in cuts}
    means = list(found.passes["all"].values())[:3]  # more planned passes change nothing for the last pair's state
    assert np.abs(np.diff(means)).min() > 1e-4


@pytest.mark.parametrize("words", [("--num-frames", "1"), ("--num-frames", "8", "0"), ("--max-passes", "0")])
def test_the_command_refuses_numbers_without_a_pair_or_pass(monkeypatch, capsys, words):
    monkeypatch.setattr("sys.argv", ["next_frame", *words])
    monkeypatch.setattr(params, "read", None)
    with pytest.raises(SystemExit, match="2"):
        evaluation.main()
    assert f"argument {words[0]}: {words[-1]} is below" in capsys.readouterr().err


def test_settings_of_another_version_are_an_error(tmp_path):
    training = made_with()
    weights = {f"next_frame.{name}": value for name, value in objective(training).module.state_dict().items()}
    section = made.section(**options()).model_dump(mode="json")
    del section["next_frame"]["skip_query"]
    save_file(weights, training_stage.heads_of(tmp_path), {"objective": json.dumps(section)})
    with pytest.raises(UserError, match=r"objective\.safetensors: .*skip_query: Field required.*Train the stage again"):
        evaluation.load_predictor(tmp_path, training.network)


def test_a_published_head_is_found_with_its_settings(tmp_path):
    training = made_with(previous_latent="drop")
    weights = {f"next_frame.{name}": value for name, value in objective(training).module.state_dict().items()}
    assert evaluation.load_predictor(tmp_path, training.network) is None
    path = training_stage.heads_of(tmp_path)
    save_file({"frame_time.weight": torch.zeros(1)}, path)
    assert evaluation.load_predictor(tmp_path, training.network) is None
    save_file(weights, path)
    with pytest.raises(UserError, match="has a next-frame head but not its settings"):
        evaluation.load_predictor(tmp_path, training.network)
    section = made.section(**options(previous_latent="drop"))
    save_file(weights, path, {"objective": section.model_dump_json()})
    found = evaluation.load_predictor(tmp_path, training.network, autoencoder="elsewhere")
    assert found.settings.previous_latent == "drop"
    assert found.targets.latents.folder == "elsewhere"
    for name, value in found.heads.state_dict().items():
        assert torch.equal(value, weights[f"next_frame.{name}"])
    save_file(weights, path, {"objective": made.section(**options(head_width=16)).model_dump_json()})
    with pytest.raises(UserError, match="the head does not fit its settings"):
        evaluation.load_predictor(tmp_path, training.network)
