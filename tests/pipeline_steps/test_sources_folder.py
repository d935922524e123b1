"""The user's folder: rows become items, and what is wrong in them is named."""

import os
from pathlib import Path

import pytest

from model import frames
from pipeline_steps.common.errors import UserError
from pipeline_steps.sources import folder, metadata, tars
from pipeline_steps.sources.__main__ import collect
from pipeline_steps.sources.actions.listing import video_files
from pipeline_steps.sources.index import print_summary
from tests.pipeline_steps.archives import entry
from tests.pipeline_steps.folders import jsonl, media
from tests.pipeline_steps.source_section import section


def _videos(path):
    return list(video_files(path))


def test_folder_rows_become_items(tmp_path):
    media(tmp_path, "a.mp4", "deep/er/b.jpg", "c.MKV", "README.md", ".hidden")
    jsonl(
        tmp_path,
        {"file_name": "a.mp4", "caption": "A dog.", "question": "What?", "answer": "A dog.", "task": "pets", "x": 1},
        {"file_name": "./deep/er/b.jpg", "caption": "A cat.", "split": "test", "video_id": "cats", "question": None},
        {"file_name": "a.mp4", "question": "Where?", "answer": "Here."},
    )
    found = folder.read(tmp_path, "mine")
    assert found.unreferenced == ["README.md", "c.MKV"]
    a, b = found.samples
    assert (a.key, a.kind, a.split, a.video_id, a.path) == ("mine-a", "video", None, "a.mp4", str(tmp_path / "a.mp4"))
    assert (b.key, b.kind, b.split, b.video_id) == ("mine-deep-er-b", "image", "test", "cats")
    assert a.size == 5
    assert [(i.user, i.assistant, i.task) for i in a.items] == [
        (None, "A dog.", "caption"),
        ("What?", "A dog.", "pets"),
        ("Where?", "Here.", "question"),
    ]
    assert [(i.user, i.assistant, i.task) for i in b.items] == [(None, "A cat.", "caption")]


def test_known_suffixes_are_those_that_can_be_decoded():
    assert set(frames.VIDEO_SUFFIXES) == folder.VIDEO_SUFFIXES
    assert set(frames.IMAGE_SUFFIXES) == folder.IMAGE_SUFFIXES


def test_csv_reads_like_jsonl(tmp_path):
    media(tmp_path, "a.mp4", "b.mp4")
    rows = '\ufefffile_name,caption,question,answer\r\na.mp4,"A dog, and\na cat",,\r\nb.mp4,,What?,Bär\r\n'
    (tmp_path / "metadata.csv").write_bytes(rows.encode())
    from_csv = folder.read(tmp_path, "mine").samples
    (tmp_path / "metadata.csv").unlink()
    jsonl(
        tmp_path,
        {"file_name": "a.mp4", "caption": "A dog, and\na cat"},
        {"file_name": "b.mp4", "question": "What?", "answer": "Bär"},
    )
    assert folder.read(tmp_path, "mine").samples == from_csv


def test_keys_are_unique_and_stable(tmp_path):
    names = ["a b.mp4", "a-b.mp4", "a-b.mkv", "视频.mp4", "動画.mp4", "v1.2.mp4"]
    media(tmp_path, *names)
    jsonl(tmp_path, *({"file_name": name, "caption": "x"} for name in names))
    keys = {sample.video_id: sample.key for sample in folder.read(tmp_path, "mine").samples}
    assert len(set(keys.values())) == len(names)
    assert keys["v1.2.mp4"] == "mine-v1-2"
    jsonl(tmp_path, *({"file_name": name, "caption": "x"} for name in reversed(names)))
    assert {sample.video_id: sample.key for sample in folder.read(tmp_path, "mine").samples} == keys


