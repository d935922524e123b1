"""Source `hub`: every adapter against a small local copy of its data set, in the published schema, and in a shard."""

import io
import tarfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from pipeline_steps.common.files import parse
from pipeline_steps.common.hashing import media_sha256
from pipeline_steps.common.schemas import FramePolicy, PackedSample
from pipeline_steps.shards.pack import Settings, pack_shard
from pipeline_steps.sources.hub.adapters import smoltalk
from tests.pipeline_steps import hub_files
from tests.pipeline_steps.clips import index_of
from tests.pipeline_steps.hub_files import NOTHING, all_of, collected


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")  # locks, one per set of files


def items(samples):
    """[(task, user, assistant)] of all items with an answer."""
    return sorted((i.task, i.user or "", i.assistant) for s in samples for i in s.items if i.assistant)


def embedded(raw, sample):
    """The pictures of a sample, read from its container."""
    content = (raw / sample.path).read_bytes()
    return [content[offset : offset + size] for offset, size in sample.parts]


# ---------------------------------------------------------------- the data sets


def test_openvid(tmp_path):
    samples, quarantined = collected(tmp_path, "openvid")
    assert quarantined == [("gone_0.mp4", NOTHING), ("train row 5", "caption: empty")]
    assert Counter(sample.video_id for sample in samples) == {"IIvwqskxtdE": 2, "-_QcJGaOEhI": 1}
    assert items(samples)[0] == ("caption", "", 'A "quoted", long caption\nof two lines.')
    for sample in samples:
        assert (sample.source, sample.kind, sample.split) == ("openvid", "video", None)
        assert sample.path.startswith(str(tmp_path / "openvid/clips"))
        assert sample.sha256 == media_sha256(sample.path)


def test_webvid(tmp_path):
    samples, quarantined = collected(tmp_path, "webvid")
    assert quarantined == [("000001_000050/1003.mp4", NOTHING)]
    assert [sample.video_id for sample in samples] == ["webvid-1001", "webvid-1002"]
    assert items(samples) == [("caption", "", "Footage 1001"), ("caption", "", "Footage 1002")]


def test_cauldron_keeps_all_pictures_and_all_turns(tmp_path):
    samples, quarantined = collected(tmp_path, "cauldron")
    assert quarantined == [
        ("ai2d row 2", "duplicate of an earlier row"),
        ("nlvr2 row 3", "assistant: empty"),
        ("nlvr2 row 4", "images: expected a list of objects, found list []"),
    ]
    assert Counter(sample.source for sample in samples) == {"cauldron_ai2d": 1, "cauldron_nlvr2": 2}
    (chat,) = (sample for sample in samples if len(sample.parts) == 3)
    assert chat.kind == "image"
    assert embedded(tmp_path / "raw", chat) == [hub_files.png(grey) for grey in (10, 20, 30)]
    turns = [(message.role, message.content) for message in chat.items[0].messages]
    asked, answered = ("How many?", "Which is dark?"), ("Three.", "The first.")
    assert turns == [
        turn for pair in zip(asked, answered, strict=True) for turn in zip(("user", "assistant"), pair, strict=True)
    ]
    same = [sample.video_id for sample in samples if sample.sha256 != chat.sha256]
    assert len(set(same)) == 1  # one picture in two subsets stays in one split


def test_smoltalk_has_three_disjoint_parts(tmp_path):
    samples, quarantined = collected(tmp_path, "smoltalk")
    assert [reason for _, reason in quarantined] == [
        "messages: the roles are user, expected user and assistant alternating"
    ]
    assert {sample.kind for sample in samples} == {"text"}
    assert {item.task for sample in samples for item in sample.items} == {"text"}
    counts = Counter(sample.source for sample in samples)
    assert counts.total() == 71
    assert counts["smoltalk_stage1"] > counts["smoltalk_stage2"] > counts["smoltalk_stage3"] > 0
    (long,) = (item for sample in samples for item in sample.items if item.messages)
    assert [message.role for message in long.messages] == ["system", *["user", "assistant"] * 2]
    values = hub_files.write("smoltalk", tmp_path / "again")
    only, _ = all_of(values, tmp_path, subsets=["stage2"])
    assert [sample.key for sample in only] == [s.key for s in only if s.source == "smoltalk_stage2"]
    assert {sample.key for sample in only} == {s.key for s in samples if s.source == "smoltalk_stage2"}


