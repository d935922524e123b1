"""Controls, scores per source and per frame: on a network that weighs frames in a known way, and on a real one."""

import types
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from tqdm import tqdm

from pipeline_steps.common import modes
from pipeline_steps.common.modes import subset_controls
from pipeline_steps.evaluation import breakdown, controls, per_frame, scoring, statistics
from tests.model import tiny
from tests.pipeline_steps.evaluated import NUM_SCORED, Weighing, clip, loaded, truth_at

SILENT = tqdm(disable=True)
interval = partial(statistics.ratio_interval, num_samples=50, seed=1)


def test_each_control_removes_what_it_describes():
    items = [clip("a", [1, 2, 3]), clip("b", [4])]
    table = controls.score_controls(Weighing(), loaded(items, [truth_at(0, 1, None), None]), 1, SILENT)
    losses = (table.set_index(["mode", "key"])["loss_sum"] / NUM_SCORED).to_dict()
    order = modes.shuffled_order(3, controls.item_rng(1, "a", 0))
    shuffled = sum((t + 1) * [1, 2, 3][place] for t, place in enumerate(order))
    assert losses == {
        ("static_query", "a"): 14 + 100,
        ("static_query", "b"): 4 + 100,
        ("shuffled_frames", "a"): shuffled,
        ("shuffled_frames", "b"): 4,
        ("first_frame", "a"): 1 + 2 + 3,
        ("first_frame", "b"): 4,
        ("oracle_query", "a"): 14 - 2,  # no truth is known of b
    }
    assert shuffled != 14


@pytest.fixture
def reversed_frames(monkeypatch):
    """A control of one entry: the clip backwards at half its brightness."""
    monkeypatch.setattr(modes, "REGISTRY", dict(modes.REGISTRY))
    modes.register(
        modes.Mode(
            "reversed_frames",
            "autoregressive with the frames in reverse order at half their value",
            pixels=lambda pixels: pixels / 2,
            frame_order=lambda count, rng: np.arange(count)[::-1],
        )
    )


def test_a_control_is_one_entry_of_the_registry(reversed_frames):
    items = [clip("a", [1, 2, 3]), clip("b", [4, 6])]
    table = controls.score_controls(Weighing(), loaded(items), 1, SILENT)
    own = table[table["mode"] == "reversed_frames"].set_index("key")["loss_sum"] / NUM_SCORED
    assert own.to_dict() == {"a": (3 + 2 * 2 + 3 * 1) / 2, "b": (6 + 2 * 4) / 2}
    rows = [
        scoring.table_rows(
            task, batch_items, truths, batch, "autoregressive", scoring.forward(Weighing(), batch, "fine")
        )
        for task, batch_items, batch, truths in loaded(items)
    ]
    whole = pd.concat([table, pd.DataFrame(rows[0])], ignore_index=True)
    effect = controls.effects(whole, interval)["made"]["reversed_frames"]
    assert effect.num_items == 2
    assert effect.loss_difference == pytest.approx(((5 - 14) + (7 - 16)) / 2)


def test_a_name_is_registered_once(reversed_frames):
    with pytest.raises(ValueError, match="mode 'reversed_frames' is registered twice"):
        modes.register(modes.REGISTRY["reversed_frames"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subset": False, "needs_target": True}, "frame_order and needs_target need subset=True"),
        (
            {"captions": True, "query_source": "static"},
            "captions need a mode that changes nothing but the pixels",
        ),
    ],
)
def test_an_option_without_effect_is_refused(options, message):
    with pytest.raises(ValueError, match=f"mode 'made': {message}"):
        modes.Mode("made", "of this test", **options)


def test_frames_move_together_with_their_targets():
    items = [clip("a", [1, 2, 3])]
    _, _, batch, truths = loaded(items, [truth_at(0, 1, 2)])[0]
    batch.target_patches = torch.from_numpy(truths[0].target)
    shown = controls.controlled("shuffled_frames", items, batch, truths, 1)
    values = shown.pixel_values.mean((1, 2, 3))
    assert torch.equal(shown.frame_times, batch.frame_times)  # the times are no hint of the order that was
    assert shown.target_patches.int().argmax(1).tolist() == (values - 1).int().tolist()
    first = controls.controlled("first_frame", items, batch, truths, 1)
    assert first.target_patches.int().argmax(1).tolist() == [0, 0, 0]