OK = '{"file_name": "a.mp4", "caption": "x"}\n'
ERRORS = {
    "no metadata": (None, None, r"no metadata among its 1 files \(a.mp4\). .*jsonl, .*json, .*csv, .*tsv, .*parquet"),
    "metadata too deep": ("sub/metadata.jsonl", OK, r"Found sub/metadata\.jsonl: use that folder"),
    "no rows": ("metadata.jsonl", "\n", r"jsonl: no rows\."),
    "missing file": ("metadata.jsonl", OK + OK.replace("a.mp4", "gone.mp4"), "line 2.*gone.mp4.*does not exist"),
    "name of two lines": ("metadata.jsonl", OK.replace("a.mp4", "a\\n.mp4"), r"'a\\n.mp4' does not exist"),
    "a folder": ("metadata.jsonl", OK.replace("a.mp4", "sub.mp4"), "'sub.mp4' is a folder"),
    "no text column": ("metadata.jsonl", '{"file_name": "a.mp4", "text": "x"}', "columns are file_name, text"),
    "no file_name": ("metadata.jsonl", '{"file": "a.mp4", "caption": "x"}', "columns are caption, file"),
    "question only": ("metadata.jsonl", '{"file_name": "a.mp4", "question": "x"}', "columns are file_name, question"),
    "row without text": ("metadata.jsonl", OK + '{"file_name": "a.mp4"}', "line 2.*found no text"),
    "row without answer": ("metadata.jsonl", OK + '{"file_name": "a.mp4", "question": "x"}', "found only question"),
    "blank caption": ("metadata.jsonl", OK.replace('"x"', '" "'), r"line 1 \(a.mp4\): caption is blank"),
    "blank answer": ("metadata.jsonl", '{"file_name": "a.mp4", "question": "x", "answer": ""}', "answer is blank"),
    "invisible caption": ("metadata.jsonl", OK.replace("x", "\\u200b\\u0000"), "caption is blank"),
    "not text": ("metadata.jsonl", OK.replace('"x"', "3"), "caption is 3, expected text"),
    "invalid JSON": ("metadata.jsonl", OK + "\n{", "line 3: not valid JSON"),
    "a field twice": ("metadata.jsonl", OK.replace("}", ', "caption": "y"}'), "line 1.*field 'caption' occurs twice"),
    "half a character": ("metadata.jsonl", OK.replace("x", "\\ud800"), "line 1: cannot be read.*surrogates"),
    "huge number": ("metadata.jsonl", OK.replace('"x"', "9" * 5000), "line 1: cannot be read.*4300 digits"),
    "deeply nested": ("metadata.jsonl", "[" * 100_000, "line 1: cannot be read.*recursion"),
    "not an object": ("metadata.jsonl", "[1]", r"line 1: expected an object.*\[1\]"),
    "not UTF-8": ("metadata.jsonl", OK.encode() + b'{"caption": "\xff"}', "line 2: not UTF-8"),
    "escapes": ("metadata.jsonl", OK.replace("a.mp4", "../a.mp4"), "'../a.mp4' is outside of"),
    "absolute": ("metadata.jsonl", OK.replace("a.mp4", "/a.mp4"), "'/a.mp4' is outside of"),
    "long name": ("metadata.jsonl", OK.replace("a.mp4", "a" * 300 + ".mp4"), "is too long: .*255 bytes"),
    "task of all": ("metadata.jsonl", OK.replace("}", ', "task": "*"}'), r"task '\*' means all tasks"),
    "blank task": ("metadata.jsonl", OK.replace("}", ', "task": " "}'), "task is blank"),
    "source of no letters": ("metadata.jsonl", OK.replace("}", ', "source": ""}'), "line 1.*source is ''"),
    "source is a number": ("metadata.jsonl", OK.replace("}", ', "source": 3}'), "line 1.*source is 3"),
    "source is a list": ("metadata.jsonl", OK.replace("}", ', "source": ["x"]}'), "line 1.*source is"),
    "unknown ending": ("metadata.jsonl", OK.replace("a.mp4", "a.txt"), "has no known video or image suffix"),
    "unknown split": ("metadata.jsonl", OK.replace("}", ', "split": "dev"}'), "line 1.*split.*'dev'"),
    "two splits": (
        "metadata.jsonl",
        OK.replace("}", ', "split": "test"}') + OK.replace("}", ', "split": "train"}'),
        "'test' in line 1 and 'train' in line 2",
    ),
    "wrong cue": ("metadata.jsonl", OK.replace("}", ', "cue": "red"}'), "does not start with the cue 'red'"),
    "file in no column": (
        "metadata.jsonl",
        OK + '{"caption": "x"}',
        "line 2: the row names no file.*sources.chat.path",
    ),
    "typo": ("metadata.jsonl", OK.replace("}", ', "optoins": ["a"]}'), "'optoins' is not read: .*mean 'options'"),
    "plural": ("metadata.jsonl", OK.replace("}", ', "answers": ["a"]}'), "'answers' is not read: .*mean 'answer'"),
    "upper case": ("metadata.csv", "file_name,caption,Split\na.mp4,x,test\n", "'Split' is not read: .*mean 'split'"),
    "csv: blank": ("metadata.csv", "file_name,caption\na.mp4,\n", "line 2.*found no text"),
    "csv: comma": ("metadata.csv", "file_name,caption\na.mp4,x,y\n", "line 2: 3 cells, but the header has 2"),
    "csv: short": ("metadata.csv", "file_name,question,answer\na.mp4,x\n", "line 2: 2 cells, but the header has 3"),
    "csv: twice": ("metadata.csv", "file_name,caption,caption\na.mp4,x,y\n", "column 'caption' occurs twice"),
    "csv: field twice": (
        "metadata.csv",
        'file_name,messages\na.mp4,"[{""role"": ""user"", ""role"": ""user""}]"\n',
        "line 2: messages is .*the field 'role' occurs twice",
    ),
    "csv: target": ("metadata.csv", "file_name,caption,target\na.mp4,x,²\n", "target.*valid integer"),
    "csv: columns": (
        "metadata.csv",
        "file_name|caption\na.mp4|x\n",
        r"columns are file_name\|caption.*separate cells with commas, semicolons or tabs",
    ),
}