def test_smoltalk_parts_have_the_ratio_4_to_2_to_1():
    parts = Counter(smoltalk.part_of([{"role": "user", "content": str(i)}]) for i in range(14_000))
    assert [round(parts[stage] / 2000, 1) for stage in ("stage1", "stage2", "stage3")] == [4.0, 2.0, 1.0]


def test_llava_video(tmp_path):
    samples, quarantined = collected(tmp_path, "llava_video")
    assert sorted(quarantined) == [
        ("0_30_s_academic_v0_1 row 2", "messages: the roles are user, expected user and assistant alternating"),
        ("0_30_s_academic_v0_1/academic_source/activitynet/v_y1IjkACdnfs.mp4", NOTHING),
    ]
    assert {sample.video_id for sample in samples} == {"charades-RW587"}
    chat, caption = sorted((sample.items[0] for sample in samples), key=lambda item: item.messages is None)
    assert [m.content for m in chat.messages] == ["What does the man do?", "He runs.", "Where?", "Outside."]
    assert (caption.user, caption.assistant, caption.task) == ("Describe.", "A man runs.", "caption")


def test_vript(tmp_path):
    samples, quarantined = collected(tmp_path, "vript")
    assert sorted(quarantined) == [
        ("gone_video_/gone_video_-Scene-001.mp4", NOTHING),
        ("long row 4", "content: expected text, found null"),
    ]
    assert Counter(sample.video_id for sample in samples) == {"007EvOaWFOA": 2, "02toZL7p4_0": 1}
    tasks = Counter(item.task for sample in samples for item in sample.items)
    assert tasks == {"caption": 3, "shot_type": 2, "camera_movement": 3, "scene_title": 1}


def test_sharegpt4video(tmp_path):
    samples, quarantined = collected(tmp_path, "sharegpt4video", max_missing=0.5)
    assert quarantined == [
        ("train row 2", "captions: none with idx -1, the caption of the whole video"),
        ("panda/gonegonegon.mp4", NOTHING),
    ]
    assert [(task, answer) for task, _, answer in items(samples)] == [
        ("caption", "A car turns and stops."),
        ("key_frames", "A car turns.\nIt stops."),
    ]


def test_rlaif_v_is_a_preference(tmp_path):
    samples, quarantined = collected(tmp_path, "rlaif_v")
    assert quarantined == [
        ("train row 3", "rejected: the same as chosen"),
        ("train row 4", "chosen: expected text, found null"),
    ]
    answers = sorted((i.user, i.assistant, i.rejected) for s in samples for i in s.items)
    assert answers == [("Is it dark?", "Yes.", "No."), ("What is it?", "Grey.", "A cat.")]
    assert len({(sample.path, sample.parts, sample.video_id) for sample in samples}) == 1  # one picture, stored once
    assert embedded(tmp_path / "raw", samples[0]) == [hub_files.png(50)]


def test_mvbench(tmp_path):
    samples, quarantined = collected(tmp_path, "mvbench")
    assert sorted(quarantined) == [
        ("object_shuffle row 2", "answer: 'Flew.' occurs 0 times among the 3 options"),
        ("star/Charades_v1_480/GONE1.mp4", NOTHING),
    ]
    by_task = {sample.items[0].task: sample for sample in samples}
    assert {sample.split for sample in samples} == {"test"}
    timed = by_task["mvbench_action_sequence"]
    assert (timed.segment, timed.picture_fps, timed.video_id) == ((0.5, 1.5), None, "charades-RW587")
    assert (timed.items[0].options, timed.items[0].correct_option) == (("Sat down.", "Stood up.", "Left."), 1)
    frames = by_task["mvbench_episodic_reasoning"]
    assert (frames.segment, frames.picture_fps, frames.kind) == ((0.5, 1.5), 3.0, "video")
    assert frames.path.endswith("tvqa/frames_fps3_hq/castle_s07e20_seg02_clip_14")
    assert frames.sha256 == media_sha256(frames.path)
    whole = by_task["mvbench_object_shuffle"]
    assert (whole.segment, whole.video_id) == (None, "perception_test-video_12")


def test_video_mme_strips_each_options_own_letter_only(tmp_path):
    samples, quarantined = collected(tmp_path, "video_mme")
    assert quarantined == [
        ("test row 2", "options[1]: 'C. Two' does not start with 'B.'"),
        ("N1cdUjctpG8.mp4", NOTHING),
    ]
    (sample,) = samples
    (item,) = sample.items
    assert (item.options, item.correct_option) == (("Apples.", "A. Candles.", "Berries."), 1)
    assert (item.task, sample.video_id, sample.split) == ("video_mme_counting_problem", "fFjv93ACGo8", "test")


