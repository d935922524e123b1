"""Metadata as other projects write it: splits as folders, LLaVA's rows, other encodings and separators."""

import json
import re
import unicodedata

import pytest

from pipeline_steps.common.errors import UserError
from pipeline_steps.sources import folder
from pipeline_steps.sources.texts import answer_text, decoded, without_placeholders
from tests.pipeline_steps.archives import only, read_tars, write_tar
from tests.pipeline_steps.folders import items, jsonl, media


def row(name, **more):
    return {"file_name": name, "caption": "x", **more}


# ---------------------------------------------------------------- splits as folders


@pytest.mark.parametrize(
    ("place", "split"),
    [
        ("train", "train"),
        ("training", "train"),
        ("validation", "validation"),
        ("val", "validation"),
        ("valid", "validation"),
        ("dev", "validation"),
        ("test", "test"),
        ("Test", "test"),
        ("eval", "test"),
        ("trains", None),
        ("deeper/train", None),
    ],
)
def test_the_first_folder_of_a_file_is_its_split(tmp_path, place, split):
    media(tmp_path, f"{place}/x/a.mp4", "train.mp4")
    jsonl(tmp_path, row(f"{place}/x/a.mp4"), row("train.mp4"))
    found = {sample.video_id: sample.split for sample in folder.read(tmp_path, "mine").samples}
    assert found == {f"{place}/x/a.mp4": split, "train.mp4": None}


def test_metadata_in_every_split_folder(tmp_path):
    media(tmp_path, "train/a.mp4", "train/x/b.jpg", "valid/a.mp4", "test/a.mp4", "test/more.mp4")
    jsonl(tmp_path / "train", row("a.mp4"), row("x/b.jpg"), {"file_name": "a.mp4", "question": "A?", "answer": 1})
    jsonl(tmp_path / "valid", row("a.mp4", split="validation"))
    (tmp_path / "test/metadata.csv").write_text("file_name,caption\na.mp4,x\n")
    found = folder.read(tmp_path, "mine")
    assert {sample.key: sample.split for sample in found.samples} == {
        "mine-train-a": "train",
        "mine-train-x-b": "train",
        "mine-valid-a": "validation",
        "mine-test-a": "test",
    }
    by_key = {sample.key: sample for sample in found.samples}
    assert [item.assistant for item in by_key["mine-train-a"].items] == ["x", "1"]
    assert by_key["mine-valid-a"].path == str(tmp_path / "valid/a.mp4")
    assert found.unreferenced == ["test/more.mp4"]


def test_contradicting_splits_stop(tmp_path):
    media(tmp_path, "train/a.jpg", "test/b.jpg", "c.jpg")
    jsonl(tmp_path, row("train/a.jpg"), row("test/b.jpg", split="train"))
    message = r"line 2 \(test/b.jpg\): split is 'train', but the folder is test/, which means 'test'"
    with pytest.raises(UserError, match=message):
        folder.read(tmp_path, "mine")
    for other in ("test/b.jpg", "c.jpg"):
        jsonl(tmp_path, {"file_names": ["train/a.jpg", other], "caption": "x"})
        with pytest.raises(UserError, match=r"line 1 \(train/a.jpg and 1 more\): its images are in the folders of sev"):
            folder.read(tmp_path, "mine")
    jsonl(tmp_path / "train", row("a.jpg"))
    with pytest.raises(UserError, match=r"holds both metadata.jsonl and train/metadata.jsonl"):
        folder.read(tmp_path, "mine")
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "train/metadata.csv").write_text("file_name,caption\na.jpg,x\n")
    with pytest.raises(UserError, match=r"holds both train/metadata.jsonl and train/metadata.csv"):
        folder.read(tmp_path, "mine")


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("options", "answer", "expected"),
    [
        (["1", "2", "3"], 2, 1),
        (["1", "2", "3"], "2", 1),
        ([1, 2, 3], 2, 1),
        (["2", "3", "4"], 2, 0),
        (["0.5", "1.5"], 1.5, 1),
        (["1.0", "2.0"], 2, 1),
        (["1.0", "2.0"], 2.0, 1),
        (["a", "b", "2"], 1, 1),
        (["a", "b", "2"], 1.0, 1),
        (["none", "1", "2"], 1, 1),
        (["1", "none"], "1", 0),  # text that is an option is this option
        (["No", "Yes"], True, 1),
        (["true", "false"], False, 1),
    ],
)
def test_number_answers_of_multiple_choice(tmp_path, options, answer, expected):
    (item,) = items(tmp_path, {"question": "Which?", "options": options, "answer": answer})
    assert item["correct_option"] == expected


