"""Scaling laws: known laws are found, intervals cover them, and nothing is stated where the runs do not tell."""

import numpy as np
import pytest

from pipeline_steps.common.study_results import UNDECIDED
from pipeline_steps.report import scaling_laws as laws

SIZES = (1e8, 2e8, 4e8)  # training FLOPs per sample
SAMPLES = np.array([5e3, 1e4, 2e4, 4e4])
NOISE = 0.03
REPEATS = 100


@pytest.fixture(autouse=True)
def fewer_draws(monkeypatch):
    monkeypatch.setattr(laws, "NUM_DRAWS", 500)


def chinchilla(size, samples, floor=0.1):
    """A loss with a best size at every budget: at size x samples = C it is where both terms are equal."""
    return floor * ((size / 2e8) ** -0.5 + (samples / 2e4) ** -0.5)


def grid(loss, rng=None, noise=NOISE, sizes=SIZES, samples=SAMPLES, factor=1.0):
    arms = []
    for place, size in enumerate(sizes):
        values = loss(size, samples)
        if rng is not None:
            values = values * np.exp(rng.normal(0, noise, len(samples)))
        arms.append(laws.make_arm(f"size{place}", factor * size * samples, samples, values))
    return arms


def power(exponent, scale=1.0):
    return lambda size, samples: scale * 1e6 * (size * samples) ** -exponent


def test_a_law_without_noise_is_found():
    law = laws.power_law(grid(power(0.4))[0])
    assert law.exponent == pytest.approx(0.4)
    assert law.interval == pytest.approx((0.4, 0.4), abs=1e-6)
    assert law.loss(1e12) == pytest.approx(1e6 * 1e12**-0.4)


def test_runs_of_one_budget_are_averaged_and_weighted():
    arm = laws.make_arm("a", [4e12, 1e12, 1e12], [4e4, 1e4, 1e4], [0.5, 1.0, 4.0])
    assert np.exp(arm.log_loss) == pytest.approx([2.0, 0.5])  # geometric mean
    assert arm.num_runs.tolist() == [2, 1]
    assert np.exp(arm.log_size) == pytest.approx(1e8)
    law = laws.power_law(arm)
    assert law.exponent == pytest.approx(1.0)
    assert law.interval is None


@pytest.mark.parametrize(
    ("samples", "losses", "message"),
    [([1e4, 1e4], [0.5, 0.4], "at least two budgets, found 1"), ([1e4, 2e4], [0.5, 0.0], "must be positive")],
)
def test_runs_without_a_law_are_refused(samples, losses, message):
    with pytest.raises(ValueError, match=message):
        laws.make_arm("a", 1e8 * np.array(samples), samples, losses)


def test_the_interval_of_the_exponent_covers():
    rng = np.random.default_rng(0)
    found = [laws.power_law(grid(power(0.3), rng)[0]).interval for _ in range(400)]
    assert 0.92 <= np.mean([low <= 0.3 <= high for low, high in found]) <= 0.98


def test_the_noise_is_that_of_the_runs():
    rng = np.random.default_rng(0)
    found = [laws.noise_of(grid(power(0.3), rng)) ** 2 for _ in range(REPEATS)]
    assert np.mean(found) ** 0.5 == pytest.approx(NOISE, rel=0.1)
    assert laws.noise_of(grid(power(0.3), samples=SAMPLES[:2])) is None


def test_the_best_size_is_found():
    samples = np.geomspace(2.5e3, 1.6e5, 25)
    low, middle, high = laws.optima(grid(chinchilla, samples=samples), noise=1e-4)
    assert (low.flops, middle.flops, high.flops) == pytest.approx((1e12, 4e12, 1.6e13))
    assert [entry.best for entry in (low, middle, high)] == ["size0", "size1", "size2"]
    assert middle.is_decided
    assert middle.size == pytest.approx(2e8, rel=1e-3)
    assert middle.losses[1] == pytest.approx(0.2, rel=1e-3)


def test_budgets_lie_within_those_of_every_size():
    arms = grid(chinchilla)
    found = laws.optima(arms, NOISE)
    lowest, highest = SIZES[-1] * SAMPLES[0], SIZES[0] * SAMPLES[-1]
    assert [found[0].flops, found[-1].flops] == pytest.approx([lowest, highest])
    apart = grid(chinchilla, sizes=(1e8, 1e10))
    assert laws.optima(apart, NOISE) == []