def test_mlvu(tmp_path):
    samples, quarantined = collected(tmp_path, "mlvu")
    assert quarantined == [
        ("1_plotQA row 2", "answer: 'Pink' occurs 0 times among the 4 options"),
        ("1_plotQA/gone.mp4", NOTHING),
    ]
    (sample,) = samples
    assert (sample.items[0].task, sample.items[0].correct_option, sample.split) == ("mlvu_plotqa", 0, "test")


def test_scienceqa_takes_the_questions_with_a_picture(tmp_path):
    samples, quarantined = collected(tmp_path, "scienceqa")
    assert quarantined == [
        ("test row 2", "no image: not part of ScienceQA-IMG"),
        ("test row 3", "answer: option number 2 (from 0) of 2 options"),
    ]
    (sample,) = samples
    (item,) = sample.items
    assert (item.user, item.options, item.correct_option) == ("Look at the map.\nWhich is north?", ("Maine", "Ohio"), 1)
    assert (item.task, sample.split, sample.kind) == ("scienceqa_social_science", "test", "image")


def test_pope(tmp_path):
    samples, quarantined = collected(tmp_path, "pope")
    assert quarantined == [("test row 3", "answer: 'maybe' occurs 0 times among the 2 options")]
    assert [(s.items[0].options, s.items[0].correct_option) for s in samples] == [
        (("yes", "no"), 0),
        (("yes", "no"), 1),
    ]
    assert {(s.split, s.video_id, s.items[0].task) for s in samples} == {
        ("test", "COCO_val2014_000000310196", "pope_adversarial")
    }


# ---------------------------------------------------------------- through a shard


def packed(tmp_path, name):
    """({member: content} of a shard of all samples, the samples by key)."""
    samples, _ = collected(tmp_path, name)
    samples = [sample.model_copy(update={"split": sample.split or "train"}) for sample in samples]
    frames = FramePolicy(image_size=16, resize_mode="crop", fps=2.0, max_frames=8, jpeg_quality=95)
    report = pack_shard(samples, Settings(raw_dir=str(tmp_path / "raw"), frames=frames), tmp_path / "packed/000000")
    assert report.quarantined == ()
    assert report.shard.num_samples == len(samples)
    with tarfile.open(tmp_path / "packed/000000.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    return members, {s.key: parse(PackedSample, members[f"{s.key}.json"], s.key) for s in samples}


def greys(members, key):
    """Mean grey of the frames of a sample, in order."""
    names = [name for name in members if name.startswith(f"{key}.") and name.endswith(".jpg")]
    return [round(float(np.asarray(Image.open(io.BytesIO(members[name]))).mean())) for name in names]


def test_hub_videos_are_packed_into_a_shard(tmp_path):
    members, samples = packed(tmp_path, "openvid")
    for key, sample in samples.items():
        assert (sample.frame_count, sample.duration) == (4, 2.0)
        assert [index_of(grey, 4) for grey in greys(members, key)] == [0, 1, 2, 3]


def test_hub_embedded_pictures_are_packed_into_a_shard(tmp_path):
    members, samples = packed(tmp_path, "cauldron")
    shown = {key: greys(members, key) for key in samples}
    assert sorted(shown.values()) == [[10, 20, 30], [40], [40]]
    for key, sample in samples.items():
        assert sample.frame_count == len(shown[key])
        assert (f"{key}.jpg" in members) == (len(shown[key]) == 1)


def test_hub_preferences_are_packed_into_a_shard(tmp_path):
    members, samples = packed(tmp_path, "rlaif_v")
    assert sorted(item.rejected for sample in samples.values() for item in sample.items) == ["A cat.", "No."]
    assert [greys(members, key) for key in samples] == [[50], [50]]


def test_hub_multiple_choice_and_segments_are_packed_into_a_shard(tmp_path):
    members, samples = packed(tmp_path, "mvbench")
    shown = {sample.items[0].task: greys(members, key) for key, sample in samples.items()}
    assert [index_of(grey, 4) for grey in shown["mvbench_action_sequence"]] == [1, 2]  # from .5 s to 1.5 s
    assert [index_of(grey, 4) for grey in shown["mvbench_object_shuffle"]] == [0, 1, 2, 3]
    assert [round(grey / 30) for grey in shown["mvbench_episodic_reasoning"]] == [
        3,
        4,
    ]  # at .75 s and 1.25 s, 3 a second
    assert all(sample.items[0].correct_option == 1 for sample in samples.values())
