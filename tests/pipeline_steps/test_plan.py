"""Batches planned before the run: budgets kept, every sample in its window once, ranks that share every step."""

import itertools

import numpy as np
import pytest
from scipy import stats

from pipeline_steps.common.errors import UserError
from pipeline_steps.streaming.plan import batch_bounds, make_plan
from tests.pipeline_steps.packed import Clip, clips, columns_only, streaming

WORLD = columns_only(clips(400, text_every=7))
FRAMES = WORLD.index.shown_frames(2)
TOKENS = WORLD.index.num_tokens + FRAMES * 3


def order(num_samples=2_000, seed=0):
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permutation(400) for _ in range(-(-num_samples // 400))])[:num_samples]


def plan(items, *, batch_size=32, seed=0, **batching):
    return make_plan(items, WORLD, streaming(batching=batching), batch_size=batch_size, tokens_per_frame=3, seed=seed)


def batches(made):
    return [made.items(step).tolist() for step in range(made.num_steps)]


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def test_sample_batches_keep_the_order_and_the_last_may_be_short():
    made = plan(order(100))
    assert (made.num_steps, made.num_samples) == (4, 100)
    assert [len(batch) for batch in batches(made)] == [32, 32, 32, 4]
    assert flat(batches(made)) == order(100).tolist()
    assert [made.samples_seen(step) for step in range(5)] == [0, 32, 64, 96, 100]


@pytest.mark.parametrize(("by", "costs", "budget"), [("frames", np.maximum(FRAMES, 1), 40), ("tokens", TOKENS, 300)])
@pytest.mark.parametrize("window", [0, 128])
def test_batches_fill_but_never_exceed_the_budget(by, costs, budget, window):
    made = plan(order(), by=by, budget=budget, bucket_samples=window)
    sums = [costs[batch].sum() for batch in batches(made)]
    assert max(sums) <= budget
    assert sorted(flat(batches(made))) == sorted(order().tolist())
    assert made.samples_seen(made.num_steps) == 2_000
    if not window:  # the next sample would not have fitted
        firsts = [costs[batch[0]] for batch in batches(made)[1:]]
        assert all(total + first > budget for total, first in zip(sums, firsts, strict=False))
        assert flat(batches(made)) == order().tolist()


def test_batch_bounds_equal_a_greedy_reference():
    costs = np.random.default_rng(1).integers(1, 10, 500)
    starts, total = [0], 0
    for place, cost in enumerate(costs):
        if total + cost > 17:
            starts.append(place)
            total = 0
        total += cost
    assert batch_bounds(costs, 17).tolist() == [*starts, 500]
    assert batch_bounds(costs[:0], 17).tolist() == [0]
    assert batch_bounds(np.full(10, 3), 7).tolist() == [0, 2, 4, 6, 8, 10]
    assert batch_bounds(np.full(9, 3), 7).tolist() == [0, 2, 4, 6, 8, 9]


@pytest.mark.parametrize(("by", "unit"), [("frames", "8 frames"), ("tokens", "40 tokens")])
def test_sample_above_the_budget_is_rejected_by_name(by, unit):
    world = columns_only([Clip("small", num_frames=1, num_tokens=8), Clip("large", num_frames=8, num_tokens=16)])
    settings = streaming(batching={"by": by, "budget": 7})
    options = {"batch_size": 1, "tokens_per_frame": 3, "seed": 0}
    with pytest.raises(UserError, match=f"tokens/train: sample 'large' has {unit}, but .*budget allows 7 in a batch"):
        make_plan(np.array([0, 1, 0]), world, settings, **options)


def test_bucketing_serves_every_window_once_in_batches_of_similar_lengths():
    items, window = order(), 256
    made = plan(items, bucket_samples=window)
    assert made.order.tolist() != items.tolist()
    for start in range(0, 2_000, window):
        assert sorted(made.order[start : start + window]) == sorted(items[start : start + window])
    spread = [np.ptp(TOKENS[batch]) for batch in batches(made)]
    assert np.mean(spread) < 0.3 * np.mean([np.ptp(TOKENS[batch]) for batch in batches(plan(items))])


def test_bucketing_preserves_the_distribution_of_lengths():
    """Any number of windows exactly; within a window no length comes early or late."""
    items = order(20_000, seed=1)
    made = plan(items, bucket_samples=500, batch_size=20, seed=3)
    lengths, served = TOKENS[items], TOKENS[made.order]
    assert stats.ks_2samp(served[:5_000], lengths).pvalue > 0.01
    values, counts = np.unique(lengths, return_counts=True)
    seen = np.array([(served[:5_000] == value).sum() for value in values])
    assert stats.chisquare(seen, counts * 5_000 / 20_000).pvalue > 0.01
    firsts = np.array([TOKENS[made.items(step)].mean() for step in range(0, made.num_steps, 25)])  # of every window
    lasts = np.array([TOKENS[made.items(step)].mean() for step in range(24, made.num_steps, 25)])
    assert stats.ttest_ind(firsts, lasts).pvalue > 0.01
    assert abs(firsts.mean() - lengths.mean()) < 3 * lengths.std() / np.sqrt(len(firsts))


@pytest.mark.parametrize(("by", "budget"), [("samples", None), ("frames", 40), ("tokens", 300)])
@pytest.mark.parametrize("window", [0, 500])
def test_every_sample_has_the_same_weight_in_the_gradient(by, budget, window):
    """A step's loss is a mean over its samples: step_weight / number of samples is what each of them counts."""
    made = plan(order(1_920), by=by, budget=budget, bucket_samples=window, batch_size=20)
    sizes = np.diff(made.starts)
    each = np.concatenate([np.full(size, made.step_weight(step) / size) for step, size in enumerate(sizes)])
    assert each == pytest.approx(each[0])
    assert np.mean([made.step_weight(step) for step in range(made.num_steps)]) == pytest.approx(1)
    assert by == "samples" or sizes.max() > sizes[:-1].min()  # without the weight the longest would count more


def test_order_does_not_depend_on_the_number_of_ranks():
    made = plan(order(), bucket_samples=128)
    for world_size in (1, 2, 4):
        made.check_ranks(world_size)
        for step in range(made.num_steps):
            shares = [made.items(step, rank, world_size) for rank in range(world_size)]
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
            together = np.empty(sum(map(len, shares)), np.int64)
            for rank, share in enumerate(shares):
                together[rank::world_size] = share
            assert together.tolist() == made.items(step).tolist()


def test_batch_with_fewer_samples_than_ranks_is_rejected():
    with pytest.raises(UserError, match=r"step 4 of 4 has 3 sample\(s\) for 4 ranks \(1 such"):
        plan(order(99)).check_ranks(4)


def test_fingerprint_covers_order_and_batch_bounds():
    marks = {plan(order()).fingerprint, plan(order(), batch_size=16).fingerprint, plan(order(seed=1)).fingerprint}
    assert len(marks) == 3
    assert plan(order()).fingerprint in marks


def test_millions_of_samples_are_planned_in_seconds():
    """O(n): an index of the size of real data sets."""
    world = columns_only(clips(100))
    items = np.random.default_rng(0).integers(0, 100, 2_000_000)
    settings = streaming(batching={"by": "tokens", "budget": 20_000, "bucket_samples": 10_000})
    made = make_plan(items, world, settings, batch_size=1, tokens_per_frame=1, seed=0)
    assert made.num_samples == 2_000_000
    assert made.num_steps < 5_000
