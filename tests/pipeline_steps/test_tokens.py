"""The stage: alignment with the shards, what every item became, other people's shards, several processes."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter

import pytest
from pydantic import ValidationError
from tokenizers import normalizers

from pipeline_steps.common import params, sidecar
from pipeline_steps.common.errors import UserError
from pipeline_steps.common.files import read_record
from pipeline_steps.common.hashing import sha256_file
from pipeline_steps.common.schemas import SPLITS, FramePolicy, RawSample, ShardsManifest, SourceCounts, TokensManifest
from pipeline_steps.shards.__main__ import make_manifest, publish
from pipeline_steps.shards.pack import Settings, pack_shard
from pipeline_steps.tokens import shard
from pipeline_steps.tokens.__main__ import build
from pipeline_steps.tokens.chat import load_tokenizer
from tests.pipeline_steps.chats import make_section, save_tokenizer, turns
from tests.pipeline_steps.clips import grey_frames, index_row, text_row, write_clip, write_image

FRAMES = FramePolicy(image_size=16, resize_mode="crop", fps=2.0, max_frames=4, jpeg_quality=95)


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("language_model"), "chatml")


def pack(folder, groups):
    """folder/shards from folder/raw: {(split, shard): samples}."""
    settings = Settings(raw_dir=str(folder / "raw"), frames=FRAMES)
    reports = {
        place: pack_shard(group, settings, folder / "packed" / place[0] / place[1]) for place, group in groups.items()
    }
    (folder / "shards").mkdir()
    publish(make_manifest(reports, sum(map(len, groups.values())), FRAMES), folder / "packed", folder / "shards")
    return folder / "shards"


@pytest.fixture
def shards_dir(tmp_path):
    """Shards with two clips, one still and three chats; one does not fit max_tokens, one only without its last turn."""
    raw = tmp_path / "raw"
    write_clip(raw / "a.mp4", grey_frames(3))
    write_clip(raw / "b.mp4", grey_frames(2))
    write_image(raw / "c.jpg", grey_frames(1)[0])
    questions = [
        {"user": None, "assistant": "grey", "task": "caption"},
        {"user": "Which?", "assistant": "red: 1 2", "task": "card", "cue": "red:"},
        {"user": "Which?", "options": ["red", "blue"], "correct_option": 1, "task": "choice"},
    ]
    rows = [index_row(raw, "a.mp4", split="train", items=questions), index_row(raw, "b.mp4", split="test")]
    rows += [index_row(raw, "c.jpg", kind="image", split="train")]
    rows += [text_row("chat-1", "Say 1", "1", "train"), text_row("chat-2", "Count", "1 2 3 " * 20, "train")]
    rows += [text_row("chat-3", None, None, "train", messages=turns("Say 1", "1", "Count", "1 2 3 " * 20))]
    rows[-1]["source"] = "other"
    samples = [RawSample(**row) for row in rows]
    groups = {
        ("train", "000000"): samples[:1] + samples[3:],
        ("train", "000001"): [samples[2]],
        ("test", "000000"): [samples[1]],
    }
    return pack(tmp_path, groups)


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*.*"))}


# ---------------------------------------------------------------- rows and counts


def test_stage_is_aligned_with_the_shards(tokenizer_dir, shards_dir, tmp_path, capsys):
    manifest = build(make_section(), shards_dir, tokenizer_dir, tmp_path / "tokens")
    assert manifest == read_record(TokensManifest, tmp_path / "tokens" / "manifest.json", "tokens")
    assert (manifest.seen, manifest.kept, manifest.system) == (8, 7, "Watch.")
    assert [(d.key, d.item) for d in manifest.dropped] == [("chat-2", 0)]
    assert "tokens, max_tokens is 64" in manifest.dropped[0].reason
    assert [(d.key, d.item) for d in manifest.truncated] == [("chat-3", 0)]
    told = capsys.readouterr().err
    assert "dropped 1 of 8 items:\n  chat-2 item 0: " in told
    assert "truncated 1 of 8 items to their first turns:\n  chat-3 item 0: " in told
    assert [split for split in SPLITS if f"no item of split '{split}'" in told] == ["validation"]
    shards = read_record(ShardsManifest, shards_dir / "manifest.json", "shards")
    for split, entry in shards.splits.items():
        tokens = manifest.splits[split].shards
        assert [t.shard_sha256 for t in tokens] == [s.sha256 for s in entry.shards]
        assert [t.name for t in tokens] == [s.name.replace(".tar", ".arrow") for s in entry.shards]
    table = sidecar.read(tmp_path / "tokens" / "train" / "000000.arrow")
    assert table["key"].to_pylist() == ["test-a-mp4"] * 3 + ["chat-1", "chat-3"]
    assert table["item"].to_pylist() == [0, 1, 2, 0, 0]
    assert table["num_frames"].to_pylist() == [3, 3, 3, 0, 0]
    assert table["kind"].to_pylist() == ["video"] * 3 + ["text"] * 2
    assert table["cue"].to_pylist() == ["", "red:", "", "", ""]
    assert table["answer"].to_pylist() == ["grey", "red: 1 2", "B", "1", "1"]
    assert table["target"].to_pylist() == [None] * 5
    assert table["truncated_turns"].to_pylist() == [0, 0, 0, 0, 1]
    assert all(any(mask) for mask in table["score_mask"].to_pylist())


def test_manifest_counts_items_by_source(tokenizer_dir, shards_dir, tmp_path):
    manifest = build(make_section(), shards_dir, tokenizer_dir, tmp_path / "tokens")
    rows = [row for path in (tmp_path / "tokens").rglob("*.arrow") for row in sidecar.read(path).to_pylist()]
    tokens = Counter()
    for row in rows:
        tokens[row["source"]] += len(row["input_ids"])
    assert manifest.sources == {
        "other": SourceCounts(seen=1, kept=1, truncated=1, dropped=0, tokens=tokens["other"]),
        "test": SourceCounts(seen=7, kept=6, truncated=0, dropped=1, tokens=tokens["test"]),
    }
    assert sum(entry.num_tokens for entry in manifest.splits.values()) == tokens.total()
    content = manifest.model_dump()
    for name in ("seen", "kept", "truncated", "dropped"):
        wrong = content | {"sources": content["sources"] | {"test": {**content["sources"]["test"], name: 3}}}
        with pytest.raises(ValidationError, match=r"seen, kept, truncated, dropped are \[8, 7, 1, 1\], but by source"):
            TokensManifest.model_validate(wrong)


def test_prompts_of_a_source_without_samples_are_noted(tokenizer_dir, shards_dir, tmp_path, capsys):
    section = make_section({"source": "tset", "video": "Which?"}, {"source": "other", "video": "What?"})
    build(section, shards_dir, tokenizer_dir, tmp_path / "tokens")
    told = capsys.readouterr().err
    assert told.count("note: tokens.prompts") == 1
    assert "entry for source 'tset', but no packed sample is of this source (sources: other, test). Correct" in told


def test_too_many_dropped_items_or_none_left_fail_the_stage(tokenizer_dir, shards_dir, tmp_path):
    with pytest.raises(
        UserError, match=r"1 of 7 items of 'test' were dropped, more than .*max_dropped allows \(10\.0%\)"
    ):
        build(make_section(max_dropped=0.1), shards_dir, tokenizer_dir, tmp_path / "tokens")
    with pytest.raises(UserError, match="no training item is left of 8 items"):
        build(make_section(max_dropped=1.0, max_tokens=5), shards_dir, tokenizer_dir, tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()


def test_dropped_items_are_counted_by_source(tokenizer_dir, tmp_path):
    """What a small folder loses is not hidden by the many items of another source."""
    rows = [text_row(f"chat-{i}", "One?", "1", "train") for i in range(30)]
    rows.append(text_row("mine-0", "Long?", "x" * 99, "train") | {"source": "mine"})
    shards_dir = pack(tmp_path, {("train", "000000"): [RawSample(**row) for row in rows]})
    with pytest.raises(UserError, match="1 of 1 items of 'mine' were dropped"):
        build(make_section(), shards_dir, tokenizer_dir, tmp_path / "tokens")


def test_answer_without_tokens_is_rejected(tokenizer_dir, tmp_path, shards_dir):
    tokenizer = load_tokenizer(tokenizer_dir)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("grey", "")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(UserError, match=r"sample 'test-.*': the answer 'grey' has no tokens"):
        build(make_section(), shards_dir, tmp_path / "tokenizer", tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()


# ---------------------------------------------------------------- places in the tar


def test_offsets_point_to_the_members_of_the_tar(tokenizer_dir, shards_dir, tmp_path):
    build(make_section(), shards_dir, tokenizer_dir, tmp_path / "tokens")
    num_frames = 0
    for path in sorted((tmp_path / "tokens").rglob("*.arrow")):
        tar_path = shards_dir / path.parent.name / f"{path.stem}.tar"
        content = tar_path.read_bytes()
        with tarfile.open(tar_path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        for row in sidecar.read(path).to_pylist():
            places = zip(row["frame_offsets"], row["frame_sizes"], strict=True)
            frames = [content[offset : offset + size] for offset, size in places]
            names = [name for name in members if name.split(".")[0] == row["key"] and name.endswith(".jpg")]
            assert frames == [members[name] for name in names]
            assert len(frames) == row["num_frames"]
            record = content[row["sample_offset"] : row["sample_offset"] + row["sample_size"]]
            assert record == members[f"{row['key']}.json"]
            num_frames += len(frames)
    assert num_frames == 3 * 3 + 2 + 1


def edited(members, name, content):
    return [(known, content if known == name else old) for known, old in members]


def as_record(members, **changes):
    """The members with another record of the still."""
    record = json.loads(dict(members)["test-c-jpg.json"])
    return edited(members, "test-c-jpg.json", json.dumps(record | changes).encode())


DAMAGE = {
    "a frame too many": (lambda m: [m[0], *m], "frame_count is 1, but 2 frames precede it"),
    "no frame": (lambda m: m[1:], "frame_count is 1, but 0 frames precede it"),
    "another count": (lambda m: as_record(m, frame_count=2), "frame_count is 2, but 1 frames precede it"),
    "another key": (lambda m: as_record(m, key="d"), r"test-c-jpg\.json: the record has another key, 'd'"),
    "another name": (lambda m: [("d.jpg", m[0][1]), *m[1:]], r"before it is d\.jpg, expected the file test-c-jpg\.jpg"),
    "a number": (lambda m: [("test-c-jpg.000.jpg", m[0][1]), *m[1:]], r"is test-c-jpg\.000\.jpg, expected"),
    "twice": (lambda m: [*m, *m], "the key 'test-c-jpg' occurs twice"),
    "left over": (lambda m: [*m, ("x.jpg", b""), ("y.jpg", b"")], r"x\.jpg and 1 more frames have no record"),
    "no sample": (lambda m: [], r"000001\.tar: found 0 samples, expected 1 \(manifest\.json\)"),
    "no JSON": (lambda m: edited(m, "test-c-jpg.json", b"{"), r"000001\.tar: test-c-jpg\.json: row: Invalid JSON"),
    "empty": (lambda m: edited(m, "test-c-jpg.json", b""), r"000001\.tar: test-c-jpg\.json: row: Invalid JSON"),
    "no utf-8": (lambda m: edited(m, "test-c-jpg.json", m[1][1].replace(b"What?", b"\xff\xfe")), "row: Invalid JSON"),
    "deep": (lambda m: edited(m, "test-c-jpg.json", b"[" * 10**5), "row: Invalid JSON: recursion limit"),
    "no such field": (lambda m: as_record(m, colour=1), r"test-c-jpg\.json: colour: Extra inputs"),
}


def rewrite(shards_dir, change):
    """Another content of the shard with the still, and a manifest that knows it."""
    path = shards_dir / "train" / "000001.tar"
    with tarfile.open(path) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(path, "w") as tar:
        for name, content in change(members):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    accept(shards_dir, path)


def accept(shards_dir, path):
    content = json.loads((shards_dir / "manifest.json").read_text())
    next(s for s in content["splits"]["train"]["shards"] if s["name"] == path.name)["sha256"] = sha256_file(path)
    (shards_dir / "manifest.json").write_text(json.dumps(content))


@pytest.mark.parametrize(("change", "message"), DAMAGE.values(), ids=DAMAGE)
def test_shards_that_contradict_their_records_are_rejected(tokenizer_dir, shards_dir, tmp_path, change, message):
    rewrite(shards_dir, change)
    with pytest.raises(UserError, match=message):
        build(make_section(), shards_dir, tokenizer_dir, tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()


def test_truncated_shard_is_rejected(tokenizer_dir, shards_dir, tmp_path):
    path = shards_dir / "train" / "000001.tar"
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    for length in (last.offset_data + 10, last.offset_data - 100, last.offset - 300, 100, 0):
        path.write_bytes(content[:length])
        accept(shards_dir, path)
        with pytest.raises(
            UserError, match=r"000001\.tar: (damaged after|found 0 samples|test-c-jpg\.jpg and 0 more frames have)"
        ):
            build(make_section(), shards_dir, tokenizer_dir, tmp_path / "tokens")


def test_foreign_or_missing_shards_are_rejected(tokenizer_dir, shards_dir, tmp_path):
    section = make_section()
    with pytest.raises(UserError, match=r"manifest\.json: missing.*`dvc repro shards`"):
        build(section, tmp_path / "none", tokenizer_dir, tmp_path / "tokens")
    tar = shards_dir / "train" / "000001.tar"
    content = tar.read_bytes()
    tar.write_bytes(content[:-1] + b"x")
    with pytest.raises(UserError, match=r"000001\.tar: sha256 is .*, expected .* .manifest\.json"):
        build(section, shards_dir, tokenizer_dir, tmp_path / "tokens")
    tar.unlink()
    with pytest.raises(UserError, match=r"000001\.tar: missing, but listed in manifest\.json"):
        build(section, shards_dir, tokenizer_dir, tmp_path / "tokens")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/tokens: cannot be written"):
        build(section, shards_dir, tokenizer_dir, tmp_path / "file" / "tokens")


# ---------------------------------------------------------------- processes


def test_output_bytes_do_not_depend_on_the_number_of_processes(tokenizer_dir, shards_dir, tmp_path):
    for number in (1, 2, 3):
        build(make_section(), shards_dir, tokenizer_dir, tmp_path / f"tokens-{number}", number)
    assert files_of(tmp_path / "tokens-1") == files_of(tmp_path / "tokens-2") == files_of(tmp_path / "tokens-3")
    assert len(files_of(tmp_path / "tokens-1")) == 4


def _dies(job):
    os.kill(os.getpid(), signal.SIGKILL)


def test_errors_in_worker_processes_reach_the_user(tokenizer_dir, shards_dir, tmp_path, monkeypatch):
    rewrite(shards_dir, lambda members: edited(members, "test-c-jpg.json", b"{"))
    with pytest.raises(UserError, match=r"000001\.tar: test-c-jpg\.json: row: Invalid JSON"):
        build(make_section(), shards_dir, tokenizer_dir, tmp_path / "tokens", 2)
    monkeypatch.setattr(shard, "_work", _dies)
    with pytest.raises(UserError, match="one of 2 processes was killed, probably for lack of memory"):
        build(make_section(), shards_dir, tokenizer_dir, tmp_path / "tokens", 2)
    assert not (tmp_path / "tokens").exists()


WAITING = """
import os, sys, time
from pipeline_steps.tokens import __main__ as stage, shard
from tests.pipeline_steps.chats import make_section

def wait(job):
    print(os.getpid(), flush=True)
    time.sleep(60)

if __name__ == "__main__":
    shard._work = wait
    stage.build(make_section(), *sys.argv[1:], 2)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's parent death signal")
def test_killed_stage_leaves_no_worker_process(tokenizer_dir, shards_dir, tmp_path):
    (tmp_path / "waiting.py").write_text(WAITING)
    command = [sys.executable, tmp_path / "waiting.py", shards_dir, tokenizer_dir, tmp_path / "tokens"]
    environment = os.environ | {"PYTHONPATH": str(params.ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    workers = [int(process.stdout.readline()) for _ in range(2)]
    process.kill()
    process.wait()
    end = time.monotonic() + 10
    while running := [number for number in workers if os.path.exists(f"/proc/{number}/cwd")]:
        assert time.monotonic() < end, f"still there: {running}"
        time.sleep(0.05)
    build(make_section(), shards_dir, tokenizer_dir, tmp_path / "tokens")  # the lock of the output is free
