"""Comparisons of training runs: by hand, and their coverage and error rates in simulations."""

import numpy as np
import pytest
from scipy import stats

from pipeline_steps.report.statistics import equivalence_power, share_interval
from pipeline_steps.study import statistics

RUNS, REPEATS = 8, 400


def gaussian(rng, count):
    return rng.normal(0.5, 0.03, count)


def stuck(share):
    """Runs at .55 that stay at .05 with this probability."""
    return lambda rng, count: np.where(rng.random(count) < share, 0.05, 0.55) + rng.normal(0, 0.02, count)


def skewed(rng, count):
    return np.minimum(0.1 + rng.gamma(0.5, 0.12, count), 1.0)


def between_backbones(rng, count):
    """Every run has its own backbones, so their variance is part of the runs' variance."""
    return 0.5 + rng.normal(0, 0.08, count) + rng.normal(0, 0.03, count)


WORLDS = {
    "gaussian": (gaussian, 0.5),
    "20 % stuck": (stuck(0.2), 0.45),
    "33 % stuck": (stuck(1 / 3), 0.55 - 0.5 / 3),
    "skewed": (skewed, 0.16),
    "between backbones": (between_backbones, 0.5),
}


def coverage(draw, mean, interval):
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(REPEATS):
        low, high = interval(draw(rng, RUNS))
        hits += low <= mean <= high
    return hits / REPEATS


@pytest.mark.parametrize("world", WORLDS)
def test_the_bounded_interval_covers_whatever_the_distribution(world, monkeypatch):
    monkeypatch.setattr(statistics, "NUM_DRAWS", 2000)
    assert coverage(*WORLDS[world], lambda values: statistics.bounded_interval(values, -1, 1)) >= 0.95


@pytest.mark.parametrize(
    ("world", "expected"), [("gaussian", 0.95), ("between backbones", 0.95), ("20 % stuck", 0.83), ("33 % stuck", 0.93)]
)
def test_the_t_interval_covers_less_where_runs_stay_on_a_plateau(world, expected):
    assert coverage(*WORLDS[world], statistics.t_interval) == pytest.approx(expected, abs=0.04)


def test_the_bounded_interval_allows_for_a_mode_that_was_not_seen():
    """Eight equal runs: 1 - .025^(1/8) = 36.9 % of all runs may be at the lower end of the range."""
    low, high = statistics.bounded_interval([0.9] * 8, 0.0, 1.0)
    unseen = 1 - 0.025 ** (1 / 8)
    assert low == pytest.approx((1 - unseen) * 0.9, abs=0.01)
    assert high == pytest.approx(0.9 + unseen * 0.1, abs=0.01)


def test_values_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"values from -0.2 to 0.5 are not within \[0, 1\]"):
        statistics.bounded_interval([-0.2, 0.5], 0, 1)


def test_the_sign_flip_test_by_hand():
    """Of eight patterns of three signs, two sums are as large as 1 + 2 + 3."""
    assert statistics.sign_flip_p([1, 2, 3]) == 2 / 8
    assert statistics.sign_flip_p([0.5] * 8) == 2 / 256
    assert statistics.sign_flip_p([0.0, 0.0]) == 1.0


def test_many_pairs_are_drawn_and_agree_with_the_normal_theory():
    values = np.random.default_rng(0).normal(0.2, 1.0, 40)
    assert statistics.sign_flip_p(values) == pytest.approx(stats.ttest_1samp(values, 0).pvalue, abs=0.02)


@pytest.mark.parametrize("world", WORLDS)
def test_arms_that_are_the_same_are_rarely_called_different(world):
    """Two arms whose runs come from one distribution: below 5 % false findings, with Holm over two groups."""
    draw, _ = WORLDS[world]
    rng = np.random.default_rng(1)
    found = 0
    for _ in range(REPEATS):
        pairs = {("arm", group): draw(rng, RUNS) - draw(rng, RUNS) for group in ("gaze", "reading")}
        p_values = [statistics.sign_flip_p(values) for values in pairs.values()]
        found += min(statistics.holm(p_values)) < 0.05
    assert found / REPEATS <= 0.07