@pytest.mark.parametrize(
    ("options", "answer", "message"),
    [
        (["1", "none"], 1, "the answer 1 is ambiguous: option 1 is 'none', but option 0 is '1'"),
        (["10", "20", "30"], 1, r"the answer is 1, expected one of the options \[.10., .20., .30.\]\.$"),
        (["a", "b"], 1.5, "the answer is 1.5, expected"),
        (["yes", "true"], True, "the answer is True, expected"),
        (["a", 1], 1, "an option is 1, expected text"),
    ],
)
def test_ambiguous_answers_stop(tmp_path, options, answer, message):
    with pytest.raises(UserError, match=message):
        items(tmp_path, {"question": "Which?", "options": options, "answer": answer})


ANSWERS = [(3, "3"), (2.0, "2"), (0.5, "0.5"), (True, "yes"), (False, "no"), (["red", 2], "red, 2"), (["a"], "a")]


@pytest.mark.parametrize(("answer", "expected"), ANSWERS)
def test_answers_that_are_not_text(tmp_path, answer, expected):
    assert answer_text(answer) == expected
    (item,) = items(tmp_path / "folder", {"question": "A?", "answer": answer, "rejected": "c"})
    assert (item["assistant"], item["rejected"]) == (expected, "c")
    sample = only(tmp_path, [("k.jpg", b"x"), ("k.json", {"user": "A?", "assistant": answer})])
    assert sample.items[0].assistant == expected


@pytest.mark.parametrize("answer", [[], ["yes", "yes", "no"], [["a"]], {"a": 1}, [None]])
def test_answers_without_one_text_are_refused(tmp_path, answer):
    with pytest.raises(UserError, match=r"answer is .*, (a list that repeats an answer|expected text, a number)"):
        items(tmp_path / "folder", {"question": "A?", "answer": answer})
    _, reasons, _ = read_tars(write_tar(tmp_path / "0.tar", [("k.json", {"user": "A?", "assistant": answer})]))
    assert "assistant" in reasons["old-0-k"]


# ---------------------------------------------------------------- chats and placeholders

LLAVA = [{"from": "human", "value": "<image>\nWhat is <b>it</b>?"}, {"from": "gpt", "value": "An <image> tag."}]
TYPED = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is <b>it</b>?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "An <image> tag."}]},
]
ASKED = [("user", "What is <b>it</b>?"), ("assistant", "An <image> tag.")]


@pytest.mark.parametrize(
    "names", [{"image": "a.jpg"}, {"images": ["a.jpg"]}, {"file_name": "a.jpg", "image": "ignored"}]
)
@pytest.mark.parametrize("chat", [{"conversations": LLAVA}, {"messages": LLAVA}, {"messages": TYPED}])
def test_rows_of_llava_and_typed_contents(tmp_path, names, chat):
    media(tmp_path, "a.jpg")
    jsonl(tmp_path, {"id": "7", **names, **chat})
    (sample,) = folder.read(tmp_path, "mine").samples
    assert (sample.kind, sample.video_id) == ("image", "a.jpg")
    assert [(message.role, message.content) for message in sample.items[0].messages] == ASKED
    sample = only(tmp_path, [("k.jpg", b"x"), ("k.json", chat)])
    assert [("user", sample.items[0].user), ("assistant", sample.items[0].assistant)] == ASKED


