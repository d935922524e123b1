"""Mixture: exact shares, no repeats within an epoch, order from the seed alone, every item in one entry or none."""

import hashlib

import numpy as np
import pytest

from pipeline_steps.common.errors import UserError
from pipeline_steps.streaming.mixture import Mixture, interleave, make_groups, order_seed
from pipeline_steps.training.schema import MixtureEntry
from tests.pipeline_steps.packed import Clip, columns_only, stage

GROUPS = {"a": list(range(100)), "b": list(range(100, 130)), "text": list(range(130, 200))}
WEIGHTS = {"a": 0.6, "b": 0.26, "text": 0.14}
TASKS = ("image", "caption", "gist", "card", "follow", "ask_colour", "ask_place", "text")


def entries(*named):
    return tuple(MixtureEntry(source=source, task=task, weight=weight) for source, task, weight in named)


def data(*named):
    """One item for every (source, task), text-only where the task is `text`."""
    kinds = [("text", 0) if task == "text" else ("video", 2) for _, task in named]
    return columns_only(
        [
            Clip(f"k{n}", kind, frames, source=source, tasks=(task,))
            for n, ((source, task), (kind, frames)) in enumerate(zip(named, kinds, strict=True))
        ]
    )


def test_group_shares_hold_in_every_long_window():
    group, _ = interleave(np.array([0.36, 0.3, 0.2, 0.14]), 50_000)
    for start in range(0, 40_000, 997):
        share = (group[start : start + 10_000] == 3).mean()
        assert abs(share - 0.14) < 0.001
    text = np.cumsum(group == 3)
    assert np.abs(text - 0.14 * np.arange(1, 50_001)).max() < 4


@pytest.mark.parametrize("name", ["stage1", "stage2", "stage3"])
def test_text_share_holds_in_every_ten_thousand_samples(name):
    world = data(*[("world", TASKS[n % 8]) for n in range(400)])
    groups = make_groups(world, stage(name))
    order = Mixture(groups.items, groups.weights, 60_000, seed=5).order
    text = np.cumsum(np.concatenate([[0], world.index.is_text[order]]))
    shares = (text[10_000:] - text[:-10_000]) / 10_000  # of every window
    assert 0.135 < shares.min() <= shares.max() < 0.145


def test_every_item_occurs_once_per_epoch_of_its_task():
    order = Mixture(GROUPS, WEIGHTS, 2_000, seed=3).order.tolist()
    for items in GROUPS.values():
        mine = [number for number in order if number in items]
        for epoch in range(len(mine) // len(items)):
            assert sorted(mine[epoch * len(items) : (epoch + 1) * len(items)]) == items


def test_order_depends_only_on_seed_and_weights():
    order = Mixture(GROUPS, WEIGHTS, 500, seed=3).order.tolist()
    assert Mixture(GROUPS, WEIGHTS, 500, seed=3).order.tolist() == order
    assert Mixture(GROUPS, WEIGHTS, 500, seed=4).order.tolist() != order
    assert Mixture(GROUPS, {**WEIGHTS, "a": 0.7}, 500, seed=3).order.tolist() != order


@pytest.mark.parametrize(
    ("name", "mixture", "seed", "first", "sha256"),
    [
        ("stage1", None, None, [748, 556, 385, 835, 721, 505, 457, 817, 292, 196, 34, 793], "b4d7ca50c30a2561"),
        ("stage2", None, None, [715, 671, 364, 341, 31, 194, 880, 807, 34, 597, 628, 197], "3a4b86148aeeb1a7"),
        ("stage3", None, None, [322, 336, 436, 867, 679, 419, 400, 428, 10, 791, 700, 522], "29448c5570ee1413"),
        (
            "stage2",
            entries(("*", "gist", 2.0), ("*", "*", 1.0)),
            7,
            [171, 546, 154, 701, 776, 228, 882, 390, 576, 411, 322, 8],
            "ef14ad0afaea057c",
        ),
    ],
)
def test_golden_orders(name, mixture, seed, first, sha256):
    """What a recipe trains on, and when, does not move."""
    world = data(*[("world", TASKS[(n * n + n // 3) % 8]) for n in range(900)])
    groups = make_groups(world, stage(name, **({"mixture": mixture} if mixture else {})))
    order = Mixture(groups.items, groups.weights, 3_000, seed=order_seed(1, name) if seed is None else seed).order
    assert order[:12].tolist() == first
    assert hashlib.sha256(order.tobytes()).hexdigest()[:16] == sha256


def test_every_item_goes_to_the_most_specific_matching_entry():
    world = data(("a", "x"), ("a", "y"), ("b", "x"), ("b", "y"), ("c", "z"), ("a", "text"), ("b", "text"))
    mixture = entries(("*", "*", 1.0), ("a", "*", 2.0), ("*", "x", 3.0), ("a", "x", 4.0))
    groups = make_groups(world, stage(mixture=mixture, text_source="b"))
    items = {name: numbers.tolist() for name, numbers in groups.items.items()}
    assert items == {"x": [2], "a/x": [0], "y": [3], "z": [4], "a/y": [1], "text": [6]}
    assert groups.weights["a/x"] == pytest.approx(0.86 * 0.4)
    assert groups.weights["y"] == groups.weights["z"] == pytest.approx(0.86 * 0.05)  # half of the entry's each
    assert groups.weights["text"] == pytest.approx(0.14)
    assert groups.unmatched == {"a/text": 1}


def test_items_without_a_matching_entry_are_reported():
    world = data(("a", "x"), ("a", "y"), ("a", "y"), ("b", "x"), ("a", "text"))
    groups = make_groups(world, stage(mixture=entries(("a", "x", 1.0)), text_share=0.0))
    assert groups.unmatched == {"a/text": 1, "a/y": 2, "b/x": 1}
    assert {name: numbers.tolist() for name, numbers in groups.items.items()} == {"a/x": [0]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mixture": entries(("*", "cards", 1.0))},
            "no items of cards in tokens/train, which has a/card, a/gist, b/gi",
        ),
        ({"mixture": entries(("c", "gist", 1.0))}, "no items of c/gist"),
        ({"mixture": entries(("*", "card", 1.0), ("a", "*", 1.0), ("a", "card", 1.0))}, r"no items of card in"),
        ({"mixture": entries(("*", "card", 1.0), ("*", "card", 2.0))}, "card is listed more than once"),
        ({"text_source": "smoltalk"}, r"text_share is 0.14 but .* has 0 text-only samples of the source 'smoltalk'"),
    ],
)
def test_mixtures_that_do_not_match_the_data_are_rejected(changes, message):
    world = data(("a", "card"), ("a", "gist"), ("b", "gist"), ("a", "text"))
    with pytest.raises(UserError, match=message):
        make_groups(world, stage(**{"mixture": entries(("*", "*", 1.0)), **changes}))


def test_mixture_statistics_count_the_served_samples():
    statistics = Mixture(GROUPS, WEIGHTS, 1_000, seed=0).statistics()
    assert {name: row["num_samples"] for name, row in statistics.items()} == {"a": 600, "b": 260, "text": 140}
    assert statistics["text"]["epochs"] == 2.0


def test_empty_group_is_an_error():
    with pytest.raises(ValueError, match="no items of c; the groups are a, b, text"):
        Mixture(GROUPS, {"c": 1.0}, 10, seed=0)
