"""The plan of the shards: splits by group, hashed order, and buckets of which one more sample changes one."""

import hashlib

import numpy as np
import pytest

from pipeline_steps.common.errors import UserError
from pipeline_steps.common.files import write_jsonl
from pipeline_steps.common.schemas import SPLITS, RawSample
from pipeline_steps.shards.index import read_index, uniform
from pipeline_steps.shards.leaks import text_leaks
from pipeline_steps.shards.plan import HASH_BITS, assign_splits, buckets, plan_shards
from tests.pipeline_steps.clips import text_row, write_index


def raw_sample(key, split=None, video_id=None, sha256=None, source="test"):
    item = {"user": "q", "assistant": "a", "task": "caption"}
    return RawSample(
        key=key,
        source=source,
        split=split,
        video_id=video_id or key,
        path=key,
        kind="image",
        sha256=sha256 or key,
        items=(item,),
    )


@pytest.fixture
def index_of(tmp_path):
    """Writes samples into an index.jsonl and reads it."""

    def make(samples, seed=1):
        write_jsonl(tmp_path / "index.jsonl", samples)
        return read_index(tmp_path / "index.jsonl", seed)

    return make


@pytest.fixture
def assign(index_of):
    """{key: split} of samples."""

    def make(samples, validation_share, test_share, seed=1):
        splits = assign_splits(index_of(samples, seed), validation_share, test_share)
        return {sample.key: SPLITS[code] for sample, code in zip(samples, splits, strict=True)}

    return make


# ---------------------------------------------------------------- splits


def test_splits_follow_videos_and_shares(assign):
    samples = [raw_sample(f"k{i}-{j}", video_id=f"v{i}") for i in range(1000) for j in range(2)]
    splits = assign(samples, 0.1, 0.2)
    assert all(splits[f"k{i}-0"] == splits[f"k{i}-1"] for i in range(1000))
    counts = {split: list(splits.values()).count(split) / 2000 for split in SPLITS}
    assert counts["validation"] == pytest.approx(0.1, abs=0.03)
    assert counts["test"] == pytest.approx(0.2, abs=0.04)
    for i in range(1000):  # the rule itself: another one would move the samples of every existing data set
        number = uniform(1, f"v{i}")
        assert splits[f"k{i}-0"] == ("test" if number < 0.2 else "validation" if number < 0.3 else "train")
    assert splits != assign(samples, 0.1, 0.2, seed=2)
    more = assign([*samples, raw_sample("new")], 0.1, 0.2)
    assert {key: more[key] for key in splits} == splits  # a new video moves no other one


@pytest.mark.parametrize(("num_videos", "expected"), [(1, {"train"}), (2, {"train", "test"}), (3, set(SPLITS))])
def test_small_sets_fill_as_many_splits_as_possible(assign, num_videos, expected):
    for seed in range(20):
        samples = [raw_sample(f"k{i}") for i in range(num_videos)]
        assert set(assign(samples, 0.1, 0.1, seed).values()) == expected
        beside = [*samples, raw_sample("w", split="test", source="other")]  # another source's test set is no substitute
        assert expected <= set(assign(beside, 0.1, 0.1, seed).values())
    assert set(assign([raw_sample(f"k{i}") for i in range(9)], 0.0, 0.0).values()) == {"train"}


def test_copies_of_a_file_stay_together(assign):
    samples = [raw_sample(f"k{i}", sha256=f"same{i // 4}") for i in range(400)]
    splits = assign(samples, 0.3, 0.3)
    assert all(len({splits[f"k{i}"] for i in range(start, start + 4)}) == 1 for start in range(0, 400, 4))
    for start in range(0, 400, 4):  # the group's name is its first video_id
        number = uniform(1, min(f"k{i}" for i in range(start, start + 4)))
        assert splits[f"k{start}"] == ("test" if number < 0.3 else "validation" if number < 0.6 else "train")
    given = [raw_sample("a", split="test", sha256="same"), raw_sample("b", sha256="same")]
    assert assign(given, 0.1, 0.1) == {"a": "test", "b": "test"}


def test_same_media_in_two_given_splits_are_rejected(assign):
    message = r"'a' \(split train, a\) and 'b' \(split test, b\) hold the same content .*, or remove one\.$"
    with pytest.raises(UserError, match=message):
        assign([raw_sample("a", "train", sha256="x"), raw_sample("b", "test", sha256="x")], 0.1, 0.1)
    message = r"hold the same video \(video_id 'v'\), .* if they are different videos, give them different video_ids\."
    with pytest.raises(UserError, match=message):
        assign([raw_sample("a", "train", "v"), raw_sample("b", "validation", "v")], 0.1, 0.1)
    chain = [raw_sample("a", "train", sha256="x"), raw_sample("c", None, "v", "x"), raw_sample("b", "test", "v")]
    with pytest.raises(UserError, match=r"the same video, by the files or video_ids of further samples, .* Give all"):
        assign(chain, 0.1, 0.1)


