"""Scaling laws: known laws are found, intervals cover them, and nothing is stated where the runs do not tell."""

import numpy as np
import pandas as pd
import pytest

from pipeline_steps.common.study_results import TOO_FEW, UNDECIDED
from pipeline_steps.report import scaling_laws as laws

SIZES = (1e8, 2e8, 4e8)  # training FLOPs per sample
SAMPLES = np.array([5e3, 1e4, 2e4, 4e4])
NOISE = 0.03  # of the logarithm of a run's loss
SHIFT = 0.06  # of an arm's logarithm in one seed
REPEATS = 250
MIDDLE = 1e12


def make(name, loss, size=1e8, samples=SAMPLES, seeds=3, rng=None):
    """An arm with `loss(size, samples)`; rng: every run has noise, and every seed a shift that its runs share."""
    rows = []
    for seed in range(seeds):
        shift = 0 if rng is None else rng.normal(0, SHIFT)
        for count in samples:
            noise = 0 if rng is None else shift + rng.normal(0, NOISE)
            rows.append((seed, f"x{count:g}", size * count, count, loss(size, count) * np.exp(noise)))
    arm, left_out = laws.make_arm(name, pd.DataFrame(rows, columns=["seed", "budget", "flops", "samples", "loss"]))
    assert left_out == 0
    return arm


def power(exponent, at=MIDDLE):
    """A loss of 1 at `at` training FLOPs."""
    return lambda size, samples: (size * samples / at) ** -exponent


def series(loss, sizes=SIZES, **options):
    return [make(f"size{place}", loss, size, **options) for place, size in enumerate(sizes)]


def chinchilla(size, samples):
    """A loss with a best size at every budget: at C = size x samples it is where both terms are equal."""
    return 0.1 * ((size / 2e8) ** -0.5 + (samples / 2e4) ** -0.5)


# ---------------------------------------------------------------- the runs of an arm


def table(cells):
    rows = [(seed, budget, float(budget), float(budget), 1 / budget) for seed, budget in cells]
    return pd.DataFrame(rows, columns=["seed", "budget", "flops", "samples", "loss"])


@pytest.mark.parametrize(
    ("cells", "seeds", "budgets", "left_out"),
    [
        ([(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4)], (1, 2), 3, 0),
        ([(1, 1), (1, 2), (1, 4), (1, 8), (2, 1), (2, 2)], (1, 2), 2, 2),  # four runs either way: more seeds
        ([(1, 1), (1, 2), (1, 4), (1, 8), (2, 1), (2, 2), (3, 2), (3, 1)], (1, 2, 3), 2, 2),
        ([(1, 1), (1, 2), (2, 1), (3, 1), (4, 1), (5, 1)], (1,), 2, 4),  # one budget has no law
        ([(1, 1), (1, 2), (2, 2), (2, 4), (3, 1)], (1,), 2, 3),  # budgets that no two seeds share
        (
            [(n, b) for n, bs in ((1, (1, 2, 4, 8)), (2, (1, 2, 4, 16)), (3, (1, 2, 8, 16))) for b in bs],
            (1, 2, 3),
            2,
            6,
        ),
    ],
)
def test_the_largest_complete_grid_is_used(cells, seeds, budgets, left_out):
    arm, rest = laws.make_arm("a", table(cells))
    assert (arm.seeds, arm.log_loss.shape, rest) == (seeds, (len(seeds), budgets), left_out)
    again, _ = laws.make_arm("a", table(cells[::-1]))
    assert np.array_equal(again.log_flops, arm.log_flops)
    assert (np.diff(arm.log_flops) > 0).all()


def test_an_arm_of_one_budget_has_no_law():
    assert laws.make_arm("a", table([(1, 1), (2, 1)])) == (None, 2)
    assert laws.make_arm("a", table([])) == (None, 0)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("column", ["loss", "flops", "samples"])
def test_a_value_without_a_logarithm_is_refused_by_name(value, column):
    runs = table([(1, 1), (1, 2), (2, 1), (2, 2)])
    runs.loc[2, column] = value
    with pytest.raises(ValueError, match=rf"a, budget 1, seed 2: {column} is {value}"):
        laws.make_arm("a", runs)


def test_budgets_of_equal_compute_are_refused():
    runs = table([(1, 1), (1, 2)])
    runs["flops"] = 5.0
    with pytest.raises(ValueError, match="a: budgets 1, 2 of a seed have equal training FLOPs"):
        laws.make_arm("a", runs)


def test_the_bend_is_what_straight_lines_miss():
    samples = np.geomspace(1e4, 8e4, 4)
    arm = make("a", lambda size, count: np.exp(np.log(count / 1e4) ** 2), samples=samples)
    middles = (np.log(samples[:-1] * samples[1:]) / 2)[None]
    missed = laws.interpolated(arm, [0], middles[0] + np.log(1e8))[0] - (middles[0] - np.log(1e4)) ** 2
    assert arm.bend == pytest.approx(missed.max())
    assert make("a", power(0.3)).bend == pytest.approx(0, abs=1e-12)
    assert make("a", power(0.3), samples=samples[:2]).bend == float("inf")


