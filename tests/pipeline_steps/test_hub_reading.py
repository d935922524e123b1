"""Source `hub`: keys, choice and accounting of rows, damaged rows and files, containers, and what a user gets wrong."""

import itertools
import shutil
import subprocess
import sys
import typing
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline_steps.common.errors import UserError
from pipeline_steps.common.files import to_json
from pipeline_steps.common.hashing import media_sha256
from pipeline_steps.common.params import ROOT
from pipeline_steps.common.schemas import read_samples
from pipeline_steps.sources import schema
from pipeline_steps.sources.__main__ import collect
from pipeline_steps.sources.hub import adapter, media, reader, tables
from pipeline_steps.sources.hub.adapters import openvid
from pipeline_steps.sources.hub.registry import ADAPTERS
from tests.pipeline_steps import hub_files
from tests.pipeline_steps.hub_files import NOTHING, all_of, collected, entry, section


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")  # locks, one per set of files


# ---------------------------------------------------------------- keys, choice, accounting


@pytest.mark.parametrize("name", hub_files.WRITERS)
def test_every_row_is_counted_and_the_counts_are_printed(tmp_path, capsys, name):
    samples, quarantined = collected(tmp_path, name)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{name}: "))
    counts = [int(word) for word in line.replace(",", "").split() if word.isdigit()]
    rows, taken, missing, unusable, beyond = counts
    assert (taken, missing + unusable, beyond) == (len(samples), len(quarantined), 0)
    assert rows == taken + missing + unusable
    assert missing == sum(reason == NOTHING for _, reason in quarantined)
    assert all(sample.key.startswith(f"{sample.source}-") for sample in samples)
    assert all((sample.split == "test") == (name in {w.__name__ for w in hub_files.EVALUATION}) for sample in samples)


def test_keys_do_not_depend_on_the_order_of_rows(tmp_path):
    values = hub_files.write("rlaif_v", tmp_path / "a")
    before, _ = all_of(values, tmp_path / "raw")
    path = tmp_path / "a/RLAIF-V-Dataset_000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.take([3, 1, 2, 0]), path)
    after, _ = all_of(values, tmp_path / "raw2")
    assert [sample.key for sample in after] == [sample.key for sample in reversed(before)]


def test_larger_max_samples_keeps_the_smaller_selection(tmp_path, capsys):
    values = hub_files.write("smoltalk", tmp_path / "smoltalk")
    keys = {}
    for number in (5, 20, 71, 500):
        samples, _ = all_of(values, tmp_path, max_samples=number)
        keys[number] = {sample.key for sample in samples}
    assert [len(taken) for taken in keys.values()] == [5, 20, 71, 71]
    assert keys[5] < keys[20] < keys[71] == keys[500]
    assert "72 rows: 5 taken, 0 without media, 1 unusable, 66 skipped by max_samples" in capsys.readouterr().out


def test_max_samples_selection_does_not_depend_on_downloaded_media(tmp_path):
    values = hub_files.write("openvid", tmp_path / "a")
    samples, quarantined = all_of(values, tmp_path, max_samples=3, max_missing=1.0)
    chosen = {sample.key for sample in samples} | {row.key for row in quarantined if row.reason == NOTHING}
    hub_files.clip(tmp_path / "a/clips/gone_0.mp4")
    samples, _ = all_of(values, tmp_path, max_samples=3)
    assert {sample.key for sample in samples} == chosen


def test_missing_media_fail_the_stage_until_they_are_added(tmp_path):
    values = hub_files.write("openvid", tmp_path / "a") | {"max_missing": 0.2}
    message = (
        r"1 of 4 samples have no media in .*clips \(25\.0%\), more than max_missing allows \(20\.0%\)\. The first: "
        r"gone_0\.mp4\. Add the files and rerun"
    )
    with pytest.raises(UserError, match=message):
        collect(section(values), tmp_path / "raw")
    assert not (tmp_path / "raw").exists()
    hub_files.clip(tmp_path / "a/clips/gone_0.mp4")
    collect(section(values), tmp_path / "raw")
    assert len(read_samples(tmp_path / "raw/index.jsonl")) == 4