def test_rows_of_llava_with_a_video_or_several_images(tmp_path):
    media(tmp_path, "a.mp4", "b.jpg", "c.jpg")
    jsonl(tmp_path, {"video": "a.mp4", "conversations": LLAVA}, {"image": ["b.jpg", "c.jpg"], "conversations": LLAVA})
    (tmp_path / "out").mkdir()
    one, other = folder.read(tmp_path, "mine", output=tmp_path / "out").samples
    assert {one.kind, other.kind} == {"video", "image"}
    assert {len(one.parts), len(other.parts)} == {0, 2}


def test_a_question_of_a_placeholder_alone_is_a_caption(tmp_path):
    chat = [{"from": "human", "value": "<video>"}, {"from": "gpt", "value": "A dog."}]
    (item,) = items(tmp_path / "folder", {"conversations": chat})
    assert item == {"assistant": "A dog.", "task": "caption"}
    sample = only(tmp_path, [("k.mp4", b"x"), ("k.json", {"conversations": chat})])
    assert sample.items[0].model_dump(exclude_defaults=True) == item
    with pytest.raises(UserError, match="message 2 is blank"):
        items(tmp_path / "more", {"conversations": [*LLAVA, *chat]})


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("<image>\nWhat?", "What?"),
        ("What?\n<image>", "What?"),
        ("<image> <image>\nWhat?\nWhy?", "What?\nWhy?"),
        ("Compare <image> and <image>.", "Compare and."),
        ("  What is <img>?", "  What is <img>?"),
    ],
)
def test_placeholders_leave_questions_but_not_answers(tmp_path, question, expected):
    assert without_placeholders(question) == expected
    (item,) = items(tmp_path / "folder", {"question": question, "answer": question})
    assert (item["user"], item["assistant"]) == (expected, question)
    sample = only(tmp_path, [("k.jpg", b"x"), ("k.json", {"user": question, "assistant": question})])
    assert (sample.items[0].user, sample.items[0].assistant) == (expected, question)
    text = only(tmp_path, [("k.json", {"user": question, "assistant": question, "is_text_only": True})])
    assert text.items[0].user == question  # there is no image that it could stand for


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([TYPED[0], {"role": "assistant", "content": [{"type": "image"}]}], "an answer with a part of the type image"),
        ([{"role": "user", "content": [{"type": "audio"}]}, TYPED[1]], "a part of a message is .*audio"),
        ([{"from": "bot", "value": "x"}], "role"),
    ],
)
def test_chats_that_cannot_be_read(tmp_path, messages, message):
    with pytest.raises(UserError, match="messages.[01].*" + message):
        items(tmp_path / "folder", {"messages": messages})
    _, reasons, _ = read_tars(write_tar(tmp_path / "0.tar", [("k.json", {"conversations": messages})]))
    assert re.search(message, reasons["old-0-k"])


def test_two_names_of_one_thing_stop(tmp_path):
    for row_, message in (
        ({"image": "a.mp4", "video": "a.mp4", "caption": "x"}, "found both image and video"),
        ({"messages": TYPED, "conversations": LLAVA}, "found both messages and conversations"),
    ):
        media(tmp_path, "a.mp4")
        jsonl(tmp_path, row_ if "image" in row_ else {"file_name": "a.mp4", **row_})
        with pytest.raises(UserError, match=message):
            folder.read(tmp_path, "mine")