# ---------------------------------------------------------------- power laws


def test_a_law_without_noise_is_found():
    law = laws.power_law(make("a", power(0.4)))
    assert law.exponents == pytest.approx([0.4] * 3)
    assert law.interval == pytest.approx((0.4, 0.4))
    assert law.error == pytest.approx(0, abs=1e-9)
    assert law.verdict == "falls"
    assert laws.power_law(make("a", power(-0.1))).verdict == "rises"


def test_the_interval_of_the_exponent_covers():
    rng = np.random.default_rng(0)
    found = [laws.power_law(make("a", power(0.3), rng=rng)).interval for _ in range(REPEATS)]
    assert 0.92 <= np.mean([low <= 0.3 <= high for low, high in found]) <= 0.98


def test_a_single_seed_has_the_interval_of_its_line_and_no_verdict():
    rng = np.random.default_rng(0)
    found = [laws.power_law(make("a", power(0.3), seeds=1, rng=rng)) for _ in range(REPEATS)]
    assert {law.verdict for law in found} == {TOO_FEW}
    assert 0.92 <= np.mean([law.interval[0] <= 0.3 <= law.interval[1] for law in found]) <= 0.98
    assert laws.power_law(make("a", power(0.3), seeds=1, samples=SAMPLES[:2])).interval is None
    assert laws.power_law(make("a", power(0.3), seeds=2)).verdict == TOO_FEW


def test_a_loss_that_does_not_depend_on_compute_is_undecided():
    rng = np.random.default_rng(1)
    verdicts = [laws.power_law(make("a", power(0.0), rng=rng)).verdict for _ in range(REPEATS)]
    assert verdicts.count(UNDECIDED) >= 0.92 * REPEATS


# ---------------------------------------------------------------- sizes


def test_the_best_size_is_found():
    arms = series(chinchilla, samples=np.geomspace(2.5e3, 1.6e5, 25))
    low, middle, high = laws.best_sizes(arms)
    assert (low.flops, middle.flops, high.flops) == pytest.approx((1e12, 4e12, 1.6e13))
    assert [entry.verdict for entry in (low, middle, high)] == ["size0", "size1", "size2"]
    assert middle.size == pytest.approx(2e8, rel=1e-3)
    assert middle.losses["size1"] == pytest.approx(0.2, rel=1e-3)
    assert laws.best_sizes(arms[::-1])[0] == low  # whatever their order in the study


def test_budgets_lie_within_those_of_every_size():
    found = laws.best_sizes(series(chinchilla))
    lowest, highest = SIZES[-1] * SAMPLES[0], SIZES[0] * SAMPLES[-1]
    assert [found[0].flops, found[-1].flops] == pytest.approx([lowest, highest])
    assert laws.best_sizes(series(chinchilla, sizes=(1e8, 1e10))) == []
    assert laws.best_sizes(series(chinchilla, sizes=(1e8,))) == []
    arm = make("a", chinchilla)
    with pytest.raises(ValueError, match="a: FLOPs are known from 5e\\+11 to 4e\\+12 only"):
        laws.interpolated(arm, [0], arm.log_flops[0, -1:] + 0.1)


def test_sizes_that_are_the_same_are_rarely_told_apart():
    """Of three equal sizes one is called the best if it beats both others, pair by pair, without a correction."""
    rng = np.random.default_rng(1)
    found = [laws.best_sizes(series(power(0.3), rng=rng))[1] for _ in range(REPEATS)]
    assert np.mean([entry.verdict != UNDECIDED for entry in found]) < 0.06
    assert np.mean([entry.size is not None for entry in found]) < 0.3


def test_a_clear_best_size_is_decided_and_its_interval_covers():
    rng = np.random.default_rng(2)

    def valley(size, samples):  # the same best size at every budget
        return np.exp(2 * np.log(size / 2e8) ** 2) * power(0.2)(size, samples)

    found = [laws.best_sizes(series(valley, seeds=5, rng=rng))[1] for _ in range(REPEATS)]
    assert np.mean([entry.verdict == "size1" for entry in found]) > 0.95
    assert 0.92 <= np.mean([entry.interval[0] <= 2e8 <= entry.interval[1] for entry in found]) <= 0.98