def test_data_set_is_streamed_in_constant_memory(tmp_path, monkeypatch):
    """The first samples come before the last row was read, of however many."""
    asked = []

    def endless(entry, adapter, table):
        for number in itertools.count():
            asked.append(number)
            yield {"video": f"{number}.mp4", "caption": "A clip."}

    monkeypatch.setattr(reader, "read_rows", endless)
    for number in range(3):
        hub_files.clip(tmp_path / f"clips/{number}.mp4")
    values = hub_files.write("openvid", tmp_path / "a") | {"media_dir": str(tmp_path / "clips")}
    samples = list(itertools.islice(reader.read(entry(values), tmp_path, []), 3))
    assert [sample.video_id for sample in samples] == ["0", "1", "2"]
    assert len(asked) == 3


def test_invalid_json_line_quarantines_one_row(tmp_path):
    values = hub_files.write("sharegpt4video", tmp_path / "a")
    path = tmp_path / "a/sharegpt4video_40k.jsonl"
    path.write_text(path.read_text() + '{"video_id": \n\n[1]\n' + "[" * 5000 + "\n")
    samples, quarantined = all_of(values, tmp_path)
    assert len(samples) == 1
    assert [row.reason for row in quarantined[2:]] == [
        "not valid JSON: Expecting value: line 1 column 14 (char 13)",
        "not a JSON object",
        "not valid JSON: maximum recursion depth exceeded while decoding a JSON array from a unicode string",
    ]


def test_numeric_ids_and_answers_stay_strings(tmp_path):
    values = hub_files.write("mlvu", tmp_path / "a")
    row = {"video": "movie101_66.mp4", "question": "How many?", "candidates": ["02", "2"], "answer": "02"}
    hub_files.write_json(tmp_path / "a/MLVU/json/1_plotQA.json", [{**row, "question_type": "count"}])
    ((sample,), _) = all_of(values, tmp_path)
    assert (sample.items[0].options, sample.items[0].correct_option) == (("02", "2"), 0)


WRONG = (
    None,
    3,
    -2.5,
    float("nan"),
    True,
    "",
    "x",
    "\ud800",
    "a\0b",
    "../x",
    b"x",
    [],
    [None],
    [[]],
    {},
    [{}],
    {"a": 1},
)


def damaged(value):
    """Copies of a row or a part of it in which one field, at any depth, is something else or is not there."""
    fields = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, field in fields:
        for other in itertools.chain(WRONG, damaged(field)):
            copy = value.copy()
            copy[name] = other
            yield copy
        if isinstance(value, dict):
            yield {key: part for key, part in value.items() if key != name}


@pytest.mark.parametrize("name", hub_files.WRITERS)
def test_wrong_types_in_any_field_are_quarantined(tmp_path, monkeypatch, name):
    """Hundreds of rows with one damaged field each: every one is a sample that can be written, or has a reason."""
    values = hub_files.write(name, tmp_path / "a")
    value, read_rows = ADAPTERS[name], reader.read_rows
    table = next(iter(tables.chosen_tables(entry(values), value)))
    rows = [row for good in read_rows(entry(values), value, table) for row in damaged(good)]
    monkeypatch.setattr(reader, "read_rows", lambda entry, adapter, table: iter(rows))
    subsets = {"subsets": [table.subset], "max_missing": 1.0}
    samples, quarantined = all_of(values, tmp_path / "raw", **subsets)
    assert len(rows) > 100
    assert all(to_json(sample).encode() for sample in samples)
    assert all(to_json(row).encode() and row.reason for row in quarantined)
    if name != "smoltalk":  # whose rows are of one table or another
        passes = len({t.files for t in value.tables if t.subset == table.subset})
        assert len(samples) + len(quarantined) == passes * len(rows)


def test_invalid_unicode_and_invisible_texts_are_quarantined(tmp_path):
    values = hub_files.write("mlvu", tmp_path / "a")
    row = {"video": "movie101_66.mp4", "candidates": ["a", "b"], "answer": "a", "question_type": "count"}
    rows = [{**row, "question": question} for question in ("half \ud800", "\u200b\n ", "whole")]
    hub_files.write_json(tmp_path / "a/MLVU/json/1_plotQA.json", rows)
    samples, quarantined = all_of(values, tmp_path)
    assert [sample.items[0].user for sample in samples] == ["whole"]
    assert [row.reason for row in quarantined] == ["question: not valid Unicode", "question: empty"]