def test_sizes_that_are_the_same_are_rarely_told_apart():
    rng = np.random.default_rng(1)
    found = [laws.optima(grid(power(0.3), rng), NOISE) for _ in range(REPEATS)]
    assert np.mean([entry[1].is_decided for entry in found]) < 0.3
    assert np.mean([entry[1].interval is not None for entry in found]) < 0.1


def test_a_clear_best_size_is_decided_and_its_interval_covers():
    rng = np.random.default_rng(2)

    def valley(size, samples):  # the same best size at every budget
        return np.exp(2 * np.log(size / 2e8) ** 2) * (size * samples / 1e12) ** -0.2

    found = [laws.optima(grid(valley, rng), NOISE)[1] for _ in range(REPEATS)]
    assert np.mean([entry.best == "size1" and entry.is_decided for entry in found]) > 0.95
    covered = [entry.interval is not None and entry.interval[0] <= 2e8 <= entry.interval[1] for entry in found]
    assert np.mean(covered) > 0.8


def test_two_sizes_have_no_parabola():
    found = laws.optima(grid(chinchilla, sizes=SIZES[:2]), NOISE)
    assert {entry.size for entry in found} == {None}
    assert laws.minimum(np.array([1.0, 2.0, 3.0]), np.array([[3.0], [2.0], [1.0]]))[0] != 2  # falls to the edge
    assert np.isnan(laws.minimum(np.array([1.0, 2.0, 3.0]), np.array([[1.0], [2.0], [1.0]]))[0])  # a maximum


def series(exponent, at, rng=None, factor=1.0, noise=NOISE):
    """Arms with loss 1 at `at` training FLOPs."""
    return grid(lambda size, samples: (factor * size * samples / at) ** -exponent, rng, noise, factor=factor)


def test_a_crossing_is_found_and_its_interval_covers():
    place = 2e12
    exact = laws.crossing(("a", series(0.2, place)), ("b", series(0.8, place, factor=2.0)), noise=1e-4)
    assert exact.crossing == pytest.approx(place, rel=0.02)
    assert exact.verdict == "a lower before, b after"
    rng = np.random.default_rng(3)
    found = [
        laws.crossing(("a", series(0.2, place, rng)), ("b", series(0.8, place, rng, 2.0)), NOISE)
        for _ in range(REPEATS)
    ]
    stated = [entry for entry in found if entry.crossing is not None]
    assert len(stated) > 0.95 * REPEATS
    assert np.mean([entry.interval[0] <= place <= entry.interval[1] for entry in stated]) > 0.85


def test_an_order_that_never_changes_is_stated():
    entry = laws.crossing(("a", series(0.3, 1e12)), ("b", series(0.3, 4e12)), NOISE)
    assert entry.verdict == "a lower throughout"
    assert entry.crossing is None
    assert entry.ratios == pytest.approx((0.25**0.3, 0.25**0.3), rel=0.02)
    assert laws.crossing(("b", series(0.3, 4e12)), ("a", series(0.3, 1e12)), NOISE).verdict == "a lower throughout"


def test_series_that_are_the_same_are_undecided():
    rng = np.random.default_rng(4)
    found = [
        laws.crossing(("a", series(0.3, 1e12, rng)), ("b", series(0.3, 1e12, rng)), NOISE).verdict
        for _ in range(REPEATS)
    ]
    assert np.mean([verdict == UNDECIDED for verdict in found]) > 0.85


def test_series_without_a_common_budget_are_not_compared():
    assert laws.crossing(("a", series(0.3, 1e12)), ("b", series(0.3, 1e12, factor=1e6)), NOISE) is None


def test_nothing_is_read_off_beyond_the_budgets():
    arm = grid(chinchilla)[0]
    levels = arm.log_flops[[0, -1]] + [-0.1, 0.1]
    assert np.isnan(laws.at(arm, arm.log_loss[None], levels)).all()
    assert laws.at(arm, arm.log_loss[None], arm.log_flops)[0] == pytest.approx(arm.log_loss)
