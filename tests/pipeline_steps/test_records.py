"""Records survive a round trip, bad ones are named, and files and folders are written whole or not at all."""

import json
import threading
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline_steps.common import files
from pipeline_steps.common.errors import UserError
from pipeline_steps.common.files import parse, replaced_folder, to_json, write_jsonl, write_text
from pipeline_steps.common.hashing import fingerprint
from pipeline_steps.common.schemas import RawSample, read_samples, slug
from pipeline_steps.training.__main__ import shared_scratch
from tests.pipeline_steps.clips import text_row


def test_round_trip_with_every_kind_of_line_break(tmp_path):
    sample = RawSample(**text_row("a", "one\u2028two\x85three\nfour", "π", "train"))
    write_jsonl(tmp_path / "deep" / "index.jsonl", [sample, sample.model_copy(update={"key": "b"})])
    assert [s.key for s in read_samples(tmp_path / "deep" / "index.jsonl")] == ["a", "b"]
    assert read_samples(tmp_path / "deep" / "index.jsonl")[0] == sample


def test_numbers_of_a_list_share_a_line():
    value = {"a": [1, 2.5, -3e-05, None], "b": ["[\n 1,\n 2\n]", "2"], "c": [[1, 2], []], "d": [{"e": [True]}]}
    text = to_json(value, indent=1)
    assert json.loads(text) == value
    for line in (' "a": [1, 2.5, -3e-05, null],\n', "  [1, 2],\n", '   "e": [true]\n'):
        assert line in text
    assert to_json(value) == json.dumps(value, sort_keys=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": "a.b"}, "key: String should match pattern"),
        ({"extra": 1}, "extra: Extra inputs"),
        ({"split": "dev"}, "split: Input should be 'train', 'validation' or 'test'"),
        ({"kind": "video", "path": "a.mp4"}, "needs its sha256"),
        ({"items": []}, "items: Tuple should have at least 1 item"),
        ({"items": [{"task": "f"}]}, "an item has one of 'assistant' .*, 'messages' and 'options'"),
        ({"items": [{"task": "f", "assistant": "a", "target": 0}]}, "target 0 of 0 objects"),
    ],
)
def test_bad_records_are_named(change, message):
    with pytest.raises(UserError, match=rf"^index line 3: .*{message}"):
        parse(RawSample, to_json({**text_row("a", "q", "a"), **change}), "index line 3")


def test_a_failed_folder_leaves_the_old_one(tmp_path):
    with replaced_folder(tmp_path / "out") as folder:
        (folder / "one").touch()
    with pytest.raises(FileNotFoundError), replaced_folder(tmp_path / "out") as folder:
        (folder / "two").rename(folder / "three")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["one"]
    with replaced_folder(tmp_path / "out") as folder:
        (folder / "three").touch()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["three"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failed_folder_leaves_the_old_one_after_a_kill_between_two_renames(tmp_path):
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old" / "one").touch()
    with pytest.raises(KeyboardInterrupt), replaced_folder(tmp_path / "out"):
        raise KeyboardInterrupt
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["one"]


def test_a_second_writer_waits_and_finds_the_folder_empty(tmp_path):
    inside, go, seen = threading.Event(), threading.Event(), []

    def first():
        with replaced_folder(tmp_path / "out") as folder:
            (folder / "one").touch()
            inside.set()
            go.wait(20)

    def second():
        with replaced_folder(tmp_path / "out") as folder:
            seen.extend(folder.iterdir())
            (folder / "two").touch()

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    assert inside.wait(20)
    threads[1].start()
    threads[1].join(0.3)
    assert threads[1].is_alive()
    assert not (tmp_path / "out").exists()
    go.set()
    for thread in threads:
        thread.join(20)
    assert seen == []
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == ["out", "out/two"]


def test_a_run_that_waits_for_its_scratch_folder_says_so_each_minute(tmp_path, monkeypatch):
    monkeypatch.setenv("RUN_SCRATCH", str(tmp_path))
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    heard = []
    with ExitStack() as other:
        folder, _ = other.enter_context(files.locked_scratch("stage1", "work"))

        def each_minute():
            heard.append(len(heard))
            if len(heard) == 3:
                other.close()

        with files.locked_scratch("stage1", "work", each_minute) as (again, _):
            assert again == folder
    assert heard == [0, 1, 2]


def test_ranks_wait_with_the_main_process_for_the_scratch_folder():
    told = [None, None, Path("folder")]
    group = SimpleNamespace(is_main=False, broadcast=lambda value: told.pop(0))
    with shared_scratch(group, "stage1", "work") as folder:
        assert folder == Path("folder")


def test_what_a_killed_run_left_is_removed(tmp_path):
    (tmp_path / ".out.partial" / "folder").mkdir(parents=True)
    (tmp_path / ".out.partial" / "file").touch()
    with replaced_folder(tmp_path / "out") as folder:
        assert list(folder.iterdir()) == []
    assert [p.name for p in tmp_path.rglob("*")] == ["out"]


def test_a_file_in_the_way_of_a_folder_is_left_alone(tmp_path):
    (tmp_path / "out").write_text("mine")
    with (
        pytest.raises(UserError, match="out: is a file, but the output is a folder"),
        replaced_folder(tmp_path / "out"),
    ):
        pass
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder: cannot be written"):
        write_text(tmp_path / "folder", "text")
    assert {p.name for p in tmp_path.iterdir()} == {"out", "folder"}
    assert (tmp_path / "out").read_text() == "mine"


def test_fingerprint_depends_on_values_and_bytes(tmp_path):
    path = tmp_path / "code.py"
    path.write_text("a")
    first = fingerprint({"x": 1, "y": 2}, path)
    assert first == fingerprint({"y": 2, "x": 1}, path)
    assert first != fingerprint({"x": 1, "y": 3}, path)
    path.write_text("b")
    assert first != fingerprint({"x": 1, "y": 2}, path)


def test_slug():
    assert slug("My clips/été 1.mp4") == "My-clips-t-1-mp4"