def test_llava_hound_frame_folders_have_two_frames_per_second(tmp_path):
    turns = [{"from": "human", "value": "What?\n<video>"}, {"from": "gpt", "value": "That."}]
    row = {"id": "1", "video": "shareVideoGPTV/t8XgCHY2XMs-Scene-033", "conversations": turns}
    hub_files.write_json(tmp_path / "llava_hound/sharegptvideo_qa_255k_processed.json", [row])
    for i in range(3):
        hub_files.write_image(tmp_path / f"{row['video']}/c01_{i:04d}.jpeg", np.full((8, 8, 3), i, np.uint8))
    values = {"dataset": "llava_video", "path": str(tmp_path), "revision": None, "subsets": ["llava_hound"]}
    values |= {"media_dir": str(tmp_path), "max_samples": None, "max_missing": 0.0}
    ((sample,), _) = all_of(values, tmp_path / "raw")
    assert (sample.picture_fps, sample.video_id, sample.kind) == (2.0, "t8XgCHY2XMs", "video")
    assert (sample.items[0].user, sample.items[0].assistant) == ("What?", "That.")


def test_reversed_segments_and_paths_outside_the_folder_are_quarantined(tmp_path):
    values = hub_files.write("mvbench", tmp_path / "a")
    row = {"question": "?", "candidates": ["a", "b"], "answer": "a", "start": 2, "end": 1}
    rows = [{**row, "video": "RW587.mp4"}, {**row, "video": "../../secret.mp4"}, {**row, "video": "/etc/passwd"}]
    rows += [{**row, "video": "RW587.mp4", "end": 3, "question": str(i)} for i in range(2)]
    hub_files.write_json(tmp_path / "a/json/action_sequence.json", rows)
    samples, quarantined = all_of(values, tmp_path, subsets=["action_sequence"])
    assert len(samples) == 2
    reasons = [row.reason for row in quarantined]
    assert "the segment (2.0, 1.0) does not go from an earlier to a later second" in reasons[0]
    outside = "path: 'star/Charades_v1_480/../../secret.mp4' is not a valid path inside media_dir"
    assert reasons[1:] == [outside, NOTHING]


# ---------------------------------------------------------------- containers


def test_containers_roll_over_and_keep_a_samples_pictures_together(tmp_path, monkeypatch):
    monkeypatch.setattr(media, "MAX_CONTAINER_BYTES", 10)
    container = media.Container(tmp_path / "hub/x", tmp_path)
    stored = [
        container.add(pictures) for pictures in [(b"abcdef",), (b"gh", b"ijk"), (b"abcdef",), (b"x" * 30,), (b"y",)]
    ]
    container.close()
    assert [(path, parts) for path, parts, _ in stored] == [
        ("hub/x/00000.bin", ((0, 6),)),
        ("hub/x/00001.bin", ((0, 2), (2, 3))),
        ("hub/x/00000.bin", ((0, 6),)),
        ("hub/x/00002.bin", ((0, 30),)),
        ("hub/x/00003.bin", ((0, 1),)),
    ]
    assert [sha256 for *_, sha256 in stored] == [media_sha256(tmp_path / path, parts) for path, parts, _ in stored]


def test_two_entries_of_one_source_write_separate_containers(tmp_path):
    values = hub_files.write("pope", tmp_path / "a")
    first, _ = all_of(values, tmp_path)
    second, _ = all_of(values, tmp_path)
    assert {sample.path for sample in first} == {"hub/pope/00000.bin"}
    assert {sample.path for sample in second} == {"hub/pope/00001.bin"}


def test_full_disk_error_names_the_path(tmp_path):
    (tmp_path / "hub").touch()
    values = hub_files.write("pope", tmp_path / "a")
    with pytest.raises(UserError, match=r"hub/pope: cannot be written \(Not a directory\)"):
        all_of(values, tmp_path)


# ---------------------------------------------------------------- what the user may get wrong


def test_offline_error_says_how_to_use_a_local_copy(tmp_path):
    values = hub_files.write("cauldron", tmp_path / "a") | {"path": None}
    message = (
        r"HuggingFaceM4/the_cauldron \(ai2d/train-\*\.parquet\) at revision 847a98a.* cannot be read "
        r"\(OfflineModeIsEnabled: .*copy the data set's files to a local folder and set `path` to it"
    )
    with pytest.raises(UserError, match=message):
        collect(section(values), tmp_path / "raw")


