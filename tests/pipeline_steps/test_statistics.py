"""The statistics of comparisons on synthetic runs with known answers."""

import numpy as np
import pytest
from scipy import stats

from pipeline_steps.report import statistics
from pipeline_steps.report.statistics import DIFFERENCE, Effect, Resamples, holm, paired_effect


def test_ratio_of_a_constant_factor_is_exact():
    base = np.array([[1.0, 2.0, 3.0, 4.0], [2.0, 2.0, 2.0, 2.0]])
    found = paired_effect(base, 1.5 * base, np.ones(4), Resamples([2, 2], 50, 0))
    assert found.ratio == pytest.approx(1.5)
    assert found.ratio_interval == pytest.approx((1.5, 1.5))
    assert found.p_value == pytest.approx(0.0, abs=1e-12)


def test_tasks_weigh_the_same_and_tokens_within_a_task():
    """Task 1 (one item of ten tokens, one of thirty): (10 + 60) / 40 = 1.75; task 2: 4 / 2 = 2; mean 1.875."""
    sums, tokens = np.array([[10.0, 60.0, 4.0]]), np.array([10.0, 30.0, 2.0])
    _, observed = Resamples([2, 1], 5, 0).means(sums, tokens)
    assert observed == pytest.approx([1.875])


def test_seeds_part_of_the_error_by_hand():
    """Differences .1, .2, .3 of items that are all the same: s = .1, error .1 / sqrt(3), t(2) at 97.5 % = 4.3027."""
    arm = np.array([[0.1], [0.2], [0.3]]) * np.ones((3, 8))
    found = paired_effect(np.zeros((3, 8)), arm, np.ones(8), Resamples([8], 100, 0), DIFFERENCE)
    assert found.items_error == pytest.approx(0.0, abs=1e-12)
    assert found.seeds_error == pytest.approx(0.057735, abs=1e-6)
    assert found.interval == pytest.approx((0.2 - 4.3027 * 0.057735, 0.2 + 4.3027 * 0.057735), abs=1e-4)
    assert found.p_value == pytest.approx(stats.ttest_1samp([0.1, 0.2, 0.3], 0.0).pvalue)


def test_items_part_of_the_error_is_the_standard_error_of_the_mean():
    rng = np.random.default_rng(0)
    difference = rng.normal(0.2, 1.0, 400)
    base = np.zeros((2, 400))
    found = paired_effect(base, base + difference, np.ones(400), Resamples([400], 4000, 0), DIFFERENCE)
    assert found.seeds_error == 0.0
    assert found.items_error == pytest.approx(difference.std() / 20, rel=0.05)
    assert found.items_degrees == 399
    assert found.p_value == pytest.approx(stats.ttest_1samp(difference, 0.0).pvalue, rel=0.5)


def test_items_are_paired():
    """Items of very different difficulty, and an arm that is 2 % worse on each: the difficulty cancels."""
    base = np.random.default_rng(0).gamma(0.5, 1.0, 200)[None] * np.ones((3, 1)) + 1e-3
    found = paired_effect(base, 1.02 * base, np.ones(200), Resamples([200], 200, 0))
    assert found.ratio_interval == pytest.approx((1.02, 1.02))


def test_the_same_items_for_every_seed_are_no_new_evidence():
    """Copies of one run add seeds, not items: the items' error stays."""
    rng = np.random.default_rng(1)
    base, arm = rng.gamma(2.0, 1.0, (2, 1, 100))
    errors = [
        paired_effect(base.repeat(copies, 0), arm.repeat(copies, 0), np.ones(100), Resamples([100], 500, 0)).items_error
        for copies in (1, 5)
    ]
    assert errors[0] == pytest.approx(errors[1])


def test_one_seed_says_nothing_about_seeds():
    base = np.random.default_rng(0).gamma(2.0, 1.0, (1, 50))
    found = paired_effect(base, 2 * base, np.ones(50), Resamples([50], 100, 0))
    assert found.seeds_error is None
    assert found.p_value is None


def test_opposite_seeds_give_an_interval_over_no_effect():
    base = np.ones((3, 50))
    found = paired_effect(base, base * [[0.7], [1.4], [1.3]], np.ones(50), Resamples([50], 100, 0))
    assert found.ratio_interval[0] < 1 < found.ratio_interval[1]
    assert found.p_value > 0.3


