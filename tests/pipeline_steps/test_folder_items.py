"""Rows of a folder's metadata: chats, choices, preferences, several images, parquet."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline_steps.common.errors import UserError
from pipeline_steps.common.hashing import media_sha256
from pipeline_steps.common.schemas import read_samples
from pipeline_steps.sources import folder
from pipeline_steps.sources.__main__ import collect
from tests.pipeline_steps.folders import items, jsonl, media
from tests.pipeline_steps.source_section import section

CHAT = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}]
MORE = [{"role": "system", "content": "Be brief."}, *CHAT, *CHAT]
CHOICE = {"question": "Which?", "options": ["a dog", "a cat", "2"], "answer": "a cat"}


def choice(correct):
    return {"user": "Which?", "options": ("a dog", "a cat", "2"), "correct_option": correct, "task": "choice"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": CHAT}, [{"messages": tuple(CHAT), "task": "question"}]),
        ({"messages": MORE, "task": "x"}, [{"messages": tuple(MORE), "task": "x"}]),
        (CHOICE, [choice(1)]),
        (CHOICE | {"answer": 2}, [choice(2)]),
        (CHOICE | {"answer": 0}, [choice(0)]),
        (CHOICE | {"answer": "2"}, [choice(2)]),
        (CHOICE | {"answer": "0"}, [choice(0)]),
        (CHOICE | {"caption": "C."}, [{"assistant": "C.", "task": "caption"}, choice(1)]),
        (
            {"question": "A?", "answer": "B.", "rejected": "C."},
            [{"user": "A?", "assistant": "B.", "rejected": "C.", "task": "preference"}],
        ),
        ({"caption": "B.", "rejected": "C."}, [{"assistant": "B.", "rejected": "C.", "task": "preference"}]),
        (
            {"messages": CHAT, "rejected": "C.", "task": "x"},
            [{"messages": tuple(CHAT), "rejected": "C.", "task": "x"}],
        ),
        (
            {"caption": "C.", "messages": CHAT},
            [{"assistant": "C.", "task": "caption"}, {"messages": tuple(CHAT), "task": "question"}],
        ),
    ],
)
def test_every_form_of_row_makes_its_items(tmp_path, row, expected):
    assert items(tmp_path, row) == expected


def test_rows_of_one_file_may_have_different_forms(tmp_path):
    found = items(tmp_path, {"caption": "C."}, {"messages": CHAT}, CHOICE, {"question": "A?", "answer": "B."})
    assert [item["task"] for item in found] == ["caption", "question", "choice", "question"]


ROWS = [
    {"file_name": "a.mp4", "caption": "C."},
    {"file_name": "a.mp4", "messages": MORE, "task": "chats"},
    {"file_name": "b.jpg", **CHOICE},
    {"file_names": ["b.jpg", "c.png"], "question": "Same?", "answer": "No.", "split": "test"},
]


def read_with_container(tmp_path):
    return folder.read(tmp_path, "mine", output=tmp_path / "out").samples


def test_csv_and_parquet_read_like_jsonl(tmp_path):
    media(tmp_path, "a.mp4", "b.jpg", "c.png", "out/x")
    jsonl(tmp_path, *ROWS)
    expected = read_with_container(tmp_path)
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "out" / "mine" / "00000.bin").unlink()
    with open(tmp_path / "metadata.csv", "w", newline="") as file:
        names = ["file_name", "file_names", "caption", "question", "answer", "options", "messages", "task", "split"]
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in ROWS)
    assert read_with_container(tmp_path) == expected
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "out" / "mine" / "00000.bin").unlink()
    pq.write_table(
        pa.Table.from_pylist([{**dict.fromkeys(names), **row} for row in ROWS]), tmp_path / "metadata.parquet"
    )
    assert read_with_container(tmp_path) == expected


def test_list_of_images_forms_one_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "CONTAINER_SIZE", 10)
    names = ["x/a.jpg", "x/b.jpg", "c.png"]
    media(tmp_path / "pictures", *names)
    jsonl(
        tmp_path / "pictures",
        {"file_names": names, "question": "How many?", "answer": "Three."},
        {"images_file_names": names[:2], "question": "How many?", "answer": "Two."},
        {"file_names": names, "caption": "Letters."},
        {"file_names": names[:1], "caption": "An a."},
    )
    collect(section(["folder"], tmp_path / "pictures"), tmp_path / "raw")
    samples = read_samples(tmp_path / "raw" / "index.jsonl")
    assert {sample.path for sample in samples} == {
        str(tmp_path / "pictures" / names[0]),
        "mine/00000.bin",
        "mine/00001.bin",
    }
    assert {sample.video_id for sample in samples} == {"x/a.jpg"}  # one picture in common: never in two splits
    by_count = {len(sample.parts): sample for sample in samples}
    assert [item.assistant for item in by_count[3].items] == ["Three.", "Letters."]
    for sample in samples:
        path = tmp_path / "raw" / sample.path
        assert sample.kind == "image"
        assert sample.sha256 == media_sha256(path, sample.parts)
        content = path.read_bytes()
        assert [content[offset : offset + size].decode() for offset, size in sample.parts] == names[: len(sample.parts)]
    first = {p.name: p.read_bytes() for p in (tmp_path / "raw" / "mine").iterdir()}
    collect(section(["folder"], tmp_path / "pictures"), tmp_path / "raw")
    assert {p.name: p.read_bytes() for p in (tmp_path / "raw" / "mine").iterdir()} == first


A = {"file_name": "a.mp4"}
ERRORS = {
    "chat is text": ({**A, "messages": "hello"}, "messages is 'hello', expected"),
    "empty chat": ({**A, "messages": []}, "found no message"),
    "chat of one": ({**A, "messages": CHAT[:1]}, "start with user and end with assistant, found user"),
    "late system": (
        {**A, "messages": [*CHAT, MORE[0], *CHAT]},
        "start with user and end with assistant, found user, assistant, system",
    ),
    "unknown role": ({**A, "messages": [{"role": "bot", "content": "x"}]}, "messages.0.role"),
    "no content": ({**A, "messages": [{"role": "user"}]}, "messages.0.content"),
    "blank turn": ({**A, "messages": [*CHAT, {"role": "user", "content": " "}]}, "message 2 is blank"),
    "chat and question": ({**A, "messages": CHAT, "question": "A?", "answer": "B."}, "in two rows"),
    "cue of a chat": ({**A, "messages": CHAT, "cue": "B"}, "not options or messages"),
    "one option": ({**A, **CHOICE, "options": ["a cat"]}, "expected a list of 2 to 26 texts"),
    "many options": ({**A, **CHOICE, "options": [str(i) for i in range(27)]}, "expected a list of 2 to 26 texts"),
    "an option with spaces twice": ({**A, **CHOICE, "options": ["a cat", " a cat "]}, "'a cat' occurs twice"),
    "options are text": ({**A, **CHOICE, "options": "a cat"}, "expected a list of 2 to 26 texts"),
    "an option is a number": ({**A, **CHOICE, "options": ["a cat", 1]}, "an option is 1, expected text"),
    "an option twice": ({**A, **CHOICE, "options": ["a cat", "a cat"]}, "'a cat' occurs twice"),
    "no such option": ({**A, **CHOICE, "answer": "a bird"}, "the answer is 'a bird', expected one of the options"),
    "a letter": ({**A, **CHOICE, "answer": "B"}, "the answer is 'B', expected one of the options"),
    "a number too large": ({**A, **CHOICE, "answer": 3}, "or a number from 0 to 2"),
    "a negative number": ({**A, **CHOICE, "answer": -1}, "or a number from 0 to 2"),
    "true": ({**A, **CHOICE, "answer": True}, "the answer is True, expected one of the options"),
    "options only": ({**A, "options": ["a", "b"]}, "found only options"),
    "options without answer": ({**A, "question": "A?", "options": ["a", "b"]}, "found only question and options"),
    "options and rejected": ({**A, **CHOICE, "rejected": "a dog"}, "has no rejected answer"),
    "rejected only": ({**A, "rejected": "a dog"}, "found only rejected"),
    "rejected is blank": ({**A, "caption": "x", "rejected": " "}, "rejected is blank"),
    "both names": ({**A, "file_names": ["b.jpg"], "caption": "x"}, "found both file_name and file_names"),
    "names are text": ({"file_names": "b.jpg", "caption": "x"}, "file_names is 'b.jpg', expected a list of images"),
    "no names": ({"file_names": [], "caption": "x"}, "expected a list of images"),
    "a name is a number": ({"file_names": ["b.jpg", 3], "caption": "x"}, "file_name is 3"),
    "a name leads out": ({"file_names": ["b.jpg", "../c.jpg"], "caption": "x"}, "'../c.jpg' is outside"),
    "a missing image": ({"file_names": ["b.jpg", "gone.jpg"], "caption": "x"}, "'gone.jpg' does not exist"),
    "a video among images": ({"file_names": ["b.jpg", "a.mp4"], "caption": "x"}, "'a.mp4' is a video"),
}


@pytest.mark.parametrize(("row", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_invalid_rows_are_rejected(tmp_path, row, message):
    media(tmp_path / "in", "a.mp4", "b.jpg")
    jsonl(tmp_path / "in", {"file_name": "b.jpg", "caption": "x", "question": "A?", "answer": "B."}, row)
    with pytest.raises(UserError) as error:
        collect(section(["folder"], tmp_path / "in"), tmp_path / "out" / "raw")
    assert "metadata.jsonl line 2" in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_invalid_cells_and_metadata_files_are_rejected(tmp_path):
    media(tmp_path, "a.mp4")
    (tmp_path / "metadata.csv").write_text("file_name,messages\na.mp4,hello\n")
    with pytest.raises(UserError, match=r"metadata.csv line 2: messages is 'hello', expected a list as JSON text"):
        folder.read(tmp_path, "mine")
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(UserError, match=r"metadata.parquet: not a parquet file"):
        folder.read(tmp_path, "mine")
    jsonl(tmp_path, {"file_name": "a.mp4", "caption": "x"})
    with pytest.raises(UserError, match=r"both metadata.jsonl and metadata.parquet"):
        folder.read(tmp_path, "mine")


def test_pictures_in_a_parquet_file_are_not_printed(tmp_path):
    picture = {"bytes": b"x" * 10_000, "path": None}
    pq.write_table(pa.table({"image": [picture], "caption": ["x"]}), tmp_path / "metadata.parquet")
    with pytest.raises(UserError, match=r"row holds a picture itself, .* Save the pictures as files") as error:
        folder.read(tmp_path, "mine")
    assert len(str(error.value)) < 300
    (tmp_path / "metadata.parquet").unlink()
    jsonl(tmp_path, {"file_name": "x" * 10_000, "caption": "x"}, {"file_name": ["x" * 10_000], "caption": "x"})
    with pytest.raises(UserError, match="2 rows are unusable") as error:
        folder.read(tmp_path, "mine")
    assert len(str(error.value)) < 1500


def test_source_names_must_be_unique(tmp_path):
    with pytest.raises(ValueError, match="two sources have the name 'chat'"):
        section(["folder"], tmp_path).model_validate(
            section(["folder"], tmp_path).model_dump() | {"folder": {"path": None, "name": "chat"}}
        )