# ---------------------------------------------------------------- encodings, separators, names


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_encodings_and_separators(tmp_path, encoding, separator):
    lines = [["file_name", "question", "answer"], ["a.mp4", "Wie heißt er, 熊?", "Bär"]]
    text = "\r\n".join(separator.join(f'"{cell}"' if "," in cell else cell for cell in line) for line in lines)
    for name in ("metadata.csv", "metadata.tsv"):
        media(tmp_path / name, "a.mp4")
        (tmp_path / name / name).write_bytes(text.encode(encoding))
        (sample,) = folder.read(tmp_path / name, "mine").samples
        assert (sample.items[0].user, sample.items[0].assistant) == ("Wie heißt er, 熊?", "Bär")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-le", "utf-16-be"])
def test_json_of_other_encodings(tmp_path, encoding):
    rows = [{"image": "a.jpg", "conversations": LLAVA}, {"image": "a.jpg", "caption": "Bär"}]
    for name, text in {
        "metadata.jsonl": "\n".join(json.dumps(row_, ensure_ascii=False) for row_ in rows),
        "metadata.json": json.dumps(rows, ensure_ascii=False, indent=1),
    }.items():
        media(tmp_path / name, "a.jpg")
        (tmp_path / name / name).write_bytes(text.encode(encoding))
        (sample,) = folder.read(tmp_path / name, "mine").samples
        assert [item.assistant for item in sample.items] == [None, "Bär"]
    contents = json.dumps({"user": "A?", "assistant": "Bär"}, ensure_ascii=False).encode(encoding)
    assert only(tmp_path, [("k.jpg", b"x"), ("k.json", contents)]).items[0].assistant == "Bär"
    assert only(tmp_path, [("k.jpg", b"x"), ("k.txt", "Bär".encode(encoding))]).items[0].assistant == "Bär"


def test_text_of_no_known_encoding_is_named(tmp_path):
    with pytest.raises(UnicodeDecodeError):
        decoded("Bär".encode("cp1252"))
    media(tmp_path, "a.mp4")
    (tmp_path / "metadata.csv").write_bytes("file_name,caption\na.mp4,Bär\n".encode("cp1252"))
    with pytest.raises(UserError, match="line 2: not UTF-8"):
        folder.read(tmp_path, "mine")
    (tmp_path / "metadata.csv").write_bytes("file_name,caption\n".encode("utf-16") + b"\0")
    with pytest.raises(UserError, match=r"metadata.csv: not UTF-16"):
        folder.read(tmp_path, "mine")


@pytest.mark.parametrize(("stored", "given"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_in_another_unicode_form(tmp_path, stored, given):
    name = "Bär/Café.mp4"
    media(tmp_path, unicodedata.normalize(stored, name))
    jsonl(tmp_path, row(unicodedata.normalize(given, name)))
    (sample,) = folder.read(tmp_path, "mine").samples
    assert sample.path == str(tmp_path / unicodedata.normalize(stored, name))


def test_names_that_mean_two_files_are_named(tmp_path):
    first, second = "é\u0323.mp4", "e\u0323\u0301.mp4"  # two spellings of one letter with two marks
    media(tmp_path, first, second)
    jsonl(tmp_path, row("\u1eb9\u0301.mp4"))
    with pytest.raises(UserError, match=r"could be '.*' or '.*'. Rename one"):
        folder.read(tmp_path, "mine")
    jsonl(tmp_path, row(first), row(second))
    assert len(folder.read(tmp_path, "mine").samples) == 2


def test_windows_paths_and_upper_case(tmp_path):
    media(tmp_path, "x/y/a.mp4", "back\\slash.mp4")
    jsonl(tmp_path, row("x\\y\\a.mp4"), row("back\\slash.mp4"))
    assert {sample.video_id for sample in folder.read(tmp_path, "mine").samples} == {"x/y/a.mp4", "back\\slash.mp4"}
    for name, message in (("x\\..\\..\\a.mp4", "is outside of"), ("X\\Y\\A.mp4", "which has 'x/y/a.mp4'")):
        jsonl(tmp_path, row(name))
        with pytest.raises(UserError, match=message):
            folder.read(tmp_path, "mine")