def test_a_loss_of_zero_is_refused():
    with pytest.raises(ValueError, match="a loss of 0 has no ratio"):
        paired_effect(np.zeros((2, 4)), np.ones((2, 4)), np.ones(4), Resamples([4], 10, 0))


@pytest.mark.parametrize(("value", "p"), [(0.0, 0.0), (0.09, 0.2), (0.2, 0.97)])
def test_two_one_sided_tests_by_hand(value, p):
    """Error .01, ten degrees of freedom, margin .1: the nearer border decides; at .09 it is one error away."""
    effect = Effect(per_seed=(value,) * 11, items_error=0.0, items_degrees=5, seeds_error=0.01)
    expected = stats.t.sf((0.1 - value) / 0.01, 10)
    assert effect.p_equivalent(-0.1, 0.1) == pytest.approx(expected)
    assert effect.p_equivalent(-0.1, 0.1) == pytest.approx(p, abs=0.04)


def test_one_sided_tests_at_half_the_level_agree_with_the_interval():
    effect = Effect(per_seed=(0.1, 0.2, 0.3), items_error=0.03, items_degrees=90, seeds_error=0.04)
    low, high = effect.interval
    assert effect.p_above(low) == pytest.approx(statistics.ALPHA / 2)
    assert effect.p_below(high) == pytest.approx(statistics.ALPHA / 2)


def test_holm_by_hand():
    """.01 x 4, .02 x 3, then .03 x 2 = .06 and .04 x 1, raised to the one before it."""
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def simulated_experiment(rng, num_seeds, num_items=60, seed_spread=0.1):
    """Losses of two arms with a true ratio of 1.2: difficulty of items, luck of seeds, noise of both."""
    items = rng.gamma(2.0, 0.5, num_items)
    arms = []
    for ratio in (1.0, 1.2):
        luck = np.exp(rng.normal(0, seed_spread, (num_seeds, 1)))
        noise = rng.gamma(4.0, 0.25, num_items) * rng.gamma(8.0, 0.125, (num_seeds, num_items))
        arms.append(ratio * luck * items * noise)
    return arms


@pytest.mark.parametrize(("num_seeds", "seed_spread"), [(3, 0.4), (3, 0.1), (3, 0.0), (8, 0.1)])
def test_the_interval_covers_the_truth_as_often_as_it_says(num_seeds, seed_spread):
    """95 % of the intervals cover the true ratio: 600 experiments, binomial error .009."""
    rng, covered, resamples = np.random.default_rng(0), [], Resamples([30, 30], 200, 0)
    for _ in range(600):
        base, arm = simulated_experiment(rng, num_seeds, seed_spread=seed_spread)
        low, high = paired_effect(base, arm, np.ones(60), resamples).ratio_interval
        covered.append(low < 1.2 < high)
    assert 0.925 < np.mean(covered) < 0.985


def test_percentiles_of_three_seeds_would_cover_too_rarely():
    """Why the interval is not the resamples' percentiles."""
    rng, covered, resamples = np.random.default_rng(0), [], Resamples([30, 30], 200, 0)
    for _ in range(300):
        base, arm = simulated_experiment(rng, 3, seed_spread=0.4)
        (base_drawn, _), (arm_drawn, _) = (resamples.means(part, np.ones(60)) for part in (base, arm))
        seeds = rng.integers(0, 3, (200, 3))
        ratios = np.take_along_axis(np.log(arm_drawn / base_drawn), seeds, 1).mean(1)
        low, high = np.percentile(ratios, (2.5, 97.5))
        covered.append(low < np.log(1.2) < high)
    assert np.mean(covered) < 0.9


def test_false_findings_stay_at_the_level():
    """Without an effect at most 5 % of the p-values are below .05 (the interval is a little wide where seeds and items
    weigh alike), and Holm's hold that for a table of five."""
    rng, p_values, resamples = np.random.default_rng(3), [], Resamples([40], 200, 0)
    for _ in range(500):
        base, arm = (rng.gamma(2.0, 0.5, 40) * np.exp(rng.normal(0, 0.1, (3, 1))) for _ in range(2))
        p_values.append(paired_effect(base, arm, np.ones(40), resamples).p_value)
    assert 0.01 < np.mean(np.array(p_values) < 0.05) < 0.07
    tables = [min(holm(p_values[start : start + 5])) < 0.05 for start in range(0, 500, 5)]
    assert np.mean(tables) < 0.12
