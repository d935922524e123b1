"""Mixture and prefetch: exact shares, no repeats within an epoch, order from the seed alone."""

import numpy as np
import pytest

from pipeline_steps.streaming.loader import prefetch
from pipeline_steps.streaming.mixture import Mixture, interleave

GROUPS = {"a": list(range(100)), "b": list(range(100, 130)), "text": list(range(130, 200))}
WEIGHTS = {"a": 0.6, "b": 0.26, "text": 0.14}


def test_shares_hold_over_any_long_window():
    group, _ = interleave(np.array([0.36, 0.3, 0.2, 0.14]), 50_000)
    for start in range(0, 40_000, 997):
        share = (group[start : start + 10_000] == 3).mean()
        assert abs(share - 0.14) < 0.001
    text = np.cumsum(group == 3)
    assert np.abs(text - 0.14 * np.arange(1, 50_001)).max() < 4


def test_no_item_twice_in_an_epoch_of_its_family_and_every_item_once():
    mixture = Mixture(GROUPS, WEIGHTS, 2_000, seed=3)
    served = [mixture[position] for position in range(2_000)]
    for items in GROUPS.values():
        mine = [number for number in served if number in items]
        for epoch in range(len(mine) // len(items)):
            assert sorted(mine[epoch * len(items) : (epoch + 1) * len(items)]) == items


def test_order_is_a_function_of_seed_and_position():
    whole = Mixture(GROUPS, WEIGHTS, 500, seed=3)
    served = [whole[position] for position in range(500)]
    resumed = Mixture(GROUPS, WEIGHTS, 500, seed=3)
    assert [resumed[position] for position in range(250, 500)] == served[250:]
    other = Mixture(GROUPS, WEIGHTS, 500, seed=4)
    assert [other[position] for position in range(500)] != served


def test_statistics_count_what_is_served():
    statistics = Mixture(GROUPS, WEIGHTS, 1_000, seed=0).statistics()
    assert {name: row["num_samples"] for name, row in statistics.items()} == {"a": 600, "b": 260, "text": 140}
    assert statistics["text"]["epochs"] == 2.0


def test_an_empty_family_is_an_error():
    with pytest.raises(ValueError, match="no items of c; there are a, b, text"):
        Mixture(GROUPS, {"c": 1.0}, 10, seed=0)


@pytest.mark.parametrize("ahead", [0, 1, 3, 50])
def test_prefetch_keeps_the_order_and_delivers_errors_in_their_place(ahead):
    assert list(prefetch(lambda n: n * n, range(20), ahead)) == [n * n for n in range(20)]
    served = prefetch(lambda n: 12 // (3 - n), range(10), ahead)
    assert [next(served) for _ in range(3)] == [4, 6, 12]
    with pytest.raises(ZeroDivisionError):
        next(served)