def shuffled(count, seed, key):
    return modes.shuffled_order(count, controls.item_rng(seed, key, 0))


def test_an_order_is_never_the_own_one_and_does_not_depend_on_the_batch():
    orders = [shuffled(2, 1, key).tolist() for key in "abcdefgh"]
    assert orders == [[1, 0]] * 8
    assert shuffled(1, 1, "a").tolist() == [0]
    several = {tuple(shuffled(6, seed, "a")) for seed in range(20)}
    assert len(several) > 15
    assert all(sorted(order) == list(range(6)) for order in several)


def test_effects_compare_the_same_items():
    rows = [
        ("a", "autoregressive", 2, 4.0, 2),
        ("b", "autoregressive", 2, 2.0, 1),
        ("c", "autoregressive", 2, 99.0, 0),  # not among the control's items
        ("a", "first_frame", 2, 6.0, 1),
        ("b", "first_frame", 2, 4.0, 0),
    ]
    table = pd.DataFrame(rows, columns=["key", "mode", "num_tokens", "loss_sum", "num_correct"])
    found = controls.effects(table.assign(task="made", item=0), interval)
    effect = found["made"]["first_frame"]
    assert set(found["made"]) == {"first_frame"}
    assert effect.loss_difference == pytest.approx(1.0)
    assert effect.loss_interval == pytest.approx((1.0, 1.0))  # every item loses as much: unpaired it would spread
    assert effect.accuracy_difference == pytest.approx(-0.5)
    assert effect.num_items == 2


def test_effects_refuse_other_tokens():
    rows = [("a", "autoregressive", 2), ("a", "blind", 3)]
    table = pd.DataFrame(rows, columns=["key", "mode", "num_tokens"])
    table = table.assign(task="made", item=0, loss_sum=1.0, num_correct=1)
    with pytest.raises(ValueError, match=r"1 of . items have a different number of scored tokens"):
        controls.effects(table, interval)


def test_ordinary_tokens_have_no_query_controls():
    names = controls.applicable(types.SimpleNamespace(architecture="multi_token"))
    assert names == ["shuffled_frames", "first_frame"]
    assert controls.applicable(types.SimpleNamespace(architecture="foveated")) == subset_controls()


def real_batch(rows=(0, 2, 3)):
    batch = tiny.as_batch(tiny.rows_of(tiny.make_batch(), list(rows)))
    items = [clip(f"k{row}", [0] * tiny.NUM_FRAMES[row]) for row in rows]
    truths = [truth_of(count) for count in batch.num_frames.tolist()]
    return items, batch, truths


def truth_of(num_frames):
    target = np.zeros((num_frames, 16), bool)
    target[:, 5] = True
    return scoring.targets.GroundTruth(target, target, np.zeros((num_frames, 4)))


@pytest.mark.parametrize("options", [{}, {"tie_first_query": False}, {"attention": "shallow"}])
def test_static_query_is_the_coarse_mode_on_the_other_path(options):
    model = tiny.make_model(**options)
    items, batch, truths = real_batch()
    table = controls.score_controls(model, [("made", items, batch, truths)], 1, SILENT)
    coarse = scoring.forward(model, batch, "coarse").token_loss.sum(1)
    own = scoring.forward(model, batch, "autoregressive").token_loss.sum(1)
    losses = table.pivot(index="key", columns="mode", values="loss_sum")
    assert losses["static_query"].to_numpy() == pytest.approx(coarse.numpy(), abs=1e-4)
    assert losses["shuffled_frames"]["k2"] == pytest.approx(own[1].item(), abs=1e-4)  # one frame has one order
    assert abs(losses["shuffled_frames"]["k0"] - own[0].item()) > 1e-5