def test_verdicts():
    pairs = {
        ("A6", "gaze"): np.full(8, 0.5) + np.linspace(0, 0.05, 8),
        ("A6", "reading"): np.linspace(-0.02, 0.02, 8),
        ("B1", "gaze"): -np.full(8, 0.3),
        ("B1", "reading"): np.array([0.3, -0.3, 0.2, -0.2, 0.1, -0.1, 0.3, -0.2]),
    }
    found = statistics.compare(pairs, margin=0.03)
    assert [entry.verdict for entry in found] == ["better", "equal", "worse", "undecided"]
    assert found[0].p_value == 2 / 256
    assert found[0].p_adjusted == pytest.approx(4 * 2 / 256)
    assert found[1].smallest_margin < 0.03 < found[3].smallest_margin


def test_unmatched_budgets_give_no_verdict():
    found = statistics.compare({("B1", "gaze"): np.full(8, 0.5)}, 0.03, matched=lambda arm: False)
    assert found[0].verdict == "unmatched budgets"


@pytest.mark.parametrize("values", [[0.5], [0.5, 0.6], [0.01, 0.011]])
def test_fewer_than_three_pairs_get_no_verdict(values):
    entry = statistics.compare({("A6", "gaze"): values}, 0.03)[0]
    assert (entry.verdict, entry.smallest_margin) == ("too few runs", None)


def test_three_pairs_cannot_decide():
    """Three pairs reach p = .25 at best: undecided, however large the difference."""
    assert statistics.compare({("A6", "gaze"): [0.5, 0.6, 0.55]}, 0.03)[0].verdict == "undecided"


def test_one_pair_has_no_t_interval():
    entry = statistics.compare({("A6", "gaze"): [0.5]}, 0.03)[0]
    assert (entry.interval, entry.smallest_margin, entry.verdict) == (None, None, "too few runs")


@pytest.mark.parametrize(("spread", "margin"), [(0.01, 0.03), (0.03, 0.03), (0.08, 0.03), (0.08, 0.1)])
def test_the_power_of_equality_is_how_often_equal_arms_are_called_equal(spread, margin):
    rng = np.random.default_rng(3)
    observed = rng.normal(0, 1, RUNS)
    observed *= spread / observed.std(ddof=1)
    called = 0
    for _ in range(1000):
        verdict = statistics.compare({("arm", "gaze"): rng.normal(0, spread, RUNS)}, margin)[0].verdict
        called += verdict == "equal"
    assert equivalence_power(observed, margin) == pytest.approx(called / 1000, abs=0.04)


@pytest.mark.parametrize(
    ("share", "gap", "expected"), [(0.0, 0.03, 0.05), (0.1, 0.045, 0.3), (0.2, 0.09, 0.13), (1 / 3, 0.15, 0.03)]
)
def test_equality_cannot_see_a_plateau_that_no_run_shows(share, gap, expected):
    """A shift by the margin passes for equal in 5 % of studies. An arm of which one run in ten stays on a plateau, so
    that its mean is 4.5 points lower, passes in 30 %: among eight runs there may be none. A study therefore states
    which shares it may have missed; here that covers every study that missed them."""
    rng = np.random.default_rng(4)
    called, missed = 0, share_interval(0, RUNS)[1]
    for _ in range(2 * REPEATS):
        base, arm = rng.normal(0.5, 0.02, (2, RUNS))
        is_stuck = rng.random(RUNS) < share
        arm -= np.where(is_stuck, gap / share, 0) if share else gap
        if statistics.compare({("arm", "gaze"): base - arm}, 0.03)[0].verdict == "equal":
            assert not is_stuck.any()
            called += 1
    assert share < missed
    assert called / (2 * REPEATS) == pytest.approx(expected, abs=0.04)


def test_power_needs_three_pairs():
    assert equivalence_power([0.1, 0.1], 0.03) is None
    assert equivalence_power([0.1, 0.1, 0.1], 0.03) == 1.0


def test_share_interval_is_clopper_pearson():
    low, high = share_interval(8, 8)
    assert (low, high) == (pytest.approx(0.025 ** (1 / 8)), 1.0)
