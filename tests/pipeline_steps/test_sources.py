"""The sources stage: the digit world as files, text-only questions, the index, and the command."""

import json
import subprocess
import sys
from collections import Counter

import av
import numpy as np
import pytest
import yaml

from pipeline_steps.common import params
from pipeline_steps.common.errors import UserError
from pipeline_steps.common.schemas import Quarantined, RawSample, read_samples
from pipeline_steps.sources import chat, procedural, schema
from pipeline_steps.sources.__main__ import collect, main
from pipeline_steps.sources.index import open_index, print_summary
from pipeline_steps.world import digits as world
from tests.pipeline_steps.archives import entry
from tests.pipeline_steps.source_section import section


def content(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    output = tmp_path_factory.mktemp("raw") / "raw"
    collect(section(), output, num_processes=1)
    return output


@pytest.fixture(scope="module")
def samples(raw):
    return read_samples(raw / "index.jsonl")


# ---------------------------------------------------------------- the procedural world as files


def test_output_bytes_do_not_depend_on_run_or_number_of_processes(raw, tmp_path):
    collect(section(), tmp_path / "raw", num_processes=2)
    assert content(tmp_path / "raw") == content(raw)


def test_output_bytes_depend_on_the_seed(raw, tmp_path):
    collect(section(["procedural"], seed=2), tmp_path / "raw")
    name = "procedural/train/card-000000.mp4"
    assert content(tmp_path / "raw")[name] != content(raw)[name]


def test_more_clips_do_not_change_existing_clips(raw, tmp_path):
    collect(section(["procedural"], num_train_clips=20), tmp_path / "raw")
    more, media = content(tmp_path / "raw"), {k: v for k, v in content(raw).items() if k.endswith((".mp4", ".jpg"))}
    assert media.items() <= more.items()
    assert len(media) == 18 + 7 * 3


def test_index_has_the_configured_counts_and_ground_truth(samples, raw):
    assert [sample.key for sample in samples] == sorted({sample.key for sample in samples})
    visual = [sample for sample in samples if sample.kind != "text"]
    assert Counter(sample.split for sample in visual) == {"train": 18, "validation": 7, "test": 14}
    for split in ("validation", "test"):
        items = Counter(item.task for sample in visual if sample.split == split for item in sample.items)
        assert items == dict.fromkeys(world.KINDS, 1 if split == "validation" else 2)
    for sample in visual:
        assert sample.size == (raw / sample.path).stat().st_size
        assert (sample.kind == "image") == sample.path.endswith(".jpg")
        for item in sample.items:
            if item.target is not None:
                asked = sample.objects[item.target]
                assert item.assistant == f"{item.cue} {''.join(map(str, asked.digits[1:]))}"
                assert item.cue in (f"{asked.colour}:", f"{asked.place}:")
    summary = json.loads((raw / "summary.json").read_text())
    assert summary["sources"]["procedural"]["samples"] == {"train": 18, "validation": 7, "test": 14}
    assert summary["sources"]["chat"]["seen"] == summary["sources"]["chat"]["taken"] == 56
    assert (raw / "quarantined.jsonl").read_bytes() == b""


# ---------------------------------------------------------------- the index


def text_samples(source, *names):
    item = {"user": "q", "assistant": "a", "task": "text"}
    for name in names:
        yield RawSample(key=name, source=source, video_id=name, kind="text", items=(item,))


def bad(count):
    return [Quarantined(key=f"bad-{i}", source="s", path=f"{i}.mp4", reason="missing") for i in range(count)]


def test_every_sample_is_indexed_or_quarantined(tmp_path, capsys):
    quarantined = []

    def source():
        yield from text_samples("s", "s-2", "s-0")
        quarantined.extend(bad(12))

    with open_index(tmp_path) as index:
        index.add_source("one", source(), quarantined, 0.9)
        index.add_source("two", text_samples("t", "r-1"), [], 0.0)
        index.add_unreferenced("s", ["x.txt"], Counter({"hidden": 3}))
        summary = index.finish()
    assert [sample.key for sample in read_samples(tmp_path / "index.jsonl")] == ["r-1", "s-0", "s-2"]
    rows = (tmp_path / "quarantined.jsonl").read_text().splitlines()
    assert [Quarantined.model_validate_json(row) for row in rows] == bad(12)
    found = summary["sources"]["s"]
    assert (found["seen"], found["taken"], found["quarantined"]["count"]) == (14, 2, 12)
    assert len(found["quarantined"]["first"]) == 10
    assert found["unreferenced"] == {"count": 3, "first": ["x.txt"], "reasons": {"hidden": 3}}
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    print_summary(tmp_path, summary)
    printed = capsys.readouterr().out
    assert "s: 12 of 14 quarantined" in printed
    assert "bad-9 (9.mp4): missing" in printed
    assert "bad-10" not in printed


def test_too_many_quarantined_samples_fail_the_stage(tmp_path):
    with open_index(tmp_path) as index:
        index.add_source("one", text_samples("s", "s-0", "s-1", "s-2"), bad(1), 0.25)
        with pytest.raises(UserError, match=r"2 of 3 samples of the source 'two'.*\(66.7%\).*\(25.0%\)"):
            index.add_source("two", text_samples("s", "s-3"), bad(2), 0.25)
        with pytest.raises(UserError, match=r"(?s)'three' has no usable sample.*Repair or replace them"):
            index.add_source("three", text_samples("s"), bad(1), 1.0)


def test_duplicate_key_error_names_both_sources(tmp_path):
    with open_index(tmp_path) as index:
        index.add_source("one", text_samples("s", "a", "b"), [], 0.0)
        index.add_source("two", text_samples("s", "c"), [], 0.0)
        with pytest.raises(UserError, match="the key b is used by the sources 'one' and 'three'"):
            index.add_source("three", text_samples("s", "d", "b"), [], 0.0)
        with pytest.raises(UserError, match="the key e is used twice by the source 'four'"):
            index.add_source("four", text_samples("s", "e", "e"), [], 0.0)


def test_held_out_digit_images_are_never_trained_on(raw):
    seen, digits = {split: set() for split in world.SPLITS}, world.Digits()
    for line in (raw / "procedural/metadata.jsonl").read_text().splitlines():
        row = json.loads(line)
        for thing, images in zip(row.get("objects", ()), row.get("digit_images", ()), strict=True):
            assert digits.values[images].tolist() == thing["digits"]
            seen[row["split"]] |= set(images)
    assert all(len(images) > 50 for images in seen.values())
    assert not seen["train"] & (seen["validation"] | seen["test"])
    assert not seen["validation"] & seen["test"]


def test_boxes_match_the_colours_in_decoded_clips(raw, samples):
    clips = [s for s in samples if s.kind == "video" and s.items[0].task in ("ask_colour", "ask_place", "gist")]
    assert len(clips) > 8
    for sample in clips:
        with av.open(str(raw / sample.path)) as container:
            decoded = list(container.decode(video=0))
        assert [frame.time for frame in decoded] == [0, 0.5, 1, 1.5, 2, 2.5]
        pixels = np.stack([frame.to_ndarray(format="rgb24") for frame in decoded]).astype(float)
        assert pixels.shape == (6, 112, 112, 3)
        inside = np.zeros((len(sample.objects), 6, 112, 112), bool)
        for i, thing in enumerate(sample.objects):
            for t, box in enumerate(thing.boxes):
                x0, y0, x1, y1 = np.round(112 * np.array(box)).astype(int)
                inside[i, t, max(y0 - 1, 0) : y1 + 1, max(x0 - 1, 0) : x1 + 1] = True
        for i, thing in enumerate(sample.objects):
            near = np.abs(pixels - np.array(world.COLOURS[thing.colour])).max(-1) < 60  # [T, H, W]
            near &= inside[i] | ~inside.any(0)  # blurred edges of another colour may be near this one
            for t in range(6):
                assert near[t].sum() > 20
                assert near[t, inside[i, t]].sum() > 0.95 * near[t].sum(), (sample.key, t, thing)


def test_clips_are_standard_h264(raw):
    with av.open(str(raw / "procedural/train/card-000000.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec.canonical_name, stream.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 2
        assert container.duration == 3_000_000  # microseconds


def test_motion_and_number_of_frames_reach_the_clips(tmp_path):
    steps = {"smooth": set(), "abrupt": set()}
    for motion, found in steps.items():
        raw = tmp_path / motion
        collect(section(["procedural"], num_frames=8, motion=motion), raw)
        clips = [sample for sample in read_samples(raw / "index.jsonl") if sample.kind == "video"]
        assert len(clips) > 20
        for clip in clips:
            with av.open(str(raw / clip.path)) as container:
                assert container.streams.video[0].frames == 8
            boxes = np.array([thing.boxes for thing in clip.objects])
            assert boxes.shape[1:] == (8, 4)
            patches = np.floor(2 * (boxes[..., :2] + boxes[..., 2:]))  # of the 4 x 4 that a digit is in
            found |= set(np.abs(np.diff(patches, axis=1)).sum(2).ravel().tolist())
    assert steps == {"smooth": {1}, "abrupt": {1, 2}}  # a smooth digit never crosses its lane diagonally


def test_training_mix_follows_weights_and_held_out_answers_are_balanced():
    settings = section(num_train_clips=100, num_test_clips=120).procedural
    clips = procedural.plan(settings)
    train = Counter(kind for split, kind, _ in clips if split == "train")
    assert train == {"card": 25, "follow": 25, "ask_colour": 9, "ask_place": 8, "caption": 11, "gist": 11, "image": 11}
    for kind in world.KINDS:
        scenes = [procedural.sample_clip(settings, *clip)[0] for clip in clips if clip[:2] == ("test", kind)]
        assert len(scenes) == 120
        if kind == "gist":
            assert set(Counter((s.background, len(s.objects)) for s in scenes).values()) <= {7, 8}
        else:
            targets = [s.objects[s.target] for s in scenes]
            assert set(Counter(t.colour for t in targets).values()) == {20}
            assert set(Counter(t.place for t in targets).values()) == {30}
            assert len({(t.colour, t.place) for t in targets}) == 24
            assert all(len(s.objects) == 4 for s in scenes)


def test_chat_answers_are_correct_and_questions_unique():
    samples = list(chat.collect(section().chat))
    assert Counter(sample.split for sample in samples) == {"train": 40, "validation": 8, "test": 8}
    items = [item for sample in samples for item in sample.items]
    assert len({item.user for item in items}) == len(items)
    kinds = Counter()
    for item in items:
        row = [character for character in item.user if character.isdigit()]
        if item.user.endswith("backwards"):
            expected, kind = "".join(reversed(row)), "backwards"
        elif item.user.startswith("Say"):
            expected, kind = "".join(row), "repeat"
        elif "largest" in item.user:
            expected, kind = max(row), "largest"
        else:
            expected, kind = row[1:][row[1:].index(row[0]) + 1], "next"
        assert item.assistant == expected
        kinds[kind] += 1
    assert set(kinds.values()) == {14}


# ---------------------------------------------------------------- the stage


def test_own_chats_are_read_before_the_world_is_rendered(tmp_path, monkeypatch):
    settings = section()
    own = settings.chat.model_copy(update={"path": str(tmp_path / "none.jsonl")})
    monkeypatch.setattr(procedural, "write", lambda *_: pytest.fail("rendered"))
    with pytest.raises(UserError, match=r"none\.jsonl: does not exist"):
        collect(settings.model_copy(update={"chat": own}), tmp_path / "raw")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"folder": {"path": "/mine", "name": "mine"}}, r"folder\.path is set, but collect is \[procedural, hub\]"),
        ({"chat": section().chat.model_dump() | {"path": "x.jsonl"}}, r"chat\.path is set.* or set chat\.path to null"),
        ({"tars": [vars(entry("/mine"))]}, r"tars is set.*: add tars to collect, or set tars to \[\]"),
        ({"collect": ["procedural", "chat"]}, r"hub is set, but collect is \[procedural, chat\]"),
    ],
)
def test_sources_that_are_given_are_collected(values, message):
    hub = params.parse("conf/", params.compose(["data=research"]))["sources"]["hub"]
    values = {"collect": ["procedural", "hub"], "hub": hub} | values
    with pytest.raises(ValueError, match=message):
        schema.Section.model_validate_json(json.dumps(section().model_dump() | values))