def test_few_seeds_or_sizes_state_nothing():
    few = laws.best_sizes(series(chinchilla, seeds=2, samples=np.geomspace(2.5e3, 1.6e5, 25)))
    assert {(entry.verdict, entry.size, entry.num_seeds) for entry in few} == {(TOO_FEW, None, 2)}
    assert {entry.size for entry in laws.best_sizes(series(chinchilla, sizes=SIZES[:2]))} == {None}
    assert {entry.size for entry in laws.best_sizes(series(chinchilla, sizes=(1e8, 1e8, 2e8)))} == {None}
    ties = laws.best_sizes(series(lambda size, samples: 1.0))
    assert {entry.verdict for entry in ties} == {UNDECIDED}
    sizes = np.array([1.0, 2.0, 3.0])
    assert laws.minimum(sizes, np.array([[5.0], [2.0], [3.0]]))[0] == pytest.approx(2.25)
    assert np.isnan(laws.minimum(sizes, np.array([[9.0], [4.0], [1.0]]))[0])  # at 4: not within the sizes
    assert np.isnan(laws.minimum(sizes, np.array([[1.0], [2.0], [1.0]]))[0])  # a maximum


@pytest.mark.parametrize("bent", [lambda flops: 0.2 + 1e12 / flops, lambda flops: 1 + (flops / 1e12) ** -0.5])
def test_a_bent_law_that_sizes_share_makes_none_the_best_and_no_crossing(bent):
    """Straight lines between budgets are wrong for all seeds alike, and there is hardly any noise to hide it."""
    rng = np.random.default_rng(5)
    samples = np.array([5e3, 1.7e4, 5e4, 1e5])
    found = []
    for _ in range(40):
        arms = [
            make(f"{size:g}", lambda size, count: bent(size * count) * np.exp(rng.normal(0, 0.003)), size, samples)
            for size in (1e8, 1.3e8, 1.66e8)
        ]
        found += [entry.verdict for entry in (*laws.best_sizes(arms), laws.crossing(*arms[:2]))]
    assert found.count(UNDECIDED) >= 0.9 * len(found)
    two = [
        make(name, lambda size, count: bent(size * count), size, samples[:2]) for name, size in (("a", 1e8), ("b", 2e8))
    ]
    assert laws.crossing(*two).verdict == UNDECIDED


# ---------------------------------------------------------------- two arms


def test_a_crossing_is_found_and_its_interval_covers():
    exact = laws.crossing(make("a", power(0.2)), make("b", power(0.8), size=2e8))
    assert exact.flops == pytest.approx((1e12, 4e12))
    exact = laws.crossing(make("a", power(0.2, 2e12)), make("b", power(0.8, 2e12), size=2e8))
    assert exact.crossing == pytest.approx(2e12)
    assert exact.verdict == "a lower before, b after"
    assert exact.ratios == pytest.approx((0.5**0.6, 2**0.6))
    rng = np.random.default_rng(3)
    found = [
        laws.crossing(make("a", power(0.2, 2e12), rng=rng), make("b", power(1.4, 2e12), size=2e8, rng=rng))
        for _ in range(REPEATS)
    ]
    stated = [entry for entry in found if entry.crossing is not None]
    assert len(stated) > 0.9 * REPEATS
    assert np.mean([entry.interval[0] <= 2e12 <= entry.interval[1] for entry in stated]) > 0.9


def test_an_order_that_never_changes_is_stated():
    for pair in (("a", 1e12), ("b", 4e12)), (("b", 4e12), ("a", 1e12)):
        entry = laws.crossing(*(make(name, power(0.3, at)) for name, at in pair))
        assert entry.verdict == "a lower throughout"
        assert entry.crossing is None
    assert entry.ratios == pytest.approx((4**0.3, 4**0.3))


def test_arms_that_are_the_same_are_rarely_told_apart():
    rng = np.random.default_rng(4)
    found = [laws.crossing(*(make(name, power(0.3), rng=rng) for name in "ab")) for _ in range(REPEATS)]
    assert np.mean([entry.verdict != UNDECIDED for entry in found]) < 0.08
    assert 0.92 <= np.mean([entry.intervals[0][0] <= 1 <= entry.intervals[0][1] for entry in found]) <= 0.98


def test_an_order_that_changes_to_and_fro_is_undecided():
    wave = dict(zip(SAMPLES, (0.9, 1.1, 0.9, 1.1), strict=True))
    entry = laws.crossing(make("a", lambda size, samples: wave[samples]), make("b", lambda size, samples: 1.0))
    assert (entry.crossing, entry.verdict) == (None, UNDECIDED)


def test_arms_without_a_common_budget_or_seed_are_not_compared():
    first = make("a", power(0.3))
    assert laws.crossing(first, make("b", power(0.3), size=1e14)) is None
    others = table([(seed, budget) for seed in (7, 8, 9) for budget in (1e12, 2e12)])
    assert laws.crossing(first, laws.make_arm("b", others)[0]) is None
    assert laws.crossing(make("a", power(0.3), seeds=2), make("b", power(0.3), seeds=2)).verdict == TOO_FEW