@pytest.mark.parametrize(("name", "text", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_invalid_metadata_is_rejected(tmp_path, name, text, message):
    root, output = tmp_path / "videos", tmp_path / "out" / "raw"
    media(root, "a.mp4")
    if name:
        media(root, name)
        (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        (root / "sub.mp4").mkdir()
    with pytest.raises(UserError, match=message) as error:
        collect(section(["folder", "chat"], root), output)
    assert "\n" not in str(error.value)
    assert list((tmp_path / "out").iterdir()) == []  # nothing half-written


def test_all_unusable_rows_are_listed_at_once(tmp_path):
    media(tmp_path, "a.mp4")
    row = {"file_name": "a.mp4", "caption": "x"}
    jsonl(tmp_path, row, *(row | {"file_name": f"{number}.mp4"} for number in range(30)))
    with pytest.raises(UserError, match="30 rows are unusable") as error:
        folder.read(tmp_path, "mine")
    lines = str(error.value).split("\n")
    assert len(lines) == 22
    assert "line 2: file_name '0.mp4' does not exist" in lines[1]
    assert lines[-1] == "  ... and 10 more"
    media(tmp_path, "b.mp4", "c.mp4")
    jsonl(tmp_path, row, row | {"file_name": "b.mp4", "caption": " "}, {"file_name": "c.mp4", "question": "A?"})
    with pytest.raises(UserError, match=r"(?s)2 rows are unusable.*b.mp4.*is blank.*c.mp4.*found only question"):
        folder.read(tmp_path, "mine")


def test_columns_that_are_not_read_are_listed(tmp_path, capsys):
    media(tmp_path / "in", "a.mp4")
    text = "file_name,caption, split ,id,question_id,video_path\na.mp4,x,test,1,2,y\n"
    (tmp_path / "in" / "metadata.csv").write_text(text)
    summary = collect(section(["folder"], tmp_path / "in"), tmp_path / "raw")
    assert summary["sources"]["mine"]["samples"] == {"test": 1}  # in spite of the spaces
    assert summary["sources"]["mine"]["ignored_columns"] == {"metadata.csv": ["id", "question_id", "video_path"]}
    print_summary(tmp_path, summary)
    assert "mine: metadata.csv: columns that are not read: id, question_id, video_path" in capsys.readouterr().out


@pytest.mark.parametrize("list_files", [metadata.find, lambda path: tars.find_tars(entry(path)), _videos])
def test_unreadable_folders_are_named(tmp_path, monkeypatch, list_files):
    (tmp_path / "sub").mkdir()
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "sub":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root may read everything
    with pytest.raises(UserError, match=r"sub: cannot be read \(Permission denied\)"):
        list_files(tmp_path)


def test_invalid_folder_paths_are_rejected(tmp_path):
    for path, message in (
        (None, "sources.folder.path is not set"),
        (tmp_path / "no", "does not exist"),
        (Path(__file__), "is a file"),
        (tmp_path, "the folder is empty"),
    ):
        with pytest.raises(UserError, match=message):
            folder.read(path, "mine")
    media(tmp_path, "a.mp4", "metadata.jsonl", "metadata.csv")
    with pytest.raises(UserError, match="both"):
        folder.read(tmp_path, "mine")


def test_file_name_that_is_not_utf8_is_listed_as_unreferenced(tmp_path):
    media(tmp_path, "a.mp4")
    jsonl(tmp_path, {"file_name": "a.mp4", "caption": "x"})
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt"))).touch()
    assert folder.read(tmp_path, "mine").unreferenced == ["\\udcff.txt"]
