"""The loader: the same batches for any number of workers, ranks and restarts; damaged samples counted, never silent."""

import itertools
import threading

import numpy as np
import pytest
import torch

from pipeline_steps.common.errors import UserError
from pipeline_steps.streaming.loader import Loader, plan_stage
from pipeline_steps.training.schema import MixtureEntry
from tests.pipeline_steps import packed
from tests.pipeline_steps.packed import clips, open_split, streaming, write

SAMPLES = clips(90, text_every=6)  # 15 of them text
EVERYTHING = (MixtureEntry(source="*", task="*", weight=1.0),)
SHARE = 15 / 90  # of text: with it, one epoch of all groups is the data set


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write(tmp_path_factory.mktemp("packed"), SAMPLES, 20)


@pytest.fixture(scope="module")
def dataset(root):
    return open_split(root)


def loader(
    dataset,
    num_samples=90,
    batch_size=9,
    rank=0,
    world_size=1,
    text_share=SHARE,
    num_workers=1,
    lockstep=False,
    **changes,
):
    section = streaming(**changes)
    settings = packed.stage(mixture=EVERYTHING, text_share=text_share, num_samples=num_samples)
    sizes = {"batch_size": batch_size, "tokens_per_frame": 1}
    served = plan_stage(dataset, settings, section, stage="stage2", seed=1, **sizes)
    runtime = packed.runtime(num_workers=num_workers)
    place = {"rank": rank, "world_size": world_size, "lockstep": lockstep}
    return Loader(dataset, served, packed.collator(), section, runtime, **place)


def keys(batches):
    return [batch.keys for batch in batches]


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def same(one, other):
    assert one.keys == other.keys
    one, other = one.tensors(), other.tensors()
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("batching", [{}, {"bucket_samples": 45}, {"by": "frames", "budget": 25}])
def test_batches_do_not_depend_on_workers_or_ranks(dataset, batching):
    """0, 1, 2 and 4 workers, 1, 2 and 4 ranks."""
    reference = keys(loader(dataset, num_workers=0, batching=batching))
    assert sorted(flat(reference)) == sorted(clip.key for clip in SAMPLES)
    for num_workers in (0, 1, 2, 4):
        for world_size in (1, 2, 4):
            options = {"num_workers": num_workers, "world_size": world_size, "batching": batching}
            ranks = [keys(loader(dataset, rank=rank, **options)) for rank in range(world_size)]
            for step, batch in enumerate(reference):
                together = [None] * len(batch)
                for rank, batches in enumerate(ranks):
                    together[rank::world_size] = batches[step]
                assert together == batch


@pytest.mark.parametrize("batching", [{}, {"by": "tokens", "budget": 120, "bucket_samples": 60}])
def test_resuming_at_twenty_random_positions_gives_the_same_batches(dataset, batching):
    whole = list(loader(dataset, num_samples=126, num_workers=0, batching=batching))
    rng = np.random.default_rng(0)
    for stop in rng.integers(1, len(whole), 20).tolist():
        first = loader(dataset, num_samples=126, num_workers=int(rng.integers(0, 5)), batching=batching)
        batches = iter(first)
        for _ in range(stop):
            next(batches)
        state = first.state_dict()
        batches.close()
        assert state["step"] == stop
        assert state["samples"] == sum(len(batch.keys) for batch in whole[:stop])
        second = loader(dataset, num_samples=126, num_workers=int(rng.integers(0, 5)), batching=batching)
        second.load_state_dict(state)
        rest = list(second)
        assert len(rest) == len(whole) - stop
        for one, other in zip(rest, whole[stop:], strict=True):
            same(one, other)


def test_state_is_small_and_rejected_by_another_plan(root, dataset, tmp_path):
    one = loader(dataset)
    next(iter(one))
    state = one.state_dict()
    assert len(repr(state)) < 200
    for other in (loader(dataset, batch_size=10), loader(dataset, num_samples=91)):
        with pytest.raises(UserError, match="has read 9 samples of another plan"):
            other.load_state_dict(state)
    changed = open_split(write(tmp_path, [*SAMPLES[:-1], packed.Clip("new-0", num_frames=4, source="films")], 20))
    with pytest.raises(UserError, match=r"samples of another (plan|data)"):
        loader(changed).load_state_dict(state)


def test_one_shard_with_more_workers_than_batches_is_served(tmp_path):
    dataset = open_split(write(tmp_path, SAMPLES[:12], 100))
    served = keys(loader(dataset, num_samples=12, batch_size=6, num_workers=8, text_share=2 / 12))
    assert [len(batch) for batch in served] == [6, 6]
    assert sorted(flat(served)) == sorted(clip.key for clip in SAMPLES[:12])
    ranks = [
        keys(loader(dataset, num_samples=12, batch_size=6, rank=r, world_size=4, text_share=2 / 12)) for r in range(4)
    ]
    assert sorted(flat(flat(ranks))) == sorted(clip.key for clip in SAMPLES[:12])


def test_every_sample_is_served_once_per_epoch_of_its_group(dataset):
    served = flat(keys(loader(dataset, num_samples=270, num_workers=2)))
    counts = np.unique(served, return_counts=True)[1]
    assert len(counts) == 90
    assert set(counts) <= {2, 3, 4}


def test_steps_and_samples_seen_are_exact_for_budgets(dataset):
    one = loader(dataset, num_samples=500, batching={"by": "frames", "budget": 20})
    seen = 0
    for step, batch in enumerate(one, 1):
        assert int(torch.maximum(batch.num_frames, torch.tensor(1)).sum()) <= 20
        seen += len(batch.keys)
        assert one.samples_seen(step) == seen
    assert step == one.num_steps
    assert seen == 500