def test_empty_files_are_not_the_same_content(assign):
    empty = hashlib.sha256().hexdigest()
    given = [raw_sample("a", "train", sha256=empty), raw_sample("b", "test", sha256=empty)]
    assert assign(given, 0.1, 0.1) == {"a": "train", "b": "test"}
    with pytest.raises(UserError, match=r"hold the same video \(video_id 'v'\)"):
        assign([sample.model_copy(update={"video_id": "v"}) for sample in given], 0.1, 0.1)


def test_equal_chats_stay_together_and_are_reported_where_splits_were_given(tmp_path):
    rows = [text_row(f"t{i}", f"  Say   {i // 2}", str(i // 2)) for i in range(200)]
    rows += [text_row("a", "SAY x", "ｘ", split="train"), text_row("b", "say x", "x", split="test")]
    rows += [text_row("c", "say x", "x"), text_row("d", "say x", "y", split="test")]
    write_index(tmp_path, rows)
    index = read_index(tmp_path / "index.jsonl", 1)
    splits = assign_splits(index, 0.3, 0.3)
    assert (splits[0:200:2] == splits[1:200:2]).all()
    assert set(splits[:200].tolist()) == {0, 1, 2}
    found = {(leak.held_out, leak.other) for leak in text_leaks(index, splits)}
    assert (("test", "b"), ("train", "a")) in found
    assert not {"d"} & {name[1] for pair in found for name in pair}
    assert {name[1] for pair in found for name in pair} <= {"a", "b", "c"}


# ---------------------------------------------------------------- shards


def test_plan_has_every_sample_once_in_hashed_order(index_of):
    samples = [raw_sample(f"k{i:03d}", split="train") for i in range(100)]
    index = index_of(samples)
    plan = plan_shards(index, assign_splits(index, 0.1, 0.1), samples_per_shard=30)
    assert all(0 < len(rows) <= 30 for rows in plan.values())
    assert list(plan) == sorted(plan)
    keys = [samples[row].key for rows in plan.values() for row in rows]
    assert keys == sorted((s.key for s in samples), key=lambda key: uniform(1, key))
    assert keys != sorted(keys)


def test_one_more_sample_changes_one_shard(index_of):
    def contents(samples):
        index = index_of(samples)
        plan = plan_shards(index, assign_splits(index, 0.1, 0.1), samples_per_shard=8)
        return {place: [samples[row].key for row in rows] for place, rows in plan.items()}

    samples = [raw_sample(f"k{i:03d}", split="train") for i in range(200)]
    before = contents(samples)
    halved = 0
    for new in range(40):
        after = contents([*samples, raw_sample(f"new{new}", split="train")])
        changed = [place for place in after if after[place] != before.get(place)]
        halved += len(changed) == 2
        assert len(changed) <= 2
        gone = set(before) - set(after)
        assert len(gone) == (len(changed) == 2)  # a bucket that became two
        assert contents(samples) == before
    assert 0 < halved < 40


def test_bucketing_stops_at_equal_hashes():
    order = np.array([0, 0, 0, 5, 2**47, 2**48 - 1], np.uint64)
    found = list(buckets(order, 2))
    assert found == [
        (f"p{'0' * HASH_BITS}", 0, 3),  # three of the same hash are more than 2, but cannot be told apart
        (f"p{'0' * 45}1", 3, 4),
        ("p1", 4, 6),
    ]
    assert list(buckets(order[:0], 2)) == []


# ---------------------------------------------------------------- the index


def test_index_rereads_rows_and_counts_media(tmp_path):
    rows = [text_row("a", "q", "a"), text_row("b-é", "ü", "a")]
    rows[1]["key"] = "b"
    write_index(tmp_path, rows)
    path = tmp_path / "index.jsonl"
    path.write_bytes(b"\n" + path.read_bytes().replace(b"\n", b"\r\n\n"))  # empty lines and Windows ends
    index = read_index(path, 1)
    assert [index.read_row(row).items[0].user for row in range(2)] == ["q", "ü"]
    assert index.num_media() == {"test": 0}


def test_invalid_index_rows_are_reported_with_their_line(tmp_path):
    with pytest.raises(UserError, match=r"index\.jsonl: missing.*`dvc repro sources`"):
        read_index(tmp_path / "index.jsonl", 1)
    row = text_row("a", "q", "a")
    for rows, message in [
        ([row, text_row("b", "q", "a"), row], "key 'a' occurs in lines 1 and 3"),
        ([{**row, "key": "a.b"}], "line 1: key: String should match"),
        ([{**row, "kind": "video"}], "has path None"),
        ([row, text_row("b", "q", "red: 1", cue="blue:")], "line 2: .*does not start with the cue"),
        ([], "no samples"),
    ]:
        write_index(tmp_path, rows)
        with pytest.raises(UserError, match=message):
            read_index(tmp_path / "index.jsonl", 1)
    (tmp_path / "index.jsonl").write_bytes(b'{"key": "\xff"}\n')
    with pytest.raises(UserError, match="line 1: row: Invalid JSON"):
        read_index(tmp_path / "index.jsonl", 1)