def test_hub_data_set_is_read_at_the_pinned_revision(tmp_path, monkeypatch):
    calls = []

    def load_dataset(builder, **options):
        calls.append((builder, options))
        return SimpleNamespace(features=None, __iter__=None)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    values = hub_files.write("openvid", tmp_path / "a") | {"path": None}
    other = {"path": "someone/copy", "revision": "b" * 40}
    for changes, place in [({}, f"nkp37/OpenVid-1M@{openvid.ADAPTER.revision}"), (other, f"someone/copy@{'b' * 40}")]:
        with pytest.raises(TypeError):  # the rows of this load_dataset cannot be read
            all_of(values, tmp_path, **changes)
        builder, options = calls.pop()
        assert (builder, options["streaming"], options["split"]) == ("csv", True, "train")
        assert options["data_files"] == [f"hf://datasets/{place}/data/train/OpenVid-1M.csv"]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("cauldron", {"subsets": ["ai2"]}, "cauldron has no subset 'ai2'. Its subsets: ai2d, aokvqa"),
        ("cauldron", {"subsets": None}, r"no file aokvqa/train-\*\.parquet in .*It has the subsets ai2d, nlvr2: list"),
        ("cauldron", {"media_dir": "/tmp"}, "media_dir is /tmp, but the pictures are in the rows"),
        ("openvid", {"media_dir": None}, r"media_dir is not set. Set it to the folder with the clips of OpenVid_part"),
        ("openvid", {"media_dir": "/nowhere"}, "media_dir /nowhere does not exist"),
        ("openvid", {"path": "/nowhere/x"}, "path /nowhere/x does not exist"),
        ("openvid", {"revision": "a" * 40}, "revision is set, but path is local"),
        ("openvid", {"path": "someone/copy"}, "no revision of someone/copy is pinned"),
        ("vript", {"path": None}, "no revision of Mutonix/Vript is pinned. Set `revision` to a commit"),
        ("webvid", {"path": "{}/media/1002.mp4"}, r"no file data/train/\*\*/\*\.csv"),
    ],
)
def test_invalid_hub_entries_are_rejected(tmp_path, name, changes, message):
    values = hub_files.write(name, tmp_path / name)
    changes = {
        key: value.format(tmp_path / name) if key == "path" and value else value for key, value in changes.items()
    }
    with pytest.raises(UserError, match=message):
        collect(section(values | changes), tmp_path / "raw")


def test_invalid_local_files_are_rejected(tmp_path):
    values = hub_files.write("video_mme", tmp_path / "a")
    path = tmp_path / "a/videomme/test-00000-of-00001.parquet"
    pq.write_table(pq.read_table(path).drop_columns("options"), path)
    with pytest.raises(
        UserError, match=r"no column options; its columns are .*Check that this is a file of lmms-lab/Video-MME\."
    ):
        all_of(values, tmp_path)
    path.write_bytes(b"no")
    with pytest.raises(
        UserError, match=r"test-00000-of-00001\.parquet cannot be read \(ArrowInvalid: .*Repair the file"
    ):
        all_of(values, tmp_path)
    values = hub_files.write("mlvu", tmp_path / "b")
    path = tmp_path / "b/MLVU/json/1_plotQA.json"
    for content, message in [
        ('{"a": 1}', "is not a list of objects"),
        ('{"a": 1}\n{"a": 2}', "is not valid JSON .*rename it to .jsonl"),
        ("[]", "none of 0 rows is usable"),
        ("[3]", "none of 1 rows is usable. 1_plotQA row 1: not a JSON object"),
    ]:
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            all_of(values, tmp_path)


def test_empty_list_of_hub_entries_is_rejected(tmp_path):
    with pytest.raises(UserError, match=r"collect lists hub, but sources\.hub is empty"):
        collect(section(), tmp_path / "raw")