@pytest.mark.parametrize("number", [0, -1])
def test_numbers_of_processes_are_checked(monkeypatch, capsys, number):
    monkeypatch.setattr(sys, "argv", ["sources", f"--num-processes={number}"])
    with pytest.raises(SystemExit):
        main()
    assert f"--num-processes is {number}, expected at least 1" in capsys.readouterr().err


def test_failed_run_keeps_the_old_output(tmp_path):
    collect(section(["chat"]), tmp_path / "raw")
    before = content(tmp_path)
    with pytest.raises(UserError):
        collect(section(["chat", "folder"], tmp_path / "no"), tmp_path / "raw")
    with pytest.raises(UserError, match="twice"):
        collect(section(["chat", "chat"]), tmp_path / "raw")
    assert content(tmp_path) == before


def test_unwritable_output_is_rejected(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/raw"):
        collect(section(["chat"]), tmp_path / "file" / "raw")


def test_command_reports_one_paragraph_and_exit_code_1(tmp_path):
    values = yaml.safe_load((params.ROOT / "params.yaml").read_text())
    values["sources"]["collect"] = ["folder"]
    values["sources"]["folder"]["path"] = str(tmp_path / "no")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "pipeline_steps.sources", "--params", str(tmp_path / "params.yaml")]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "raw")], cwd=params.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: sources.folder.path")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "raw").exists()