def test_more_ranks_than_samples_in_a_batch_are_rejected(dataset):
    with pytest.raises(UserError, match=r"step 1 of 30 has 3 sample\(s\) for 4 ranks"):
        loader(dataset, batch_size=3, world_size=4)


def test_leaving_the_loop_early_leaves_no_threads(dataset):
    before = threading.active_count()
    for _ in loader(dataset, num_workers=3):
        break
    assert threading.active_count() == before


# ---------------------------------------------------------------- damaged samples


@pytest.fixture
def damaged(tmp_path):
    """A data set with the given samples damaged: the start of their first frame is overwritten."""

    def make(*numbers):
        dataset = open_split(write(tmp_path, SAMPLES, 20))
        for number in numbers:
            path = tmp_path / "shards/train" / dataset.shards[dataset.shard_number(number)].name
            with open(path, "r+b") as tar:
                tar.seek(dataset.rows[number]["frame_offsets"][0])
                tar.write(b"damaged")
        return dataset

    return make


@pytest.mark.parametrize("num_workers", [0, 3])
def test_damaged_sample_is_skipped_counted_and_reported_once(damaged, capsys, num_workers):
    dataset = damaged(1, 50)
    bad = {SAMPLES[1].key, SAMPLES[50].key}
    one = loader(dataset, num_samples=180, num_workers=num_workers, max_quarantined=0.05)
    served = flat(keys(one))
    assert len(served) == 176
    assert not bad & set(served)
    assert {key: entry["times"] for key, entry in one.quarantined.items()} == dict.fromkeys(bad, 2)
    assert all("frame 0 cannot be decoded" in entry["reason"] for entry in one.quarantined.values())
    assert capsys.readouterr().err.count("skipped sample") == 2
    assert one.state_dict()["samples"] == 180  # the clock runs on


def test_quarantine_counts_survive_a_restart(damaged):
    dataset = damaged(1, 50, 77)
    whole = loader(dataset, num_samples=180, max_quarantined=0.1, num_workers=0)
    batches, states = [], []
    for batch in whole:
        batches.append(batch)
        states.append(whole.state_dict())
    for stop in (1, 7, 15, 19):
        second = loader(dataset, num_samples=180, max_quarantined=0.1, num_workers=2)
        second.load_state_dict(states[stop - 1])
        for one, other in zip(second, batches[stop:], strict=True):
            same(one, other)
        assert second.state_dict() == whole.state_dict()


def test_too_many_damaged_samples_fail_the_run(damaged):
    dataset = damaged(1, 2, 3)
    with pytest.raises(UserError, match=r"(?s)3 of 90 sample\(s\) are unreadable, more than .* \(3.000%\):\n.*-000"):
        list(loader(dataset, max_quarantined=0.03))
    assert len(list(loader(dataset, max_quarantined=0.04))) == 10


def test_the_limit_is_of_the_samples_of_all_ranks(damaged):
    """Three ranks, one of which has skipped a sample: resumed with the state of all, none of them stops."""
    dataset, allowed = damaged(1, 2, 3), {"world_size": 3, "max_quarantined": 0.04}  # 3 of 90
    ranks = [loader(dataset, rank=rank, **allowed) for rank in range(3)]
    assert [len(list(one)) for one in ranks] == [10] * 3
    together = {key: entry for one in ranks for key, entry in one.quarantined.items()}
    assert len(together) == 3
    assert len(ranks[0].quarantined) < 3
    ranks[0].check_quarantined(together)
    own = {key: entry for key, entry in together.items() if key not in ranks[0].quarantined}
    resumed = loader(dataset, **allowed)
    resumed.load_state_dict(resumed.state_dict() | {"quarantined": own})
    assert len(list(resumed)) == 10
    assert resumed.quarantined.keys() == together.keys()
    strict = loader(dataset, world_size=3, max_quarantined=0.03)
    with pytest.raises(UserError, match=r"3 of 90 sample\(s\) are unreadable, more than .* \(3.000%\)"):
        strict.check_quarantined(together)


def test_ranks_in_lockstep_skip_nothing(damaged):
    dataset, stopped = damaged(1), []
    for rank in range(3):
        try:
            list(loader(dataset, world_size=3, rank=rank, lockstep=True, max_quarantined=1.0))
        except UserError as error:
            stopped.append(str(error))
    assert len(stopped) == 1
    assert "sample 'films-0001' is unreadable (frame 0 cannot be decoded" in stopped[0]
    assert "FSDP ranks run in lockstep" in stopped[0]


def test_batch_without_readable_samples_fails_the_run(damaged):
    dataset = damaged(*(number for number in range(90) if number % 6))
    with pytest.raises(UserError, match=r"step \d+: no sample of the batch is readable \(.*-00\d\d.*Rebuild"):
        list(loader(dataset, batch_size=1, max_quarantined=1.0))


def test_other_errors_are_raised_at_their_batch(dataset, monkeypatch):
    target = loader(dataset).plan.items(3)[0]
    original = type(dataset).decode_item

    def broken(self, raw):
        if raw.row["key"] == self.rows[int(target)]["key"]:
            raise RuntimeError("a mistake in the code")
        return original(self, raw)

    monkeypatch.setattr(type(dataset), "decode_item", broken)
    batches = iter(loader(dataset, num_workers=4))
    for _ in range(3):
        next(batches)
    with pytest.raises(RuntimeError, match="a mistake in the code"):
        next(batches)