@pytest.mark.parametrize("revision", ["main", "abc1234"])
def test_revision_must_be_a_commit_hash(tmp_path, revision):
    with pytest.raises(ValueError, match="revision"):
        entry(hub_files.write("openvid", tmp_path), revision=revision)


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("path", "original"),
    [
        ("IIvwqskxtdE_0.mp4", "IIvwqskxtdE"),
        ("-_QcJGaOEhI_12_0to143.mp4", "-_QcJGaOEhI"),
        ("celebv_-0KRKWWPOTo_0.mp4", "-0KRKWWPOTo"),
        ("academic_source/activitynet/v_y1IjkACdnfs.mp4", "y1IjkACdnfs"),
        ("liwei_youtube_videos/videos/youtube_video_2024/ytb_9bZkp7q19f0.mp4", "9bZkp7q19f0"),
        ("kinetics/9bZkp7q19f0_000010_000020.mp4", "9bZkp7q19f0"),
        ("academic_source/youcook2/218/UVKvNrFkWuk/split_3.mp4", "UVKvNrFkWuk"),
        ("star/Charades_v1_480/RW587.mp4", "charades-RW587"),
        ("academic_source/Charades/RW587.mp4", "charades-RW587"),
        ("perception/videos/video_12.mp4", "perception_test-video_12"),
        ("NextQA/NExTVideo/1006/8968804598.mp4", "nextqa-8968804598"),
        ("02toZL7p4_0.mp4", "02toZL7p4_0"),
        ("t8XgCHY2XMs-Scene-033", "t8XgCHY2XMs"),
        ("any name (1).mp4", "any name (1)"),
    ],
)
def test_clip_names_map_to_the_original_video(path, original):
    assert adapter.original_video(path) == original


def test_the_schema_and_the_documentation_list_every_adapter():
    names = typing.get_args(schema.HubEntry.model_fields["dataset"].annotation)
    assert list(names) == list(ADAPTERS) == sorted(hub_files.WRITERS)
    text = (ROOT / "docs/data.md").read_text()
    for name, value in ADAPTERS.items():
        revision = f"`{value.revision}`" if value.revision else "give one"
        row = f"|`{name}`|`{value.repo}`|{revision}|{value.licence}|{value.download}|"
        assert row in text, row
        assert all(len(table.source) <= 40 for table in value.tables)


NEW_ADAPTER = """
from pipeline_steps.sources.hub.adapter import Adapter, Draft, Table, text


def sample(row, table):
    item = {"user": text(row, "question"), "assistant": text(row, "answer"), "task": "text"}
    return Draft(name="", items=(item,))


ADAPTER = Adapter(
    repo="someone/trivia",
    revision=None,
    licence="CC0",
    download="nothing",
    columns=("question", "answer"),
    tables=(Table("train", "*.jsonl", "trivia"),),
    sample=sample,
)
"""
READ_IT = """
from pathlib import Path
from pipeline_steps.sources import schema
from pipeline_steps.sources.hub import reader
entry = schema.HubEntry(dataset="trivia", path="rows.jsonl", revision=None, subsets=None, media_dir=None,
                        max_samples=None, max_missing=0.0)
print([sample.items[0].assistant for sample in reader.read(entry, Path("raw"), [])])
"""


def test_one_new_file_adds_an_adapter(tmp_path):
    shutil.copytree(ROOT / "pipeline_steps", tmp_path / "pipeline_steps", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "pipeline_steps/sources/hub/adapters/trivia.py").write_text(NEW_ADAPTER)
    (tmp_path / "rows.jsonl").write_text('{"question": "Which is larger?", "answer": "Jupiter."}\n')
    done = subprocess.run([sys.executable, "-c", READ_IT], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "['Jupiter.']" in done.stdout


def test_unknown_data_set_error_suggests_a_similar_name():
    values = hub_files.values_of("opnvid")
    with pytest.raises(ValueError, match=r"did you mean 'openvid'[?] Data sets: cauldron, llava_video"):
        entry(values)


def test_adapter_names_are_listed_without_importing_adapters():
    code = "import sys; import pipeline_steps.sources.schema; print([m for m in sys.modules if '.hub.adapter' in m])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['pipeline_steps.sources.hub.adapters']"


def test_tables_of_an_adapter_are_distinct():
    for value in ADAPTERS.values():
        assert len({(table.files, table.source) for table in value.tables}) == len(value.tables)
        assert all(tables.PurePosixPath(table.files).suffix in tables.LOADERS for table in value.tables)