@pytest.mark.parametrize(
    ("options", "query_controls"),
    [
        ({"coarse_only": True}, True),
        ({"architecture": "multi_token", "num_visual_tokens_per_frame": 4}, False),
        ({"hard_attention": "top_k"}, True),
        ({"query_source": "fixed"}, True),
    ],
)
def test_every_kind_of_network_has_its_controls(options, query_controls):
    model = tiny.make_model(**options)
    batch = tiny.as_batch(tiny.rows_of(tiny.make_batch(model.config.tokens_per_frame), [0, 2]))
    items, truths = [clip("a", [0] * 3), clip("b", [0])], [truth_of(3), None]
    table = controls.score_controls(model, [("made", items, batch, truths)], 1, SILENT)
    counts = table.groupby("mode").size().to_dict()
    assert counts == {"shuffled_frames": 2, "first_frame": 2} | (
        {"static_query": 2, "oracle_query": 1} if query_controls else {}
    )


def test_the_oracle_attends_only_to_the_target():
    items, batch, truths = real_batch()
    table = controls.score_controls(tiny.make_model(), [("made", items, batch, truths)], 1, SILENT)
    oracle = table[(table["mode"] == "oracle_query") & (table["gaze_frames"] > 0)]
    assert oracle["peak_on_target"].tolist() == oracle["gaze_frames"].tolist() == [2, 1]
    assert oracle["mass_on_target"].to_numpy() == pytest.approx([2.0, 1.0])
    assert set(table[table["gaze_frames"] > 0]["mode"]) == {"static_query", "oracle_query"}


# ---------------------------------------------------------------- per source, per frame


def test_sources_are_told_apart():
    rows = [("x", "card", "fine", 1.0, 1), ("x", "card", "fine", 3.0, 0), ("y", "card", "fine", 7.0, 0)]
    table = pd.DataFrame(rows, columns=["source", "task", "mode", "loss_sum", "num_correct"]).assign(num_tokens=1)

    def score(rows):
        return statistics.score(*(rows[name].to_numpy() for name in controls.SUMS), 50, 1)

    found = breakdown.source_scores(table, score)
    assert {source: scores["card"]["fine"].loss for source, scores in found.items()} == {"x": 2.0, "y": 7.0}
    assert found["x"]["card"]["fine"].num_items == 2


def hopping(tokens, digits, **fields):
    """(packed sample, item) of a target that shows these digits and an answer of these scored tokens."""
    shown = types.SimpleNamespace(digits=digits)
    sample = types.SimpleNamespace(items=[types.SimpleNamespace(target=0)], objects=[shown])
    item = {"item": 0, "kind": "video", "input_ids": [9, *tokens], "score_mask": [False] + [True] * len(tokens)}
    return sample, item | fields


def test_answers_per_frame_are_recognised_by_the_truth():
    assert per_frame.is_per_frame(*hopping([31, 32, 31], (7, 1, 2, 1)), 4)
    assert not per_frame.is_per_frame(*hopping([31, 32, 33], (7, 1, 2, 1)), 4)  # another token for the same digit
    assert not per_frame.is_per_frame(*hopping([31, 32], (7, 1, 2, 1)), 4)  # too few
    assert not per_frame.is_per_frame(*hopping([31, 32, 31], (7, 1, 2, 1), kind="image"), 4)
    assert per_frame.is_per_frame(*hopping([31], (7, 7, 5, 5)), 2)  # two of four source frames were packed
    sample, item = hopping([31, 32, 31], (7, 1, 2, 1))
    sample.objects = None
    assert not per_frame.is_per_frame(sample, item, 4)


def test_scores_belong_to_the_frame_that_is_named():
    rows = pd.DataFrame(
        [
            per_frame.token_columns(np.array([1.0, 2.0, 6.0]), np.array([True, False, False])),
            per_frame.token_columns(np.array([3.0, 4.0]), np.array([True, True])),
            {"token_losses": None, "token_correct": None},
        ]
    )
    found = per_frame.aggregate(rows)
    assert found.loss == [None, 2.0, 3.0, 6.0]
    assert found.accuracy == [None, 1.0, 0.5, 0.0]
    assert found.num_items == [0, 2, 2, 1]
    assert per_frame.aggregate(rows[2:]) is None
    assert per_frame.aggregate(rows[[]]) is None
